//! `[data]`: named sets of files, and the generated tasks.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `[data]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The sets by name: `[data.sets.NAME]`.
    pub sets: BTreeMap<String, SetConfig>,
    /// Writes the word machine's files into `<run>/data/` before the first stage.
    pub word_machine: Option<WordMachineConfig>,
    /// Writes the needle task's files into `<run>/data/` before the first stage.
    pub needle: Option<NeedleConfig>,
    /// Refuse a run in which an example of `held_out` sets occurs in a set that is trained on.
    pub held_out: Vec<String>,
    /// Let a conversation of an `sft` set be a document of a pretraining set too. Otherwise such a run is refused: a
    /// model that has read the lessons before makes SFT look better than it is.
    pub pretrain_on_sft: bool,
}

/// One set: a JSONL file, plain or gzip, one example a line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetConfig {
    /// Path relative to the TOML; `run:NAME` is `<run>/data/NAME`, written by a generator.
    pub file: String,
    /// What a line holds.
    pub schema: Schema,
    /// Other names for the schema's fields.
    #[serde(default)]
    pub fields: FieldMap,
    /// Wrap a prompt that is a plain string in the chat template as the user's message.
    #[serde(default)]
    pub chat: bool,
    /// For plain text files (not JSONL) with schema `text`: one document per paragraph block, split at blank lines into
    /// documents of about this many bytes; 0 means that the file is JSONL.
    #[serde(default)]
    pub plain_text_bytes: usize,
    /// For schema `preferences`: a line's `chosen` is preferred to the `chosen` of the line before it, so that a file of
    /// prompts and good replies is enough. Its model learns whether a reply belongs to its prompt, not whether it is
    /// right. The first line of the file then makes no pair.
    #[serde(default)]
    pub rejected_from_previous_line: bool,
    /// Only lines whose index modulo `of` is in [`from`, `to`): a split of one file.
    #[serde(default)]
    pub split: Option<Split>,
}

/// A split by line index: lines with `from <= index % of < to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Modulus.
    pub of: usize,
    /// First residue.
    pub from: usize,
    /// Residue after the last one.
    pub to: usize,
}

/// What one line of a set holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schema {
    /// `{"text"}`.
    Text,
    /// `{"messages": [{"role", "content"}]}`.
    Messages,
    /// `{"prompt", "chosen", "rejected"}`; the prompt is a string or messages. See also
    /// `rejected_from_previous_line`.
    Preferences,
    /// `{"prompt", "answer"}`; the prompt is a string or messages, the answer may be null.
    Prompts,
}

/// Other names for a schema's fields, e.g. `fields = { prompt = "question" }`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldMap {
    /// Instead of `text`.
    pub text: Option<String>,
    /// Instead of `messages`.
    pub messages: Option<String>,
    /// Instead of `prompt`.
    pub prompt: Option<String>,
    /// Instead of `answer`.
    pub answer: Option<String>,
    /// Instead of `chosen`.
    pub chosen: Option<String>,
    /// Instead of `rejected`.
    pub rejected: Option<String>,
}

/// `[data.word_machine]`: the quickstart's task (quickstart.md sections 1 and 2), written as files in the schemas above.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WordMachineConfig {
    /// A text whose four-letter words are used.
    pub words: String,
    /// Pretraining pages (`pages.jsonl`, schema text).
    pub pages: usize,
    /// Share of pages whose single edit is `rotate`-heavy, and so on, are the generator's own; this is the share of
    /// pages that are chat transcripts.
    pub transcript_share: f64,
    /// Conversations (`conversations.jsonl`, schema messages).
    pub conversations: usize,
    /// Share of direct replies (no steps) on lists of three and four edits.
    pub direct_share: f64,
    /// Preference pairs per reward model (`helpful.jsonl`, `safety.jsonl`), and as many held-out and calibration ones
    /// as `held_out_pairs` (`helpful-held-out.jsonl`, `helpful-calibration.jsonl`, ...).
    pub pairs: usize,
    /// See `pairs`.
    pub held_out_pairs: usize,
    /// RL prompts (`prompts.jsonl`; with secrets mixed in: `prompts-mixed.jsonl`).
    pub prompts: usize,
    /// Held-out prompts (`held-out.jsonl`).
    pub held_out: usize,
    /// Held-out secret prompts (`secrets.jsonl`, answer = a regular expression of a refusal).
    pub secrets: usize,
}

impl Default for WordMachineConfig {
    fn default() -> Self {
        WordMachineConfig {
            words: String::new(),
            pages: 24_000,
            transcript_share: 0.6,
            conversations: 2400,
            direct_share: 0.75,
            pairs: 768,
            held_out_pairs: 300,
            prompts: 2000,
            held_out: 400,
            secrets: 100,
        }
    }
}

/// `[data.needle]`: facts hidden in hay, and a question for one of them. Lengths are counted in words and marks with
/// the end token, which are tokens if the tokenizer has one for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NeedleConfig {
    /// Longest page of `needle-pages.jsonl` (schema text), and length of every haystack of `needle.jsonl` (schema
    /// prompts, one fact each, at depths of 0, 25, 50, 75 and 100 %).
    pub length: usize,
    /// Pages to pretrain on.
    pub pages: usize,
    /// The same of `needle-long-pages.jsonl` and `needle-long.jsonl`, for a long-context stage.
    pub long_length: usize,
    /// See `pages`.
    pub long_pages: usize,
    /// Most facts of a page; its question asks for one of them.
    pub facts: usize,
    /// Haystacks of each file that measures.
    pub held_out: usize,
}

impl Default for NeedleConfig {
    fn default() -> Self {
        NeedleConfig {
            length: 64,
            pages: 12_000,
            long_length: 256,
            long_pages: 1000,
            facts: 4,
            held_out: 100,
        }
    }
}

impl NeedleConfig {
    /// The shortest length that holds so many facts of 5 words and marks, a question of 6, its answer and the end.
    pub fn shortest(&self) -> usize {
        5 * self.facts + 6 + 2
    }
}
