//! config.json of a model: the published keys of its architecture, written so that transformers and
//! we read the same model.
//!
//! Reading is `config::load_model`; here a folder's file becomes a model or a fault of the user's.
//! Writing keeps what a Hugging Face config holds beyond our keys. Floats are written as floats
//! (transformers checks types), and `head_dim` of DeepSeek-V2 is the width of the rotated key: its
//! attention reads the table of angles by that name.

use super::disk::{read_limited, write_synced};
use crate::config::{Fault, LatentScaling, ModelConfig, ModelType, load_model};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Name of a model's config in its folder.
pub const CONFIG_FILE: &str = "config.json";
const CONFIG_LIMIT: u64 = 1 << 20;

/// The one key of our own.
const LATENT_SCALING: &str = "latent_scaling";

/// Keys that are wrong in our copy of a foreign config: remote code that is not copied, a storage
/// format that the weights have lost, and newer spellings of keys that we write in the published
/// form.
const DROPPED: [&str; 7] = [
    "auto_map",
    LATENT_SCALING,
    "quantization_config",
    "dtype",
    "rope_parameters",
    "transformers_version",
    "_name_or_path",
];

/// Reads config.json of a model's folder. What we cannot run (another architecture, an unknown
/// `topk_method`, `scoring_func` or `hidden_act`) is refused by key and place.
pub fn read_model_config(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join(CONFIG_FILE);
    if !path.is_file() {
        return Err(Fault::user(format!(
            "{}: has no config.json, so it is no model; name a checkpoint or a folder in Hugging \
             Face layout",
            folder.display()
        )));
    }
    load_model(&path).map_err(|fault| Fault::user(fault.to_string()))
}

/// Writes config.json into a folder.
pub fn write_model_config(folder: &Path, config: &ModelConfig) -> Result<()> {
    write_keys(folder, config, "float32", Map::new())
}

/// Writes `config` over the keys of `source`'s config.json, so that keys we do not know survive an
/// export. `dtype` is the type of the weights, as torch names it.
pub(super) fn copy_model_config(
    source: &Path,
    folder: &Path,
    config: &ModelConfig,
    dtype: &str,
) -> Result<()> {
    let bytes = read_limited(&source.join(CONFIG_FILE), CONFIG_LIMIT)?;
    let mut keys: Map<String, Value> = serde_json::from_slice(&bytes)
        .map_err(|e| Fault::user(format!("{}: {e}", source.join(CONFIG_FILE).display())))?;
    keys.retain(|key, _| !DROPPED.contains(&key.as_str()));
    write_keys(folder, config, dtype, keys)
}

fn write_keys(
    folder: &Path,
    config: &ModelConfig,
    dtype: &str,
    carried: Map<String, Value>,
) -> Result<()> {
    let mut keys = published_keys(config, dtype);
    for (key, value) in carried {
        keys.entry(key).or_insert(value);
    }
    let mut bytes =
        serde_json::to_vec_pretty(&Value::Object(keys)).expect("a config is plain data");
    bytes.push(b'\n');
    write_synced(&folder.join(CONFIG_FILE), &bytes)
}

/// The published keys, in a fixed order.
fn published_keys(config: &ModelConfig, dtype: &str) -> Map<String, Value> {
    let mut keys = Map::new();
    let name = match config.model_type {
        ModelType::DeepseekV2 => "DeepseekV2ForCausalLM",
        ModelType::Llama => "LlamaForCausalLM",
    };
    keys.insert("architectures".to_string(), json!([name]));
    keys.insert("torch_dtype".to_string(), json!(dtype));
    let config = config.clone().completed();
    let Value::Object(ours) = serde_json::to_value(&config).expect("a config is plain data") else {
        unreachable!("a struct serializes as an object")
    };
    keys.extend(ours);
    if config.latent_scaling == LatentScaling::Off {
        keys.shift_remove(LATENT_SCALING);
    }
    // Constants of the architecture that other programs look for.
    keys.insert("attention_dropout".to_string(), json!(0.0));
    if config.model_type == ModelType::DeepseekV2 {
        keys.insert("ep_size".to_string(), json!(1));
    }
    keys.insert("pretraining_tp".to_string(), json!(1));
    keys.insert("use_cache".to_string(), json!(true));
    keys
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A model of two layers, the second a mixture of two experts.
    pub(in crate::checkpoint) fn tiny() -> ModelConfig {
        serde_json::from_value(json!({
            "vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2,
            "first_k_dense_replace": 1, "intermediate_size": 12, "moe_intermediate_size": 4,
            "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 6,
            "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
            "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0,
        }))
        .expect("a model")
    }

    fn written(config: &ModelConfig) -> (tempfile::TempDir, Map<String, Value>) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_model_config(folder.path(), config).expect("a config");
        let bytes = std::fs::read(folder.path().join(CONFIG_FILE)).expect("the config");
        (folder, serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[test]
    fn a_config_comes_back_as_it_was_written() {
        let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707});
        let mut long = tiny();
        long.rope_scaling = Some(serde_json::from_value(yarn).expect("yarn"));
        long.q_lora_rank = None;
        for config in [tiny(), long] {
            let (folder, _) = written(&config);
            let read = read_model_config(folder.path()).expect("the config");
            assert_eq!(read, config.completed());
        }
    }

    #[test]
    fn published_keys_are_there_and_floats_are_floats() {
        let (_folder, keys) = written(&tiny());
        for key in [
            "kv_lora_rank",
            "qk_rope_head_dim",
            "n_routed_experts",
            "topk_method",
            "scoring_func",
            "rope_scaling",
        ] {
            assert!(keys.contains_key(key), "{key}");
        }
        assert_eq!(keys["architectures"], json!(["DeepseekV2ForCausalLM"]));
        assert_eq!(keys["head_dim"], keys["qk_rope_head_dim"]);
        assert_eq!(keys["bos_token_id"], Value::Null);
        for key in [
            "rope_theta",
            "routed_scaling_factor",
            "rms_norm_eps",
            "attention_dropout",
            "aux_loss_alpha",
        ] {
            assert!(keys[key].is_f64(), "{key} = {}", keys[key]);
        }
    }

    #[test]
    fn what_we_cannot_run_is_refused_by_key() {
        let (folder, keys) = written(&tiny());
        for (key, value) in [
            ("topk_method", "noaux_tc"),
            ("scoring_func", "sigmoid"),
            ("hidden_act", "gelu"),
            ("model_type", "mixtral"),
        ] {
            let mut keys = keys.clone();
            keys.insert(key.to_string(), json!(value));
            std::fs::write(folder.path().join(CONFIG_FILE), Value::Object(keys).to_string())
                .expect("a config");
            let error =
                read_model_config(folder.path()).expect_err("an unknown method must be refused");
            let text = format!("{error:#}");
            assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{text}");
            assert!(
                text.contains("config.json:1:") && text.contains(key) && text.contains(value),
                "{text}"
            );
        }
    }

    #[test]
    fn newer_configs_write_rope_parameters() {
        let (folder, mut keys) = written(&tiny());
        keys.remove("rope_scaling");
        keys.remove("rope_theta");
        keys.insert(
            "rope_parameters".to_string(),
            json!({"rope_type": "default", "rope_theta": 100.0}),
        );
        std::fs::write(folder.path().join(CONFIG_FILE), Value::Object(keys).to_string())
            .expect("a config");
        let config = read_model_config(folder.path()).expect("the config");
        assert_eq!((config.rope_theta, config.rope_scaling), (100.0, None));
    }
}
