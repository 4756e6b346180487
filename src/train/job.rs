//! What an optimizer step is asked for and what it reports.

use super::routing::LayerRouting;
use crate::cluster::Span;
use crate::data::example::Batch;
use crate::rl::grpo::GrpoSettings;
use crate::rl::rollout::ScoredGroup;
use serde::{Deserialize, Serialize};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TrainJob {
    /// Next-token or preference loss, by the kind of batch.
    Batch {
        /// The examples.
        batch: Batch,
        /// The share of the stage's tokens that were trained on before, for schedules in tokens.
        share: f64,
        /// Examples that go through the model at once; 0 for about [`TOKENS_AT_ONCE`](super::step::TOKENS_AT_ONCE) tokens.
        micro_batch: usize,
        /// What full devices drop; `None` for nothing.
        dropping: Option<Dropping>,
    },
    /// One GRPO update.
    Grpo {
        /// Scored groups, in order of slot.
        groups: Vec<ScoredGroup>,
        /// Settings of the loss.
        settings: GrpoSettings,
        /// Rollouts that go through the model at once, in whole groups where prompts are shared; 0 for about
        /// [`TOKENS_AT_ONCE`](super::step::TOKENS_AT_ONCE) tokens.
        micro_batch: usize,
        /// Whether a group's prompt goes through the model once for all its rollouts.
        share_prompts: bool,
    },
}

/// Token dropping in one step on documents (DeepSeek-V2, section 2.2.4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dropping {
    /// Pairs of token and expert that a device may process of each document, as a multiple of an even share.
    pub capacity_factor: f64,
    /// For each document, whether it keeps all its pairs.
    pub protected: Vec<bool>,
}

/// What one optimizer step did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Loss: of the objective, balance loss apart.
    pub loss: f64,
    /// Balance losses, weighted, summed over layers.
    pub balance_loss: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Global gradient norm before the clip.
    pub gradient_norm: f64,
    /// Tokens of the examples, each rollout with its prompt; rollouts that teach nothing are left out.
    pub tokens: u64,
    /// Token rows that went through the model: fewer than tokens where rollouts share a prompt.
    pub rows: u64,
    /// Those of them that a step must have: each token of an example once, a prompt once for all its rollouts.
    pub unique_rows: u64,
    /// FLOPs of the examples, three forward passes with attention expanded: a prompt once for all its rollouts, each token
    /// of a trained rollout once. 0 if no weight was changed.
    pub useful_flops: f64,
    /// Seconds of the step.
    pub seconds: f64,
    /// Examples that went through the model at once: fewer than asked for if the budget allowed no more.
    pub micro_batch: usize,
    /// Most bytes that the device ever held, this step included.
    pub memory_high_water: u64,
    /// True if loss or gradient was not finite: no weight was changed.
    pub skipped: bool,
    /// True if the weights were changed before all ranks' figures were known, and changed back.
    pub was_taken_back: bool,
    /// Version of the weights after the step.
    pub policy_version: u64,
    /// What the router of each MoE layer did.
    pub routing: Vec<LayerRouting>,
    /// Of a step over several ranks, whose number is a power of two, from 1: what each of them did, in seconds since 1970.
    pub ran: Vec<(u32, Vec<Span>)>,
    /// Seconds under way of its all-to-all exchanges, those of all ranks together, and of them those beside shared experts.
    pub exchanged: [f64; 2],
    /// Preference loss: share of pairs whose chosen reply scores higher.
    pub accuracy: Option<f64>,
    /// GRPO only.
    pub grpo: Option<GrpoReport>,
}

/// GRPO's own figures of one update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GrpoReport {
    /// Mean of k3 over the tokens that were trained on, as all means and gaps here.
    pub kl: f64,
    /// Mean entropy of the policy over reply tokens, nats.
    pub entropy: f64,
    /// Share of tokens whose gradient the clip removed.
    pub clip_share: f64,
    /// Largest |sampler - trainer| log-probability over tokens, before the first update of a batch.
    pub logprob_gap_max: f64,
    /// Its mean.
    pub logprob_gap_mean: f64,
    /// Mean of k3 of sampler and trainer, an estimate of KL(sampler || trainer) in nats a token; as the gaps.
    pub sampler_kl: f64,
    /// Importance weights of the tokens; `None` where rollouts have none.
    pub importance: Option<Importance>,
    /// The share of the step's rollouts that were trained on; the others would have added exact zeros.
    pub trained_share: f64,
}

/// Importance weights of a step's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Importance {
    /// Their mean.
    pub weight_mean: f64,
    /// The share that the limit cut.
    pub truncated_share: f64,
}
