//! Attention against plain f64 loops that call no product code, and its promises about bits.

mod stems;

use super::*;
use crate::ops::check::{cx, floats, indices, normal, read, with};

/// Lengths around the sizes of blocks and panels.
const LENGTHS: [usize; 6] = [1, 5, 32, 33, 70, 64];

fn expanded() -> AttentionShape {
    let (key_width, value_width) = (10, 7);
    AttentionShape {
        heads: 3,
        sharing: 1,
        key_width,
        rope_width: 6,
        value_width,
        head_stride: key_width + value_width,
        value_offset: key_width,
        scale: 0.25,
    }
}

fn absorbed() -> AttentionShape {
    AttentionShape {
        sharing: 3,
        key_width: 20,
        value_width: 20,
        head_stride: 0,
        value_offset: 0,
        ..expanded()
    }
}

fn grouped() -> AttentionShape {
    AttentionShape { heads: 4, sharing: 2, rope_width: 0, ..expanded() }
}

/// Inputs of a test, as a device's buffers.
struct Case {
    shape: AttentionShape,
    q: Buffer,
    kv: Buffer,
    k_rope: Buffer,
    start: Buffer,
    d_o: Buffer,
}

/// Results in the order o, lse, dq, dkv, dk_rope.
type Results = [Vec<f32>; 5];

impl Case {
    /// kv gets two columns that belong to no head.
    fn new(cx: &Cx, shape: AttentionShape, lengths: &[usize]) -> Case {
        let starts: Vec<u32> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(vec![(*end - length) as u32; *length])
            })
            .flatten()
            .collect();
        Case::of(cx, shape, &starts, 1)
    }

    /// With `columns` numbers of `starts` a row.
    fn of(cx: &Cx, shape: AttentionShape, starts: &[u32], columns: usize) -> Case {
        let (rows, groups) = (starts.len() / columns, shape.heads / shape.sharing);
        let kv_width = (groups - 1) * shape.head_stride
            + (shape.value_offset + shape.value_width).max(shape.key_width);
        Case {
            shape,
            q: normal(cx, rows, shape.heads * shape.query_width(), 1),
            kv: normal(cx, rows, kv_width + 2, 2),
            k_rope: normal(cx, rows, shape.rope_width, 3),
            start: indices(cx, rows, columns, starts),
            d_o: normal(cx, rows, shape.heads * shape.value_width, 4),
        }
    }

    /// Both passes, into buffers full of NaN.
    fn run(&self, cx: &Cx) -> Results {
        let blank = |rows, cols| floats(cx, rows, cols, &vec![f32::NAN; rows * cols]);
        let like = |b: &Buffer| blank(b.rows(), b.cols());
        let (mut o, mut lse) = (like(&self.d_o), blank(self.q.rows(), self.shape.heads));
        let (mut dq, mut dkv, mut dk_rope) = (like(&self.q), like(&self.kv), like(&self.k_rope));
        let Case { shape, q, kv, k_rope, start, d_o } = self;
        mla_train(cx, shape, q, kv, k_rope, start, &mut o, &mut lse).unwrap();
        mla_train_backward_input(
            cx,
            shape,
            q,
            kv,
            k_rope,
            start,
            &o,
            &lse,
            d_o,
            &mut dq,
            &mut dkv,
            &mut dk_rope,
        )
        .unwrap();
        [read(&o), read(&lse), read(&dq), read(&dkv), read(&dk_rope)]
    }

    /// The same by the formulas, in f64.
    fn naive(&self) -> [Vec<f64>; 5] {
        let s = self.shape;
        let wide = |b: &Buffer| read(b).into_iter().map(f64::from).collect::<Vec<_>>();
        let (q, kv, kr, d_o) = (wide(&self.q), wide(&self.kv), wide(&self.k_rope), wide(&self.d_o));
        let start = self.start.host::<u32>();
        let (rows, kc) = (self.q.rows(), self.kv.cols());
        let (qw, vw) = (s.query_width(), s.value_width);
        let mut o = vec![0.0; rows * s.heads * vw];
        let mut lse = vec![0.0; rows * s.heads];
        let (mut dq, mut dkv, mut dkr) =
            (vec![0.0; q.len()], vec![0.0; kv.len()], vec![0.0; kr.len()]);
        for t in 0..rows {
            for h in 0..s.heads {
                let (first, stem) = (start.row(t)[0], start.row(t)[start.cols - 1]);
                let of_stem = (0..t).filter(|j| stem != first && start.row(*j)[0] == stem);
                let keys: Vec<usize> = of_stem.chain(first as usize..=t).collect();
                let key = |j: usize, c: usize| match c.checked_sub(s.key_width) {
                    None => j * kc + h / s.sharing * s.head_stride + c,
                    Some(c) => j * s.rope_width + c,
                };
                let value = |j: usize, c: usize| {
                    j * kc + h / s.sharing * s.head_stride + s.value_offset + c
                };
                let query = |c: usize| t * s.heads * qw + h * qw + c;
                let of_key = |j, c| if c < s.key_width { kv[key(j, c)] } else { kr[key(j, c)] };
                let score = |j| s.scale * (0..qw).map(|c| q[query(c)] * of_key(j, c)).sum::<f64>();
                let x: Vec<f64> = keys.iter().copied().map(score).collect();
                let max = x.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
                lse[t * s.heads + h] = max + sum.ln();
                let p: Vec<f64> = x.iter().map(|x| (x - max).exp() / sum).collect();
                let out = |c: usize| (t * s.heads + h) * vw + c;
                for (j, p) in keys.iter().zip(&p) {
                    (0..vw).for_each(|c| o[out(c)] += p * kv[value(*j, c)]);
                }
                let dp = |j| (0..vw).map(|c| d_o[out(c)] * kv[value(j, c)]).sum::<f64>();
                let dp: Vec<f64> = keys.iter().copied().map(dp).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
                for (i, j) in keys.iter().copied().enumerate() {
                    let ds = p[i] * (dp[i] - mean) * s.scale;
                    for c in 0..qw {
                        dq[query(c)] += ds * of_key(j, c);
                        let to =
                            if c < s.key_width { &mut dkv[key(j, c)] } else { &mut dkr[key(j, c)] };
                        *to += ds * q[query(c)];
                    }
                    (0..vw).for_each(|c| dkv[value(j, c)] += p[i] * d_o[out(c)]);
                }
            }
        }
        [o, lse, dq, dkv, dkr]
    }
}

