//! Tests of the hash audit, with leaks planted in every schema.

use super::*;
use crate::config::Schema;
use crate::config::data::{DataConfig, FieldMap, SetConfig};

struct Case {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Case {
    fn new() -> Case {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().to_path_buf();
        let sources = Sources { data: DataConfig::default(), generated: base.clone(), base };
        let mut case = Case { folder, sources };
        let question =
            r#"{"prompt": [{"role": "user", "content": "swap: p u n k"}], "answer": "k u n p"}"#;
        case.add("held", Schema::Prompts, question);
        case
    }

    fn add(&mut self, name: &str, schema: Schema, text: &str) {
        let file = format!("{name}.jsonl");
        std::fs::write(self.folder.path().join(&file), text).unwrap();
        let fields = FieldMap::default();
        let set = SetConfig {
            file,
            schema,
            fields,
            chat: false,
            plain_text_bytes: 0,
            rejected_from_previous_line: false,
            split: None,
        };
        self.sources.data.sets.insert(name.to_string(), set);
    }

    fn audit(&mut self, schema: Schema, text: &str) -> AuditReport {
        self.add("train", schema, text);
        audit(&self.sources, &["held".to_string()], &["train".to_string()]).unwrap()
    }
}

#[test]
fn a_held_out_prompt_is_found_in_every_schema() {
    let planted = [
        (Schema::Text, r#"{"text": "swap: p u n k\nswap: k u n p\n\n"}"#),
        (
            Schema::Text,
            r#"{"text": "<|system|>It is f i n e.<|user|>Swap:  p u n k<|assistant|>x<|end|>"}"#,
        ),
        (
            Schema::Messages,
            concat!(
                r#"{"messages": [{"role": "system", "content": "s"},"#,
                r#" {"role": "user", "content": "swap: p u n k"}]}"#
            ),
        ),
        (
            Schema::Preferences,
            r#"{"prompt": "<|user|>swap: p u n k<|assistant|>", "chosen": "a", "rejected": "b"}"#,
        ),
        (
            Schema::Prompts,
            r#"{"prompt": [{"role": "user", "content": "swap: p u n k"}], "answer": null}"#,
        ),
    ];
    for (schema, text) in planted {
        let text = format!("{}\n{text}\n", text.replace("p u n k", "w o r d"));
        let report = Case::new().audit(schema, &text);
        assert_eq!((report.held_out, report.trained), (1, 2));
        assert_eq!(report.found, ["\"held\" line 1 is line 2 of \"train\""], "{schema:?}");
        let fault = report.require_clean().unwrap_err().to_string();
        assert!(fault.contains("1 of 1 held-out examples are trained on"), "{fault}");
    }
}

#[test]
fn clean_sets_pass() {
    let text = r#"{"text": "swap: k n u p\nrotate, swap: p u n k\nAnswer: p u n k\n"}"#;
    let report = Case::new().audit(Schema::Text, text);
    assert!(report.found.is_empty());
    report.require_clean().unwrap();
}

#[test]
fn held_out_conversations_and_texts_are_compared_as_a_whole() {
    let mut case = Case::new();
    let turn = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
    let turns = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")];
    let talk = serde_json::json!({"messages": turns}).to_string();
    case.add("held", Schema::Messages, &talk);
    let same =
        case.audit(Schema::Text, r#"{"text": "<|system|>s<|user|>q<|assistant|>a<|end|>\n"}"#);
    assert_eq!(same.found.len(), 1);
    let other =
        case.audit(Schema::Text, r#"{"text": "<|system|>t<|user|>q<|assistant|>a<|end|>\n"}"#);
    assert!(other.found.is_empty());
    case.add("held", Schema::Text, r#"{"text": "To be, or not\nto be"}"#);
    assert_eq!(case.audit(Schema::Text, r#"{"text": "to be, or not to be"}"#).found.len(), 1);
    assert!(case.audit(Schema::Text, r#"{"text": "To be, or not"}"#).found.is_empty());
}

#[test]
fn a_conversation_of_sft_is_found_as_a_whole_document_of_pretraining() {
    let lesson = r#"{"messages": [{"role": "user", "content": "swap: p u n k"}, {"role": "assistant", "content": "k u n p"}]}"#;
    let told = r#"{"prompt": [{"role": "user", "content": "swap: p u n k"}], "answer": "k u n p"}"#;
    let page = |reply: &str| {
        format!(
            r#"{{"text": "<|user|>f<|assistant|>g<|end|><|user|>Swap: p u n k<|assistant|>{reply}<|end|>"}}"#
        )
    };
    let find = |schema, text: &str| {
        let mut case = Case::new();
        case.add("lessons", Schema::Messages, lesson);
        case.add("pages", schema, text);
        repeats(&case.sources, &["lessons".to_string()], &["pages".to_string()]).unwrap()
    };
    for (schema, text) in [
        (Schema::Text, page("k u n p")),
        (Schema::Messages, lesson.to_string()),
        (Schema::Prompts, told.to_string()),
    ] {
        let report = find(schema, &text);
        assert_eq!(report.found, ["\"lessons\" line 1 is line 1 of \"pages\""], "{schema:?}");
        let fault = report.require_clean().unwrap_err().to_string();
        assert!(fault.contains("data.pretrain_on_sft"), "{fault}");
    }
    assert!(find(Schema::Text, &page("another reply")).found.is_empty());
}
