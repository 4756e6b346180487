//! RMSNorm (deepseek_v2.md 1.1): y = w * (x / rms(x)), w times a factor behind the norm of a scaled latent (1.8).
//!
//! The factor is rounded into the weight before anything else, so that a model whose weights hold it already computes the
//! same bits.

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
    /// Multiplies the weight; 1 for none.
    pub factor: f64,
}

/// A normed copy of x and what the backward pass needs beside x.
pub struct Normed {
    /// The output.
    pub y: Buffer,
    /// 1 / rms of each row.
    pub inverse_rms: Buffer,
    scaled: Option<Scaled>,
}

/// What a factor changes: the weight, and what the weight's gradient is multiplied with.
struct Scaled {
    weight: Buffer,
    inverse_rms: Buffer,
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
        let weight = params.slab.tensor(self.weight);
        if self.factor == 1.0 {
            kernels.rms_norm(x, &weight, self.epsilon, &mut y, &mut inverse_rms);
            return Ok(Normed { y, inverse_rms, scaled: None });
        }
        let scaled = |from: &Buffer| {
            let mut to = floats(kernels, from.rows(), from.cols())?;
            kernels.scale(from, self.factor, &mut to);
            Ok(to)
        };
        let weight = scaled(&weight)?;
        kernels.rms_norm(x, &weight, self.epsilon, &mut y, &mut inverse_rms);
        let scaled = Scaled { weight, inverse_rms: scaled(&inverse_rms)? };
        Ok(Normed { y, inverse_rms, scaled: Some(scaled) })
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
        let unscaled = params.slab.tensor(self.weight);
        let weight = normed.scaled.as_ref().map_or(&*unscaled, |scaled| &scaled.weight);
        kernels.rms_norm_backward_input(dy, x, weight, &normed.inverse_rms, dx, store);
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
        let scaled = normed.scaled.as_ref().map(|scaled| &scaled.inverse_rms);
        let inverse_rms = scaled.unwrap_or(&normed.inverse_rms);
        kernels.rms_norm_backward_weight(dy, x, inverse_rms, &mut gradients.tensor(self.weight));
    }
}
