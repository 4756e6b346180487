//! Log-probability of given tokens under the output head, and its gradient, without all logits at once.
//!
//! Knows no loss: the caller gives d(loss)/d(logprob) per row. Rows are taken in tiles of [`ROWS`]; a tile
//! of logits is made by `linear`, the forward pass reduces it, and the backward pass makes it again and
//! turns it into the logits' gradient in place.
//!
//! Invariants:
//!   * memory is ROWS x vocabulary, whatever the number of rows
//!   * a row's numbers depend on its own logits alone, and the sampler takes them from the same
//!     [`Distribution`]
//!   * dw is one chain over rows ascending, across tiles and calls

use super::exp::exp;
use super::lanes::{self, LANES, Lanes, OnLanes};
use super::linear::{linear, linear_backward_weight};
use super::work::split;
use super::{Cx, Isa};
use crate::buffer::{Buffer, DType};
use crate::kernels::{Packed, Product, Result, Store};

/// Rows of a tile.
const ROWS: usize = 64;

/// Operations per logit of a reduction.
const COST: usize = 20;

/// Elements that are summed in f32 before the sum goes on in f64.
const SPAN: usize = 512;

/// See [`Kernels::head_logprob`](crate::Kernels::head_logprob).
#[allow(clippy::too_many_arguments)]
pub(crate) fn head_logprob(
    cx: &Cx,
    x: &Buffer,
    head: &Packed,
    targets: &Buffer,
    temperature: f64,
    logprob: &mut Buffer,
    lse: &mut Buffer,
    entropy: &mut Buffer,
) -> Result<()> {
    check(x, head, &[targets, logprob, lse, entropy]);
    let vocabulary = head.outputs;
    let targets = targets.host::<u32>();
    let (logprob, lse, entropy) = (logprob.host_mut::<f32>(), lse.host_mut::<f32>(), entropy.host_mut::<f32>());
    let mut tile = cx.arena.buffer(cx.scratch, DType::F32, x.rows().min(ROWS), vocabulary)?;
    for first in (0..x.rows()).step_by(ROWS) {
        let count = ROWS.min(x.rows() - first);
        let mut logits = tile.rows_of_mut(0..count);
        linear(cx, &x.rows_of(first..first + count), head, &mut logits, Store::Set);
        let logits = logits.host_mut::<f32>();
        split(cx, count, 1, COST * vocabulary, &|range| {
            for row in range {
                // SAFETY: a row belongs to one piece.
                unsafe {
                    let logits = logits.shared_row_mut(row);
                    let target = logits[targets.row(first + row)[0] as usize];
                    let distribution = Distribution::of(cx.isa, logits, temperature);
                    logprob.shared_row_mut(first + row)[0] = distribution.logprob(target);
                    lse.shared_row_mut(first + row)[0] = distribution.lse();
                    entropy.shared_row_mut(first + row)[0] = distribution.entropy();
                }
            }
        });
    }
    Ok(())
}

/// See [`Kernels::head_logprob_backward`](crate::Kernels::head_logprob_backward).
#[allow(clippy::too_many_arguments)]
pub(crate) fn head_logprob_backward(
    cx: &Cx,
    x: &Buffer,
    head: &Packed,
    plain: &Packed,
    targets: &Buffer,
    temperature: f64,
    lse: &Buffer,
    c: &Buffer,
    dx: &mut Buffer,
    dw: &mut Buffer,
) -> Result<()> {
    check(x, head, &[targets, lse, c]);
    let vocabulary = head.outputs;
    assert_eq!(plain.product, Product::Plain, "head: a pack for the input gradient");
    assert_eq!((plain.inputs, plain.outputs), (vocabulary, x.cols()), "head: shape of the plain pack");
    assert_eq!(plain.version, head.version, "head: both packs of one policy version");
    assert_eq!((dx.rows(), dx.cols()), (x.rows(), x.cols()), "head: shape of dx");
    assert_eq!((dw.rows(), dw.cols()), (vocabulary, x.cols()), "head: shape of dw");
    let (targets, lse, c) = (targets.host::<u32>(), lse.host::<f32>(), c.host::<f32>());
    let mut tile = cx.arena.buffer(cx.scratch, DType::F32, x.rows().min(ROWS), vocabulary)?;
    for first in (0..x.rows()).step_by(ROWS) {
        let rows = first..x.rows().min(first + ROWS);
        let x = x.rows_of(rows.clone());
        let mut logits = tile.rows_of_mut(0..rows.len());
        linear(cx, &x, head, &mut logits, Store::Set);
        let gradients = logits.host_mut::<f32>();
        split(cx, rows.len(), 1, COST * vocabulary, &|range| {
            for row in range {
                let job = Gradient {
                    // SAFETY: a row belongs to one piece.
                    logits: unsafe { gradients.shared_row_mut(row) },
                    target: targets.row(first + row)[0] as usize,
                    inverse: inverse(temperature),
                    lse: lse.row(first + row)[0],
                    c: c.row(first + row)[0],
                };
                // SAFETY: `isa` was detected.
                unsafe { cx.isa.run(job) };
            }
        });
        linear(cx, &logits, plain, &mut dx.rows_of_mut(rows), Store::Set);
        linear_backward_weight(cx, &logits, &x, dw);
    }
    Ok(())
}

