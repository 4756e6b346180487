//! What a change of phase moves and packs: models and moments to their files and back, weights for their next use.
//!
//! Every second of it is counted among the engine's chores, as packing or as moving.

use super::hybrid::{HybridEngine, Working};
use super::phase::{Phase, Role};
use super::resident::out_of_memory;
use crate::config::Offload;
use crate::config::engine::AttentionForm;
use crate::model::{Gradients, PackFor};
use anyhow::Result;
use rehearsal_kernels::WeightFormat;
use std::time::Instant;

impl HybridEngine {
    /// Drops the phase's memory.
    pub(super) fn leave(&mut self) -> Result<()> {
        self.unload_scored()?;
        self.conductor.end();
        self.working = Working::default();
        Ok(())
    }

    /// Moves off the device what a list of `engine.offload` wants off it and no phase is using. Without a list the conductor
    /// moves what a plan wants moved.
    pub(super) fn park(&mut self) -> Result<()> {
        let Some(listed) = &self.setup.engine.offload else { return Ok(()) };
        for (role, model) in &mut self.others {
            let kind =
                if *role == Role::Reference { Offload::Reference } else { Offload::RewardModels };
            if listed.contains(&kind) {
                model.weights.release()?;
            }
        }
        if self.phase != Phase::Train
            && listed.contains(&Offload::Optimizer)
            && let Some(state) = &mut self.optimizer
        {
            state.first.release()?;
            state.second.release()?;
        }
        Ok(())
    }

    /// Whether phases give the memory that they used back to the system, to make room for what moves.
    pub(super) fn gives_back(&self) -> bool {
        match &self.setup.engine.offload {
            Some(listed) => !listed.is_empty(),
            None => self.conductor.moves(),
        }
    }

    /// Adds to the chores what was waited for since this was called last, and tells the bytes moved since: out, and in.
    pub(super) fn settle(&mut self) -> [u64; 2] {
        let (waited, [read, written]) = self.conductor.transfers.record.totals();
        let (waited_before, [read_before, written_before]) = self.settled;
        self.chores.offload_seconds += waited - waited_before;
        self.settled = (waited, [read, written]);
        [written - written_before, read - read_before]
    }

    /// Puts back the model that was scored last.
    pub(super) fn unload_scored(&mut self) -> Result<()> {
        let Some((role, params, packed)) = self.working.scored.take() else { return Ok(()) };
        drop(packed);
        let resident =
            if role == Role::Policy { self.policy.as_mut() } else { self.others.get_mut(&role) };
        // What a switch made is not what the policy is kept as.
        if role != Role::Policy || self.switch.is_none() {
            resident.expect("a scored model is held").weights.put(params.slab);
        }
        // A reward model or reference makes room for the next one at once.
        self.park()
    }

    pub(super) fn pack_policy(&mut self, pack: PackFor) -> Result<()> {
        self.working.packed = None;
        if pack.training {
            self.working.switched = None;
        } else if self.working.switched.is_none() {
            self.working.switched = self.switched()?;
        }
        let (began, waited) = (Instant::now(), self.conductor.transfers.record.totals().0);
        let kernels = self.kernels.as_ref();
        if let (Some(switch), Some(params)) = (&self.switch, &self.working.switched) {
            let packed = switch.model.pack(kernels, params, "policy", self.policy_version, pack);
            self.working.packed = Some(packed.map_err(out_of_memory)?);
            self.chores.packed_since(began);
            return Ok(());
        }
        let policy = self.policy.as_mut().expect("only called with a policy");
        let (params, _) = policy.take(kernels)?;
        let packed = policy.model.pack(kernels, &params, "policy", self.policy_version, pack);
        policy.weights.put(params.slab);
        self.working.packed = Some(packed.map_err(out_of_memory)?);
        self.chores.packed_since(began);
        // Waiting for a transfer is told as such.
        self.chores.pack_seconds -= self.conductor.transfers.record.totals().0 - waited;
        Ok(())
    }

    /// Packs the policy for Generate, in this format.
    pub(super) fn pack_for_sampling(&mut self, format: WeightFormat) -> Result<()> {
        let prefill = self.prefill;
        self.pack_policy(PackFor { format, prefill, ..PackFor::SAMPLING })?;
        self.working.sampling = format;
        Ok(())
    }

    pub(super) fn ready_training(&mut self) -> Result<()> {
        let form: AttentionForm = self.form;
        self.pack_policy(PackFor::documents(form, true))?;
        let kernels = self.kernels.as_ref();
        let policy = self.policy.as_ref().expect("only called with a policy");
        let gradients =
            Gradients::new(kernels, &policy.model.layout, "policy").map_err(out_of_memory)?;
        self.working.gradients = Some(gradients);
        // A list has the moments here from the phase's beginning; a plan may still be reading them.
        if let (Some(state), true) = (&mut self.optimizer, self.setup.engine.offload.is_some()) {
            for parked in [&mut state.first, &mut state.second] {
                let (slab, _) = parked.take(kernels.arena())?;
                parked.put(slab);
            }
        }
        Ok(())
    }
}
