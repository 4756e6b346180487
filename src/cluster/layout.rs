//! Layouts: which rank holds which part of which tensor, for training and for sampling (deepseek_v2.md 3 and 4.5).
//!
//! Training cuts a model by layers (pipeline) and by experts; a rank holds its tensors whole, and of their moments the
//! part that ZeRO-1 gives it. Sampling holds all layers; experts are cut as in training, and tensor parallelism cuts
//! heads, the inner width of FFNs and the vocabulary, each matrix by its rows, which are its outputs: so no sum is ever cut,
//! and numbers are those of one rank to the bit. The latent cache of MLA and what makes it (q_a, kv_a, their norms) cannot
//! be cut by heads: every rank of a tensor group has them whole.
//!
//! Invariants (property-tested):
//!   * what the ranks hold of a tensor tiles it exactly, once for each group of replicas
//!   * the moments of a tensor are cut over its replicas and over nobody else

use super::mesh::{Mesh, Place, cut};
use std::ops::Range;

mod sampling;
pub use sampling::{Sampling, Share};

/// A tensor as a layout sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Rows; 1 for a norm's weight.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Where in the model it belongs.
    pub home: Home,
    /// How ranks of a tensor group share it.
    pub split: Split,
}

/// Where in a model a tensor belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// Below the first layer.
    Embedding,
    /// A layer, for all of its tokens.
    Layer(usize),
    /// One routed expert of a layer.
    Expert {
        /// The layer.
        layer: usize,
        /// Its number in the layer.
        expert: usize,
        /// Routed experts of the layer.
        of: usize,
    },
    /// Above the last layer.
    Head,
    /// Embedding and head at once.
    Tied,
}

/// How ranks of a tensor group share a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each has it whole.
    Whole,
    /// By rows, so many of them together (those of a head).
    Rows(usize),
}

/// A rectangle of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Index of the tensor.
    pub tensor: usize,
    /// Its rows.
    pub rows: Range<usize>,
    /// Their columns.
    pub cols: Range<usize>,
}

impl Slice {
    /// All of a tensor.
    pub fn whole(index: usize, tensor: &Tensor) -> Slice {
        Slice { tensor: index, rows: 0..tensor.rows, cols: 0..tensor.cols }
    }

    /// Elements of it.
    pub fn elements(&self) -> usize {
        self.rows.len() * self.cols.len()
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.elements() == 0
    }
}

/// Elements of a tensor in row order, as moments are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the tensor.
    pub tensor: usize,
    /// Its elements.
    pub elements: Range<usize>,
}

/// Ranks that hold the same tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// They, in order.
    pub ranks: Vec<usize>,
    /// What each of them answers for.
    pub parts: Vec<Vec<Run>>,
}

/// The runs that a range covers of tensors laid one after another.
fn parts_of(members: &[usize], size: impl Fn(&usize) -> usize, range: Range<usize>) -> Vec<Run> {
    let (mut runs, mut first) = (Vec::new(), 0);
    for index in members {
        let end = first + size(index);
        let (from, to) = (range.start.max(first), range.end.min(end));
        if from < to {
            runs.push(Run { tensor: *index, elements: from - first..to - first });
        }
        first = end;
    }
    runs
}

/// The layout of training: a mesh, and the layers of each stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Training {
    mesh: Mesh,
    layers: usize,
    /// Pieces that each stage has of the stack: 2 for a schedule in the form of a V.
    chunks: usize,
}

impl Training {
    /// One neighbouring piece of the stack for each stage.
    pub fn new(mesh: Mesh, layers: usize) -> Training {
        Training { mesh, layers, chunks: 1 }
    }

    /// Two pieces for each stage: the second half of the stack goes back through the stages, so that the first stage has
    /// both ends (ZB-V).
    pub fn in_a_v(mesh: Mesh, layers: usize) -> Training {
        Training { mesh, layers, chunks: 2 }
    }

