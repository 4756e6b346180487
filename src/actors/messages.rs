//! Every message between actors, declared in one list, in the order in which a run sends them.
//!
//! A request is a verb and a noun, its reply a plain value or a [`Failure`]. All of them are serde
//! types, so that they can travel to another process, and they can be cloned, so that a port sends
//! them again to a restarted actor; requests that change a device carry a [`WorkId`], which makes
//! the second arrival harmless.
//!
//! Invariants:
//!   * no message exists outside the list (`MESSAGES` names them all, and the round-trip test walks
//!     it)
//!   * no message holds a tensor, an address or a channel

pub use super::contents::*;
use super::crew::{Job, Yield};
use crate::checkpoint::Commit;
use crate::config::Dtype;
use crate::config::stage::{GrpoStage, RewardEntry};
use crate::console::Event;
use crate::data::example::Prompt;
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{GenerateJob, TokenGroup};
use crate::engine::phase::{Phase, PhaseReport, PrepareStage, ScoreJob, SequenceScore};
use crate::engine::phase::{StepReport, TrainJob};
use crate::engine::utilisation::Switched;
use crate::rl::rollout::{Group, JudgedGroup, ScoredGroup};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A message's name, for waits, pulses and failures.
pub trait Named {
    /// The type's name.
    const NAME: &'static str;
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? } -> $reply:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

            impl actix::Message for $name {
                type Result = Result<$reply, Failure>;
            }

            impl Named for $name {
                const NAME: &'static str = stringify!($name);
            }
        )*

        /// The names of all messages, in the order of the list.
        pub const MESSAGES: &[&str] = &[$(stringify!($name)),*];

        /// Makes every message and every reply out of a seed and sends each through MessagePack and
        /// back.
        #[cfg(test)]
        fn round_trip_all(seed: u64) {
            $(
                tests::round_trip::<$name>(stringify!($name), seed);
                tests::round_trip::<Result<$reply, Failure>>(concat!("reply to ", stringify!($name)), seed);
            )*
        }
    };
}

