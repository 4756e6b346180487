//! Where the sets of a run lie, and the texts that a tokenizer is trained on.
//!
//! Knows no tokens. A set's file is relative to the TOML, or `run:NAME` for a file that a generator
//! wrote into the run's `data/`.

use crate::config::TokenizerConfig;
use crate::config::data::{DataConfig, SetConfig};
use crate::config::fault::Fault;
use crate::data::jsonl::{Records, strings};
use crate::data::tokenizer::Tokenizer;
use anyhow::Result;
use std::path::PathBuf;

/// The sets of a run.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `[data]`.
    pub data: DataConfig,
    /// The TOML's folder.
    pub base: PathBuf,
    /// The run's `data/`, where generators write.
    pub generated: PathBuf,
}

impl Sources {
    /// A set and the place of its file.
    pub fn set(&self, name: &str) -> Result<(PathBuf, &SetConfig)> {
        let Some(set) = self.data.sets.get(name) else {
            let known: Vec<&str> = self.data.sets.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
            return Err(Fault::user(format!(
                "data set {name:?} does not exist; [data.sets] has {known}"
            )));
        };
        let path = match set.file.strip_prefix("run:") {
            None => self.base.join(&set.file),
            Some(file) if file.contains(['/', '\\']) || file == ".." => {
                return Err(Fault::user(format!(
                    "data.sets.{name}.file = {:?}: after `run:` stands the plain name of a file",
                    set.file
                )));
            }
            Some(file) => self.generated.join(file),
        };
        Ok((path, set))
    }

    /// The records of a set.
    pub fn records(&self, name: &str) -> Result<(PathBuf, Records)> {
        let (path, set) = self.set(name)?;
        let records = Records::open(&path, set)?;
        Ok((path, records))
    }

    /// Trains the tokenizer of `[tokenizer]`, or reads the one it names.
    pub fn tokenizer(&self, config: &TokenizerConfig) -> Result<Tokenizer> {
        if let Some(file) = &config.file {
            return Tokenizer::load(&self.base.join(file));
        }
        if config.train_on.is_empty() {
            return Err(Fault::user("tokenizer.train_on names no data set to train on"));
        }
        let mut texts = Vec::new();
        for name in &config.train_on {
            let limit = if config.bytes_per_set == 0 { usize::MAX } else { config.bytes_per_set };
            let mut bytes = 0;
            for located in self.records(name)?.1 {
                for text in strings(located?.record) {
                    bytes += text.len();
                    texts.push(text);
                }
                if bytes >= limit {
                    break;
                }
            }
        }
        Tokenizer::train(config, &texts)
    }
}
