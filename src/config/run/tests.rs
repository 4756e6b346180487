//! Every wrong key and value of a run, with its message and place.

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
    RunConfig::parse(&Source::new("run.toml", text.to_string()), folder.path(), &assignments).map(|(config, _)| config)
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
    assert_eq!((align.kl_weight, align.optimizer.learning_rate, align.optimizer.beta2), (0.04, 2e-4, 0.95));
}

#[test]
fn what_is_written_back_is_read_back_equal() {
    let config = load(RUN, MODEL, &[]).unwrap();
    let written = config.to_toml();
    assert!(written.contains("deadline_seconds = 600") && written.contains("hidden_size = 32"), "{written}");
    assert_eq!(load(&written, MODEL, &[]).unwrap(), config);
}

#[test]
fn threads_and_console_change_no_identity_and_everything_else_does() {
    let identity = |assignments: &[&str]| load(RUN, MODEL, assignments).unwrap().identity();
    let first = identity(&[]);
    assert_eq!(identity(&["engine.threads=7", "console.mode=plain"]), first);
    for other in ["seed=2", "model.rope_theta=100", "stage.align.reward.1.weight=0", "checkpoint.keep=3", "stage.sft.epochs=2"] {
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
fn wrong_text_keys_and_types_are_named_with_their_place() {
    check_fault("[tokenizer]", "[tokenizer", "6:11", "not valid TOML: unclosed table, expected `]`");
    check_fault("seed = 1", "seeed = 1", "1:1", "unknown key `seeed`; did you mean `seed`?");
    check_fault("keep = 2", "keeep = 2", "34:1", "unknown key `keeep` in `checkpoint`; did you mean `keep`?");
    check_fault("seed = 1", "seed = \"x\"", "1:8", "seed = \"x\" is a text; expected a whole number of at least 0");
    check_fault("seed = 1", "seed = -1", "1:8", "seed = -1 is a whole number; expected a whole number of at least 0");
    check_fault("seed = 1", "seed = 1.5", "1:8", "seed = 1.5 is a number; expected a whole number of at least 0");
    check_fault("seed = 1", "seed = 99999999999999999999", "1:8", "99999999999999999999 is too large a number; the largest is 9223372036854775807");
    check_fault("factor = 2", "factor = nan", "51:10", "nan is not a finite number");
    check_fault("steps = 10", "stesp = 10", "40:1", "unknown key `stesp` in `stage.base`; did you mean `steps`?");
    check_fault("steps = 10\n", "", "36:1", "`stage.base` has no key `steps`, which has no default; add it");
    check_fault("batch = 4", "batch = [4]", "41:9", "stage.base.batch = [...] is a list; expected a whole number of at least 0");
    check_fault("schema = \"text\"", "schema = \"txt\"", "16:10", "data.sets.pages.schema = \"txt\" is not known; did you mean `text`?");
    check_fault("budget = \"1.5 GiB\"", "budget = \"1.5 GB\"", "31:10", "engine.budget = \"1.5 GB\" is a text; expected bytes, as in \"1.5 GiB\", \"512 MiB\" or 1000000");
    check_fault("learning_rate = 2e-4", "learning_rat = 2e-4", "82:1", "unknown key `learning_rat` in `stage.align.optimizer`; did you mean `learning_rate`?");
    check_fault("weight = 0.3", "wieght = 0.3", "80:56", "unknown key `wieght` in `stage.align.reward.1`; did you mean `weight`?");
    check_fault("minimum = 0.1", "minimun = 0.1", "64:1", "unknown key `minimun` in `stage.sft.gate`; did you mean `minimum`?");
    check_fault("verifier = \"answer-line\"", "verifier = \"answer_line\"", "61:12", "stage.sft.eval.0.verifier = \"answer_line\" is not known; did you mean `answer-line`?");
    check_fault("[[stage]]\nname = \"base\"", "[[stage]]\nnaem = \"base\"", "37:1", "unknown key `naem` in `stage.0`; did you mean `name`?");
}

#[test]
fn a_wrong_kind_of_stage_names_the_nearest() {
    check_fault("kind = \"grpo\"", "kind = \"grppo\"", "74:8", "stage.align.kind = \"grppo\" is no kind of stage; did you mean `grpo`?");
    check_fault("kind = \"grpo\"\n", "", "72:1", "`stage.align` has no `kind`; it is one of `pretrain`, `long-context`, `sft`, `reward-model` and `grpo`");
    check_fault("kind = \"grpo\"", "kind = 3", "74:8", "stage.align.kind = 3 is no kind of stage; known are `pretrain`, `long-context`, `sft`, `reward-model` and `grpo`");
}

#[test]
fn numbers_and_sets_keep_their_rules() {
    check_fault("keep = 2", "keep = 0", "34:1", "checkpoint.keep = 0 would keep nothing to resume from; use at least 1");
    check_fault("train_on = [\"pages\"]", "train_on = [\"pagse\"]", "8:13", "tokenizer.train_on.0 = \"pagse\" is no data set; did you mean `pages`?");
    check_fault("vocab_size = 300", "vocab_size = 400", "7:1", "tokenizer.vocab_size = 400 exceeds model.vocab_size = 320; lower it or raise the model's");
    check_fault("vocab_size = 300", "vocab_size = 200", "7:1", "tokenizer.vocab_size = 200 must be at least 261: 5 special tokens and 256 bytes");
    check_fault("vocab_size = 300\n", "", "6:2", "[tokenizer] takes exactly one of `file` (an existing tokenizer.json) and `vocab_size` (train one)");
    check_fault("file = \"run:pages.jsonl\"", "file = \"run:page.jsonl\"", "15:1", "data.sets.pages.file = \"run:page.jsonl\" is no file of the word machine; did you mean `pages.jsonl`?");
    check_fault("[data.word_machine]\nwords = \"words.txt\"\n", "", "16:1", "data.sets.chats.file = \"run:conversations.jsonl\" is written by [data.word_machine], which is missing; add it");
    check_fault("held_out = [\"held-out\"]", "held_out = [\"prompts\"]", "11:13", "data.held_out.0 = \"prompts\" is trained on by stage \"align\"; take it out of one of them");
    check_fault("schema = \"messages\"", "schema = \"messages\"\nfields = { prompt = \"q\" }", "20:12", "data.sets.chats.fields.prompt maps a field that schema \"messages\" does not have; it has `messages`");
    check_fault("schema = \"messages\"", "schema = \"messages\"\nsplit = { of = 4, from = 4, to = 4 }", "20:1", "data.sets.chats.split takes lines with from <= index % of < to; from = 4, to = 4 and of = 4 take none");
}

#[test]
fn stages_keep_their_rules() {
    check_fault("data = \"chats\"", "data = \"pages\"", "56:1", "stage.sft.data = \"pages\" is a set with schema \"text\", and this needs `messages` and `prompts`; name another set");
    check_fault("data = \"pairs\"", "data = \"pair\"", "69:1", "stage.helpful.data = \"pair\" is no data set; did you mean `pairs`?");
    check_fault("sequence = 64", "sequence = 65", "42:1", "stage.base.sequence = 65 exceeds the model's 64 positions; lower it or raise model.max_position_embeddings");
    check_fault("sequence = 128", "sequence = 129", "50:1", "stage.long.sequence = 129 exceeds 128, 64 positions times factor = 2; raise factor");
    check_fault("factor = 2", "factor = 0.5", "51:1", "stage.long.factor = 0.5 must be at least 1: YaRN only lengthens");
    check_fault("steps = 3", "steps = 0", "76:1", "stage.align.steps = 0 must be at least 1");
    check_fault("group_size = 4", "group_size = 1", "78:1", "stage.align.group_size = 1 must be at least 2: an advantage compares the rollouts of a group");
    check_fault("max_new_tokens = 32", "max_new_tokens = 128", "79:1", "stage.align.max_new_tokens = 128 leaves no room for a prompt in the model's 128 positions; lower it");
    check_fault("steps = 3", "steps = 3\ntop_p = 0.9", "77:1", "stage.align.top_p = 0.9 is refused: truncated sampling biases the ratio; use 1");
    check_fault("steps = 3", "steps = 3\ntop_k = 5", "77:1", "stage.align.top_k = 5 is refused: truncated sampling biases the ratio; use 0");
    check_fault("steps = 3", "steps = 3\ntemperature = 0", "77:1", "stage.align.temperature = 0 must be above 0: greedy rollouts of a group are all equal");
    check_fault("steps = 3", "steps = 3\nafter = \"later\"", "77:1", "stage.align.after = \"later\" is no policy stage that runs before this one; put it first or leave `after` out");
    check_fault("model = \"helpful\"", "model = \"sft\"", "80:37", "stage.align.reward.1.model = \"sft\" is no earlier reward-model stage; known are `helpful`");
    check_fault("{ verifier = \"exact\" }", "{ weight = 1 }", "80:11", "stage.align.reward.0 takes exactly one of `verifier` (a program) and `model` (a reward-model stage)");
    check_fault("{ verifier = \"exact\" }", "{ verifier = \"exact\", partial = 2 }", "80:33", "stage.align.reward.0.partial = 2 is a share; it must lie between 0 and 1");
    check_fault("learning_rate = 2e-4", "warmup_steps = 4", "82:1", "stage.align.optimizer.warmup_steps = 4 exceeds the stage's 3 updates; lower it");
    check_fault("learning_rate = 2e-4", "beta2 = 1", "82:1", "stage.align.optimizer.beta2 = 1 must be at least 0 and below 1");
    check_fault("eval = \"solved\"", "eval = \"slved\"", "63:1", "stage.sft.gate.eval = \"slved\" is no eval of the stage; it has `solved`");
    check_fault("minimum = 0.1\n", "", "62:8", "stage.sft.gate has neither `minimum` nor `maximum`, so it stops nothing; add one");
    check_fault("verifier = \"answer-line\"", "metric = \"accuracy\"", "58:1", "stage.sft.eval.0 measures accuracy, which only a reward-model stage has; use a verifier or perplexity");
    check_fault("name = \"helpful\"", "name = \"sft\"", "67:1", "two stages are named \"sft\"; names must differ");
    check_fault("name = \"helpful\"", "name = \"a/b\"", "67:1", "stage 3 has the name \"a/b\", which is no file name everywhere; use up to 64 letters, digits, `-`, `_` and `.`, the first a letter or digit");
    check_fault("data = [{ set = \"pages\" }]\nsteps = 10", "data = [{ set = \"pages\", share = 0 }]\nsteps = 10", "39:26", "stage.base.data.0.share = 0 must be above 0; to leave a set out, remove its entry");
}

#[test]
fn a_stage_starts_from_what_exists() {
    let kind = "kind = \"sft\"";
    check_fault(kind, "kind = \"sft\"\nstart_from = \"y\"", "56:1", "stage sft starts from \"y\", which is neither an earlier stage nor a folder");
    check_fault(kind, "kind = \"sft\"\nstart_from = \"align\"", "56:1", "stage sft starts from \"align\", which does not run before it; put that stage first");
    check_fault("kind = \"grpo\"", "kind = \"grpo\"\nstart_from = \"helpful\"", "75:1", "stage align starts from \"helpful\", which is a reward model and no policy; name another stage");
    let base = RUN.find("[[stage]]\nname = \"base\"").unwrap();
    let fault = load(&RUN[..base], MODEL, &[]).unwrap_err();
    assert_eq!(fault.to_string(), "run.toml:1:1: the run has no [[stage]]; add at least one");
}

#[test]
fn a_stage_may_start_from_the_base_and_loses_the_longer_context_with_it() {
    let text = RUN.replace("kind = \"grpo\"", "kind = \"grpo\"\nstart_from = \"base\"").replace("max_new_tokens = 32", "max_new_tokens = 64");
    let fault = load(&text, MODEL, &[]).unwrap_err().to_string();
    assert!(fault.contains("the model's 64 positions"), "{fault}");
}

#[test]
fn a_fault_of_the_command_line_names_it() {
    for (assignment, message) in [
        ("seeed=1", "unknown key `seeed`; did you mean `seed`?"),
        ("engine.thread=1", "unknown key `thread` in `engine`; did you mean `threads`?"),
        ("stage.align.steps=many", "stage.align.steps = \"many\" is a text; expected a whole number of at least 0"),
        ("stage.align.group_size=1", "stage.align.group_size = 1 must be at least 2: an advantage compares the rollouts of a group"),
        ("model.qk_rope_head_dim=7", "model.qk_rope_head_dim = 7 is odd, and RoPE turns pairs; make it even"),
        ("engine.offload=[\"optimzer\"]", "engine.offload.0 = \"optimzer\" is not known; did you mean `optimizer`?"),
    ] {
        let fault = load(RUN, MODEL, &[assignment]).unwrap_err();
        assert_eq!(fault.to_string(), format!("--set {assignment}: {message}"));
    }
}

#[test]
fn faults_of_the_model_point_into_its_own_file() {
    let check_model = |old: &str, new: &str, place: &str, message: &str| {
        assert!(MODEL.contains(old), "{old}");
        let fault = load(RUN, &MODEL.replacen(old, new, 1), &[]).expect_err(new).to_string();
        assert!(fault.ends_with(&format!("/model.json:{place}: {message}")), "{fault}");
    };
    check_model("\"hidden_size\": 32", "\"hidden_size\": \"32\"", "2:37", "model.hidden_size = \"32\" is a text; expected a whole number of at least 0");
    check_model("\"v_head_dim\": 8", "\"v_head_dim\": 0", "5:49", "model.v_head_dim = 0 must be at least 1");
    check_model("\"torch_dtype\"", "\"n_group\": 3, \"torch_dtype\"", "7:3", "model.n_group = 3 does not divide model.n_routed_experts = 8; use 1, 2, 4, 8");
    check_model("\"torch_dtype\"", "\"n_group\": 2, \"topk_group\": 3, \"torch_dtype\"", "7:17", "model.topk_group = 3 must lie between 1 and model.n_group = 2");
    check_model("\"num_experts_per_tok\": 2", "\"n_group\": 8, \"topk_method\": \"group_limited_greedy\", \"num_experts_per_tok\": 2", "4:56", "model.num_experts_per_tok = 2 must lie between 1 and 1, the routed experts that a token may use");
    check_model("\"torch_dtype\"", "\"hidden_act\": \"gelu\", \"torch_dtype\"", "7:3", "model.hidden_act = \"gelu\" is not built; use \"silu\"");
    check_model("\"torch_dtype\"", "\"attention_bias\": true, \"torch_dtype\"", "7:3", "model.attention_bias = true is not built, and DeepSeek-V2 has no biases; use false");
    check_model("\"torch_dtype\"", "\"topk_method\": \"noaux_tc\", \"torch_dtype\"", "7:18", "model.topk_method = \"noaux_tc\" is not known; known are `gready`, `greedy` and `group_limited_greedy`");
    check_model("\"torch_dtype\"", "\"scoring_func\": \"sigmoid\", \"torch_dtype\"", "7:19", "model.scoring_func = \"sigmoid\" is not known; known are `softmax`");
    check_model("\"torch_dtype\"", "\"model_type\": \"llama\", \"torch_dtype\"", "7:3", "model.model_type = \"llama\" is another architecture; only \"deepseek_v2\" is built");
    check_model("\"torch_dtype\"", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 0.5, \"original_max_position_embeddings\": 64}, \"torch_dtype\"", "7:36", "model.rope_scaling.factor = 0.5 must be at least 1: YaRN only lengthens");
    check_model("\"kv_lora_rank\": 16,", "", "1:1", "`model` has no key `kv_lora_rank`, which has no default; add it");
    check_model("64,\n  \"torch", "64\n  \"torch", "7:3", "not valid JSON: expected `,` or `}`");
}

#[test]
fn a_model_in_the_toml_refuses_unknown_keys_and_a_missing_file_is_named() {
    check_fault("config = \"model.json\"", "config = \"model.json\"\nhiden_size = 3", "5:1", "unknown key `hiden_size` in `model`; did you mean `hidden_size`?");
    check_fault("config = \"model.json\"", "config = 3", "4:10", "model.config = 3 is a whole number; expected a path");
    let fault = load(&RUN.replace("model.json", "absent.json"), MODEL, &[]).unwrap_err().to_string();
    assert!(fault.starts_with("run.toml:4:10: model.config = \"absent.json\" (") && fault.contains("cannot be read"), "{fault}");
    let fault = load("seed = 1\n[[stage]]\n", MODEL, &[]).unwrap_err().to_string();
    assert_eq!(fault, "run.toml:1:1: the run has no [model]; add one with config = \"model/quickstart.json\" or the published keys");
}

#[test]
fn yarn_is_read_under_its_old_and_new_names() {
    let yarn = |text: &str| {
        let model = MODEL.replace("\"torch_dtype\"", &format!("{text}, \"torch_dtype\""));
        load(RUN, &model, &[]).unwrap().model
    };
    let old = yarn("\"rope_theta\": 500.0, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 16, \"mscale\": 0.707}");
    let new = yarn("\"rope_parameters\": {\"rope_theta\": 500.0, \"rope_type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 16, \"mscale\": 0.707}");
    assert_eq!(old, new);
    assert_eq!(old.rope_scaling.unwrap().mscale, 0.707);
    let plain = yarn("\"rope_parameters\": {\"rope_theta\": 500.0, \"rope_type\": \"default\"}, \"rope_scaling\": null");
    assert_eq!((plain.rope_theta, plain.rope_scaling), (500.0, None));
    assert_eq!(load(RUN, MODEL, &["model.topk_method=gready"]).unwrap().model, load(RUN, MODEL, &[]).unwrap().model);
}

#[test]
fn a_file_that_is_not_there_is_a_fault_of_the_user() {
    let fault = RunConfig::load(Path::new("/nowhere/run.toml"), &[]).unwrap_err().to_string();
    assert_eq!(fault, "/nowhere/run.toml: cannot be read: No such file or directory (os error 2)");
}

#[test]
fn the_resolved_config_has_absolute_paths_and_runs_from_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("start")).unwrap();
    std::fs::write(folder.path().join("model.json"), MODEL).unwrap();
    // The folder's own config says how long its model's sequences may be.
    std::fs::write(folder.path().join("start/config.json"), MODEL.replace("64,\n  \"torch", "128,\n  \"torch")).unwrap();
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
