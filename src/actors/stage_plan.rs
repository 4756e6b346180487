//! What a stage starts from and what the device must hold for it: decided from the config alone.
//!
//! Pure: it names folders and looks at none of them (whether a stage is finished is an argument).
//! Knows no step.
//!
//! Invariants:
//!   * a stage starts from `start_from`, else from the last policy stage before it, else from fresh
//!     weights
//!   * the reference of a GRPO stage is the folder that the stage started from, also after a resume

use crate::config::engine::AttentionForm;
use crate::config::stage::{GrpoStage, LongContextStage, OptimizerConfig, Stage, StageKind};
use crate::config::{RopeScaling, RunConfig};
use crate::engine::phase::{ModelSource, PrepareStage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

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

/// The stage whose result stage number `index` starts from, if it is one of the run's.
pub fn predecessor(config: &RunConfig, index: usize) -> Option<usize> {
    match &config.stages[index].start_from {
        Some(name) => config.stages[..index].iter().position(|stage| stage.name == *name),
        None => config.stages[..index].iter().rposition(|stage| stage.kind.makes_policy()),
    }
}

/// Where the weights of stage number `index` come from.
pub fn source(config: &RunConfig, folders: &Folders, index: usize) -> ModelSource {
    match (predecessor(config, index), &config.stages[index].start_from) {
        (Some(before), _) => ModelSource::Folder(folders.artefact(config, before)),
        (None, Some(path)) => ModelSource::Folder(model_folder(&folders.config.join(path))),
        (None, None) => ModelSource::Fresh,
    }
}

/// The model in a folder that a person names: a run's export, or the folder itself.
fn model_folder(folder: &Path) -> PathBuf {
    let export = folder.join("export");
    if folder.join("journal.jsonl").exists() && export.exists() {
        export
    } else {
        folder.to_path_buf()
    }
}

/// What the device holds in stage number `index`, which has `steps` steps.
pub fn prepare_stage(
    config: &RunConfig,
    folders: &Folders,
    index: usize,
    steps: u64,
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
        balance: config.model.aux_loss_alpha,
    };
    match &stage.kind {
        StageKind::Pretrain(_) | StageKind::Sft(_) => {}
        StageKind::LongContext(long) => plan.yarn = Some(yarn(config, index, long)),
        StageKind::RewardModel(_) => (plan.value_head, plan.balance) = (true, 0.0),
        StageKind::Grpo(grpo) => {
            if policy == ModelSource::Fresh {
                policy = ModelSource::Folder(folders.initial());
            }
            // The sampler decodes in the absorbed form: with the same one its log-probabilities are the trainer's.
            (plan.form, plan.balance) = (AttentionForm::Absorbed, 0.0);
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

fn yarn(config: &RunConfig, index: usize, long: &LongContextStage) -> (RopeScaling, usize) {
    let original = predecessor(config, index)
        .map_or(config.model.max_position_embeddings, |i| context_of(config, i));
    let scaling = RopeScaling {
        kind: "yarn".to_string(),
        factor: long.factor,
        original_max_position_embeddings: original,
        beta_fast: long.beta_fast,
        beta_slow: long.beta_slow,
        mscale: long.mscale,
        mscale_all_dim: long.mscale,
    };
    (scaling, lengthened(original, long))
}

fn lengthened(original: usize, long: &LongContextStage) -> usize {
    (original as f64 * long.factor).round() as usize
}

/// Longest sequence of the model in stage number `index`.
pub fn context_of(config: &RunConfig, index: usize) -> usize {
    let Some(stage) = config.stages.get(index) else { return config.model.max_position_embeddings };
    let before = predecessor(config, index)
        .map_or(config.model.max_position_embeddings, |i| context_of(config, i));
    match &stage.kind {
        StageKind::LongContext(long) => lengthened(before, long),
        _ => before,
    }
}
