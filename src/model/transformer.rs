//! The whole stack in one reading: embedding, blocks, heads; forward, backward, and the sampler's step.
//!
//! The model is a description (config, layout, positions), of all of it or of the part that a rank holds. Weights
//! ([`Params`]) and their packed form ([`PackedModel`], stamped with a policy version) come as arguments, so that policy,
//! reference and reward models share one `Transformer`. A part's layers lie in pieces of the stack; a whole model is one
//! piece.

use super::block::{Block, BlockPending, BlockSaved};
use super::cache::{DecodeRows, LatentCache, LayerCache};
use super::dispatch::ExpertRanks;
use super::documents::Documents;
use super::heads::Heads;
use super::linear::Packing;
use super::moe::Routing;
use super::params::{Gradients, Layout, Params};
use super::part::Part;
use super::pass::{Pass, PassError, floats, indices};
use super::prefill::SamplerRows;
use super::tensor_ranks::TensorRanks;
use crate::cluster::layout::Share;
use crate::cluster::{Work, made};
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
    /// Who has the experts that are not here; `None` if they all are.
    pub experts: Option<Arc<ExpertRanks>>,
    /// Who has the same rows and the other heads; `None` if all heads are here.
    pub tensor: Option<Arc<TensorRanks>>,
    /// The model with the heads that are here, which make the cache's entries.
    pub here: ModelConfig,
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
    heads: Option<Heads>,
}

impl PackedModel {
    /// Vocabulary and scalar head, of a part that has them.
    pub fn heads(&self) -> &Heads {
        self.heads.as_ref().expect("asked where the heads are")
    }
}

/// What the backward pass of a piece needs.
pub struct Saved {
    blocks: Vec<Kept>,
}

/// What is kept of a block's forward pass.
#[allow(clippy::large_enum_variant, reason = "one per layer")]
enum Kept {
    /// All that the backward pass needs.
    All(BlockSaved),
    /// Its input, from which the rest is computed again.
    Input(Buffer),
}

/// What the weight gradients of a piece wait for.
pub struct Pending {
    /// The uppermost block first.
    blocks: Vec<(BlockSaved, BlockPending)>,
    /// Gradient of the embedded tokens, where they entered here.
    embedded: Option<Buffer>,
}

impl Transformer {
    /// A model for `config`, with a scalar head if `value_head`.
    pub fn new(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        value_head: bool,
    ) -> Result<Transformer, OutOfMemory> {
        Transformer::of_part(kernels, config, value_head, Part::whole(config), None)
    }

    /// A part of a model; `experts` are the ranks that have all of its experts between them.
    pub fn of_part(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        value_head: bool,
        part: Part,
        experts: Option<Arc<ExpertRanks>>,
    ) -> Result<Transformer, OutOfMemory> {
        Ok(Transformer {
            config: config.clone(),
            here: part.attention(config),
            layout: Arc::new(Layout::of_part(config, value_head, part)),
            experts,
            tensor: None,
            rope: super::rope::table(kernels, config, config.max_position_embeddings)?,
        })
    }

    /// The same with the ranks that have the rest of what its part shares, if it shares anything.
    pub fn sharing(mut self, tensor: Option<Arc<TensorRanks>>) -> Transformer {
        let share = tensor.as_ref().map_or(Share::ALL, |ranks| ranks.share());
        assert_eq!(share, self.layout.part.share, "the ranks that have the other shares");
        self.tensor = tensor;
        self
    }

    /// Whether this rank goes through its layers without others.
    pub fn is_alone(&self) -> bool {
        self.experts.is_none() && self.tensor.is_none()
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
        let ranks = self.tensor.as_ref();
        let packing = Packing { kernels, owner, version, format, training, ranks };
        let experts = || self.experts.clone();
        let configs = [&self.config, &self.here];
        let block = |index| {
            let block = Block::pack(&packing, params, configs, index, pack, experts())?;
            made(Work::Pack);
            Ok(block)
        };
        Ok(PackedModel {
            form: pack.form,
            prefill: pack.prefill,
            version,
            blocks: self.layout.layers.iter().map(block).collect::<Result<_, _>>()?,
            heads: match self.layout.part.head {
                true => Some(Heads::pack(&packing, params, &self.config)?),
                false => None,
            },
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
            recompute: 0,
        }
    }

    /// The residual stream after the last block, `[T, d]`, before the final norm. Nothing is kept for a backward pass.
    pub fn forward_only(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
    ) -> Result<Buffer, PassError> {
        let mut x = self.embed(pass.kernels, params, &pass.documents.tokens)?;
        for block in &packed.blocks {
            x = block.forward(pass, params, x)?.0;
            made(Work::Forward);
        }
        Ok(x)
    }

    /// From the residual stream below piece number `piece` to the one above it; `x` is `None` where tokens enter. Of the
    /// first `pass.recompute` layers only the input is kept.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
        piece: usize,
        x: Option<Buffer>,
    ) -> Result<(Buffer, Saved), PassError> {
        let mut x = match x {
            Some(x) => x,
            None => self.embed(pass.kernels, params, &pass.documents.tokens)?,
        };
        let places = self.layout.part.places()[piece].clone();
        let mut blocks = Vec::with_capacity(places.len());
        for (place, block) in packed.blocks[places].iter().enumerate() {
            let input = if place < pass.recompute { Some(pass.copy(&x)?) } else { None };
            let (y, saved) = block.forward(pass, params, x)?;
            made(Work::Forward);
            blocks.push(input.map_or_else(|| Kept::All(saved), Kept::Input));
            x = y;
        }
        Ok((x, Saved { blocks }))
    }

