//! What tokens cost: FLOPs of their forward passes, and the weights that a pass of the sampler reads.
//!
//! Arithmetic on the config alone, as far as a figure does not depend on how it is computed: attention is counted in its
//! expanded form, whichever form runs.

use super::parameters::{multiplied, parameters};
use crate::config::{Attention, ModelConfig};

/// FLOPs of the forward pass of `count` tokens behind the `first` ones of their causal sequence: 2 for each active
/// parameter that a token passes, and 2 for each element of query, key and value for every token that it sees.
pub fn forward_flops(model: &ModelConfig, first: usize, count: usize) -> f64 {
    let weights = 2.0 * parameters(model).active_without_input_embedding as f64;
    let widths = model.num_attention_heads * (model.query_width() + model.value_width());
    let each = model.num_hidden_layers as f64 * 2.0 * widths as f64;
    // Token number i, from 0, sees itself and the i before it.
    let seen = count as f64 * (2.0 * first as f64 + count as f64 + 1.0) / 2.0;
    weights * count as f64 + each * seen
}

/// Numbers that each of `ranks` ranks of a tensor group sends the others for a row, the mean over ranks: in the layers
/// (outputs of heads and of W_O, inner widths and outputs of FFNs, rows with their experts' outputs), and for its logits.
/// What tokens to experts take comes on top.
pub fn tensor_elements_sent(model: &ModelConfig, ranks: usize) -> [f64; 2] {
    let d = model.hidden_size;
    let heads = model.num_attention_heads * model.value_width();
    let layer = |layer: usize| {
        let inner = match model.is_moe(layer) {
            false => model.intermediate_size as f64 + d as f64,
            true if model.n_shared_experts == 0 => d as f64,
            // Of a row with its experts' outputs each rank gets the columns that it goes on with.
            true => (model.shared_width() + d) as f64 + d as f64 / ranks as f64,
        };
        (heads + d) as f64 + inner
    };
    let logits = if model.tie_word_embeddings { 0 } else { model.vocab_size };
    let layers = (0..model.num_hidden_layers).map(layer).sum::<f64>();
    [layers, logits as f64].map(|all| all * (ranks - 1) as f64 / ranks as f64)
}

/// FLOPs of a token's forward pass, the mean over a causal sequence.
pub fn forward_flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    let sequence = sequence.max(1);
    forward_flops(model, 0, sequence) / sequence as f64
}

/// FLOPs of a token in training: one forward pass, and two as long for the gradients of inputs and weights.
pub fn flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    3.0 * forward_flops_per_token(model, sequence)
}

/// FLOPs of the vocabulary's head, which the forward pass of a token includes and a scalar head does without.
pub fn head_flops(model: &ModelConfig) -> f64 {
    2.0 * (model.vocab_size * model.hidden_size) as f64
}

/// FLOPs of a decoded token that sees `seen` tokens in the cache, itself included: queries are absorbed into latents.
pub fn decode_flops(model: &ModelConfig, seen: f64) -> f64 {
    let width = match model.attention() {
        Attention::Mla => 2 * model.kv_lora_rank + model.qk_rope_head_dim,
        Attention::Gqa { .. } => model.query_width() + model.value_width(),
    };
    let each = model.num_hidden_layers * 2 * model.num_attention_heads * width;
    2.0 * parameters(model).active_without_input_embedding as f64 + each as f64 * seen
}

/// Weights that a pass over so many decoded rows reads at least: all that it multiplies with, but of the E routed
/// experts those that some row goes to. If each row chose its K anew, E (1 - (1 - K/E)^rows) of them.
pub fn weights_read(model: &ModelConfig, rows: usize) -> f64 {
    let layers = (0..model.num_hidden_layers).filter(|index| model.is_moe(*index)).count() as f64;
    let expert = 3.0 * (model.hidden_size * model.moe_intermediate_size) as f64;
    let experts = model.n_routed_experts as f64;
    let all = multiplied(model) as f64;
    if layers == 0.0 {
        return all;
    }
    let untouched = (1.0 - model.num_experts_per_tok as f64 / experts).powi(rows as i32);
    all - layers * expert * experts * untouched
}

#[cfg(test)]
mod tests {
    use super::super::parameters::tests::preset;
    use super::*;

    /// One layer of each kind, every width told.
    fn small() -> ModelConfig {
        let text = r#"{"vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1,
            "intermediate_size": 6, "moe_intermediate_size": 3, "n_routed_experts": 4, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "num_attention_heads": 2, "kv_lora_rank": 5, "qk_nope_head_dim": 3,
            "qk_rope_head_dim": 2, "v_head_dim": 3, "max_position_embeddings": 64}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn v2_trains_at_155_gigaflops_a_token_and_67b_at_419() {
        for (name, gigaflops) in [("deepseek-v2.json", "155.3"), ("deepseek-67b.json", "418.6")] {
            let found = flops_per_token(&preset(name), 4096) / 1e9;
            assert_eq!(format!("{found:.1}"), gigaflops, "{name}");
        }
    }

    #[test]
    fn the_quickstart_trains_at_the_megaflops_of_its_recipe() {
        let megaflops = flops_per_token(&preset("quickstart.json"), 64) / 1e6;
        assert!((megaflops - 3.39).abs() < 0.05, "{megaflops}");
    }

    #[test]
    fn the_flops_of_three_tokens_are_those_counted_by_hand() {
        let model = small();
        // Attention of a layer: queries 4x10, latent and rope key 4x7 and its norm 5, keys and values 5x12, output 6x4.
        let attention = 40 + 28 + 5 + 60 + 24;
        let norms = 2 * 2 * 4 + 4;
        // Router 4x4, two routed and one shared expert of 3x4x3; the dense layer 3x4x6; the head 10x4.
        let active = (2 * attention + norms + 16 + 3 * 36 + 72 + 40) as f64;
        // Two layers, two heads, widths 5 and 3: 64 FLOPs for each token that is seen. Tokens 4 and 5 see 5 and 6.
        assert_eq!(forward_flops(&model, 4, 2), 2.0 * 2.0 * active + 64.0 * (5.0 + 6.0));
        let whole = forward_flops(&model, 0, 4) + forward_flops(&model, 4, 2);
        assert_eq!(forward_flops(&model, 0, 6), whole);
        assert_eq!(6.0 * forward_flops_per_token(&model, 6), whole);
        assert_eq!(head_flops(&model), 80.0);
        // Absorbed: two heads of 2x5+2.
        assert_eq!(decode_flops(&model, 7.0), 2.0 * active + (2 * 2 * 2 * 12) as f64 * 7.0);
    }

    #[test]
    fn a_pass_reads_the_experts_that_its_rows_go_to() {
        let model = small();
        let all = multiplied(&model) as f64;
        // K/E is a half: one row leaves two of four experts of 36 weights, two rows one, many none.
        assert_eq!(weights_read(&model, 1), all - 72.0);
        assert_eq!(weights_read(&model, 2), all - 36.0);
        assert!(all - weights_read(&model, 64) < 1e-9);
        let dense = preset("cpu-nano-dense.json");
        assert_eq!(weights_read(&dense, 1), multiplied(&dense) as f64);
    }
}
