//! The keys that describe a model in a GGUF file of architecture `deepseek2`, and the models that llama.cpp would compute
//! otherwise than we do, each refused with its reason.
//!
//! What llama.cpp does was read in its source (`models/deepseek2.cpp`, `llama-graph.cpp`, `llama-context.cpp`) and is
//! measured by `tests/oracle/check_gguf.py`.

use super::gguf::GgufValue;
use super::stored::StoredType;
use crate::config::model::{ScoringFunc, TopkMethod};
use crate::config::{Attention, Fault, ModelConfig, RopeScaling};
use anyhow::Result;

const ARCHITECTURE: &str = "deepseek2";
const MOST_LAYERS: usize = 512;
const MOST_EXPERTS: usize = 1024;

/// Keys of a file, in order.
pub(super) type Keys = Vec<(String, GgufValue)>;

/// The keys of a model called `name`, whose matrices are stored as `stored`.
pub(super) fn model_keys(config: &ModelConfig, name: &str, stored: StoredType) -> Result<Keys> {
    if let Some(reason) = differs(config) {
        return Err(Fault::user(format!(
            "no GGUF of this model: {reason}; a Hugging Face folder (--format hf) keeps it as it is"
        )));
    }
    let mut keys = general_keys(name, stored);
    let mut add = |key: &str, value| keys.push((format!("{ARCHITECTURE}.{key}"), value));
    let whole = |number: usize| GgufValue::U32(u32::try_from(number).expect("sizes are checked"));
    let real = |number: f64| GgufValue::F32(number as f32);
    add("block_count", whole(config.num_hidden_layers));
    add("context_length", whole(config.max_position_embeddings));
    add("embedding_length", whole(config.hidden_size));
    add("feed_forward_length", whole(config.intermediate_size));
    add("vocab_size", whole(config.vocab_size));
    add("attention.head_count", whole(config.num_attention_heads));
    // Absorbed, the attention is one of many heads over one: the latent and the rotated key.
    add("attention.head_count_kv", whole(1));
    add("attention.key_length", whole(config.cache_width()));
    add("attention.value_length", whole(config.kv_lora_rank));
    add("attention.key_length_mla", whole(config.query_width()));
    add("attention.value_length_mla", whole(config.v_head_dim));
    add("attention.kv_lora_rank", whole(config.kv_lora_rank));
    if let Some(rank) = config.q_lora_rank {
        add("attention.q_lora_rank", whole(rank));
    } else if !taken_for_lite(config) {
        // llama.cpp wants the key of every model that it does not take for V2-Lite; 0 is none.
        add("attention.q_lora_rank", whole(0));
    }
    add("attention.layer_norm_rms_epsilon", real(config.rms_norm_eps));
    add("rope.dimension_count", whole(config.qk_rope_head_dim));
    add("rope.freq_base", real(config.rope_theta));
    if let Some(yarn) = &config.rope_scaling {
        add("rope.scaling.type", GgufValue::Text("yarn".to_string()));
        add("rope.scaling.factor", real(yarn.factor));
        let original = whole(yarn.original_max_position_embeddings);
        add("rope.scaling.original_context_length", original);
        // Multiplied with 0.1 for reasons of history; llama.cpp divides by it.
        add("rope.scaling.yarn_log_multiplier", real(0.1 * yarn.mscale_all_dim));
    }
    let has_experts = config.n_routed_experts > 0;
    let dense = if has_experts { config.first_k_dense_replace } else { config.num_hidden_layers };
    let width = if has_experts { config.moe_intermediate_size } else { config.intermediate_size };
    add("leading_dense_block_count", whole(dense));
    add("expert_feed_forward_length", whole(width));
    add("expert_shared_count", whole(if has_experts { config.n_shared_experts } else { 0 }));
    if has_experts {
        add("expert_count", whole(config.n_routed_experts));
        add("expert_used_count", whole(config.num_experts_per_tok));
        // Ours is either the sum or the factor; llama.cpp would apply both.
        let factor = if config.norm_topk_prob { 1.0 } else { config.routed_scaling_factor };
        add("expert_weights_scale", real(factor));
        add("expert_weights_norm", GgufValue::Bool(config.norm_topk_prob));
        let ScoringFunc::Softmax = config.scoring_func;
        add("expert_gating_func", whole(1));
    }
    Ok(keys)
}

