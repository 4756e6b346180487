//! Log-probabilities and gradients against plain f64 loops, and the promises about bits.

use super::*;
use crate::format::WeightFormat;
use crate::kernels::{Pack, SampleRow};
use crate::ops::Isa;
use crate::ops::check::{floats, indices, normal, read, with};
use crate::ops::pack::pack;
use crate::ops::sample::sample;

const WIDTH: usize = 24;
const VOCABULARY: usize = 1100;

/// Rows of x, the head's weight and its packs, and targets.
struct Case {
    x: Buffer,
    weight: Buffer,
    head: Packed,
    plain: Packed,
    targets: Buffer,
    c: Buffer,
}

impl Case {
    fn new(cx: &Cx, rows: usize) -> Case {
        let weight = normal(cx, VOCABULARY, WIDTH, 7);
        let packed = |product| {
            let whole = Pack::whole(product, &weight);
            pack(cx, cx.scratch, &weight, whole, WeightFormat::F32, 3).unwrap()
        };
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 389 % VOCABULARY as u32).collect();
        Case {
            x: normal(cx, rows, WIDTH, 8),
            head: packed(Product::Transposed),
            plain: packed(Product::Plain),
            targets: indices(cx, rows, 1, &targets),
            c: normal(cx, rows, 1, 9),
            weight,
        }
    }

    /// logprob, entropy, dx, dw; dw starts at 0.5. With probabilities that are kept, or made again.
    fn run(&self, cx: &Cx, temperature: f64, keep: bool) -> [Vec<f32>; 4] {
        let rows = self.x.rows();
        let blank = |cols| floats(cx, rows, cols, &vec![f32::NAN; rows * cols]);
        let (mut logprob, mut entropy, mut dx) = (blank(1), blank(1), blank(WIDTH));
        let mut kept = keep.then(|| blank(VOCABULARY));
        let mut dw = floats(cx, VOCABULARY, WIDTH, &[0.5; VOCABULARY * WIDTH]);
        let Case { x, head, plain, targets, c, .. } = self;
        let (p, l, e) = (kept.as_mut(), &mut logprob, &mut entropy);
        head_logprob(cx, x, head, targets, temperature, l, e, p).unwrap();
        let p = kept.as_mut();
        head_logprob_backward(cx, x, head, plain, targets, temperature, c, p, &mut dx, &mut dw)
            .unwrap();
        [read(&logprob), read(&entropy), read(&dx), read(&dw)]
    }

    fn naive(&self, temperature: f64) -> [Vec<f64>; 4] {
        let wide = |b: &Buffer| read(b).into_iter().map(f64::from).collect::<Vec<_>>();
        let (x, w, c) = (wide(&self.x), wide(&self.weight), wide(&self.c));
        let mut results: [Vec<f64>; 4] = Default::default();
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.5; w.len()]);
        for (row, &scale) in c.iter().enumerate() {
            let target = self.targets.host::<u32>().row(row)[0] as usize;
            let logit =
                |v: usize| (0..WIDTH).map(|i| x[row * WIDTH + i] * w[v * WIDTH + i]).sum::<f64>();
            let z: Vec<f64> = (0..VOCABULARY).map(|v| logit(v) / temperature).collect();
            let max = z.iter().copied().fold(f64::MIN, f64::max);
            let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
            results[0].push(z[target] - lse);
            results[1].push(z.iter().map(|z| (lse - z) * (z - lse).exp()).sum());
            for v in 0..VOCABULARY {
                let onehot = f64::from(u8::from(v == target));
                let d = scale * (onehot - (z[v] - lse).exp()) / temperature;
                for i in 0..WIDTH {
                    dx[row * WIDTH + i] += d * w[v * WIDTH + i];
                    dw[v * WIDTH + i] += d * x[row * WIDTH + i];
                }
            }
        }
        results[2] = dx;
        results[3] = dw;
        results
    }
}

