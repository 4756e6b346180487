//! Bytes that the arena holds for a part of a model: its weights, and what it packs of them.
//!
//! Follows `Transformer::pack` layer by layer, so that a plan knows beforehand what packing will take; a test holds it against
//! the arena.

use super::heads::of_vocabulary;
use super::params::{AttentionIndex, FeedForwardIndex, LayerIndex, Layout, MlpIndex};
use super::transformer::PackFor;
use crate::config::ModelConfig;
use crate::config::engine::{AttentionForm, Prefill};
use rehearsal_kernels::{Kind, Pack, Product, WeightFormat, sizes};
use std::ops::Range;

/// Bytes of the weights of a layout, and of anything that has its shapes.
pub fn weight_bytes(layout: &Layout) -> u64 {
    sizes::slab(Kind::Weights, layout.elements())
}

/// Bytes of the gradients of a layout.
pub fn gradient_bytes(layout: &Layout) -> u64 {
    sizes::slab(Kind::Gradients, layout.elements())
}

/// Bytes of both moments of so many elements.
pub fn moment_bytes(elements: usize) -> u64 {
    2 * sizes::slab(Kind::Moments, elements)
}

/// Bytes of so many numbers of scratch in one piece.
pub fn scratch_bytes(elements: usize) -> u64 {
    sizes::scratch(1, elements)
}

/// Bytes of a latent cache in f32 of so many pages; `here` is the model with the heads that are here.
pub fn cache_bytes(here: &ModelConfig, pages: usize, page_tokens: usize) -> u64 {
    let layer = |tokens: usize| sizes::slab(Kind::Cache, tokens * here.cache_width());
    here.num_hidden_layers as u64 * layer(pages * page_tokens) + layer(page_tokens)
}

/// What comes on top of so many bytes in use because regions of the arena's pool are larger than what is asked of it.
pub fn pool_bytes(used: u64) -> u64 {
    sizes::budget_for(used) - used
}

/// Bytes of the cosines and sines of all positions.
pub fn rope_bytes(config: &ModelConfig) -> u64 {
    2 * sizes::slab(Kind::Weights, config.max_position_embeddings * config.rope_width() / 2)
}

/// Bytes of the weights of a layout packed for some use.
pub fn packed_bytes_of(layout: &Layout, config: &ModelConfig, pack: PackFor) -> u64 {
    let here = layout.part.attention(config);
    let walk = Walk { layout, here, pack };
    let layers: u64 = layout.layers.iter().map(|layer| walk.layer(layer)).sum();
    let head = |index: usize, format| walk.linear(index..index + 1, 1, format);
    let vocabulary = layout.head.map_or(0, |index| head(index, of_vocabulary(pack.format)));
    let score = layout.score.map_or(0, |index| head(index, WeightFormat::F32));
    layers + vocabulary + score
}

struct Walk<'a> {
    layout: &'a Layout,
    here: ModelConfig,
    pack: PackFor,
}

