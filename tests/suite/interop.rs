//! Hugging Face folders: every published name once, experts in one tensor or in many, f32 and bf16, mapped files.

use crate::oracle::logits;
use crate::runs::{done, rehearsal, said};
use crate::tiny::cpu;
use candle_core::{DType, Device, Tensor};
use rehearsal::checkpoint::stored::StoredType;
use rehearsal::checkpoint::{
    TensorEntry, TensorFolder, export_hf, read_model_config, write_model_config, write_tensors,
};
use rehearsal::config::engine::Prefill;
use rehearsal::config::{ModelConfig, load_model};
use rehearsal::engine::check_weights;
use rehearsal::model::{Layout, Params, Transformer};
use rehearsal_kernels::random::{self, Stream};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Random weights, so that no two tensors are alike, norms included; with config and tokenizer.
pub fn write_random(config: &ModelConfig, folder: &Path, seed: u64) {
    std::fs::create_dir_all(folder).unwrap();
    let layout = Layout::new(config, false);
    let entries: Vec<TensorEntry> = layout
        .specs
        .iter()
        .map(|spec| TensorEntry { name: spec.name.clone(), shape: spec.shape() })
        .collect();
    let number = |tensor: usize, element: usize| {
        let drawn = random::normal(seed, Stream::Init, [tensor as u64, element as u64, 0, 0]);
        if layout.specs[tensor].is_norm { 1.0 + 0.2 * drawn } else { 0.2 * drawn }
    };
    write_model_config(folder, config).unwrap();
    write_tensors(&folder.join("model.safetensors"), &entries, &mut |index| {
        let count = entries[index].shape.iter().product();
        Ok((0..count).map(|element| number(index, element) as f32).collect())
    })
    .unwrap();
    let tokenizer = r#"{"added_tokens":[],"model":{"vocab":{}}}"#;
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
}

/// Logits of a folder's model.
pub fn logits_of(folder: &Path, tokens: &[u32]) -> Vec<f64> {
    let (kernels, config) = (cpu(1), read_model_config(folder).unwrap());
    let model = Transformer::new(&kernels, &config, false).unwrap();
    let mut params = Params::new(&kernels, model.layout.clone(), "policy").unwrap();
    let tensors = TensorFolder::open(folder).unwrap();
    check_weights(&model.layout, &tensors, folder).unwrap();
    params.load(&kernels, |spec| tensors.read_f32(&spec.name)).unwrap();
    logits(&kernels, &model, &params, tokens, Prefill::Absorbed)
}

/// Names and shapes of the published checkpoint of DeepSeek-V2, in plain loops.
fn published(c: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (d, heads) = (c.hidden_size, c.num_attention_heads);
    let queries = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
    let mut names = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        assert!(names.insert(format!("{name}.weight"), shape.to_vec()).is_none());
    };
    add("model.embed_tokens".into(), &[c.vocab_size, d]);
    add("model.norm".into(), &[d]);
    add("lm_head".into(), &[c.vocab_size, d]);
    for n in 0..c.num_hidden_layers {
        let layer = format!("model.layers.{n}");
        add(format!("{layer}.input_layernorm"), &[d]);
        add(format!("{layer}.post_attention_layernorm"), &[d]);
        let own = format!("{layer}.self_attn");
        match c.q_lora_rank {
            None => add(format!("{own}.q_proj"), &[queries, d]),
            Some(rank) => {
                add(format!("{own}.q_a_proj"), &[rank, d]);
                add(format!("{own}.q_a_layernorm"), &[rank]);
                add(format!("{own}.q_b_proj"), &[queries, rank]);
            }
        }
        let latent = c.kv_lora_rank;
        add(format!("{own}.kv_a_proj_with_mqa"), &[latent + c.qk_rope_head_dim, d]);
        add(format!("{own}.kv_a_layernorm"), &[latent]);
        let both = heads * (c.qk_nope_head_dim + c.v_head_dim);
        add(format!("{own}.kv_b_proj"), &[both, latent]);
        add(format!("{own}.o_proj"), &[d, heads * c.v_head_dim]);
        let mut swiglu = |place: String, width: usize| {
            add(format!("{place}.gate_proj"), &[width, d]);
            add(format!("{place}.up_proj"), &[width, d]);
            add(format!("{place}.down_proj"), &[d, width]);
        };
        if n < c.first_k_dense_replace {
            swiglu(format!("{layer}.mlp"), c.intermediate_size);
            continue;
        }
        for expert in 0..c.n_routed_experts {
            swiglu(format!("{layer}.mlp.experts.{expert}"), c.moe_intermediate_size);
        }
        let shared = c.n_shared_experts * c.moe_intermediate_size;
        swiglu(format!("{layer}.mlp.shared_experts"), shared);
        add(format!("{layer}.mlp.gate"), &[c.n_routed_experts, d]);
    }
    names
}

