//! How the Director readies who samples: the device that trains too, or ranks that only sample and take each version of the
//! policy from it.
//!
//! Invariant: who samples has the version that is asked for before it is asked for a token.

use super::director::Direction;
use super::messages::*;
use crate::checkpoint::Commit;
use crate::config::Dtype;
use crate::engine::hybrid::SavedState;
use crate::engine::phase::{Phase, PhaseReport, PrepareStage};

/// What the ranks that only sample have.
#[derive(Clone, Debug, Default)]
pub(super) struct Sampler {
    /// Version of the policy.
    version: u64,
    /// What it is packed as, and what they held then; `None` before the first sampling.
    ready: Option<(Dtype, PhaseReport)>,
}

impl Direction {
    /// Loads a stage's models, and what a commit has of them, wherever they are needed.
    pub(super) async fn load(
        &self,
        stage: PrepareStage,
        commit: Option<&Commit>,
    ) -> Result<(), Failure> {
        let prepare = || PrepareDevice { id: self.id(), stage: stage.clone() };
        self.ask(&self.ports.prepare_device, prepare()).await?;
        if let Some(sampler) = &self.ports.sampler {
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
        if let Some(sampler) = &self.ports.sampler {
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
    ) -> Result<PhaseReport, Failure> {
        let Some(sampler) = &self.ports.sampler else {
            return self.enter_as(Phase::Generate, sample_as).await;
        };
        let known = self.sampler.borrow().clone();
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
        if known.version != version {
            // Both sides wait for each other.
            let [give, take] = [(); 2].map(|()| HandOver { id: self.id(), version });
            let give = self.ask(&self.ports.hand_over, give);
            let (given, taken) = tokio::try_join!(give, self.ask(&sampler.hand_over, take))?;
            let seconds = given.seconds.max(taken.seconds);
            let received_bytes = taken.received_bytes;
            report.chores.switched(crate::engine::utilisation::Switched {
                received_bytes,
                seconds,
                ..given
            });
            report.seconds += seconds;
        }
        self.sampler.replace(Sampler { version, ready: Some((sample_as, report.clone())) });
        Ok(report)
    }
}
