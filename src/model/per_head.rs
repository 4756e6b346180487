//! Widths of one attention layer, and products that each head does on its own columns.
//!
//! Knows which columns belong to which head; what the products are for is `mla`'s business.

use super::linear::Packing;
use super::rope::softmax_scale;
use crate::config::ModelConfig;
use rehearsal_kernels::{
    AttentionShape, Buffer, HeadColumns, Kernels, OutOfMemory, Pack, Packed, Product,
};

/// Widths of one layer.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub heads: usize,
    pub nope: usize,
    pub rope: usize,
    pub value: usize,
    pub latent: usize,
    /// Columns of the query part of the first product.
    pub query_a: usize,
    pub scale: f64,
    pub epsilon: f64,
}

impl Dims {
    pub fn new(config: &ModelConfig) -> Dims {
        let heads = config.num_attention_heads;
        Dims {
            heads,
            nope: config.qk_nope_head_dim,
            rope: config.qk_rope_head_dim,
            value: config.v_head_dim,
            latent: config.kv_lora_rank,
            query_a: config.q_lora_rank.unwrap_or(heads * config.query_width()),
            scale: softmax_scale(config),
            epsilon: config.rms_norm_eps,
        }
    }

    pub fn query(&self) -> usize {
        self.nope + self.rope
    }

    pub fn expanded(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            sharing: 1,
            key_width: self.nope,
            rope_width: self.rope,
            value_width: self.value,
            head_stride: self.nope + self.value,
            value_offset: self.nope,
            scale: self.scale,
        }
    }

    pub fn absorbed(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            sharing: self.heads,
            key_width: self.latent,
            rope_width: self.rope,
            value_width: self.latent,
            head_stride: 0,
            value_offset: 0,
            scale: self.scale,
        }
    }

    /// Copies each head's rope part, which follows its key part of `from_key` or `to_key` columns.
    pub fn copy_rope(
        &self,
        kernels: &dyn Kernels,
        from: &Buffer,
        from_key: usize,
        to: &mut Buffer,
        to_key: usize,
    ) {
        let rope = self.rope;
        for head in 0..self.heads {
            let source = head * (from_key + rope) + from_key;
            let target = head * (to_key + rope) + to_key;
            kernels.copy(
                &from.cols_of(source..source + rope),
                &mut to.cols_of_mut(target..target + rope),
            );
        }
    }

    /// From queries to absorbed queries.
    pub fn key_columns(&self) -> HeadColumns {
        HeadColumns {
            input_first: 0,
            input_stride: self.query(),
            output_first: 0,
            output_stride: self.latent + self.rope,
        }
    }

    /// From sums over the latent to values.
    pub fn value_columns(&self) -> HeadColumns {
        HeadColumns {
            input_first: 0,
            input_stride: self.latent,
            output_first: 0,
            output_stride: self.value,
        }
    }
}

/// One matrix per head (rows of kv_b): its product and, for training, its input gradient.
pub(super) struct PerHead {
    pub rows: Pack,
    pub forward: Packed,
    pub backward: Option<Packed>,
}

impl PerHead {
    pub fn pack(
        packing: &Packing<'_>,
        weight: &Buffer,
        rows: Pack,
    ) -> Result<PerHead, OutOfMemory> {
        let reverse = Pack { product: opposite(rows.product), ..rows };
        let backward = if packing.training { Some(packing.pack(weight, reverse)?) } else { None };
        Ok(PerHead { rows, forward: packing.pack(weight, rows)?, backward })
    }

    pub fn backward(&self) -> &Packed {
        self.backward.as_ref().expect("the weight was packed for training")
    }
}

/// The columns of the input gradient.
pub(super) fn reversed(columns: HeadColumns) -> HeadColumns {
    HeadColumns {
        input_first: columns.output_first,
        input_stride: columns.output_stride,
        output_first: columns.input_first,
        output_stride: columns.input_stride,
    }
}

fn opposite(product: Product) -> Product {
    match product {
        Product::Transposed => Product::Plain,
        Product::Plain => Product::Transposed,
    }
}
