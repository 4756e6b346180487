//! Which sequences of a step lose nothing to a full device: about every tenth (DeepSeek-V2, section 2.2.4).
//!
//! Knows no tokens. A sequence is known by its place: stage, step and number in the step's batch. The answer is a function
//! of that and of the seed, so that a resumed run protects the same ones.

use rehearsal_kernels::random::{Stream, below};

/// For each of `count` sequences of a step, whether all its tokens keep all their experts.
pub fn protected(seed: u64, stage: u64, step: u64, count: usize) -> Vec<bool> {
    (0..count as u64).map(|i| below(seed, Stream::Protect, [stage, step, i, 0], 10) == 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_ten_thousand_sequences_is_protected_and_depends_on_its_place_alone() {
        let all = |seed| -> Vec<bool> {
            (0..100).flat_map(|step| protected(seed, 2, step, 100)).collect()
        };
        for seed in 1..6 {
            let share = all(seed).iter().filter(|p| **p).count() as f64 / 1e4;
            assert!((share - 0.1).abs() <= 0.01, "seed {seed}: {share}");
        }
        assert_eq!(protected(1, 2, 57, 30), all(1)[5700..5730], "asked alone, and for fewer");
        assert_ne!(protected(1, 2, 57, 100), protected(1, 2, 58, 100));
        assert_ne!(protected(1, 2, 57, 100), protected(1, 3, 57, 100));
        assert_ne!(protected(1, 2, 57, 100), protected(2, 2, 57, 100));
    }
}
