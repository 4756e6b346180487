//! The keys that describe a tokenizer in a GGUF file: a byte-level BPE by its vocabulary, merges and the name that
//! llama.cpp has for its pre-tokenizer.
//!
//! Knows no tokenizer: what only `data` can tell is handed in, the rest is looked up in tokenizer.json.

use super::gguf::GgufValue;
use super::gguf_keys::Keys;
use crate::config::Fault;
use anyhow::Result;
use serde_json::Value;
use std::collections::HashSet;

/// What is known of a tokenizer beyond its vocabulary and merges.
#[derive(Clone, Copy, Debug)]
pub struct GgufTokenizer<'a> {
    /// The text of its tokenizer.json.
    pub json: &'a str,
    /// llama.cpp's name of its pre-tokenizer.
    pub split: &'a str,
    /// Beginning-of-sequence id, if it has one.
    pub bos: Option<u32>,
    /// The id that ends a reply.
    pub end: u32,
    /// Padding id.
    pub pad: u32,
    /// True if a text gets the beginning-of-sequence token.
    pub adds_bos: bool,
    /// Source of the chat template.
    pub template: Option<&'a str>,
}

// Types of tokens, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// The keys of a tokenizer whose model has `rows` rows.
pub(super) fn tokenizer_keys(tokenizer: &GgufTokenizer, rows: usize) -> Result<Keys> {
    let fault = |reason: String| Fault::user(format!("no GGUF of this tokenizer.json: {reason}"));
    let whole: Value = serde_json::from_str(tokenizer.json)
        .map_err(|e| fault(format!("{}:{}: {e}", e.line(), e.column())))?;
    if let Some(reason) = differs(&whole) {
        return Err(fault(reason));
    }
    let (texts, kinds) = tokens(&whole, rows).map_err(fault)?;
    let merges = merges(&whole).map_err(fault)?;
    if tokenizer.split == "deepseek-llm"
        && let Some(merge) = merges.iter().find(|merge| joins_digits(merge))
    {
        return Err(fault(format!(
            "its merge {merge:?} joins digits, which its pre-tokenizer keeps apart and llama.cpp's of that name does not"
        )));
    }
    let text = |text: &str| GgufValue::Text(text.to_string());
    let mut keys = Keys::new();
    let mut add = |key: &str, value| keys.push((format!("tokenizer.{key}"), value));
    add("ggml.model", text("gpt2"));
    add("ggml.pre", text(tokenizer.split));
    add("ggml.tokens", GgufValue::Texts(texts));
    add("ggml.token_type", GgufValue::Ints(kinds));
    add("ggml.merges", GgufValue::Texts(merges));
    if let Some(bos) = tokenizer.bos {
        add("ggml.bos_token_id", GgufValue::U32(bos));
    }
    add("ggml.eos_token_id", GgufValue::U32(tokenizer.end));
    add("ggml.padding_token_id", GgufValue::U32(tokenizer.pad));
    add("ggml.add_bos_token", GgufValue::Bool(tokenizer.adds_bos));
    add("ggml.add_eos_token", GgufValue::Bool(false));
    if let Some(template) = tokenizer.template {
        add("chat_template", text(template));
    }
    Ok(keys)
}

/// Why llama.cpp would give other tokens.
fn differs(whole: &Value) -> Option<String> {
    let normalizer = &whole["normalizer"];
    let steps = normalizer["normalizers"].as_array();
    if !normalizer.is_null() && !steps.is_some_and(Vec::is_empty) {
        return Some("it has a normalizer, and llama.cpp has none for byte-level BPE".to_string());
    }
    if whole["model"]["ignore_merges"] == true {
        return Some(
            "model.ignore_merges is true, and llama.cpp merges whatever stands in the vocabulary"
                .to_string(),
        );
    }
    None
}

