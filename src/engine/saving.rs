//! Saving and restoring: the policy and its moments in a checkpoint's folder, of one rank or of many.
//!
//! Invariants:
//!   * all ranks of a team save together, and restore together: all succeed, or all fail with the same words
//!   * a save that succeeded is on the disk as a whole, but for the manifest

use super::hybrid::{HybridEngine, SavedState};
use super::phase::{ModelSource, Phase, PrepareStage};
use super::policy_files::{Moments, Written, join_shards, read_policy, world, write_policy};
use super::resident::write_calibration;
use crate::checkpoint::{TensorFolder, write_model_config};
use crate::cluster::Group;
use crate::config::fault::Fault;
use crate::model::{Layout, Params};
use anyhow::{Context, Result, bail, ensure};
use rehearsal_kernels::Activity;
use std::path::{Path, PathBuf};

impl HybridEngine {
    /// Writes the policy (and its moments) into an existing folder. All ranks that train do so at the same time.
    pub fn save(&mut self, folder: &Path, with_optimizer: bool) -> Result<SavedState> {
        let _during = Activity::Load.begin(&self.kernels);
        let written = self.write_own(folder, with_optimizer);
        match self.world() {
            Some((world, whole)) => join_shards(&world, &whole, written, folder),
            None => written.map(|written| written.saved),
        }
    }

    /// Brings policy and optimizer back from a committed checkpoint, after `prepare`, whatever ranks wrote it. All ranks
    /// that train do so at the same time, and so do those that only sample.
    pub fn restore(&mut self, folder: &Path, saved: &SavedState) -> Result<()> {
        let entered = self.enter_phase(Phase::Idle);
        let _during = Activity::Load.begin(&self.kernels);
        let (place, ranks) = (self.setup.team.place(), self.setup.team.peers().len());
        let checked = entered.and_then(|_| TensorFolder::check_share(folder, place, ranks));
        self.agree("check of a checkpoint", checked)?;
        let read = self.read_own(folder, saved);
        self.agree("restored parts", read)
    }

    /// Compares the folders that a stage loads with their manifests. Ranks that do the same read a share each, once.
    pub(super) fn compare_sources(&self, stage: &PrepareStage) -> Result<()> {
        let mut folders = Vec::new();
        // Who only samples has no other model.
        let reference = stage.reference.iter().filter(|_| !self.setup.team.is_sampler());
        for source in std::iter::once(&stage.policy).chain(reference) {
            if let ModelSource::Folder(folder) = source {
                folders.push(folder);
            }
        }
        let rewards = stage.rewards.iter().filter(|_| !self.setup.team.is_sampler());
        folders.extend(rewards.map(|(_, folder)| folder));
        folders.sort();
        folders.dedup();
        if folders.is_empty() {
            return Ok(());
        }
        let (place, ranks) = (self.setup.team.place(), self.setup.team.peers().len());
        let check = |folder: &&PathBuf| TensorFolder::check_share(folder, place, ranks);
        let checked = folders.iter().try_for_each(check);
        self.world.agree("check of what a stage starts from", checked.map(|()| Vec::new()))?;
        Ok(())
    }

    /// The ranks that do the same as this one, and the policy's whole layout; `None` for a rank alone, or before anything is loaded on all of them.
    fn world(&self) -> Option<(Group, Layout)> {
        let policy = self.policy.as_ref().filter(|_| !self.setup.team.is_alone())?;
        let whole = Layout::new(&policy.model.config, policy.model.layout.has_value_head);
        Some((world(&self.setup.team, &whole), whole))
    }

    fn agree(&self, name: &str, own: Result<()>) -> Result<()> {
        match self.world() {
            Some((world, _)) => world.agree(name, own.map(|()| Vec::new())).map(drop),
            None => own,
        }
    }

    /// Writes what is this rank's to write.
    fn write_own(&mut self, folder: &Path, with_optimizer: bool) -> Result<Written> {
        // A scored policy lends its weights to the scoring.
        self.unload_scored()?;
        let (kernels, team) = (self.kernels.as_ref(), &self.setup.team);
        ensure!(!team.is_sampler(), "rank {} only samples: others save the policy", team.rank());
        let Some(policy) = self.policy.as_mut() else {
            bail!("no model is loaded that could be saved")
        };
        if !folder.is_dir() {
            return Err(Fault::user(format!(
                "{}: is not there; put the run's folder (--out) on a disk that all ranks share",
                folder.display()
            )));
        }
        let (config, layout) = (&policy.model.config, &policy.model.layout);
        if team.rank() == 0 {
            write_model_config(folder, config)?;
            if layout.has_value_head {
                write_calibration(folder, policy.calibration)?;
            }
        }
        let mut optimizer = self.optimizer.as_mut().filter(|_| with_optimizer);
        let optimizer_step = optimizer.as_ref().map_or(0, |state| state.step);
        let saved = SavedState { policy_version: self.policy_version, optimizer_step };
        let (slab, _) = policy.weights.take(kernels.arena())?;
        let params = Params { layout: layout.clone(), slab };
        let mut taken = None;
        if let Some(state) = &mut optimizer {
            let (first, second) =
                (state.first.take(kernels.arena())?.0, state.second.take(kernels.arena())?.0);
            taken = Some((first, second));
        }
        let moments = optimizer
            .as_ref()
            .zip(taken.as_ref())
            .map(|(state, (first, second))| Moments { own: &state.ranks.zero.own, first, second });
        let written = write_policy(kernels, team, config, &params, moments, saved, folder);
        if let Some((state, (first, second))) = optimizer.zip(taken) {
            state.first.put(first);
            state.second.put(second);
        }
        policy.weights.put(params.slab);
        // The moments were brought in to be written; a phase without them must hold none again.
        self.park()?;
        written
    }

    /// Reads what this rank holds and answers for.
    fn read_own(&mut self, folder: &Path, saved: &SavedState) -> Result<()> {
        let kernels = self.kernels.as_ref();
        let policy = self.policy.as_mut().context("restore comes after prepare")?;
        let mut params = policy.take_to_change(kernels)?;
        let read = match &mut self.optimizer {
            None => read_policy(kernels, &mut params, None, folder),
            Some(state) => state.change(kernels.arena(), |moments| {
                read_policy(kernels, &mut params, Some(moments), folder)
            }),
        };
        // Also where reading failed: the slabs are the engine's.
        policy.weights.put_changed(params.slab);
        read?;
        if let Some(state) = &mut self.optimizer {
            state.step = saved.optimizer_step;
        }
        self.policy_version = saved.policy_version;
        Ok(())
    }
}
