//! Tests of the export on an invented model.

use super::*;
use crate::checkpoint::model_json::{tests::tiny, write_model_config};
use crate::checkpoint::tensors::{MODEL_FILE, write_tensors};
use crate::checkpoint::tokenizer_json::write_tokenizer;

const TOKENIZER: &str = concat!(
    r#"{"added_tokens":[{"id":0,"content":"<|pad|>"},{"id":1,"content":"<|end|>"}],"#,
    r#""model":{"vocab":{}}}"#
);

fn entries(config: &ModelConfig) -> Vec<TensorEntry> {
    let entry =
        |name: &str, shape: &[usize]| TensorEntry { name: name.to_string(), shape: shape.to_vec() };
    vec![
        entry("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size]),
        entry("model.layers.0.input_layernorm.weight", &[config.hidden_size]),
        entry(
            "model.layers.1.mlp.experts.0.down_proj.weight",
            &[config.hidden_size, config.moe_intermediate_size],
        ),
        entry("model.norm.weight", &[config.hidden_size]),
        entry(HEAD, &[config.vocab_size, config.hidden_size]),
    ]
}

fn numbers(index: usize, entry: &TensorEntry) -> Vec<f32> {
    (0..entry.elements()).map(|i| (index * 1000) as f32 + i as f32 / 7.0).collect()
}

/// A run's folder with one finished stage.
fn model(extra: &[TensorEntry]) -> (tempfile::TempDir, PathBuf, Vec<TensorEntry>) {
    let run = tempfile::tempdir().expect("a temporary folder");
    let folder = run.path().join("source");
    std::fs::create_dir(&folder).expect("a folder");
    let config = tiny();
    let mut all = entries(&config);
    all.extend_from_slice(extra);
    write_model_config(&folder, &config).expect("a config");
    write_tensors(&folder.join(MODEL_FILE), &all, &mut |i| Ok(numbers(i, &all[i])))
        .expect("tensors");
    write_tokenizer(&folder, TOKENIZER.as_bytes(), Some("{{ x }}"), &config).expect("a tokenizer");
    (run, folder, all)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

fn bytes_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let files = list_files(folder).expect("files");
    files
        .into_iter()
        .map(|name| (name.clone(), std::fs::read(folder.join(name)).expect("a file")))
        .collect()
}

#[test]
fn an_export_holds_the_same_model_in_shards() {
    let (run, source, all) = model(&[]);
    let out = run.path().join("export");
    let report = export_in_shards(&source, &out, StoredType::F32, 10_000).expect("an export");
    assert_eq!((report.tensors, report.shards, report.notes.len()), (5, 2, 0));
    assert_eq!(report.parameters, all.iter().map(|e| e.elements() as u64).sum::<u64>());
    let names: Vec<String> = bytes_of(&out).into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        [
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(read_model_config(&out).expect("a config"), tiny().completed());
    let tensors = TensorFolder::open(&out).expect("tensors");
    for (index, entry) in all.iter().enumerate() {
        assert_eq!(tensors.shape(&entry.name), Some(entry.shape.as_slice()));
        assert_eq!(
            tensors.read_f32(&entry.name).expect("numbers"),
            numbers(index, entry),
            "{}",
            entry.name
        );
    }
    let index = json_of(&out.join(INDEX_FILE));
    assert_eq!(index["metadata"]["total_size"], json!(4 * report.parameters));
    assert_eq!(index["weight_map"][HEAD], "model-00002-of-00002.safetensors");
    assert_eq!(std::fs::read_to_string(out.join(TOKENIZER_FILE)).expect("a file"), TOKENIZER);
    assert_eq!(json_of(&out.join(TOKENIZER_CONFIG_FILE))["eos_token"], "<|end|>");
    assert_eq!(json_of(&out.join(GENERATION_FILE))["eos_token_id"], 1);
}

#[test]
fn an_export_of_an_export_and_a_second_export_have_the_same_bytes() {
    let (run, source, _) = model(&[]);
    let (one, two) = (run.path().join("one"), run.path().join("two"));
    export_hf(&source, &one, StoredType::F32).expect("an export");
    let first = bytes_of(&one);
    export_hf(&source, &one, StoredType::F32).expect("an export over an export");
    export_hf(&one, &two, StoredType::F32).expect("an export of an export");
    assert_eq!(bytes_of(&one), first);
    assert_eq!(bytes_of(&two), first);
    let left: Vec<String> = list_files(run.path()).expect("files").into_iter().collect();
    assert_eq!(left, ["one", "source", "two"], "nothing is left aside");
}

#[test]
fn a_reward_models_head_is_left_out_with_a_note() {
    let score = TensorEntry { name: SCORE_HEAD.to_string(), shape: vec![1, 8] };
    let (run, source, _) = model(&[score]);
    let out = run.path().join("export");
    let report = export_hf(&source, &out, StoredType::F32).expect("an export");
    assert!(report.notes[0].contains(SCORE_HEAD), "{:?}", report.notes);
    assert_eq!(TensorFolder::open(&out).expect("tensors").shape(SCORE_HEAD), None);
}

#[test]
fn keys_of_a_foreign_config_survive_and_remote_code_does_not() {
    let (run, source, _) = model(&[]);
    let mut config = json_of(&source.join(CONFIG_FILE));
    config["my_key"] = json!([1, 2]);
    config["auto_map"] = json!({"AutoConfig": "x.py"});
    config["torch_dtype"] = json!("bfloat16");
    std::fs::write(source.join(CONFIG_FILE), config.to_string()).expect("a config");
    let out = run.path().join("export");
    export_hf(&source, &out, StoredType::F32).expect("an export");
    let config = json_of(&out.join(CONFIG_FILE));
    assert_eq!((&config["my_key"], &config["torch_dtype"]), (&json!([1, 2]), &json!("float32")));
    assert!(config.get("auto_map").is_none());
}

#[test]
fn what_is_no_export_is_not_overwritten_and_nothing_is_left_aside() {
    let (run, source, _) = model(&[]);
    let out = run.path().join("photos");
    std::fs::create_dir(&out).expect("a folder");
    export_hf(&source, &out, StoredType::F32).expect("an empty folder is fine");
    std::fs::write(out.join("holiday.jpg"), "x").expect("a picture");
    let before = bytes_of(&out);
    let error =
        export_hf(&source, &out, StoredType::F32).expect_err("a foreign folder must be refused");
    assert!(
        matches!(error.downcast_ref(), Some(Fault::User(m)) if m.contains("holiday.jpg")),
        "{error:#}"
    );
    assert_eq!(bytes_of(&out), before);
    let error = export_hf(&source, &source, StoredType::F32)
        .expect_err("a model onto itself must be refused");
    assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{error:#}");
    std::fs::remove_file(source.join(TOKENIZER_FILE)).expect("a file less");
    let missing = run.path().join("missing");
    export_hf(&source, &missing, StoredType::F32)
        .expect_err("a model without a tokenizer must be refused");
    assert!(!missing.exists() && !beside(&missing, "tmp").exists());
}

/// Body of the process that [`killed_anywhere_an_export_is_whole_or_not_there`] kills; does nothing
/// otherwise.
#[test]
fn child_that_exports_until_it_is_killed() {
    let Some(run) = std::env::var_os("REHEARSAL_TEST_EXPORT") else { return };
    let run = Path::new(&run);
    export_hf(&run.join("source"), &run.join("export"), StoredType::F32).expect("an export");
}

#[test]
fn killed_anywhere_an_export_is_whole_or_not_there() {
    for point in ["export-write:3", "export-before-rename", "export-mid-rename"] {
        let (run, source, _) = model(&[]);
        let out = run.path().join("export");
        export_hf(&source, &out, StoredType::F32).expect("an export");
        let whole = bytes_of(&out);
        let child = "checkpoint::export::tests::child_that_exports_until_it_is_killed";
        let killed = std::process::Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", child])
            .env("REHEARSAL_TEST_EXPORT", run.path())
            .env("REHEARSAL_FAIL_AT", point)
            .env("REHEARSAL_FAIL_WITNESS", run.path().join("witness"))
            .output()
            .expect("the child runs");
        assert!(!killed.status.success(), "{point} must kill");
        let witness = std::fs::read_to_string(run.path().join("witness")).expect("a witness");
        assert_eq!(witness.trim(), point.split(':').next().expect("a name"));
        assert!(!out.exists() || bytes_of(&out) == whole, "{point} left half an export");
        export_hf(&source, &out, StoredType::F32).expect("the export goes on");
        assert_eq!(bytes_of(&out), whole, "{point}");
        let left: Vec<String> = list_files(run.path()).expect("files").into_iter().collect();
        assert_eq!(left, ["export", "source", "witness"], "{point} left rubbish");
    }
}

#[test]
fn an_export_folds_the_factors_of_scaled_latents_into_their_norms() {
    let (_run, source, _) = model(&[]);
    let mut config = read_model_config(&source).expect("a config");
    config.latent_scaling = LatentScaling::Sqrt;
    let (query, latent) = config.latent_factors();
    assert_eq!((query, latent), ((8.0f64 / 6.0).sqrt(), 2.0f64.sqrt()));
    let values = vec![1.0, -0.3, 7.0];
    let scaled = |factor: f64| values.iter().map(|x| x * factor as f32).collect::<Vec<_>>();
    let fold = |name: &str| fold(&config, &format!("model.layers.0.{name}.weight"), values.clone());
    assert_eq!(fold("self_attn.q_a_layernorm"), scaled(query));
    assert_eq!(fold("self_attn.kv_a_layernorm"), scaled(latent));
    assert_eq!(fold("input_layernorm"), values);
    assert_eq!(fold("self_attn.q_a_proj"), values);
}
