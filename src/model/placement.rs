//! Where each tensor of a model belongs, as layouts of ranks see it: which layer or expert, and what tensor parallelism
//! may cut it by.
//!
//! Heads are cut where a tensor has rows or columns of its own for each; the inner width of an FFN and the vocabulary by
//! single rows or columns. The latent of MLA, the rope key that all heads share, norms, routers and routed experts stay
//! whole (deepseek_v2.md 4.5).

use super::params::{AttentionIndex, FeedForwardIndex, Layout, MlpIndex};
use crate::cluster::layout::{Home, Split, Tensor};
use crate::config::{Attention, ModelConfig};

/// The tensors of a whole model's layout, in slab order.
pub fn tensors(layout: &Layout, config: &ModelConfig) -> Vec<Tensor> {
    let of = |spec: &super::params::ParamSpec| Tensor {
        rows: spec.rows,
        cols: spec.cols,
        home: Home::Head,
        split: Split::Whole,
    };
    let mut tensors: Vec<Tensor> = layout.specs.iter().map(of).collect();
    let whole = "the layout of a whole model";
    let [embed, norm, head] = [layout.embed, layout.norm, layout.head].map(|i| i.expect(whole));
    tensors[embed].home = if layout.is_tied { Home::Tied } else { Home::Embedding };
    tensors[head].split = if layout.is_tied { Split::Whole } else { Split::Rows(1) };
    for (number, layer) in layout.layers.iter().enumerate() {
        let first = layer.input_norm;
        let end = layout.layers.get(number + 1).map_or(norm, |next| next.input_norm);
        tensors[first..end].iter_mut().for_each(|tensor| tensor.home = Home::Layer(number));
        cut_heads(&mut tensors, &layer.attention, config);
        match &layer.feed_forward {
            FeedForwardIndex::Dense(mlp) => cut_inner(&mut tensors, mlp),
            FeedForwardIndex::Moe { gate_up, down, shared, .. } => {
                let of = config.n_routed_experts;
                for expert in 0..of {
                    let home = Home::Expert { layer: number, expert, of };
                    for index in [
                        gate_up.start + 2 * expert,
                        gate_up.start + 2 * expert + 1,
                        down.start + expert,
                    ] {
                        tensors[index].home = home;
                    }
                }
                shared.iter().for_each(|mlp| cut_inner(&mut tensors, mlp));
            }
        }
    }
    tensors
}

fn cut_heads(tensors: &mut [Tensor], attention: &AttentionIndex, config: &ModelConfig) {
    match attention {
        AttentionIndex::Mla(index) => {
            let query = index.query.map_or(index.down.start, |(_, q_b)| q_b);
            tensors[query].split = Split::Rows(config.query_width());
            tensors[index.kv_b].split = Split::Rows(config.qk_nope_head_dim + config.v_head_dim);
            tensors[index.output].split = Split::Cols(config.v_head_dim);
        }
        AttentionIndex::Gqa(index) => {
            let Attention::Gqa { head_dim, .. } = config.attention() else {
                unreachable!("the layout has the config's attention")
            };
            index.qkv.clone().for_each(|i| tensors[i].split = Split::Rows(head_dim));
            tensors[index.output].split = Split::Cols(head_dim);
        }
    }
}

fn cut_inner(tensors: &mut [Tensor], mlp: &MlpIndex) {
    mlp.gate_up.clone().for_each(|index| tensors[index].split = Split::Rows(1));
    tensors[mlp.down].split = Split::Cols(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::layout::{Sampling, Slice, Training};
    use crate::cluster::mesh::{Load, Mesh};
    use crate::config::load_model;
    use std::path::Path;

    fn preset(name: &str) -> (ModelConfig, Vec<Tensor>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let config = load_model(&folder.join("configs/model").join(name)).unwrap();
        let tensors = tensors(&Layout::new(&config, false), &config);
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
