//! How many parameters and tensors a model has (deepseek_v2.md, section 2).

use crate::config::ModelConfig;
use serde::Serialize;

/// Counts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// All parameters.
    pub total: u64,
    /// Parameters that one token passes: K_r of the N_r routed experts, everything else whole.
    pub active: u64,
    /// The same without the rows that are only looked up: what "21B active" counts.
    pub active_without_input_embedding: u64,
    /// Tensors of a published checkpoint.
    pub tensors: u64,
}

/// Counts a model.
pub fn parameters(model: &ModelConfig) -> Parameters {
    let (hidden, layers) = (model.hidden_size as u64, model.num_hidden_layers as u64);
    let embedding = model.vocab_size as u64 * hidden;
    let expert = 3 * hidden * model.moe_intermediate_size as u64;
    let moe_layers =
        (0..model.num_hidden_layers).filter(|index| model.is_moe(*index)).count() as u64;
    let dense_layers = layers - moe_layers;

    // Everything but the routed experts: the same in both counts.
    let always = hidden
        + layers * (attention(model) + 2 * hidden)
        + dense_layers * 3 * hidden * model.intermediate_size as u64
        + moe_layers
            * (model.n_shared_experts as u64 * expert + model.n_routed_experts as u64 * hidden);
    let experts = |count: usize| moe_layers * count as u64 * expert;
    // A tied matrix is one tensor, and a token passes it as the head.
    let (matrices, looked_up) = if model.tie_word_embeddings { (1, 0) } else { (2, embedding) };
    let active = matrices * embedding + always + experts(model.num_experts_per_tok);

    let attention_tensors = if model.q_lora_rank.is_some() { 7 } else { 5 };
    let moe_tensors =
        1 + 3 * model.n_routed_experts as u64 + if model.n_shared_experts > 0 { 3 } else { 0 };
    Parameters {
        total: matrices * embedding + always + experts(model.n_routed_experts),
        active,
        active_without_input_embedding: active - looked_up,
        tensors: matrices
            + 1
            + layers * (2 + attention_tensors)
            + dense_layers * 3
            + moe_layers * moe_tensors,
    }
}

/// Parameters of MLA in one layer.
fn attention(model: &ModelConfig) -> u64 {
    let (hidden, heads, latent) =
        (model.hidden_size, model.num_attention_heads, model.kv_lora_rank);
    let queries = heads * model.query_width();
    let query = match model.q_lora_rank {
        Some(rank) => hidden * rank + rank + rank * queries,
        None => hidden * queries,
    };
    let keys_and_values = latent * heads * (model.qk_nope_head_dim + model.v_head_dim);
    (query
        + hidden * model.cache_width()
        + latent
        + keys_and_values
        + heads * model.v_head_dim * hidden) as u64
}

/// Parameters of the matrices that are multiplied with, and so are packed: all but norms and the input embedding.
pub fn multiplied(model: &ModelConfig) -> u64 {
    let norms = model.num_hidden_layers
        * (2 * model.hidden_size + model.q_lora_rank.unwrap_or(0) + model.kv_lora_rank);
    let embedding =
        if model.tie_word_embeddings { 0 } else { model.vocab_size * model.hidden_size };
    parameters(model).total - (norms + model.hidden_size + embedding) as u64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::load_model;
    use std::path::Path;

    pub fn preset(name: &str) -> ModelConfig {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        load_model(&folder.join("configs/model").join(name)).unwrap()
    }

    #[test]
    fn the_published_models_have_their_published_counts() {
        let v2 = parameters(&preset("deepseek-v2.json"));
        assert_eq!(v2.total, 235_741_434_880);
        assert_eq!(v2.active, 21_375_800_320);
        assert_eq!(v2.active_without_input_embedding, 20_851_512_320);
        assert_eq!(v2.tensors, 29_102);
        let lite = parameters(&preset("deepseek-v2-lite.json"));
        assert_eq!(lite.total, 15_706_484_224);
        assert_eq!(lite.active, 2_661_150_208);
        assert_eq!(lite.active_without_input_embedding, 2_451_435_008);
        assert_eq!(lite.tensors, 5_291);
    }

    #[test]
    fn parts_of_a_layer_have_the_counts_of_the_paper() {
        assert_eq!(attention(&preset("deepseek-v2.json")), 149_227_520);
        assert_eq!(attention(&preset("deepseek-v2-lite.json")), 13_763_072);
    }

    #[test]
    fn the_quickstart_model_has_the_counts_of_its_recipe() {
        let counts = parameters(&preset("quickstart.json"));
        assert_eq!((counts.total, counts.active), (896_208, 601_296));
        assert_eq!(counts.active_without_input_embedding, 535_760);
    }

    #[test]
    fn a_tied_head_is_counted_once_and_passed_by_every_token() {
        let model = preset("quickstart.json");
        let tied = parameters(&ModelConfig { tie_word_embeddings: true, ..model.clone() });
        let plain = parameters(&model);
        assert_eq!(plain.total - tied.total, 512 * 128);
        assert_eq!(tied.active_without_input_embedding, tied.active);
        assert_eq!(plain.tensors - tied.tensors, 1);
    }
}