impl Walk<'_> {
    fn layer(&self, layer: &LayerIndex) -> u64 {
        let PackFor { format, .. } = self.pack;
        let feed_forward = match &layer.feed_forward {
            FeedForwardIndex::Dense(mlp) => self.mlp(mlp),
            FeedForwardIndex::Moe { router, gate_up, down, shared } => {
                let here = down.len();
                self.linear(*router..*router + 1, 1, WeightFormat::F32)
                    + self.linear(gate_up.clone(), here, format)
                    + self.linear(down.clone(), here, format)
                    + shared.as_ref().map_or(0, |mlp| self.mlp(mlp))
            }
        };
        feed_forward + self.attention(&layer.attention)
    }

    fn mlp(&self, mlp: &MlpIndex) -> u64 {
        let format = self.pack.format;
        self.linear(mlp.gate_up.clone(), 1, format) + self.one(mlp.down, format)
    }

    fn attention(&self, index: &AttentionIndex) -> u64 {
        let PackFor { format, form, prefill, .. } = self.pack;
        let index = match index {
            AttentionIndex::Gqa(index) => {
                return self.linear(index.qkv.clone(), 1, format) + self.one(index.output, format);
            }
            AttentionIndex::Mla(index) => index,
        };
        let inner = if format == WeightFormat::Int8 { WeightFormat::F32 } else { format };
        let (nope, value) = (self.here.qk_nope_head_dim, self.here.v_head_dim);
        let core = match form {
            AttentionForm::Expanded => self.one(index.kv_b, inner),
            AttentionForm::Absorbed => {
                let prompts = match prefill {
                    Prefill::Absorbed => 0,
                    Prefill::ByCost => self.one(index.kv_b, inner),
                };
                let heads = |product, first_row, rows| {
                    let groups = self.here.num_attention_heads;
                    let group_stride = nope + value;
                    let pack = Pack { product, groups, group_stride, first_row, rows };
                    self.packed(index.kv_b..index.kv_b + 1, pack, inner)
                };
                prompts + heads(Product::Plain, 0, nope) + heads(Product::Transposed, nope, value)
            }
        };
        let query = index.query.map_or(0, |(_, q_b)| self.one(q_b, format));
        core + query + self.linear(index.down.clone(), 1, format) + self.one(index.output, format)
    }

    fn one(&self, tensor: usize, format: WeightFormat) -> u64 {
        self.linear(tensor..tensor + 1, 1, format)
    }

    /// The joined rows of some tensors as `groups` blocks.
    fn linear(&self, tensors: Range<usize>, groups: usize, format: WeightFormat) -> u64 {
        let rows = self.rows(&tensors) / groups;
        let product = Product::Transposed;
        let pack = Pack { product, groups, group_stride: rows, first_row: 0, rows };
        self.packed(tensors, pack, format)
    }

    /// For one product and, in training, for its reverse.
    fn packed(&self, tensors: Range<usize>, pack: Pack, format: WeightFormat) -> u64 {
        let (rows, cols) = (self.rows(&tensors), self.layout.specs[tensors.start].cols);
        let bytes = |pack| sizes::packed(rows, cols, pack, format);
        let reverse = match pack.product {
            Product::Transposed => Product::Plain,
            Product::Plain => Product::Transposed,
        };
        let again = if self.pack.training { bytes(Pack { product: reverse, ..pack }) } else { 0 };
        bytes(pack) + again
    }

    fn rows(&self, tensors: &Range<usize>) -> usize {
        self.layout.specs[tensors.clone()].iter().map(|spec| spec.rows).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::parameters::tests::preset;
    use super::super::{Params, Part, Transformer};
    use super::*;
    use crate::cluster::layout::Sampling;
    use rehearsal_kernels::{Arena, CpuKernels, Kernels};
    use std::sync::Arc;

    #[test]
    fn what_a_part_holds_and_packs_is_what_the_arena_counts_in_every_format() {
        for name in ["smoke.json", "tiny.json", "cpu-nano-dense.json"] {
            let config = preset(name);
            let experts = if config.n_routed_experts > 0 { 2 } else { 1 };
            let sampling = Sampling { ranks: 2, tensor: 1, expert: experts };
            for (part, value_head) in [
                (Part::whole(&config), true),
                (
                    Part {
                        pieces: std::iter::once(1..2).collect(),
                        head: false,
                        ..Part::whole(&config)
                    },
                    false,
                ),
                (Part::in_sampling(&config, &sampling, 0), false),
            ] {
                let uses = [true, false]
                    .map(|training| PackFor::documents(AttentionForm::Expanded, training));
                let absorbed = [true, false]
                    .map(|training| PackFor::documents(AttentionForm::Absorbed, training));
                let sampled = WeightFormat::ALL.map(|format| PackFor {
                    format,
                    prefill: Prefill::ByCost,
                    ..PackFor::SAMPLING
                });
                for pack in uses.into_iter().chain(absorbed).chain(sampled) {
                    let kernels = CpuKernels::new(1, Arena::new(None));
                    let transformer =
                        Transformer::of_part(&kernels, &config, value_head, part.clone(), None)
                            .unwrap();
                    let layout = transformer.layout.clone();
                    let rope = kernels.arena().held_by(Kind::Weights);
                    assert_eq!(rope, rope_bytes(&config), "{name}");
                    let params = Params::new(&kernels, Arc::clone(&layout), "policy").unwrap();
                    let held = kernels.arena().held_by(Kind::Weights) - rope;
                    assert_eq!(held, weight_bytes(&layout), "{name}");
                    let _packed = transformer.pack(&kernels, &params, "policy", 0, pack).unwrap();
                    let held = kernels.arena().held_by(Kind::Packed);
                    assert_eq!(held, packed_bytes_of(&layout, &config, pack), "{name} {pack:?}");
                }
            }
        }
    }
}
