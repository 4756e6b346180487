//! What an engine keeps a model's numbers as while nothing trains it: packed weights and cache rows.
//!
//! Training packs f32 whatever is chosen here. A command that only reads a model chooses for every phase; a run chooses for
//! one stay in Generate, because rollouts from other numbers than the trainer's need importance weights.

use super::hybrid::HybridEngine;
use super::phase::{Phase, PhaseReport};
use crate::config::{Dtype, Fault};
use anyhow::Result;
use rehearsal_kernels::{CacheFormat, Kind, WeightFormat};

/// Formats of forward passes; f32 unless told otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Formats {
    /// Packed weights.
    pub weights: WeightFormat,
    /// Rows of the sampler's cache.
    pub cache: CacheFormat,
}

/// The format that a type of weights is.
pub fn weight_format(dtype: Dtype) -> WeightFormat {
    match dtype {
        Dtype::F32 => WeightFormat::F32,
        Dtype::Bf16 => WeightFormat::Bf16,
        Dtype::Fp8 => WeightFormat::Fp8Channel,
        Dtype::Fp8Block => WeightFormat::Fp8Block,
        Dtype::Int8 => WeightFormat::Int8,
    }
}

impl HybridEngine {
    /// Enters Generate with the policy packed as `dtype`; the report says as what it was. Integers are wanted for their
    /// speed: where the processor of any rank has no instructions for their products all ranks sample from f32.
    pub fn enter_generate(&mut self, dtype: Dtype) -> Result<PhaseReport> {
        let has_integers = self.kernels.multiplies_integers() && self.setup.team.has_integers;
        let is_slow = dtype == Dtype::Int8 && !has_integers;
        let dtype = if is_slow { Dtype::F32 } else { dtype };
        let tensor = self.setup.team.sampling.tensor;
        if dtype == Dtype::Fp8Block && tensor > 1 {
            return Err(Fault::user(format!(
                "rollout_dtype = \"fp8-block\" shares scales over 128 rows of a weight, and cluster.rollout.tensor = {tensor} \
                 cuts it between rows; use fp8, or cluster.rollout.tensor = 1"
            )));
        }
        let report = self.enter(Phase::Generate, weight_format(dtype))?;
        Ok(PhaseReport { sampled_as: Some(dtype), ..report })
    }

    /// Chooses the formats of the next phases. Ends in Idle.
    pub fn set_formats(&mut self, formats: Formats) -> Result<()> {
        self.enter_phase(Phase::Idle)?;
        self.formats = formats;
        Ok(())
    }

    /// Bytes that packed weights hold now, by the arena's count.
    pub fn packed_bytes(&self) -> u64 {
        self.kernels.arena().held_by(Kind::Packed)
    }

    /// Bytes that the cache holds for each token there is room for, by the arena's count; `None` without a cache. It
    /// includes a page's worth of one layer, through which pages are copied.
    pub fn cache_bytes_per_token(&self) -> Option<f64> {
        let cache = self.working.cache.as_ref()?;
        let tokens = cache.page_count() * cache.page_tokens;
        Some(self.kernels.arena().held_by(Kind::Cache) as f64 / tokens as f64)
    }
}
