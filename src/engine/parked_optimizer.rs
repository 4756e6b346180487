//! The optimizer of the policy: its settings, and moments that are parked outside Train.

use super::offload::Parked;
use super::policy_files::MomentsMut;
use super::resident::out_of_memory;
use super::transfers::Transfers;
use crate::config::stage::OptimizerConfig;
use crate::train::{Optimizer, Ranks};
use anyhow::Result;
use rehearsal_kernels::{Arena, Kernels, Kind};
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

    /// Lends the moments to be changed; they are put back however that goes.
    pub fn change<T>(
        &mut self,
        arena: &Arena,
        change: impl FnOnce(MomentsMut) -> Result<T>,
    ) -> Result<T> {
        let mut first = self.first.take_to_change(arena)?.0;
        let changed = self.second.take_to_change(arena).and_then(|(mut second, _)| {
            let own = &self.ranks.zero.own;
            let changed = change(MomentsMut { own, first: &mut first, second: &mut second });
            self.second.put_changed(second);
            changed
        });
        self.first.put_changed(first);
        changed
    }
}
