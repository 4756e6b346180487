//! Token dropping at the level of devices (DeepSeek-V2, section 2.2.4): which (token, choice) pairs exceed a budget.
//!
//! A group of experts is a device. Every sequence has a budget of its own for every device, so that what is dropped in
//! it depends on no other sequence of the batch. Small next to any product, so it runs on one thread.
//!
//! Invariants:
//!   * an unprotected sequence leaves a device with no more than ceil(cf * K * T / D) pairs, T its tokens
//!   * what is dropped are exactly the pairs of the lowest scores there; of equal ones the later goes first
//!   * a protected sequence keeps every pair, and what exceeds the budget is counted

use super::Cx;
use super::balance::segments;
use crate::buffer::{Buffer, Mat, MatMut};
use crate::routing::{DROPPED, DropCounts, DropSpec};
use std::ops::Range;

/// See [`Kernels::drop_overflow`](crate::Kernels::drop_overflow).
pub(crate) fn drop_overflow(
    _cx: &Cx,
    spec: &DropSpec,
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    protected: &Buffer,
    kept: &mut Buffer,
) -> DropCounts {
    let (rows, count) = (scores.rows(), scores.cols());
    assert!(count.is_multiple_of(spec.groups), "dropping: {count} experts, {} groups", spec.groups);
    assert_eq!(experts.rows(), rows, "dropping: rows of experts");
    assert_eq!((segment.rows(), segment.cols()), (rows, 1), "dropping: shape of segment");
    assert_eq!((kept.rows(), kept.cols()), (rows, experts.cols()), "dropping: shape of kept");
    let (scores, experts) = (scores.host::<f32>(), experts.host::<u32>());
    let protected = protected.host::<u32>();
    let mut kept = kept.host_mut::<u32>();
    (0..rows).for_each(|row| kept.row_mut(row).copy_from_slice(experts.row(row)));
    let mut counts = DropCounts::default();
    for (number, rows) in segments(segment.host::<u32>()).into_iter().enumerate() {
        let budget = spec.budget(rows.len() * experts.cols);
        for mut pairs in by_device(spec.groups, scores, experts, rows) {
            let beyond = pairs.len().saturating_sub(budget);
            if protected.row(number)[0] == 1 {
                counts.overflow += beyond as u64;
            } else if beyond > 0 {
                drop_lowest(&mut pairs, budget, &mut kept);
                counts.dropped += beyond as u64;
            }
        }
    }
    counts
}

/// A (token, choice) pair that wants to go to a device.
struct Pair {
    score: f32,
    row: usize,
    choice: usize,
}

/// The pairs of a sequence by device, in order of token and choice.
fn by_device(
    groups: usize,
    scores: Mat<'_, f32>,
    experts: Mat<'_, u32>,
    rows: Range<usize>,
) -> Vec<Vec<Pair>> {
    let width = scores.cols / groups;
    let mut devices: Vec<Vec<Pair>> = (0..groups).map(|_| Vec::new()).collect();
    for row in rows {
        for (choice, &expert) in experts.row(row).iter().enumerate() {
            let score = scores.row(row)[expert as usize];
            devices[expert as usize / width].push(Pair { score, row, choice });
        }
    }
    devices
}

/// Marks all pairs but the best `budget` as dropped.
fn drop_lowest(pairs: &mut [Pair], budget: usize, kept: &mut MatMut<'_, u32>) {
    // The sort is stable: equal scores stay in order of token and choice.
    pairs.sort_by(|a, b| b.score.total_cmp(&a.score));
    for pair in &pairs[budget..] {
        kept.row_mut(pair.row)[pair.choice] = DROPPED;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{cx, floats, indices};

    const D: u32 = DROPPED;

    /// What is kept of choices `[rows, 2]` of four experts on two devices.
    fn run(
        capacity_factor: f64,
        scores: &[f32],
        experts: &[u32],
        segment: &[u32],
        protected: &[u32],
    ) -> (Vec<u32>, DropCounts) {
        let (cx, rows) = (cx(1), segment.len());
        let spec = DropSpec { groups: 2, capacity_factor };
        let scores = floats(&cx, rows, 4, scores);
        let experts = indices(&cx, rows, 2, experts);
        let segment = indices(&cx, rows, 1, segment);
        let protected = indices(&cx, protected.len(), 1, protected);
        let mut kept = indices(&cx, rows, 2, &vec![7; 2 * rows]);
        let counts = drop_overflow(&cx, &spec, &scores, &experts, &segment, &protected, &mut kept);
        let kept = kept.host::<u32>();
        ((0..rows).flat_map(|row| kept.row(row).to_vec()).collect(), counts)
    }

    #[test]
    fn the_lowest_scores_of_a_full_device_go_and_of_equal_ones_the_later() {
        // Device 0 gets five of six pairs and may process three.
        let scores = [0.5, 0.2, 0.2, 0.1, 0.3, 0.4, 0.2, 0.1, 0.2, 0.1, 0.6, 0.1].map(|s: f32| s);
        let experts = [0, 1, 1, 0, 2, 0];
        let (kept, counts) = run(1.0, &scores, &experts, &[0; 3], &[0]);
        // In order of score: 0.5, 0.4, 0.3, then 0.2 of token 0 and 0.2 of token 2.
        assert_eq!(kept, [0, D, 1, 0, 2, D]);
        assert_eq!(counts, DropCounts { dropped: 2, overflow: 0 });
        // With room for four the earlier one of the two equal ones stays.
        let (kept, counts) = run(4.0 / 3.0, &scores, &experts, &[0; 3], &[0]);
        assert_eq!(kept, [0, 1, 1, 0, 2, D]);
        assert_eq!(counts, DropCounts { dropped: 1, overflow: 0 });
    }

    #[test]
    fn a_protected_sequence_keeps_all_and_each_sequence_has_its_own_budget() {
        let scores = [0.4, 0.3, 0.2, 0.1].repeat(4);
        let (kept, counts) = run(1.0, &scores, &[0, 1, 0, 1, 0, 1, 2, 3], &[0, 0, 1, 1], &[1, 0]);
        // Sequence 0 has four pairs on device 0 and a budget of two; sequence 1 is even.
        assert_eq!(kept, [0, 1, 0, 1, 0, 1, 2, 3]);
        assert_eq!(counts, DropCounts { dropped: 0, overflow: 2 });
        let (kept, counts) = run(1.0, &scores, &[0, 1, 0, 1, 0, 1, 2, 3], &[0, 0, 1, 1], &[0, 0]);
        assert_eq!(kept, [0, D, 0, D, 0, 1, 2, 3]);
        assert_eq!(counts, DropCounts { dropped: 2, overflow: 0 });
    }

    #[test]
    fn a_budget_is_rounded_up_and_no_rounding_error_makes_it_larger() {
        let budget =
            |capacity_factor, groups, pairs| DropSpec { groups, capacity_factor }.budget(pairs);
        assert_eq!(budget(1.0, 8, 6 * 4096), 3072);
        assert_eq!(budget(1.0, 8, 6 * 11), 9);
        assert_eq!(budget(1.1, 1, 100), 110);
        assert_eq!((budget(1e9, 2, 10), budget(1e-12, 2, 10)), (5_000_000_000, 1));
    }
}
