//! What a pass through a piece of the stack computes and sends, for each of its tokens.
//!
//! FLOPs are those of `model::cost`, taken apart by layer (the sum over pieces is tested to be theirs). A rate turns them
//! into seconds: with `[cluster.hardware]` a share of the peak for layers with experts and another for all else; without it
//! one FLOP takes one unit, which is enough for shares.

use crate::cluster::layout::Training;
use crate::config::{Dtype, HardwareConfig, ModelConfig};
use crate::engine::weight_format;
use crate::model::cost::{forward_flops_per_token, head_flops};
use crate::model::parameters;
use crate::train::pipeline::Times;

/// FLOPs of a token's forward pass through a layer or the head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flops {
    /// Products with weights.
    pub linear: f64,
    /// Attention's scores and sums, in the mean over a causal sequence.
    pub scores: f64,
}

/// One layer, or the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A layer without experts.
    Dense,
    /// A layer with experts.
    Moe,
    /// The last norm and the vocabulary's head.
    Head,
}

/// A model with what is assumed of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// `[cluster.hardware]`.
    pub hardware: Option<&'a HardwareConfig>,
    /// Ranks that share a layer's experts.
    pub expert: usize,
}

/// A token's share of the passes of a piece.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Passes {
    /// Seconds of the forward pass.
    pub forward: f64,
    /// Of the gradients of its activations.
    pub backward_input: f64,
    /// Of the gradients of its weights.
    pub backward_weight: f64,
    /// Seconds of shared experts in a forward pass, and as many in the gradients of activations: what is computed while tokens
    /// travel.
    pub shared: f64,
    /// Bytes that a rank sends to others in the exchanges of a forward pass, and as many in the gradients of activations.
    pub exchanged: f64,
    /// Exchanges of a forward pass: two for each layer with experts.
    pub exchanges: usize,
}

impl Passes {
    /// The passes of so many tokens, with what exchanges take beyond the shared experts' time at a rate and a latency.
    pub fn times(&self, tokens: f64, rate: f64, latency: f64) -> (Times, f64) {
        let travel = tokens * self.exchanged / rate + self.exchanges as f64 * latency;
        let exposed = (travel - tokens * self.shared).max(0.0);
        let times = Times {
            forward: tokens * self.forward,
            backward_input: tokens * self.backward_input,
            backward_weight: tokens * self.backward_weight,
        };
        (times, exposed)
    }
}

