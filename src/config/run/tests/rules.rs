//! Broken rules, each with its message and place.

use super::*;
use crate::config::routing::Balance;

#[test]
fn numbers_and_sets_keep_their_rules() {
    check_fault(
        "keep = 2",
        "keep = 0",
        "34:1",
        "checkpoint.keep = 0 would keep nothing to resume from; use at least 1",
    );
    check_fault(
        "train_on = [\"pages\"]",
        "train_on = [\"pagse\"]",
        "8:13",
        "tokenizer.train_on.0 = \"pagse\" is no data set; did you mean `pages`?",
    );
    check_fault(
        "vocab_size = 300",
        "vocab_size = 400",
        "7:1",
        "tokenizer.vocab_size = 400 exceeds model.vocab_size = 320; lower it or raise the model's",
    );
    check_fault(
        "vocab_size = 300",
        "vocab_size = 200",
        "7:1",
        "tokenizer.vocab_size = 200 must be at least 261: 5 special tokens and 256 bytes",
    );
    check_fault(
        "vocab_size = 300\n",
        "",
        "6:2",
        "[tokenizer] takes exactly one of `file` (an existing tokenizer.json) and `vocab_size` (train one)",
    );
    check_fault(
        "file = \"run:pages.jsonl\"",
        "file = \"run:page.jsonl\"",
        "15:1",
        "data.sets.pages.file = \"run:page.jsonl\" is no file of [data.word_machine]; did you mean `pages.jsonl`?",
    );
    check_fault(
        "[data.word_machine]\nwords = \"words.txt\"\n",
        "",
        "16:1",
        "data.sets.chats.file = \"run:conversations.jsonl\" is written by [data.word_machine], which is missing; add it",
    );
    check_fault(
        "held_out = [\"held-out\"]",
        "held_out = [\"prompts\"]",
        "11:13",
        "data.held_out.0 = \"prompts\" is trained on by stage \"align\"; take it out of one of them",
    );
    check_fault(
        "schema = \"messages\"",
        "schema = \"messages\"\nfields = { prompt = \"q\" }",
        "20:12",
        "data.sets.chats.fields.prompt maps a field that schema \"messages\" does not have; it has `messages`",
    );
    check_fault(
        "schema = \"messages\"",
        "schema = \"messages\"\nsplit = { of = 4, from = 4, to = 4 }",
        "20:1",
        "data.sets.chats.split takes lines with from <= index % of < to; from = 4, to = 4 and of = 4 take none",
    );
}

#[test]
fn what_is_balanced_and_dropped_keeps_its_rules() {
    let no_devices = "is about devices, and the model's routing knows of one only; set model.topk_method = \
                      \"group_limited_greedy\" with model.n_group above 1, or leave it out";
    let base = |key: &str, at: &str, message: &str| {
        check_fault("sequence = 64", &format!("sequence = 64\n{key}"), at, message);
    };
    base("capacity_factor = 1", "43:1", &format!("stage.base.capacity_factor = 1 {no_devices}"));
    base(
        "balance = { device = 0.05 }",
        "43:13",
        &format!("stage.base.balance.device = 0.05 {no_devices}"),
    );
    base(
        "balance = { expert = 0.003, communication = 0.02 }",
        "43:29",
        &format!("stage.base.balance.communication = 0.02 {no_devices}"),
    );
    base(
        "balance = { expert = -1 }",
        "43:13",
        "stage.base.balance.expert = -1 must not be negative; 0 turns the loss off",
    );
    base(
        "balance = { experts = 1 }",
        "43:13",
        "unknown key `experts` in `stage.base.balance`; did you mean `expert`?",
    );
    let drops = "lets full devices drop tokens, which only pretrain and long-context stages do";
    for (line, at, path, kind) in [
        ("data = \"chats\"", "57:1", "stage.sft", "sft"),
        ("data = \"pairs\"", "70:1", "stage.helpful", "reward-model"),
        ("steps = 3", "77:1", "stage.align", "grpo"),
    ] {
        let message = format!("{path}.capacity_factor {drops}; leave it out of this {kind} stage");
        check_fault(line, &format!("{line}\ncapacity_factor = 1.0"), at, &message);
    }
    check_fault(
        "steps = 3",
        "steps = 3\nbalance = { expert = 0.1 }",
        "77:1",
        "stage.align.balance weighs the balance losses, which reward-model and grpo stages do not have; leave it out of \
         this grpo stage",
    );
}

