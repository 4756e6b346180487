//! Router of DeepSeekMoE: softmax over the experts, then the (group-limited) top K of a token.
//!
//! Knows no experts' weights; the affinities come as logits and leave as weights (DeepSeek-V2,
//! section 2.2.2). One row is one token and its result depends on that row alone.
//!
//! Invariants:
//!   * scores are the softmax over *all* experts in f32, also for experts outside the kept groups
//!   * a group's worth is its maximum score; an expert outside the kept groups is never chosen,
//!     even when scores inside them underflow to zero (the mask is minus infinity, not zero)
//!   * equal scores: the lowest index wins, among groups and among experts

use super::exp::exp_slice;
use super::work::split;
use super::{Cx, Isa};
use crate::buffer::Buffer;
use crate::routing::RouterSpec;
use std::cell::Cell;

/// Added to the sum of the chosen scores by `norm_topk_prob`, as in the published code.
const TINY: f32 = 1e-20;

/// Operations per score: the exponential, the sums, K searches and copies.
const COST: usize = 2000;

/// See [`Kernels::router`](crate::Kernels::router).
pub(crate) fn router(
    cx: &Cx,
    spec: &RouterSpec,
    logits: &Buffer,
    scores: &mut Buffer,
    experts: &mut Buffer,
    weights: &mut Buffer,
) {
    let (rows, count) = (logits.rows(), logits.cols());
    check(spec, count);
    assert_eq!((scores.rows(), scores.cols()), (rows, count), "router: shape of scores");
    assert_eq!((experts.rows(), experts.cols()), (rows, spec.top_k), "router: shape of experts");
    assert_eq!((weights.rows(), weights.cols()), (rows, spec.top_k), "router: shape of weights");
    let logits = logits.host::<f32>();
    let (scores, experts, weights) =
        (scores.host_mut::<f32>(), experts.host_mut::<u32>(), weights.host_mut::<f32>());
    split(cx, rows, 1, COST * count, &|rows| {
        let mut lists = LISTS.take();
        lists.masked.resize(count, 0.0);
        for row in rows {
            // SAFETY: a row belongs to one piece.
            let (scores, experts, weights) = unsafe {
                (
                    scores.shared_row_mut(row),
                    experts.shared_row_mut(row),
                    weights.shared_row_mut(row),
                )
            };
            scores.copy_from_slice(logits.row(row));
            softmax(cx.isa, scores);
            keep_groups(spec, scores, &mut lists);
            choose(&mut lists.masked, experts);
            weigh(spec, scores, experts, weights);
        }
        LISTS.set(lists);
    });
}

/// What a thread lists of a row; it keeps its memory.
#[derive(Default)]
struct Lists {
    /// Scores of the experts that may still be chosen.
    masked: Vec<f32>,
    /// The highest score of each group.
    worth: Vec<f32>,
}

thread_local! {
    static LISTS: Cell<Lists> = const { Cell::new(Lists { masked: Vec::new(), worth: Vec::new() }) };
}

/// See [`Kernels::router_backward`](crate::Kernels::router_backward).
pub(crate) fn router_backward(
    cx: &Cx,
    spec: &RouterSpec,
    scores: &Buffer,
    experts: &Buffer,
    d_weights: &Buffer,
    d_scores: &Buffer,
    d_logits: &mut Buffer,
) {
    let (rows, count) = (scores.rows(), scores.cols());
    check(spec, count);
    assert_eq!((experts.rows(), experts.cols()), (rows, spec.top_k), "router: shape of experts");
    assert_eq!(
        (d_weights.rows(), d_weights.cols()),
        (rows, spec.top_k),
        "router: shape of d_weights"
    );
    assert_eq!((d_scores.rows(), d_scores.cols()), (rows, count), "router: shape of d_scores");
    assert_eq!((d_logits.rows(), d_logits.cols()), (rows, count), "router: shape of d_logits");
    let (scores, experts) = (scores.host::<f32>(), experts.host::<u32>());
    let (d_weights, d_scores) = (d_weights.host::<f32>(), d_scores.host::<f32>());
    let d_logits = d_logits.host_mut::<f32>();
    split(cx, rows, 1, COST * count, &|rows| {
        for row in rows {
            // SAFETY: a row belongs to one piece.
            let out = unsafe { d_logits.shared_row_mut(row) };
            let scores = scores.row(row);
            out.copy_from_slice(d_scores.row(row));
            scatter_weights(spec, scores, experts.row(row), d_weights.row(row), out);
            let mean: f32 = scores.iter().zip(out.iter()).map(|(s, d)| s * d).sum();
            for (d, s) in out.iter_mut().zip(scores) {
                *d = s * (*d - mean);
            }
        }
    });
}

fn check(spec: &RouterSpec, count: usize) {
    assert!(
        spec.groups >= 1 && count.is_multiple_of(spec.groups),
        "router: {count} experts in {} groups",
        spec.groups
    );
    assert!(
        spec.top_groups >= 1 && spec.top_groups <= spec.groups,
        "router: {} of {} groups",
        spec.top_groups,
        spec.groups
    );
    let open = count / spec.groups * spec.top_groups;
    assert!(
        spec.top_k >= 1 && spec.top_k <= open,
        "router: {} experts of {open} open ones",
        spec.top_k
    );
}

