//! What each device of a run holds in each phase, and whether it fits: the device of one process, or the two of one that
//! samples beside training, and the ranks of a cluster.
//!
//! Asks the code that the run uses: `cluster::layout` for slices, `train::step` and `train::pipeline` for micro-batches and the
//! order of their passes, `model::{weight_bytes, pass_bytes}` for what the arena is asked for, `engine` for pages of the cache and
//! rows that are scored at once. The ranks of one stage of the pipeline hold as much as its first one, or less.
//!
//! An upper bound, and certain but for three things that are taken and told: no example is longer than twice what `estimate`
//! takes one to have, nor than the model's positions (rows of pretraining and new tokens of rollouts are as long as they
//! may be); a micro-batch that is cut by tokens has an example more than its tokens; and an eval of a file that is not
//! generated has as many examples as decode at once, or are scored at once. Ranks that share experts are
//! planned for all tokens choosing those of one rank.
//!
//! Beside examples and messages, which are on the heap: a bucket of weights or gradients for each rank that sends one.

mod items;
mod refusal;
mod sampling;
#[cfg(test)]
mod tests;
mod training;

use super::cluster::{PlanError, mesh};
use super::memory::{Memory, Owners, StageMemory, others, total};
use crate::cluster::Team;
use crate::cluster::layout::Sampling;
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::{EngineConfig, ModelConfig, Offload, RunConfig, Stage, StageKind};
use crate::model::pass_bytes::PassBytes;
use crate::model::weight_bytes::{moment_bytes, pool_bytes, rope_bytes, weight_bytes};
use crate::model::{Layout, Part, placement};
pub use refusal::{Refusal, Room, exceeds, refusal};
use serde::Serialize;
use std::collections::BTreeMap;

/// What devices hold that have the same work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceMemory {
    /// First of their ranks.
    pub first_rank: usize,
    /// Last of them.
    pub last_rank: usize,
    /// Whether they only sample.
    pub samples: bool,
    /// Bytes of every stage of the run.
    #[serde(flatten)]
    pub memory: Memory,
}

/// What the devices of a run hold, those with the same work together; `models` are those of its stages.
pub fn device_memory(
    config: &RunConfig,
    models: &[ModelConfig],
    threads: usize,
) -> Result<Vec<DeviceMemory>, PlanError> {
    let team = team(config)?;
    let planner = Planner { config, models, team: &team, threads };
    let trainers = (0..team.mesh.pipeline()).map(|place| planner.device(Some(place)));
    let samplers = (team.samplers > 0).then(|| planner.device(None));
    Ok(trainers.chain(samplers).collect())
}

/// The ranks of a run as its processes will make them out.
fn team(config: &RunConfig) -> Result<Team, PlanError> {
    let cluster = &config.cluster;
    let (mesh, [sampling, samplers_layout]) = mesh(cluster, &config.model)?;
    Ok(Team {
        mesh,
        schedule: cluster.schedule,
        sampling,
        samplers: cluster.samplers,
        samplers_layout,
        ..Team::alone()
    })
}

struct Planner<'a> {
    config: &'a RunConfig,
    models: &'a [ModelConfig],
    team: &'a Team,
    threads: usize,
}

impl Planner<'_> {
    /// Those of a stage of the pipeline, or those that only sample.
    fn device(&self, place: Option<usize>) -> DeviceMemory {
        let (mesh, samplers) = (self.team.mesh, self.team.samplers);
        let (first_rank, count) = match place {
            Some(place) => (place * mesh.data(), mesh.data()),
            None => (mesh.ranks(), samplers),
        };
        let stages = self.config.stages.iter().zip(self.models);
        let stages = stages.map(|(stage, model)| {
            let device = Device::new(self, stage, model, place);
            let of = |extent| device.phases(extent);
            StageMemory {
                stage: stage.name.clone(),
                phases: of(Extent::Asked),
                least: of(Extent::Least),
            }
        });
        DeviceMemory {
            first_rank,
            last_rank: first_rank + count - 1,
            samples: place.is_none(),
            memory: Memory { stages: stages.collect() },
        }
    }
}

/// How much of what could be held is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// All that the config asks for, with nothing away that need not be.
    Asked,
    /// What the device can do with.
    Least,
}

/// A device in one stage of a run.
struct Device<'a> {
    config: &'a RunConfig,
    stage: &'a Stage,
    model: &'a ModelConfig,
    team: &'a Team,
    /// Its stage of the pipeline; `None` if it only samples.
    place: Option<usize>,
    threads: usize,
    /// What it holds of the policy in training, or if it only samples.
    own: Layout,
    /// What it holds of the policy in sampling and scoring.
    sampled: Layout,
    form: AttentionForm,
    prefill: Prefill,
    moments: Moments,
}

/// What a device answers for.
#[derive(Default)]
struct Moments {
    elements: usize,
    /// The longest run of them in one tensor.
    longest: usize,
}

/// What a phase holds: what it needs of weights and moments, and what it makes.
struct Phase {
    needed: Owners,
    working: Owners,
}

