//! Valid files, written by the product itself, and published ones that people bring.

use candle_core::quantized::gguf_file::{self, Value as Text};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rehearsal::checkpoint::shards::{shard_name, write_index};
use rehearsal::checkpoint::{
    Manifest, Shard, Store, TensorEntry, piece_name, read_model_config, write_model_config,
    write_shard, write_tensors,
};
use rehearsal::cli::run_folder::{self, Wish};
use rehearsal::config::{Loaded, ModelConfig, RunConfig, TokenizerConfig};
use rehearsal::console::{Event, Journal, TypedCommand};
use rehearsal::data::{ChatTemplate, Tokenizer};
use rehearsal::engine::resident::Calibration;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The repository, from its own package or from that of the fuzzer in it.
fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let above = here.parent().expect("a package lies in a folder").to_path_buf();
    if here.join("configs").is_dir() { here } else { above }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// One file of each type that tensors are stored as.
pub fn tensors(aside: &Path) -> Vec<Vec<u8>> {
    let path = aside.join("written.safetensors");
    let entries: Vec<TensorEntry> =
        [("a.weight", vec![3, 4]), ("b.weight", vec![5]), ("c", vec![])]
            .map(|(name, shape)| TensorEntry { name: name.to_string(), shape })
            .to_vec();
    let mut fetch = |index: usize| {
        let count = entries[index].shape.iter().product();
        Ok((0..count).map(|i| i as f32).collect())
    };
    write_tensors(&path, &entries, &mut fetch).unwrap();
    let data = [7u8; 64];
    let mixed = [
        ("bf16", Dtype::BF16, vec![2, 3], 12),
        ("f16", Dtype::F16, vec![4], 8),
        ("f64", Dtype::F64, vec![1, 2], 16),
        ("none", Dtype::F32, vec![2, 0, 9], 0),
    ];
    let views = mixed.iter().map(|(name, dtype, shape, bytes)| {
        (name.to_string(), TensorView::new(*dtype, shape.clone(), &data[..*bytes]).unwrap())
    });
    vec![read(&path), safetensors::serialize(views, None).unwrap()]
}

