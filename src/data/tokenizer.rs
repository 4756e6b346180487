//! The tokenizer: byte-level BPE, trained here or read from a tokenizer.json.
//!
//! Text is cut at control tokens first; what lies between goes through an inner BPE that knows none
//! of them. So a prompt may hold control tokens and a chat's content cannot forge one: its text
//! goes to the inner BPE whole. A control token is an added token that is marked special or has
//! several characters; DeepSeek's added single characters (such as "ø") are text.
//!
//! Invariants:
//!   * `encode_content` returns no control token for any text
//!   * decoding what was encoded gives the text back, for any text
//!   * training depends on the texts and the settings alone, not on threads or hash seeds

use crate::config::TokenizerConfig;
use crate::config::fault::Fault;
use crate::config::limited::read_limited_text;
use crate::data::chat::{ChatTemplate, read_tokenizer_config, token_text};
use crate::data::tokenizer_json::{SPLITS, differing_part, split_of, untrained};
use crate::data::tokenizer_rules::{check, leading_token};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Bpe};

/// Our own control tokens: ids 0 to 4.
pub const OWN_SPECIALS: [&str; 5] =
    ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"];

/// Least vocabulary: control tokens and bytes.
pub const LEAST_VOCABULARY: usize = 5 + 256;

/// Most bytes of a tokenizer.json; those of the largest vocabularies have 30 MB.
const FILE_LIMIT: u64 = 256 << 20;

const PROOF: &str = "a byte-level BPE with a token for every byte encodes any text";

/// See the module.
pub struct Tokenizer {
    json: String,
    inner: Bpe,
    control: BTreeMap<u32, String>,
    control_pattern: Option<regex::Regex>,
    characters: BTreeMap<char, u32>,
    vocab_size: usize,
    end: u32,
    pad: u32,
    bos: Option<u32>,
    adds_bos: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size)
    }
}

/// A part of a text that may hold control tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Text between control tokens.
    Plain(&'a str),
    /// A control token.
    Special(u32),
}