#[test]
fn logprobs_and_gradients_match_plain_f64_loops() {
    let cx = with(2, Isa::detect());
    let case = Case::new(&cx, 150);
    for (temperature, keep) in [(1.0, true), (0.6, true), (0.6, false)] {
        let (found, wanted) = (case.run(&cx, temperature, keep), case.naive(temperature));
        for (part, name) in ["logprob", "entropy", "dx", "dw"].iter().enumerate() {
            for (i, (f, w)) in found[part].iter().zip(&wanted[part]).enumerate() {
                let off = (f64::from(*f) - w).abs() / (1.0 + w.abs());
                assert!(off < 1e-5, "{name}[{i}] at T {temperature}: {f} for {w}, off by {off:e}");
            }
        }
    }
}

#[test]
fn threads_tiles_and_instruction_sets_change_no_bit() {
    let one = with(1, Isa::Portable);
    let wanted = Case::new(&one, 150).run(&one, 0.9, true);
    for isa in Isa::available() {
        for threads in [1, 2, 4] {
            let cx = with(threads, isa);
            for keep in [true, false] {
                let found = Case::new(&cx, 150).run(&cx, 0.9, keep);
                assert_eq!(found, wanted, "{isa:?} {threads} {keep}");
            }
        }
    }
    // The last row alone, so in another place of another tile.
    let cx = with(2, Isa::detect());
    let mut case = Case::new(&cx, 150);
    let column = |b: &Buffer| floats(&cx, 1, b.cols(), &read(&b.rows_of(149..150)));
    (case.x, case.c) = (column(&case.x), column(&case.c));
    case.targets = indices(&cx, 1, 1, &[149 * 389 % VOCABULARY as u32]);
    let alone = case.run(&cx, 0.9, true);
    assert_eq!([alone[0][0], alone[1][0]], [wanted[0][149], wanted[1][149]]);
    assert_eq!(alone[2], wanted[2][149 * WIDTH..]);
}

#[test]
fn the_weight_gradient_of_two_calls_continues_the_chain_of_one() {
    let cx = with(2, Isa::detect());
    let case = Case::new(&cx, 150);
    let wanted = case.run(&cx, 1.0, true);
    let mut dw = floats(&cx, VOCABULARY, WIDTH, &[0.5; VOCABULARY * WIDTH]);
    for rows in [0..41, 41..150] {
        let mut dx = floats(&cx, rows.len(), WIDTH, &vec![0.0; rows.len() * WIDTH]);
        let part = |b: &Buffer| floats(&cx, rows.len(), b.cols(), &read(&b.rows_of(rows.clone())));
        let Case { x, head, plain, targets, c, .. } = &case;
        let targets = targets.rows_of(rows.clone());
        let (x, c) = (part(x), part(c));
        head_logprob_backward(&cx, &x, head, plain, &targets, 1.0, &c, None, &mut dx, &mut dw)
            .unwrap();
    }
    assert_eq!(read(&dw), wanted[3]);
}

#[test]
fn sampled_logprobs_are_the_trainers_to_the_bit() {
    let cx = with(2, Isa::detect());
    let mut case = Case::new(&cx, 150);
    let mut logits = floats(&cx, 150, VOCABULARY, &vec![0.0; 150 * VOCABULARY]);
    linear(&cx, &case.x, &case.head, &mut logits, Store::Set);
    for temperature in [1.0, 0.7, 0.0] {
        let row =
            |i| SampleRow { temperature, top_p: 0.9, top_k: 0, uniform: f64::from(i) / 150.0 };
        let drawn = sample(&cx, &logits, &(0..150).map(row).collect::<Vec<_>>());
        let tokens: Vec<u32> = drawn.iter().map(|d| d.token).collect();
        case.targets = indices(&cx, 150, 1, &tokens);
        let [logprob, ..] = case.run(&cx, temperature, false);
        // And those of logits that are there already.
        let mut there = floats(&cx, 150, VOCABULARY, &read(&logits));
        let mut again = floats(&cx, 150, 1, &[f32::NAN; 150]);
        logits_logprob(&cx, &mut there, &case.targets, temperature, &mut again);
        assert_eq!(read(&again), logprob);
        for (i, d) in drawn.iter().enumerate() {
            assert_eq!(d.logprob, f64::from(logprob[i]), "row {i} at T {temperature}");
        }
    }
}
