//! Wrong keys, types and words, each with its message and place.

use super::*;

#[test]
#[allow(clippy::too_many_lines, reason = "a table of cases")]
fn wrong_text_keys_and_types_are_named_with_their_place() {
    check_fault(
        "[tokenizer]",
        "[tokenizer",
        "6:11",
        "not valid TOML: unclosed table, expected `]`",
    );
    check_fault("seed = 1", "seeed = 1", "1:1", "unknown key `seeed`; did you mean `seed`?");
    check_fault(
        "keep = 2",
        "keeep = 2",
        "34:1",
        "unknown key `keeep` in `checkpoint`; did you mean `keep`?",
    );
    check_fault(
        "seed = 1",
        "seed = \"x\"",
        "1:8",
        "seed = \"x\" is a text; expected a whole number of at least 0",
    );
    check_fault(
        "seed = 1",
        "seed = -1",
        "1:8",
        "seed = -1 is a whole number; expected a whole number of at least 0",
    );
    check_fault(
        "seed = 1",
        "seed = 1.5",
        "1:8",
        "seed = 1.5 is a number; expected a whole number of at least 0",
    );
    check_fault(
        "seed = 1",
        "seed = 99999999999999999999",
        "1:8",
        "99999999999999999999 is too large a number; the largest is 9223372036854775807",
    );
    check_fault("factor = 2", "factor = nan", "51:10", "nan is not a finite number");
    check_fault(
        "steps = 10",
        "stesp = 10",
        "40:1",
        "unknown key `stesp` in `stage.base`; did you mean `steps`?",
    );
    check_fault(
        "steps = 10\n",
        "",
        "36:1",
        "`stage.base` has no key `steps`, which has no default; add it",
    );
    check_fault(
        "batch = 4",
        "batch = [4]",
        "41:9",
        "stage.base.batch = [...] is a list; expected a whole number of at least 0",
    );
    check_fault(
        "schema = \"text\"",
        "schema = \"txt\"",
        "16:10",
        "data.sets.pages.schema = \"txt\" is not known; did you mean `text`?",
    );
    check_fault(
        "budget = \"1.5 GiB\"",
        "budget = \"1.5 GB\"",
        "31:10",
        "engine.budget = \"1.5 GB\" is a text; expected bytes, as in \"1.5 GiB\", \"512 MiB\" or 1000000",
    );
    check_fault(
        "learning_rate = 2e-4",
        "learning_rat = 2e-4",
        "82:1",
        "unknown key `learning_rat` in `stage.align.optimizer`; did you mean `learning_rate`?",
    );
    check_fault(
        "weight = 0.3",
        "wieght = 0.3",
        "80:56",
        "unknown key `wieght` in `stage.align.reward.1`; did you mean `weight`?",
    );
    check_fault(
        "minimum = 0.1",
        "minimun = 0.1",
        "64:1",
        "unknown key `minimun` in `stage.sft.gate`; did you mean `minimum`?",
    );
    check_fault(
        "verifier = \"answer-line\"",
        "verifier = \"answer_line\"",
        "61:12",
        "stage.sft.eval.0.verifier = \"answer_line\" is not known; did you mean `answer-line`?",
    );
    check_fault(
        "[[stage]]\nname = \"base\"",
        "[[stage]]\nnaem = \"base\"",
        "37:1",
        "unknown key `naem` in `stage.0`; did you mean `name`?",
    );
}

#[test]
fn a_wrong_kind_of_stage_names_the_nearest() {
    check_fault(
        "kind = \"grpo\"",
        "kind = \"grppo\"",
        "74:8",
        "stage.align.kind = \"grppo\" is no kind of stage; did you mean `grpo`?",
    );
    check_fault(
        "kind = \"grpo\"\n",
        "",
        "72:1",
        "`stage.align` has no `kind`; it is one of `pretrain`, `long-context`, `sft`, `reward-model` and `grpo`",
    );
    check_fault(
        "kind = \"grpo\"",
        "kind = 3",
        "74:8",
        "stage.align.kind = 3 is no kind of stage; known are `pretrain`, `long-context`, `sft`, `reward-model` and `grpo`",
    );
}

