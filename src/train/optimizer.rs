//! AdamW over named parameters, with global gradient clipping (deepseek_v2.md section 3).
//!
//! Decoupled weight decay acts on matrices only, never on norm weights. Moments lie in slabs like the weights.

use crate::config::stage::OptimizerConfig;
use crate::model::{Gradients, Layout, Params};
use rehearsal_kernels::{AdamW, Kernels, Kind, OutOfMemory, Slab};

/// Moments and step count.
pub struct Optimizer {
    /// First moments.
    pub first: Slab,
    /// Second moments.
    pub second: Slab,
    /// Updates made.
    pub step: u64,
}

impl Optimizer {
    /// Zero moments that `role` owns.
    pub fn new(
        kernels: &dyn Kernels,
        layout: &Layout,
        role: &str,
    ) -> Result<Optimizer, OutOfMemory> {
        let owner = kernels.arena().owner(role, Kind::Moments);
        let shapes: Vec<_> = layout.specs.iter().map(|s| (s.rows, s.cols)).collect();
        let slab = || kernels.arena().slab(owner, kernels.float(), &shapes);
        Ok(Optimizer { first: slab()?, second: slab()?, step: 0 })
    }

    /// Updates every trained tensor; gradients are clipped to the global norm `config.clip`.
    pub fn update(
        &mut self,
        kernels: &dyn Kernels,
        config: &OptimizerConfig,
        learning_rate: f64,
        gradient_norm: f64,
        params: &mut Params,
        gradients: &Gradients,
        scalar_head: bool,
    ) {
        self.step += 1;
        let clipped = config.clip > 0.0 && gradient_norm > config.clip;
        let layout = params.layout.clone();
        for (index, spec) in
            layout.specs.iter().enumerate().filter(|(i, _)| layout.is_trained(*i, scalar_head))
        {
            let update = AdamW {
                learning_rate,
                beta1: config.beta1,
                beta2: config.beta2,
                epsilon: config.epsilon,
                weight_decay: if spec.is_norm { 0.0 } else { config.weight_decay },
                gradient_scale: if clipped { config.clip / gradient_norm } else { 1.0 },
                step: self.step,
            };
            kernels.adamw(
                &update,
                &gradients.slab.tensor(index),
                &mut params.slab.tensor_mut(index),
                &mut self.first.tensor_mut(index),
                &mut self.second.tensor_mut(index),
            );
        }
    }
}
