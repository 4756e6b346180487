//! Every message between actors, declared in one list, in the order in which a run sends them.
//!
//! A request is a verb and a noun, its reply a plain value or a [`Failure`]. All of them are serde types, so that
//! they can travel to another process, and they can be cloned, so that a port sends them again to a restarted actor;
//! requests that change a device carry a [`WorkId`], which makes the second arrival harmless.
//!
//! Invariants:
//!   * no message exists outside the list (`MESSAGES` names them all, and the round-trip test walks it)
//!   * no message holds a tensor, an address or a channel

use crate::checkpoint::Commit;
use crate::config::Fault;
use crate::config::stage::{GrpoStage, RewardEntry};
use crate::console::Event;
use crate::data::example::Prompt;
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{Phase, PhaseReport, PrepareStage, ScoreJob, SequenceScore};
use crate::inference::job::{GenerateJob, GenerateReport, TokenGroup};
use crate::rl::rollout::{Group, JudgedGroup, ScoredGroup};
use crate::rl::stats::StepStatistics;
use crate::train::job::{StepReport, TrainJob};
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

        /// Makes every message and every reply out of a seed and sends each through MessagePack and back.
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

    /// Director to Pretrainer: write generated data, train or take the tokenizer, check that nothing held out is
    /// trained on. Does nothing that is done already.
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
    } -> PhaseReport;

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
    /// RolloutGenerator to Worker: sample. Each finished group comes back by itself as [`AcceptGroup`].
    Generate {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: GenerateJob,
    } -> GenerateReport;
    /// Worker to RolloutGenerator: a group whose last rollout has ended, while others are still being sampled.
    AcceptGroup {
        /// Id of the [`Generate`] that made it.
        id: WorkId,
        /// The group.
        group: TokenGroup,
    } -> ();
    /// RolloutGenerator to RewardScorer: what programs can say of a group; models' components stay open.
    JudgeGroup {
        /// The group, decoded.
        group: Group,
        /// The reward's components.
        reward: Vec<RewardEntry>,
    } -> JudgedGroup;
    /// Director to RewardScorer: models' components, rewards, advantages and the reference's log-probabilities.
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
    } -> StepReport;
    /// Pretrainer, FineTuner and PolicyUpdater to Worker: one optimizer step.
    Train {
        /// Id of the work.
        id: WorkId,
        /// The job.
        job: TrainJob,
    } -> StepReport;

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
    /// Director to Checkpointer: commit policy, optimizer and counters; drop old commits.
    CommitCheckpoint {
        /// Id of the work.
        id: WorkId,
        /// Position of the run.
        place: Place,
    } -> Commit;
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

    /// Director to RolloutGenerator, Pretrainer or FineTuner, by what is measured: one eval of the stage.
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

    /// Supervisor to Director: begin, from the newest commit. Answered at once; the end comes as [`EndRun`].
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

/// Names one piece of work on a device. The Director numbers its requests; an actor that serves one numbers the
/// device jobs that it needs for it, always in the same way, so that a repeated request repeats no job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkId {
    /// Number of the Director's request.
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

/// What [`PrepareData`] found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// Rows that the tokenizer needs of the model.
    pub vocabulary: usize,
    /// Held-out examples, and training examples that were searched for them.
    pub held_out: u64,
    /// See `held_out`.
    pub trained: u64,
}

/// A stage, once its data is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageShape {
    /// Steps of the stage.
    pub steps: u64,
}

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Index of the stage.
    pub stage: usize,
    /// Its name.
    pub name: String,
    /// Steps of the stage that are done.
    pub step: u64,
    /// True if those are all.
    pub finished: bool,
}

/// The groups of one step, with what programs said of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GeneratedGroups {
    /// In order of slot.
    pub groups: Vec<JudgedGroup>,
    /// What the sampling took.
    pub report: GenerateReport,
    /// Start and end of sampling and of judging, in seconds since the request arrived.
    pub generate: [f64; 2],
    /// See `generate`; the first group is judged while others are sampled.
    pub judge: [f64; 2],
}

/// Groups that are ready for the update, and what they say of the policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroups {
    /// In order of slot.
    pub groups: Vec<ScoredGroup>,
    /// Their statistics.
    pub statistics: StepStatistics,
}