impl<'a> Device<'a> {
    fn new(
        planner: &Planner<'a>,
        stage: &'a Stage,
        model: &'a ModelConfig,
        place: Option<usize>,
    ) -> Device<'a> {
        let Planner { config, team, threads, .. } = *planner;
        let value_head = matches!(stage.kind, StageKind::RewardModel(_));
        let engine = &config.engine;
        let (form, prefill) = match stage.kind {
            StageKind::Grpo(_) => engine.grpo_forms(),
            _ => (engine.attention, Prefill::ByCost),
        };
        let part = |part| Layout::of_part(model, value_head, part);
        let in_sampling = || part(Part::in_sampling(model, &sampling(team, place), 0));
        let training = team.layout(model.num_hidden_layers);
        let (own, moments) = match place {
            None => (in_sampling(), Moments::default()),
            Some(place) => {
                let rank = place * team.mesh.data();
                let tensors = placement::of_model(model, value_head);
                let runs = training.moments(rank, &tensors);
                let lengths = runs.iter().map(|run| run.elements.len());
                let longest = lengths.clone().max().unwrap_or(0);
                let moments = Moments { elements: lengths.sum(), longest };
                (part(Part::in_training(model, &training, rank)), moments)
            }
        };
        let sampled = in_sampling();
        Device { config, stage, model, team, place, threads, own, sampled, form, prefill, moments }
    }

    /// Bytes by phase and owner.
    fn phases(&self, extent: Extent) -> BTreeMap<&'static str, Owners> {
        let mut phases: BTreeMap<&'static str, Phase> = BTreeMap::new();
        if self.place.is_some() {
            phases.insert("train", self.train(extent));
        }
        // Who only samples has the policy of every stage.
        let idle =
            self.place.is_none().then(|| Phase { needed: self.items(), working: Owners::new() });
        if let Some(phase) = self.generate(extent).or(idle) {
            phases.insert("generate", phase);
        }
        if let Some(phase) = self.score(extent) {
            phases.insert("score", phase);
        }
        if let Some(phase) = self.save(extent) {
            phases.insert("save", phase);
        }
        let held = |(name, phase)| (name, self.held(phase, extent));
        phases.into_iter().map(held).collect()
    }

    /// All that a phase finds on the device, and what it adds.
    fn held(&self, phase: Phase, extent: Extent) -> Owners {
        let mut owners = phase.needed;
        for (owner, bytes) in self.items() {
            if !self.leaves(&owner, extent) {
                owners.entry(owner).or_insert(bytes);
            }
        }
        owners.insert("rope/weights".into(), self.rope());
        owners.extend(phase.working);
        let pool = pool_bytes(total(&owners));
        owners.insert("pool/activations".into(), pool);
        owners.retain(|_, bytes| *bytes > 0);
        owners
    }

    /// Weights and moments that last from phase to phase.
    fn items(&self) -> Owners {
        let mut items = Owners::from([("policy/weights".to_string(), weight_bytes(&self.own))]);
        if self.place.is_some() {
            items.insert("policy/moments".into(), moment_bytes(self.moments.elements));
            let of = |role: String| {
                let bytes = weight_bytes(&self.layout_of(&role));
                (format!("{role}/weights"), bytes)
            };
            items.extend(self.others().into_iter().map(of));
        }
        items
    }

    /// The models beside the policy.
    fn others(&self) -> Vec<String> {
        match &self.stage.kind {
            StageKind::Grpo(grpo) if self.place.is_some() => others(grpo),
            _ => Vec::new(),
        }
    }

    /// What this device holds of another model.
    fn layout_of(&self, role: &str) -> Layout {
        let part = Part::in_sampling(self.model, &self.sampling(), 0);
        Layout::of_part(self.model, role != "reference", part)
    }

    /// Whether something is elsewhere in phases that do not need it.
    fn leaves(&self, owner: &str, extent: Extent) -> bool {
        let engine: &EngineConfig = &self.config.engine;
        let what = match owner {
            "policy/weights" => None,
            "policy/moments" => Some(Offload::Optimizer),
            "reference/weights" => Some(Offload::Reference),
            _ => Some(Offload::RewardModels),
        };
        match (&engine.offload, extent) {
            (Some(listed), _) => what.is_some_and(|what| listed.contains(&what)),
            (None, Extent::Least) => true,
            (None, Extent::Asked) => engine.budget.is_some(),
        }
    }

    /// Positions of the policy, of its other layout and of the other models.
    fn rope(&self) -> u64 {
        let switched = u64::from(self.switches());
        (1 + switched + self.others().len() as u64) * rope_bytes(self.model)
    }

    fn switches(&self) -> bool {
        self.place.is_some() && crate::engine::switches(self.team)
    }

    fn sampling(&self) -> Sampling {
        sampling(self.team, self.place)
    }

    /// Passes of the policy in training.
    fn training_passes(&self) -> PassBytes<'_> {
        let (tensor_ranks, expert_ranks) = (1, self.team.mesh.expert());
        let (config, layout, form, threads) = (self.model, &self.own, self.form, self.threads);
        PassBytes { config, layout, expert_ranks, tensor_ranks, form, threads }
    }

    /// Passes of models in the layout of sampling.
    fn sampling_passes(&self) -> PassBytes<'_> {
        let Sampling { tensor, expert, .. } = self.sampling();
        let (config, layout, form, threads) = (self.model, &self.sampled, self.form, self.threads);
        PassBytes { config, layout, expert_ranks: expert, tensor_ranks: tensor, form, threads }
    }
}

/// The layout in which a stage of the pipeline, or who only samples, samples and scores.
fn sampling(team: &Team, place: Option<usize>) -> Sampling {
    if place.is_none() { team.samplers_layout } else { team.sampling }
}