#[test]
fn rollouts_in_few_bits_keep_their_rules() {
    check_fault(
        "steps = 3",
        "steps = 3\nrollout_dtype = \"bf16\"",
        "77:1",
        "stage.align.rollout_dtype = \"bf16\" samples from other numbers than the trainer's, and engine.exact promises the \
         same; set exact = false in [engine], or sample in f32",
    );
    let align = |keys: &str, at: &str, message: &str| {
        let text = RUN.replace("budget = \"1.5 GiB\"", "exact = false");
        let text = text.replace("steps = 3", &format!("steps = 3\n{keys}"));
        let fault = load(&text, MODEL, &[]).unwrap_err().to_string();
        assert!(fault.contains(at) && fault.contains(message), "{fault}");
    };
    align(
        "importance_limit = 3.0",
        "77:1",
        "stage.align.importance_limit changes nothing: rollouts in f32 have no importance weights; leave it out, or name \
         another rollout_dtype",
    );
    align(
        "updates = 2\nrollout_dtype = \"int8\"",
        "77:1",
        "stage.align.updates = 2 does not go with rollout_dtype = \"int8\": a second update needs the trainer's own \
         log-probabilities of before the first, which nothing computes; use 1, or sample in f32",
    );
    align(
        "rollout_dtype = \"int8\"\nimportance_limit = 0.5",
        "78:1",
        "stage.align.importance_limit = 0.5 must be at least 1, the weight of a token on which sampler and trainer agree; \
         2 is usual",
    );
    let blocks = ["engine.exact=false", "stage.align.rollout_dtype=fp8-block"];
    assert!(load(RUN, MODEL, &blocks).is_ok());
    let cut = [&blocks[..], &["cluster.rollout.tensor=2"]].concat();
    let fault = load(RUN, MODEL, &cut).unwrap_err().to_string();
    assert!(
        fault.contains("cluster.rollout.tensor = 2 cuts weights") && fault.contains("stage.align"),
        "{fault}"
    );
    let limit = |set: &[&str]| match &load(RUN, MODEL, set).unwrap().stages[4].kind {
        StageKind::Grpo(stage) => stage.importance_weights(),
        _ => panic!("stage 5 is GRPO"),
    };
    assert_eq!(limit(&[]), None);
    assert_eq!(limit(&["engine.exact=false", "stage.align.rollout_dtype=int8"]), Some(2.0));
    let both =
        ["engine.exact=false", "stage.align.rollout_dtype=fp8", "stage.align.importance_limit=5"];
    assert_eq!(limit(&both), Some(5.0));
}

#[test]
fn a_model_with_devices_may_balance_and_drop() {
    let grouped =
        ["model.topk_method=group_limited_greedy", "model.n_group=4", "model.topk_group=2"];
    let with = |more: &[&str]| load(RUN, MODEL, &[&grouped, more].concat());
    let factor = "stage.base.capacity_factor=1.0";
    let weights = "stage.base.balance={ device = 0.05, communication = 0.02 }";
    let config = with(&[factor, weights, "stage.long.capacity_factor=1.5"]).unwrap();
    let kind = |index: usize| &config.stages[index].kind;
    assert_eq!((kind(0).capacity_factor(), kind(1).capacity_factor()), (Some(1.0), Some(1.5)));
    let model = &config.model;
    let balance = kind(0).balance(model);
    // The experts' weight is the model's where the stage has none.
    assert_eq!((balance.expert, balance.device, balance.communication), (0.001, 0.05, 0.02));
    assert_eq!(kind(2).balance(model), Balance::of_experts(0.001));
    assert_eq!([kind(3).balance(model), kind(4).balance(model)], [Balance::NONE; 2]);
    let other = with(&["stage.sft.balance.expert=0.5"]).unwrap();
    assert_eq!(other.stages[2].kind.balance(model), Balance::of_experts(0.5));
    let fault = with(&["stage.base.capacity_factor=0"]).unwrap_err().to_string();
    assert!(
        fault.ends_with("capacity_factor = 0 must be above 0; leave it out to drop nothing"),
        "{fault}"
    );
    // Groups that routing is not limited to are no devices.
    assert!(load(RUN, MODEL, &["model.n_group=4", factor]).is_err());
}

