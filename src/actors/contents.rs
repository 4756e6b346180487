//! What messages carry and what is answered: plain serde values, and the [`Failure`] of a request.
//!
//! Beside `messages`, which lists who says what to whom. Knows no actor; a failure's kind decides
//! how the run goes on and with which exit code it ends.

use crate::cluster::Broken;
use crate::config::{ConfigError, Dtype, Fault};
use crate::engine::phase::{GenerateReport, Importance, StepReport};
use crate::rl::rollout::{JudgedGroup, ScoredGroup};
use crate::rl::stats::StepStatistics;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::PathBuf;

/// What [`PrepareData`](super::messages::PrepareData) found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    /// Rows that the tokenizer needs of the model.
    pub vocabulary: usize,
    /// What the audits found, a sentence each.
    pub notes: Vec<String>,
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

/// What a [`Generate`](super::messages::Generate) took, its groups apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    /// The device's own figures.
    pub report: GenerateReport,
    /// When the device began and ended, in seconds since 1970.
    pub span: [f64; 2],
}

/// The groups of one step, with what programs said of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GeneratedGroups {
    /// In order of slot.
    pub groups: Vec<JudgedGroup>,
    /// What the sampling took.
    pub report: GenerateReport,
    /// Start and end of sampling and of judging, in seconds since 1970.
    pub generate: [f64; 2],
    /// See `generate`; the first group is judged while others are sampled.
    pub judge: [f64; 2],
}

/// A batch of rollouts, and what sampled it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampledBatch {
    /// The step that it is for, within its stage, from 0.
    pub step: u64,
    /// Version of the policy that sampled it.
    pub policy_version: u64,
    /// What the sampler's weights were.
    pub sampled_as: Dtype,
    /// The groups, judged.
    pub generated: GeneratedGroups,
    /// How far the sampler was from the trainer's numbers of that version; `None` where training finds out.
    #[serde(default)]
    pub compared: Option<Compared>,
}

/// Log-probabilities of a batch, computed again as a trainer would by the version that sampled it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Largest distance of a token's two log-probabilities; not a number if one of them is none.
    pub gap_max: f64,
    /// The mean distance.
    pub gap_mean: f64,
    /// Start and end, changes of phase included, in seconds since 1970.
    pub at: [f64; 2],
}

/// Groups that are ready for the update, and what they say of the policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroups {
    /// In order of slot.
    pub groups: Vec<ScoredGroup>,
    /// Their statistics.
    pub statistics: StepStatistics,
}

/// What the updates on one batch of rollouts did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyUpdate {
    /// All of them as one step; `skipped` only if none of them changed a weight.
    pub report: StepReport,
    /// How many there were.
    pub updates: u64,
    /// How many of them were skipped for want of a finite loss or gradient.
    pub skipped_updates: u64,
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
    /// Groups whose rewards are all equal.
    pub equal_rewards: usize,
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
    /// Tokens of the rollouts in the update, each with its prompt.
    pub trained_tokens: u64,
    /// The share of the rollouts that were trained on.
    pub trained_share: f64,
    /// Largest gap between sampler and trainer.
    pub logprob_gap_max: f64,
    /// FLOPs that the step was for, as its RFU counts them.
    pub useful_flops: f64,
    /// What the sampler's weights were.
    pub rollout_dtype: Dtype,
    /// KL(sampler || trainer), nats a token.
    pub sampler_kl: f64,
    /// Importance weights, where rollouts have them.
    pub importance: Option<Importance>,
    /// Pages that the process touched for the first time.
    pub page_faults: u64,
    /// Allocations of its heap.
    pub heap_allocations: u64,
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
    /// The work was wanted by a Director that has died since.
    Stale,
    /// Three steps in a row had no finite loss or gradient.
    NotFinite,
    /// Sampler and trainer disagree, and `engine.exact` promises that they do not.
    Inexact,
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

impl From<Broken> for Failure {
    fn from(why: Broken) -> Failure {
        let kind = match &why {
            Broken::Failed { code: 2, .. } => FailureKind::User,
            Broken::Failed { code: 4, .. } => FailureKind::Resources,
            _ => FailureKind::Other,
        };
        Failure::new(kind, why.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        let text = format!("{error:#}");
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return Failure { kind: failure.kind, text };
        }
        let kind = error.chain().find_map(kind_of).unwrap_or(FailureKind::Other);
        Failure { kind, text }
    }
}

/// What one error of a chain says of the whole.
fn kind_of(cause: &(dyn std::error::Error + 'static)) -> Option<FailureKind> {
    if let Some(fault) = cause.downcast_ref::<Fault>() {
        return match fault {
            Fault::User(_) => Some(FailureKind::User),
            Fault::Resources(_) => Some(FailureKind::Resources),
            Fault::Stopped(_) => None,
        };
    }
    if cause.is::<ConfigError>() {
        return Some(FailureKind::User);
    }
    let kind = cause.downcast_ref::<std::io::Error>()?.kind();
    matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::OutOfMemory)
        .then_some(FailureKind::Resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_deep_in_an_error_is_a_lack_of_resources() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let failure = Failure::from(anyhow::Error::new(full).context("failed to write x"));
        assert_eq!(failure.kind, FailureKind::Resources);
        assert!(failure.text.starts_with("failed to write x"), "{}", failure.text);
    }
    #[test]
    fn a_fault_keeps_its_kind_on_its_way_through_the_actors() {
        let failure = Failure::from(Fault::user("no such file").context("failed to open the data"));
        assert_eq!(
            (failure.kind, failure.text.as_str()),
            (FailureKind::User, "failed to open the data: no such file")
        );
        let error = failure.into_error();
        assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{error:#}");
        assert!(
            Failure::new(FailureKind::Other, "x").into_error().downcast_ref::<Fault>().is_none()
        );
    }
}
