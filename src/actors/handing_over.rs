//! How the Director readies who samples: the device that trains too, or ranks that only sample and take each version of the
//! policy from it.
//!
//! Invariant: who samples has the version that is asked for before it is asked for a token.

use super::director::Direction;
use super::messages::*;
use super::post::seconds_now;
use super::reader::{Measured, measured};
use crate::checkpoint::Commit;
use crate::config::stage::StageKind;
use crate::config::{Dtype, Stage};
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{Phase, PhaseReport, PrepareStage};
use crate::engine::utilisation::Switched;

/// What the ranks that only sample have.
#[derive(Clone, Debug, Default)]
pub(super) struct Sampler {
    /// Version of the policy.
    version: u64,
    /// What it is packed as, and what they held then; `None` before the first sampling.
    ready: Option<(Dtype, PhaseReport)>,
}

impl Sampler {
    /// They are needed for something else than sampling, and have to be readied again.
    pub(super) fn leave(&mut self) {
        self.ready = None;
    }
}

/// Who samples is ready to.
pub(super) struct Ready {
    /// What it took.
    pub(super) report: PhaseReport,
    /// When the policy was handed over, in seconds since 1970, if it was.
    pub(super) handed_over: Option<[f64; 2]>,
}

impl Direction {
    /// Loads a stage's models, and what a commit has of them, wherever they are needed.
    pub(super) async fn load(
        &self,
        stage: &Stage,
        plan: PrepareStage,
        commit: Option<&Commit>,
    ) -> Result<(), Failure> {
        let prepare = || PrepareDevice { id: self.id(), stage: plan.clone() };
        self.ask(&self.ports.prepare_device, prepare()).await?;
        let sampler = self.ports.sampler.as_ref().filter(|_| samples(stage));
        if let Some(sampler) = sampler {
            self.ask(&sampler.prepare, prepare()).await?;
        }
        self.sampler.replace(Sampler::default());
        let Some(Commit { folder, manifest }) = commit else { return Ok(()) };
        let state = SavedState {
            policy_version: manifest.policy_version,
            optimizer_step: manifest.optimizer_step,
        };
        let restore = || Restore { id: self.id(), folder: folder.clone(), state };
        self.ask(&self.ports.restore, restore()).await?;
        if let Some(sampler) = sampler {
            self.ask(&sampler.restore, restore()).await?;
        }
        self.sampler.borrow_mut().version = manifest.policy_version;
        Ok(())
    }

    /// Readies who samples: in Generate, with the policy of this version packed as `sample_as`.
    pub(super) async fn ready_to_sample(
        &self,
        version: u64,
        sample_as: Dtype,
    ) -> Result<Ready, Failure> {
        let Some(sampler) = &self.ports.sampler else {
            let report = self.enter_as(Phase::Generate, sample_as).await?;
            return Ok(Ready { report, handed_over: None });
        };
        let known = self.sampler.borrow().clone();
        let (mut switched, mut handed_over) = (Switched::default(), None);
        if known.version != version {
            // Both sides wait for each other.
            let [give, take] = [(); 2].map(|()| HandOver { id: self.id(), version });
            let (give, began) = (self.ask(&self.ports.hand_over, give), seconds_now());
            let (given, taken) = tokio::try_join!(give, self.ask(&sampler.hand_over, take))?;
            handed_over = Some([began, seconds_now()]);
            switched = Switched {
                received_bytes: taken.received_bytes,
                seconds: given.seconds.max(taken.seconds),
                cpu_seconds: given.cpu_seconds + taken.cpu_seconds,
                ..given
            };
        }
        // Who samples already packs a new version where it gets it; who does not packs that version alone.
        let mut report = match known.ready {
            Some((packed, report)) if packed == sample_as => {
                let PhaseReport { held, high_water, sampled_as, .. } = report;
                PhaseReport { held, high_water, sampled_as, ..PhaseReport::default() }
            }
            _ => {
                let phase = Phase::Generate;
                let request = EnterPhase { id: self.id(), phase, sample_as };
                self.ask(&sampler.enter_phase, request).await?
            }
        };
        report.chores.switched(switched);
        report.seconds += switched.seconds;
        self.sampler.replace(Sampler { version, ready: Some((sample_as, report.clone())) });
        Ok(Ready { report, handed_over })
    }
}

/// Whether anything is sampled in a stage.
fn samples(stage: &Stage) -> bool {
    matches!(stage.kind, StageKind::Grpo(_))
        || stage.eval.iter().any(|eval| matches!(measured(eval), Ok(Measured::Replies)))
}
