//! Both architectures through the program: a dense model in every kind of stage and back from its export, and the factors
//! of scaled latents, which an export folds.

use crate::runs::{check_refused, done, events, rehearsal, smoke, smoke_with};
use crate::tiny::cpu;
use rehearsal::checkpoint::{TensorFolder, read_model_config};
use rehearsal::config::{Attention, LatentScaling, ModelType};
use rehearsal::model::{DecodeRows, LatentCache, PackFor, Params, Transformer};
use rehearsal_kernels::{CacheFormat, Kernels};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use tempfile::TempDir;

/// Logits of a few tokens by the model in a folder, as bits.
fn logits(folder: &Path) -> Vec<u32> {
    let (config, kernels) = (read_model_config(folder).unwrap(), cpu(2));
    let model = Transformer::new(&kernels, &config, false).unwrap();
    let weights = TensorFolder::open(folder).unwrap();
    let mut params = Params::new(&kernels, model.layout.clone(), "policy").unwrap();
    params.load(&kernels, |spec| weights.read_f32(&spec.name)).unwrap();
    let packed = model.pack(&kernels, &params, "policy", 0, PackFor::SAMPLING).unwrap();
    let mut cache = LatentCache::new(&kernels, &config, CacheFormat::F32, 2, 8).unwrap();
    let mut rows = DecodeRows::default();
    rows.begin(&[1, 0]);
    for position in 0..12 {
        rows.push(position as u32 * 23 % 280, position, 8);
        rows.want_last();
    }
    let logits = model.decode(&kernels, &params, &packed, &mut cache, &rows).unwrap();
    kernels.download(&logits).iter().map(|logit| logit.to_bits()).collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    TensorFolder::open(folder).unwrap().names().iter().cloned().collect()
}

fn published(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// A dense model as small as that of the smoke run.
fn dense(folder: &Path) -> String {
    let keys = json!({
        "model_type": "llama", "vocab_size": 288, "hidden_size": 24, "num_hidden_layers": 2,
        "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "rope_theta": 100.0, "initializer_range": 0.08,
        "eos_token_id": 1, "pad_token_id": 0,
    });
    let path = folder.join("dense.json");
    std::fs::write(&path, keys.to_string()).unwrap();
    format!("model.config={:?}", path.display().to_string())
}

#[test]
fn a_dense_model_passes_every_kind_of_stage_and_comes_back_from_its_export_as_a_llama() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (run, model) = (folder.path().join("run"), dense(folder.path()));
    done(smoke_with(&run, &[&model]));
    let kinds: Vec<Value> =
        events(&run, "stage-end").into_iter().map(|mut event| event["stage"].take()).collect();
    assert_eq!(kinds, ["base", "long", "sft", "helpful", "safety", "align"]);

    let export = run.join("export");
    let keys = published(&export);
    assert_eq!(keys["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(keys["model_type"], "llama");
    for (key, value) in [("num_key_value_heads", json!(2)), ("head_dim", json!(8))] {
        assert_eq!(keys[key], value, "{key}");
    }
    for key in ["kv_lora_rank", "n_routed_experts", "latent_scaling", "ep_size"] {
        assert!(keys.get(key).is_none(), "{key} is no key of a Llama");
    }
    assert!(keys["rope_scaling"]["attention_factor"].as_f64().unwrap() > 1.0);

    let config = read_model_config(&export).unwrap();
    assert_eq!(config.attention(), Attention::Gqa { kv_heads: 2, head_dim: 8 });
    let names = names(&export);
    assert_eq!(names.len(), 2 * 9 + 3);
    for name in ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "input_layernorm"] {
        assert!(names.contains(&format!("model.layers.1.{name}.weight")), "{name}");
    }
    let ours = logits(&run.join("stages/06-align"));
    assert_eq!(ours, logits(&export));
    let again = folder.path().join("again");
    let mut command = rehearsal(&["export"]);
    command.arg(&export).arg("--out").arg(&again);
    done(command);
    assert_eq!(ours, logits(&again));
}

#[test]
fn an_exported_model_has_the_factors_of_its_latents_in_the_norms_and_the_same_logits() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let run = folder.path().join("run");
    done(smoke_with(&run, &["model.latent_scaling=\"sqrt\"", "stage.align.steps=1"]));
    let (stage, export) = (run.join("stages/06-align"), run.join("export"));
    assert_eq!(published(&stage)["latent_scaling"], "sqrt");
    assert!(published(&export).get("latent_scaling").is_none());
    assert_eq!(read_model_config(&export).unwrap().latent_scaling, LatentScaling::Off);
    let norm = |folder: &Path| {
        let name = "model.layers.0.self_attn.kv_a_layernorm.weight";
        TensorFolder::open(folder).unwrap().read_f32(name).unwrap()
    };
    assert_ne!(norm(&stage), norm(&export));
    assert_eq!(logits(&stage), logits(&export));
}

#[test]
fn a_run_does_not_go_on_with_weights_of_the_other_architecture() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let model = dense(folder.path());
    let start = folder.path().join("start");
    std::fs::create_dir(&start).unwrap();
    let mut other = read_model_config(&crate::runs::finished().join("export")).unwrap();
    assert_eq!(other.model_type, ModelType::DeepseekV2);
    other.rope_scaling = None;
    std::fs::write(start.join("config.json"), serde_json::to_string(&other).unwrap()).unwrap();
    let mut command = smoke(&folder.path().join("run"), &["--set", &model, "--set"]);
    command.arg(format!("stage.base.start_from={:?}", start.display().to_string()));
    check_refused(command, 2, &["model.model_type = \"llama\" in the run, \"deepseek_v2\" in"]);
}
