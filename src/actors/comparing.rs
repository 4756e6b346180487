//! How far a sampler is from the trainer in a batch that training sees only after the policy has changed: whoever sampled
//! it scores it once more, by the version that it was sampled by, as a trainer would.
//!
//! Invariant: a batch whose sampler and trainer have the same numbers has the distance 0.

use super::aligned::Entered;
use super::director::Direction;
use super::director_ports::SamplerPorts;
use super::messages::*;
use super::post::seconds_now;
use super::reward_scorer::score_job;
use crate::config::Dtype;
use crate::engine::phase::{Phase, PhaseReport, Role, SequenceScore};
use crate::engine::utilisation::Chores;
use crate::rl::rollout::JudgedGroup;

impl Direction {
    /// Compares a batch with the policy that sampled it, which is still loaded where it was sampled. Tells what the change of
    /// phase took as well, and what is the step's of what was done beside: packing and waiting for it are told as comparing.
    pub(super) async fn compare(
        &self,
        groups: &[JudgedGroup],
        temperature: f64,
    ) -> Result<(Compared, Entered), Failure> {
        let began = seconds_now();
        let (entered, port) = match &self.ports.sampler {
            Some(sampler) => (self.leave_sampling(sampler).await?, &sampler.score),
            None => (self.enter(Phase::Score).await?, &self.ports.score_sequences),
        };
        let job = score_job(Role::Policy, groups, temperature);
        let scores = self.ask(port, Score { id: self.id(), job }).await?;
        let (gap_max, gap_mean) = gaps(groups, &scores);
        let compared = Compared { gap_max, gap_mean, at: [began, seconds_now()] };
        let mut entered = Entered { seconds: entered.seconds, chores: entered.left };
        match self.ports.sampler {
            // Beside the update, and nobody waited for it.
            Some(_) => entered.chores = Chores::default(),
            None => entered.chores.switched(self.stay(Phase::Score).await?.left.switched),
        }
        Ok((compared, entered))
    }

    /// Has those that only sample score.
    async fn leave_sampling(&self, sampler: &SamplerPorts) -> Result<PhaseReport, Failure> {
        self.sampler.borrow_mut().leave();
        let request = EnterPhase { id: self.id(), phase: Phase::Score, sample_as: Dtype::F32 };
        self.ask(&sampler.enter_phase, request).await
    }
}

/// Largest and mean distance of the two log-probabilities of a token. Where neither is a number there is no policy to
/// sample from either, which the step's loss tells; where one is, the distance is none.
fn gaps(groups: &[JudgedGroup], scores: &[SequenceScore]) -> (f64, f64) {
    let rollouts = groups.iter().flat_map(|judged| judged.group.rollouts.iter());
    let (mut largest, mut sum, mut tokens) = (0.0_f64, 0.0, 0_usize);
    for (rollout, score) in rollouts.zip(scores) {
        let SequenceScore::Logprobs(scored) = score else {
            panic!("the policy is no reward model")
        };
        assert_eq!(rollout.logprobs.len(), scored.len(), "each token of a reply is scored");
        for (sampled, scored) in rollout.logprobs.iter().zip(scored) {
            let is_undefined = sampled.is_nan() && scored.is_nan();
            let gap = f64::from(*sampled) - f64::from(*scored);
            let gap = if is_undefined || sampled == scored { 0.0 } else { gap.abs() };
            largest = if gap.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(gap) };
            (sum, tokens) = (sum + gap, tokens + 1);
        }
    }
    (largest, sum / tokens.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::rollout::{Group, Rollout, Stop};

    fn judged(logprobs: &[f32]) -> JudgedGroup {
        let prompt = crate::data::example::Prompt {
            index: 0,
            text: String::new(),
            tokens: vec![7],
            answer: None,
        };
        let rollout = Rollout {
            sample: 0,
            tokens: vec![1; logprobs.len()],
            logprobs: logprobs.to_vec(),
            stop: Stop::Eos,
            text: String::new(),
        };
        let (prompt, rollouts) = (prompt.into(), [rollout].into());
        let group = Group { slot: 0, prompt, policy_version: 0, rollouts };
        JudgedGroup { group, components: Vec::new() }
    }

    #[test]
    fn a_batch_is_as_far_as_its_farthest_token_and_what_is_no_number_is_no_zero() {
        let of = |sampled: &[f32], scored: &[f32]| {
            gaps(&[judged(sampled)], &[SequenceScore::Logprobs(scored.to_vec())])
        };
        assert_eq!(of(&[-1.0, -2.0], &[-1.0, -2.0]), (0.0, 0.0));
        assert_eq!(of(&[-1.0, -2.0], &[-1.0, -2.5]), (0.5, 0.25));
        assert_eq!(of(&[], &[]), (0.0, 0.0));
        let (none, infinite) = (f32::NAN, f32::NEG_INFINITY);
        assert!(of(&[none, -1.0], &[-2.0, -1.0]).0.is_nan());
        assert!(of(&[-1.0, -2.0], &[none, -1.0]).0.is_nan());
        assert_eq!(of(&[none, infinite], &[none, infinite]), (0.0, 0.0));
    }
}
