//! Balance losses of DeepSeek-V2 (eq. 23-31): push the router towards even use of experts, of devices, and of what
//! devices receive.
//!
//! Knows no experts' weights and no logits; it reads the router's scores and choices, row by row,
//! and adds to the gradient of the scores. A group of experts is a device. Small next to any product, so it runs on one
//! thread.
//!
//! Invariants:
//!   * one term per segment (sequence) of rows, then the mean over all sequences of the step, never pooled over the batch
//!   * f, f' and f'' (how often an expert or a device is chosen) are constants for the gradient, which flows through P
//!     alone: all three losses are Σ_i slope_i P_i with slope_i = α1 f_i + α2 f'_g(i) + α3 f''_g(i)
//!   * f'' counts a token once for a device, however many of its experts lie there
//!   * even use gives exactly α1, α2 and α3; all tokens on the same K experts give f = E / K on these

use super::Cx;
use crate::buffer::{Buffer, Mat};
use crate::routing::BalanceSpec;
use std::ops::Range;

/// See [`Kernels::balance_loss`](crate::Kernels::balance_loss).
pub(crate) fn balance_loss(
    _cx: &Cx,
    spec: &BalanceSpec,
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    d_scores: &mut Buffer,
) -> Vec<f64> {
    let (rows, count) = (scores.rows(), scores.cols());
    assert!(count.is_multiple_of(spec.groups), "balance: {count} experts, {} groups", spec.groups);
    assert_eq!(experts.rows(), rows, "balance: rows of experts");
    assert_eq!((segment.rows(), segment.cols()), (rows, 1), "balance: shape of segment");
    assert_eq!((d_scores.rows(), d_scores.cols()), (rows, count), "balance: shape of d_scores");
    let scores = scores.host::<f32>();
    let experts = experts.host::<u32>();
    let mut gradient = d_scores.host_mut::<f32>();
    let loss_of = |rows: Range<usize>| {
        let slope = slopes(spec, experts, rows.clone(), count);
        let in_step = (rows.len() * spec.sequences) as f64;
        let step: Vec<f32> = slope.iter().map(|slope| (slope / in_step) as f32).collect();
        let mut sum = 0.0;
        for row in rows.clone() {
            let terms = scores.row(row).iter().zip(&slope);
            sum += terms.map(|(&s, slope)| f64::from(s) * slope).sum::<f64>();
            gradient.row_mut(row).iter_mut().zip(&step).for_each(|(g, step)| *g += step);
        }
        sum / rows.len() as f64
    };
    segments(segment.host::<u32>()).into_iter().map(loss_of).collect()
}

/// α1 f_i + α2 f'_g + α3 f''_g of every expert i in its group g, for a sequence of these rows.
fn slopes(spec: &BalanceSpec, experts: Mat<'_, u32>, rows: Range<usize>, count: usize) -> Vec<f64> {
    let (groups, width, tokens) = (spec.groups, count / spec.groups, rows.len() as f64);
    let (mut hits, mut visits) = (vec![0u32; count], vec![0u32; groups]);
    // The last token, from 1, that went to each group.
    let mut last = vec![0; groups];
    for row in rows {
        for &expert in experts.row(row) {
            hits[expert as usize] += 1;
            let group = expert as usize / width;
            visits[group] += u32::from(last[group] != row + 1);
            last[group] = row + 1;
        }
    }
    let per_hit = count as f64 / (experts.cols as f64 * tokens);
    let per_visit = groups as f64 / (spec.top_groups as f64 * tokens);
    (0..count)
        .map(|expert| {
            let group = expert / width;
            let in_group: u32 = hits[group * width..][..width].iter().sum();
            let f = per_hit * f64::from(hits[expert]);
            let f_device = per_hit * f64::from(in_group) / width as f64;
            let f_communication = per_visit * f64::from(visits[group]);
            spec.expert * f + spec.device * f_device + spec.communication * f_communication
        })
        .collect()
}

