//! GGUF exports, read back by another program's reader (`candle`), in the newer and the older layout of that format.

use crate::interop::{logits_of, write_random};
use crate::runs::{check_refused, done, rehearsal};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rehearsal::checkpoint::{TensorEntry, TensorFolder, write_model_config, write_tensors};
use rehearsal::config::model::TopkMethod;
use rehearsal::config::{ModelConfig, RopeScaling, TokenizerConfig};
use rehearsal::data::tokenizer::Tokenizer;
use std::cell::RefCell;
use std::fs::File;
use std::path::Path;
use tempfile::TempDir;

/// A model whose rows are whole blocks; with compressed queries and YaRN, or without both.
fn config(compressed: bool) -> ModelConfig {
    let mut config: ModelConfig = serde_json::from_str(
        r#"{"vocab_size":320,"hidden_size":64,"num_hidden_layers":3,"first_k_dense_replace":1,"intermediate_size":96,
        "moe_intermediate_size":32,"n_routed_experts":4,"n_shared_experts":2,"num_experts_per_tok":2,
        "num_attention_heads":2,"kv_lora_rank":32,"qk_nope_head_dim":32,"qk_rope_head_dim":16,"v_head_dim":64,
        "max_position_embeddings":64,"rope_theta":10000.0,"routed_scaling_factor":1.5,"eos_token_id":1}"#,
    )
    .unwrap();
    if compressed {
        config.q_lora_rank = Some(32);
        config.rope_scaling = Some(yarn());
    }
    config
}

fn yarn() -> RopeScaling {
    let text = r#"{"type":"yarn","factor":4.0,"original_max_position_embeddings":16,"mscale":0.707,"mscale_all_dim":0.707}"#;
    serde_json::from_str(text).unwrap()
}

/// A folder with random weights and a tokenizer that was trained here.
fn model(config: &ModelConfig, folder: &Path) {
    write_random(config, folder, 7);
    let settings = TokenizerConfig { vocab_size: Some(300), ..TokenizerConfig::default() };
    let texts: Vec<String> =
        (0..40).map(|i| format!("the {i} cats sat on {} mats", i * 7)).collect();
    Tokenizer::train(&settings, &texts).unwrap().save(&folder.join("tokenizer.json")).unwrap();
}

fn export(folder: &Path, dtype: &str, out: &Path) -> std::process::Command {
    let mut command = rehearsal(&["export", "--format", "gguf", "--dtype", dtype]);
    command.arg(folder).arg("--out").arg(out);
    command
}

/// An opened file.
struct Gguf {
    file: RefCell<File>,
    content: Content,
}

impl Gguf {
    fn open(path: &Path) -> Gguf {
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        Gguf { file: RefCell::new(file), content }
    }

    fn kind(&self, name: &str) -> GgmlDType {
        self.content.tensor_infos[name].ggml_dtype
    }

    fn tensor(&self, name: &str) -> Tensor {
        let found = self.content.tensor(&mut *self.file.borrow_mut(), name, &Device::Cpu);
        found.unwrap().dequantize(&Device::Cpu).unwrap()
    }

    /// kv_b of a layer: as it stands in the older layout, or of the keys and values of each head.
    fn kv_b(&self, layer: usize) -> Tensor {
        let block = format!("blk.{layer}");
        let whole = format!("{block}.attn_kv_b.weight");
        if self.content.tensor_infos.contains_key(&whole) {
            return self.tensor(&whole);
        }
        let keys = self.tensor(&format!("{block}.attn_k_b.weight")).transpose(1, 2).unwrap();
        let values = self.tensor(&format!("{block}.attn_v_b.weight"));
        let heads = Tensor::cat(&[keys.contiguous().unwrap(), values], 1).unwrap();
        let (count, rows, rank) = heads.dims3().unwrap();
        heads.reshape((count * rows, rank)).unwrap()
    }

