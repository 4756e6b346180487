//! Part: what of a model a rank holds.

use crate::cluster::layout::{Sampling, Share, Training};
use crate::cluster::mesh::cut;
use crate::config::{Attention, ModelConfig};
use std::ops::Range;

/// Layers, experts and ends of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Whether tokens enter here.
    pub embedding: bool,
    /// Whether the final norm and the heads are here.
    pub head: bool,
    /// Pieces of the stack of layers, the lowest first.
    pub pieces: Vec<Range<usize>>,
    /// Routed experts of each MoE layer.
    pub experts: Range<usize>,
    /// What is here of heads, inner widths and the vocabulary.
    pub share: Share,
}

impl Part {
    /// All of a model.
    pub fn whole(config: &ModelConfig) -> Part {
        Part {
            embedding: true,
            head: true,
            pieces: std::iter::once(0..config.num_hidden_layers).collect(),
            experts: 0..config.n_routed_experts,
            share: Share::ALL,
        }
    }

    /// What a rank holds in training.
    pub fn in_training(config: &ModelConfig, layout: &Training, rank: usize) -> Part {
        let (mesh, place) = (layout.mesh(), layout.mesh().place(rank));
        Part {
            embedding: place.stage == 0,
            head: place.stage == layout.last_stage(),
            pieces: layout.layers(place.stage),
            experts: cut(config.n_routed_experts, mesh.expert(), place.expert),
            share: Share::ALL,
        }
    }

    /// What a rank holds in sampling: all layers, its share of their experts and of their heads.
    pub fn in_sampling(config: &ModelConfig, layout: &Sampling, rank: usize) -> Part {
        let experts = cut(config.n_routed_experts, layout.expert, rank % layout.expert);
        Part { experts, share: layout.share(rank), ..Part::whole(config) }
    }

    /// The model as its attention is here: with the heads of this share alone. Ranks of a tensor group have equally many.
    pub fn attention(&self, config: &ModelConfig) -> ModelConfig {
        let here = |heads: usize| {
            assert!(heads.is_multiple_of(self.share.of), "{heads} heads over {:?}", self.share);
            heads / self.share.of
        };
        let mut part = config.clone();
        if let Attention::Gqa { kv_heads, head_dim } = config.attention() {
            (part.num_key_value_heads, part.head_dim) = (Some(here(kv_heads)), Some(head_dim));
        }
        part.num_attention_heads = here(config.num_attention_heads);
        part
    }

    /// Whether a layer is here.
    pub fn holds_layer(&self, layer: usize) -> bool {
        self.pieces.iter().any(|piece| piece.contains(&layer))
    }

    /// Each piece as a range of the layers that are here, counted from 0.
    pub fn places(&self) -> Vec<Range<usize>> {
        let end_of = |end: &mut usize, piece: &Range<usize>| {
            let first = *end;
            *end += piece.len();
            Some(first..*end)
        };
        self.pieces.iter().scan(0, end_of).collect()
    }
}