/// Files of true size that hold no byte on the disk but their headers, and their index.
fn write_sparse(folder: &Path, tensors: &BTreeMap<String, Vec<usize>>, shards: usize) {
    let all: Vec<(&String, &Vec<usize>)> = tensors.iter().collect();
    let mut weight_map = serde_json::Map::new();
    for (index, shard) in all.chunks(all.len().div_ceil(shards)).enumerate() {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", index + 1);
        let (mut header, mut at) = (serde_json::Map::new(), 0_u64);
        for (tensor, shape) in shard {
            let end = at + 2 * shape.iter().product::<usize>() as u64;
            header.insert(
                tensor.to_string(),
                json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}),
            );
            weight_map.insert(tensor.to_string(), json!(name));
            at = end;
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = File::create(folder.join(name)).unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(&header).unwrap();
        file.set_len(8 + header.len() as u64 + at).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
    std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

#[test]
fn every_tensor_of_the_published_indexes_is_mapped_once_and_one_less_or_more_is_refused() {
    for (name, count, shards, elements) in [
        ("deepseek-v2.json", 29_102, 55, 235_741_434_880_u64),
        ("deepseek-v2-lite.json", 5_291, 4, 15_706_484_224),
    ] {
        let config = load_model(&root().join("configs/model").join(name)).unwrap();
        let names = published(&config);
        assert_eq!(names.len(), count, "{name}");
        let layout = Layout::new(&config, false);
        let ours: BTreeMap<String, Vec<usize>> =
            layout.specs.iter().map(|spec| (spec.name.clone(), spec.shape())).collect();
        assert_eq!((layout.specs.len(), ours.len()), (count, count), "{name}: each name once");
        assert_eq!(ours, names, "{name}");

        let folder = TempDir::new().unwrap();
        write_sparse(folder.path(), &names, shards);
        let open = || TensorFolder::open(folder.path());
        let tensors = open().unwrap();
        assert_eq!((tensors.names().len(), tensors.elements()), (count, elements));
        check_weights(&layout, &tensors, folder.path()).unwrap();
        let last = format!("model.layers.{}.input_layernorm.weight", config.num_hidden_layers - 1);
        assert_eq!(tensors.read_f32(&last).unwrap(), vec![0.0; config.hidden_size]);

        let told = |names: &BTreeMap<String, Vec<usize>>| {
            write_sparse(folder.path(), names, shards);
            check_weights(&layout, &open().unwrap(), folder.path()).unwrap_err().to_string()
        };
        let mut fewer = names.clone();
        fewer.remove(&last);
        assert!(told(&fewer).contains(&format!("{last} is missing")));
        let mut more = names.clone();
        more.insert("model.layers.3.self_attn.rotary_emb.inv_freq".to_string(), vec![32]);
        assert!(told(&more).contains("model.layers.3.self_attn.rotary_emb.inv_freq is not in"));
        let mut turned = names.clone();
        let kv_b = "model.layers.2.self_attn.kv_b_proj.weight";
        turned.get_mut(kv_b).unwrap().reverse();
        let message = told(&turned);
        assert!(message.contains(kv_b) && message.contains("has shape"), "{message}");
    }
}

/// The experts of a folder's layers in one tensor each, as transformers 5 holds them.
fn fuse(from: &Path, to: &Path, dtype: DType) {
    let config = read_model_config(from).unwrap();
    let all = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut fused: HashMap<String, Tensor> = all
        .iter()
        .filter(|(name, _)| !name.contains(".experts."))
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .collect();
    for layer in 0..config.num_hidden_layers {
        let place = format!("model.layers.{layer}.mlp.experts");
        if !all.contains_key(&format!("{place}.0.up_proj.weight")) {
            continue;
        }
        let own =
            |expert: usize, name: &str| all[&format!("{place}.{expert}.{name}.weight")].clone();
        let experts = 0..config.n_routed_experts;
        let gate_up: Vec<Tensor> = experts
            .clone()
            .map(|e| Tensor::cat(&[own(e, "gate_proj"), own(e, "up_proj")], 0).unwrap())
            .collect();
        let down: Vec<Tensor> = experts.map(|e| own(e, "down_proj")).collect();
        fused.insert(format!("{place}.gate_up_proj"), Tensor::stack(&gate_up, 0).unwrap());
        fused.insert(format!("{place}.down_proj"), Tensor::stack(&down, 0).unwrap());
    }
    let fused: HashMap<String, Tensor> =
        fused.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())).collect();
    // Two shards with an index, as a large model has them.
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let mut names: Vec<&String> = fused.keys().collect();
    names.sort();
    let mut weight_map = serde_json::Map::new();
    for (index, half) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", index + 1);
        let own: HashMap<String, Tensor> =
            half.iter().map(|name| (name.to_string(), fused[*name].clone())).collect();
        candle_core::safetensors::save(&own, to.join(&file)).unwrap();
        weight_map.extend(half.iter().map(|name| (name.to_string(), json!(file))));
    }
    let index = json!({"weight_map": weight_map}).to_string();
    std::fs::write(to.join("model.safetensors.index.json"), index).unwrap();
}

