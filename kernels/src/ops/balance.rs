//! Expert-level balance loss of DeepSeek-V2 (eq. 23-25): pushes the router towards even use of
//! experts.
//!
//! Knows no experts' weights and no logits; it reads the router's scores and choices, row by row,
//! and adds to the gradient of the scores. Small next to any product, so it runs on one thread.
//!
//! Invariants:
//!   * one term per segment (sequence) of rows, then the mean over segments, never pooled over the
//!     batch
//!   * f (how often an expert is chosen) is a constant for the gradient, which flows through P
//!     alone
//!   * even use gives exactly alpha; all tokens on the same K experts give f = E / K on these

use super::Cx;
use crate::buffer::{Buffer, Mat};
use std::ops::Range;

/// See [`Kernels::balance_loss`](crate::Kernels::balance_loss).
pub(crate) fn balance_loss(
    _cx: &Cx,
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    alpha: f64,
    weight: f64,
    d_scores: &mut Buffer,
) -> f64 {
    let (rows, count) = (scores.rows(), scores.cols());
    assert_eq!(experts.rows(), rows, "balance: rows of experts");
    assert_eq!((segment.rows(), segment.cols()), (rows, 1), "balance: shape of segment");
    assert_eq!((d_scores.rows(), d_scores.cols()), (rows, count), "balance: shape of d_scores");
    let scores = scores.host::<f32>();
    let experts = experts.host::<u32>();
    let segments = segments(segment.host::<u32>());
    let mut gradient = d_scores.host_mut::<f32>();
    let mut loss = 0.0;
    for range in &segments {
        let share = shares(experts, range.clone(), count);
        let per_row = alpha / (range.len() as f64 * segments.len() as f64);
        for row in range.clone() {
            let terms = scores.row(row).iter().zip(&share);
            loss += per_row * terms.map(|(&s, f)| f64::from(s) * f).sum::<f64>();
            for (g, f) in gradient.row_mut(row).iter_mut().zip(&share) {
                *g += (weight * per_row * f) as f32;
            }
        }
    }
    loss
}

/// f_i = E / (K T) times the number of the segment's tokens that chose expert i (eq. 24).
fn shares(experts: Mat<'_, u32>, rows: Range<usize>, count: usize) -> Vec<f64> {
    let unit = count as f64 / (experts.cols * rows.len()) as f64;
    let mut share = vec![0.0; count];
    for row in rows {
        for &expert in experts.row(row) {
            share[expert as usize] += unit;
        }
    }
    share
}

/// Row ranges of the sequences, which are numbered from 0 without gaps.
fn segments(number: Mat<'_, u32>) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for row in 0..number.rows {
        let index = number.row(row)[0] as usize;
        if index == ranges.len() {
            ranges.push(row..row);
        }
        assert_eq!(index + 1, ranges.len(), "balance: row {row} breaks the order of segments");
        ranges[index].end = row + 1;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{cx, floats, indices, read};

    /// Loss and gradient of scores `[rows, E]` and choices `[rows, K]` with d_scores starting at 1.
    fn run(
        scores: &[f32],
        experts: &[u32],
        segment: &[u32],
        alpha: f64,
        weight: f64,
    ) -> (f64, Vec<f32>) {
        let (cx, rows) = (cx(1), segment.len());
        let scores = floats(&cx, rows, scores.len() / rows, scores);
        let experts = indices(&cx, rows, experts.len() / rows, experts);
        let segment = indices(&cx, rows, 1, segment);
        let mut gradient = floats(&cx, rows, scores.cols(), &vec![1.0; scores.len()]);
        let loss = balance_loss(&cx, &scores, &experts, &segment, alpha, weight, &mut gradient);
        (loss, read(&gradient))
    }

    #[test]
    fn even_use_costs_exactly_alpha() {
        let experts = [0, 1, 2, 3, 0, 2, 1, 3];
        let (loss, _) = run(&[0.25; 16], &experts, &[0; 4], 0.003, 1.0);
        assert!((loss - 0.003).abs() < 1e-12, "{loss}");
    }

    #[test]
    fn all_tokens_on_the_same_experts_give_these_the_largest_share() {
        // E = 160, K = 6 as in DeepSeek-V2: f = 160 / 6 on six experts, and 0 on all others.
        let experts: Vec<u32> = (0..10).flat_map(|_| 0..6).collect();
        let (loss, gradient) = run(&vec![1.0 / 160.0; 1600], &experts, &[0; 10], 1.0, 1.0);
        assert!((loss - 1.0).abs() < 1e-6, "Σ f P = 6 * 26.667 / 160, got {loss}");
        assert!(
            (gradient[0] - 1.0 - 160.0 / 60.0).abs() < 1e-6,
            "f / T = 2.667, got {}",
            gradient[0] - 1.0
        );
        assert_eq!(gradient[6], 1.0);
    }

    #[test]
    fn the_loss_is_the_mean_over_sequences_and_not_of_the_pooled_batch() {
        // Each of two sequences uses one expert alone, and the batch uses both evenly: pooled it
        // would cost 1. The mean over tokens would be 1.7.
        let scores = [0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.3, 0.7];
        let (loss, gradient) = run(&scores, &[0, 0, 0, 1], &[0, 0, 0, 1], 1.0, 0.5);
        assert!((loss - 1.6).abs() < 1e-6, "{loss}");
        // weight * f / (T * sequences): 0.5 * 2 / (3 * 2) and 0.5 * 2 / (1 * 2); the unused expert
        // gets none.
        let wanted = [1.0 + 1.0 / 6.0, 1.0, 1.0 + 1.0 / 6.0, 1.0, 1.0 + 1.0 / 6.0, 1.0, 1.0, 1.5];
        assert!(gradient.iter().zip(wanted).all(|(g, w)| (g - w).abs() < 1e-6), "{gradient:?}");
    }
}
