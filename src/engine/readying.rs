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
    /// Drops the phase's memory. Returns the bytes moved off the device.
    pub(super) fn leave(&mut self) -> Result<u64> {
        let bytes = self.unload_scored()?;
        self.working = Working::default();
        Ok(bytes)
    }

    /// Moves off the device what `engine.offload` wants off it and no phase is using. Returns the bytes moved.
    pub(super) fn park(&mut self) -> Result<u64> {
        let (began, engine) = (Instant::now(), &self.setup.engine);
        let mut bytes = 0;
        for (role, model) in &mut self.others {
            let kind =
                if *role == Role::Reference { Offload::Reference } else { Offload::RewardModels };
            if engine.offloads(kind) {
                bytes += model.weights.release()?;
            }
        }
        if self.phase != Phase::Train
            && engine.offloads(Offload::Optimizer)
            && let Some(state) = &mut self.optimizer
        {
            bytes += state.first.release()? + state.second.release()?;
        }
        self.chores.moved_since(began);
        Ok(bytes)
    }

    /// Puts back the model that was scored last. Returns the bytes moved off the device.
    pub(super) fn unload_scored(&mut self) -> Result<u64> {
        let Some((role, params, packed)) = self.working.scored.take() else { return Ok(0) };
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
        let began = Instant::now();
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
        Ok(())
    }

    /// Packs the policy for Generate, in this format.
    pub(super) fn pack_for_sampling(&mut self, format: WeightFormat) -> Result<()> {
        let prefill = self.prefill;
        self.pack_policy(PackFor { format, prefill, ..PackFor::SAMPLING })?;
        self.working.sampling = format;
        Ok(())
    }

    pub(super) fn ready_training(&mut self) -> Result<u64> {
        let form: AttentionForm = self.form;
        self.pack_policy(PackFor::documents(form, true))?;
        let kernels = self.kernels.as_ref();
        let policy = self.policy.as_ref().expect("only called with a policy");
        let gradients =
            Gradients::new(kernels, &policy.model.layout, "policy").map_err(out_of_memory)?;
        self.working.gradients = Some(gradients);
        let (began, mut bytes) = (Instant::now(), 0);
        if let Some(state) = &mut self.optimizer {
            for parked in [&mut state.first, &mut state.second] {
                let (slab, read) = parked.take(kernels.arena())?;
                parked.put(slab);
                bytes += read;
            }
        }
        self.chores.moved_since(began);
        Ok(bytes)
    }
}
