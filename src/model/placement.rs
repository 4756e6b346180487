//! Where each tensor of a model belongs, as layouts of ranks see it: which layer or expert, and what tensor parallelism
//! may cut it by.
//!
//! Heads are cut where a tensor has rows of its own for each; the inner width of an FFN, the vocabulary, and the outputs of
//! what follows heads and inner width by single rows. The latent of MLA, the rope key that all heads share, norms, routers and routed experts stay
//! whole (deepseek_v2.md 4.5).

use super::params::{AttentionIndex, FeedForwardIndex, LayerIndex, Layout, MlpIndex, ParamSpec};
use crate::cluster::layout::{Home, Share, Split, Tensor};
use crate::config::ModelConfig;

/// The tensors of a whole model, in slab order.
pub fn of_model(config: &ModelConfig, value_head: bool) -> Vec<Tensor> {
    let layout = &Layout::new(config, value_head);
    let of = |(spec, split): (&ParamSpec, Split)| Tensor {
        rows: spec.rows,
        cols: spec.cols,
        home: Home::Head,
        split,
    };
    let splits = splits(&layout.layers, head_of(layout), config, layout.specs.len());
    let mut tensors: Vec<Tensor> = layout.specs.iter().zip(splits).map(of).collect();
    let whole = "the layout of a whole model";
    let [embed, norm] = [layout.embed, layout.norm].map(|index| index.expect(whole));
    tensors[embed].home = if layout.is_tied { Home::Tied } else { Home::Embedding };
    for (number, layer) in layout.layers.iter().enumerate() {
        let first = layer.input_norm;
        let end = layout.layers.get(number + 1).map_or(norm, |next| next.input_norm);
        tensors[first..end].iter_mut().for_each(|tensor| tensor.home = Home::Layer(number));
        if let FeedForwardIndex::Moe { gate_up, down, .. } = &layer.feed_forward {
            let of = config.n_routed_experts;
            for expert in 0..of {
                let home = Home::Expert { layer: number, expert, of };
                let first = gate_up.start + 2 * expert;
                for index in [first, first + 1, down.start + expert] {
                    tensors[index].home = home;
                }
            }
        }
    }
    tensors
}

/// Leaves of the tensors of a layout the rows that a share has of them.
pub fn keep_share(layout: &mut Layout, config: &ModelConfig, share: Share) {
    let splits = splits(&layout.layers, head_of(layout), config, layout.specs.len());
    for (spec, split) in layout.specs.iter_mut().zip(splits) {
        let rows = share.rows(split, spec.of_rows);
        (spec.first_row, spec.rows) = (rows.start, rows.len());
    }
}

/// The vocabulary head, unless it is the embedding.
fn head_of(layout: &Layout) -> Option<usize> {
    layout.head.filter(|_| !layout.is_tied)
}

/// How each of so many tensors is shared.
fn splits(
    layers: &[LayerIndex],
    head: Option<usize>,
    config: &ModelConfig,
    tensors: usize,
) -> Vec<Split> {
    let mut splits = vec![Split::Whole; tensors];
    head.iter().for_each(|head| splits[*head] = Split::Rows(1));
    for layer in layers {
        cut_heads(&mut splits, &layer.attention, config);
        match &layer.feed_forward {
            FeedForwardIndex::Dense(mlp) => cut_inner(&mut splits, mlp),
            FeedForwardIndex::Moe { shared, .. } => {
                shared.iter().for_each(|mlp| cut_inner(&mut splits, mlp));
            }
        }
    }
    splits
}

fn cut_heads(splits: &mut [Split], attention: &AttentionIndex, config: &ModelConfig) {
    let output = match attention {
        AttentionIndex::Mla(index) => {
            let query = index.query.map_or(index.down.start, |(_, q_b)| q_b);
            splits[query] = Split::Rows(config.query_width());
            splits[index.kv_b] = Split::Rows(config.qk_nope_head_dim + config.v_head_dim);
            index.output
        }
        AttentionIndex::Gqa(index) => {
            splits[index.qkv.clone()].fill(Split::Rows(config.query_width()));
            index.output
        }
    };
    splits[output] = Split::Rows(1);
}

fn cut_inner(splits: &mut [Split], mlp: &MlpIndex) {
    splits[mlp.gate_up.clone()].fill(Split::Rows(1));
    splits[mlp.down] = Split::Rows(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::layout::{Sampling, Slice, Training};
    use crate::cluster::mesh::{Load, Mesh};
    use crate::config::{Attention, load_model};
    use std::path::Path;

    fn preset(name: &str) -> (ModelConfig, Vec<Tensor>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let config = load_model(&folder.join("configs/model").join(name)).unwrap();
        let tensors = of_model(&config, false);
        (config, tensors)
    }

    fn elements(slices: &[Slice]) -> usize {
        slices.iter().map(Slice::elements).sum()
    }

    #[test]
    fn deepseek_v2_on_the_paper_s_128_ranks_is_held_once_with_its_experts_and_eight_times_without()
    {
        let (config, tensors) = preset("deepseek-v2.json");
        let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
        let layout = Training::new(Mesh::new([8, 16, 8], 128, load).unwrap(), 60);
        let held: usize = (0..128).map(|rank| elements(&layout.weights(rank, &tensors))).sum();
        let (mut experts, mut rest) = (0, 0);
        for tensor in &tensors {
            let is_expert = matches!(tensor.home, Home::Expert { .. });
            *if is_expert { &mut experts } else { &mut rest } += tensor.rows * tensor.cols;
        }
        // 59 layers of 160 experts of 3 x 5120 x 1536; 235.74 billion in all (deepseek_v2.md, section 2).
        assert_eq!(experts, 59 * 160 * 3 * 5120 * 1536);
        assert_eq!(experts + rest, 235_741_434_880);
        assert_eq!(held, experts + 8 * rest);
    }

    #[test]
    fn tensor_parallelism_halves_heads_and_inner_widths_and_leaves_the_latent_whole() {
        for name in ["deepseek-v2-lite.json", "tiny.json", "deepseek-67b.json"] {
            let (config, tensors) = preset(name);
            let two = Sampling { ranks: 2, tensor: 2, expert: 1 };
            let (first, second) = (two.weights(0, &tensors), two.weights(1, &tensors));
            let cut: usize = tensors
                .iter()
                .filter(|tensor| tensor.split != Split::Whole)
                .map(|tensor| tensor.rows * tensor.cols)
                .sum();
            let all: usize = tensors.iter().map(|tensor| tensor.rows * tensor.cols).sum();
            assert_eq!(elements(&first) + elements(&second), 2 * all - cut, "{name}");
            assert_eq!(elements(&first), elements(&second), "{name}");
            let latent = (config.kv_lora_rank + config.qk_rope_head_dim, config.hidden_size);
            let has_latent = |slice: &Slice| (slice.rows.len(), slice.cols.len()) == latent;
            let is_mla = config.attention() == Attention::Mla;
            assert_eq!(
                first.iter().any(has_latent) && second.iter().any(has_latent),
                is_mla,
                "{name}"
            );
        }
    }
}