/// Softmax in place, the sum in ascending order: experts are few. Sum and division are in f64, so that the scores of 160
/// experts add up to 1 within 1e-6.
fn softmax(isa: Isa, row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|s| *s -= max);
    exp_slice(isa, row);
    let sum: f64 = row.iter().map(|s| f64::from(*s)).sum();
    row.iter_mut().for_each(|s| *s = (f64::from(*s) / sum) as f32);
}

/// Copies the scores of the groups with the highest maximum and masks all others.
fn keep_groups(spec: &RouterSpec, scores: &[f32], lists: &mut Lists) {
    let Lists { masked, worth } = lists;
    if spec.top_groups == spec.groups {
        masked.copy_from_slice(scores);
        return;
    }
    let width = scores.len() / spec.groups;
    let best = |group: &[f32]| group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    worth.clear();
    worth.extend(scores.chunks(width).map(best));
    masked.fill(f32::NEG_INFINITY);
    for _ in 0..spec.top_groups {
        let group = first_largest(worth);
        worth[group] = f32::NEG_INFINITY;
        let columns = group * width..(group + 1) * width;
        masked[columns.clone()].copy_from_slice(&scores[columns]);
    }
}

/// Takes the largest masked score K times; a taken one is masked.
fn choose(masked: &mut [f32], experts: &mut [u32]) {
    for expert in experts {
        let index = first_largest(masked);
        masked[index] = f32::NEG_INFINITY;
        *expert = index as u32;
    }
}

/// Index of the largest number; the lowest one among equals.
fn first_largest(numbers: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in numbers.iter().enumerate() {
        if *x > numbers[best] {
            best = i;
        }
    }
    best
}

fn weigh(spec: &RouterSpec, scores: &[f32], experts: &[u32], weights: &mut [f32]) {
    let factor = if spec.normalize { 1.0 / chosen_sum(scores, experts) } else { spec.scale as f32 };
    for (weight, &expert) in weights.iter_mut().zip(experts) {
        *weight = factor * scores[expert as usize];
    }
}

fn chosen_sum(scores: &[f32], experts: &[u32]) -> f32 {
    experts.iter().map(|&e| scores[e as usize]).sum::<f32>() + TINY
}

