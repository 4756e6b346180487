//! Grouped-query attention, as in Llama and DeepSeek 67B: what MLA is compared with.
//!
//! Shapes: T rows, H query heads, K key-value heads, h = head_dim. Keys and values are cached whole, after their rotation:
//! 2 K h elements a token, where MLA keeps d_c + d_R.
//!
//! Steps of the forward pass (backward runs them in reverse):
//!   1. one product gives [queries | keys | values] of all heads
//!   2. RoPE on queries and keys, whose heads lie one after another
//!   3. attention: H / K query heads share a key and a value
//!   4. W_O, added to the residual stream

use super::cache::LayerCache;
use super::linear::{Linear, Packing};
use super::mla::OUTPUT;
use super::params::{GqaIndex, Gradients, Params};
use super::pass::{Pass, PassError, floats};
use super::prefill::SamplerRows;
use super::rope::softmax_scale;
use crate::config::{Attention, ModelConfig};
use rehearsal_kernels::{
    AttentionShape, Buffer, CacheSpec, Kernels, OutOfMemory, RopeTable, Store, View,
};

/// A packed attention layer: of all heads, or of those that a rank of a tensor group has.
pub struct Gqa {
    shape: AttentionShape,
    qkv: Linear,
    output: Linear,
}

/// What the backward pass needs.
pub struct GqaSaved {
    /// Queries and keys rotated.
    qkv: Buffer,
    attended: Buffer,
    lse: Buffer,
}

/// What the weight gradients wait for.
pub struct GqaPending {
    d_qkv: Buffer,
}

/// All keys, then all values; no rope part of its own.
pub(super) fn shape(config: &ModelConfig) -> AttentionShape {
    let Attention::Gqa { kv_heads, head_dim } = config.attention() else {
        panic!("the config is of another attention")
    };
    AttentionShape {
        heads: config.num_attention_heads,
        sharing: config.num_attention_heads / kv_heads,
        key_width: head_dim,
        rope_width: 0,
        value_width: head_dim,
        head_stride: head_dim,
        value_offset: kv_heads * head_dim,
        scale: softmax_scale(config),
    }
}

impl Gqa {
    /// Packs the weights.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
        index: &GqaIndex,
    ) -> Result<Gqa, OutOfMemory> {
        Ok(Gqa {
            shape: shape(config),
            qkv: Linear::pack(packing, params, index.qkv.clone(), 1)?,
            output: Linear::pack_cut(packing, params, index.output)?,
        })
    }

    /// `y += GQA(x)` over packed documents.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<GqaSaved, PassError> {
        let (kernels, rows) = (pass.kernels, x.rows());
        let qkv = self.project(kernels, x, &pass.documents.positions, pass.rope)?;
        let mut attended = pass.floats(rows, self.shape.heads * self.shape.value_width)?;
        let mut lse = pass.floats(rows, self.shape.heads)?;
        kernels.mla_train(
            &self.shape,
            &self.queries(&qkv),
            &self.keys_and_values(&qkv),
            &pass.floats(rows, 0)?,
            &pass.documents.start,
            &mut attended,
            &mut lse,
        )?;
        self.output.add_all(kernels, OUTPUT, &attended, y)?;
        Ok(GqaSaved { qkv, attended, lse })
    }

    /// `y += GQA(x)` for sampler rows: writes their entries to `cache` and attends to it.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        x: &Buffer,
        rope: &RopeTable,
        rows: &SamplerRows,
        cache: &mut LayerCache<'_>,
        y: &mut Buffer,
    ) -> Result<(), PassError> {
        let [all] = rows.parts.as_slice() else { panic!("there is one form of grouped queries") };
        let qkv = self.project(kernels, x, &rows.positions, rope)?;
        let (q, kv) = (self.queries(&qkv), self.keys_and_values(&qkv));
        let spec = CacheSpec { layout: cache.layout, channels: None };
        kernels.write_cache(&spec, &kv, &floats(kernels, x.rows(), 0)?, &rows.slots, cache.rows);
        let mut attended = floats(kernels, x.rows(), self.shape.heads * self.shape.value_width)?;
        let batch = rows.batch(all);
        kernels.mla_decode(&self.shape, &q, &spec, cache.rows, &batch, &mut attended)?;
        self.output.add_all(kernels, OUTPUT, &attended, y)
    }

    /// Sets dx, given the gradient dy of the output.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        saved: &GqaSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<GqaPending, OutOfMemory> {
        let (kernels, rows) = (pass.kernels, dy.rows());
        // 4, 3: W_O and attention.
        let mut d_attended = pass.floats(rows, saved.attended.cols())?;
        self.output.backward_input(kernels, dy, &mut d_attended, Store::Set);
        let (q, kv) = (self.queries(&saved.qkv), self.keys_and_values(&saved.qkv));
        let (mut dq, mut dkv) = (pass.floats(rows, q.cols())?, pass.floats(rows, kv.cols())?);
        kernels.mla_train_backward_input(
            &self.shape,
            &q,
            &kv,
            &pass.floats(rows, 0)?,
            &pass.documents.start,
            &saved.attended,
            &saved.lse,
            &d_attended,
            &mut dq,
            &mut dkv,
            &mut pass.floats(rows, 0)?,
        )?;
        // 2: rotate back.
        let mut d_qkv = pass.floats(rows, saved.qkv.cols())?;
        kernels.copy(&dq, &mut d_qkv.cols_of_mut(0..dq.cols()));
        kernels.copy(&dkv, &mut d_qkv.cols_of_mut(dq.cols()..saved.qkv.cols()));
        self.rotate(kernels, &mut d_qkv, &pass.documents.positions, pass.rope, true);
        // 1: the joined product.
        self.qkv.backward_input(kernels, &d_qkv, dx, Store::Set);
        Ok(GqaPending { d_qkv })
    }

    /// Adds the weights' gradients; x and dy are the forward's input and the output's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        saved: &GqaSaved,
        pending: &GqaPending,
        x: &Buffer,
        dy: &Buffer,
        gradients: &mut Gradients,
    ) {
        self.output.backward_weight(kernels, dy, &saved.attended, gradients);
        self.qkv.backward_weight(kernels, &pending.d_qkv, x, gradients);
    }

    /// Steps 1 and 2.
    fn project(
        &self,
        kernels: &dyn Kernels,
        x: &Buffer,
        positions: &Buffer,
        rope: &RopeTable,
    ) -> Result<Buffer, OutOfMemory> {
        let mut qkv = floats(kernels, x.rows(), self.qkv.outputs())?;
        self.qkv.forward(kernels, x, &mut qkv, Store::Set);
        self.rotate(kernels, &mut qkv, positions, rope, false);
        Ok(qkv)
    }

    fn rotate(
        &self,
        kernels: &dyn Kernels,
        qkv: &mut Buffer,
        positions: &Buffer,
        rope: &RopeTable,
        inverse: bool,
    ) {
        let heads = self.shape.heads + self.shape.heads / self.shape.sharing;
        kernels.rope(qkv, positions, rope, heads, 0, self.shape.key_width, inverse);
    }

    fn queries<'a>(&self, qkv: &'a Buffer) -> View<'a> {
        qkv.cols_of(0..self.shape.heads * self.shape.key_width)
    }

    fn keys_and_values<'a>(&self, qkv: &'a Buffer) -> View<'a> {
        qkv.cols_of(self.shape.heads * self.shape.key_width..qkv.cols())
    }
}
