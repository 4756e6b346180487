//! The hash audit: nothing that is held out occurs in what is trained on, and no conversation of SFT in what is
//! pretrained on.
//!
//! Knows no tokens. What is compared are hashes of normalised text: lower case, runs of blanks as
//! one, control tokens of ours as line breaks. A held-out example is found
//!   * as a prompt: the turns before the reply, system messages left out, so that the same question
//!     under another system message counts as the same (a set whose questions stand in the system
//!     message should not be listed in `held_out`);
//!   * as a conversation: the whole of it;
//!   * as a text: the whole of it.
//!
//! A training example is searched as a whole, as its prompt, and line by line. A conversation of SFT is its turns and its
//! reply; it is found if it is a whole document of pretraining, or all of a text between two end tokens.

use crate::config::fault::Fault;
use crate::data::chat::{Message, Role};
use crate::data::jsonl::{PromptText, Record};
use crate::data::sources::Sources;
use crate::data::tokenizer::OWN_SPECIALS;
use anyhow::Result;
use std::collections::HashMap;

/// What an audit read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Held-out examples.
    pub held_out: u64,
    /// Training examples that were searched.
    pub trained: u64,
    /// Where held-out examples occur, as "SET line N is line M of SET".
    pub found: Vec<String>,
}

impl AuditReport {
    /// Refuses a run whose training data holds held-out examples.
    pub fn require_clean(&self) -> Result<()> {
        let Some(first) = self.found.first() else { return Ok(()) };
        Err(Fault::user(format!(
            "data.held_out: {} of {} held-out examples are trained on, e.g. {first}; remove them \
             from one of the files",
            self.found.len(),
            self.held_out
        )))
    }
}

/// Searches sets that are trained on for examples of held-out sets.
pub fn audit(sources: &Sources, held_out: &[String], trained: &[String]) -> Result<AuditReport> {
    let mut report = AuditReport::default();
    let mut wanted: HashMap<Hash, String> = HashMap::new();
    for name in held_out {
        for located in sources.records(name)?.1 {
            let located = located?;
            report.held_out += 1;
            let place = format!("{name:?} line {}", located.index + 1);
            wanted.entry(held_out_key(&located.record)).or_insert(place);
        }
    }
    for name in trained {
        for located in sources.records(name)?.1 {
            let located = located?;
            report.trained += 1;
            for key in trained_keys(&located.record) {
                // One report for each held-out example is enough.
                if let Some(place) = wanted.remove(&key) {
                    let line = located.index + 1;
                    report.found.push(format!("{place} is line {line} of {name:?}"));
                }
            }
        }
    }
    Ok(report)
}

/// Conversations of SFT sets that pretraining sets hold too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepeatReport {
    /// Conversations of the SFT sets.
    pub conversations: u64,
    /// Where some of them occur, as "SET line N is line M of SET".
    pub found: Vec<String>,
}

impl RepeatReport {
    /// Refuses a run that pretrains on what SFT is to teach.
    pub fn require_clean(&self) -> Result<()> {
        let Some(first) = self.found.first() else { return Ok(()) };
        Err(Fault::user(format!(
            "data: {} of {} conversations of SFT are pretrained on, e.g. {first}; take them out of one of the sets, or \
             set data.pretrain_on_sft = true if that is meant",
            self.found.len(),
            self.conversations
        )))
    }
}

/// Searches pretraining sets for the conversations of SFT sets.
pub fn repeats(sources: &Sources, tuned: &[String], pretrained: &[String]) -> Result<RepeatReport> {
    let mut report = RepeatReport::default();
    let mut wanted: HashMap<Hash, String> = HashMap::new();
    for name in tuned {
        for located in sources.records(name)?.1 {
            let located = located?;
            report.conversations += 1;
            let place = format!("{name:?} line {}", located.index + 1);
            wanted.extend(documents(&located.record).into_iter().map(|key| (key, place.clone())));
        }
    }
    for name in pretrained {
        for located in sources.records(name)?.1 {
            let located = located?;
            for key in documents(&located.record) {
                if let Some(place) = wanted.remove(&key) {
                    let line = located.index + 1;
                    report.found.push(format!("{place} is line {line} of {name:?}"));
                }
            }
        }
    }
    Ok(report)
}

/// The whole documents that a record trains on.
fn documents(record: &Record) -> Vec<Hash> {
    match record {
        Record::Text(text) => text
            .split(OWN_SPECIALS[1])
            .map(without_specials)
            .filter(|document| !document.trim().is_empty())
            .map(|document| hash(&document))
            .collect(),
        Record::Messages(messages) => vec![hash(&joined(messages, true))],
        Record::Prompt { prompt, answer: Some(answer) } => {
            let turns = match prompt {
                PromptText::Raw(text) => without_specials(text),
                PromptText::Chat(messages) => joined(messages, true),
            };
            vec![hash(&format!("{turns}\n{answer}"))]
        }
        Record::Prompt { answer: None, .. } | Record::Preference { .. } => Vec::new(),
    }
}

type Hash = [u8; 16];

fn hash(text: &str) -> Hash {
    let mut normal = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        normal.push_str(&word.to_lowercase());
        normal.push(' ');
    }
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(normal.as_bytes()).as_bytes()[..16]);
    short
}

fn held_out_key(record: &Record) -> Hash {
    match record {
        Record::Text(text) => hash(&without_specials(text)),
        Record::Messages(messages) => hash(&joined(messages, true)),
        Record::Preference { prompt, .. } | Record::Prompt { prompt, .. } => hash(&turns(prompt)),
    }
}

fn trained_keys(record: &Record) -> Vec<Hash> {
    let mut keys = Vec::new();
    let mut text = |text: &str| {
        keys.push(hash(text));
        keys.extend(text.lines().filter(|line| !line.trim().is_empty()).map(hash));
    };
    match record {
        Record::Text(document) => text(&without_specials(document)),
        Record::Messages(messages) => {
            text(&joined(messages, true));
            let last_reply = messages.iter().rposition(|m| m.role == Role::Assistant);
            text(&joined(&messages[..last_reply.unwrap_or(messages.len())], false));
        }
        Record::Preference { prompt, chosen, rejected } => {
            text(&turns(prompt));
            text(chosen);
            text(rejected);
        }
        Record::Prompt { prompt, answer } => {
            text(&turns(prompt));
            text(answer.as_deref().unwrap_or_default());
        }
    }
    keys
}

fn turns(prompt: &PromptText) -> String {
    match prompt {
        PromptText::Raw(text) => without_specials(text),
        PromptText::Chat(messages) => joined(messages, false),
    }
}

fn joined(messages: &[Message], system: bool) -> String {
    let kept = messages.iter().filter(|m| system || m.role != Role::System);
    kept.map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n")
}

fn without_specials(text: &str) -> String {
    OWN_SPECIALS.iter().fold(text.to_string(), |text, special| text.replace(special, "\n"))
}

#[cfg(test)]
mod tests;
