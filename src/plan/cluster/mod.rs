//! The plan of a run that is spread over a cluster: bytes of every rank, bubbles, what ranks send each other, hours.
//!
//! What is exact: elements and owners of every tensor (the layouts that a run uses), what a change of layout moves, the order
//! of passes. What is an estimate: activations, cache, FLOPs outside of products. What is a prediction: every second, from
//! `[cluster.hardware]`, whose figures stand in the report; without the table there are none.

pub mod alignment;
pub mod batch;
pub mod bytes;
pub mod load;
pub mod picture;
pub mod rollouts;
pub mod step;
pub mod switch;
pub mod traffic;

use super::memory::total;
use super::ranks::DeviceMemory;
use crate::cluster::Team;
use crate::cluster::layout::{Sampling, Training};
use crate::cluster::mesh::{self, Mesh, MeshError};
use crate::config::cluster::RolloutLayout;
use crate::config::{ClusterConfig, HardwareConfig, ModelConfig, RunConfig, StageKind};
use crate::model::{flops_per_token, parameters, placement};
use crate::plan::estimate::sequence;
use crate::train::pipeline::{Kind, Schedule};
use alignment::{Alignment, AlignmentPlan};
use batch::Batch;
use bytes::{Layouts, Peak, Sizes, StageBytes, over_device};
use load::Load;
use serde::Serialize;
use std::collections::BTreeMap;
use step::{SCHEDULES, Step, StepPlan};
use switch::SwitchPlan;

/// The plan. Its keys are stable.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClusterPlan {
    /// Ranks, D x P.
    pub ranks: usize,
    /// How they share the work.
    pub layout: ClusterLayout,
    /// The most bytes that a rank holds.
    pub peak_device_bytes: u64,
    /// Where that is.
    pub peak: Peak,
    /// The same of each stage of the run.
    pub peaks: Vec<Peak>,
    /// Whether a device and a host hold it; absent without `[cluster.hardware]`.
    pub fits: Option<bool>,
    /// Bytes that the hosts of a node's ranks hold for them.
    pub host_bytes_per_node: u64,
    /// Bytes by ranks, phase and owner.
    pub bytes: Vec<StageBytes>,
    /// Bytes of weights as they are computed with: of a rank if each tensor were held once,
    pub weight_bytes_once: f64,
    /// and of a rank as it is, in the mean.
    pub weight_bytes_held: f64,
    /// FLOPs of a token in training.
    pub flops_per_token: f64,
    /// Idle share of the first stage that is planned, without messages.
    pub bubble_share: Option<f64>,
    /// Its bytes to experts and back in a step.
    pub all_to_all_bytes: Option<f64>,
    /// Bytes that a switch from training to sampling moves.
    pub reshard_bytes: Option<f64>,
    /// Its GPU hours, predicted.
    pub gpu_hours_per_trillion_tokens: Option<f64>,
    /// GPU hours that were published.
    pub published_gpu_hours_per_trillion_tokens: Option<f64>,
    /// The first over the second, less 1.
    pub relative_error: Option<f64>,
    /// Stages that train on text.
    pub training: Vec<StepPlan>,
    /// GRPO stages.
    pub alignment: Vec<AlignmentPlan>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// `[cluster.hardware]`: what all seconds are predicted from.
    pub assumptions: Option<HardwareConfig>,
}

/// `[cluster]` in short.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClusterLayout {
    /// Data ranks of a stage.
    pub data: usize,
    /// Stages.
    pub pipeline: usize,
    /// Ranks that share experts.
    pub expert: usize,
    /// Order of passes.
    pub schedule: &'static str,
    /// Sampling.
    pub rollout: RolloutLayout,
}

/// A layout that cannot be planned: the last part of its key, and why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct PlanError {
    /// Path of the key below `cluster`.
    pub path: Vec<&'static str>,
    /// What is wrong, and the way out.
    pub message: String,
}