    /// A tensor under its published name.
    fn published(&self, name: &str) -> Tensor {
        let name = name.strip_suffix(".weight").unwrap();
        let plain = |name: &str| self.tensor(&format!("{name}.weight"));
        match name {
            "model.embed_tokens" => return plain("token_embd"),
            "model.norm" => return plain("output_norm"),
            "lm_head" => return plain("output"),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
        let layer: usize = layer.parse().unwrap();
        if let Some((expert, projection)) =
            rest.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.'))
        {
            let kind = projection.trim_end_matches("_proj");
            let all = plain(&format!("blk.{layer}.ffn_{kind}_exps"));
            return all.get(expert.parse().unwrap()).unwrap();
        }
        let own = match rest {
            "self_attn.kv_b_proj" => return self.kv_b(layer),
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" => "ffn_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.q_a_proj" => "attn_q_a",
            "self_attn.q_a_layernorm" => "attn_q_a_norm",
            "self_attn.q_b_proj" => "attn_q_b",
            "self_attn.kv_a_proj_with_mqa" => "attn_kv_a_mqa",
            "self_attn.kv_a_layernorm" => "attn_kv_a_norm",
            "self_attn.o_proj" => "attn_output",
            "mlp.gate" => "ffn_gate_inp",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            "mlp.shared_experts.gate_proj" => "ffn_gate_shexp",
            "mlp.shared_experts.up_proj" => "ffn_up_shexp",
            "mlp.shared_experts.down_proj" => "ffn_down_shexp",
            other => panic!("{other} has no place in a GGUF file"),
        };
        plain(&format!("blk.{layer}.{own}"))
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_gguf_export_holds_the_same_model_in_every_type() {
    for compressed in [false, true] {
        let (run, config) = (TempDir::new().unwrap(), config(compressed));
        let source = run.path().join("source");
        model(&config, &source);
        let original = TensorFolder::open(&source).unwrap();
        for dtype in ["f32", "bf16", "q8_0"] {
            let out = run.path().join(format!("{dtype}.gguf"));
            done(export(&source, dtype, &out));
            let gguf = Gguf::open(&out);
            for name in original.names() {
                let (wanted, found) = (original.read_f32(name).unwrap(), gguf.published(name));
                assert_eq!(found.dims(), original.shape(name).unwrap(), "{name}");
                let largest = wanted.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                // Exact; half a last place of eight bits; half a step of a block and its scale in f16.
                let slack = match dtype {
                    "f32" => 0.0,
                    "bf16" => largest / 256.0,
                    _ => largest / 254.0 + largest / 2048.0,
                };
                let small = name.contains("norm") || name.ends_with("mlp.gate.weight");
                for (index, (x, y)) in wanted.iter().zip(flat(&found)).enumerate() {
                    let error = (x - y).abs();
                    let slack = if small { 0.0 } else { slack };
                    assert!(error <= slack, "{dtype}, {name} [{index}]: {x} became {y}");
                }
            }
            let kind = match dtype {
                "f32" => GgmlDType::F32,
                "bf16" => GgmlDType::BF16,
                _ => GgmlDType::Q8_0,
            };
            for name in ["token_embd", "output", "blk.1.attn_k_b", "blk.2.ffn_down_exps"] {
                assert_eq!(gguf.kind(&format!("{name}.weight")), kind, "{dtype}, {name}");
            }
            assert_eq!(gguf.kind("blk.1.ffn_gate_inp.weight"), GgmlDType::F32);
        }
        // In f32 the tensors come back to the bit, and with them the logits.
        let (back, gguf) = (run.path().join("back"), Gguf::open(&run.path().join("f32.gguf")));
        std::fs::create_dir(&back).unwrap();
        write_model_config(&back, &config).unwrap();
        let entries: Vec<TensorEntry> = original
            .names()
            .iter()
            .map(|name| TensorEntry {
                name: name.clone(),
                shape: original.shape(name).unwrap().to_vec(),
            })
            .collect();
        write_tensors(&back.join("model.safetensors"), &entries, &mut |index| {
            Ok(flat(&gguf.published(&entries[index].name)))
        })
        .unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 300).collect();
        assert_eq!(logits_of(&back, &tokens), logits_of(&source, &tokens));
    }
}

#[test]
fn keys_and_values_of_the_newer_layout_are_kv_b_of_the_older() {
    let (run, config) = (TempDir::new().unwrap(), config(true));
    let source = run.path().join("source");
    model(&config, &source);
    let (newer, older) = (run.path().join("newer.gguf"), run.path().join("older.gguf"));
    done(export(&source, "f32", &newer));
    // The older layout by another writer: one kv_b a layer, as published.
    let original = TensorFolder::open(&source).unwrap();
    let shape = original.shape("model.layers.0.self_attn.kv_b_proj.weight").unwrap().to_vec();
    let own: Vec<(String, QTensor)> = (0..config.num_hidden_layers)
        .map(|layer| {
            let name = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
            let numbers = original.read_f32(&name).unwrap();
            let tensor = Tensor::from_vec(numbers, shape.as_slice(), &Device::Cpu).unwrap();
            let stored = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
            (format!("blk.{layer}.attn_kv_b.weight"), stored)
        })
        .collect();
    let own: Vec<(&str, &QTensor)> = own.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let heads = Value::U32(config.num_attention_heads as u32);
    let keys = [("deepseek2.attention.head_count_kv", &heads)];
    candle_core::quantized::gguf_file::write(&mut File::create(&older).unwrap(), &keys, &own)
        .unwrap();
    let (newer, older) = (Gguf::open(&newer), Gguf::open(&older));
    for layer in 0..config.num_hidden_layers {
        let (one, two) = (newer.kv_b(layer), older.kv_b(layer));
        assert_eq!(one.dims(), two.dims());
        assert_eq!(flat(&one), flat(&two), "layer {layer}");
    }
    let key = |key: &str| &newer.content.metadata[&format!("deepseek2.{key}")];
    assert!(matches!(key("attention.head_count_kv"), Value::U32(1)));
    assert!(matches!(key("attention.key_length"), Value::U32(48)));
    assert!(matches!(key("attention.key_length_mla"), Value::U32(48)));
    assert!(matches!(key("attention.value_length"), Value::U32(32)));
    assert!(matches!(key("attention.value_length_mla"), Value::U32(64)));
    let legacy = key("rope.scaling.yarn_log_multiplier").to_f32().unwrap();
    assert!((legacy / 0.1 - 0.707).abs() < 1e-6, "{legacy}");
}

#[test]
fn rows_that_are_no_whole_blocks_stay_f32() {
    let (run, mut config) = (TempDir::new().unwrap(), config(false));
    config.qk_nope_head_dim = 24;
    let source = run.path().join("source");
    model(&config, &source);
    let out = run.path().join("x.gguf");
    done(export(&source, "q8_0", &out));
    let gguf = Gguf::open(&out);
    assert_eq!(gguf.kind("blk.1.attn_k_b.weight"), GgmlDType::F32);
    assert_eq!(gguf.kind("blk.1.attn_v_b.weight"), GgmlDType::Q8_0);
}

#[test]
fn a_tied_head_stands_in_the_file_once() {
    let (run, mut config) = (TempDir::new().unwrap(), config(false));
    config.tie_word_embeddings = true;
    let source = run.path().join("source");
    model(&config, &source);
    let out = run.path().join("x.gguf");
    done(export(&source, "f32", &out));
    let names = Gguf::open(&out).content.tensor_infos;
    assert!(names.contains_key("token_embd.weight") && !names.contains_key("output.weight"));
}

#[test]
fn what_llama_cpp_would_compute_or_read_otherwise_is_refused_and_leaves_no_file() {
    let run = TempDir::new().unwrap();
    let (source, out) = (run.path().join("source"), run.path().join("x.gguf"));
    let mut limited = config(false);
    limited.topk_method = TopkMethod::GroupLimitedGreedy;
    (limited.n_group, limited.topk_group) = (2, 1);
    model(&limited, &source);
    check_refused(export(&source, "f32", &out), 2, &["topk_group = 1", "best two", "--format hf"]);
    // All groups are no limit.
    limited.topk_group = 2;
    model(&limited, &source);
    done(export(&source, "f32", &out));
    std::fs::remove_file(&out).unwrap();

    let path = source.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    tokenizer["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    check_refused(export(&source, "f32", &out), 2, &["tokenizer.json", "pre-tokenizer"]);
    std::fs::write(&path, text).unwrap();
    check_refused(export(&source, "f32", &source), 2, &["is a folder", "model.gguf"]);
    check_refused(export(&source, "f32", &path), 2, &["tokenizer.json", "not overwritten"]);
    assert!(!out.exists());
}

#[test]
fn killed_anywhere_a_gguf_is_whole_or_not_there() {
    let run = TempDir::new().unwrap();
    let (source, out) = (run.path().join("source"), run.path().join("x.gguf"));
    model(&config(false), &source);
    done(export(&source, "q8_0", &out));
    let whole = std::fs::read(&out).unwrap();
    for point in ["export-write:3", "export-before-rename"] {
        for earlier in [false, true] {
            if !earlier {
                std::fs::remove_file(&out).unwrap();
            }
            let mut command = export(&source, "q8_0", &out);
            command.env("REHEARSAL_FAIL_AT", point);
            assert!(!command.output().unwrap().status.success(), "{point} must kill");
            assert_eq!(out.exists(), earlier, "{point}");
            assert!(!earlier || std::fs::read(&out).unwrap() == whole, "{point}");
            done(export(&source, "q8_0", &out));
            assert_eq!(std::fs::read(&out).unwrap(), whole, "{point}");
            assert!(!run.path().join("x.gguf.tmp").exists(), "{point}");
        }
    }
}
