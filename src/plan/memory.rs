//! Bytes by stage, phase and owner, as they are told; `ranks` counts them. Owners are named as in the ledger: "role/kind".
//!
//! | phase    | resident                                                                      |
//! |----------|-------------------------------------------------------------------------------|
//! | train    | weights, two packed copies (forward, input gradient), gradients, moments      |
//! | generate | weights, one packed copy (kv_b twice but where exact), cache; what is not offloaded |
//! | score    | the largest scored model with one packed copy; weights and what is not offloaded |
//! | save     | weights, moments and what an eval that sampled has left                       |
//!
//! Beside them what a model alone holds, and estimates of what a pass keeps of a token, for plans of machines elsewhere.

use super::estimate::example_tokens;
use crate::config::engine::Prefill;
use crate::config::stage::GrpoStage;
use crate::config::{Attention, Dtype, ModelConfig, RunConfig, StageKind};
use crate::engine::weight_format;
use crate::model::parameters::{multiplied, packed_bytes, parameters};
use crate::train::step::TOKENS_AT_ONCE;
use serde::Serialize;
use std::collections::BTreeMap;

/// Bytes by owner.
pub type Owners = BTreeMap<String, u64>;

/// What one stage holds in each of its phases.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageMemory {
    /// The stage's name.
    pub stage: String,
    /// Bytes by phase ("train", "generate", "score", "save") and owner.
    pub phases: BTreeMap<&'static str, Owners>,
    /// The same of what cannot be done without.
    pub least: BTreeMap<&'static str, Owners>,
}

/// What a run holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Of every stage.
    pub stages: Vec<StageMemory>,
}

impl Memory {
    /// For each phase, the owners of the stage that holds most in it.
    pub fn by_phase(&self) -> BTreeMap<&'static str, Owners> {
        let mut largest: BTreeMap<&'static str, Owners> = BTreeMap::new();
        for (phase, owners) in self.stages.iter().flat_map(|stage| &stage.phases) {
            let held = largest.entry(phase).or_default();
            if total(owners) > total(held) {
                *held = owners.clone();
            }
        }
        largest
    }

    /// The most that is held at once: stage, phase and bytes.
    pub fn peak(&self) -> Option<(&str, &'static str, u64)> {
        largest(self.stages.iter().map(|stage| (stage.stage.as_str(), &stage.phases)))
    }

    /// The same with one example at a time: less than this the run cannot do with.
    pub fn least(&self) -> Option<(&str, &'static str, u64)> {
        largest(self.stages.iter().map(|stage| (stage.stage.as_str(), &stage.least)))
    }
}

fn largest<'a>(
    stages: impl Iterator<Item = (&'a str, &'a BTreeMap<&'static str, Owners>)>,
) -> Option<(&'a str, &'static str, u64)> {
    stages
        .flat_map(|(stage, phases)| {
            phases.iter().map(move |(phase, owners)| (stage, *phase, total(owners)))
        })
        .max_by_key(|(_, _, bytes)| *bytes)
}

/// Sum over owners.
pub fn total(owners: &Owners) -> u64 {
    owners.values().sum()
}

/// What a model alone holds, by phase: without a cache and activations, whose size depends on the run.
pub fn model_memory(model: &ModelConfig) -> BTreeMap<&'static str, Owners> {
    let (weights, packed) = (4 * parameters(model).total, 4 * multiplied(model));
    let sampled = packed_bytes(model, weight_format(Dtype::F32), Prefill::ByCost);
    let owned = |kinds: &[(&str, u64)]| {
        kinds.iter().map(|(kind, bytes)| (format!("policy/{kind}"), *bytes)).collect()
    };
    BTreeMap::from([
        (
            "train",
            owned(&[
                ("weights", weights),
                ("packed", 2 * packed),
                ("gradients", weights),
                ("moments", 2 * weights),
            ]),
        ),
        ("generate", owned(&[("weights", weights), ("packed", sampled)])),
    ])
}

/// The models beside the policy that a GRPO stage needs, by their role's name.
pub(super) fn others(stage: &GrpoStage) -> Vec<String> {
    let reference = (stage.kl_weight != 0.0).then(|| "reference".to_string());
    let rewards = stage
        .reward
        .iter()
        .filter(|entry| entry.weight != 0.0)
        .filter_map(|entry| entry.model.as_ref())
        .map(|name| format!("reward {name}"));
    reference.into_iter().chain(rewards).collect()
}

/// Tokens that go through the model at once in training, as far as memory goes.
pub(super) fn tokens_at_once(config: &RunConfig, kind: &StageKind) -> u64 {
    let example = example_tokens(config);
    let (all, micro, tokens) = match kind {
        StageKind::Pretrain(stage) => (stage.batch, stage.micro_batch, stage.sequence),
        StageKind::LongContext(stage) => (stage.batch, stage.micro_batch, stage.sequence),
        StageKind::Sft(stage) => (stage.batch, stage.micro_batch, example),
        StageKind::RewardModel(stage) => (stage.batch, stage.micro_batch, 2 * example),
        StageKind::Grpo(stage) if stage.share_prompts => {
            // A prompt and its replies go through together.
            let prompt = example.saturating_sub(stage.max_new_tokens).max(1);
            let group = prompt + stage.group_size * stage.max_new_tokens;
            (stage.prompts, stage.micro_batch.div_ceil(stage.group_size), group)
        }
        StageKind::Grpo(stage) => (stage.prompts * stage.group_size, stage.micro_batch, example),
    };
    let rows = match micro {
        0 => all.min((TOKENS_AT_ONCE / tokens.max(1)).max(1)),
        micro => micro.min(all),
    };
    (rows * tokens) as u64
}

/// Numbers of a token that a layer keeps for its backward pass.
pub(super) fn kept_numbers(model: &ModelConfig, moe: bool) -> usize {
    layer_floats(model, moe)
}

/// Numbers of a token in the widest layer.
pub(super) fn widest_numbers(model: &ModelConfig) -> usize {
    one_layer_bytes(model) as usize / 4
}

/// Bytes of a token in the widest layer, for passes that keep nothing.
fn one_layer_bytes(model: &ModelConfig) -> u64 {
    let widest = [false, true].map(|moe| layer_floats(model, moe && model.n_routed_experts > 0));
    4 * widest.into_iter().max().unwrap_or_default() as u64
}

/// Floats of a token that one layer keeps.
fn layer_floats(model: &ModelConfig, moe: bool) -> usize {
    let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
    let query = heads * model.query_width();
    let projected = match model.attention() {
        Attention::Mla => {
            let keys = 2 * model.cache_width();
            2 * model.q_lora_rank.unwrap_or(0)
                + keys
                + heads * (model.qk_nope_head_dim + model.v_head_dim)
        }
        Attention::Gqa { .. } => model.cache_width(),
    };
    let attention = 4 * hidden + query + projected + heads * model.value_width();
    let feed_forward = match moe {
        false => 3 * model.intermediate_size,
        true => {
            let routed = model.num_experts_per_tok * (3 * model.moe_intermediate_size + 2 * hidden);
            3 * model.shared_width() + routed + 2 * model.n_routed_experts
        }
    };
    attention + feed_forward
}
