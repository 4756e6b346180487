//! Whom the Director asks, and for what.

use super::messages::*;
use super::port::Port;

/// Whom the Director asks.
#[derive(Clone)]
pub struct DirectorPorts {
    /// Readies the data.
    pub prepare_data: Port<PrepareData>,
    /// Leads pretraining.
    pub pretrainer: TrainerPorts,
    /// Leads SFT and reward models.
    pub fine_tuner: TrainerPorts,
    /// Opens a GRPO stage's prompts.
    pub open_prompts: Port<OpenStage>,
    /// Samples.
    pub generate: Port<GenerateGroups>,
    /// Measures replies.
    pub measure_replies: Port<Measure>,
    /// Scores.
    pub score: Port<ScoreGroups>,
    /// Updates.
    pub update: Port<UpdatePolicy>,
    /// Fits a reward model's scale.
    pub fit_scale: Port<FitScale>,
    /// The device.
    pub prepare_device: Port<PrepareDevice>,
    /// The device.
    pub restore: Port<Restore>,
    /// The device.
    pub enter_phase: Port<EnterPhase>,
    /// The device.
    pub score_sequences: Port<Score>,
    /// The device.
    pub calibrate: Port<Calibrate>,
    /// The device, beside those that only sample.
    pub hand_over: Port<HandOver>,
    /// Those that only sample, if there are any.
    pub sampler: Option<SamplerPorts>,
    /// Finds a commit.
    pub find_commit: Port<FindCommit>,
    /// Finds what was sampled ahead of a commit.
    pub find_ahead: Port<FindAhead>,
    /// Commits.
    pub commit: Port<CommitCheckpoint>,
    /// Keeps a stage's model.
    pub keep: Port<KeepArtefact>,
    /// Exports.
    pub export: Port<ExportModel>,
    /// The journal.
    pub record: Port<Record>,
    /// The rollouts' file.
    pub record_rollouts: Port<RecordRollouts>,
    /// The journal, brought to the disk.
    pub sync_journal: Port<SyncJournal>,
    /// The supervisor.
    pub end: Port<EndRun>,
}

/// The ports of those that only sample.
#[derive(Clone)]
pub struct SamplerPorts {
    /// Loads a stage's policy.
    pub prepare: Port<PrepareDevice>,
    /// Brings it back.
    pub restore: Port<Restore>,
    /// Readies it.
    pub enter_phase: Port<EnterPhase>,
    /// Has it score what it has sampled.
    pub score: Port<Score>,
    /// Takes another version.
    pub hand_over: Port<HandOver>,
}

/// The ports of an actor that leads training on given examples.
#[derive(Clone)]
pub struct TrainerPorts {
    /// Opens a stage's data.
    pub open: Port<OpenStage>,
    /// Takes a step.
    pub step: Port<TrainStep>,
    /// Measures.
    pub measure: Port<Measure>,
}