/// Adds the weights' gradient to the scores' gradient `out`, through scale or normalisation.
fn scatter_weights(
    spec: &RouterSpec,
    scores: &[f32],
    experts: &[u32],
    d_weights: &[f32],
    out: &mut [f32],
) {
    if !spec.normalize {
        for (&expert, d) in experts.iter().zip(d_weights) {
            out[expert as usize] += spec.scale as f32 * d;
        }
        return;
    }
    let sum = chosen_sum(scores, experts);
    let pairs = experts.iter().zip(d_weights);
    let mean: f32 = pairs.map(|(&e, d)| scores[e as usize] / sum * d).sum();
    for (&expert, d) in experts.iter().zip(d_weights) {
        out[expert as usize] += (d - mean) / sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{cx, floats, indices, normal, read};

    /// deepseek_v2.md, 1.10: eight experts in four groups of two.
    const GOLDEN: [f32; 8] = [2.0, 0.5, 1.9, 1.8, 0.0, -1.0, 1.0, 1.95];
    const GOLDEN_SCORES: [f32; 8] =
        [0.224672, 0.050131, 0.203292, 0.183946, 0.030406, 0.011186, 0.082652, 0.213715];

    fn spec(groups: usize, top_groups: usize, top_k: usize) -> RouterSpec {
        RouterSpec { groups, top_groups, top_k, scale: 16.0, normalize: false }
    }

    /// Scores, experts and weights of rows of logits.
    fn run(cx: &Cx, spec: &RouterSpec, logits: &Buffer) -> (Buffer, Buffer, Buffer) {
        let (rows, count) = (logits.rows(), logits.cols());
        let mut scores = floats(cx, rows, count, &vec![f32::NAN; rows * count]);
        let mut experts = indices(cx, rows, spec.top_k, &vec![99; rows * spec.top_k]);
        let mut weights = floats(cx, rows, spec.top_k, &vec![f32::NAN; rows * spec.top_k]);
        router(cx, spec, logits, &mut scores, &mut experts, &mut weights);
        (scores, experts, weights)
    }

    fn chosen(spec: &RouterSpec, logits: &[f32]) -> Vec<u32> {
        let cx = cx(1);
        let (_, experts, _) = run(&cx, spec, &floats(&cx, 1, logits.len(), logits));
        experts.host::<u32>().row(0).to_vec()
    }

    #[test]
    fn the_golden_logits_choose_by_the_maximum_rule() {
        let cx = cx(1);
        let (scores, experts, weights) = run(&cx, &spec(4, 2, 3), &floats(&cx, 1, 8, &GOLDEN));
        for (found, wanted) in read(&scores).iter().zip(GOLDEN_SCORES) {
            assert!((found - wanted).abs() < 1e-6, "{found} for {wanted}");
        }
        // The rule of V3 (sum of a group's best two) would give 2, 3, 7 and plain top-3 gives 0, 7,
        // 2.
        assert_eq!(experts.host::<u32>().row(0), [0, 7, 6]);
        let scores = read(&scores);
        assert_eq!(read(&weights), [16.0 * scores[0], 16.0 * scores[7], 16.0 * scores[6]]);
        assert_eq!(chosen(&spec(4, 4, 3), &GOLDEN), [0, 7, 2]);
        assert_eq!(chosen(&spec(1, 1, 3), &GOLDEN), [0, 7, 2]);
    }

    #[test]
    fn normalised_weights_sum_to_one_without_the_scale() {
        let cx = cx(1);
        let spec = RouterSpec { normalize: true, ..spec(4, 2, 3) };
        let (_, _, weights) = run(&cx, &spec, &floats(&cx, 1, 8, &GOLDEN));
        assert!((read(&weights).iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_lowest_index_wins_a_tie() {
        assert_eq!(chosen(&spec(4, 2, 3), &[0.5; 8]), [0, 1, 2]);
        assert_eq!(chosen(&spec(1, 1, 2), &[0.0, 3.0, 1.0, 3.0, 1.0, 3.0]), [1, 3]);
    }

    #[test]
    fn no_expert_outside_the_kept_groups_is_chosen_when_scores_underflow() {
        // Experts 5 and 7 underflow to zero, so a mask of zero would let expert 0 in by its index.
        let logits = [195.0, 196.0, 197.0, 198.0, 199.0, -200.0, 200.0, -200.0];
        assert_eq!(chosen(&spec(4, 2, 4), &logits), [6, 4, 5, 7]);
    }

    #[test]
    fn tokens_keep_to_their_groups_and_threads_change_no_bit() {
        let spec = spec(8, 3, 6);
        let one = cx(1);
        let logits = normal(&one, 3000, 32, 5);
        let wanted = run(&one, &spec, &logits);
        for threads in [2, 4] {
            let found = run(&cx(threads), &spec, &logits);
            assert_eq!(read(&found.0), read(&wanted.0));
            assert_eq!(read(&found.2), read(&wanted.2));
        }
        let (scores, experts) = (wanted.0.host::<f32>(), wanted.1.host::<u32>());
        for row in 0..logits.rows() {
            let groups: std::collections::BTreeSet<u32> =
                experts.row(row).iter().map(|e| e / 4).collect();
            assert!(groups.len() <= 3, "row {row}");
            let falling = experts.row(row).is_sorted_by_key(|&e| -scores.row(row)[e as usize]);
            assert!(
                falling && (scores.row(row).iter().sum::<f32>() - 1.0).abs() < 1e-6,
                "row {row}"
            );
        }
    }

    /// d_logits of one row by the formulas, in f64.
    fn naive(spec: &RouterSpec, s: &[f64], e: &[usize], dw: &[f64], d_scores: &[f64]) -> Vec<f64> {
        let mut ds = d_scores.to_vec();
        let sum: f64 = e.iter().map(|&e| s[e]).sum();
        for (i, &expert) in e.iter().enumerate() {
            for (j, &other) in e.iter().enumerate() {
                // d w_j / d s_i of w_j = s_j / sum, or of w_j = scale s_j.
                let same = f64::from(u8::from(i == j));
                let normalized = same / sum - s[other] / (sum * sum);
                ds[expert] += dw[j] * if spec.normalize { normalized } else { same * spec.scale };
            }
        }
        let jacobian = |i: usize, j: usize| if i == j { s[i] - s[i] * s[i] } else { -s[i] * s[j] };
        (0..s.len()).map(|i| (0..s.len()).map(|j| ds[j] * jacobian(i, j)).sum()).collect()
    }

    #[test]
    fn the_gradient_matches_plain_f64_loops() {
        let cx = cx(2);
        let wide = |b: &Buffer, row: usize| -> Vec<f64> {
            b.host::<f32>().row(row).iter().map(|&x| f64::from(x)).collect()
        };
        for normalize in [false, true] {
            let spec = RouterSpec { normalize, scale: 2.5, ..spec(4, 2, 3) };
            let (logits, d_scores) = (normal(&cx, 50, 8, 1), normal(&cx, 50, 8, 3));
            let d_weights = normal(&cx, 50, 3, 2);
            let (scores, experts, _) = run(&cx, &spec, &logits);
            let mut d_logits = floats(&cx, 50, 8, &[f32::NAN; 400]);
            router_backward(&cx, &spec, &scores, &experts, &d_weights, &d_scores, &mut d_logits);
            for row in 0..50 {
                let chosen = experts.host::<u32>();
                let chosen: Vec<usize> = chosen.row(row).iter().map(|&e| e as usize).collect();
                let (s, dw, ds) = (wide(&scores, row), wide(&d_weights, row), wide(&d_scores, row));
                let wanted = naive(&spec, &s, &chosen, &dw, &ds);
                for (found, wanted) in wide(&d_logits, row).iter().zip(wanted) {
                    assert!((found - wanted).abs() < 3e-6, "row {row}: {found} for {wanted}");
                }
            }
        }
    }
}