    /// The same with so many pieces for each stage, 1 or 2.
    pub fn in_chunks(&self, chunks: usize) -> Training {
        Training { chunks, ..self.clone() }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The layers of a stage, piece by piece.
    pub fn layers(&self, stage: usize) -> Vec<Range<usize>> {
        let stages = self.mesh.pipeline();
        let pieces = stages * self.chunks;
        let piece = |chunk: usize| match chunk {
            0 => stage,
            _ => pieces - 1 - stage,
        };
        (0..self.chunks).map(|chunk| cut(self.layers, pieces, piece(chunk))).collect()
    }

    /// Whether a rank holds a tensor.
    pub fn holds(&self, rank: usize, tensor: &Tensor) -> bool {
        let place = self.mesh.place(rank);
        self.holds_at(place, &self.layers(place.stage), tensor)
    }

    /// The same at a place whose stage has these layers.
    fn holds_at(&self, place: Place, layers: &[Range<usize>], tensor: &Tensor) -> bool {
        let Place { stage, expert: own, .. } = place;
        let has_layer = |layer: usize| layers.iter().any(|range| range.contains(&layer));
        match tensor.home {
            Home::Embedding => stage == 0,
            Home::Head => stage == self.last_stage(),
            Home::Tied => stage == 0 || stage == self.last_stage(),
            Home::Layer(layer) => has_layer(layer),
            Home::Expert { layer, expert, of } => {
                has_layer(layer) && cut(of, self.mesh.expert(), own).contains(&expert)
            }
        }
    }

    /// The ranks that hold a tensor as `rank` does, itself among them: those that sum its gradient.
    pub fn replicas(&self, rank: usize, tensor: &Tensor) -> Vec<usize> {
        match tensor.home {
            Home::Expert { .. } => self.mesh.expert_replicas(rank),
            Home::Tied => {
                (0..self.mesh.ranks()).filter(|other| self.holds(*other, tensor)).collect()
            }
            _ => self.mesh.data_group(rank),
        }
    }

    /// The tensors of a rank, whole, in order.
    pub fn weights(&self, rank: usize, tensors: &[Tensor]) -> Vec<Slice> {
        let place = self.mesh.place(rank);
        let layers = self.layers(place.stage);
        let held = tensors.iter().enumerate();
        let held = held.filter(|(_, tensor)| self.holds_at(place, &layers, tensor));
        held.map(|(index, tensor)| Slice::whole(index, tensor)).collect()
    }

    /// What a rank keeps of the moments (ZeRO-1): its share of the elements of all tensors that have the same replicas,
    /// laid one after another.
    pub fn moments(&self, rank: usize, tensors: &[Tensor]) -> Vec<Run> {
        let own = |shared: Shared| {
            let place = shared.ranks.iter().position(|other| *other == rank);
            shared.parts.into_iter().nth(place.expect("its own replica")).expect("a part for each")
        };
        let mut runs: Vec<Run> = self.sharing(rank, tensors).into_iter().flat_map(own).collect();
        runs.sort_by_key(|run| run.tensor);
        runs
    }

    /// Whom a rank shares its tensors with, and who of them answers for which elements; a rank that holds a tensor alone
    /// answers for all of it.
    pub fn sharing(&self, rank: usize, tensors: &[Tensor]) -> Vec<Shared> {
        let held = self.weights(rank, tensors).into_iter().map(|slice| slice.tensor);
        let mut groups: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
        for index in held {
            let replicas = self.replicas(rank, &tensors[index]);
            match groups.iter_mut().find(|(ranks, _)| *ranks == replicas) {
                Some((_, members)) => members.push(index),
                None => groups.push((replicas, vec![index])),
            }
        }
        let size = |index: &usize| tensors[*index].rows * tensors[*index].cols;
        let shared = |(ranks, members): (Vec<usize>, Vec<usize>)| {
            let all = members.iter().map(size).sum();
            let part = |place| parts_of(&members, size, cut(all, ranks.len(), place));
            Shared { parts: (0..ranks.len()).map(part).collect(), ranks }
        };
        groups.into_iter().map(shared).collect()
    }

    /// Stage and piece of it that end the stack, with the head.
    pub fn last_piece(&self) -> (usize, usize) {
        (self.last_stage(), self.chunks - 1)
    }

    /// The stage that has the head.
    pub fn last_stage(&self) -> usize {
        if self.chunks == 2 { 0 } else { self.mesh.pipeline() - 1 }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::mesh::Load;
    use super::*;
    use proptest::prelude::*;

    /// A small model: embedding, layers of attention and experts, head.
    pub fn model(layers: usize, experts: usize, tied: bool) -> Vec<Tensor> {
        let tensor = |rows, cols, home, split| Tensor { rows, cols, home, split };
        let mut tensors = Vec::new();
        let ends = if tied { Home::Tied } else { Home::Embedding };
        tensors.push(tensor(12, 4, ends, Split::Whole));
        for layer in 0..layers {
            tensors.push(tensor(1, 4, Home::Layer(layer), Split::Whole));
            tensors.push(tensor(8, 3, Home::Layer(layer), Split::Rows(2)));
            tensors.push(tensor(4, 8, Home::Layer(layer), Split::Rows(1)));
            for expert in 0..experts {
                let home = Home::Expert { layer, expert, of: experts };
                tensors.push(tensor(3, 5, home, Split::Whole));
            }
        }
        if !tied {
            tensors.push(tensor(12, 4, Home::Head, Split::Rows(3)));
        }
        tensors
    }

    /// How often each element of each tensor is held.
    pub fn counts(tensors: &[Tensor], slices: impl Iterator<Item = Slice>) -> Vec<Vec<usize>> {
        let mut counts: Vec<Vec<usize>> =
            tensors.iter().map(|tensor| vec![0; tensor.rows * tensor.cols]).collect();
        for slice in slices {
            for row in slice.rows.clone() {
                for col in slice.cols.clone() {
                    counts[slice.tensor][row * tensors[slice.tensor].cols + col] += 1;
                }
            }
        }
        counts
    }

    pub fn meshes() -> impl Strategy<Value = ([usize; 3], usize, bool)> {
        let sizes = (1usize..4, 1usize..5, 0usize..3);
        (sizes, 4usize..9, any::<bool>()).prop_map(|((groups, pipeline, power), layers, tied)| {
            let expert = 1 << power;
            ([groups * expert, pipeline, expert], layers, tied)
        })
    }

    pub fn layout([data, pipeline, expert]: [usize; 3], layers: usize, v: bool) -> Training {
        let load = Load { layers, experts: 4 };
        let mesh = Mesh::new([data, pipeline, expert], data * pipeline, load).unwrap();
        if v && 2 * pipeline <= layers {
            Training::in_a_v(mesh, layers)
        } else {
            Training::new(mesh, layers)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(120) })]
        #[test]
        fn weights_in_training_tile_each_tensor_once_for_each_of_its_replicas(
            (sizes, layers, tied) in meshes(), v in any::<bool>(),
        ) {
            let (layout, tensors) = (layout(sizes, layers, v), model(layers, 4, tied));
            let ranks = 0..layout.mesh().ranks();
            let counts = counts(&tensors, ranks.clone().flat_map(|rank| layout.weights(rank, &tensors)));
            for (tensor, counts) in tensors.iter().zip(counts) {
                let holder = ranks.clone().find(|rank| layout.holds(*rank, tensor)).unwrap();
                let replicas = layout.replicas(holder, tensor);
                prop_assert!(counts.iter().all(|count| *count == replicas.len()), "{tensor:?} {counts:?}");
                for rank in ranks.clone() {
                    prop_assert_eq!(layout.holds(rank, tensor), replicas.contains(&rank));
                }
            }
        }

        #[test]
        fn moments_tile_each_tensor_once_and_evenly(
            (sizes, layers, tied) in meshes(), v in any::<bool>(),
        ) {
            let (layout, tensors) = (layout(sizes, layers, v), model(layers, 4, tied));
            let mut seen: Vec<Vec<usize>> =
                tensors.iter().map(|tensor| vec![0; tensor.rows * tensor.cols]).collect();
            for rank in 0..layout.mesh().ranks() {
                for run in layout.moments(rank, &tensors) {
                    prop_assert!(layout.holds(rank, &tensors[run.tensor]));
                    run.elements.for_each(|element| seen[run.tensor][element] += 1);
                }
            }
            prop_assert!(seen.iter().flatten().all(|count| *count == 1));
            // Ranks of a stage differ by one element for each group of replicas at most.
            let size = |rank| layout.moments(rank, &tensors).iter().map(|run| run.elements.len()).sum::<usize>();
            for stage in (0..layout.mesh().ranks()).step_by(layout.mesh().data()) {
                let sizes: Vec<usize> = layout.mesh().data_group(stage).into_iter().map(size).collect();
                let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
                prop_assert!(most - least <= 3, "{sizes:?}");
            }
        }
    }

    #[test]
    fn the_paper_s_own_layout_gives_each_rank_its_layers_and_twenty_experts() {
        let load = Load { layers: 60, experts: 160 };
        let mesh = Mesh::new([8, 16, 8], 128, load).unwrap();
        let layout = Training::new(mesh, 60);
        assert_eq!((&layout.layers(0)[0], &layout.layers(15)[0]), (&(0..4), &(57..60)));
        let expert = |expert| Tensor {
            rows: 3072,
            cols: 5120,
            home: Home::Expert { layer: 58, expert, of: 160 },
            split: Split::Whole,
        };
        let held: Vec<usize> = (0..160).filter(|e| layout.holds(8 * 15 + 3, &expert(*e))).collect();
        assert_eq!(held, (60..80).collect::<Vec<_>>());
        assert_eq!(layout.replicas(123, &expert(60)), [123], "one group: nobody else has them");
        let v = Training::in_a_v(Mesh::new([1, 2, 1], 2, load).unwrap(), 8);
        assert_eq!((v.layers(0), v.layers(1)), (vec![0..2, 6..8], vec![2..4, 4..6]));
    }
}