#[test]
fn the_needle_tasks_files_exist_and_its_lengths_hold_its_facts() {
    check_fault(
        "file = \"run:pages.jsonl\"",
        "file = \"run:needle.jsonl\"",
        "15:1",
        "data.sets.pages.file = \"run:needle.jsonl\" is written by [data.needle], which is missing; add it",
    );
    let short =
        "= 20 does not hold data.needle.facts = 4 with a question; use at least 28, or fewer facts";
    for (key, message) in [
        ("length = 20", format!("length {short}")),
        ("long_length = 20", format!("long_length {short}")),
        ("facts = 17", "facts = 17 must be from 1 to 16".to_string()),
        ("pages = 0", "pages = 0 must be from 1 to 100000000".to_string()),
        ("length = 5000000", "length = 5000000 is too many; use at most 4194304".to_string()),
    ] {
        check_fault(
            "[data.word_machine]\n",
            &format!("[data.needle]\n{key}\n[data.word_machine]\n"),
            "13:1",
            &format!("data.needle.{message}"),
        );
    }
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table of cases")]
fn stages_keep_their_rules() {
    check_fault(
        "data = \"chats\"",
        "data = \"pages\"",
        "56:1",
        "stage.sft.data = \"pages\" is a set with schema \"text\", and this needs `messages` and `prompts`; name another set",
    );
    check_fault(
        "data = \"pairs\"",
        "data = \"pair\"",
        "69:1",
        "stage.helpful.data = \"pair\" is no data set; did you mean `pairs`?",
    );
    check_fault(
        "sequence = 64",
        "sequence = 65",
        "42:1",
        "stage.base.sequence = 65 exceeds the model's 64 positions; lower it or raise model.max_position_embeddings",
    );
    check_fault(
        "sequence = 128",
        "sequence = 129",
        "50:1",
        "stage.long.sequence = 129 exceeds 128, 64 positions times factor = 2; raise factor",
    );
    check_fault(
        "factor = 2",
        "factor = 0.5",
        "51:1",
        "stage.long.factor = 0.5 must be at least 1: YaRN only lengthens",
    );
    check_fault("steps = 3", "steps = 0", "76:1", "stage.align.steps = 0 must be at least 1");
    check_fault(
        "group_size = 4",
        "group_size = 1",
        "78:1",
        "stage.align.group_size = 1 must be at least 2: an advantage compares the rollouts of a group",
    );
    check_fault(
        "max_new_tokens = 32",
        "max_new_tokens = 128",
        "79:1",
        "stage.align.max_new_tokens = 128 leaves no room for a prompt in the model's 128 positions; lower it",
    );
    check_fault(
        "steps = 3",
        "steps = 3\ntop_p = 0.9",
        "77:1",
        "stage.align.top_p = 0.9 is refused: truncated sampling biases the ratio; use 1",
    );
    check_fault(
        "steps = 3",
        "steps = 3\ntop_k = 5",
        "77:1",
        "stage.align.top_k = 5 is refused: truncated sampling biases the ratio; use 0",
    );
    check_fault(
        "steps = 3",
        "steps = 3\ntemperature = 0",
        "77:1",
        "stage.align.temperature = 0 must be above 0: greedy rollouts of a group are all equal",
    );
    check_fault(
        "steps = 3",
        "steps = 3\nafter = \"later\"",
        "77:1",
        "stage.align.after = \"later\" is no policy stage that runs before this one; put it first or leave `after` out",
    );
    check_fault(
        "model = \"helpful\"",
        "model = \"sft\"",
        "80:37",
        "stage.align.reward.1.model = \"sft\" is no earlier reward-model stage; known are `helpful`",
    );
    check_fault(
        "{ verifier = \"exact\" }",
        "{ weight = 1 }",
        "80:11",
        "stage.align.reward.0 takes exactly one of `verifier` (a program) and `model` (a reward-model stage)",
    );
    check_fault(
        "{ verifier = \"exact\" }",
        "{ verifier = \"exact\", partial = 2 }",
        "80:33",
        "stage.align.reward.0.partial = 2 is a share; it must lie between 0 and 1",
    );
    check_fault(
        "learning_rate = 2e-4",
        "warmup_steps = 4",
        "82:1",
        "stage.align.optimizer.warmup_steps = 4 exceeds the stage's 3 updates; lower it",
    );
    check_fault(
        "learning_rate = 2e-4",
        "beta2 = 1",
        "82:1",
        "stage.align.optimizer.beta2 = 1 must be at least 0 and below 1",
    );
    check_fault(
        "eval = \"solved\"",
        "eval = \"slved\"",
        "63:1",
        "stage.sft.gate.eval = \"slved\" is no eval of the stage; it has `solved`",
    );
    check_fault(
        "minimum = 0.1\n",
        "",
        "62:8",
        "stage.sft.gate has neither `minimum` nor `maximum`, so it stops nothing; add one",
    );
    check_fault(
        "verifier = \"answer-line\"",
        "metric = \"accuracy\"",
        "58:1",
        "stage.sft.eval.0 measures accuracy, which only a reward-model stage has; use a verifier or perplexity",
    );
    check_fault(
        "name = \"helpful\"",
        "name = \"sft\"",
        "67:1",
        "two stages are named \"sft\"; names must differ",
    );
    check_fault(
        "name = \"helpful\"",
        "name = \"a/b\"",
        "67:1",
        "stage 3 has the name \"a/b\", which is no file name everywhere; use up to 64 letters, digits, `-`, `_` and `.`, the first a letter or digit",
    );
    check_fault(
        "data = [{ set = \"pages\" }]\nsteps = 10",
        "data = [{ set = \"pages\", share = 0 }]\nsteps = 10",
        "39:26",
        "stage.base.data.0.share = 0 must be above 0; to leave a set out, remove its entry",
    );
}

#[test]
fn a_stage_starts_from_what_exists() {
    let kind = "kind = \"sft\"";
    check_fault(
        kind,
        "kind = \"sft\"\nstart_from = \"y\"",
        "56:1",
        "stage sft starts from \"y\", which is neither an earlier stage nor a folder",
    );
    check_fault(
        kind,
        "kind = \"sft\"\nstart_from = \"align\"",
        "56:1",
        "stage sft starts from \"align\", which does not run before it; put that stage first",
    );
    check_fault(
        "kind = \"grpo\"",
        "kind = \"grpo\"\nstart_from = \"helpful\"",
        "75:1",
        "stage align starts from \"helpful\", which is a reward model and no policy; name another stage",
    );
    let base = RUN.find("[[stage]]\nname = \"base\"").unwrap();
    let fault = load(&RUN[..base], MODEL, &[]).unwrap_err();
    assert_eq!(fault.to_string(), "run.toml:1:1: the run has no [[stage]]; add at least one");
}

#[test]
fn a_stage_may_start_from_the_base_and_loses_the_longer_context_with_it() {
    let text = RUN
        .replace("kind = \"grpo\"", "kind = \"grpo\"\nstart_from = \"base\"")
        .replace("max_new_tokens = 32", "max_new_tokens = 64");
    let fault = load(&text, MODEL, &[]).unwrap_err().to_string();
    assert!(fault.contains("the model's 64 positions"), "{fault}");
}

#[test]
fn counts_that_nothing_could_hold_are_refused_before_they_are_multiplied() {
    for (assignment, told) in [
        (
            "stage.long.factor=1e9",
            "stage.long.factor = 1000000000 makes 64000000000 positions of 64",
        ),
        (
            "model.num_hidden_layers=1000000000000",
            "model.num_hidden_layers = 1000000000000 is more than any model has",
        ),
        (
            "model.max_position_embeddings=100000000",
            "is more than any model has; use at most 4194304",
        ),
        ("engine.threads=0", "engine.threads = 0 computes nothing; leave it out for all cores"),
        ("engine.threads=65535", "engine.threads = 65535 is too many; use at most 1024"),
        ("engine.mailbox=1000000000000", "engine.mailbox = 1000000000000 is too many"),
        (
            "stage.base.steps=1000000000000000",
            "stage.base.steps = 1000000000000000 is too many: `steps`, `batch` and `sequence`",
        ),
        (
            "stage.sft.epochs=9000000000000000000",
            "stage.sft.epochs = 9000000000000000000 is too many",
        ),
        (
            "stage.align.group_size=9000000000000000000",
            "stage.align.group_size = 9000000000000000000 is too many",
        ),
    ] {
        let fault = load(RUN, MODEL, &[assignment]).unwrap_err().to_string();
        assert!(fault.starts_with("--set ") && fault.contains(told), "{fault}");
    }
    let wide = MODEL
        .replace("\"hidden_size\": 32", "\"hidden_size\": 1048576")
        .replace("\"intermediate_size\": 64", "\"intermediate_size\": 1048576")
        .replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 9999");
    let fault = load(RUN, &wide, &[]).unwrap_err().to_string();
    assert!(fault.contains("parameters in"), "{fault}");
    // What can be counted is no fault of the config, however large: the machine refuses it.
    load(RUN, MODEL, &["stage.base.batch=1000000000"]).unwrap();
}

#[test]
fn a_folder_to_start_from_holds_a_policy_that_computes_the_same() {
    let place = tempfile::tempdir().unwrap();
    let short = "stage.sft.eval.solved.max_new_tokens=8";
    let start = format!("stage.sft.start_from={:?}", place.path().display().to_string());
    std::fs::write(place.path().join("config.json"), MODEL).unwrap();
    load(RUN, MODEL, &[&start, short]).unwrap();
    for key in [
        "num_experts_per_tok=1",
        "rms_norm_eps=1e-3",
        "routed_scaling_factor=16.0",
        "rope_theta=9.0",
    ] {
        let fault =
            load(RUN, MODEL, &[&start, short, &format!("model.{key}")]).unwrap_err().to_string();
        let (key, value) = key.split_once('=').unwrap();
        let told = fault.contains(&format!("model.{key} = "))
            && fault.contains("take that model with [model] config = ");
        assert!(told && fault.starts_with(&format!("--set {start}")), "{value}: {fault}");
    }
    std::fs::write(place.path().join("reward.json"), "{}").unwrap();
    let fault = load(RUN, MODEL, &[&start, short]).unwrap_err().to_string();
    assert!(fault.contains("which is a reward model and no policy"), "{fault}");
}

#[test]
fn as_many_reward_models_may_judge_as_a_plan_of_offloading_tells_apart() {
    let run = |count: usize| {
        let judge = |i: usize| {
            format!(
                "[[stage]]\nname = \"judge-{i}\"\nkind = \"reward-model\"\ndata = \"pairs\"\nbatch = 4\n\n"
            )
        };
        let stages: String = (1..count).map(judge).collect();
        let entry = |i: usize| format!("{{ model = \"judge-{i}\" }}, ");
        let entries: String = (1..count).map(entry).collect();
        let align = "[[stage]]\nname = \"align\"";
        let text = RUN.replacen(align, &format!("{stages}{align}"), 1);
        load(
            &text.replacen("{ model = \"helpful\"", &format!("{entries}{{ model = \"helpful\""), 1),
            MODEL,
            &[],
        )
    };
    assert_eq!(run(28).unwrap().stages.len(), 4 + 28);
    let fault = run(29).unwrap_err().to_string();
    assert!(
        fault.ends_with("stage.align.reward names 29 reward models; use at most 28"),
        "{fault}"
    );
}
