//! How many parameters and tensors a model has (deepseek_v2.md, section 2).

use crate::config::engine::Prefill;
use crate::config::{Attention, ModelConfig};
use rehearsal_kernels::WeightFormat;
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

    let attention_tensors = match (model.attention(), model.q_lora_rank) {
        (Attention::Mla, Some(_)) => 7,
        (Attention::Mla, None) => 5,
        (Attention::Gqa { .. }, _) => 4,
    };
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

/// Parameters of attention in one layer.
fn attention(model: &ModelConfig) -> u64 {
    match model.attention() {
        Attention::Mla => latent_attention(model),
        Attention::Gqa { kv_heads, head_dim } => {
            let queries_and_output = 2 * model.num_attention_heads * head_dim;
            (model.hidden_size * (queries_and_output + 2 * kv_heads * head_dim)) as u64
        }
    }
}

fn latent_attention(model: &ModelConfig) -> u64 {
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
    let latents = match model.attention() {
        Attention::Mla => model.q_lora_rank.unwrap_or(0) + model.kv_lora_rank,
        Attention::Gqa { .. } => 0,
    };
    let norms = model.num_hidden_layers * (2 * model.hidden_size + latents);
    let embedding =
        if model.tie_word_embeddings { 0 } else { model.vocab_size * model.hidden_size };
    parameters(model).total - (norms + model.hidden_size + embedding) as u64
}

/// Parameters of kv_b over all layers, which expand latents into keys and values.
pub fn keys_and_values(model: &ModelConfig) -> u64 {
    if model.attention() != Attention::Mla {
        return 0;
    }
    let per_head = model.qk_nope_head_dim + model.v_head_dim;
    (model.num_hidden_layers * model.kv_lora_rank * model.num_attention_heads * per_head) as u64
}