/// Row ranges of the sequences, which are numbered from 0 without gaps.
pub(super) fn segments(number: Mat<'_, u32>) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for row in 0..number.rows {
        let index = number.row(row)[0] as usize;
        if index == ranges.len() {
            ranges.push(row..row);
        }
        assert_eq!(index + 1, ranges.len(), "row {row} breaks the order of segments");
        ranges[index].end = row + 1;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{cx, floats, indices, read};

    /// Weights of the three losses over `groups` devices, two sequences in the step.
    fn spec(groups: usize, [expert, device, communication]: [f64; 3]) -> BalanceSpec {
        let top_groups = groups.min(2);
        BalanceSpec { groups, top_groups, expert, device, communication, sequences: 2 }
    }

    /// Losses and gradient of scores `[rows, E]` and choices `[rows, K]` with d_scores starting at 1.
    fn run(
        spec: &BalanceSpec,
        scores: &[f32],
        experts: &[u32],
        segment: &[u32],
    ) -> (Vec<f64>, Vec<f32>) {
        let (cx, rows) = (cx(1), segment.len());
        let scores = floats(&cx, rows, scores.len() / rows, scores);
        let experts = indices(&cx, rows, experts.len() / rows, experts);
        let segment = indices(&cx, rows, 1, segment);
        let mut gradient = floats(&cx, rows, scores.cols(), &vec![1.0; scores.len()]);
        let losses = balance_loss(&cx, spec, &scores, &experts, &segment, &mut gradient);
        (losses, read(&gradient))
    }

    #[test]
    fn even_use_costs_exactly_alpha() {
        let experts = [0, 1, 2, 3, 0, 2, 1, 3];
        let (losses, _) = run(&spec(1, [0.003, 0.0, 0.0]), &[0.25; 16], &experts, &[0; 4]);
        assert!(losses.len() == 1 && (losses[0] - 0.003).abs() < 1e-12, "{losses:?}");
    }

    #[test]
    fn all_tokens_on_the_same_experts_give_these_the_largest_share() {
        // E = 160, K = 6 as in DeepSeek-V2: f = 160 / 6 on six experts, and 0 on all others.
        let experts: Vec<u32> = (0..10).flat_map(|_| 0..6).collect();
        let one = BalanceSpec { sequences: 1, ..spec(1, [1.0, 0.0, 0.0]) };
        let (losses, gradient) = run(&one, &vec![1.0 / 160.0; 1600], &experts, &[0; 10]);
        assert!((losses[0] - 1.0).abs() < 1e-6, "Σ f P = 6 * 26.667 / 160, got {losses:?}");
        assert!(
            (gradient[0] - 1.0 - 160.0 / 60.0).abs() < 1e-6,
            "f / T = 2.667, got {}",
            gradient[0] - 1.0
        );
        assert_eq!(gradient[6], 1.0);
    }

    #[test]
    fn a_loss_is_of_a_sequence_and_its_gradient_of_the_mean_over_the_step() {
        // Each of two sequences uses one expert alone, and the batch uses both evenly: pooled it
        // would cost 1.
        let scores = [0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.3, 0.7];
        let (losses, gradient) =
            run(&spec(1, [1.0, 0.0, 0.0]), &scores, &[0, 0, 0, 1], &[0, 0, 0, 1]);
        assert!((losses[0] - 1.8).abs() < 1e-6 && (losses[1] - 1.4).abs() < 1e-6, "{losses:?}");
        // f / (T * sequences): 2 / (3 * 2) and 2 / (1 * 2); the unused expert gets none.
        let third = 1.0 + 1.0 / 3.0;
        let wanted = [third, 1.0, third, 1.0, third, 1.0, 1.0, 2.0];
        assert!(gradient.iter().zip(wanted).all(|(g, w)| (g - w).abs() < 1e-6), "{gradient:?}");
    }

    #[test]
    fn two_experts_on_one_device_are_one_visit_of_it() {
        // Device 0 holds experts 0 and 1; both tokens use both, and device 1 nobody.
        let communication = BalanceSpec { sequences: 1, ..spec(2, [0.0, 0.0, 1.0]) };
        let scores = [0.4, 0.3, 0.2, 0.1].repeat(2);
        let (losses, gradient) = run(&communication, &scores, &[0, 1, 1, 0], &[0, 0]);
        // f'' = D / M = 1 there, P'' = 0.7. By hits it would be 2.
        assert!((losses[0] - 0.7).abs() < 1e-6, "{losses:?}");
        let wanted = [1.5, 1.5, 1.0, 1.0].repeat(2);
        assert!(gradient.iter().zip(wanted).all(|(g, w)| (g - w).abs() < 1e-6), "{gradient:?}");
    }
}