fn check(x: &Buffer, head: &Packed, columns: &[&Buffer]) {
    assert_eq!(head.product, Product::Transposed, "head: a pack for the forward pass");
    assert_eq!(head.inputs, x.cols(), "head: width of x");
    for column in columns {
        assert_eq!((column.rows(), column.cols()), (x.rows(), 1), "head: one number per row");
    }
}

/// 1 / T; greedy rows (T = 0) are judged at T = 1.
fn inverse(temperature: f64) -> f32 {
    if temperature == 0.0 { 1.0 } else { (1.0 / temperature) as f32 }
}

/// Softmax of logits / T, reduced to what log-probabilities need.
pub(crate) struct Distribution {
    inverse: f32,
    max: f32,
    /// Σ exp(logit / T - max).
    sum: f64,
    /// Σ exp(logit / T - max) (logit / T - max).
    moment: f64,
}

impl Distribution {
    /// Reduces a row of logits and leaves exp(logit / T - max) in their place.
    pub fn of(isa: Isa, logits: &mut [f32], temperature: f64) -> Distribution {
        // SAFETY: `isa` was detected; the job is safe code.
        unsafe { isa.run(Reduce { logits, inverse: inverse(temperature) }) }
    }

    /// log-softmax at a token whose logit this is.
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit * self.inverse - self.max) - self.sum.ln()) as f32
    }

    /// log Σ exp(logit / T).
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + self.sum.ln()) as f32
    }

    /// - Σ p log p.
    pub fn entropy(&self) -> f32 {
        (self.sum.ln() - self.moment / self.sum) as f32
    }
}

struct Reduce<'a> {
    logits: &'a mut [f32],
    inverse: f32,
}

impl OnLanes for Reduce<'_> {
    type Out = Distribution;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Distribution {
        let Reduce { logits, inverse } = self;
        let mut tops = [f32::NEG_INFINITY; LANES];
        for chunk in logits.chunks_mut(LANES) {
            for (top, x) in tops.iter_mut().zip(chunk) {
                *x *= inverse;
                *top = if *x > *top { *x } else { *top };
            }
        }
        let max = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let (mut sum, mut moment) = (0.0, 0.0);
        for span in logits.chunks_mut(SPAN) {
            let (mut sums, mut moments) = ([0.0; LANES], [0.0; LANES]);
            for chunk in span.chunks_mut(LANES) {
                for ((sum, moment), x) in sums.iter_mut().zip(&mut moments).zip(chunk) {
                    let below = *x - max;
                    *x = exp(below);
                    *sum += *x;
                    *moment = x.mul_add(below, *moment);
                }
            }
            sum += f64::from(lanes::add_lanes(sums));
            moment += f64::from(lanes::add_lanes(moments));
        }
        Distribution { inverse, max, sum, moment }
    }
}

/// Replaces a row of logits by c (onehot - p) / T.
struct Gradient<'a> {
    logits: &'a mut [f32],
    target: usize,
    inverse: f32,
    lse: f32,
    c: f32,
}

