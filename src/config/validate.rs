//! Rules across keys and tables that need no data file.
//!
//! Each rule that is broken names key, value, rule and way out, and points at the key, or at the
//! nearest part of its path that was written. Only the first is told.

use super::data::{Schema, SetConfig, Split};
use super::document::{ConfigError, Node};
use super::nearest::{hint, listed};
use super::validate_model::MOST_POSITIONS;
use super::{RunConfig, StageKind, validate_cluster, validate_stage};
use std::path::Path;

/// Checks a whole run, whose model was checked. Relative paths start in `folder`.
pub fn run(config: &RunConfig, document: &Node, folder: &Path) -> Result<(), ConfigError> {
    let rules = Rules { config, document, folder };
    rules.numbers()?;
    validate_cluster::cluster(&rules)?;
    rules.sets()?;
    rules.word_machine()?;
    rules.needle()?;
    rules.tokenizer()?;
    rules.stage_names()?;
    validate_stage::stages(&rules)?;
    rules.held_out()
}

/// Files that the word machine writes, by the names of sets in `run:NAME`.
const WORD_MACHINE_FILES: [&str; 13] = [
    "pages.jsonl",
    "conversations.jsonl",
    "helpful.jsonl",
    "helpful-held-out.jsonl",
    "helpful-calibration.jsonl",
    "safety.jsonl",
    "safety-held-out.jsonl",
    "safety-calibration.jsonl",
    "prompts.jsonl",
    "prompts-mixed.jsonl",
    "held-out.jsonl",
    "secrets.jsonl",
    "harmless.jsonl",
];

/// Files of the needle task.
const NEEDLE_FILES: [&str; 4] =
    ["needle-pages.jsonl", "needle-long-pages.jsonl", "needle.jsonl", "needle-long.jsonl"];

/// Splits that a tokenizer can be trained with.
const SPLITS: [&str; 3] = ["deepseek-llm", "deepseek-coder", "gpt-2"];

/// Threads at most.
pub const MOST_THREADS: usize = 1024;

/// Special tokens and single bytes: the least vocabulary.
const LEAST_VOCABULARY: usize = 5 + 256;

/// The config with its document, for the places of faults.
pub struct Rules<'a> {
    /// The config.
    pub config: &'a RunConfig,
    /// What it was read from.
    pub document: &'a Node,
    /// Where relative paths start.
    pub folder: &'a Path,
}

