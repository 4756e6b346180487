//! The whole stack in one reading: embedding, blocks, heads; forward, backward, and the sampler's step.
//!
//! The model is a description (config, layout, positions). Weights ([`Params`]) and their packed form
//! ([`PackedModel`], stamped with a policy version) come as arguments, so that policy, reference and reward
//! models share one `Transformer`.

use super::block::{Block, BlockSaved};
use super::cache::{DecodeRows, LatentCache, LayerCache};
use super::documents::Documents;
use super::heads::Heads;
use super::linear::Packing;
use super::moe::Routing;
use super::params::{Gradients, Layout, Params};
use super::pass::{Pass, floats, indices};
use super::prefill::SamplerRows;
use crate::config::ModelConfig;
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::routing::Balance;
use rehearsal_kernels::{Buffer, Kernels, Kind, OutOfMemory, RopeTable, WeightFormat};
use std::sync::Arc;

/// What a model's weights are packed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackFor {
    /// Form of attention.
    pub form: AttentionForm,
    /// Input gradients too.
    pub training: bool,
    /// What the numbers are kept as; norms, embedding and router stay as they are, the head at 16 bits or more.
    pub format: WeightFormat,
    /// How prompts go through the sampler: kv_b is packed for both forms where they may take either.
    pub prefill: Prefill,
}

impl PackFor {
    /// Documents in one form, in f32.
    pub fn documents(form: AttentionForm, training: bool) -> PackFor {
        PackFor { form, training, ..PackFor::SAMPLING }
    }

    /// The sampler: absorbed throughout, forward only.
    pub const SAMPLING: PackFor = PackFor {
        form: AttentionForm::Absorbed,
        training: false,
        format: WeightFormat::F32,
        prefill: Prefill::Absorbed,
    };
}

/// A DeepSeek-V2 transformer.
pub struct Transformer {
    /// Published config.
    pub config: ModelConfig,
    /// Tensors in slab order.
    pub layout: Arc<Layout>,
    rope: RopeTable,
}

/// Weights in a device's order, all from one policy version.
pub struct PackedModel {
    /// Form of attention.
    pub form: AttentionForm,
    /// How prompts go through the sampler.
    pub prefill: Prefill,
    /// Policy version.
    pub version: u64,
    blocks: Vec<Block>,
    /// Vocabulary and scalar head.
    pub heads: Heads,
}

/// What the backward pass needs.
pub struct Saved {
    blocks: Vec<BlockSaved>,
}

impl Transformer {
    /// A model for `config`, with a scalar head if `value_head`.
    pub fn new(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        value_head: bool,
    ) -> Result<Transformer, OutOfMemory> {
        Ok(Transformer {
            config: config.clone(),
            layout: Arc::new(Layout::new(config, value_head)),
            rope: super::rope::table(kernels, config, config.max_position_embeddings)?,
        })
    }

    /// Packs `params` for `role`.
    pub fn pack(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        role: &str,
        version: u64,
        pack: PackFor,
    ) -> Result<PackedModel, OutOfMemory> {
        let PackFor { training, format, .. } = pack;
        assert!(format == WeightFormat::F32 || !training, "only f32 weights are trained");
        let owner = kernels.arena().owner(role, Kind::Packed);
        let packing = Packing { kernels, owner, version, format, training };
        let block = |index| Block::pack(&packing, params, &self.config, index, pack);
        Ok(PackedModel {
            form: pack.form,
            prefill: pack.prefill,
            version,
            blocks: self.layout.layers.iter().map(block).collect::<Result<_, _>>()?,
            heads: Heads::pack(&packing, params, &self.config)?,
        })
    }

    /// A pass over packed documents that balances and drops nothing.
    pub fn pass<'a>(
        &'a self,
        kernels: &'a dyn Kernels,
        documents: &'a Documents,
        packed: &PackedModel,
    ) -> Pass<'a> {
        Pass {
            kernels,
            documents,
            rope: &self.rope,
            form: packed.form,
            balance: Balance::NONE,
            sequences: documents.count,
            capacity: None,
        }
    }

    /// The residual stream after the last block, `[T, d]`, before the final norm.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
    ) -> Result<(Buffer, Saved), OutOfMemory> {
        let mut x = self.embed(pass.kernels, params, &pass.documents.tokens)?;
        let mut blocks = Vec::with_capacity(packed.blocks.len());
        for block in &packed.blocks {
            let (y, saved) = block.forward(pass, params, x)?;
            blocks.push(saved);
            x = y;
        }
        Ok((x, Saved { blocks }))
    }

    /// The same without keeping anything for a backward pass.
    pub fn forward_only(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
    ) -> Result<Buffer, OutOfMemory> {
        let mut x = self.embed(pass.kernels, params, &pass.documents.tokens)?;
        for block in &packed.blocks {
            x = block.forward(pass, params, x)?.0;
        }
        Ok(x)
    }

    /// Adds the gradients of all blocks and of the embedding; returns what the routers did, by MoE layer.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
        mut saved: Saved,
        d_hidden: Buffer,
        gradients: &mut Gradients,
    ) -> Result<Vec<Routing>, OutOfMemory> {
        let mut dx = d_hidden;
        let mut routings = Vec::new();
        for block in packed.blocks.iter().rev() {
            let saved = saved.blocks.pop().expect("one saved state per block");
            let (below, pending) = block.backward_input(pass, params, &saved, dx)?;
            block.backward_weight(pass, &saved, &pending, gradients);
            routings.extend(block.routing(pass.kernels, &saved, &pending));
            dx = below;
        }
        let mut d_embed = gradients.tensor(self.layout.embed);
        pass.kernels.scatter_add_rows(&dx, &pass.documents.tokens, &mut d_embed);
        routings.reverse();
        Ok(routings)
    }

    /// One step of the sampler: writes the rows' cache entries and returns the logits of the wanted rows.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        packed: &PackedModel,
        cache: &mut LatentCache,
        rows: &DecodeRows,
    ) -> Result<Buffer, OutOfMemory> {
        let (config, page_tokens) = (&self.config, cache.page_tokens);
        let placed = SamplerRows::new(kernels, config, rows, page_tokens, packed.prefill)?;
        let mut x = self.embed(kernels, params, &indices(kernels, &rows.tokens)?)?;
        for (block, layer) in packed.blocks.iter().zip(&mut cache.layers) {
            let layer = &mut LayerCache { rows: layer, layout: cache.layout };
            block.decode(kernels, params, &mut x, &self.rope, &placed, layer)?;
        }
        packed.heads.logits(kernels, params, &x, &rows.wanted)
    }

    fn embed(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        tokens: &Buffer,
    ) -> Result<Buffer, OutOfMemory> {
        let mut x = floats(kernels, tokens.rows(), self.config.hidden_size)?;
        kernels.gather_rows(&params.slab.tensor(self.layout.embed), tokens, &mut x);
        Ok(x)
    }
}
