//! Bytes by stage, phase and owner, as the engine will hold them.
//!
//! Weights, packed copies, gradients and moments follow the parameter counts; activations are an
//! estimate from what a pass keeps of each token. Owners are named as in the ledger: "role/kind".
//!
//! | phase    | resident                                                                      |
//! |----------|-------------------------------------------------------------------------------|
//! | train    | weights, two packed copies (forward, input gradient), gradients, moments      |
//! | generate | weights, one packed copy (kv_b twice but where exact), cache; what is not offloaded |
//! | score    | the largest scored model with one packed copy; weights and what is not offloaded |
//!
//! Rollouts hold the packed copy as the stage's `rollout_dtype`, evals as f32; the larger of the two is told. (A processor
//! without instructions for int8 samples from f32 all the same.)
//!
//! Two sizes are told: what a stage holds if everything asked for goes through at once, and the least that it can do
//! with, because training and scoring take fewer rows at once where the budget allows no more, down to one example,
//! or to one group of rollouts that share their prompt.

use super::cost::cache_bytes_per_token;
use super::estimate::example_tokens;
use crate::config::engine::Prefill;
use crate::config::stage::GrpoStage;
use crate::config::{
    Attention, Dtype, EngineConfig, ModelConfig, Offload, RunConfig, Stage, StageKind,
};
use crate::engine::{ROWS_AT_ONCE, weight_format};
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
    /// Bytes by phase ("train", "generate", "score") and owner.
    pub phases: BTreeMap<&'static str, Owners>,
    /// The same with one example at a time.
    pub least: BTreeMap<&'static str, Owners>,
    /// `least` of the train phase if rollouts that share their prompt did not: what `share_prompts = false` makes of it.
    pub least_unshared: Option<u64>,
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

    /// The stages whose `share_prompts = false` would let the run do with so many bytes, where it cannot otherwise.
    pub fn stages_to_unshare(&self, bytes: u64) -> Vec<&str> {
        let over = self.stages.iter().flat_map(|stage| {
            let over = stage.least.iter().filter(|(_, owners)| total(owners) > bytes);
            over.map(move |(phase, _)| (stage, *phase))
        });
        let unshared = over.map(|(stage, phase)| {
            let fits = stage.least_unshared.is_some_and(|least| least <= bytes);
            (phase == "train" && fits).then_some(stage.stage.as_str())
        });
        unshared.collect::<Option<_>>().unwrap_or_default()
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

/// What every stage of a run holds; `models` are those of the stages.
pub fn memory(config: &RunConfig, models: &[ModelConfig]) -> Memory {
    let stages = config.stages.iter().zip(models).map(|(stage, model)| {
        let phases = |at_once| Sizes { config, model, at_once }.phases(stage);
        let least_unshared =
            unshared(stage).map(|kind| total(&Sizes { config, model, at_once: 1 }.train(&kind)));
        StageMemory {
            stage: stage.name.clone(),
            phases: phases(usize::MAX),
            least: phases(1),
            least_unshared,
        }
    });
    Memory { stages: stages.collect() }
}

/// A stage whose rollouts share their prompt, without that.
fn unshared(stage: &Stage) -> Option<StageKind> {
    match &stage.kind {
        StageKind::Grpo(grpo) if grpo.share_prompts => {
            Some(StageKind::Grpo(GrpoStage { share_prompts: false, ..grpo.clone() }))
        }
        _ => None,
    }
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

/// Sizes of one stage's model.
struct Sizes<'a> {
    config: &'a RunConfig,
    model: &'a ModelConfig,
    /// Examples that go through the model at once at most, whatever the stage asks for.
    at_once: usize,
}

impl Sizes<'_> {
    fn phases(&self, stage: &Stage) -> BTreeMap<&'static str, Owners> {
        let mut phases = BTreeMap::from([("train", self.train(&stage.kind))]);
        let sampled = stage.eval.iter().filter(|eval| eval.verifier.is_some());
        let longest_reply = sampled.map(|eval| eval.max_new_tokens).max();
        let grpo = match &stage.kind {
            StageKind::Grpo(grpo) => Some(grpo),
            _ => None,
        };
        let evals = longest_reply.map(|reply| (usize::MAX, reply, Dtype::F32));
        let rollouts = grpo
            .map(|grpo| (grpo.prompts * grpo.group_size, grpo.max_new_tokens, grpo.rollout_dtype));
        let sampled = evals.into_iter().chain(rollouts);
        let sampled = sampled.map(|sampled| self.generate(&stage.kind, sampled));
        if let Some(owners) = sampled.max_by_key(total) {
            phases.insert("generate", owners);
        }
        let measured = stage.eval.iter().any(|eval| eval.metric.is_some());
        let fitted = matches!(stage.kind, StageKind::RewardModel(_));
        if measured || fitted || grpo.is_some_and(|grpo| !others(grpo).is_empty()) {
            phases.insert("score", self.score(&stage.kind));
        }
        phases
    }

    fn weights(&self) -> u64 {
        4 * parameters(self.model).total
    }

    fn packed(&self) -> u64 {
        4 * multiplied(self.model)
    }

    fn offloads(&self, what: Offload) -> bool {
        self.config.engine.offloads(what)
    }

    fn train(&self, kind: &StageKind) -> Owners {
        let mut owners = self.parked(kind, None);
        owners.extend(self.owned([
            ("weights", self.weights()),
            ("packed", 2 * self.packed()),
            ("gradients", self.weights()),
            ("moments", 2 * self.weights()),
            ("activations", self.live_tokens(kind) * self.activation_bytes()),
        ]));
        owners
    }

    /// Bytes of a token that the backward pass needs, over all layers and the head.
    fn activation_bytes(&self) -> u64 {
        let (model, again) = (self.model, self.config.engine.recompute);
        // Of a layer that is computed again only the input is kept.
        let layer = |index: usize| match index < again {
            true => model.hidden_size,
            false => layer_floats(model, model.is_moe(index)),
        };
        let layers: usize = (0..model.num_hidden_layers).map(layer).sum();
        // The gradients of one layer's activations live beside them while it is passed backwards, and so do those of a
        // layer that is computed again.
        let live = if again > 0 { 3 } else { 2 };
        4 * layers as u64 + live * one_layer_bytes(model) + 4 * 4 * model.hidden_size as u64
    }

    /// Sampling of so many rollouts of a length from weights of a type.
    fn generate(&self, kind: &StageKind, sampled: (usize, usize, Dtype)) -> Owners {
        let (rollouts, reply, dtype) = sampled;
        let mut owners = self.parked(kind, None);
        let rows = self.config.engine.decode_batch.min(rollouts).min(self.at_once) as u64;
        let tokens = (example_tokens(self.config) + reply).min(self.model.max_position_embeddings);
        let pages =
            tokens.div_ceil(self.config.engine.page_tokens) * self.config.engine.page_tokens;
        // Exact rollouts are absorbed throughout; other prompts may be expanded.
        let prefill = match kind {
            StageKind::Grpo(_) => self.config.engine.grpo_forms().1,
            _ => Prefill::ByCost,
        };
        owners.extend(self.owned([
            ("weights", self.weights()),
            ("packed", packed_bytes(self.model, weight_format(dtype), prefill)),
            ("cache", rows * pages as u64 * cache_bytes_per_token(self.model)),
            ("activations", rows * one_layer_bytes(self.model)),
        ]));
        self.add_resting_moments(&mut owners);
        owners
    }

    fn score(&self, kind: &StageKind) -> Owners {
        let scored = match kind {
            StageKind::Grpo(stage) => others(stage).into_iter().next(),
            _ => None,
        };
        let mut owners = self.parked(kind, scored.as_deref());
        let role = scored.unwrap_or_else(|| "policy".to_string());
        owners.insert(format!("{role}/weights"), self.weights());
        owners.insert(format!("{role}/packed"), self.packed());
        let rows = example_tokens(self.config) as u64;
        let rows = if self.at_once == 1 { rows } else { rows.max(ROWS_AT_ONCE as u64) };
        owners.extend(self.owned([("activations", rows * one_layer_bytes(self.model))]));
        // By plan the policy leaves too while others are scored, if it must.
        let EngineConfig { budget, offload, .. } = &self.config.engine;
        if budget.is_none() || offload.is_some() || role == "policy" {
            owners.insert("policy/weights".to_string(), self.weights());
        }
        self.add_resting_moments(&mut owners);
        owners
    }

    fn owned<const N: usize>(
        &self,
        kinds: [(&str, u64); N],
    ) -> impl Iterator<Item = (String, u64)> {
        kinds.map(|(kind, bytes)| (format!("policy/{kind}"), bytes)).into_iter()
    }

    fn add_resting_moments(&self, owners: &mut Owners) {
        if !self.offloads(Offload::Optimizer) {
            owners.insert("policy/moments".to_string(), 2 * self.weights());
        }
    }

    /// Weights of models that rest in this phase and are not offloaded.
    fn parked(&self, kind: &StageKind, scored: Option<&str>) -> Owners {
        let StageKind::Grpo(stage) = kind else { return Owners::new() };
        let stays = |role: &&String| {
            let what =
                if *role == "reference" { Offload::Reference } else { Offload::RewardModels };
            scored != Some(role.as_str()) && !self.offloads(what)
        };
        others(stage)
            .iter()
            .filter(stays)
            .map(|role| (format!("{role}/weights"), self.weights()))
            .collect()
    }

    /// Tokens that go through the model at once in training.
    fn live_tokens(&self, kind: &StageKind) -> u64 {
        let example = example_tokens(self.config);
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
            StageKind::Grpo(stage) => {
                (stage.prompts * stage.group_size, stage.micro_batch, example)
            }
        };
        let rows = match micro {
            0 => all.min((TOKENS_AT_ONCE / tokens.max(1)).max(1)),
            micro => micro.min(all),
        };
        (rows.min(self.at_once) * tokens) as u64
    }
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
pub(super) fn tokens_at_once(config: &RunConfig, model: &ModelConfig, kind: &StageKind) -> u64 {
    Sizes { config, model, at_once: usize::MAX }.live_tokens(kind)
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

#[cfg(test)]
mod tests {
    use super::super::estimate::tests::{models, quickstart};
    use super::*;
    use crate::model::parameters::keys_and_values;

    fn planned(assignments: &[&str]) -> Memory {
        let config = quickstart(assignments);
        memory(&config, &models(&config))
    }

    #[test]
    fn training_holds_gradients_and_moments_and_generation_holds_neither() {
        let memory = planned(&[]);
        let phases = memory.by_phase();
        let weights = 4 * 896_208;
        assert_eq!(phases["train"]["policy/weights"], weights);
        assert_eq!(phases["train"]["policy/gradients"], weights);
        assert_eq!(phases["train"]["policy/moments"], 2 * weights);
        assert!(phases["train"]["policy/packed"] > phases["generate"]["policy/packed"]);
        assert!(!phases["train"].contains_key("policy/cache"));
        assert!(!phases["generate"].contains_key("policy/gradients"));
        assert!(!phases["generate"].contains_key("policy/moments"));
        assert!(phases["generate"]["policy/cache"] > 0);
    }

    #[test]
    fn what_is_not_offloaded_stays_in_every_phase() {
        let phases = planned(&["engine.offload=[]"]).by_phase();
        let weights = 4 * 896_208;
        assert_eq!(phases["generate"]["policy/moments"], 2 * weights);
        assert_eq!(phases["generate"]["reference/weights"], weights);
        assert_eq!(phases["train"]["reward safety/weights"], weights);
        let with = planned(&[]).peak().unwrap().2;
        let without = planned(&["engine.offload=[]"]).peak().unwrap().2;
        assert!(without > with, "{without} > {with}");
    }

    #[test]
    fn rollouts_that_need_not_be_exact_pack_kv_b_for_both_forms() {
        let packed = |assignments: &[&str]| planned(assignments).stages[4].phases["generate"]["policy/packed"];
        let config = quickstart(&[]);
        let (exact, fast) = (packed(&[]), packed(&["engine.exact=false"]));
        assert_eq!(fast - exact, 4 * keys_and_values(&config.model));
    }

    #[test]
    fn rollouts_in_few_bits_hold_fewer_and_evals_hold_f32_all_the_same() {
        let packed = |dtype: &str, has_evals: bool| {
            let dtype = format!("stage.align.rollout_dtype={dtype}");
            let mut config = quickstart(&["engine.exact=false", &dtype]);
            config.stages.iter_mut().filter(|_| !has_evals).for_each(|stage| stage.eval.clear());
            let stage = memory(&config, &models(&config)).stages.pop().unwrap();
            assert_eq!(stage.stage, "align");
            stage.phases["generate"]["policy/packed"]
        };
        let full = packed("f32", false);
        // The head has 16 bits, W_UK and W_UV 32 beside integers.
        for (dtype, share) in [("bf16", 0.5), ("fp8", 0.25), ("int8", 0.3)] {
            let few = packed(dtype, false) as f64 / full as f64;
            assert!((share..share + 0.05).contains(&few), "{dtype}: {few}");
            assert_eq!(packed(dtype, true), full, "{dtype}");
        }
    }

    #[test]
    fn a_stage_is_told_to_unshare_its_prompts_if_that_alone_suffices() {
        let stage = |name: &str, bytes: u64, least_unshared| {
            let least = BTreeMap::from([("train", Owners::from([("x".to_string(), bytes)]))]);
            StageMemory { stage: name.to_string(), phases: least.clone(), least, least_unshared }
        };
        let stages = vec![stage("base", 4, None), stage("align", 10, Some(6))];
        let memory = Memory { stages };
        let told = |bytes: u64| memory.stages_to_unshare(bytes).len();
        assert_eq!([10, 9, 6, 5, 3].map(told), [0, 1, 1, 0, 0]);
        assert_eq!(memory.stages_to_unshare(6), ["align"]);
    }

    #[test]
    fn a_micro_batch_lowers_activations_and_nothing_else() {
        let whole = planned(&[]);
        let parts = planned(&["stage.base.micro_batch=1"]);
        let (whole, parts) = (&whole.stages[0].phases["train"], &parts.stages[0].phases["train"]);
        for (owner, bytes) in whole {
            match owner.as_str() {
                "policy/activations" => assert_eq!(*bytes, 8 * parts[owner]),
                _ => assert_eq!(*bytes, parts[owner], "{owner}"),
            }
        }
    }

    #[test]
    fn recomputed_layers_lower_activations_and_nothing_else() {
        let (kept, again) = (planned(&[]), planned(&["engine.recompute=9"]));
        let (kept, again) = (&kept.stages[0].phases["train"], &again.stages[0].phases["train"]);
        for (owner, bytes) in kept {
            match owner.as_str() {
                "policy/activations" => assert!(again[owner] < *bytes, "{}", again[owner]),
                _ => assert_eq!(*bytes, again[owner], "{owner}"),
            }
        }
    }

    #[test]
    fn the_least_takes_one_example_at_a_time() {
        let memory = planned(&[]);
        let (stage, phase, least) = memory.least().unwrap();
        assert!(least < memory.peak().unwrap().2);
        assert_eq!(phase, "train", "{stage}");
        let (whole, one) = (&memory.stages[0].phases["train"], &memory.stages[0].least["train"]);
        assert_eq!(whole["policy/activations"], 8 * one["policy/activations"]);
        assert_eq!(whole["policy/moments"], one["policy/moments"]);
    }
}
