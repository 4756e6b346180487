//! The optimizer of the policy: its settings, and moments that are parked outside Train.

use super::offload::Parked;
use super::resident::out_of_memory;
use super::transfers::Transfers;
use crate::config::stage::OptimizerConfig;
use crate::train::{Optimizer, Ranks};
use anyhow::Result;
use rehearsal_kernels::{Kernels, Kind};
use std::sync::Arc;

/// The optimizer of the policy, its moments parked outside Train.
pub(super) struct ParkedOptimizer {
    pub config: OptimizerConfig,
    pub steps: u64,
    pub step: u64,
    pub first: Parked,
    pub second: Parked,
    pub ranks: Ranks,
}

impl ParkedOptimizer {
    /// Zero moments of what this rank answers for.
    pub fn new(
        kernels: &dyn Kernels,
        ranks: Ranks,
        config: &OptimizerConfig,
        steps: u64,
        transfers: &Arc<Transfers>,
    ) -> Result<ParkedOptimizer> {
        let optimizer =
            Optimizer::new(kernels, &ranks.zero.own, "policy").map_err(out_of_memory)?;
        let owner = kernels.arena().owner("policy", Kind::Moments);
        let parked =
            |name: &str, slab| Parked::new(transfers, format!("policy/{name}"), owner, name, slab);
        Ok(ParkedOptimizer {
            config: config.clone(),
            steps,
            step: 0,
            first: parked("moments-first", optimizer.first),
            second: parked("moments-second", optimizer.second),
            ranks,
        })
    }
}
