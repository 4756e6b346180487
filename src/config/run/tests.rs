//! A run of every kind of stage: what is read, written back and identified; its faults are in the two files below.

mod architectures;
mod keys;
mod rules;

use super::super::document::Source;
use super::*;

/// A small run with every kind of stage. Faults are planted by replacing one of its lines.
const RUN: &str = r#"seed = 1

[model]
config = "model.json"

[tokenizer]
vocab_size = 300
train_on = ["pages"]

[data]
held_out = ["held-out"]
[data.word_machine]
words = "words.txt"
[data.sets.pages]
file = "run:pages.jsonl"
schema = "text"
[data.sets.chats]
file = "run:conversations.jsonl"
schema = "messages"
[data.sets.pairs]
file = "run:helpful.jsonl"
schema = "preferences"
[data.sets.prompts]
file = "run:prompts.jsonl"
schema = "prompts"
[data.sets.held-out]
file = "run:held-out.jsonl"
schema = "prompts"

[engine]
budget = "1.5 GiB"

[checkpoint]
keep = 2

[[stage]]
name = "base"
kind = "pretrain"
data = [{ set = "pages" }]
steps = 10
batch = 4
sequence = 64

[[stage]]
name = "long"
kind = "long-context"
data = [{ set = "pages" }]
steps = 2
batch = 2
sequence = 128
factor = 2

[[stage]]
name = "sft"
kind = "sft"
data = "chats"
batch = 4
[[stage.eval]]
name = "solved"
data = "held-out"
verifier = "answer-line"
[stage.gate]
eval = "solved"
minimum = 0.1

[[stage]]
name = "helpful"
kind = "reward-model"
data = "pairs"
batch = 4

[[stage]]
name = "align"
kind = "grpo"
data = "prompts"
steps = 3
prompts = 2
group_size = 4
max_new_tokens = 32
reward = [{ verifier = "exact" }, { model = "helpful", weight = 0.3 }]
[stage.optimizer]
learning_rate = 2e-4
"#;

const MODEL: &str = r#"{
  "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
  "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
  "num_experts_per_tok": 2, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
  "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
  "max_position_embeddings": 64,
  "torch_dtype": "float32"
}
"#;

fn load(text: &str, model: &str, assignments: &[&str]) -> Result<RunConfig, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("model.json"), model).unwrap();
    let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
    RunConfig::parse(&Source::new("run.toml", text.to_string()), folder.path(), &assignments)
        .map(|(config, _)| config)
}

/// Replaces `old` in the run by `new` and expects the fault at the line of `old`, or at line `at` where it says so.
fn check_fault(old: &str, new: &str, at: &str, message: &str) {
    assert!(RUN.contains(old), "{old:?} does not stand in the run");
    let fault = load(&RUN.replacen(old, new, 1), MODEL, &[]).expect_err(new);
    assert_eq!(fault.to_string(), format!("run.toml:{at}: {message}"));
}

#[test]
fn the_run_itself_is_right_and_every_default_is_filled_in() {
    let config = load(RUN, MODEL, &[]).unwrap();
    assert_eq!(config.stages.len(), 5);
    assert_eq!(config.engine.page_tokens, 16);
    assert_eq!(config.engine.budget.unwrap().0, 1_610_612_736);
    assert_eq!(config.model.hidden_size, 32);
    let StageKind::Grpo(align) = &config.stages[4].kind else { panic!("the fifth stage is grpo") };
    assert_eq!(
        (align.kl_weight, align.optimizer.learning_rate, align.optimizer.beta2),
        (0.04, 2e-4, 0.95)
    );
}

#[test]
fn what_is_written_back_is_read_back_equal() {
    let config = load(RUN, MODEL, &[]).unwrap();
    let written = config.to_toml();
    assert!(
        written.contains("deadline_seconds = 600") && written.contains("hidden_size = 32"),
        "{written}"
    );
    assert_eq!(load(&written, MODEL, &[]).unwrap(), config);
}

#[test]
fn threads_console_and_gates_change_no_identity_and_everything_else_does() {
    let identity = |assignments: &[&str]| load(RUN, MODEL, assignments).unwrap().identity();
    let first = identity(&[]);
    assert_eq!(identity(&["engine.threads=7", "console.mode=plain"]), first);
    assert_eq!(identity(&["stage.sft.gate.minimum=0.9"]), first);
    for other in [
        "seed=2",
        "model.rope_theta=100",
        "stage.align.reward.1.weight=0",
        "checkpoint.keep=3",
        "engine.exact=false",
        "stage.sft.epochs=2",
    ] {
        assert_ne!(identity(&[other]), first, "{other}");
    }
    let moved = RUN.replace("seed = 1\n", "# A remark.\nseed   =   1\n");
    assert_eq!(load(&moved, MODEL, &[]).unwrap().identity(), first);
}

#[test]
fn keys_of_the_toml_and_the_command_line_override_the_models_file() {
    let text = RUN.replace("config = \"model.json\"", "config = \"model.json\"\nhidden_size = 48");
    assert_eq!(load(&text, MODEL, &[]).unwrap().model.hidden_size, 48);
    assert_eq!(load(&text, MODEL, &["model.hidden_size=56"]).unwrap().model.hidden_size, 56);
}

#[test]
fn yarn_is_read_under_its_old_and_new_names() {
    let yarn = |text: &str| {
        let model = MODEL.replace("\"torch_dtype\"", &format!("{text}, \"torch_dtype\""));
        load(RUN, &model, &[]).unwrap().model
    };
    let old = yarn(
        "\"rope_theta\": 500.0, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 16, \"mscale\": 0.707}",
    );
    let new = yarn(
        "\"rope_parameters\": {\"rope_theta\": 500.0, \"rope_type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 16, \"mscale\": 0.707}",
    );
    assert_eq!(old, new);
    assert_eq!(old.rope_scaling.unwrap().mscale, 0.707);
    let plain = yarn(
        "\"rope_parameters\": {\"rope_theta\": 500.0, \"rope_type\": \"default\"}, \"rope_scaling\": null",
    );
    assert_eq!((plain.rope_theta, plain.rope_scaling), (500.0, None));
    assert_eq!(
        load(RUN, MODEL, &["model.topk_method=gready"]).unwrap().model,
        load(RUN, MODEL, &[]).unwrap().model
    );
}

#[test]
fn the_resolved_config_has_absolute_paths_and_runs_from_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("start")).unwrap();
    std::fs::write(folder.path().join("model.json"), MODEL).unwrap();
    // The folder's own config says how long its model's sequences may be.
    std::fs::write(
        folder.path().join("start/config.json"),
        MODEL.replace("64,\n  \"torch", "128,\n  \"torch"),
    )
    .unwrap();
    let text = RUN.replace("kind = \"sft\"", "kind = \"sft\"\nstart_from = \"start\"");
    std::fs::write(folder.path().join("run.toml"), text).unwrap();
    let loaded = RunConfig::load(&folder.path().join("run.toml"), &[]).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("config.toml"), loaded.resolved_toml()).unwrap();
    let again = RunConfig::load(&elsewhere.path().join("config.toml"), &[]).unwrap().config;
    let base = loaded.folder.display();
    assert_eq!(again.data.word_machine.unwrap().words, format!("{base}/words.txt"));
    assert_eq!(again.stages[2].start_from.as_deref(), Some(format!("{base}/start").as_str()));
    assert_eq!(again.data.sets["pages"].file, "run:pages.jsonl");
}
