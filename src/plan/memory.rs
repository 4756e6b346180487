//! Bytes by stage, phase and owner, as the engine will hold them.
//!
//! Weights, packed copies, gradients and moments follow the parameter counts; activations are an
//! estimate from what the backward pass keeps of each token. Owners are named as in the ledger:
//! "role/kind".
//!
//! | phase    | resident                                                                      |
//! |----------|-------------------------------------------------------------------------------|
//! | train    | weights, two packed copies (forward, input gradient), gradients, moments      |
//! | generate | weights, one packed copy, cache; what is not offloaded                         |
//! | score    | weights, the largest scored model with one packed copy; what is not offloaded |

use super::cost::cache_bytes_per_token;
use super::estimate::{example_tokens, model_at};
use super::parameters::{multiplied, parameters};
use crate::config::stage::GrpoStage;
use crate::config::{ModelConfig, Offload, RunConfig, StageKind};
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
        let each = self.stages.iter().flat_map(|stage| {
            stage.phases.iter().map(|(phase, owners)| (stage.stage.as_str(), *phase, total(owners)))
        });
        each.max_by_key(|(_, _, bytes)| *bytes)
    }

    /// The most that is held at once without activations: less than this no run can do with.
    pub fn least(&self) -> Option<(&str, &'static str, u64)> {
        let certain = |owners: &Owners| {
            owners
                .iter()
                .filter(|(owner, _)| !owner.ends_with("/activations"))
                .map(|(_, bytes)| bytes)
                .sum::<u64>()
        };
        let each = self.stages.iter().flat_map(|stage| {
            stage
                .phases
                .iter()
                .map(move |(phase, owners)| (stage.stage.as_str(), *phase, certain(owners)))
        });
        each.max_by_key(|(_, _, bytes)| *bytes)
    }
}

/// Sum over owners.
pub fn total(owners: &Owners) -> u64 {
    owners.values().sum()
}

/// What every stage of a run holds.
pub fn memory(config: &RunConfig) -> Memory {
    let stages = config.stages.iter().enumerate().map(|(index, stage)| {
        let sizes = Sizes { config, model: model_at(config, index) };
        let mut phases = BTreeMap::from([("train", sizes.train(&stage.kind))]);
        if let StageKind::Grpo(grpo) = &stage.kind {
            phases.insert("generate", sizes.generate(grpo));
            phases.insert("score", sizes.score(grpo));
        }
        StageMemory { stage: stage.name.clone(), phases }
    });
    Memory { stages: stages.collect() }
}

/// What a model alone holds, by phase: without a cache and activations, whose size depends on the run.
pub fn model_memory(model: &ModelConfig) -> BTreeMap<&'static str, Owners> {
    let (weights, packed) = (4 * parameters(model).total, 4 * multiplied(model));
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
        ("generate", owned(&[("weights", weights), ("packed", packed)])),
    ])
}

/// Sizes of one stage's model.
struct Sizes<'a> {
    config: &'a RunConfig,
    model: ModelConfig,
}

impl Sizes<'_> {
    fn weights(&self) -> u64 {
        4 * parameters(&self.model).total
    }

    fn packed(&self) -> u64 {
        4 * multiplied(&self.model)
    }

    fn offloads(&self, what: Offload) -> bool {
        self.config.engine.offload.contains(&what)
    }

    fn train(&self, kind: &StageKind) -> Owners {
        let mut owners = self.parked(kind, None);
        owners.extend(self.owned([
            ("weights", self.weights()),
            ("packed", 2 * self.packed()),
            ("gradients", self.weights()),
            ("moments", 2 * self.weights()),
            ("activations", self.live_tokens(kind) * activation_bytes(&self.model)),
        ]));
        owners
    }

    fn generate(&self, stage: &GrpoStage) -> Owners {
        let kind = StageKind::Grpo(stage.clone());
        let mut owners = self.parked(&kind, None);
        let rows = self.config.engine.decode_batch.min(stage.prompts * stage.group_size) as u64;
        let tokens = (example_tokens(self.config) + stage.max_new_tokens)
            .min(self.model.max_position_embeddings);
        let pages =
            tokens.div_ceil(self.config.engine.page_tokens) * self.config.engine.page_tokens;
        owners.extend(self.owned([
            ("weights", self.weights()),
            ("packed", self.packed()),
            ("cache", rows * pages as u64 * cache_bytes_per_token(&self.model)),
            ("activations", rows * one_layer_bytes(&self.model)),
        ]));
        self.add_resting_moments(&mut owners);
        owners
    }

    fn score(&self, stage: &GrpoStage) -> Owners {
        let kind = StageKind::Grpo(stage.clone());
        let scored = others(stage).into_iter().next();
        let mut owners = self.parked(&kind, scored.as_deref());
        if let Some(scored) = scored {
            owners.insert(format!("{scored}/weights"), self.weights());
            owners.insert(format!("{scored}/packed"), self.packed());
        }
        owners.extend(self.owned([
            ("weights", self.weights()),
            ("activations", self.live_tokens(&kind) * one_layer_bytes(&self.model)),
        ]));
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
            StageKind::Grpo(stage) => {
                (stage.prompts * stage.group_size, stage.micro_batch, example)
            }
        };
        let rows = if micro == 0 { all } else { micro.min(all) };
        (rows * tokens) as u64
    }
}

