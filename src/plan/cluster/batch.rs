//! The batch of a step, cut into micro-batches of each data rank.

use crate::config::{RunConfig, StageKind};
use crate::plan::estimate::{example_tokens, prompt_tokens, reply_tokens};
use crate::plan::memory::tokens_at_once;

/// A step's batch on one data rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Batch {
    /// Micro-batches.
    pub micro_batches: usize,
    /// Tokens of a micro-batch, in the mean.
    pub tokens: f64,
    /// Tokens that a micro-batch is planned to hold memory for.
    pub tokens_held: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Tokens of the step over all data ranks.
    pub step_tokens: f64,
}

impl Batch {
    /// The batch of a stage over so many data ranks, each with `least` micro-batches at least: the last ones are then empty,
    /// which the mean takes in.
    pub fn new(config: &RunConfig, kind: &StageKind, data: usize, least: usize) -> Batch {
        let example = example_tokens(config);
        // Sequences of a step, those that go through together at least, tokens of one in the mean and at most.
        let (sequences, together, mean, most) = match kind {
            StageKind::Pretrain(stage) => (stage.batch, 1, stage.sequence as f64, stage.sequence),
            StageKind::LongContext(stage) => {
                (stage.batch, 1, stage.sequence as f64, stage.sequence)
            }
            StageKind::Sft(stage) => (stage.batch, 1, example as f64, example),
            StageKind::RewardModel(stage) => (stage.batch, 1, 2.0 * example as f64, 2 * example),
            StageKind::Grpo(stage) => {
                let each = (prompt_tokens(config, stage) + reply_tokens(stage)) as f64;
                let together = if stage.share_prompts { stage.group_size } else { 1 };
                (stage.prompts * stage.group_size, together, each, example)
            }
        };
        let held = tokens_at_once(config, kind) as usize;
        let at_once = (held / most.max(1)).max(together).min(sequences.max(1));
        let each_rank = sequences.div_ceil(data);
        let micro_batches = each_rank.div_ceil(at_once).max(least).max(1);
        let tokens = mean * each_rank as f64 / micro_batches as f64;
        Batch {
            micro_batches,
            tokens,
            tokens_held: held,
            sequence: (mean as usize).max(1),
            step_tokens: tokens * (micro_batches * data) as f64,
        }
    }
}
