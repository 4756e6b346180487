//! `[tokenizer]`: train one, or take a tokenizer.json.

use serde::{Deserialize, Serialize};

/// `[tokenizer]`: exactly one of `file` and `vocab_size`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// An existing tokenizer.json, relative to the TOML.
    pub file: Option<String>,
    /// Vocabulary to train: special tokens, 256 bytes, then merges.
    pub vocab_size: Option<usize>,
    /// Sets to train on (any schema; every string of an example counts).
    pub train_on: Vec<String>,
    /// Bytes read from each set at most; 0 for all.
    pub bytes_per_set: usize,
    /// Pre-tokenizer: "deepseek-llm", "deepseek-coder" or "gpt-2", names llama.cpp knows.
    pub split: String,
    /// Words that must come out as one token each (checked after training).
    pub require_single: Vec<String>,
}