messages! {
    // Readying a run.

    /// Director to Pretrainer: write generated data, train or take the tokenizer, check that
    /// nothing held out is trained on. Does nothing that is done already.
    PrepareData {} -> DataReport;
    /// Director to Pretrainer, FineTuner or RolloutGenerator, by the stage's kind: open its data.
    OpenStage {
        /// Index of the stage in the run.
        stage: usize,
    } -> StageShape;
    /// Director to Checkpointer: the newest commit that is whole.
    FindCommit {} -> Option<Commit>;
    /// Director to Worker: load the models of a stage.
    PrepareDevice {
        /// Id of the work.
        id: WorkId,
        /// What to load.
        stage: PrepareStage,
    } -> ();
    /// Director to Worker: bring policy and optimizer back from a commit.
    Restore {
        /// Id of the work.
        id: WorkId,
        /// The commit's folder.
        folder: PathBuf,
        /// Its counters.
        state: SavedState,
    } -> ();
    /// Director to Worker: change what is resident.
    EnterPhase {
        /// Id of the work.
        id: WorkId,
        /// The phase.
        phase: Phase,
        /// What the policy is packed as where the phase is Generate.
        sample_as: Dtype,
    } -> PhaseReport;

    /// Director to the Workers of trainers and of samplers at once: those give these the policy of this version.
    HandOver {
        /// Id of the work.
        id: WorkId,
        /// The version.
        version: u64,
    } -> Switched;

    // A step of pretraining, SFT or reward-model fitting.

    /// Director to Pretrainer or FineTuner: one optimizer step on the step's batch.
    TrainStep {
        /// Id of the work.
        id: WorkId,
        /// Index of the stage.
        stage: usize,
        /// Step within the stage, from 0.
        step: u64,
    } -> StepReport;

    // A step of alignment.

    /// Director to RolloutGenerator: sample the step's groups and have them judged.
    GenerateGroups {
        /// Id of the work.
        id: WorkId,
        /// Index of the stage.
        stage: usize,
        /// Step within the stage, from 0.
        step: u64,
        /// The stage's settings.
        settings: GrpoStage,
        /// The prompts; `None` for the step's own of the stage's set.
        prompts: Option<Vec<Prompt>>,
        /// Version of the policy that must sample.
        policy_version: u64,
    } -> GeneratedGroups;
    /// RolloutGenerator to Worker: sample. Each finished group comes back by itself as
    /// [`AcceptGroup`].
    Generate {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: GenerateJob,
    } -> Generated;
    /// Worker to RolloutGenerator: a group whose last rollout has ended, while others are still
    /// being sampled.
    AcceptGroup {
        /// Id of the [`Generate`] that made it.
        id: WorkId,
        /// The group.
        group: TokenGroup,
    } -> ();
    /// RolloutGenerator to RewardScorer: what programs can say of a group; models' components stay
    /// open.
    JudgeGroup {
        /// The group, decoded.
        group: Group,
        /// The reward's components.
        reward: Vec<RewardEntry>,
    } -> JudgedGroup;
    /// Director to RewardScorer: models' components, rewards, advantages and the reference's
    /// log-probabilities.
    ScoreGroups {
        /// Id of the work.
        id: WorkId,
        /// Judged groups, in order of slot.
        groups: Vec<JudgedGroup>,
        /// The stage's settings.
        settings: GrpoStage,
    } -> ScoredGroups;
    /// RewardScorer and the actors that measure, to Worker: forward passes.
    Score {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: ScoreJob,
    } -> Vec<SequenceScore>;
    /// Director to PolicyUpdater: the update (or updates) of one batch of rollouts.
    UpdatePolicy {
        /// Id of the work.
        id: WorkId,
        /// Scored groups, in order of slot.
        groups: Vec<ScoredGroup>,
        /// The stage's settings.
        settings: GrpoStage,
    } -> PolicyUpdate;
    /// Pretrainer, FineTuner and PolicyUpdater to Worker: one optimizer step.
    Train {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: TrainJob,
    } -> StepReport;

    // Between processes.

    /// Worker to Courier, and in another process Deputy to Worker: do the same there.
    Carry {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: Job,
    } -> Yield;

    // After a step.

    /// Anyone to Monitor: one line of the journal. Acknowledged when it is written.
    Record {
        /// The event.
        event: Event,
    } -> ();
    /// Director to Monitor: the rollouts of a step, before its journal line.
    RecordRollouts {
        /// Name of the stage.
        stage: String,
        /// Step within the stage.
        step: u64,
        /// What was sampled and what it earned.
        groups: Vec<ScoredGroup>,
    } -> ();
    /// Director to Monitor: bring the journal to the disk, before a commit that relies on its steps.
    SyncJournal {} -> ();
    /// Director to Checkpointer: commit policy, optimizer and counters; drop old commits.
    CommitCheckpoint {
        /// Id of the work.
        id: WorkId,
        /// Position of the run.
        place: Place,
        /// What was sampled for the next step already.
        ahead: Option<Box<SampledBatch>>,
    } -> Commit;
    /// Director to Checkpointer: what had been sampled ahead when a commit was made.
    FindAhead {
        /// The commit's folder.
        folder: PathBuf,
    } -> Option<Box<SampledBatch>>;
    /// Checkpointer to Worker: write the policy into a folder.
    Save {
        /// Id of the work.
        id: WorkId,
        /// The folder; it exists.
        folder: PathBuf,
        /// Moments too.
        with_optimizer: bool,
    } -> SavedState;

    // Measurements and the end of a stage.

    /// Director to RolloutGenerator, Pretrainer or FineTuner, by what is measured: one eval of the
    /// stage.
    Measure {
        /// Id of the work.
        id: WorkId,
        /// Index of the stage.
        stage: usize,
        /// Index of the eval in the stage.
        eval: usize,
        /// Version of the policy that is loaded.
        policy_version: u64,
    } -> Measurement;
    /// Director to FineTuner: mean and deviation of the fitted reward model's scores.
    FitScale {
        /// Id of the work.
        id: WorkId,
        /// Index of the stage.
        stage: usize,
    } -> Scale;
    /// Director to Worker: keep the scale with the reward model.
    Calibrate {
        /// Id of the work.
        id: WorkId,
        /// The scale.
        scale: Scale,
    } -> ();
    /// Director to Checkpointer: save the policy as a finished stage's artefact, `stages/NAME`.
    KeepArtefact {
        /// Id of the work.
        id: WorkId,
        /// The artefact's name.
        name: String,
        /// Position of the run.
        place: Place,
    } -> PathBuf;
    /// Director to Checkpointer: write `export/` from a stage's artefact.
    ExportModel {
        /// The artefact's folder.
        from: PathBuf,
    } -> PathBuf;

    // Around the run.

    /// Supervisor to Director: begin, from the newest commit. Answered at once; the end comes as
    /// [`EndRun`].
    BeginRun {
        /// Steps on random tokens instead of the run's stages.
        bench: Option<Bench>,
    } -> ();
    /// Director to Supervisor: the run is over.
    EndRun {
        /// How.
        outcome: Outcome,
    } -> ();
    /// Anyone to anyone: alive, busy since, or waiting for whom.
    AskStatus {} -> Pulse;
    /// Anyone to Supervisor: stop one actor; whoever needs its work is told its name.
    StopActor {
        /// The actor's name.
        name: String,
    } -> ();
    /// Supervisor to an actor: stop now.
    Halt {} -> ();
}