    /// Adds the gradients of a piece. Returns the gradient of its input, `None` where tokens enter, and what the routers
    /// did, by MoE layer.
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
        piece: usize,
        mut saved: Saved,
        dy: Buffer,
        gradients: &mut Gradients,
    ) -> Result<(Option<Buffer>, Vec<Routing>), PassError> {
        let mut dx = dy;
        let mut routings = Vec::new();
        for block in packed.blocks[self.layout.part.places()[piece].clone()].iter().rev() {
            let kept = saved.blocks.pop().expect("one saved state per block");
            let saved = Transformer::again(pass, params, block, kept)?;
            let (below, pending) = block.backward_input(pass, params, &saved, dx)?;
            block.backward_weight(pass, &saved, &pending, gradients);
            routings.extend(block.routing(pass.kernels, &saved, &pending));
            made(Work::Backward);
            dx = below;
        }
        routings.reverse();
        if !self.tokens_enter(piece) {
            return Ok((Some(dx), routings));
        }
        self.backward_embedding(pass, &dx, gradients);
        Ok((None, routings))
    }

    /// The input gradients of a piece: the gradient of its input, `None` where tokens enter, and what the weight gradients
    /// wait for.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        packed: &PackedModel,
        piece: usize,
        mut saved: Saved,
        dy: Buffer,
    ) -> Result<(Option<Buffer>, Pending), PassError> {
        let mut dx = dy;
        let mut blocks = Vec::with_capacity(saved.blocks.len());
        for block in packed.blocks[self.layout.part.places()[piece].clone()].iter().rev() {
            let kept = saved.blocks.pop().expect("one saved state per block");
            let saved = Transformer::again(pass, params, block, kept)?;
            let (below, pending) = block.backward_input(pass, params, &saved, dx)?;
            blocks.push((saved, pending));
            made(Work::Backward);
            dx = below;
        }
        match self.tokens_enter(piece) {
            true => Ok((None, Pending { blocks, embedded: Some(dx) })),
            false => Ok((Some(dx), Pending { blocks, embedded: None })),
        }
    }

    /// Adds the weight gradients of a piece after its input gradients. Returns what the routers did, by MoE layer.
    pub fn backward_weight(
        &self,
        pass: &Pass<'_>,
        packed: &PackedModel,
        piece: usize,
        pending: Pending,
        gradients: &mut Gradients,
    ) -> Vec<Routing> {
        let blocks = packed.blocks[self.layout.part.places()[piece].clone()].iter().rev();
        let mut routings = Vec::new();
        for (block, (saved, pending)) in blocks.zip(pending.blocks) {
            block.backward_weight(pass, &saved, &pending, gradients);
            routings.extend(block.routing(pass.kernels, &saved, &pending));
            made(Work::Backward);
        }
        routings.reverse();
        if let Some(dx) = pending.embedded {
            self.backward_embedding(pass, &dx, gradients);
        }
        routings
    }

    /// What a block's backward pass needs, computed again if it was not kept.
    fn again(
        pass: &Pass<'_>,
        params: &Params,
        block: &Block,
        kept: Kept,
    ) -> Result<BlockSaved, PassError> {
        match kept {
            Kept::All(saved) => Ok(saved),
            Kept::Input(x) => Ok(block.forward(pass, params, x)?.1),
        }
    }

    fn tokens_enter(&self, piece: usize) -> bool {
        piece == 0 && self.layout.part.embedding
    }

    fn backward_embedding(&self, pass: &Pass<'_>, dx: &Buffer, gradients: &mut Gradients) {
        let mut d_embed = gradients.tensor(self.embedding());
        pass.kernels.scatter_add_rows(dx, &pass.documents.tokens, &mut d_embed);
    }

    fn embedding(&self) -> usize {
        self.layout.embed.expect("tokens enter where the embedding is")
    }

    /// Takes part in a forward pass of the ranks that share this one's experts, without a row of its own.
    pub fn stand_by(&self, kernels: &dyn Kernels, packed: &PackedModel) -> Result<(), PassError> {
        let width = self.config.hidden_size;
        packed.blocks.iter().try_for_each(|block| {
            block.stand_by(kernels, width)?;
            made(Work::Forward);
            Ok(())
        })
    }

    /// Whether any of the ranks that share experts has rows for another pass.
    pub fn go_on(&self, has_rows: bool) -> Result<bool, PassError> {
        // Nobody reads the intervals of sampling.
        self.tensor.iter().for_each(|ranks| drop(ranks.timeline.take()));
        match &self.experts {
            Some(ranks) => {
                ranks.timeline.take();
                Ok(ranks.go_on(has_rows)?)
            }
            None => Ok(has_rows),
        }
    }

    /// One step of the sampler: writes the rows' cache entries and returns the logits of the wanted rows.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        packed: &PackedModel,
        cache: &mut LatentCache,
        rows: &DecodeRows,
    ) -> Result<Buffer, PassError> {
        let (config, page_tokens) = (&self.config, cache.page_tokens);
        let placed = SamplerRows::new(kernels, config, rows, page_tokens, packed.prefill)?;
        let mut x = self.embed(kernels, params, &indices(kernels, &rows.tokens)?)?;
        for (block, layer) in packed.blocks.iter().zip(&mut cache.layers) {
            let layer = &mut LayerCache { rows: layer, layout: cache.layout };
            block.decode(kernels, params, &mut x, &self.rope, &placed, layer)?;
            made(Work::Sample);
        }
        packed.heads().logits(kernels, params, &x, &rows.wanted)
    }

    fn embed(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        tokens: &Buffer,
    ) -> Result<Buffer, OutOfMemory> {
        let mut x = floats(kernels, tokens.rows(), self.config.hidden_size)?;
        kernels.gather_rows(&params.slab.tensor(self.embedding()), tokens, &mut x);
        Ok(x)
    }
}