impl OnLanes for Gradient<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let factor = self.c * self.inverse;
        let target = exp(self.logits[self.target] * self.inverse - self.lse);
        for x in self.logits.iter_mut() {
            *x = -factor * exp(*x * self.inverse - self.lse);
        }
        self.logits[self.target] = factor * (1.0 - target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let packed = |product| pack(cx, cx.scratch, &weight, Pack::whole(product, &weight), 3).unwrap();
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

        /// logprob, lse, entropy, dx, dw; dw starts at 0.5.
        fn run(&self, cx: &Cx, temperature: f64) -> [Vec<f32>; 5] {
            let rows = self.x.rows();
            let blank = |cols| floats(cx, rows, cols, &vec![f32::NAN; rows * cols]);
            let (mut logprob, mut lse, mut entropy, mut dx) = (blank(1), blank(1), blank(1), blank(WIDTH));
            let mut dw = floats(cx, VOCABULARY, WIDTH, &[0.5; VOCABULARY * WIDTH]);
            let Case { x, head, plain, targets, c, .. } = self;
            head_logprob(cx, x, head, targets, temperature, &mut logprob, &mut lse, &mut entropy).unwrap();
            head_logprob_backward(cx, x, head, plain, targets, temperature, &lse, c, &mut dx, &mut dw).unwrap();
            [read(&logprob), read(&lse), read(&entropy), read(&dx), read(&dw)]
        }

        fn naive(&self, temperature: f64) -> [Vec<f64>; 5] {
            let wide = |b: &Buffer| read(b).into_iter().map(f64::from).collect::<Vec<_>>();
            let (x, w, c) = (wide(&self.x), wide(&self.weight), wide(&self.c));
            let mut results: [Vec<f64>; 5] = Default::default();
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.5; w.len()]);
            for (row, &scale) in c.iter().enumerate() {
                let target = self.targets.host::<u32>().row(row)[0] as usize;
                let logit = |v: usize| (0..WIDTH).map(|i| x[row * WIDTH + i] * w[v * WIDTH + i]).sum::<f64>();
                let z: Vec<f64> = (0..VOCABULARY).map(|v| logit(v) / temperature).collect();
                let max = z.iter().copied().fold(f64::MIN, f64::max);
                let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
                results[0].push(z[target] - lse);
                results[1].push(lse);
                results[2].push(z.iter().map(|z| (lse - z) * (z - lse).exp()).sum());
                for v in 0..VOCABULARY {
                    let onehot = f64::from(u8::from(v == target));
                    let d = scale * (onehot - (z[v] - lse).exp()) / temperature;
                    for i in 0..WIDTH {
                        dx[row * WIDTH + i] += d * w[v * WIDTH + i];
                        dw[v * WIDTH + i] += d * x[row * WIDTH + i];
                    }
                }
            }
            results[3] = dx;
            results[4] = dw;
            results
        }
    }

    #[test]
    fn logprobs_and_gradients_match_plain_f64_loops() {
        let cx = with(2, Isa::detect());
        let case = Case::new(&cx, 150);
        for temperature in [1.0, 0.6] {
            let (found, wanted) = (case.run(&cx, temperature), case.naive(temperature));
            for (part, name) in ["logprob", "lse", "entropy", "dx", "dw"].iter().enumerate() {
                for (i, (f, w)) in found[part].iter().zip(&wanted[part]).enumerate() {
                    let off = (f64::from(*f) - w).abs() / (1.0 + w.abs());
                    // An lse near 30 is rounded to 2e-6 before the backward pass sees it.
                    assert!(off < 1e-5, "{name}[{i}] at T {temperature}: {f} for {w}, off by {off:e}");
                }
            }
        }
    }

    #[test]
    fn threads_tiles_and_instruction_sets_change_no_bit() {
        let one = with(1, Isa::Portable);
        let wanted = Case::new(&one, 150).run(&one, 0.9);
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                let cx = with(threads, isa);
                assert_eq!(Case::new(&cx, 150).run(&cx, 0.9), wanted, "{isa:?} {threads}");
            }
        }
        // The last row alone, so in another place of another tile.
        let cx = with(2, Isa::detect());
        let mut case = Case::new(&cx, 150);
        let column = |b: &Buffer| floats(&cx, 1, b.cols(), &read(&b.rows_of(149..150)));
        (case.x, case.c) = (column(&case.x), column(&case.c));
        case.targets = indices(&cx, 1, 1, &[149 * 389 % VOCABULARY as u32]);
        let alone = case.run(&cx, 0.9);
        assert_eq!([alone[0][0], alone[1][0], alone[2][0]], [wanted[0][149], wanted[1][149], wanted[2][149]]);
        assert_eq!(alone[3], wanted[3][149 * WIDTH..]);
    }

    #[test]
    fn the_weight_gradient_of_two_calls_continues_the_chain_of_one() {
        let cx = with(2, Isa::detect());
        let case = Case::new(&cx, 150);
        let wanted = case.run(&cx, 1.0);
        let lse = floats(&cx, 150, 1, &wanted[1]);
        let mut dw = floats(&cx, VOCABULARY, WIDTH, &[0.5; VOCABULARY * WIDTH]);
        for rows in [0..41, 41..150] {
            let mut dx = floats(&cx, rows.len(), WIDTH, &vec![0.0; rows.len() * WIDTH]);
            let part = |b: &Buffer| floats(&cx, rows.len(), b.cols(), &read(&b.rows_of(rows.clone())));
            let Case { x, head, plain, targets, c, .. } = &case;
            let targets = targets.rows_of(rows.clone());
            let (x, lse, c) = (part(x), part(&lse), part(c));
            head_logprob_backward(&cx, &x, head, plain, &targets, 1.0, &lse, &c, &mut dx, &mut dw).unwrap();
        }
        assert_eq!(read(&dw), wanted[4]);
    }

    #[test]
    fn sampled_logprobs_are_the_trainers_to_the_bit() {
        let cx = with(2, Isa::detect());
        let mut case = Case::new(&cx, 150);
        let mut logits = floats(&cx, 150, VOCABULARY, &vec![0.0; 150 * VOCABULARY]);
        linear(&cx, &case.x, &case.head, &mut logits, Store::Set);
        for temperature in [1.0, 0.7, 0.0] {
            let row = |i| SampleRow { temperature, top_p: 0.9, top_k: 0, uniform: f64::from(i) / 150.0 };
            let drawn = sample(&cx, &logits, &(0..150).map(row).collect::<Vec<_>>());
            let tokens: Vec<u32> = drawn.iter().map(|d| d.token).collect();
            case.targets = indices(&cx, 150, 1, &tokens);
            let [logprob, ..] = case.run(&cx, temperature);
            for (i, d) in drawn.iter().enumerate() {
                assert_eq!(d.logprob, f64::from(logprob[i]), "row {i} at T {temperature}");
            }
        }
    }
}
