//! The keys of each architecture: which are needed, which belong to the other, and which rules they keep.

use super::*;
use crate::config::{Attention, LatentScaling};

const LLAMA: &str = r#"{
  "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
  "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "pretraining_tp": 1
}
"#;

/// Replaces `old` in a model's file and expects the fault at a place of that file.
fn check_model(model: &str, old: &str, new: &str, place: &str, message: &str) {
    assert!(model.contains(old), "{old}");
    let fault = load(RUN, &model.replacen(old, new, 1), &[]).expect_err(new).to_string();
    assert!(fault.ends_with(&format!("/model.json:{place}: {message}")), "{fault}");
}

#[test]
fn a_llama_takes_the_published_keys_and_fills_in_what_they_imply() {
    let model = load(RUN, LLAMA, &[]).unwrap().model;
    assert_eq!(model.attention(), Attention::Gqa { kv_heads: 2, head_dim: 8 });
    assert_eq!((model.num_key_value_heads, model.head_dim), (Some(2), Some(8)));
    assert_eq!((model.cache_width(), model.query_width(), model.value_width()), (32, 8, 8));
    assert!(!(0..2).any(|layer| model.is_moe(layer)));
    let wide = LLAMA.replace("\"pretraining_tp\": 1", "\"head_dim\": 10");
    let wide = wide.replace("\"num_key_value_heads\": 2,", "\"num_key_value_heads\": null,");
    let model = load(RUN, &wide, &[]).unwrap().model;
    assert_eq!(model.attention(), Attention::Gqa { kv_heads: 4, head_dim: 10 });
    let newer = "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500.0}";
    let model = load(RUN, &LLAMA.replace("\"pretraining_tp\": 1", newer), &[]).unwrap().model;
    assert_eq!((model.rope_theta, model.rope_scaling), (500.0, None));
}

#[test]
fn a_resolved_run_holds_the_keys_of_its_architecture_and_comes_back() {
    for (model, key, other) in
        [(LLAMA, "head_dim", "kv_lora_rank"), (MODEL, "latent_scaling", "mlp_bias")]
    {
        let config = load(RUN, model, &[]).unwrap();
        let text = config.to_toml();
        assert!(text.contains(&format!("\n{key} = ")), "{text}");
        assert!(!text.contains(other), "{text}");
        let again = load(&text, model, &[]).unwrap();
        assert_eq!((again.model, again.stages), (config.model, config.stages));
    }
}

#[test]
fn keys_of_the_other_architecture_are_refused_and_missing_ones_named() {
    for (key, value) in [("kv_lora_rank", "16"), ("n_group", "1"), ("latent_scaling", "\"sqrt\"")] {
        check_model(
            LLAMA,
            "\"pretraining_tp\": 1",
            &format!("\"{key}\": {value}"),
            "5:3",
            &format!(
                "model.{key} is a key of deepseek_v2, and model.model_type = \"llama\"; take one of them out"
            ),
        );
    }
    let set = load(RUN, LLAMA, &["model.q_lora_rank=8"]).unwrap_err().to_string();
    assert!(set.starts_with("--set model.q_lora_rank=8: model.q_lora_rank is a key of"), "{set}");
    for key in ["qk_nope_head_dim", "n_routed_experts", "first_k_dense_replace"] {
        let without = MODEL.replacen(&format!("\"{key}\""), &format!("\"x_{key}_x\""), 1);
        let fault = load(RUN, &without, &[]).unwrap_err().to_string();
        let message = format!(":1:1: `model` has no key `{key}`, which has no default; add it");
        assert!(fault.ends_with(&message), "{fault}");
    }
}

#[test]
fn the_widths_of_a_llamas_heads_keep_their_rules() {
    let replaced = |old: &str, new: &str, place: &str, message: &str| {
        check_model(LLAMA, old, new, place, message);
    };
    replaced(
        "\"num_key_value_heads\": 2",
        "\"num_key_value_heads\": 3",
        "3:54",
        "model.num_key_value_heads = 3 does not divide model.num_attention_heads = 4; use 1, 2, 4",
    );
    replaced(
        "\"num_key_value_heads\": 2",
        "\"num_key_value_heads\": 0",
        "3:54",
        "model.num_key_value_heads = 0 does not divide model.num_attention_heads = 4; use 1, 2, 4",
    );
    replaced(
        "\"hidden_size\": 32",
        "\"hidden_size\": 30",
        "2:45",
        "model.hidden_size = 30 is no multiple of model.num_attention_heads = 4; change one of them or add head_dim",
    );
    replaced(
        "\"hidden_size\": 32",
        "\"hidden_size\": 28",
        "1:1",
        "model.head_dim = 7 (hidden_size / num_attention_heads) is odd, and RoPE turns pairs; make it even",
    );
    replaced(
        "\"pretraining_tp\": 1",
        "\"head_dim\": 7",
        "5:3",
        "model.head_dim = 7 is odd, and RoPE turns pairs; make it even",
    );
    replaced(
        "\"pretraining_tp\": 1",
        "\"head_dim\": 0",
        "5:3",
        "model.head_dim = 0 must be at least 1",
    );
    replaced(
        "\"pretraining_tp\": 1",
        "\"mlp_bias\": true",
        "5:3",
        "model.mlp_bias = true is not built: no layer here has biases; use false",
    );
    replaced(
        "\"pretraining_tp\": 1",
        "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"original_max_position_embeddings\": 64}",
        "5:20",
        "model.rope_scaling.type = \"llama3\" is not built; use \"yarn\" or leave rope_scaling out",
    );
}

#[test]
fn keys_of_mla_keep_their_rules() {
    let added = |new: &str, place: &str, message: &str| {
        check_model(MODEL, "\"torch_dtype\": \"float32\"", new, place, message);
    };
    added(
        "\"head_dim\": 9",
        "7:3",
        "model.head_dim = 9 is the width of the rotated key in deepseek_v2, and model.qk_rope_head_dim = 8; leave head_dim out",
    );
    added(
        "\"latent_scaling\": \"root\"",
        "7:21",
        "model.latent_scaling = \"root\" is a text; expected \"off\", \"sqrt\" or a number",
    );
    added(
        "\"latent_scaling\": -1.5",
        "7:3",
        "model.latent_scaling = -1.5 must be above 0; use \"off\" for none",
    );
    added(
        "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"original_max_position_embeddings\": 64, \"attention_factor\": 1}",
        "7:89",
        "model.rope_scaling.attention_factor is a key of llama; deepseek_v2 has mscale and mscale_all_dim",
    );
    let scaled = load(RUN, MODEL, &["model.latent_scaling=2"]).unwrap().model;
    assert_eq!(scaled.latent_scaling, LatentScaling::Constant(2.0));
    assert_eq!(scaled.latent_factors(), (2.0, 2.0));
}

#[test]
fn a_model_without_experts_balances_none() {
    let fault = load(RUN, LLAMA, &["stage.base.balance.expert=0.01"]).unwrap_err().to_string();
    let message =
        "stage.base.balance.expert = 0.01 balances experts, and the model has none; leave it out";
    assert!(fault.ends_with(message), "{fault}");
    load(RUN, LLAMA, &["stage.base.balance.expert=0"]).unwrap();
}
