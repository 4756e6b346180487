//! What a stage starts from and what the device must hold for it: decided from the config alone.
//!
//! Pure: it names folders and looks at none of them (whether a stage is finished is an argument).
//! Knows no step.
//!
//! Invariants:
//!   * a stage starts from `start_from`, else from the last policy stage before it, else from fresh
//!     weights
//!   * the reference of a GRPO stage is the folder that the stage started from, also after a resume

use super::contents::{Failure, FailureKind};
use crate::config::engine::Prefill;
use crate::config::fault::START_AGAIN;
use crate::config::stage::{GrpoStage, OptimizerConfig, Stage, StageKind};
use crate::config::{ModelConfig, RunConfig, model_folder};
use crate::engine::phase::{ModelSource, PrepareStage};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The folders of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    /// The run's folder.
    pub run: PathBuf,
    /// The TOML's folder.
    pub config: PathBuf,
}

impl Folders {
    /// The artefact of stage number `index`.
    pub fn artefact(&self, config: &RunConfig, index: usize) -> PathBuf {
        self.run.join("stages").join(artefact_name(config, index))
    }

    /// The artefact of the initial weights, which a GRPO stage without a predecessor refers to.
    pub fn initial(&self) -> PathBuf {
        self.run.join("stages").join(INITIAL)
    }
}

/// Name of the artefact of the initial weights.
pub const INITIAL: &str = "00-initial";

/// `NN-name`, counted from 1.
pub fn artefact_name(config: &RunConfig, index: usize) -> String {
    format!("{:02}-{}", index + 1, config.stages[index].name)
}

/// Refuses to train a stage again whose artefact is gone while checkpoints of stage number `reached` are kept: its new
/// commits would push those out.
pub fn require_artefacts(
    config: &RunConfig,
    reached: usize,
    is_done: impl Fn(usize) -> bool,
) -> Result<(), Failure> {
    let stages = config.stages.len();
    if reached >= stages {
        let text = format!(
            "the newest checkpoint is of stage number {}, and the run has {stages}; it belongs to another run: remove it, \
             or {START_AGAIN}",
            reached.saturating_add(1)
        );
        return Err(Failure::new(FailureKind::User, text));
    }
    let Some(missing) = (0..reached).find(|index| !is_done(*index)) else { return Ok(()) };
    let text = format!(
        "stages/{} is missing, and the run has checkpoints of the later stage {:?}; restore that folder from a copy, or \
         {START_AGAIN}",
        artefact_name(config, missing),
        config.stages[reached].name
    );
    Err(Failure::new(FailureKind::User, text))
}

/// Where the weights of stage number `index` come from.
pub fn source(config: &RunConfig, folders: &Folders, index: usize) -> ModelSource {
    match (config.predecessor(index), &config.stages[index].start_from) {
        (Some(before), _) => ModelSource::Folder(folders.artefact(config, before)),
        (None, Some(path)) => ModelSource::Folder(model_folder(&folders.config.join(path))),
        (None, None) => ModelSource::Fresh,
    }
}

/// What the device holds in stage number `index`, which has `steps` steps and trains `model`.
pub fn prepare_stage(
    config: &RunConfig,
    folders: &Folders,
    index: usize,
    steps: u64,
    model: &ModelConfig,
) -> PrepareStage {
    let stage = &config.stages[index];
    let mut policy = source(config, folders, index);
    let mut plan = PrepareStage {
        policy: policy.clone(),
        reference: None,
        rewards: BTreeMap::new(),
        optimizer: Some(optimizer(stage).clone()),
        steps,
        value_head: false,
        yarn: None,
        form: config.engine.attention,
        prefill: Prefill::ByCost,
        balance: stage.kind.balance(&config.model),
    };
    match &stage.kind {
        StageKind::Pretrain(_) | StageKind::Sft(_) => {}
        StageKind::LongContext(_) => {
            assert!(model.rope_scaling.is_some(), "a long-context stage has YaRN");
            plan.yarn = Some((model.rope_scaling.clone(), model.max_position_embeddings));
        }
        StageKind::RewardModel(_) => plan.value_head = true,
        StageKind::Grpo(grpo) => {
            if policy == ModelSource::Fresh {
                policy = ModelSource::Folder(folders.initial());
            }
            (plan.form, plan.prefill) = config.engine.grpo_forms();
            plan.steps = steps * grpo.updates;
            plan.reference = (grpo.kl_weight != 0.0).then(|| policy.clone());
            plan.policy = policy;
            plan.rewards = reward_models(config, folders, grpo);
        }
    }
    plan
}

fn optimizer(stage: &Stage) -> &OptimizerConfig {
    match &stage.kind {
        StageKind::Pretrain(s) => &s.optimizer,
        StageKind::LongContext(s) => &s.optimizer,
        StageKind::Sft(s) => &s.optimizer,
        StageKind::RewardModel(s) => &s.optimizer,
        StageKind::Grpo(s) => &s.optimizer,
    }
}

/// The reward models that count; one of weight zero is neither loaded nor asked.
fn reward_models(
    config: &RunConfig,
    folders: &Folders,
    grpo: &GrpoStage,
) -> BTreeMap<String, PathBuf> {
    let counted = grpo.reward.iter().filter(|entry| entry.weight != 0.0);
    counted
        .filter_map(|entry| {
            let name = entry.model.as_ref()?;
            let index = config.stages.iter().position(|stage| stage.name == *name);
            let folder = match index {
                Some(index) => folders.artefact(config, index),
                None => folders.config.join(name),
            };
            Some((name.clone(), folder))
        })
        .collect()
}
