//! Bytes outside the arenas: the examples of a step as tokens, and the schedule of a stage.
//!
//! An estimate: an example is as long as `estimate` takes it to be, and travels twice (a request is kept until it is
//! answered).

use super::estimate::{Lines, example_tokens};
use crate::config::{RunConfig, StageKind};

/// A token with its mark, in both copies.
const TOKEN: u64 = 2 * 5;
/// A rollout's token: with its log-probabilities of both models and its text.
const ROLLOUT_TOKEN: u64 = 2 * 24;
/// What an example takes beside its tokens.
const EXAMPLE: u64 = 2 * 64;
/// A step in the schedule of a mixture.
const SCHEDULED: u64 = 64;

/// The stage that holds most outside the arenas, and its bytes. `lines` are examples of sets, as far as they are known.
pub fn host_bytes<'a>(config: &'a RunConfig, lines: &Lines) -> Option<(&'a str, u64)> {
    let example = example_tokens(config) as u64;
    // More than all examples of all epochs never come in one batch.
    let batch = |set: &str, batch: usize, epochs: u64| {
        let all = lines.get(set).map_or(u64::MAX, |lines| lines.saturating_mul(epochs));
        (batch as u64).min(all)
    };
    let held = |examples: u64, tokens: u64, each: u64| {
        examples.saturating_mul(EXAMPLE.saturating_add(each.saturating_mul(tokens)))
    };
    let of = |kind: &StageKind| match kind {
        StageKind::Pretrain(s) => held(s.batch as u64, s.sequence as u64, TOKEN)
            .saturating_add(s.steps.saturating_mul(SCHEDULED)),
        StageKind::LongContext(s) => held(s.batch as u64, s.sequence as u64, TOKEN)
            .saturating_add(s.steps.saturating_mul(SCHEDULED)),
        StageKind::Sft(s) => held(batch(&s.data, s.batch, s.epochs), example, TOKEN),
        StageKind::RewardModel(s) => held(batch(&s.data, s.batch, s.epochs), 2 * example, TOKEN),
        StageKind::Grpo(s) => held(
            (s.prompts as u64).saturating_mul(s.group_size as u64),
            example.saturating_add(s.max_new_tokens as u64),
            ROLLOUT_TOKEN,
        ),
    };
    config.stages.iter().map(|stage| (stage.name.as_str(), of(&stage.kind))).max_by_key(|(_, b)| *b)
}

#[cfg(test)]
mod tests {
    use super::super::estimate::tests::quickstart;
    use super::*;

    #[test]
    fn a_batch_is_held_as_tokens_whatever_the_micro_batch() {
        let small = quickstart(&[]);
        let usual = host_bytes(&small, &Lines::new()).unwrap().1;
        assert!(usual < 64 << 20, "{usual}");
        let large = quickstart(&["stage.base.batch=1000000000", "stage.base.micro_batch=1"]);
        let (stage, bytes) = host_bytes(&large, &Lines::new()).unwrap();
        assert_eq!(stage, "base");
        assert!(bytes >= 1_000_000_000 * 64 * TOKEN, "{bytes}");
    }

    #[test]
    fn a_batch_larger_than_its_set_holds_the_set() {
        let config = quickstart(&["stage.sft.batch=1000000000", "stage.sft.epochs=2"]);
        let lines = Lines::from([("conversations".to_string(), 100)]);
        assert!(host_bytes(&config, &lines).unwrap().1 < 64 << 20);
        assert_eq!(host_bytes(&config, &Lines::new()).unwrap().0, "sft");
    }
}
