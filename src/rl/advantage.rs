//! How much better a rollout did than its group (deepseek_v2.md 4.3).
//!
//! Outcome supervision: one advantage per rollout, (reward - mean) / (deviation + epsilon), which
//! all its tokens share. Rewards of single steps of a reply (process supervision) are not offered.
//!
//! Invariants:
//!   * a group whose rewards are all equal has advantages of exactly zero, never NaN
//!   * a reward that is not a number stays visible: it makes the group's advantages NaN, and the
//!     step is skipped

use crate::config::stage::Deviation;

/// Advantages of one group's rewards.
pub fn group_advantages(rewards: &[f64], deviation: Deviation, epsilon: f64) -> Vec<f64> {
    if has_zero_variance(rewards) {
        return vec![0.0; rewards.len()];
    }
    let (mean, spread) = mean_and_deviation(rewards, deviation);
    rewards.iter().map(|reward| (reward - mean) / (spread + epsilon)).collect()
}

/// True if all rewards are equal: the group has nothing to teach.
pub fn has_zero_variance(rewards: &[f64]) -> bool {
    rewards.iter().all(|reward| *reward == rewards[0])
}

/// Mean and standard deviation; zeros for an empty slice, and no deviation for a single value.
pub fn mean_and_deviation(values: &[f64], deviation: Deviation) -> (f64, f64) {
    let count = values.len() as f64;
    let divisor = match deviation {
        Deviation::Population => count,
        Deviation::Sample => count - 1.0,
    };
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / divisor.max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [f64; 5] = [1.0, 0.0, 0.0, 1.0, 1.0];

    fn assert_near(got: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() <= tolerance, "{got} is not {expected}");
        }
    }

    #[test]
    fn advantages_match_the_goldens_of_both_deviations() {
        let population = group_advantages(&GOLDEN, Deviation::Population, 0.0);
        let (high, low) = (0.816_496_580_927_726, -1.224_744_871_391_589);
        assert_near(&population, &[high, low, low, high, high], 1e-12);
        let sample = group_advantages(&GOLDEN, Deviation::Sample, 0.0);
        let (high, low) = (0.730_296_743_340_221, -1.095_445_115_010_332);
        assert_near(&sample, &[high, low, low, high, high], 1e-12);
    }

    #[test]
    fn epsilon_is_added_to_the_deviation() {
        let advantages = group_advantages(&[0.0, 2.0], Deviation::Population, 0.25);
        assert_near(&advantages, &[-0.8, 0.8], 1e-15);
    }

    #[test]
    fn a_group_of_equal_rewards_has_advantages_of_exactly_zero() {
        // The mean of three times 0.1 is not 0.1 in floating point.
        for rewards in [&[0.1; 3][..], &[-7.3; 8], &[0.5], &[]] {
            for deviation in [Deviation::Population, Deviation::Sample] {
                let advantages = group_advantages(rewards, deviation, 0.0);
                assert_eq!(advantages, vec![0.0; rewards.len()]);
            }
        }
    }

    #[test]
    fn a_reward_that_is_not_a_number_is_not_hidden() {
        let advantages = group_advantages(&[1.0, f64::NAN, 0.0], Deviation::Population, 1e-4);
        assert!(advantages.iter().all(|advantage| advantage.is_nan()));
    }
}
