//! Part: what of a model a rank holds.

use crate::cluster::layout::{Sampling, Training};
use crate::cluster::mesh::cut;
use crate::config::ModelConfig;
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
}

impl Part {
    /// All of a model.
    pub fn whole(config: &ModelConfig) -> Part {
        Part {
            embedding: true,
            head: true,
            pieces: std::iter::once(0..config.num_hidden_layers).collect(),
            experts: 0..config.n_routed_experts,
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
        }
    }

    /// What a rank holds in sampling, where tensors are not cut: all layers, and its share of their experts.
    pub fn in_sampling(config: &ModelConfig, layout: &Sampling, rank: usize) -> Part {
        let experts = cut(config.n_routed_experts, layout.expert, rank % layout.expert);
        Part { experts, ..Part::whole(config) }
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