impl Tokenizer {
    /// Trains a tokenizer on texts; control tokens that they spell out are cut away.
    pub fn train(config: &TokenizerConfig, texts: &[String]) -> Result<Tokenizer> {
        let size = config.vocab_size.unwrap_or(0);
        if size < LEAST_VOCABULARY {
            return Err(Fault::user(format!(
                "tokenizer.vocab_size = {size} is too small: {LEAST_VOCABULARY} tokens are needed \
                 for the 5 special tokens and the 256 bytes"
            )));
        }
        let split = if config.split.is_empty() { SPLITS[0] } else { &config.split };
        let Some(untrained) = untrained(split) else {
            return Err(Fault::user(format!(
                "tokenizer.split = {split:?} is unknown; use one of {}",
                SPLITS.join(", ")
            )));
        };
        let mut bpe = Bpe::from_bytes(untrained.to_string()).map_err(|e| anyhow::anyhow!(e))?;
        let specials = OWN_SPECIALS.map(|text| AddedToken::from(text, true));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(specials.to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build()
            .into();
        let pieces = texts.iter().map(|text| {
            OWN_SPECIALS.iter().fold(text.clone(), |text, special| text.replace(special, "\n"))
        });
        // One thread: the library would start as many as the machine has.
        tokenizers::utils::parallelism::set_parallelism(false);
        bpe.train(&mut trainer, pieces).map_err(|e| anyhow::anyhow!(e))?;
        let json = bpe.to_string(true).map_err(|e| anyhow::anyhow!(e))?;
        let tokenizer = Tokenizer::from_json(&json, None).map_err(|e| anyhow::anyhow!(e))?;
        tokenizer.check_singles(&config.require_single)?;
        Ok(tokenizer)
    }

    /// Reads a tokenizer.json; a tokenizer_config.json beside it names the end and padding tokens.
    pub fn load(path: &Path) -> Result<Tokenizer> {
        let fault = |path: &Path, why: String| Fault::user(format!("{}: {why}", path.display()));
        let json = read_limited_text(path, FILE_LIMIT)
            .map_err(|unread| fault(path, unread.to_string()))?;
        let config = read_tokenizer_config(path.parent().unwrap_or(Path::new("")))?;
        Tokenizer::from_json(&json, config.as_ref()).map_err(|why| fault(path, why))
    }

    /// Makes a tokenizer of the text of a tokenizer.json and the value of a tokenizer_config.json.
    pub fn from_json(json: &str, config: Option<&Value>) -> Result<Tokenizer, String> {
        let mut bare: Value = serde_json::from_str(json).map_err(|e| format!("malformed: {e}"))?;
        if !bare.is_object() {
            return Err("malformed: it is no JSON object".to_string());
        }
        check(&bare)?;
        let added = added_tokens(&bare)?;
        let leading = leading_token(&bare)?;
        let ids = bare["model"]["vocab"].as_object().into_iter().flat_map(|ids| ids.values());
        let highest =
            ids.filter_map(Value::as_u64).chain(added.iter().map(|(_, id, _)| *id as u64)).max();
        // Only what was checked is handed on: the value and not the text, in which a key may stand
        // twice, and nothing of what is done here.
        for part in ["truncation", "padding", "post_processor"] {
            bare[part] = Value::Null;
        }
        bare["added_tokens"] = json!([]);
        bare["model"]["type"] = json!("BPE");
        let inner = Bpe::from_bytes(bare.to_string()).map_err(|error| error.to_string())?;
        let mut tokenizer = Tokenizer {
            json: json.to_string(),
            vocab_size: highest.map_or(0, |id| id as usize + 1),
            inner,
            control: BTreeMap::new(),
            control_pattern: None,
            characters: BTreeMap::new(),
            end: 0,
            pad: 0,
            bos: None,
            adds_bos: false,
        };
        for (text, id, special) in added {
            match text.chars().next() {
                Some(only) if !special && text.chars().count() == 1 => {
                    tokenizer.characters.insert(only, id);
                }
                _ => {
                    tokenizer.control.insert(id, text);
                }
            }
        }
        tokenizer.finish(leading, config.unwrap_or(&Value::Null))?;
        Ok(tokenizer)
    }

    fn finish(&mut self, leading: Option<u32>, config: &Value) -> Result<(), String> {
        // Longer tokens first, so that no token hides one that it begins.
        let mut texts: Vec<&String> = self.control.values().collect();
        texts.sort_by_key(|text| (std::cmp::Reverse(text.len()), text.as_str()));
        let pattern: Vec<String> = texts.iter().map(|text| regex::escape(text)).collect();
        if !pattern.is_empty() {
            let pattern = regex::Regex::new(&pattern.join("|")).map_err(|e| e.to_string())?;
            self.control_pattern = Some(pattern);
        }
        let named = |key: &str| -> Result<Option<u32>, String> {
            let Some(text) = token_text(&config[key]) else { return Ok(None) };
            let id = self.control_id(&text);
            id.map(Some).ok_or_else(|| format!("{key} {text:?} is no added token"))
        };
        let end = named("eos_token")?.or_else(|| self.control_id(OWN_SPECIALS[1]));
        let pad = named("pad_token")?.or_else(|| self.control_id(OWN_SPECIALS[0]));
        if let Some(id) = leading.filter(|id| !self.control.contains_key(id)) {
            return Err(format!(
                "the post_processor begins a text with {id}, which is no added token"
            ));
        }
        let bos = named("bos_token")?.or(leading);
        let adds_bos = config["add_bos_token"].as_bool().unwrap_or(leading.is_some());
        self.end = end.ok_or("no end token: name it as eos_token in tokenizer_config.json")?;
        self.pad = pad.unwrap_or(self.end);
        self.bos = bos;
        self.adds_bos = adds_bos && bos.is_some();
        Ok(())
    }

    fn check_singles(&self, words: &[String]) -> Result<()> {
        for word in words {
            let tokens = self.encode_content(word);
            if tokens.len() != 1 {
                let pieces: Vec<String> = tokens.iter().map(|id| self.decode(&[*id])).collect();
                return Err(Fault::user(format!(
                    "tokenizer.require_single: {word:?} became {} tokens {pieces:?}; raise \
                     tokenizer.vocab_size, train on more text that has it, or remove it",
                    tokens.len()
                )));
            }
        }
        Ok(())
    }

    /// Ids of a text as it is, control tokens recognised; nothing is put before or after it.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        for part in self.parts(text) {
            match part {
                Part::Special(id) => ids.push(id),
                Part::Plain(text) => ids.extend(self.encode_content(text)),
            }
        }
        ids
    }

    /// [`Self::encode_prompt`] with the beginning token before it if this tokenizer adds one and
    /// the text does not begin with it.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        let mut ids = self.encode_prompt(text);
        if let Some(bos) = self.added_bos()
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// Ids of a text in which control tokens are ordinary characters.
    pub fn encode_content(&self, text: &str) -> Vec<u32> {
        if self.characters.is_empty() {
            // Without spans this is faster, and documents are nearly all that is ever encoded.
            let encoding = self.inner.encode_fast(text, false).expect(PROOF);
            if !encoding.get_ids().iter().any(|id| self.control.contains_key(id)) {
                return encoding.get_ids().to_vec();
            }
        }
        self.encode_spans(text).into_iter().map(|(id, _)| id).collect()
    }

    /// [`Self::encode_content`] with the bytes of the text that each token covers.
    pub fn encode_spans(&self, text: &str) -> Vec<(u32, Range<usize>)> {
        let mut spans = Vec::new();
        let mut start = 0;
        if !self.characters.is_empty() {
            for (at, character) in text.char_indices() {
                if let Some(id) = self.characters.get(&character) {
                    let end = at + character.len_utf8();
                    self.encode_run(text, start..at, &mut spans);
                    spans.push((*id, at..end));
                    start = end;
                }
            }
        }
        self.encode_run(text, start..text.len(), &mut spans);
        spans
    }

    fn encode_run(&self, text: &str, run: Range<usize>, spans: &mut Vec<(u32, Range<usize>)>) {
        let piece = &text[run.clone()];
        if piece.is_empty() {
            return;
        }
        let encoding = self.inner.encode(piece, false).expect(PROOF);
        let ids = encoding.get_ids();
        if ids.iter().any(|id| self.control.contains_key(id)) && piece.chars().nth(1).is_some() {
            // A vocabulary may hold a control token as an ordinary word and look words up whole
            // (`ignore_merges`); single characters cannot make one.
            for (at, character) in piece.char_indices() {
                let start = run.start + at;
                self.encode_run(text, start..start + character.len_utf8(), spans);
            }
            return;
        }
        let offsets = encoding.get_offsets().iter();
        spans.extend(
            ids.iter().zip(offsets).map(|(id, span)| (*id, run.start + span.0..run.start + span.1)),
        );
    }

    /// Cuts a text at the control tokens that it spells.
    pub fn parts<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let mut start = 0;
        for found in self.control_pattern.iter().flat_map(|pattern| pattern.find_iter(text)) {
            if found.start() > start {
                parts.push(Part::Plain(&text[start..found.start()]));
            }
            let id =
                self.control_id(found.as_str()).expect("the pattern is made of the control tokens");
            parts.push(Part::Special(id));
            start = found.end();
        }
        if start < text.len() {
            parts.push(Part::Plain(&text[start..]));
        }
        parts
    }

    /// Text of tokens, control tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_parts(ids, false)
    }

    /// Text of tokens, control tokens spelled out.
    pub fn decode_with_specials(&self, ids: &[u32]) -> String {
        self.decode_parts(ids, true)
    }

    fn decode_parts(&self, ids: &[u32], specials: bool) -> String {
        let mut text = String::new();
        let mut run = Vec::new();
        let flush = |run: &mut Vec<u32>, text: &mut String| {
            // Ids beyond the vocabulary (a padded head can sample them) have no text.
            text.push_str(&self.inner.decode(run, false).unwrap_or_default());
            run.clear();
        };
        for id in ids {
            let character = self.characters.iter().find(|(_, added)| *added == id);
            match (self.control.get(id), character) {
                (Some(control), _) => {
                    flush(&mut run, &mut text);
                    text.push_str(if specials { control } else { "" });
                }
                (None, Some((character, _))) => {
                    flush(&mut run, &mut text);
                    text.push(*character);
                }
                (None, None) => run.push(*id),
            }
        }
        flush(&mut run, &mut text);
        text
    }

    /// The id of a token by its text (for ordinary tokens: in byte-level characters).
    pub fn id(&self, token: &str) -> Option<u32> {
        self.control_id(token).or_else(|| self.inner.token_to_id(token))
    }

    fn control_id(&self, token: &str) -> Option<u32> {
        self.control.iter().find(|(_, text)| *text == token).map(|(id, _)| *id)
    }

    /// Rows that a model's embedding needs: the greatest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a document or a reply.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The token that fills up rows.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The token that begins a document, if the vocabulary has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that this tokenizer puts before a text.
    pub fn added_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    /// The tokenizer.json, byte for byte as it was read or trained.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The name of its pre-tokenizer, as llama.cpp knows it; `None` if it is none of those.
    pub fn split(&self) -> Option<&'static str> {
        split_of(&serde_json::from_str(&self.json).expect("it was parsed when this was made"))
    }

    /// How the tokenizer in a model's folder differs from this one; `None` if it does not, or if the folder has none.
    pub fn difference_from(&self, folder: &Path) -> Result<Option<String>> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Ok(None);
        }
        let shown = path.display();
        let other = read_limited_text(&path, FILE_LIMIT)
            .map_err(|unread| Fault::user(format!("{shown}: {unread}")))?;
        let other: Value = serde_json::from_str(&other)
            .map_err(|error| Fault::user(format!("{shown}: malformed: {error}")))?;
        let own = serde_json::from_str(&self.json).expect("it was parsed when this was made");
        Ok(differing_part(&own, &other).map(|part| {
            format!(
                "whose tokenizer.json has another `{part}` than the run's tokenizer: its weights would read other texts; \
                 take it with [tokenizer] file = \"{shown}\""
            )
        }))
    }

    /// Writes the tokenizer.json.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, &self.json).map_err(|error| {
            anyhow::Error::new(error).context(format!("failed to write {}", path.display()))
        })
    }

    /// A tokenizer_config.json for it, with the chat template.
    pub fn config(&self, chat: &ChatTemplate, longest: usize) -> Value {
        let text = |id: u32| self.control.get(&id).cloned();
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos.and_then(text),
            "eos_token": text(self.end),
            "pad_token": text(self.pad),
            "add_bos_token": self.adds_bos,
            "add_eos_token": false,
            "clean_up_tokenization_spaces": false,
            "model_max_length": longest,
            "chat_template": chat.source(),
        })
    }
}

fn added_tokens(whole: &Value) -> Result<Vec<(String, u32, bool)>, String> {
    let Some(added) = whole["added_tokens"].as_array() else { return Ok(Vec::new()) };
    let read = |token: &Value| {
        let text = token["content"].as_str().filter(|text| !text.is_empty())?;
        let id = u32::try_from(token["id"].as_u64()?).ok()?;
        Some((text.to_string(), id, token["special"].as_bool().unwrap_or(false)))
    };
    added
        .iter()
        .map(|token| read(token).ok_or_else(|| format!("added token {token} has no content or id")))
        .collect()
}

#[cfg(test)]
mod tests;
