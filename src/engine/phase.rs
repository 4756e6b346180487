//! Phases of a device and the jobs it takes in each.
//!
//! Generate: weights packed for forward products and a latent cache; no gradients, no moments.
//! Score: one model at a time, forward only. Train: weights, gradients, moments, activations; no cache.
//! Idle: only what the last phase left resident and nothing else needs.

use super::timeline::Timeline;
use super::utilisation::Chores;
use crate::config::Dtype;
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::routing::Balance;
use crate::config::stage::OptimizerConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

pub use crate::inference::job::{
    DecodePasses, GenerateJob, GenerateReport, GenerateRequest, TokenGroup,
};
pub use crate::rl::grpo::GrpoSettings;
pub use crate::train::job::{Dropping, GrpoReport, Importance, StepReport, TrainJob};
pub use crate::train::routing::LayerRouting;

/// What a device is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Between stages.
    Idle,
    /// Sampling from the policy.
    Generate,
    /// Forward passes of reward models, the reference, or an eval.
    Score,
    /// Updates of the trained model.
    Train,
}

/// A model in the engine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The model that is trained (in a reward-model stage: the reward model that is being fitted).
    Policy,
    /// The frozen policy of the stage's start.
    Reference,
    /// A fitted reward model, by its stage's name.
    Reward(String),
}

impl Role {
    /// The role's name in the ledger.
    pub fn name(&self) -> String {
        match self {
            Role::Policy => "policy".to_string(),
            Role::Reference => "reference".to_string(),
            Role::Reward(name) => format!("reward {name}"),
        }
    }
}

/// Where a model's weights come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ModelSource {
    /// Initial weights: a function of the run's seed and the model's config.
    Fresh,
    /// A folder with config.json and safetensors: ours or Hugging Face's.
    Folder(PathBuf),
}

/// Readies the engine for a stage: which models it holds and how the policy is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareStage {
    /// Weights of the trained model.
    pub policy: ModelSource,
    /// Weights of the reference, if the stage's objective has one.
    pub reference: Option<ModelSource>,
    /// Reward models by name.
    pub rewards: BTreeMap<String, PathBuf>,
    /// Optimizer of the trained model; `None` if nothing is trained (an eval).
    pub optimizer: Option<OptimizerConfig>,
    /// Optimizer steps of the stage, for the schedule.
    pub steps: u64,
    /// A reward-model stage adds a zero scalar head to the policy it starts from.
    pub value_head: bool,
    /// YaRN of a long-context stage: replaces the model's `rope_scaling` and its greatest length.
    pub yarn: Option<(Option<crate::config::RopeScaling>, usize)>,
    /// Form of attention in training and scoring: the sampler's (absorbed) where its log-probabilities must be the same.
    pub form: AttentionForm,
    /// How prompts go through the sampler: absorbed where its log-probabilities must be the trainer's.
    pub prefill: Prefill,
    /// Weights of the balance losses (none in reward-model and GRPO stages).
    pub balance: Balance,
}

/// Forward passes of one model over whole sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreJob {
    /// The model.
    pub role: Role,
    /// Token sequences.
    pub sequences: Vec<Vec<u32>>,
    /// Divide logits by this (the sampler's temperature).
    pub temperature: f64,
    /// For each sequence, the first token whose log-probability is wanted (at least 1). Ignored by reward models.
    pub first: Vec<usize>,
}

/// What a forward pass says of one sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SequenceScore {
    /// Log-probability of each token from `first` on.
    Logprobs(Vec<f32>),
    /// A reward model's calibrated score at the last token: (raw - mean) / deviation.
    Reward(f64),
}

/// What a change of phase did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Seconds it took.
    pub seconds: f64,
    /// Bytes moved off the device and back.
    pub bytes_out: u64,
    /// See `bytes_out`.
    pub bytes_in: u64,
    /// What of the seconds went into packing and moving.
    pub chores: Chores,
    /// What jobs spent on the like since a phase was asked for last, this one or another.
    pub left: Chores,
    /// Bytes held afterwards, by "role/kind".
    pub held: BTreeMap<String, u64>,
    /// Most bytes ever held.
    pub high_water: u64,
    /// Most bytes ever in use at once: a budget of so many would have sufficed without offload.
    pub most_used: u64,
    /// What was computed and what moved since the step began.
    pub timeline: Timeline,
    /// In Generate: what the policy's weights are packed as.
    pub sampled_as: Option<Dtype>,
}
