//! AdamW over named parameters, with global gradient clipping (deepseek_v2.md section 3).
//!
//! Decoupled weight decay acts on matrices only, never on norm weights. Moments lie in slabs, one run of elements after
//! another: those that this rank answers for.

use crate::cluster::layout::Run;
use crate::cluster::{Work, made};
use crate::config::stage::OptimizerConfig;
use crate::model::{Gradients, Params};
use rehearsal_kernels::{AdamW, Arena, Kernels, Kind, OutOfMemory, Slab};

/// Moments and step count.
pub struct Optimizer {
    /// First moments.
    pub first: Slab,
    /// Second moments.
    pub second: Slab,
    /// Updates made.
    pub step: u64,
}

/// What an update changed, as it was before.
pub struct Before {
    weights: Slab,
    first: Slab,
    second: Slab,
}

impl Optimizer {
    /// Zero moments of `runs` that `role` owns.
    pub fn new(kernels: &dyn Kernels, runs: &[Run], role: &str) -> Result<Optimizer, OutOfMemory> {
        let owner = kernels.arena().owner(role, Kind::Moments);
        let slab = || kernels.arena().slab(owner, kernels.float(), &shapes(runs));
        Ok(Optimizer { first: slab()?, second: slab()?, step: 0 })
    }

    /// Updates `runs` of every trained tensor; gradients are multiplied by `scale` first.
    pub fn update(
        &mut self,
        kernels: &dyn Kernels,
        config: &OptimizerConfig,
        learning_rate: f64,
        scale: f64,
        runs: &[Run],
        params: &mut Params,
        gradients: &Gradients,
        scalar_head: bool,
    ) {
        self.step += 1;
        let layout = params.layout.clone();
        let is_trained = |(_, run): &(usize, &Run)| layout.is_trained(run.tensor, scalar_head);
        for (place, Run { tensor, elements }) in runs.iter().enumerate().filter(is_trained) {
            let is_norm = layout.specs[*tensor].is_norm;
            let update = AdamW {
                learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                epsilon: config.epsilon,
                weight_decay: if is_norm { 0.0 } else { config.weight_decay },
                gradient_scale: scale,
                step: self.step,
            };
            kernels.adamw(
                &update,
                &gradients.slab.run(*tensor, elements.clone()),
                &mut params.slab.run_mut(*tensor, elements.clone()),
                &mut self.first.tensor_mut(place),
                &mut self.second.tensor_mut(place),
            );
            made(Work::Update);
        }
    }

    /// Copies of what an update of `runs` will change.
    pub fn before(
        &self,
        kernels: &dyn Kernels,
        runs: &[Run],
        params: &Params,
    ) -> Result<Before, OutOfMemory> {
        let slab = |arena: &Arena| arena.slab(kernels.scratch(), kernels.float(), &shapes(runs));
        let arena = kernels.arena();
        let mut before =
            Before { weights: slab(arena)?, first: slab(arena)?, second: slab(arena)? };
        for (place, Run { tensor, elements }) in runs.iter().enumerate() {
            let weights = params.slab.run(*tensor, elements.clone());
            kernels.copy(&weights, &mut before.weights.tensor_mut(place));
            made(Work::Update);
        }
        kernels.copy(&self.first.whole(), &mut before.first.whole_mut());
        kernels.copy(&self.second.whole(), &mut before.second.whole_mut());
        Ok(before)
    }

    /// Takes an update back.
    pub fn take_back(
        &mut self,
        kernels: &dyn Kernels,
        runs: &[Run],
        params: &mut Params,
        before: &Before,
    ) {
        self.step -= 1;
        for (place, Run { tensor, elements }) in runs.iter().enumerate() {
            let mut weights = params.slab.run_mut(*tensor, elements.clone());
            kernels.copy(&before.weights.tensor(place), &mut weights);
            made(Work::Update);
        }
        kernels.copy(&before.first.whole(), &mut self.first.whole_mut());
        kernels.copy(&before.second.whole(), &mut self.second.whole_mut());
    }
}

fn shapes(runs: &[Run]) -> Vec<(usize, usize)> {
    runs.iter().map(|run| (1, run.elements.len())).collect()
}
