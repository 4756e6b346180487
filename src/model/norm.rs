//! RMSNorm (deepseek_v2.md 1.1): y = w * (x / rms(x)).

use super::params::{Gradients, Params};
use super::pass::floats;
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, Store};

/// A norm and its weight's index.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Index of the weight.
    pub weight: usize,
    /// Added to the mean square.
    pub epsilon: f64,
}

/// A normed copy of x and what the backward pass needs beside x.
pub struct Normed {
    /// The output.
    pub y: Buffer,
    /// 1 / rms of each row.
    pub inverse_rms: Buffer,
}

impl Norm {
    /// Norms the rows of `x`.
    pub fn forward(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        x: &Buffer,
    ) -> Result<Normed, OutOfMemory> {
        let mut y = floats(kernels, x.rows(), x.cols())?;
        let mut inverse_rms = floats(kernels, x.rows(), 1)?;
        kernels.rms_norm(
            x,
            &params.slab.tensor(self.weight),
            self.epsilon,
            &mut y,
            &mut inverse_rms,
        );
        Ok(Normed { y, inverse_rms })
    }

    /// `dx (=|+=)` the input gradient; x is the forward's input.
    pub fn backward_input(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        dy: &Buffer,
        x: &Buffer,
        normed: &Normed,
        dx: &mut Buffer,
        store: Store,
    ) {
        let weight = params.slab.tensor(self.weight);
        kernels.rms_norm_backward_input(dy, x, &weight, &normed.inverse_rms, dx, store);
    }

    /// Adds the weight's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        dy: &Buffer,
        x: &Buffer,
        normed: &Normed,
        gradients: &mut Gradients,
    ) {
        kernels.rms_norm_backward_weight(
            dy,
            x,
            &normed.inverse_rms,
            &mut gradients.tensor(self.weight),
        );
    }
}