/// Configs of models: a made one, and every preset.
pub fn configs(aside: &Path) -> Vec<Vec<u8>> {
    let mut files = vec![config_json(aside)];
    let mut presets: Vec<PathBuf> = std::fs::read_dir(root().join("configs/model"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    presets.sort();
    files.extend(presets.iter().map(|path| read(path)));
    files
}

fn smoke() -> ModelConfig {
    rehearsal::config::load_model(&root().join("configs/model/smoke.json")).unwrap()
}

fn config_json(aside: &Path) -> Vec<u8> {
    write_model_config(aside, &smoke()).unwrap();
    assert_eq!(read_model_config(aside).unwrap(), smoke());
    read(&aside.join("config.json"))
}

/// A small tokenizer, and others with parts of published files. Their patterns compile soon.
pub fn tokenizers() -> Vec<Vec<u8>> {
    let texts: Vec<String> = (0..20).map(|i| format!("the cat {i} sat on the mat\n")).collect();
    let split = "gpt-2".to_string();
    let config = TokenizerConfig { vocab_size: Some(268), split, ..TokenizerConfig::default() };
    let own: Value =
        serde_json::from_str(Tokenizer::train(&config, &texts).unwrap().json()).unwrap();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    let split = |pattern: &str| {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": false})
    };
    let mut light = own.clone();
    light["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
    light["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        split("[\r\n]"), split(" ?[a-zA-Z]+"), {"type": "Digits", "individual_digits": true},
        {"type": "Punctuation", "behavior": "Contiguous"}, bytes]});
    light["post_processor"] = json!({"type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [3], "tokens": ["<|user|>"]}}});
    light["model"]["ignore_merges"] = json!(true);
    light["model"]["unk_token"] = json!("a");
    light["added_tokens"].as_array_mut().unwrap().push(json!({"id": 270, "content": "ø",
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": false}));
    let mut ahead = own.clone();
    let pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    ahead["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split(pattern), bytes]});
    [&own, &light, &own, &light, &light, &ahead]
        .map(|value| value.to_string().into_bytes())
        .to_vec()
}

/// Files beside a tokenizer with chat templates in the ways of published ones.
pub fn chats() -> Vec<Vec<u8>> {
    let own = Tokenizer::from_json(std::str::from_utf8(&tokenizers()[0]).unwrap(), None)
        .unwrap()
        .config(&ChatTemplate::own(), 512);
    let with = |template: &str| {
        let mut config = own.clone();
        config["chat_template"] = json!(template);
        config["bos_token"] = json!({"__type": "AddedToken", "content": "<|pad|>"});
        config["add_bos_token"] = json!(true);
        config
    };
    let namespace = "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
        {% set ns = namespace(is_first=true, system='') %}{%- for message in messages %}\
        {%- if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{%- endif %}\
        {%- endfor %}{{ bos_token }}{{ ns.system | trim }}{%- for message in messages %}\
        {%- if loop.first or message.role != 'system' %}{{ '<' ~ message['role'] ~ '>' }}{{ message['content'] }}\
        {%- endif %}{%- endfor %}{% for i in range(3) %}{{ ('x' * i).upper().split('y') | tojson }}{% endfor %}";
    let macros = "{%- macro line(m) -%}{{ m.role.strip() ~ ': ' ~ m.content }}{%- endmacro -%}\
        {% for m in messages[::-1] | list | reverse %}{{ line(m) | replace('user', 'u') | indent(2) }}\
        {{ '%s-%d' | format(m.role, 3) }}{{ eos_token }}{% endfor %}\
        {{ messages | map(attribute='role') | join(',') }}{{ raise_exception('end') if messages | length > 9 }}";
    let mut named = own.clone();
    named["chat_template"] = json!([{"name": "tool", "template": "x"},
        {"name": "default", "template": own["chat_template"]}]);
    [own.clone(), with(namespace), with(macros), named]
        .map(|config| config.to_string().into_bytes())
        .to_vec()
}

/// Commits a small checkpoint in `run` and gives its folder.
pub fn checkpoint(run: &Path) -> PathBuf {
    let mut store = Store::open(run, 2).unwrap();
    let staging = store.begin("base-2").unwrap();
    let folder = staging.path();
    write_model_config(folder, &smoke()).unwrap();
    let entries = [TensorEntry { name: "a".to_string(), shape: vec![2, 3] }];
    write_tensors(&folder.join("model.safetensors"), &entries, &mut |_| Ok(vec![0.5; 6])).unwrap();
    let calibration = serde_json::to_vec(&Calibration::default()).unwrap();
    std::fs::write(folder.join("reward.json"), calibration).unwrap();
    let manifest = Manifest { stage: "base".to_string(), step: 2, ..Manifest::default() };
    store.commit(staging, manifest).unwrap().folder
}

/// A journal with every kind of event that a board looks into.
pub fn journal(aside: &Path) -> Vec<u8> {
    let path = aside.join("journal.jsonl");
    let mut journal = Journal::open(&path).unwrap();
    for event in [
        Event::new("run").with("stages", json!([{"name": "base", "kind": "sft", "steps": 4}])),
        Event::new("stage-start").of_stage("base", "sft").with("steps", 4),
        Event::step("base", "sft", 1).with("loss", 2.5).with("tokens", 64).with("seconds", 0.5),
        Event::new("phase").with("phase", "train"),
        Event::step("base", "sft", 2).with("loss", 1.5).with("reward", 0.25),
        Event::eval("base", "sft", 2, "held-out", "pass_at_1", 0.5, 300),
        Event::new("commit").of_stage("base", "sft").with("folder", "000001-base-2"),
        Event::new("note").with("text", "x\u{1b}[31m"),
        Event::new("restart").with("actor", "reward-scorer"),
        Event::new("stage-end").of_stage("base", "sft").with("seconds", 3.5),
        Event::new("end").with("state", "finished").with("export", "export"),
    ] {
        journal.append(&event.at(7.5)).unwrap();
    }
    read(&path)
}

/// The smoke run, its model's file beside it in `folder`.
pub fn run_toml(folder: &Path) -> (Vec<u8>, Loaded) {
    let path = root().join("configs/smoke.toml");
    std::fs::create_dir_all(folder.join("model")).unwrap();
    std::fs::copy(root().join("configs/model/smoke.json"), folder.join("model/smoke.json"))
        .unwrap();
    (read(&path), RunConfig::load(&path, &[]).unwrap())
}

/// The records of whose folder `run` is.
pub fn record(run: &Path, loaded: &Loaded) -> Vec<u8> {
    let words = ["rehearsal", "run", "a.toml"].map(str::to_string).to_vec();
    let resume = TypedCommand { directory: PathBuf::from("/x"), words };
    drop(run_folder::open(run, loaded, Wish::Plain, resume).unwrap());
    read(&run.join("run.json"))
}

/// A line of each schema.
pub fn lines() -> Vec<Vec<u8>> {
    let text = concat!(
        r#"{"text": "a b c", "prompt": "say 1", "answer": "1", "chosen": "x", "rejected": "y", "#,
        r#""messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}"#,
        "\n",
        r#"{"text": "", "prompt": [{"role": "system", "content": "s"}], "answer": null, "chosen": "", "#,
        r#""rejected": "é", "messages": [{"role": "user", "content": "\ud83d\ude00"}]}"#,
        "\n",
    );
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packed, text.as_bytes()).unwrap();
    vec![text.as_bytes().to_vec(), packed.finish().unwrap()]
}

/// An index of two shards, which are written beside it.
pub fn index(folder: &Path) -> Vec<u8> {
    for (shard, name) in [("model-00001-of-00002", "a"), ("model-00002-of-00002", "b")] {
        let entries = [TensorEntry { name: name.to_string(), shape: vec![2] }];
        let path = folder.join(format!("{shard}.safetensors"));
        write_tensors(&path, &entries, &mut |_| Ok(vec![1.0; 2])).unwrap();
    }
    json!({"metadata": {"total_size": 16}, "weight_map": {"a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors"}})
    .to_string()
    .into_bytes()
}

/// The second of two shards of an optimizer's file, which lies beside it with the index: elements 3 to 7 of a tensor.
pub fn pieces(folder: &Path) -> Vec<u8> {
    let whole = "optimizer.safetensors";
    let write = |number: usize, elements: Range<usize>| {
        let name = piece_name("m.x", elements.start);
        let entries = [TensorEntry { name: name.clone(), shape: vec![elements.len()] }];
        let (file, numbers) = (shard_name(whole, number, 2), vec![1.0; elements.len()]);
        let mut fetch = |_| Ok(numbers.clone());
        let record = write_shard(&folder.join(&file), &entries, "s", &mut fetch).unwrap();
        Shard { file, record, tensors: [(name, 4 * elements.len() as u64)].into() }
    };
    let shards = [write(0, 0..3), write(1, 3..7)];
    write_index(folder, whole, &[&shards[0], &shards[1]], "s").unwrap();
    read(&folder.join(&shards[1].file))
}

/// A GGUF file with every kind of value and of numbers that are written, as `candle` writes it.
pub fn ggufs() -> Vec<Vec<u8>> {
    let tensor = |kind, rows: usize| {
        let numbers: Vec<f32> = (0..rows * 32).map(|i| i as f32).collect();
        let tensor = Tensor::from_vec(numbers, (rows, 32), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, kind).unwrap()
    };
    let plain = tensor(GgmlDType::F32, 2);
    let (half, blocks) = (tensor(GgmlDType::BF16, 1), tensor(GgmlDType::Q8_0, 3));
    let texts = (0..5).map(|i| Text::String(format!("token {i}"))).collect();
    let keys = [
        ("general.architecture", Text::String("deepseek2".to_string())),
        ("general.alignment", Text::U32(32)),
        ("a.real", Text::F32(0.5)),
        ("a.flag", Text::Bool(true)),
        ("a.wide", Text::U64(1 << 40)),
        ("tokenizer.ggml.tokens", Text::Array(texts)),
        ("tokenizer.ggml.token_type", Text::Array((0..5).map(Text::I32).collect())),
    ];
    let keys: Vec<(&str, &Text)> = keys.iter().map(|(key, value)| (*key, value)).collect();
    let mut file = std::io::Cursor::new(Vec::new());
    let tensors = [("plain", &plain), ("half", &half), ("blocks", &blocks)];
    gguf_file::write(&mut file, &keys, &tensors).unwrap();
    vec![file.into_inner()]
}
