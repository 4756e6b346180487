//! What one alignment step looked like, for the journal: rewards, lengths, how replies ended.

use super::advantage::{has_zero_variance, mean_and_deviation};
use super::rollout::{Rollout, ScoredGroup, Stop};
use crate::config::stage::Deviation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Statistics of the rollouts of one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepStatistics {
    /// Mean reward over rollouts.
    pub reward_mean: f64,
    /// Its standard deviation (population).
    pub reward_deviation: f64,
    /// Mean and deviation of each component before weighting, by name; models of weight 0, which are
    /// not asked, are left out.
    pub components: BTreeMap<String, ComponentStatistics>,
    /// Groups whose rewards are all equal: they teach nothing.
    pub zero_variance_groups: u64,
    /// Groups of the step.
    pub groups: u64,
    /// Rollouts of the step.
    pub rollouts: u64,
    /// New tokens, end tokens included.
    pub new_tokens: u64,
    /// Mean new tokens of a rollout.
    pub length_mean: f64,
    /// Share of rollouts that ended at a limit and not with the end token.
    pub stopped_by_length: f64,
}

/// One component of the reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ComponentStatistics {
    /// Mean over rollouts.
    pub mean: f64,
    /// Standard deviation (population).
    pub deviation: f64,
}

/// Statistics of a step's groups; `names` are the components' in their order.
pub fn step_statistics(names: &[String], groups: &[ScoredGroup]) -> StepStatistics {
    let rollouts = || groups.iter().flat_map(|scored| scored.group.rollouts.iter());
    let share = |count: usize| count as f64 / rollouts().count().max(1) as f64;
    let rewards: Vec<f64> = groups.iter().flat_map(|scored| &scored.rewards).copied().collect();
    let (reward_mean, reward_deviation) = mean_and_deviation(&rewards, Deviation::Population);
    let new_tokens: usize = rollouts().map(|rollout| rollout.tokens.len()).sum();
    let is_cut = |rollout: &&Rollout| rollout.stop == Stop::Length;
    StepStatistics {
        reward_mean,
        reward_deviation,
        components: names
            .iter()
            .enumerate()
            .filter_map(|(i, name)| Some((name.clone(), component(groups, i)?)))
            .collect(),
        zero_variance_groups: groups
            .iter()
            .filter(|scored| has_zero_variance(&scored.rewards))
            .count() as u64,
        groups: groups.len() as u64,
        rollouts: rollouts().count() as u64,
        new_tokens: new_tokens as u64,
        length_mean: share(new_tokens),
        stopped_by_length: share(rollouts().filter(is_cut).count()),
    }
}

/// `None` if nobody gave the component a value.
fn component(groups: &[ScoredGroup], index: usize) -> Option<ComponentStatistics> {
    let rows = groups.iter().flat_map(|scored| &scored.components);
    let values: Vec<f64> = rows.filter_map(|row| row[index]).collect();
    let (mean, deviation) = mean_and_deviation(&values, Deviation::Population);
    (!values.is_empty()).then_some(ComponentStatistics { mean, deviation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::example::Prompt;
    use crate::rl::rollout::Group;

    fn group(slot: u32, lengths: &[usize], components: &[[f64; 2]]) -> ScoredGroup {
        let rollout = |(sample, length): (usize, &usize)| Rollout {
            sample: sample as u32,
            tokens: vec![7; *length],
            logprobs: vec![-1.0; *length],
            stop: if *length >= 8 { Stop::Length } else { Stop::Eos },
            text: String::new(),
        };
        let prompt = Prompt { index: 0, text: String::new(), tokens: vec![1], answer: None };
        let rollouts: Vec<Rollout> = lengths.iter().enumerate().map(rollout).collect();
        ScoredGroup {
            group: Group {
                slot,
                prompt: prompt.into(),
                policy_version: 3,
                rollouts: rollouts.into(),
            },
            components: components.iter().map(|row| row.map(Some).to_vec()).collect(),
            rewards: components.iter().map(|row| row[0] + row[1]).collect(),
            advantages: vec![0.0; lengths.len()],
            reference: Vec::new(),
        }
    }

    #[test]
    fn statistics_are_means_over_all_rollouts_of_the_step() {
        let groups = [
            group(0, &[2, 7, 3], &[[1.0, 0.5], [0.0, 0.5], [0.0, 0.5]]),
            group(1, &[1], &[[1.0, -1.5]]),
            group(2, &[8, 8], &[[0.25, 0.75], [0.75, 0.25]]),
        ];
        let names = ["exact".to_string(), "safety".to_string()];
        let statistics = step_statistics(&names, &groups);
        assert_eq!((statistics.groups, statistics.rollouts, statistics.new_tokens), (3, 6, 29));
        // A single rollout and two equal sums teach nothing.
        assert_eq!(statistics.zero_variance_groups, 2);
        assert_eq!((statistics.length_mean, statistics.stopped_by_length), (29.0 / 6.0, 2.0 / 6.0));
        assert!((statistics.reward_mean - 4.0 / 6.0).abs() < 1e-15, "{}", statistics.reward_mean);
        assert_eq!(statistics.components["exact"].mean, 0.5);
        assert!((statistics.components["safety"].mean - 1.0 / 6.0).abs() < 1e-15);
        let squares: f64 = [0.5f64, -0.5, -0.5, 0.5, -0.25, 0.25].iter().map(|x| x * x).sum();
        assert!((statistics.components["exact"].deviation - (squares / 6.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn a_step_without_rollouts_has_zeros_and_no_components() {
        assert_eq!(step_statistics(&["exact".to_string()], &[]), StepStatistics::default());
    }

    #[test]
    fn a_component_that_nobody_gave_a_value_is_left_out() {
        let mut groups = [group(0, &[2, 3], &[[1.0, 0.5], [0.0, 0.5]])];
        groups[0].components.iter_mut().for_each(|row| row[1] = None);
        let names = ["exact".to_string(), "safety".to_string()];
        let statistics = step_statistics(&names, &groups);
        assert_eq!(statistics.components.into_keys().collect::<Vec<_>>(), ["exact"]);
    }
}