/// Names one piece of work on a device, and whose it is. The Director numbers its requests; an
/// actor that serves one numbers the device jobs that it needs for it, always in the same way, so
/// that a repeated request repeats no job. A device that has seen a later Director's work refuses
/// that of the ones before it, whoever brings it and however late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkId {
    /// Which Director in turn wants it, counting from 1.
    pub director: u64,
    /// Number of that Director's request.
    pub number: u64,
    /// Number of the job within it; 0 is the request itself.
    pub part: u32,
}

impl WorkId {
    /// Job `part` of this request.
    pub fn part(self, part: u32) -> WorkId {
        WorkId { part, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::super::arbitrary;
    use super::*;
    use proptest::prelude::*;
    use serde::de::DeserializeOwned;

    pub fn round_trip<T>(name: &str, seed: u64)
    where
        T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        let sent: T = arbitrary::from_seed(seed);
        let frame = rmp_serde::to_vec_named(&sent).unwrap_or_else(|e| panic!("{name}: {e}"));
        let received: T = rmp_serde::from_slice(&frame).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(received, sent, "{name} changed on the way");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn every_message_and_reply_survives_the_wire(seed in any::<u64>()) {
            round_trip_all(seed);
        }
    }

    #[test]
    fn no_message_stands_in_the_list_twice() {
        let names: std::collections::BTreeSet<_> = MESSAGES.iter().collect();
        assert_eq!(names.len(), MESSAGES.len());
    }
    #[test]
    fn nothing_that_travels_leaves_a_field_behind() {
        // A skipped field is invisible to serde, and with it to the round trip above.
        let sources = [
            include_str!("messages.rs"),
            include_str!("contents.rs"),
            include_str!("crew.rs"),
            include_str!("mail.rs"),
            include_str!("../data/example.rs"),
            include_str!("../rl/rollout.rs"),
            include_str!("../rl/stats.rs"),
            include_str!("../rl/grpo.rs"),
            include_str!("../inference/job.rs"),
            include_str!("../train/job.rs"),
            include_str!("../engine/phase.rs"),
        ];
        let skip = concat!("serde(", "skip");
        assert!(sources.iter().all(|source| !source.contains(skip)), "a field is not sent");
    }
}
