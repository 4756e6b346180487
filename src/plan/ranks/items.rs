//! The examples of a step, as far as memory depends on them.

use crate::cluster::Team;
use crate::config::{ModelConfig, RunConfig, StageKind};
use crate::model::pass_bytes::PassRows;
use crate::plan::estimate::example_tokens;
use crate::train::step::{Counts, TOKENS_AT_ONCE};

/// Tokens of the longest example: twice as many as `estimate` takes one to have, if the model has as many positions.
pub fn longest_example(config: &RunConfig, model: &ModelConfig) -> usize {
    (2 * example_tokens(config)).min(model.max_position_embeddings)
}

/// Examples of a step that go through the model together or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atoms {
    /// How many.
    pub count: usize,
    /// Rows of one.
    rows: usize,
    /// Tokens of one, a shared prompt counted for each example.
    tokens: usize,
    /// Examples of one.
    examples: usize,
    /// Sequences of one.
    sequences: usize,
    /// Tokens of its longest sequence.
    longest: usize,
    /// Rows of one whose logits, or scores, are wanted.
    wanted: usize,
    /// Whether the scalar head is trained.
    pub is_scalar: bool,
    /// Whether others are shorter.
    is_ragged: bool,
    /// `micro_batch` of the stage.
    micro_batch: usize,
}

/// What goes through the model at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroBatch {
    /// Atoms of it.
    pub atoms: usize,
    /// Its rows.
    pub rows: PassRows,
    /// Those whose logits or scores are wanted.
    pub wanted: usize,
}

impl Atoms {
    /// Of a stage.
    pub fn of(config: &RunConfig, model: &ModelConfig, kind: &StageKind) -> Atoms {
        let example = longest_example(config, model);
        let documents = |count, tokens, micro_batch, is_ragged| Atoms {
            count,
            rows: tokens,
            tokens,
            examples: 1,
            sequences: 1,
            longest: tokens,
            wanted: tokens,
            is_scalar: false,
            is_ragged,
            micro_batch,
        };
        match kind {
            StageKind::Pretrain(s) => documents(s.batch, s.sequence, s.micro_batch, false),
            StageKind::LongContext(s) => documents(s.batch, s.sequence, s.micro_batch, false),
            StageKind::Sft(s) => documents(s.batch, example, s.micro_batch, true),
            StageKind::RewardModel(s) => Atoms {
                rows: 2 * example,
                tokens: 2 * example,
                sequences: 2,
                wanted: 2,
                is_scalar: true,
                ..documents(s.batch, example, s.micro_batch, true)
            },
            StageKind::Grpo(s) => {
                let prompt = example.saturating_sub(s.max_new_tokens).max(1);
                let whole = prompt + s.max_new_tokens;
                let [groups, samples] = match s.share_prompts {
                    true => [s.prompts, s.group_size],
                    false => [s.prompts * s.group_size, 1],
                };
                let new = samples * s.max_new_tokens;
                Atoms {
                    rows: prompt + new,
                    tokens: samples * whole,
                    examples: samples,
                    sequences: samples + 1,
                    wanted: new,
                    longest: whole,
                    ..documents(groups, whole, s.micro_batch, true)
                }
            }
        }
    }

    /// The largest micro-batch, as the team cuts a step.
    pub fn micro_batch(&self, team: &Team) -> MicroBatch {
        let tokens = self.count * self.tokens;
        let counts = Counts { atoms: self.count, tokens, largest: self.examples };
        let atoms = counts.atoms_at_once(self.micro_batch, team);
        if self.micro_batch > 0 || !self.is_ragged {
            return self.times(atoms);
        }
        // Of shorter examples more go through at once, as long as there are as many.
        let most = self.times(counts.most_at_once(team));
        let tokens = most.rows.tokens.min(TOKENS_AT_ONCE + self.rows);
        let share = |of: usize| (of * tokens).div_ceil(most.rows.tokens.max(1));
        MicroBatch {
            atoms,
            rows: PassRows { tokens, sequences: 2 * share(most.rows.sequences), ..most.rows },
            wanted: share(most.wanted),
        }
    }

    /// So many of them.
    pub fn times(&self, atoms: usize) -> MicroBatch {
        let rows = PassRows {
            tokens: atoms * self.rows,
            sequences: atoms * self.sequences,
            longest: self.longest,
        };
        MicroBatch { atoms, rows, wanted: atoms * self.wanted }
    }
}