#[test]
fn experts_in_one_tensor_are_the_same_model_and_leave_an_export_one_by_one() {
    let source = root().join("tests/data/oracle/group-limited-yarn");
    let run = TempDir::new().unwrap();
    let (fused, out) = (run.path().join("fused"), run.path().join("out"));
    fuse(&source, &fused, DType::F32);
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 32).collect();
    let wanted = logits_of(&source, &tokens);
    assert_eq!(logits_of(&fused, &tokens), wanted);
    std::fs::write(fused.join("tokenizer.json"), r#"{"model":{"vocab":{}}}"#).unwrap();
    export_hf(&fused, &out, StoredType::F32).unwrap();
    let (ours, theirs) = (TensorFolder::open(&out).unwrap(), TensorFolder::open(&source).unwrap());
    assert_eq!(ours.names().len(), theirs.names().len());
    assert_eq!(logits_of(&out, &tokens), wanted);
}

#[test]
fn an_export_in_bf16_is_the_rounded_model_and_one_in_f32_the_same() {
    let run = TempDir::new().unwrap();
    let source = run.path().join("source");
    write_random(&crate::tiny::config_lite(), &source, 3);
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 29).collect();
    let wanted = logits_of(&source, &tokens);
    let at = |name: &str| run.path().join(name);
    export_hf(&source, &at("f32"), StoredType::F32).unwrap();
    assert_eq!(logits_of(&at("f32"), &tokens), wanted);
    export_hf(&source, &at("bf16"), StoredType::Bf16).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at("bf16/config.json")).unwrap()).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    let original = TensorFolder::open(&source).unwrap();
    let rounded = TensorFolder::open(&at("bf16")).unwrap();
    let mut changed = 0;
    for name in original.names() {
        let numbers = original.read_f32(name).unwrap();
        let count = numbers.len();
        let by_candle = Tensor::from_vec(numbers.clone(), count, &Device::Cpu)
            .and_then(|t| t.to_dtype(DType::BF16)?.to_dtype(DType::F32)?.to_vec1::<f32>())
            .unwrap();
        let read = rounded.read_f32(name).unwrap();
        assert_eq!(read, by_candle, "{name}");
        changed += read.iter().zip(&numbers).filter(|(a, b)| a != b).count();
    }
    assert!(changed > 1000, "only {changed} numbers were rounded");
    // What was rounded once is exact: the export of the export computes the same to the bit.
    export_hf(&at("bf16"), &at("again"), StoredType::F32).unwrap();
    assert_eq!(logits_of(&at("again"), &tokens), logits_of(&at("bf16"), &tokens));
    let refused = export_hf(&source, &at("q8"), StoredType::Q8_0).unwrap_err().to_string();
    assert!(refused.contains("--format gguf") && !at("q8").exists(), "{refused}");
}

fn status_kib(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn opening_a_model_maps_its_files_and_reads_none_of_it() {
    let config = load_model(&root().join("configs/model/deepseek-v2-lite.json")).unwrap();
    let folder = TempDir::new().unwrap();
    write_sparse(folder.path(), &published(&config), 4);
    let before = status_kib("VmRSS");
    let tensors = TensorFolder::open(folder.path()).unwrap();
    tensors.read_f32("model.norm.weight").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().filter(|line| line.contains(folder.path().to_str().unwrap()));
    assert_eq!(mapped.count(), 4, "each file is mapped");
    let grown = status_kib("VmRSS").saturating_sub(before);
    assert!(grown < 256 << 10, "{grown} KiB for opening 29 GiB");
}

#[test]
fn weights_in_f16_are_read_with_a_warning_on_standard_error() {
    let run = TempDir::new().unwrap();
    let source = run.path().join("source");
    write_random(&crate::tiny::config(), &source, 3);
    let path = source.join("model.safetensors");
    let all = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let half: HashMap<String, Tensor> =
        all.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F16).unwrap())).collect();
    candle_core::safetensors::save(&half, &path).unwrap();
    let out = run.path().join("out");
    let mut command = rehearsal(&["export"]);
    command.arg(&source).arg("--out").arg(&out);
    let output = done(command);
    let told = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(told.contains("WARN") && told.contains("f16"), "{}", said(&output));
    // None of them leaves as f16.
    let header = std::fs::read(out.join("model-00001-of-00001.safetensors")).unwrap();
    let length = u64::from_le_bytes(header[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(header[8..8 + length].to_vec()).unwrap();
    assert!(header.contains("\"F32\"") && !header.contains("F16"));
}