fn general_keys(name: &str, stored: StoredType) -> Keys {
    let file_type = match stored {
        StoredType::F32 => 0,
        StoredType::Q8_0 => 7,
        StoredType::Bf16 => 32,
    };
    let text = |text: &str| GgufValue::Text(text.to_string());
    vec![
        ("general.architecture".to_string(), text(ARCHITECTURE)),
        ("general.type".to_string(), text("model")),
        ("general.name".to_string(), text(name)),
        ("general.file_type".to_string(), GgufValue::U32(file_type)),
        ("general.quantization_version".to_string(), GgufValue::U32(2)),
    ]
}

/// Why llama.cpp would compute another model, or load none.
fn differs(config: &ModelConfig) -> Option<String> {
    if config.attention() != Attention::Mla {
        return Some(
            "its model_type is llama, and only deepseek_v2 is written in that format".to_string(),
        );
    }
    let limited =
        config.topk_method == TopkMethod::GroupLimitedGreedy && config.topk_group < config.n_group;
    if config.n_routed_experts > 0 && limited {
        return Some(format!(
            "its routing is limited to topk_group = {} of n_group = {} groups by their best expert, and llama.cpp \
             ranks groups by the sum of their best two",
            config.topk_group, config.n_group
        ));
    }
    let moe = |layer: &usize| config.is_moe(*layer);
    let odd = (config.first_k_dense_replace..config.num_hidden_layers).find(|layer| !moe(layer));
    if let Some(layer) = odd.filter(|_| config.n_routed_experts > 0) {
        return Some(format!(
            "layer {layer} is dense by moe_layer_freq = {}, and llama.cpp knows dense layers at the beginning alone",
            config.moe_layer_freq
        ));
    }
    if (0..config.num_hidden_layers).any(|layer| moe(&layer)) && config.n_shared_experts == 0 {
        return Some(
            "n_shared_experts = 0, and llama.cpp loads no deepseek2 model without shared experts"
                .to_string(),
        );
    }
    if config.num_hidden_layers > MOST_LAYERS || config.n_routed_experts > MOST_EXPERTS {
        return Some(format!(
            "num_hidden_layers = {} or n_routed_experts = {} is over what llama.cpp can hold, {MOST_LAYERS} and \
             {MOST_EXPERTS}",
            config.num_hidden_layers, config.n_routed_experts
        ));
    }
    if config.q_lora_rank.is_some() && taken_for_lite(config) {
        return Some(format!(
            "num_hidden_layers = {} with a q_lora_rank, and llama.cpp takes a model of that many layers for V2-Lite, \
             which has none",
            config.num_hidden_layers
        ));
    }
    config.rope_scaling.as_ref().and_then(yarn_differs)
}

fn yarn_differs(yarn: &RopeScaling) -> Option<String> {
    if yarn.beta_fast != 32.0 || yarn.beta_slow != 1.0 {
        return Some(format!(
            "rope_scaling.beta_fast = {} and beta_slow = {}, and llama.cpp reads neither for deepseek2: it has 32 and 1",
            yarn.beta_fast, yarn.beta_slow
        ));
    }
    if yarn.mscale != yarn.mscale_all_dim || yarn.mscale <= 0.0 {
        return Some(format!(
            "rope_scaling.mscale = {} and mscale_all_dim = {}, and llama.cpp computes with two that are equal and above 0",
            yarn.mscale, yarn.mscale_all_dim
        ));
    }
    None
}

