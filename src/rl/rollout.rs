//! What alignment passes on: rollouts, groups, scored groups. Plain numbers, no tensors.
//!
//! Invariants:
//!   * a group holds the rollouts of one prompt, in order of `sample`, all from one policy version
//!   * `logprobs.len() == tokens.len()`; the last token is the end token if and only if `stop` is `Eos`

use crate::data::example::Prompt;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The model said its end token.
    Eos,
    /// The limit of new tokens or of the context.
    Length,
}

/// One sampled reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Index in its group.
    pub sample: u32,
    /// New tokens, the end token included.
    pub tokens: Vec<u32>,
    /// The sampler's log-probability of each new token.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub stop: Stop,
    /// The new tokens as text, special tokens left out.
    pub text: String,
}

/// The rollouts of one prompt in one step. Copies share prompt and rollouts: several actors' messages carry them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Position of the prompt in the step: the group's id within it.
    pub slot: u32,
    /// The prompt.
    pub prompt: Arc<Prompt>,
    /// Policy version that sampled it.
    pub policy_version: u64,
    /// G rollouts.
    pub rollouts: Arc<[Rollout]>,
}

/// A group with the components of each rollout's reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgedGroup {
    /// The group.
    pub group: Group,
    /// `components[i][c]`: component c of rollout i, before weighting; `None` until a model has scored it.
    pub components: Vec<Vec<Option<f64>>>,
}

/// A group that is ready for the update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroup {
    /// The group.
    pub group: Group,
    /// `components[i][c]`: component c of rollout i, before weighting; `None` for a model of weight 0,
    /// which is not asked.
    pub components: Vec<Vec<Option<f64>>>,
    /// Weighted sum per rollout.
    pub rewards: Vec<f64>,
    /// Advantage per rollout.
    pub advantages: Vec<f64>,
    /// The reference's log-probability of each new token, per rollout; empty if the KL weight is 0.
    pub reference: Vec<Vec<f32>>,
}