impl ClusterPlan {
    /// Takes the bytes of ranks that will run here, whose arenas are planned for, in place of those of machines elsewhere.
    pub fn hold(&mut self, devices: &[DeviceMemory]) {
        for device in devices {
            let ranks = |stage: &&mut StageBytes| stage.first_rank == device.first_rank;
            if let Some(stage) = self.bytes.iter_mut().find(ranks) {
                stage.phases = device.memory.by_phase();
            }
        }
        let peak = |place: usize| {
            let of = |device: &DeviceMemory| {
                let held = &device.memory.stages[place];
                let phases = held.phases.iter();
                let (phase, bytes) = phases
                    .map(|(phase, owners)| (*phase, total(owners)))
                    .max_by_key(|(_, b)| *b)?;
                Some(Peak { bytes, rank: device.first_rank, phase, stage: held.stage.clone() })
            };
            // The first among equals.
            devices.iter().rev().filter_map(of).max_by_key(|peak| peak.bytes)
        };
        self.peaks = (0..self.peaks.len()).filter_map(peak).collect();
        if let Some(most) = self.peaks.iter().rev().max_by_key(|peak| peak.bytes) {
            (self.peak, self.peak_device_bytes) = (most.clone(), most.bytes);
        }
    }
}

/// The plan of a run whose config asks for one: by a layout of more than one rank, or by `[cluster.hardware]`. `models` are
/// those of its stages.
pub fn cluster_plan(
    config: &RunConfig,
    models: &[ModelConfig],
) -> Result<Option<ClusterPlan>, PlanError> {
    let cluster = &config.cluster;
    let layouts = layouts(cluster, &config.model)?;
    match layouts.training.mesh().ranks() == 1 && cluster.hardware.is_none() {
        true => Ok(None),
        false => Planner { config, models, layouts }.plan().map(Some),
    }
}

/// Who trains with whom, and how those that train and those that only sample do the latter.
pub(super) fn mesh(
    cluster: &ClusterConfig,
    model: &ModelConfig,
) -> Result<(Mesh, [Sampling; 2]), PlanError> {
    let load = mesh::Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
    let sizes = [cluster.data, cluster.pipeline, cluster.expert];
    let refused = |error: MeshError| PlanError { path: error.path(), message: error.to_string() };
    let mesh = Mesh::new(sizes, cluster.data * cluster.pipeline, load).map_err(refused)?;
    Team::require_pieces(mesh, cluster.schedule, model.num_hidden_layers).map_err(refused)?;
    Ok((mesh, Sampling::of_run(cluster, mesh, model).map_err(refused)?))
}

fn layouts(cluster: &ClusterConfig, model: &ModelConfig) -> Result<Layouts, PlanError> {
    let (mesh, [sampling, _]) = mesh(cluster, model)?;
    let training =
        Training::new(mesh, model.num_hidden_layers).in_chunks(cluster.schedule.chunks());
    let tensors = placement::of_model(model, false);
    Ok(Layouts::new(training, sampling, tensors))
}

/// The timeline of a step of the first stage that trains on text, as SVG; `None` for a run without such a stage.
pub fn cluster_picture(
    config: &RunConfig,
    models: &[ModelConfig],
) -> Result<Option<String>, PlanError> {
    let layouts = layouts(&config.cluster, &config.model)?;
    let planner = Planner { config, models, layouts };
    let mut stages = config.stages.iter().zip(models);
    let text = stages.find(|(stage, _)| {
        matches!(stage.kind, StageKind::Pretrain(_) | StageKind::LongContext(_))
    });
    Ok(text.map(|(stage, model)| {
        let (load, batch) = (planner.load(model), planner.batch(&stage.kind));
        let step = Step { load, layouts: &planner.layouts, kind: planner.kind(), batch };
        step.picture(&format!("{}, {}", stage.name, planner.schedule_name()))
    }))
}

struct Planner<'a> {
    config: &'a RunConfig,
    models: &'a [ModelConfig],
    layouts: Layouts,
}

/// Bytes of the ranks of each stage of the pipeline, and who of all holds most.
struct Filled {
    stages: Vec<StageBytes>,
    peaks: Vec<Peak>,
    host_bytes_per_node: u64,
}

impl Filled {
    /// Who holds most in all stages; the first among equals.
    fn peak(&self) -> Peak {
        let most = self.peaks.iter().rev().max_by_key(|peak| peak.bytes);
        most.cloned().expect("a run has a stage")
    }
}

