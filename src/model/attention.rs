//! The attention of a layer, whichever it is: one choice per layer, the same calls for both.

use super::cache::LayerCache;
use super::gqa::{Gqa, GqaPending, GqaSaved};
use super::linear::Packing;
use super::mla::{Mla, MlaPending, MlaSaved};
use super::params::{AttentionIndex, Gradients, Params};
use super::pass::{Pass, PassError};
use super::prefill::SamplerRows;
use super::transformer::PackFor;
use crate::config::ModelConfig;
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, RopeTable};

/// A packed attention.
#[allow(clippy::large_enum_variant, reason = "one per layer")]
pub enum Attention {
    /// Multi-head latent attention.
    Mla(Mla),
    /// Grouped-query attention.
    Gqa(Gqa),
}

/// What the backward pass needs.
#[allow(clippy::large_enum_variant, reason = "one per layer")]
pub enum AttentionSaved {
    /// Of MLA.
    Mla(MlaSaved),
    /// Of GQA.
    Gqa(GqaSaved),
}

/// What the weight gradients wait for.
#[allow(clippy::large_enum_variant, reason = "one per layer")]
pub enum AttentionPending {
    /// Of MLA.
    Mla(MlaPending),
    /// Of GQA.
    Gqa(GqaPending),
}

impl Attention {
    /// Packs the weights of the heads that `config` has; forms are MLA's.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
        index: &AttentionIndex,
        pack: PackFor,
    ) -> Result<Attention, OutOfMemory> {
        Ok(match index {
            AttentionIndex::Mla(index) => {
                Attention::Mla(Mla::pack(packing, params, config, index, pack)?)
            }
            AttentionIndex::Gqa(index) => {
                Attention::Gqa(Gqa::pack(packing, params, config, index)?)
            }
        })
    }

    /// `y += attention(x)` over packed documents.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<AttentionSaved, PassError> {
        Ok(match self {
            Attention::Mla(mla) => AttentionSaved::Mla(mla.forward(pass, params, x, y)?),
            Attention::Gqa(gqa) => AttentionSaved::Gqa(gqa.forward(pass, x, y)?),
        })
    }

    /// `y += attention(x)` for sampler rows: writes their entries to `cache` and attends to it.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        x: &Buffer,
        rope: &RopeTable,
        rows: &SamplerRows,
        cache: &mut LayerCache<'_>,
        y: &mut Buffer,
    ) -> Result<(), PassError> {
        match self {
            Attention::Mla(mla) => mla.decode(kernels, params, x, rope, rows, cache, y),
            Attention::Gqa(gqa) => gqa.decode(kernels, x, rope, rows, cache, y),
        }
    }

    /// Sets dx, given the gradient dy of the output.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        saved: &AttentionSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<AttentionPending, OutOfMemory> {
        Ok(match (self, saved) {
            (Attention::Mla(mla), AttentionSaved::Mla(saved)) => {
                AttentionPending::Mla(mla.backward_input(pass, params, saved, dy, dx)?)
            }
            (Attention::Gqa(gqa), AttentionSaved::Gqa(saved)) => {
                AttentionPending::Gqa(gqa.backward_input(pass, saved, dy, dx)?)
            }
            _ => unreachable!("a layer saves what it computes"),
        })
    }

    /// Adds the weights' gradients; x and dy are the forward's input and the output's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        saved: &AttentionSaved,
        pending: &AttentionPending,
        x: &Buffer,
        dy: &Buffer,
        gradients: &mut Gradients,
    ) {
        match (self, saved, pending) {
            (Attention::Mla(mla), AttentionSaved::Mla(saved), AttentionPending::Mla(pending)) => {
                mla.backward_weight(kernels, saved, pending, x, dy, gradients);
            }
            (Attention::Gqa(gqa), AttentionSaved::Gqa(saved), AttentionPending::Gqa(pending)) => {
                gqa.backward_weight(kernels, saved, pending, x, dy, gradients);
            }
            _ => unreachable!("a layer saves what it computes"),
        }
    }
}