/// llama.cpp tells V2-Lite and its kin by their number of layers, and reads no q_lora_rank of them.
fn taken_for_lite(config: &ModelConfig) -> bool {
    matches!(config.num_hidden_layers, 26 | 27)
        || config.num_hidden_layers == 48 && config.vocab_size == 128_256
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_model;

    fn published(name: &str) -> ModelConfig {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model");
        load_model(&folder.join(name)).expect("a published config")
    }

    fn value(keys: &Keys, key: &str) -> Option<GgufValue> {
        keys.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    #[test]
    fn v2_lite_has_the_keys_of_its_published_file() {
        let keys =
            model_keys(&published("deepseek-v2-lite.json"), "lite", StoredType::Q8_0).unwrap();
        let whole = |key: &str, number| {
            assert_eq!(
                value(&keys, &format!("deepseek2.{key}")),
                Some(GgufValue::U32(number)),
                "{key}"
            );
        };
        whole("attention.key_length", 576);
        whole("attention.value_length", 512);
        whole("attention.key_length_mla", 192);
        whole("attention.value_length_mla", 128);
        whole("attention.head_count_kv", 1);
        whole("expert_count", 64);
        whole("leading_dense_block_count", 1);
        whole("expert_gating_func", 1);
        assert_eq!(value(&keys, "general.file_type"), Some(GgufValue::U32(7)));
        assert_eq!(value(&keys, "deepseek2.attention.q_lora_rank"), None);
        assert_eq!(value(&keys, "deepseek2.expert_group_count"), None);
        let Some(GgufValue::F32(legacy)) =
            value(&keys, "deepseek2.rope.scaling.yarn_log_multiplier")
        else {
            panic!("no yarn_log_multiplier")
        };
        // llama.cpp divides by 0.1 and must find mscale_all_dim.
        assert!((legacy / 0.1 - 0.707).abs() < 1e-6, "{legacy}");
    }

    #[test]
    fn a_model_without_compression_that_is_not_taken_for_lite_says_so() {
        let mut config = published("deepseek-v2-lite.json");
        config.num_hidden_layers = 3;
        let keys = model_keys(&config, "x", StoredType::F32).unwrap();
        assert_eq!(value(&keys, "deepseek2.attention.q_lora_rank"), Some(GgufValue::U32(0)));
    }

    #[test]
    fn what_normalises_its_weights_has_no_factor() {
        let mut config = published("deepseek-v2-lite.json");
        config.routed_scaling_factor = 16.0;
        let scale = |config: &ModelConfig| {
            let keys = model_keys(config, "x", StoredType::F32).unwrap();
            value(&keys, "deepseek2.expert_weights_scale")
        };
        assert_eq!(scale(&config), Some(GgufValue::F32(16.0)));
        config.norm_topk_prob = true;
        assert_eq!(scale(&config), Some(GgufValue::F32(1.0)));
    }

    #[test]
    fn a_model_that_llama_cpp_computes_otherwise_is_refused_with_the_reason() {
        let lite = published("deepseek-v2-lite.json");
        let refusal = |edit: &dyn Fn(&mut ModelConfig)| {
            let mut config = lite.clone();
            edit(&mut config);
            model_keys(&config, "x", StoredType::F32).unwrap_err().to_string()
        };
        let told = model_keys(&published("deepseek-v2.json"), "x", StoredType::F32).unwrap_err();
        assert!(told.to_string().contains("sum of their best two"), "{told}");
        let yarn = |config: &mut ModelConfig, edit: &dyn Fn(&mut RopeScaling)| {
            edit(config.rope_scaling.as_mut().unwrap());
        };
        for (told, reason) in [
            (refusal(&|c| c.moe_layer_freq = 2), "layer 1 is dense"),
            (refusal(&|c| c.n_shared_experts = 0), "n_shared_experts = 0"),
            (refusal(&|c| c.num_hidden_layers = 513), "over what llama.cpp can hold"),
            (
                refusal(&|c| c.q_lora_rank = Some(64)),
                "takes a model of that many layers for V2-Lite",
            ),
            (refusal(&|c| yarn(c, &|y| y.beta_fast = 16.0)), "beta_fast = 16"),
            (refusal(&|c| yarn(c, &|y| y.mscale = 1.0)), "mscale = 1"),
            (refusal(&|c| yarn(c, &|y| (y.mscale, y.mscale_all_dim) = (0.0, 0.0))), "above 0"),
        ] {
            assert!(told.contains(reason), "{told}");
            assert!(told.contains("--format hf"), "{told}");
        }
        let dense = model_keys(&published("deepseek-67b.json"), "x", StoredType::F32).unwrap_err();
        assert!(dense.to_string().contains("only deepseek_v2"), "{dense}");
        // All groups are no limit.
        let mut free = published("deepseek-v2.json");
        free.topk_group = free.n_group;
        model_keys(&free, "x", StoredType::F32).unwrap();
    }
}
