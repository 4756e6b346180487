//! A linear layer as the passes see it: its weight packed for the forward product and, if the model trains, for
//! the input gradient.

use super::params::{Gradients, Params};
use super::pass::PassError;
use super::tensor_ranks::TensorRanks;
use rehearsal_kernels::{
    Buffer, Kernels, OutOfMemory, Owner, Pack, Packed, Product, Routes, Store, WeightFormat,
};
use std::ops::Range;
use std::sync::Arc;

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
    /// The ranks that share heads and inner widths; `None` if they are all here.
    pub ranks: Option<&'a Arc<TensorRanks>>,
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
    /// Who has the other outputs, if they are not all here.
    ranks: Option<Arc<TensorRanks>>,
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
        Ok(Linear { tensors, forward, plain, ranks: None })
    }

    /// Packs one tensor whose outputs are cut over the ranks of a tensor group, if there is one.
    pub fn pack_cut(
        packing: &Packing<'_>,
        params: &Params,
        tensor: usize,
    ) -> Result<Linear, OutOfMemory> {
        let linear = Linear::pack(packing, params, tensor..tensor + 1, 1)?;
        Ok(Linear { ranks: packing.ranks.cloned(), ..linear })
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

    /// `y (=|+=) x Wᵀ` with the outputs of all ranks; `name` says what they are.
    pub fn forward_all(
        &self,
        kernels: &dyn Kernels,
        name: &str,
        x: &Buffer,
        y: &mut Buffer,
        store: Store,
    ) -> Result<(), PassError> {
        let Some(ranks) = &self.ranks else {
            self.forward(kernels, x, y, store);
            return Ok(());
        };
        let own = ranks.own(y.cols());
        self.forward(kernels, x, &mut y.cols_of_mut(own), store);
        Ok(ranks.gather_columns(kernels, name, y)?)
    }

    /// `y += x Wᵀ` with the inputs and the outputs of all ranks; `names` say what they are.
    pub fn add_all(
        &self,
        kernels: &dyn Kernels,
        names: [&str; 2],
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<(), PassError> {
        let [inputs, outputs] = names;
        match &self.ranks {
            Some(ranks) => {
                let x = ranks.widened(kernels, inputs, x, self.forward.inputs)?;
                self.forward_all(kernels, outputs, &x, y, Store::Add)
            }
            None => self.forward_all(kernels, outputs, x, y, Store::Add),
        }
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
