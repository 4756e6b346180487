//! SwiGLU feed-forward: y += W_down( silu(W_gate x) ⊙ W_up x ). Serves dense layers and the shared experts.

use super::linear::{Linear, Packing};
use super::params::{Gradients, MlpIndex, Params};
use super::pass::{Pass, PassError};
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, Store};

/// A packed SwiGLU.
pub struct Mlp {
    gate_up: Linear,
    down: Linear,
}

/// What the backward pass needs.
pub struct MlpSaved {
    gate_up: Buffer,
    activated: Buffer,
}

/// What the weight gradients wait for.
pub struct MlpPending {
    d_gate_up: Buffer,
}

impl Mlp {
    /// Packs the weights.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        index: &MlpIndex,
    ) -> Result<Mlp, OutOfMemory> {
        Ok(Mlp {
            gate_up: Linear::pack(packing, params, index.gate_up.clone(), 1)?,
            down: Linear::pack_cut(packing, params, index.down)?,
        })
    }

    /// `y += FFN(x)`.
    pub fn forward(
        &self,
        kernels: &dyn Kernels,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<MlpSaved, PassError> {
        let saved = self.activate(kernels, x)?;
        self.finish(kernels, &saved, y)?;
        Ok(saved)
    }

    /// The part of it that needs no `y`.
    pub fn activate(&self, kernels: &dyn Kernels, x: &Buffer) -> Result<MlpSaved, OutOfMemory> {
        let mut gate_up = super::pass::floats(kernels, x.rows(), self.gate_up.outputs())?;
        self.gate_up.forward(kernels, x, &mut gate_up, Store::Set);
        let mut activated = super::pass::floats(kernels, x.rows(), self.gate_up.outputs() / 2)?;
        kernels.swiglu(&gate_up, &mut activated);
        Ok(MlpSaved { gate_up, activated })
    }

    /// The rest of it. Of a tensor group a rank needs its own columns of `y` alone, and gets all of them.
    pub fn finish(
        &self,
        kernels: &dyn Kernels,
        saved: &MlpSaved,
        y: &mut Buffer,
    ) -> Result<(), PassError> {
        self.down.add_all(kernels, ["inner widths", "outputs of an FFN"], &saved.activated, y)
    }

    /// Sets dx.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        saved: &MlpSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<MlpPending, OutOfMemory> {
        let mut d_activated = pass.floats(dy.rows(), saved.activated.cols())?;
        self.down.backward_input(pass.kernels, dy, &mut d_activated, Store::Set);
        let mut d_gate_up = pass.floats(dy.rows(), saved.gate_up.cols())?;
        pass.kernels.swiglu_backward(&d_activated, &saved.gate_up, &mut d_gate_up);
        self.gate_up.backward_input(pass.kernels, &d_gate_up, dx, Store::Set);
        Ok(MlpPending { d_gate_up })
    }

    /// Adds the weights' gradients; x and dy are the forward's input and the output's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        saved: &MlpSaved,
        pending: &MlpPending,
        x: &Buffer,
        dy: &Buffer,
        gradients: &mut Gradients,
    ) {
        self.down.backward_weight(kernels, dy, &saved.activated, gradients);
        self.gate_up.backward_weight(kernels, &pending.d_gate_up, x, gradients);
    }
}
