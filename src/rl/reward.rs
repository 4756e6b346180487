//! From the components of a reward to one number per rollout (deepseek_v2.md 4.4: raw rewards are
//! combined first, the group is normalised after).
//!
//! Invariants:
//!   * a component of weight zero is never looked at: it may be missing or NaN
//!   * a reward model's calibrated score counts within ±[`MODEL_SCORE_LIMIT`] deviations

use super::advantage::group_advantages;
use super::rollout::{JudgedGroup, ScoredGroup};
use crate::config::stage::{Deviation, RewardEntry};

/// Largest calibrated score of a reward model, in deviations: beyond it a model is judging what it
/// never saw.
pub const MODEL_SCORE_LIMIT: f64 = 3.0;

/// Names of the components, in their order: keys of the journal.
pub fn component_names(entries: &[RewardEntry]) -> Vec<String> {
    entries.iter().map(RewardEntry::name).collect()
}

/// Weights of the components, in their order.
pub fn weights(entries: &[RewardEntry]) -> Vec<f64> {
    entries.iter().map(|entry| entry.weight).collect()
}

/// A reward model's calibrated score, held within its limit; NaN stays NaN.
pub fn clamp_model_score(score: f64) -> f64 {
    score.clamp(-MODEL_SCORE_LIMIT, MODEL_SCORE_LIMIT)
}

/// Σ weight * component, over the components whose weight is not 0: those are there.
pub fn combine(weights: &[f64], components: &[Option<f64>]) -> f64 {
    assert_eq!(weights.len(), components.len(), "one weight per component");
    let used =
        weights.iter().zip(components).enumerate().filter(|(_, (weight, _))| **weight != 0.0);
    used.fold(0.0, |sum, (index, (weight, component))| match component {
        Some(value) => sum + weight * value,
        None => panic!("component {index} has weight {weight} and was never scored"),
    })
}

/// Completes a judged group with rewards and advantages. `reference` are the reference's
/// log-probabilities per rollout, empty if the KL weight is 0. A component that no model scored
/// stays open and must have weight 0.
pub fn finish_group(
    judged: JudgedGroup,
    weights: &[f64],
    deviation: Deviation,
    epsilon: f64,
    reference: Vec<Vec<f32>>,
) -> ScoredGroup {
    let components = judged.components;
    let rewards: Vec<f64> = components.iter().map(|row| combine(weights, row)).collect();
    let advantages = group_advantages(&rewards, deviation, epsilon);
    ScoredGroup { group: judged.group, components, rewards, advantages, reference }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::example::Prompt;
    use crate::rl::rollout::Group;

    fn judged(components: Vec<Vec<Option<f64>>>) -> JudgedGroup {
        let prompt = Prompt { index: 0, text: String::new(), tokens: vec![1], answer: None };
        let group =
            Group { slot: 4, prompt: prompt.into(), policy_version: 1, rollouts: [].into() };
        JudgedGroup { group, components }
    }

    #[test]
    fn a_reward_is_the_weighted_sum_and_each_weight_matters() {
        let components = [0.5, -2.0, 1.0].map(Some);
        assert_eq!(combine(&[1.0, 0.25, 3.0], &components), 3.0);
        for zeroed in 0..3 {
            let mut weights = [1.0, 0.25, 3.0];
            weights[zeroed] = 0.0;
            assert_ne!(combine(&weights, &components), 3.0);
        }
    }

    #[test]
    fn a_component_of_weight_zero_is_not_looked_at() {
        assert_eq!(combine(&[2.0, 0.0], &[Some(0.5), None]), 1.0);
        assert_eq!(combine(&[2.0, 0.0], &[Some(0.5), Some(f64::INFINITY)]), 1.0);
        assert!(combine(&[2.0, 1e-9], &[Some(0.5), Some(f64::NAN)]).is_nan());
    }

    #[test]
    fn a_model_score_is_held_within_three_deviations() {
        assert_eq!([-9.0, -3.0, 0.4, 3.1].map(clamp_model_score), [-3.0, -3.0, 0.4, 3.0]);
        assert!(clamp_model_score(f64::NAN).is_nan());
    }

    #[test]
    fn a_finished_group_has_rewards_and_advantages_of_its_weighted_components() {
        let rows = vec![vec![Some(1.0), Some(2.0), None], vec![Some(0.0), Some(2.0), None]];
        let scored = finish_group(
            judged(rows.clone()),
            &[1.0, 0.5, 0.0],
            Deviation::Population,
            0.0,
            Vec::new(),
        );
        assert_eq!(scored.components, rows, "a model that nobody asked has no score");
        assert_eq!((scored.rewards, scored.advantages), (vec![2.0, 1.0], vec![1.0, -1.0]));
    }

    #[test]
    #[should_panic(expected = "component 1 has weight 0.5 and was never scored")]
    fn a_missing_component_that_counts_is_our_own_mistake() {
        finish_group(
            judged(vec![vec![Some(1.0), None]]),
            &[1.0, 0.5],
            Deviation::Population,
            0.0,
            Vec::new(),
        );
    }
}