/// The models beside the policy that a GRPO stage needs, by their role's name.
fn others(stage: &GrpoStage) -> Vec<String> {
    let reference = (stage.kl_weight > 0.0).then(|| "reference".to_string());
    let rewards = stage
        .reward
        .iter()
        .filter_map(|entry| entry.model.as_ref())
        .map(|name| format!("reward {name}"));
    reference.into_iter().chain(rewards).collect()
}

/// Bytes of a token that the backward pass needs, over all layers and the head.
fn activation_bytes(model: &ModelConfig) -> u64 {
    let layers = (0..model.num_hidden_layers).map(|index| layer_floats(model, model.is_moe(index)));
    // The gradients of one layer's activations live beside them while it is passed backwards.
    let backward = 2 * one_layer_bytes(model);
    4 * layers.sum::<usize>() as u64 + backward + 4 * 4 * model.hidden_size as u64
}

/// Bytes of a token in the widest layer, for passes that keep nothing.
fn one_layer_bytes(model: &ModelConfig) -> u64 {
    let widest = [false, true].map(|moe| layer_floats(model, moe && model.n_routed_experts > 0));
    4 * widest.into_iter().max().unwrap_or_default() as u64
}

/// Floats of a token that one layer keeps.
fn layer_floats(model: &ModelConfig, moe: bool) -> usize {
    let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
    let query = 2 * model.q_lora_rank.unwrap_or(0) + heads * model.query_width();
    let keys = 2 * model.cache_width() + heads * (model.qk_nope_head_dim + model.v_head_dim);
    let attention = 4 * hidden + query + keys + heads * model.v_head_dim;
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
    use super::super::estimate::tests::quickstart;
    use super::*;

    #[test]
    fn training_holds_gradients_and_moments_and_generation_holds_neither() {
        let memory = memory(&quickstart(&[]));
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
        let phases = memory(&quickstart(&["engine.offload=[]"])).by_phase();
        let weights = 4 * 896_208;
        assert_eq!(phases["generate"]["policy/moments"], 2 * weights);
        assert_eq!(phases["generate"]["reference/weights"], weights);
        assert_eq!(phases["train"]["reward safety/weights"], weights);
        let with = memory(&quickstart(&[])).peak().unwrap().2;
        let without = memory(&quickstart(&["engine.offload=[]"])).peak().unwrap().2;
        assert!(without > with, "{without} > {with}");
    }

    #[test]
    fn a_micro_batch_lowers_activations_and_nothing_else() {
        let whole = memory(&quickstart(&[]));
        let parts = memory(&quickstart(&["stage.base.micro_batch=1"]));
        let (whole, parts) = (&whole.stages[0].phases["train"], &parts.stages[0].phases["train"]);
        for (owner, bytes) in whole {
            match owner.as_str() {
                "policy/activations" => assert_eq!(*bytes, 8 * parts[owner]),
                _ => assert_eq!(*bytes, parts[owner], "{owner}"),
            }
        }
    }

    #[test]
    fn the_least_leaves_out_activations_only() {
        let memory = memory(&quickstart(&[]));
        let (stage, phase, least) = memory.least().unwrap();
        assert!(least < memory.peak().unwrap().2);
        assert_eq!(phase, "train", "{stage}");
        assert_eq!(least, 4 * (4 * 896_208 + 2 * multiplied(&quickstart(&[]).model)));
    }
}
