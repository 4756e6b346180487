//! Tests of the loader: what each stage kind eats, and faults with their places.

use super::*;
use crate::config::TokenizerConfig;
use crate::config::data::{DataConfig, FieldMap, SetConfig};
use crate::config::stage::{GrpoStage, OptimizerConfig, PretrainStage, RewardModelStage, SftStage};

struct Case {
    folder: tempfile::TempDir,
    loader: Loader,
}

fn case() -> Case {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().to_path_buf();
    let config = TokenizerConfig { vocab_size: Some(280), ..TokenizerConfig::default() };
    let text = "the cat sat on the mat, swap: p u n k\n".repeat(20);
    let loader = Loader {
        sources: Sources { data: DataConfig::default(), generated: base.join("data"), base },
        tokenizer: Arc::new(Tokenizer::train(&config, &[text]).unwrap()),
        chat: Arc::new(ChatTemplate::own()),
        seed: 7,
        context: 40,
    };
    Case { folder, loader }
}

impl Case {
    fn add(&mut self, name: &str, schema: Schema, lines: &[&str]) {
        let file = format!("{name}.jsonl");
        std::fs::write(self.folder.path().join(&file), lines.join("\n")).unwrap();
        let fields = FieldMap::default();
        let set = SetConfig {
            file,
            schema,
            fields,
            chat: true,
            plain_text_bytes: 0,
            rejected_from_previous_line: false,
            split: None,
        };
        self.loader.sources.data.sets.insert(name.to_string(), set);
    }
}

fn sft(data: &str, epochs: u64, batch: usize) -> StageKind {
    let (data, optimizer) = (data.to_string(), OptimizerConfig::default());
    let balance = Default::default();
    StageKind::Sft(SftStage { data, epochs, batch, micro_batch: 0, balance, optimizer })
}