/// One eval's result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The figure.
    pub value: f64,
    /// Examples that were measured.
    pub samples: u64,
    /// Mean new tokens of a reply, where replies are sampled.
    pub mean_tokens: Option<f64>,
    /// Replies to show.
    pub shown: Vec<Reply>,
}

/// A reply to show to a person.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The prompt's text.
    pub prompt: String,
    /// The reply's text.
    pub text: String,
    /// What was expected.
    pub answer: Option<String>,
    /// What the verifier gave.
    pub score: f64,
}

/// Mean and deviation that standardise a reward model's score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Mean.
    pub mean: f64,
    /// Deviation.
    pub deviation: f64,
}

/// Alignment steps on random tokens, to be timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bench {
    /// Weights; `None` for fresh ones.
    pub weights: Option<PathBuf>,
    /// Prompts of a step.
    pub prompts: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Timed steps.
    pub steps: u64,
}

/// Where the time of one alignment step went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BenchStep {
    /// The whole step.
    pub seconds: f64,
    /// Sampling.
    pub generate_seconds: f64,
    /// Reward models, the reference, advantages.
    pub score_seconds: f64,
    /// The update.
    pub train_seconds: f64,
    /// Tokens sampled.
    pub new_tokens: u64,
    /// Tokens that went through the model in the update.
    pub trained_tokens: u64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every stage is done and the model is exported.
    Done,
    /// The steps of a bench were timed.
    Timed(Vec<BenchStep>),
    /// A signal ended it after a commit.
    Stopped(i32),
    /// It could not go on.
    Failed(Failure),
}

/// What an actor is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActorState {
    /// Nothing to do.
    #[default]
    Idle,
    /// At work.
    Busy,
    /// Died; a new one is being made.
    Restarting,
    /// Stopped for good.
    Stopped,
}

/// An actor's answer to a status question.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// The actor's name.
    pub actor: String,
    /// What it is doing.
    pub state: ActorState,
    /// Seconds since it began to do so.
    pub since: f64,
    /// Messages in its mailbox.
    pub queued: u64,
    /// Messages it has taken.
    pub handled: u64,
    /// The last one's name.
    pub last_message: Option<String>,
    /// Times it was restarted.
    pub restarts: u64,
    /// Replies it is waiting for.
    pub waits: Vec<Wait>,
    /// Why it died or stopped last.
    pub reason: Option<String>,
    /// What it says it is doing: the Director names the device's phase.
    pub doing: Option<String>,
}

/// A reply that an actor is waiting for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wait {
    /// Who has to answer.
    pub actor: String,
    /// What was asked.
    pub message: String,
    /// Seconds since.
    pub seconds: f64,
}

/// Whose fault a failed request is, which decides how the run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The user's input.
    User,
    /// Memory, disk, budget.
    Resources,
    /// The device's thread panicked; what it held is gone, the last commit is not.
    Device,
    /// An actor did not answer, or was stopped.
    Actor,
    /// Three steps in a row had no finite loss or gradient.
    NotFinite,
    /// Anything else.
    Other,
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// Whose fault.
    pub kind: FailureKind,
    /// What, where, and what to do.
    pub text: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Failure {
        Failure { kind, text: text.into() }
    }

    /// The error that the command line turns into an exit code.
    pub fn into_error(self) -> anyhow::Error {
        match self.kind {
            FailureKind::User => Fault::user(self.text),
            FailureKind::Resources => Fault::resources(self.text),
            _ => anyhow::Error::msg(self.text),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        let text = format!("{error:#}");
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return Failure { text, ..failure.clone() };
        }
        let disk_is_full = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|io| {
                matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            })
        };
        let kind = match error.downcast_ref::<Fault>() {
            Some(Fault::User(_)) => FailureKind::User,
            Some(Fault::Resources(_)) => FailureKind::Resources,
            _ if error.chain().any(disk_is_full) => FailureKind::Resources,
            _ => FailureKind::Other,
        };
        Failure { kind, text }
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
    fn a_full_disk_deep_in_an_error_is_a_lack_of_resources() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let failure = Failure::from(anyhow::Error::new(full).context("failed to write x"));
        assert_eq!(failure.kind, FailureKind::Resources);
        assert!(failure.text.starts_with("failed to write x"), "{}", failure.text);
    }
}
