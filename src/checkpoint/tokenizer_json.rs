//! The tokenizer's files beside a model: tokenizer.json as bytes, tokenizer_config.json and
//! generation_config.json.
//!
//! Knows no tokenizer: the bytes are made in `data` and handed in, or copied from where a model
//! came from. Only the names of the special tokens are looked up in them.

use super::disk::{read_limited, write_synced};
use crate::config::{EndTokens, Fault, ModelConfig};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// How transformers uses it, and the chat template.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// How transformers samples.
pub const GENERATION_FILE: &str = "generation_config.json";
const TOKENIZER_LIMIT: u64 = 256 << 20;

/// Writes the three files into a model's folder. `tokenizer` are the bytes of tokenizer.json.
pub fn write_tokenizer(
    folder: &Path,
    tokenizer: &[u8],
    chat_template: Option<&str>,
    config: &ModelConfig,
) -> Result<()> {
    write_synced(&folder.join(TOKENIZER_FILE), tokenizer)?;
    write_json(
        &folder.join(TOKENIZER_CONFIG_FILE),
        &tokenizer_config(tokenizer, chat_template, config)?,
    )?;
    write_json(&folder.join(GENERATION_FILE), &generation_config(config))
}

/// Copies the three files from one model's folder to another and makes those that are missing; the
/// tokenizer itself must be there.
pub fn copy_tokenizer(from: &Path, to: &Path, config: &ModelConfig) -> Result<()> {
    let path = from.join(TOKENIZER_FILE);
    if !path.is_file() {
        return Err(Fault::user(format!(
            "{}: no such file; copy the model's tokenizer.json beside its config.json",
            path.display()
        )));
    }
    let tokenizer = read_limited(&path, TOKENIZER_LIMIT)?;
    let template = std::fs::read_to_string(from.join("chat_template.jinja")).ok();
    write_tokenizer(to, &tokenizer, template.as_deref(), config)?;
    for name in [TOKENIZER_CONFIG_FILE, GENERATION_FILE] {
        if from.join(name).is_file() {
            write_synced(&to.join(name), &read_limited(&from.join(name), TOKENIZER_LIMIT)?)?;
        }
    }
    Ok(())
}

fn tokenizer_config(
    tokenizer: &[u8],
    chat_template: Option<&str>,
    config: &ModelConfig,
) -> Result<Value> {
    let tokenizer: Value = serde_json::from_slice(tokenizer).map_err(|e| {
        Fault::user(format!("{TOKENIZER_FILE}:{}:{}: not valid JSON: {e}", e.line(), e.column()))
    })?;
    let mut keys = Map::new();
    keys.insert("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast"));
    keys.insert("model_max_length".to_string(), json!(config.max_position_embeddings));
    keys.insert("clean_up_tokenization_spaces".to_string(), json!(false));
    for (key, id) in [
        ("bos_token", config.bos_token_id),
        ("eos_token", config.eos_token_id.as_ref().map(EndTokens::first)),
        ("pad_token", config.pad_token_id),
    ] {
        keys.insert(
            key.to_string(),
            id.and_then(|id| content_of(&tokenizer, id)).map_or(Value::Null, Value::String),
        );
    }
    if let Some(template) = chat_template {
        keys.insert("chat_template".to_string(), json!(template));
    }
    Ok(Value::Object(keys))
}

/// The text of a token: special ones are listed apart from the vocabulary.
fn content_of(tokenizer: &Value, id: u32) -> Option<String> {
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let special = added.filter(|t| t["id"] == id).find_map(|t| t["content"].as_str());
    let vocabulary = || {
        let entries = tokenizer["model"]["vocab"].as_object()?;
        entries.iter().find(|(_, value)| **value == id).map(|(text, _)| text.as_str())
    };
    special.or_else(vocabulary).map(str::to_string)
}

fn generation_config(config: &ModelConfig) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("JSON values can be written");
    bytes.push(b'\n');
    write_synced(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::super::model_json::tests::tiny;
    use super::*;

    #[test]
    fn special_tokens_are_named_by_their_text() {
        let tokenizer = json!({
            "added_tokens": [{"id": 0, "content": "<|pad|>"}],
            "model": {"vocab": {"<|end|>": 1}},
        });
        let bytes = tokenizer.to_string().into_bytes();
        let config = tokenizer_config(&bytes, Some("{{ messages }}"), &tiny()).expect("a config");
        assert_eq!(config["pad_token"], "<|pad|>");
        assert_eq!(config["eos_token"], "<|end|>");
        assert_eq!(config["bos_token"], Value::Null);
        assert_eq!(config["chat_template"], "{{ messages }}");
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    }

    #[test]
    fn a_missing_tokenizer_is_the_users_to_mend() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let error =
            copy_tokenizer(folder.path(), folder.path(), &tiny()).expect_err("nothing to copy");
        assert!(
            matches!(error.downcast_ref(), Some(Fault::User(m)) if m.contains("tokenizer.json")),
            "{error:#}"
        );
    }
}