#[test]
fn a_fault_of_the_command_line_names_it() {
    for (assignment, message) in [
        ("seeed=1", "unknown key `seeed`; did you mean `seed`?"),
        ("engine.thread=1", "unknown key `thread` in `engine`; did you mean `threads`?"),
        (
            "stage.align.steps=many",
            "stage.align.steps = \"many\" is a text; expected a whole number of at least 0",
        ),
        (
            "stage.align.group_size=1",
            "stage.align.group_size = 1 must be at least 2: an advantage compares the rollouts of a group",
        ),
        (
            "model.qk_rope_head_dim=7",
            "model.qk_rope_head_dim = 7 is odd, and RoPE turns pairs; make it even",
        ),
        (
            "engine.offload=[\"optimzer\"]",
            "engine.offload.0 = \"optimzer\" is not known; did you mean `optimizer`?",
        ),
        (
            "engine.offload=atuo",
            "engine.offload = \"atuo\" is a text; expected \"auto\" or a list of what leaves, as in [\"optimizer\", \"reference\"]",
        ),
        (
            "engine.host_budget=4 GB",
            "engine.host_budget = \"4 GB\" is a text; expected bytes, as in \"1.5 GiB\", \"512 MiB\" or 1000000",
        ),
    ] {
        let fault = load(RUN, MODEL, &[assignment]).unwrap_err();
        assert_eq!(fault.to_string(), format!("--set {assignment}: {message}"));
    }
}