/// Text and type of every id; ids without a token are filled up.
fn tokens(whole: &Value, rows: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let mut texts: Vec<Option<String>> = vec![None; rows];
    let mut kinds = vec![UNUSED; rows];
    let mut put = |text: &str, id: Option<u64>, kind: i32| {
        let slot = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows);
        let Some(slot) = slot else {
            return Err(format!("token {text:?} has no id below vocab_size = {rows}"));
        };
        texts[slot] = Some(text.to_string());
        kinds[slot] = kind;
        Ok(())
    };
    for (text, id) in whole["model"]["vocab"].as_object().into_iter().flatten() {
        put(text, id.as_u64(), NORMAL)?;
    }
    for token in whole["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let special = token["special"] == true || text.chars().count() > 1;
        put(text, token["id"].as_u64(), if special { CONTROL } else { USER_DEFINED })?;
    }
    let name = |(id, text): (usize, Option<String>)| text.unwrap_or_else(|| format!("[PAD{id}]"));
    let texts: Vec<String> = texts.into_iter().enumerate().map(name).collect();
    let mut seen = HashSet::new();
    match texts.iter().find(|text| !seen.insert(text.as_str())) {
        Some(twice) => Err(format!("two ids have the token {twice:?}")),
        None => Ok((texts, kinds)),
    }
}

/// Merges as `left right`; files write them so or as pairs.
fn merges(whole: &Value) -> Result<Vec<String>, String> {
    let read = |merge: &Value| match merge {
        Value::String(text) => Some(text.clone()),
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => Some(format!("{} {}", left.as_str()?, right.as_str()?)),
            _ => None,
        },
        _ => None,
    };
    let all = whole["model"]["merges"].as_array().ok_or("model.merges is missing")?;
    all.iter().map(|merge| read(merge).ok_or_else(|| format!("{merge} is no merge"))).collect()
}

fn joins_digits(merge: &str) -> bool {
    let bytes = merge.replacen(' ', "", 1).into_bytes();
    bytes.windows(2).any(|pair| pair.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(edit: impl Fn(&mut Value)) -> Result<Keys> {
        let mut whole = json!({
            "normalizer": {"type": "Sequence", "normalizers": []},
            "added_tokens": [
                {"id": 0, "content": "<|end|>", "special": true},
                {"id": 4, "content": "ø", "special": false},
                {"id": 5, "content": "<｜User｜>", "special": false},
            ],
            "model": {"vocab": {"a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"], "ab a"]},
        });
        edit(&mut whole);
        let json = whole.to_string();
        let tokenizer = GgufTokenizer {
            json: &json,
            split: "deepseek-llm",
            bos: None,
            end: 0,
            pad: 0,
            adds_bos: false,
            template: Some("{{ x }}"),
        };
        tokenizer_keys(&tokenizer, 8)
    }

    #[test]
    fn every_id_has_its_text_and_type() {
        let keys = with(|_| {}).expect("keys");
        let value = |key: &str| keys.iter().find(|(name, _)| name == key).map(|(_, v)| v.clone());
        let texts = |texts: &[&str]| {
            Some(GgufValue::Texts(texts.iter().map(|text| text.to_string()).collect()))
        };
        assert_eq!(
            value("tokenizer.ggml.tokens"),
            texts(&["<|end|>", "a", "b", "ab", "ø", "<｜User｜>", "[PAD6]", "[PAD7]"])
        );
        assert_eq!(
            value("tokenizer.ggml.token_type"),
            Some(GgufValue::Ints(vec![3, 1, 1, 1, 4, 3, 5, 5]))
        );
        assert_eq!(value("tokenizer.ggml.merges"), texts(&["a b", "ab a"]));
        assert_eq!(value("tokenizer.ggml.pre"), Some(GgufValue::Text("deepseek-llm".to_string())));
        assert_eq!(value("tokenizer.ggml.add_bos_token"), Some(GgufValue::Bool(false)));
        assert_eq!(value("tokenizer.ggml.bos_token_id"), None);
        assert_eq!(value("tokenizer.chat_template"), Some(GgufValue::Text("{{ x }}".to_string())));
    }

    #[test]
    fn a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused() {
        for (told, reason) in [
            (with(|w| w["normalizer"] = json!({"type": "NFC"})), "normalizer"),
            (with(|w| w["model"]["ignore_merges"] = json!(true)), "ignore_merges"),
            (with(|w| w["model"]["vocab"]["c"] = json!(8)), "\"c\" has no id below vocab_size = 8"),
            (with(|w| w["model"]["vocab"]["[PAD7]"] = json!(6)), "two ids have the token"),
            (with(|w| w["model"]["merges"] = json!([["a"]])), "is no merge"),
            (with(|w| w["model"]["merges"] = json!(["Ġ 1", "1 2"])), "\"1 2\" joins digits"),
        ] {
            let told = told.expect_err(reason).to_string();
            assert!(told.contains(reason), "{told}");
        }
    }
}