/// Bytes of a model packed once for the sampler, without scales and what fills panels up: the router stays in f32, and so
/// does kv_b beside products of integers; the head keeps 16 bits but for those; kv_b is there twice where prompts may take either form.
pub fn packed_bytes(model: &ModelConfig, format: WeightFormat, prefill: Prefill) -> u64 {
    let moe_layers = (0..model.num_hidden_layers).filter(|index| model.is_moe(*index)).count();
    let router = (moe_layers * model.n_routed_experts * model.hidden_size) as u64;
    let head = (model.vocab_size * model.hidden_size) as u64;
    let inner = keys_and_values(model);
    let rest = multiplied(model) - router - head - inner;
    let code = format.code_bytes() as u64;
    let (inner_bytes, head_bytes) = match format {
        WeightFormat::Int8 => (4, code),
        _ => (code, code.max(2)),
    };
    let copies = match prefill {
        Prefill::Absorbed => 1,
        Prefill::ByCost => 2,
    };
    4 * router + head_bytes * head + copies * inner_bytes * inner + code * rest
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::{Layout, PackFor, Params, Transformer};
    use super::*;
    use crate::config::load_model;
    use rehearsal_kernels::{Arena, CpuKernels, Kernels, Kind};
    use std::collections::BTreeSet;
    use std::path::Path;
    use std::sync::Arc;

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
        let dense = parameters(&preset("deepseek-67b.json"));
        assert_eq!(dense.total, 67_425_001_472);
        assert_eq!(dense.active, dense.total);
        assert_eq!(dense.active_without_input_embedding, 66_586_140_672);
        assert_eq!(dense.tensors, 95 * 9 + 3);
    }

    #[test]
    fn the_small_pairs_have_the_counts_of_their_recipes() {
        let counts = |name: &str| {
            let counts = parameters(&preset(name));
            (counts.total, counts.active_without_input_embedding)
        };
        assert_eq!(counts("cpu-nano-dense.json"), (7_517_440, 7_386_368));
        assert_eq!(counts("cpu-nano-moe.json"), (22_219_968, 2_445_504));
        assert_eq!(counts("h200-mini-dense.json"), (704_718_336, 654_386_688));
        assert_eq!(counts("h200-mini-moe.json"), (2_572_951_936, 208_019_840));
        assert_eq!(counts("quarter-depth-67b.json"), (18_287_566_848, 17_448_706_048));
        assert_eq!(counts("quarter-depth-v2.json"), (56_996_193_280, 5_605_483_520));
    }

    /// Every model's file, with its name.
    fn presets() -> Vec<(String, ModelConfig)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model");
        let name = |file: std::fs::DirEntry| file.file_name().into_string().unwrap();
        let files = std::fs::read_dir(folder).unwrap().map(|file| name(file.unwrap()));
        files.map(|name| (name.clone(), preset(&name))).collect()
    }

    #[test]
    fn every_preset_has_the_tensors_and_elements_that_are_counted() {
        assert!(presets().len() >= 12);
        for (name, model) in presets() {
            let (layout, counts) = (Layout::new(&model, false), parameters(&model));
            assert_eq!(layout.elements() as u64, counts.total, "{name}");
            assert_eq!(layout.specs.len() as u64, counts.tensors, "{name}");
            let names: BTreeSet<&str> = layout.specs.iter().map(|s| s.name.as_str()).collect();
            assert_eq!(names.len(), layout.specs.len(), "{name}: a tensor is named twice");
        }
    }

    #[test]
    fn what_is_allocated_is_what_is_counted() {
        for name in ["smoke.json", "cpu-nano-dense.json"] {
            let (model, kernels) = (preset(name), CpuKernels::new(1, Arena::new(None)));
            let layout = Arc::new(Layout::new(&model, false));
            let params = Params::new(&kernels, layout, "policy").unwrap();
            assert_eq!(params.slab.whole().len() as u64, parameters(&model).total, "{name}");
            let held = kernels.arena().held_by(Kind::Weights);
            assert!(held >= 4 * parameters(&model).total, "{name}: {held}");
        }
    }

    #[test]
    fn what_is_packed_for_the_sampler_is_what_is_counted_in_every_format() {
        for name in ["tiny.json", "cpu-nano-dense.json"] {
            let model = preset(name);
            for format in WeightFormat::ALL {
                for prefill in [Prefill::Absorbed, Prefill::ByCost] {
                    // An arena of its own, in which no larger region waits to be used again.
                    let kernels = CpuKernels::new(1, Arena::new(None));
                    let transformer = Transformer::new(&kernels, &model, false).unwrap();
                    let layout = transformer.layout.clone();
                    let params = Params::new(&kernels, layout, "policy").unwrap();
                    let pack = PackFor { format, prefill, ..PackFor::SAMPLING };
                    let _packed = transformer.pack(&kernels, &params, "policy", 0, pack).unwrap();
                    // On top come scales, the ends of panels, and sizes that are rounded up to classes.
                    let held = kernels.arena().held_by(Kind::Packed) as f64;
                    let ratio = held / packed_bytes(&model, format, prefill) as f64;
                    let what = format!("{name}, {format:?}, {prefill:?}: {ratio}");
                    assert!((1.0..1.2).contains(&ratio), "{what}");
                }
            }
        }
    }

    #[test]
    fn a_model_without_query_compression_has_one_query_matrix_and_dense_layers_come_first() {
        let names = |preset: &ModelConfig| -> Vec<String> {
            Layout::new(preset, false).specs.into_iter().map(|spec| spec.name).collect()
        };
        let lite = names(&preset("deepseek-v2-lite.json"));
        assert!(lite.contains(&"model.layers.3.self_attn.q_proj.weight".to_string()));
        assert!(!lite.iter().any(|name| name.contains("q_a_") || name.contains("q_b_")));
        let mut deeper = preset("smoke.json");
        (deeper.num_hidden_layers, deeper.first_k_dense_replace) = (4, 3);
        let experts: BTreeSet<char> = names(&deeper)
            .iter()
            .filter(|name| name.contains(".experts."))
            .filter_map(|name| name.strip_prefix("model.layers.")?.chars().next())
            .collect();
        assert_eq!(experts, BTreeSet::from(['3']), "layers 0 to 2 are dense");
    }

    #[test]
    fn parts_of_a_layer_have_the_counts_of_the_paper() {
        assert_eq!(attention(&preset("deepseek-v2.json")), 149_227_520);
        assert_eq!(attention(&preset("deepseek-v2-lite.json")), 13_763_072);
        assert_eq!(attention(&preset("deepseek-67b.json")), 150_994_944);
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