impl Planner<'_> {
    fn plan(&self) -> Result<ClusterPlan, PlanError> {
        let cluster = &self.config.cluster;
        let (mesh, hardware) = (*self.layouts.training.mesh(), cluster.hardware.as_ref());
        let filled = self.bytes();
        let peak = filled.peak();
        let switch = self.switch()?;
        let (training, alignment) = self.steps(switch.as_ref())?;
        let first = training.first();
        let hours = first.and_then(|step| step.simulated).map(|s| s.gpu_hours_per_trillion_tokens);
        let published = hardware.and_then(|hardware| hardware.published_gpu_hours);
        let number = self.load(&self.config.model).number_bytes();
        let held: u64 = self.layouts.held.iter().map(|held| held.weights).sum();
        let fits = hardware.map(|hardware| {
            peak.bytes <= hardware.device_memory.0
                && filled.host_bytes_per_node <= hardware.host_memory.0
        });
        Ok(ClusterPlan {
            ranks: mesh.ranks(),
            layout: ClusterLayout {
                data: mesh.data(),
                pipeline: mesh.pipeline(),
                expert: mesh.expert(),
                schedule: self.schedule_name(),
                rollout: cluster.rollout,
            },
            peak_device_bytes: peak.bytes,
            fits,
            host_bytes_per_node: filled.host_bytes_per_node,
            weight_bytes_once: parameters(&self.config.model).total as f64 * number
                / mesh.ranks() as f64,
            weight_bytes_held: held as f64 * number / mesh.pipeline() as f64,
            flops_per_token: flops_per_token(&self.config.model, sequence(self.config)),
            bubble_share: first.map(|step| step.bubble_share),
            all_to_all_bytes: first.map(|step| step.traffic.all_to_all),
            reshard_bytes: switch.map(|switch| switch.bytes),
            gpu_hours_per_trillion_tokens: hours,
            published_gpu_hours_per_trillion_tokens: published,
            relative_error: hours.zip(published).map(|(hours, published)| hours / published - 1.0),
            notes: self.notes(&filled, &alignment),
            bytes: filled.stages,
            peak,
            peaks: filled.peaks,
            training,
            alignment,
            assumptions: hardware.cloned(),
        })
    }

    fn load<'b>(&'b self, model: &'b ModelConfig) -> Load<'b> {
        let hardware = self.config.cluster.hardware.as_ref();
        Load { model, hardware, expert: self.layouts.training.mesh().expert() }
    }

    fn batch(&self, kind: &StageKind) -> Batch {
        let mesh = self.layouts.training.mesh();
        let least = self.kind().least_micro_batches(mesh.pipeline());
        Batch::new(self.config, kind, mesh.data(), least)
    }

    fn schedule_name(&self) -> &'static str {
        SCHEDULES.iter().find(|(_, kind)| *kind == self.kind()).map_or("", |(name, _)| name)
    }

    fn kind(&self) -> Kind {
        self.config.cluster.schedule
    }

    /// A schedule of as many micro-batches as can be live at once.
    fn schedule(&self, batch: &Batch) -> Schedule {
        let stages = self.layouts.training.mesh().pipeline();
        let live = batch.micro_batches.min(4 * stages);
        Schedule::new(self.kind(), stages, live).expect("a batch has as many as its schedule needs")
    }

    fn bytes(&self) -> Filled {
        let mesh = *self.layouts.training.mesh();
        let hardware = self.config.cluster.hardware.as_ref();
        let room = hardware.map(|hardware| hardware.device_memory.0);
        let empty = |place: usize| StageBytes {
            first_rank: place * mesh.data(),
            last_rank: (place + 1) * mesh.data() - 1,
            layers: self.layouts.training.layers(place).iter().map(|r| [r.start, r.end]).collect(),
            least_recompute: room.map(|_| 0),
            phases: BTreeMap::new(),
        };
        let mut stages: Vec<StageBytes> = (0..mesh.pipeline()).map(empty).collect();
        let mut peaks = Vec::new();
        let mut host = vec![0; mesh.pipeline()];
        for (stage, model) in self.config.stages.iter().zip(self.models) {
            let batch = self.batch(&stage.kind);
            let schedule = self.schedule(&batch);
            let (config, layouts, load) = (self.config, &self.layouts, self.load(model));
            let sizes = Sizes { config, stage, load, layouts, batch, schedule: &schedule };
            let mut peak = Peak { bytes: 0, rank: 0, phase: "train", stage: stage.name.clone() };
            for (place, filled) in stages.iter_mut().enumerate() {
                let phases = sizes.phases(place);
                let least = room.and_then(|room| sizes.least_recompute(place, room));
                // None of one stage is none of all.
                let most = |most: usize| least.map(|least| most.max(least));
                filled.least_recompute = filled.least_recompute.and_then(most);
                host[place] = sizes.host(place).max(host[place]);
                for (phase, owners) in phases {
                    let bytes = total(&owners);
                    if bytes > peak.bytes {
                        peak = Peak { bytes, rank: filled.first_rank, phase, ..peak };
                    }
                    let held = filled.phases.entry(phase).or_default();
                    if bytes > total(held) {
                        *held = owners;
                    }
                }
            }
            peaks.push(peak);
        }
        let node = hardware.map_or(1, |hardware| hardware.devices_per_node);
        let of_rank =
            |rank: usize| if rank < mesh.ranks() { host[mesh.place(rank).stage] } else { 0 };
        let of_node = |first: usize| (first..first + node).map(of_rank).sum();
        let host_bytes_per_node = (0..mesh.ranks()).step_by(node).map(of_node).max().unwrap_or(0);
        Filled { stages, peaks, host_bytes_per_node }
    }

    /// The switch of layouts, for runs that sample.
    fn switch(&self) -> Result<Option<SwitchPlan>, PlanError> {
        let has_rollouts = self.config.stages.iter().any(|s| matches!(s.kind, StageKind::Grpo(_)));
        if !has_rollouts {
            return Ok(None);
        }
        let number = self.load(&self.config.model).number_bytes();
        let node = self.config.cluster.hardware.as_ref().map(|h| h.devices_per_node);
        let plan = SwitchPlan::new(&self.layouts, number, node);
        plan.map(Some)
            .map_err(|error| PlanError { path: vec!["rollout"], message: error.to_string() })
    }

    fn steps(
        &self,
        switch: Option<&SwitchPlan>,
    ) -> Result<(Vec<StepPlan>, Vec<AlignmentPlan>), PlanError> {
        let (mut training, mut alignment) = (Vec::new(), Vec::new());
        let (kind, layouts) = (self.kind(), &self.layouts);
        for (stage, model) in self.config.stages.iter().zip(self.models) {
            let (load, batch) = (self.load(model), self.batch(&stage.kind));
            match (&stage.kind, switch) {
                (StageKind::Pretrain(_) | StageKind::LongContext(_), _) => {
                    training.push(Step { load, layouts, kind, batch }.plan(&stage.name));
                }
                (StageKind::Grpo(grpo), Some(switch)) => {
                    let config = self.config;
                    let step = Alignment { config, grpo, load, layouts, kind, batch };
                    let plan = step.plan(&stage.name, switch).map_err(|stuck| PlanError {
                        path: vec!["schedule"],
                        message: format!("stage {}: {stuck}", stage.name),
                    })?;
                    alignment.push(plan);
                }
                _ => {}
            }
        }
        Ok((training, alignment))
    }

    fn notes(&self, filled: &Filled, alignment: &[AlignmentPlan]) -> Vec<String> {
        let cluster = &self.config.cluster;
        let mut notes = Vec::new();
        if let Some(hardware) = &cluster.hardware {
            notes.extend(over_device(
                &filled.peak(),
                &filled.stages,
                hardware.device_memory,
                &hardware.device,
            ));
            let (host, room) = (filled.host_bytes_per_node, hardware.host_memory);
            if host > room.0 {
                let host = crate::config::Bytes(host);
                notes.push(format!(
                    "the ranks of a node keep {host} on a host that has {room}; offload less"
                ));
            }
        }
        let untimed = |step: &&AlignmentPlan| step.simulated.is_none();
        for step in alignment.iter().filter(untimed).filter(|_| cluster.hardware.is_some()) {
            notes.push(format!(
                "stage {}: a step of {} rollouts is too long to be simulated, so that it has no seconds; fewer prompts \
                 or a larger micro_batch would have some",
                step.stage, step.rollouts
            ));
        }
        let samples = self.config.stages.iter().any(|s| matches!(s.kind, StageKind::Grpo(_)));
        let RolloutLayout { tensor, expert } = cluster.rollout;
        if samples && tensor > 1 && self.config.model.attention() == crate::config::Attention::Mla {
            notes.push(format!(
                "cluster.rollout.tensor = {tensor} holds the latent cache of every sequence {tensor} times, once on each rank \
                 of a tensor group; tensor = 1 (each rank attends for its own sequences) with expert = {} holds it once",
                expert.max(tensor)
            ));
        }
        notes
    }
}
