//! Which tensors a GGUF file of architecture `deepseek2` has, and how each is gathered from the published ones.
//!
//! The newer generation of that layout: kv_b stands split into keys and values. `attn_k_b [n_h, d_c, d_nope]` is each
//! head's key part transposed, `attn_v_b [n_h, d_v, d_c]` its value part, so that llama.cpp can absorb both. The experts
//! of a layer are one tensor of three dimensions. Norms and the router stay f32, as llama.cpp keeps them; so does, in a
//! file of blocks, a tensor whose rows are no whole blocks.

use super::gguf::GgufTensor;
use super::stored::{BLOCK, StoredType};
use crate::config::ModelConfig;
use anyhow::Result;

/// Gives a published tensor by its name.
pub(super) type Read<'a> = dyn Fn(&str) -> Result<Vec<f32>> + 'a;

/// A tensor of the file and where its numbers come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// The tensor.
    pub(super) tensor: GgufTensor,
    /// Its numbers.
    pub(super) gather: Gather,
}

/// How a tensor is gathered, part by part.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Gather {
    /// One published tensor as it is.
    Whole(String),
    /// The key part of kv_b, each head transposed.
    Keys(String, Heads),
    /// The value part of kv_b.
    Values(String, Heads),
    /// One projection of every expert: the names around the expert's number, and how many there are.
    Experts(String, &'static str, usize),
}

/// The rows of kv_b: per head those of the key, then those of the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heads {
    /// Heads n_h.
    pub(super) count: usize,
    /// Rows of the key, d_nope.
    pub(super) key: usize,
    /// Rows of the value, d_v.
    pub(super) value: usize,
    /// Columns d_c.
    pub(super) rank: usize,
}

impl Gather {
    /// The numbers of part `index`, of published tensors that `read` gives; `None` behind the last.
    pub(super) fn part(&self, read: &Read, index: usize) -> Result<Option<Vec<f32>>> {
        let name = match self {
            Gather::Experts(_, _, count) if index >= *count => return Ok(None),
            Gather::Experts(before, after, _) => format!("{before}.{index}.{after}.weight"),
            _ if index > 0 => return Ok(None),
            Gather::Whole(name) | Gather::Keys(name, _) | Gather::Values(name, _) => name.clone(),
        };
        let numbers = read(&name)?;
        Ok(Some(match self {
            Gather::Keys(_, heads) => heads.keys(&numbers),
            Gather::Values(_, heads) => heads.values(&numbers),
            _ => numbers,
        }))
    }
}

impl Heads {
    /// Keys [n_h, d_c, d_nope] of kv_b [n_h (d_nope + d_v), d_c].
    fn keys(self, kv_b: &[f32]) -> Vec<f32> {
        let mut keys = Vec::with_capacity(self.count * self.key * self.rank);
        for head in kv_b.chunks_exact((self.key + self.value) * self.rank) {
            for column in 0..self.rank {
                keys.extend((0..self.key).map(|row| head[row * self.rank + column]));
            }
        }
        keys
    }

    /// Values [n_h, d_v, d_c] of kv_b.
    fn values(self, kv_b: &[f32]) -> Vec<f32> {
        let head = (self.key + self.value) * self.rank;
        kv_b.chunks_exact(head).flat_map(|head| &head[self.key * self.rank..]).copied().collect()
    }
}

/// The tensors of a model's file in the order in which they lie; matrices are stored as `wanted`.
pub(super) fn plan(config: &ModelConfig, wanted: StoredType) -> Vec<Planned> {
    let mut plan = Plan { tensors: Vec::new(), wanted };
    let (d, vocabulary) = (config.hidden_size, config.vocab_size);
    plan.copy("token_embd", "model.embed_tokens", &[vocabulary, d]);
    for layer in 0..config.num_hidden_layers {
        plan.attention(config, layer);
        plan.feed_forward(config, layer);
    }
    plan.copy("output_norm", "model.norm", &[d]);
    if !config.tie_word_embeddings {
        plan.copy("output", "lm_head", &[vocabulary, d]);
    }
    plan.tensors
}

struct Plan {
    tensors: Vec<Planned>,
    wanted: StoredType,
}

impl Plan {
    fn push(&mut self, name: &str, shape: &[usize], gather: Gather) {
        let row = *shape.last().expect("a tensor has dimensions");
        let whole = self.wanted != StoredType::Q8_0 || row.is_multiple_of(BLOCK);
        let stays = shape.len() == 1 || name.ends_with("ffn_gate_inp") || !whole;
        let stored = if stays { StoredType::F32 } else { self.wanted };
        let tensor = GgufTensor { name: format!("{name}.weight"), shape: shape.to_vec(), stored };
        self.tensors.push(Planned { tensor, gather });
    }

    fn copy(&mut self, name: &str, published: &str, shape: &[usize]) {
        self.push(name, shape, Gather::Whole(format!("{published}.weight")));
    }