#[test]
fn transfers_beside_computation_are_for_a_plan() {
    let overlap = |more: &[&str]| load(RUN, MODEL, &[more, &["engine.overlap=false"]].concat());
    assert!(!overlap(&["engine.offload=auto"]).unwrap().engine.overlap);
    assert_eq!(overlap(&["engine.offload=auto"]).unwrap().engine.offload, None);
    let fault = overlap(&["engine.offload=[]"]).unwrap_err().to_string();
    assert!(fault.contains("engine.overlap = false is for engine.offload = \"auto\""), "{fault}");
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table of cases")]
fn faults_of_the_model_point_into_its_own_file() {
    let check_model = |old: &str, new: &str, place: &str, message: &str| {
        assert!(MODEL.contains(old), "{old}");
        let fault = load(RUN, &MODEL.replacen(old, new, 1), &[]).expect_err(new).to_string();
        assert!(fault.ends_with(&format!("/model.json:{place}: {message}")), "{fault}");
    };
    check_model(
        "\"hidden_size\": 32",
        "\"hidden_size\": \"32\"",
        "2:37",
        "model.hidden_size = \"32\" is a text; expected a whole number of at least 0",
    );
    check_model(
        "\"v_head_dim\": 8",
        "\"v_head_dim\": 0",
        "5:49",
        "model.v_head_dim = 0 must be at least 1",
    );
    check_model(
        "\"torch_dtype\"",
        "\"n_group\": 3, \"torch_dtype\"",
        "7:3",
        "model.n_group = 3 does not divide model.n_routed_experts = 8; use 1, 2, 4, 8",
    );
    check_model(
        "\"torch_dtype\"",
        "\"n_group\": 2, \"topk_group\": 3, \"torch_dtype\"",
        "7:17",
        "model.topk_group = 3 must lie between 1 and model.n_group = 2",
    );
    check_model(
        "\"num_experts_per_tok\": 2",
        "\"n_group\": 8, \"topk_method\": \"group_limited_greedy\", \"num_experts_per_tok\": 2",
        "4:56",
        "model.num_experts_per_tok = 2 must lie between 1 and 1, the routed experts that a token may use",
    );
    check_model(
        "\"torch_dtype\"",
        "\"hidden_act\": \"gelu\", \"torch_dtype\"",
        "7:3",
        "model.hidden_act = \"gelu\" is not built; use \"silu\"",
    );
    check_model(
        "\"torch_dtype\"",
        "\"attention_bias\": true, \"torch_dtype\"",
        "7:3",
        "model.attention_bias = true is not built: no layer here has biases; use false",
    );
    check_model(
        "\"torch_dtype\"",
        "\"topk_method\": \"noaux_tc\", \"torch_dtype\"",
        "7:18",
        "model.topk_method = \"noaux_tc\" is not known; known are `gready`, `greedy` and `group_limited_greedy`",
    );
    check_model(
        "\"torch_dtype\"",
        "\"scoring_func\": \"sigmoid\", \"torch_dtype\"",
        "7:19",
        "model.scoring_func = \"sigmoid\" is not known; known are `softmax`",
    );
    check_model(
        "\"torch_dtype\"",
        "\"model_type\": \"mixtral\", \"torch_dtype\"",
        "7:17",
        "model.model_type = \"mixtral\" is not known; known are `deepseek_v2` and `llama`",
    );
    check_model(
        "\"torch_dtype\"",
        "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 0.5, \"original_max_position_embeddings\": 64}, \"torch_dtype\"",
        "7:36",
        "model.rope_scaling.factor = 0.5 must be at least 1: YaRN only lengthens",
    );
    check_model(
        "\"kv_lora_rank\": 16,",
        "",
        "1:1",
        "`model` has no key `kv_lora_rank`, which has no default; add it",
    );
    check_model("64,\n  \"torch", "64\n  \"torch", "7:3", "not valid JSON: expected `,` or `}`");
}

#[test]
fn a_model_in_the_toml_refuses_unknown_keys_and_a_missing_file_is_named() {
    check_fault(
        "config = \"model.json\"",
        "config = \"model.json\"\nhiden_size = 3",
        "5:1",
        "unknown key `hiden_size` in `model`; did you mean `hidden_size`?",
    );
    check_fault(
        "config = \"model.json\"",
        "config = 3",
        "4:10",
        "model.config = 3 is a whole number; expected a path",
    );
    let fault =
        load(&RUN.replace("model.json", "absent.json"), MODEL, &[]).unwrap_err().to_string();
    assert!(
        fault.starts_with("run.toml:4:10: model.config = \"absent.json\" (")
            && fault.contains("cannot be read"),
        "{fault}"
    );
    let fault = load("seed = 1\n[[stage]]\n", MODEL, &[]).unwrap_err().to_string();
    assert_eq!(
        fault,
        "run.toml:1:1: the run has no [model]; add one with config = \"model/quickstart.json\" or the published keys"
    );
}

#[test]
fn a_file_that_is_not_there_is_a_fault_of_the_user() {
    let fault = RunConfig::load(Path::new("/nowhere/run.toml"), &[]).unwrap_err().to_string();
    assert_eq!(fault, "/nowhere/run.toml: cannot be read: No such file or directory (os error 2)");
}

#[test]
fn a_byte_that_is_no_text_is_told_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, b"seed = 1\n# \xc3\xa4 \xff\n").unwrap();
    let fault = RunConfig::load(&path, &[]).unwrap_err().to_string();
    assert!(
        fault.ends_with("run.toml:2:5: is not UTF-8 from here on; convert the file"),
        "{fault}"
    );
}

#[test]
fn a_slip_in_a_models_file_is_told_and_foreign_keys_are_not() {
    let slip = MODEL.replace("\"hidden_size\"", "\"hidden_sizes\"");
    let fault = load(RUN, &slip, &[]).unwrap_err().to_string();
    assert!(
        fault.ends_with("unknown key `hidden_sizes` in `model`; did you mean `hidden_size`?"),
        "{fault}"
    );
    // A key with a default would else be taken for absent.
    let slip = MODEL.replace("\"torch_dtype\"", "\"rope_thta\": 5, \"torch_dtype\"");
    assert!(load(RUN, &slip, &[]).unwrap_err().to_string().contains("did you mean `rope_theta`?"));
    let foreign = MODEL.replace(
        "\"torch_dtype\"",
        "\"head_dim\": 8, \"mlp_bias\": false, \"cls_token_id\": 1, \"rope_theta\": 5, \"rope_thta\": 6, \"torch_dtype\"",
    );
    assert_eq!(load(RUN, &foreign, &[]).unwrap().model.rope_theta, 5.0);
}