#[test]
fn sft_takes_messages_and_answered_prompts_with_loss_on_replies_alone() {
    let mut case = case();
    case.add(
        "talk",
        Schema::Messages,
        &[concat!(
            r#"{"messages": [{"role": "user", "content": "swap"},"#,
            r#" {"role": "assistant", "content": "the cat"}]}"#
        )],
    );
    case.add("asked", Schema::Prompts, &[r#"{"prompt": "swap", "answer": "the cat"}"#]);
    let talk = case.loader.conversations("talk").unwrap();
    assert_eq!(talk, case.loader.conversations("asked").unwrap());
    let sequence = &talk[0];
    let first = sequence.target.iter().position(|target| *target).unwrap();
    assert_eq!(
        case.loader.tokenizer.decode_with_specials(&sequence.tokens[..first]),
        "<|user|>swap<|assistant|>"
    );
    assert!(sequence.target[first..].iter().all(|target| *target));
    case.add(
        "raw",
        Schema::Prompts,
        &[r#"{"prompt": "<|user|>swap<|assistant|>", "answer": "the cat"}"#],
    );
    case.loader.sources.data.sets.get_mut("raw").unwrap().chat = false;
    assert_eq!(talk, case.loader.conversations("raw").unwrap(), "a raw prompt is no target either");
    let mut data = case.loader.stage(1, &sft("talk", 3, 2)).unwrap();
    assert_eq!(data.steps(), 2);
    assert_eq!(data.batch(0), Batch::Documents(vec![sequence.clone(), sequence.clone()]));
    assert_eq!(data.batch(1), Batch::Documents(vec![sequence.clone()]));
}

#[test]
fn pretraining_recognises_control_tokens_and_ends_documents_that_have_no_end() {
    let mut case = case();
    case.add(
        "pages",
        Schema::Text,
        &[r#"{"text": "the mat"}"#, r#"{"text": "<|user|>the<|assistant|>mat<|end|>\n"}"#],
    );
    let documents: Vec<Sequence> =
        case.loader.documents("pages").unwrap().collect::<Result<_>>().unwrap();
    let text = |i: usize| case.loader.tokenizer.decode_with_specials(&documents[i].tokens);
    assert_eq!(text(0), "the mat<|end|>");
    assert_eq!(text(1), "<|user|>the<|assistant|>mat<|end|>\n");
    assert_eq!(documents[1].tokens[0], 3);
    let kind = StageKind::Pretrain(PretrainStage {
        data: vec![MixtureEntry { set: "pages".to_string(), share: 1.0 }],
        steps: 5,
        batch: 2,
        sequence: 8,
        batch_start: 0,
        batch_ramp: 0.0,
        micro_batch: 0,
        capacity_factor: None,
        balance: Default::default(),
        optimizer: OptimizerConfig::default(),
    });
    let mut data = case.loader.stage(0, &kind).unwrap();
    let batches: Vec<Batch> = (0..data.steps()).map(|step| data.batch(step)).collect();
    assert!(batches.iter().all(|batch| batch.tokens() <= 16 && batch.tokens() >= 14));
    let mut again = case.loader.stage(0, &kind).unwrap();
    assert_eq!(again.batch(3), batches[3], "a resumed stage eats the same batches");
    let measured = case.loader.texts("pages", 1).unwrap();
    assert_eq!(case.loader.tokenizer.decode_with_specials(&measured[0].tokens), "the mat");
}

#[test]
fn pairs_end_with_the_end_token_and_share_their_prompt() {
    let mut case = case();
    case.add(
        "pairs",
        Schema::Preferences,
        &[
            r#"{"prompt": "swap", "chosen": "the cat", "rejected": "<|end|>"}"#,
            r#"{"prompt": [{"role": "user", "content": "swap"}], "chosen": "a", "rejected": "b"}"#,
        ],
    );
    let pairs = case.loader.pairs("pairs", 0).unwrap();
    let text = |ids: &[u32]| case.loader.tokenizer.decode_with_specials(ids);
    assert_eq!(text(&pairs[0].chosen), "<|user|>swap<|assistant|>the cat<|end|>");
    assert_eq!(text(&pairs[0].rejected), "<|user|>swap<|assistant|><|end|><|end|>");
    let ends = pairs[0].rejected.iter().filter(|id| **id == 1).count();
    assert_eq!(ends, 1, "the reply's own text is no end token");
    assert_eq!(case.loader.pairs("pairs", 1).unwrap().len(), 1);
    let (data, optimizer) = ("pairs".to_string(), OptimizerConfig::default());
    let kind = StageKind::RewardModel(RewardModelStage {
        data,
        calibration: None,
        epochs: 1,
        batch: 2,
        micro_batch: 0,
        optimizer,
    });
    let mut data = case.loader.stage(2, &kind).unwrap();
    assert!(matches!(data.batch(0), Batch::Pairs(pairs) if pairs.len() == 2));
}

#[test]
fn prompts_keep_their_line_and_every_epoch_asks_all() {
    let mut case = case();
    let lines: Vec<String> =
        (0..6).map(|i| format!("{{\"prompt\": \"{i}\", \"answer\": \"{i}\"}}")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    case.add("asked", Schema::Prompts, &lines);
    let kind: GrpoStage = serde_json::from_value(serde_json::json!({
        "data": "asked", "steps": 4, "prompts": 3, "group_size": 2,
        "max_new_tokens": 4, "reward": []
    }))
    .unwrap();
    let mut data = case.loader.stage(4, &StageKind::Grpo(kind)).unwrap();
    let steps: Vec<Vec<Prompt>> = (0..data.steps()).map(|step| data.prompts(step)).collect();
    let mut indices: Vec<u64> = steps[..2].iter().flatten().map(|prompt| prompt.index).collect();
    indices.sort_unstable();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    let first = &steps[0][0];
    assert_eq!(first.text, format!("<|user|>{}<|assistant|>", first.index));
    assert_eq!(first.answer, Some(first.index.to_string()));
    assert_eq!(*first.tokens.last().unwrap(), 4);
}

#[test]
fn faults_of_the_data_name_their_line_before_any_step() {
    let mut case = case();
    let long = format!(r#"{{"prompt": "{}", "answer": "x"}}"#, "zq".repeat(30));
    case.add("long", Schema::Prompts, &[r#"{"prompt": "a", "answer": "x"}"#, &long]);
    for fault in [
        case.loader.prompts("long", 0).unwrap_err(),
        case.loader.conversations("long").unwrap_err(),
    ] {
        let text = fault.to_string();
        assert!(text.contains("long.jsonl:2: ") && text.contains("the context of 40"), "{text}");
        assert!(fault.downcast_ref::<Fault>().is_some());
    }
    case.add("null", Schema::Prompts, &[r#"{"prompt": "a", "answer": null}"#]);
    let text = case.loader.conversations("null").unwrap_err().to_string();
    assert!(text.contains("null.jsonl:1: the answer is null"), "{text}");
    case.add(
        "monologue",
        Schema::Messages,
        &[r#"{"messages": [{"role": "user", "content": "a"}]}"#],
    );
    let text = case.loader.conversations("monologue").unwrap_err().to_string();
    assert!(text.contains("monologue.jsonl:1: the conversation has no reply"), "{text}");
    let text = case.loader.pairs("null", 0).unwrap_err().to_string();
    assert!(text.contains("data.sets.null.schema must be"), "{text}");
    let text = case.loader.prompts("none", 0).unwrap_err().to_string();
    assert!(
        text.contains("\"none\" does not exist") && text.contains("long, monologue, null"),
        "{text}"
    );
    case.add("empty", Schema::Prompts, &[]);
    assert!(case.loader.prompts("empty", 0).unwrap_err().to_string().contains("holds no example"));
}

#[test]
fn texts_too_short_to_predict_are_told_as_that() {
    let mut case = case();
    case.add("short", Schema::Text, &[r#"{"text": "a"}"#]);
    let fault = case.loader.texts("short", 0).unwrap_err().to_string();
    assert!(fault.contains("short.jsonl: none of 1 texts has two tokens or more"), "{fault}");
}
