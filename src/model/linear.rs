//! A linear layer as the passes see it: its weight packed for the forward product and, if the model trains, for
//! the input gradient.

use super::params::{Gradients, Params};
use rehearsal_kernels::{
    Buffer, Kernels, OutOfMemory, Owner, Pack, Packed, Product, Routes, Store, WeightFormat,
};
use std::ops::Range;

/// How a model's weights are packed.
#[derive(Clone, Copy)]
pub struct Packing<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// Owner of the packed copies.
    pub owner: Owner,
    /// Policy version that they are stamped with.
    pub version: u64,
    /// What the packed numbers are kept as.
    pub format: WeightFormat,
    /// Pack for input gradients too.
    pub training: bool,
}

impl<'a> Packing<'a> {
    /// The same in another format.
    pub fn kept(self, format: WeightFormat) -> Packing<'a> {
        Packing { format, ..self }
    }

    /// The format of the products inside attention, W_UK and W_UV: not in integers, so that the absorbed and the expanded
    /// form have the same weights and nothing between queries and keys is quantised.
    pub fn inner(self) -> Packing<'a> {
        match self.format {
            WeightFormat::Int8 => self.kept(WeightFormat::F32),
            _ => self,
        }
    }

    /// Packs `weight` for one product.
    pub fn pack(&self, weight: &Buffer, pack: Pack) -> Result<Packed, OutOfMemory> {
        self.kernels.pack(self.owner, weight, pack, self.format, self.version)
    }
}

/// One weight, or the blocks of all experts.
pub struct Linear {
    /// Tensors whose rows it joins.
    pub tensors: Range<usize>,
    forward: Packed,
    plain: Option<Packed>,
}

impl Linear {
    /// Packs the joined rows of `tensors` as `groups` blocks.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        tensors: Range<usize>,
        groups: usize,
    ) -> Result<Linear, OutOfMemory> {
        let weight = params.slab.span(tensors.clone());
        let forward = packing.pack(&weight, Pack::blocks(Product::Transposed, &weight, groups))?;
        let plain = match packing.training {
            true => Some(packing.pack(&weight, Pack::blocks(Product::Plain, &weight, groups))?),
            false => None,
        };
        Ok(Linear { tensors, forward, plain })
    }

    /// The weight packed for the forward product.
    pub fn packed(&self) -> &Packed {
        &self.forward
    }

    /// The weight packed for input gradients.
    pub fn plain(&self) -> &Packed {
        self.plain.as_ref().expect("the weight was packed for training")
    }

    /// Output width.
    pub fn outputs(&self) -> usize {
        self.forward.outputs
    }

    /// `y (=|+=) x Wᵀ`.
    pub fn forward(&self, kernels: &dyn Kernels, x: &Buffer, y: &mut Buffer, store: Store) {
        kernels.linear(x, &self.forward, y, store);
    }

    /// `dx (=|+=) dy W`.
    pub fn backward_input(
        &self,
        kernels: &dyn Kernels,
        dy: &Buffer,
        dx: &mut Buffer,
        store: Store,
    ) {
        kernels.linear(dy, self.plain(), dx, store);
    }

    /// `dW += dyᵀ x`.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        dy: &Buffer,
        x: &Buffer,
        gradients: &mut Gradients,
    ) {
        kernels.linear_backward_weight(dy, x, &mut gradients.span(self.tensors.clone()));
    }

    /// Each expert's product on its own slots.
    pub fn forward_experts(
        &self,
        kernels: &dyn Kernels,
        x: &Buffer,
        routes: &Routes,
        y: &mut Buffer,
    ) {
        kernels.linear_experts(x, &self.forward, routes, y);
    }

    /// Each expert's input gradient on its own slots.
    pub fn backward_input_experts(
        &self,
        kernels: &dyn Kernels,
        dy: &Buffer,
        routes: &Routes,
        dx: &mut Buffer,
    ) {
        kernels.linear_experts(dy, self.plain(), routes, dx);
    }

    /// Each expert's weight gradient from its own slots.
    pub fn backward_weight_experts(
        &self,
        kernels: &dyn Kernels,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        gradients: &mut Gradients,
    ) {
        kernels.linear_experts_backward_weight(
            dy,
            x,
            routes,
            &mut gradients.span(self.tensors.clone()),
        );
    }
}