impl Load<'_> {
    /// FLOPs of a part for a token of sequences of a length.
    pub fn flops(&self, part: Part, sequence: usize) -> Flops {
        let model = self.model;
        let scores_of = |sequence| {
            let linear = 2.0 * parameters(model).active_without_input_embedding as f64;
            (forward_flops_per_token(model, sequence) - linear) / model.num_hidden_layers as f64
        };
        match part {
            Part::Head => {
                Flops { linear: head_flops(model) + 2.0 * model.hidden_size as f64, scores: 0.0 }
            }
            Part::Dense | Part::Moe => {
                Flops { linear: 2.0 * self.layer(part) as f64, scores: scores_of(sequence) }
            }
        }
    }

    /// Parameters of a layer that one token passes.
    fn layer(&self, part: Part) -> u64 {
        let model = self.model;
        let head = (model.vocab_size * model.hidden_size + model.hidden_size) as u64;
        let experts =
            |count: usize| (3 * model.hidden_size * model.moe_intermediate_size * count) as u64;
        let inner = |moe: bool| match moe {
            true => {
                experts(model.n_shared_experts + model.num_experts_per_tok)
                    + (model.n_routed_experts * model.hidden_size) as u64
            }
            false => (3 * model.hidden_size * model.intermediate_size) as u64,
        };
        // What is left of all layers when the inner parts are taken away is the same in each.
        let inners: u64 =
            (0..model.num_hidden_layers).map(|layer| inner(model.is_moe(layer))).sum();
        let layers = parameters(model).active_without_input_embedding - head;
        (layers - inners) / model.num_hidden_layers as u64 + inner(part == Part::Moe)
    }

    /// FLOPs a second of a part. The efficiencies count products with weights alone, at one length of sequences.
    fn rate(&self, part: Part) -> f64 {
        let Some(hardware) = self.hardware else { return 1.0 };
        let share = match part {
            Part::Moe => hardware.moe_efficiency,
            Part::Dense | Part::Head => hardware.dense_efficiency,
        };
        let Flops { linear, scores } = self.flops(part, hardware.efficiency_sequence);
        share * hardware.peak_flops * (linear + scores) / linear
    }

    /// Seconds of a token's forward pass through a part, its products with weights and all of it.
    pub fn seconds(&self, part: Part, sequence: usize) -> (f64, f64) {
        let Flops { linear, scores } = self.flops(part, sequence);
        let rate = self.rate(part);
        (linear / rate, (linear + scores) / rate)
    }

    /// Bytes of a number that is computed with.
    pub fn number_bytes(&self) -> f64 {
        self.hardware.map_or(4, |hardware| hardware.compute_dtype.bytes()) as f64
    }

    /// Bytes of a weight that rollouts are sampled from in a type.
    pub fn code_bytes(&self, dtype: Dtype) -> u64 {
        let own = self.number_bytes() as u64;
        match dtype {
            Dtype::F32 => own,
            other => own.min(weight_format(other).code_bytes() as u64),
        }
    }

    /// Ranks that a token goes to at most: K experts on at most M devices of the router.
    pub fn destinations(&self) -> usize {
        let model = self.model;
        let most = self.expert.min(model.num_experts_per_tok);
        if model.n_group <= 1 || model.topk_group >= model.n_group {
            return most;
        }
        // A device of the router is a part of a rank, or is cut over several of them.
        most.min(model.topk_group * self.expert.div_ceil(model.n_group))
    }

    /// Bytes that a token's way to its experts sends to other ranks, in one layer and in one direction: at most M copies,
    /// of which one in E stays where it is.
    pub fn exchange_bytes(&self) -> f64 {
        let others = (self.expert - 1) as f64 / self.expert as f64;
        self.destinations() as f64 * others * self.model.hidden_size as f64 * self.number_bytes()
    }

    /// The same with a row for each of a token's K experts.
    pub fn expert_bytes(&self) -> f64 {
        let others = (self.expert - 1) as f64 / self.expert as f64;
        let rows = self.model.num_experts_per_tok as f64;
        rows * others * self.model.hidden_size as f64 * self.number_bytes()
    }

    /// The passes of a piece, for each token of sequences of a length.
    pub fn passes(&self, layout: &Training, stage: usize, chunk: usize, sequence: usize) -> Passes {
        let layers = layout.layers(stage)[chunk].clone();
        let has_head =
            layers.end == self.model.num_hidden_layers && (stage, chunk) == layout.last_piece();
        let mut passes = Passes::default();
        let parts =
            layers.map(|layer| if self.model.is_moe(layer) { Part::Moe } else { Part::Dense });
        for part in parts.chain(has_head.then_some(Part::Head)) {
            let (weights, all) = self.seconds(part, sequence);
            // Gradients of inputs repeat both products of the scores; weights have no part in those.
            passes.forward += all;
            passes.backward_input += 2.0 * all - weights;
            passes.backward_weight += weights;
            if part == Part::Moe && self.expert > 1 {
                let shared = (3 * self.model.hidden_size * self.model.shared_width()) as f64;
                passes.shared += 2.0 * shared / self.rate(part);
                passes.exchanged += 2.0 * self.exchange_bytes();
                passes.exchanges += 2;
            }
        }
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::mesh::{self, Mesh};
    use crate::model::flops_per_token;
    use crate::model::parameters::tests::preset;

    fn layout(model: &ModelConfig, pipeline: usize, v: bool) -> Training {
        let load = mesh::Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
        let mesh = Mesh::new([1, pipeline, 1], pipeline, load).unwrap();
        match v {
            true => Training::in_a_v(mesh, model.num_hidden_layers),
            false => Training::new(mesh, model.num_hidden_layers),
        }
    }

    #[test]
    fn the_pieces_of_a_model_have_its_flops_however_it_is_cut() {
        for name in ["deepseek-v2.json", "deepseek-67b.json", "deepseek-v2-lite.json", "tiny.json"]
        {
            let model = preset(name);
            let load = Load { model: &model, hardware: None, expert: 1 };
            for (pipeline, v) in [(1, false), (4, false), (16, false), (3, true), (13, true)] {
                if pipeline * (1 + usize::from(v)) > model.num_hidden_layers {
                    continue;
                }
                let layout = layout(&model, pipeline, v);
                let pieces = (0..pipeline)
                    .flat_map(|stage| (0..1 + usize::from(v)).map(move |chunk| (stage, chunk)));
                let sum: f64 = pieces
                    .map(|(stage, chunk)| load.passes(&layout, stage, chunk, 4096))
                    .map(|p| p.forward + p.backward_input + p.backward_weight)
                    .sum();
                let whole = flops_per_token(&model, 4096);
                assert!((sum / whole - 1.0).abs() < 1e-12, "{name} {pipeline} {v}: {sum} {whole}");
            }
        }
    }

    #[test]
    fn a_token_of_v2_goes_to_three_of_eight_ranks_at_most() {
        let model = preset("deepseek-v2.json");
        let of = |expert| Load { model: &model, hardware: None, expert };
        // 8 devices of the router, M = 3, K = 6.
        for (expert, most) in [(1, 1), (2, 2), (4, 3), (8, 3), (16, 6), (80, 6)] {
            assert_eq!(of(expert).destinations(), most, "{expert}");
        }
        assert_eq!(of(8).exchange_bytes(), 3.0 * 7.0 / 8.0 * 5120.0 * 4.0);
        let dense = preset("deepseek-v2-lite.json");
        assert_eq!(Load { model: &dense, hardware: None, expert: 8 }.destinations(), 6);
    }

    #[test]
    fn exchanges_are_exposed_as_far_as_shared_experts_are_shorter() {
        let passes = Passes { shared: 2.0, exchanged: 30.0, exchanges: 2, ..Passes::default() };
        let exposed = |rate| passes.times(4.0, rate, 0.5).1;
        assert_eq!(exposed(10.0), 12.0 + 1.0 - 8.0);
        assert_eq!(exposed(1000.0), 0.0);
    }
}