fn check_close(name: &str, found: &[f32], wanted: &[f64], tolerance: f64) {
    assert_eq!(found.len(), wanted.len(), "{name}");
    let error = |i: usize| (f64::from(found[i]) - wanted[i]).abs() / (1.0 + wanted[i].abs());
    let worst = (0..found.len()).max_by(|a, b| error(*a).total_cmp(&error(*b)));
    if let Some(i) = worst {
        assert!(
            error(i) < tolerance,
            "{name}[{i}] = {} for {}, off by {:e}",
            found[i],
            wanted[i],
            error(i)
        );
    }
}

fn bits(results: &Results) -> Vec<Vec<u32>> {
    results.iter().map(|part| part.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn both_passes_match_plain_f64_loops_in_every_form() {
    let cx = cx(2);
    for (name, shape) in
        [("expanded", expanded()), ("absorbed", absorbed()), ("grouped", grouped())]
    {
        let case = Case::new(&cx, shape, &LENGTHS);
        let (found, wanted) = (case.run(&cx), case.naive());
        for (i, part) in ["o", "lse", "dq", "dkv", "dk_rope"].iter().enumerate() {
            // A gradient of a key sums up to 70 rows times 3 heads of f32 products.
            let tolerance = if i < 2 { 1e-6 } else { 4e-6 };
            check_close(&format!("{name} {part}"), &found[i], &wanted[i], tolerance);
        }
    }
}

#[test]
fn threads_and_instruction_sets_change_no_bit() {
    for shape in [expanded(), absorbed(), grouped()] {
        let one = with(1, Isa::Portable);
        let wanted = bits(&Case::new(&one, shape, &LENGTHS).run(&one));
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                let cx = with(threads, isa);
                assert_eq!(
                    bits(&Case::new(&cx, shape, &LENGTHS).run(&cx)),
                    wanted,
                    "{isa:?} {threads}"
                );
            }
        }
    }
}

#[test]
fn a_row_depends_neither_on_later_rows_nor_on_its_neighbours_in_the_batch() {
    let cx = cx(2);
    for shape in [expanded(), absorbed()] {
        let whole = Case::new(&cx, shape, &[100]);
        let [all, all_lse, ..] = whole.run(&cx);
        for length in [1, 31, 32, 33, 63, 65, 99] {
            // The first rows of the long segment again, behind a segment of other rows.
            let behind = |b: &Buffer| {
                let (cols, rows) = (b.cols(), read(b));
                let twice = [&rows[3 * cols..10 * cols], &rows[..length * cols]].concat();
                floats(&cx, 7 + length, cols, &twice)
            };
            let starts: Vec<u32> = (0..7 + length).map(|row| if row < 7 { 0 } else { 7 }).collect();
            let case = Case {
                shape,
                q: behind(&whole.q),
                kv: behind(&whole.kv),
                k_rope: behind(&whole.k_rope),
                d_o: behind(&whole.d_o),
                start: indices(&cx, 7 + length, 1, &starts),
            };
            let [o, lse, ..] = case.run(&cx);
            let width = shape.heads * shape.value_width;
            assert_eq!(o[7 * width..], all[..length * width], "{length}");
            assert_eq!(lse[7 * shape.heads..], all_lse[..length * shape.heads], "{length}");
        }
    }
}

#[test]
fn scores_far_from_zero_stay_finite() {
    let cx = cx(1);
    let case = Case::new(&cx, AttentionShape { scale: 60.0, ..expanded() }, &[40]);
    let (found, wanted) = (case.run(&cx), case.naive());
    check_close("o", &found[0], &wanted[0], 1e-4);
    assert!(found.iter().flatten().all(|x| x.is_finite()));
}

#[test]
fn no_memory_is_an_error_from_both_passes() {
    let mut small = cx(2);
    let case = Case::new(&small, expanded(), &[64]);
    let blank = |cx: &Cx, rows, cols| floats(cx, rows, cols, &vec![0.0; rows * cols]);
    let (mut o, mut lse) = (blank(&small, 64, 21), blank(&small, 64, 3));
    small.arena = crate::Arena::new(Some(4096));
    small.scratch = small.arena.owner("tiny", crate::Kind::Activations);
    let Case { shape, q, kv, k_rope, start, .. } = &case;
    let refused = mla_train(&small, shape, q, kv, k_rope, start, &mut o, &mut lse).unwrap_err();
    assert!(refused.to_string().contains("tiny"), "{refused}");
}
