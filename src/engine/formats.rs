//! What an engine keeps a model's numbers as while nothing trains it: packed weights and cache rows.
//!
//! Training packs f32 whatever is chosen here, and no stage of a run chooses: rollouts from other numbers than the
//! trainer's would need importance weights.

use super::hybrid::HybridEngine;
use super::phase::Phase;
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

impl HybridEngine {
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