impl Rules<'_> {
    /// A fault at `path` unless `holds`.
    pub fn require(
        &self,
        holds: bool,
        path: &[&str],
        message: impl FnOnce() -> String,
    ) -> Result<(), ConfigError> {
        match holds {
            true => Ok(()),
            false => Err(ConfigError { place: self.document.place_of(path), message: message() }),
        }
    }

    /// The set that the key at `path` names; it must hold one of `schemas`.
    pub fn set(
        &self,
        path: &[&str],
        key: &str,
        name: &str,
        schemas: &[Schema],
    ) -> Result<&SetConfig, ConfigError> {
        let sets = &self.config.data.sets;
        let Some(set) = sets.get(name) else {
            let names: Vec<&str> = sets.keys().map(String::as_str).collect();
            let known = match names.is_empty() {
                true => "; [data.sets] is empty".to_string(),
                false => hint(name, &names),
            };
            let message = format!("{key} = {name:?} is no data set{known}");
            return Err(ConfigError { place: self.document.place_of(path), message });
        };
        self.require(schemas.is_empty() || schemas.contains(&set.schema), path, || {
            let wanted: Vec<&str> = schemas.iter().map(|schema| schema_name(*schema)).collect();
            format!(
                "{key} = {name:?} is a set with schema \"{}\", and this needs {}; name another set",
                schema_name(set.schema),
                listed(&wanted)
            )
        })?;
        Ok(set)
    }

    fn numbers(&self) -> Result<(), ConfigError> {
        let (engine, checkpoint) = (&self.config.engine, &self.config.checkpoint);
        let least_one = [
            ("engine", "page_tokens", engine.page_tokens as u64),
            ("engine", "decode_batch", engine.decode_batch as u64),
            ("engine", "mailbox", engine.mailbox as u64),
            ("engine", "deadline_seconds", engine.deadline_seconds),
            ("engine", "restart_window_seconds", engine.restart_window_seconds),
            ("checkpoint", "every_steps", checkpoint.every_steps),
            ("checkpoint", "every_seconds", checkpoint.every_seconds),
        ];
        for (table, key, value) in least_one {
            self.require(value > 0, &[table, key], || {
                format!("{table}.{key} = 0 must be at least 1")
            })?;
        }
        self.require(engine.overlap || engine.offload.is_none(), &["engine", "overlap"], || {
            "engine.overlap = false is for engine.offload = \"auto\": a list moves at changes of phase alone; leave one out"
                .to_string()
        })?;
        let threads = self.document.get("engine").and_then(|engine| engine.get("threads"));
        self.require(threads.is_none() || engine.threads > 0, &["engine", "threads"], || {
            "engine.threads = 0 computes nothing; leave it out for all cores, or name a number"
                .to_string()
        })?;
        let most = [
            ("engine", "threads", engine.threads, MOST_THREADS),
            ("engine", "page_tokens", engine.page_tokens, 1 << 20),
            ("engine", "decode_batch", engine.decode_batch, 1 << 20),
            ("engine", "mailbox", engine.mailbox, 1 << 16),
            ("checkpoint", "keep", checkpoint.keep, 10_000),
        ];
        for (table, key, value, most) in most {
            self.require(value <= most, &[table, key], || {
                format!("{table}.{key} = {value} is too many; use at most {most}")
            })?;
        }
        self.require(checkpoint.keep > 0, &["checkpoint", "keep"], || {
            "checkpoint.keep = 0 would keep nothing to resume from; use at least 1".to_string()
        })?;
        self.require(engine.budget.is_none_or(|bytes| bytes.0 > 0), &["engine", "budget"], || {
            "engine.budget = 0 leaves no memory; leave it out for no limit".to_string()
        })
    }

    fn sets(&self) -> Result<(), ConfigError> {
        for (name, set) in &self.config.data.sets {
            let path = |key| ["data", "sets", name.as_str(), key];
            if let Some(file) = set.file.strip_prefix("run:") {
                self.generated(&path("file"), name, file)?;
            }
            self.require(!set.file.is_empty(), &path("file"), || {
                format!("data.sets.{name}.file is empty")
            })?;
            if let Some(Split { of, from, to }) = set.split {
                self.require(from < to && to <= of, &path("split"), || {
                    format!("data.sets.{name}.split takes lines with from <= index % of < to; from = {from}, to = {to} and of = {of} take none")
                })?;
            }
            self.require(set.plain_text_bytes == 0 || set.schema == Schema::Text, &path("plain_text_bytes"), || {
                format!("data.sets.{name}.plain_text_bytes is for schema \"text\"; leave it out for a JSONL file")
            })?;
            let pairs = set.schema == Schema::Preferences;
            let previous = set.rejected_from_previous_line;
            self.require(pairs || !previous, &path("rejected_from_previous_line"), || {
                format!("data.sets.{name}.rejected_from_previous_line makes pairs, which schema \"{}\" does not hold; leave it out", schema_name(set.schema))
            })?;
            self.require(!previous || set.fields.rejected.is_none(), &path("rejected_from_previous_line"), || {
                format!("data.sets.{name} names a field for `rejected` and takes it from the line before; leave one out")
            })?;
            let takes_chat = matches!(set.schema, Schema::Prompts | Schema::Preferences);
            self.require(!set.chat || takes_chat, &path("chat"), || {
                format!(
                    "data.sets.{name}.chat wraps prompts, and schema \"{}\" has none; leave it out",
                    schema_name(set.schema)
                )
            })?;
            let fields = &set.fields;
            let mapped = [
                ("text", &fields.text),
                ("messages", &fields.messages),
                ("prompt", &fields.prompt),
                ("answer", &fields.answer),
                ("chosen", &fields.chosen),
                ("rejected", &fields.rejected),
            ];
            let known = schema_fields(set.schema);
            for (field, _) in mapped.into_iter().filter(|(_, other)| other.is_some()) {
                self.require(known.contains(&field), &["data", "sets", name, "fields", field], || {
                    format!(
                        "data.sets.{name}.fields.{field} maps a field that schema \"{}\" does not have; it has {}",
                        schema_name(set.schema),
                        listed(known)
                    )
                })?;
            }
        }
        Ok(())
    }

    /// A `run:` file must be one that a generator writes.
    fn generated(&self, path: &[&str], set: &str, file: &str) -> Result<(), ConfigError> {
        let data = &self.config.data;
        let (table, is_there, files) = match NEEDLE_FILES.contains(&file)
            || data.word_machine.is_none() && data.needle.is_some()
        {
            true => ("needle", data.needle.is_some(), &NEEDLE_FILES[..]),
            false => ("word_machine", data.word_machine.is_some(), &WORD_MACHINE_FILES[..]),
        };
        self.require(is_there, path, || {
            format!("data.sets.{set}.file = \"run:{file}\" is written by [data.{table}], which is missing; add it")
        })?;
        self.require(files.contains(&file), path, || {
            let hint = hint(file, files);
            format!("data.sets.{set}.file = \"run:{file}\" is no file of [data.{table}]{hint}")
        })
    }

    fn needle(&self) -> Result<(), ConfigError> {
        let Some(needle) = &self.config.data.needle else { return Ok(()) };
        let path = |key| ["data", "needle", key];
        let counts = [
            ("pages", needle.pages, 1, 100_000_000),
            ("long_pages", needle.long_pages, 1, 100_000_000),
            ("held_out", needle.held_out, 1, 100_000_000),
            ("facts", needle.facts, 1, 16),
        ];
        for (key, count, least, most) in counts {
            self.require((least..=most).contains(&count), &path(key), || {
                format!("data.needle.{key} = {count} must be from {least} to {most}")
            })?;
        }
        let shortest = needle.shortest();
        for (key, length) in [("length", needle.length), ("long_length", needle.long_length)] {
            self.require(length >= shortest, &path(key), || {
                format!("data.needle.{key} = {length} does not hold data.needle.facts = {} with a question; use at least {shortest}, or fewer facts", needle.facts)
            })?;
            self.require(length <= MOST_POSITIONS, &path(key), || {
                format!("data.needle.{key} = {length} is too many; use at most {MOST_POSITIONS}")
            })?;
        }
        Ok(())
    }

    fn word_machine(&self) -> Result<(), ConfigError> {
        let Some(machine) = &self.config.data.word_machine else { return Ok(()) };
        let path = |key| ["data", "word_machine", key];
        self.require(!machine.words.is_empty(), &path("words"), || {
            "data.word_machine.words names no text; give a file whose four-letter words are used"
                .to_string()
        })?;
        for (key, share) in
            [("transcript_share", machine.transcript_share), ("direct_share", machine.direct_share)]
        {
            self.require((0.0..=1.0).contains(&share), &path(key), || {
                format!("data.word_machine.{key} = {share} is a share; it must lie between 0 and 1")
            })?;
        }
        let counts = [
            ("pages", machine.pages),
            ("conversations", machine.conversations),
            ("pairs", machine.pairs),
            ("held_out_pairs", machine.held_out_pairs),
            ("prompts", machine.prompts),
            ("held_out", machine.held_out),
            ("secrets", machine.secrets),
        ];
        for (key, count) in counts {
            self.require(count > 0, &path(key), || {
                format!("data.word_machine.{key} = 0 must be at least 1")
            })?;
            self.require(count <= 100_000_000, &path(key), || {
                format!("data.word_machine.{key} = {count} is too many; use at most 100000000")
            })?;
        }
        Ok(())
    }

    fn tokenizer(&self) -> Result<(), ConfigError> {
        let (tokenizer, vocabulary) = (&self.config.tokenizer, self.config.model.vocab_size);
        self.require(tokenizer.file.is_some() != tokenizer.vocab_size.is_some(), &["tokenizer"], || {
            "[tokenizer] takes exactly one of `file` (an existing tokenizer.json) and `vocab_size` (train one)".to_string()
        })?;
        let known = tokenizer.split.is_empty() || SPLITS.contains(&tokenizer.split.as_str());
        self.require(known, &["tokenizer", "split"], || {
            format!(
                "tokenizer.split = {:?} is not known{}",
                tokenizer.split,
                hint(&tokenizer.split, &SPLITS)
            )
        })?;
        for (index, name) in tokenizer.train_on.iter().enumerate() {
            let path = ["tokenizer", "train_on", &index.to_string()];
            self.set(&path, &format!("tokenizer.train_on.{index}"), name, &[])?;
        }
        let Some(size) = tokenizer.vocab_size else { return Ok(()) };
        self.require(size >= LEAST_VOCABULARY, &["tokenizer", "vocab_size"], || {
            format!("tokenizer.vocab_size = {size} must be at least {LEAST_VOCABULARY}: 5 special tokens and 256 bytes")
        })?;
        self.require(size <= vocabulary, &["tokenizer", "vocab_size"], || {
            format!("tokenizer.vocab_size = {size} exceeds model.vocab_size = {vocabulary}; lower it or raise the model's")
        })?;
        self.require(!tokenizer.train_on.is_empty(), &["tokenizer"], || {
            "[tokenizer] has vocab_size but no `train_on`; name the data sets that it is trained on"
                .to_string()
        })
    }

    fn stage_names(&self) -> Result<(), ConfigError> {
        let stages = &self.config.stages;
        self.require(!stages.is_empty(), &[], || {
            "the run has no [[stage]]; add at least one".to_string()
        })?;
        for (index, stage) in stages.iter().enumerate() {
            let (name, at) = (&stage.name, index.to_string());
            let path = ["stage", at.as_str(), "name"];
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
            self.require(plain && begins_well && name.len() <= 64, &path, || {
                format!("stage {index} has the name {name:?}, which is no file name everywhere; use up to 64 letters, digits, `-`, `_` and `.`, the first a letter or digit")
            })?;
            let twice =
                stages[..index].iter().any(|earlier| earlier.name.eq_ignore_ascii_case(name));
            self.require(!twice, &path, || {
                format!("two stages are named {name:?}; names must differ")
            })?;
        }
        Ok(())
    }

    /// Held-out sets exist and are trained on by nothing.
    fn held_out(&self) -> Result<(), ConfigError> {
        for (index, name) in self.config.data.held_out.iter().enumerate() {
            let index = index.to_string();
            let path = ["data", "held_out", index.as_str()];
            self.set(&path, &format!("data.held_out.{index}"), name, &[])?;
            let trained_by = self
                .config
                .stages
                .iter()
                .find(|stage| trained_sets(&stage.kind).contains(&name.as_str()));
            self.require(trained_by.is_none(), &path, || {
                let stage = trained_by.map_or("", |stage| &stage.name);
                format!("data.held_out.{index} = {name:?} is trained on by stage {stage:?}; take it out of one of them")
            })?;
        }
        Ok(())
    }
}

/// The sets that a stage trains on.
fn trained_sets(kind: &StageKind) -> Vec<&str> {
    match kind {
        StageKind::Pretrain(stage) => stage.data.iter().map(|entry| entry.set.as_str()).collect(),
        StageKind::LongContext(stage) => {
            stage.data.iter().map(|entry| entry.set.as_str()).collect()
        }
        StageKind::Sft(stage) => vec![&stage.data],
        StageKind::RewardModel(stage) => vec![&stage.data],
        StageKind::Grpo(stage) => vec![&stage.data],
    }
}

fn schema_name(schema: Schema) -> &'static str {
    match schema {
        Schema::Text => "text",
        Schema::Messages => "messages",
        Schema::Preferences => "preferences",
        Schema::Prompts => "prompts",
    }
}

fn schema_fields(schema: Schema) -> &'static [&'static str] {
    match schema {
        Schema::Text => &["text"],
        Schema::Messages => &["messages"],
        Schema::Preferences => &["prompt", "chosen", "rejected"],
        Schema::Prompts => &["prompt", "answer"],
    }
}