    fn attention(&mut self, config: &ModelConfig, layer: usize) {
        let (block, from) = (format!("blk.{layer}"), format!("model.layers.{layer}"));
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let queries = heads * config.query_width();
        let rank = config.kv_lora_rank;
        let own = |name: &str| format!("{from}.self_attn.{name}");
        self.copy(&format!("{block}.attn_norm"), &format!("{from}.input_layernorm"), &[d]);
        match config.q_lora_rank {
            None => self.copy(&format!("{block}.attn_q"), &own("q_proj"), &[queries, d]),
            Some(width) => {
                self.copy(&format!("{block}.attn_q_a"), &own("q_a_proj"), &[width, d]);
                self.copy(&format!("{block}.attn_q_a_norm"), &own("q_a_layernorm"), &[width]);
                self.copy(&format!("{block}.attn_q_b"), &own("q_b_proj"), &[queries, width]);
            }
        }
        let down = [config.cache_width(), d];
        self.copy(&format!("{block}.attn_kv_a_mqa"), &own("kv_a_proj_with_mqa"), &down);
        self.copy(&format!("{block}.attn_kv_a_norm"), &own("kv_a_layernorm"), &[rank]);
        let (key, value) = (config.qk_nope_head_dim, config.v_head_dim);
        let (kv_b, split) =
            (format!("{}.weight", own("kv_b_proj")), Heads { count: heads, key, value, rank });
        let keys = Gather::Keys(kv_b.clone(), split);
        self.push(&format!("{block}.attn_k_b"), &[heads, rank, key], keys);
        self.push(&format!("{block}.attn_v_b"), &[heads, value, rank], Gather::Values(kv_b, split));
        self.copy(&format!("{block}.attn_output"), &own("o_proj"), &[d, heads * value]);
        self.copy(&format!("{block}.ffn_norm"), &format!("{from}.post_attention_layernorm"), &[d]);
    }

    fn feed_forward(&mut self, config: &ModelConfig, layer: usize) {
        let (block, from) = (format!("blk.{layer}"), format!("model.layers.{layer}.mlp"));
        let d = config.hidden_size;
        if !config.is_moe(layer) {
            return self.swiglu(&block, "", &from, d, config.intermediate_size);
        }
        let (count, width) = (config.n_routed_experts, config.moe_intermediate_size);
        self.copy(&format!("{block}.ffn_gate_inp"), &format!("{from}.gate"), &[count, d]);
        let experts = format!("{from}.experts");
        for (name, projection, rows, cols) in [
            ("gate", "gate_proj", width, d),
            ("up", "up_proj", width, d),
            ("down", "down_proj", d, width),
        ] {
            let gather = Gather::Experts(experts.clone(), projection, count);
            self.push(&format!("{block}.ffn_{name}_exps"), &[count, rows, cols], gather);
        }
        let shared = config.shared_width();
        self.swiglu(&block, "_shexp", &format!("{from}.shared_experts"), d, shared);
    }

    fn swiglu(&mut self, block: &str, suffix: &str, from: &str, d: usize, width: usize) {
        for (name, rows, cols) in [("gate", width, d), ("up", width, d), ("down", d, width)] {
            self.copy(
                &format!("{block}.ffn_{name}{suffix}"),
                &format!("{from}.{name}_proj"),
                &[rows, cols],
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_model;

    fn published(name: &str) -> ModelConfig {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model");
        load_model(&folder.join(name)).expect("a published config")
    }

    #[test]
    fn the_published_models_have_the_tensors_and_numbers_that_llama_cpp_counts() {
        // 959 and 377 are the counts of files with one kv_b a layer; the split adds one a layer.
        for (name, tensors, numbers) in [
            ("deepseek-v2.json", 959 + 60, 235_741_434_880_usize),
            ("deepseek-v2-lite.json", 377 + 27, 15_706_484_224),
        ] {
            let plan = plan(&published(name), StoredType::Bf16);
            assert_eq!(plan.len(), tensors, "{name}");
            let all: usize = plan.iter().map(|p| p.tensor.shape.iter().product::<usize>()).sum();
            assert_eq!(all, numbers, "{name}");
        }
    }

    #[test]
    fn keys_and_values_of_each_head_make_its_rows_of_kv_b_again() {
        let heads = Heads { count: 3, key: 2, value: 4, rank: 5 };
        let kv_b: Vec<f32> = (0..3 * 6 * 5).map(|i| i as f32).collect();
        let (keys, values) = (heads.keys(&kv_b), heads.values(&kv_b));
        let mut again = Vec::new();
        for head in 0..3 {
            for row in 0..2 {
                again.extend((0..5).map(|column| keys[(head * 5 + column) * 2 + row]));
            }
            again.extend_from_slice(&values[head * 20..][..20]);
        }
        assert_eq!(again, kv_b);
    }

    #[test]
    fn norms_the_router_and_broken_rows_stay_f32() {
        let mut config = published("deepseek-v2-lite.json");
        config.qk_nope_head_dim = 40;
        let plan = plan(&config, StoredType::Q8_0);
        let kind = |name: &str| {
            let found = plan.iter().find(|p| p.tensor.name == format!("{name}.weight"));
            found.expect("a planned tensor").tensor.stored
        };
        for name in ["blk.1.attn_norm", "output_norm", "blk.1.ffn_gate_inp", "blk.1.attn_k_b"] {
            assert_eq!(kind(name), StoredType::F32, "{name}");
        }
        for name in ["token_embd", "output", "blk.1.attn_v_b", "blk.1.ffn_down_exps"] {
            assert_eq!(kind(name), StoredType::Q8_0, "{name}");
        }
    }
}
