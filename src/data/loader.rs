//! Opens the sets of a stage: files to batches of tokens.
//!
//! Knows no weights. Everything is read and encoded when a stage opens, so that a fault of the data
//! ends the stage before its first step, with file and line.
//!
//! Invariants:
//!   * a document, conversation, pair or prompt never exceeds the context
//!   * batches and prompts are functions of (seed, stage, step)

use crate::config::Schema;
use crate::config::fault::Fault;
use crate::config::stage::{MixtureEntry, StageKind};
use crate::data::chat::{ChatTemplate, Message, Role};
use crate::data::conversations::Conversations;
use crate::data::corpus::{Corpus, Mixture, rows_by_step};
use crate::data::example::{Batch, Pair, Prompt, Sequence};
use crate::data::jsonl::{Located, PromptText, Record};
use crate::data::lines::fault_at;
use crate::data::order::OrderKey;
use crate::data::preferences::Preferences;
use crate::data::prompts::Prompts;
use crate::data::sources::Sources;
use crate::data::tokenizer::Tokenizer;
use anyhow::Result;
use rehearsal_kernels::random::Stream;
use std::path::Path;
use std::sync::Arc;

/// Reads sets into tokens.
#[derive(Clone, Debug)]
pub struct Loader {
    /// The sets.
    pub sources: Sources,
    /// Text to tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text.
    pub chat: Arc<ChatTemplate>,
    /// The run's seed.
    pub seed: u64,
    /// The model's `max_position_embeddings`.
    pub context: usize,
}

/// The data of a stage.
#[derive(Debug)]
pub enum StageData {
    /// Pretraining and long context.
    Text(Mixture),
    /// SFT.
    Conversations(Conversations),
    /// Reward models.
    Preferences(Preferences),
    /// GRPO.
    Prompts(Prompts),
}

impl StageData {
    /// Optimizer steps (GRPO: policy steps) of the stage.
    pub fn steps(&self) -> u64 {
        match self {
            StageData::Text(mixture) => mixture.steps(),
            StageData::Conversations(conversations) => conversations.steps(),
            StageData::Preferences(preferences) => preferences.steps(),
            StageData::Prompts(prompts) => prompts.steps(),
        }
    }

    /// The share of the stage's examples that the steps before `step` hold.
    pub fn share(&self, step: u64) -> f64 {
        match self {
            StageData::Text(mixture) => mixture.share(step),
            _ => step as f64 / self.steps().max(1) as f64,
        }
    }

    /// The batch of a training step.
    pub fn batch(&mut self, step: u64) -> Batch {
        match self {
            StageData::Text(mixture) => Batch::Documents(mixture.batch(step)),
            StageData::Conversations(conversations) => Batch::Documents(conversations.batch(step)),
            StageData::Preferences(preferences) => Batch::Pairs(preferences.batch(step)),
            StageData::Prompts(_) => panic!("a grpo stage trains on rollouts, not on batches"),
        }
    }

    /// The prompts of a GRPO step.
    pub fn prompts(&mut self, step: u64) -> Vec<Prompt> {
        match self {
            StageData::Prompts(prompts) => prompts.step(step),
            _ => panic!("only a grpo stage has prompts"),
        }
    }
}

impl Loader {
    /// Opens the sets of stage number `stage`.
    pub fn stage(&self, stage: u64, kind: &StageKind) -> Result<StageData> {
        let key = |stream| OrderKey { seed: self.seed, stream, stage, set: 0 };
        Ok(match kind {
            StageKind::Pretrain(s) => {
                let rows = rows_by_step(s.steps, s.batch, s.batch_start, s.batch_ramp);
                self.mixture(stage, &s.data, s.sequence, &rows)?
            }
            StageKind::LongContext(s) => {
                let rows = rows_by_step(s.steps, s.batch, 0, 0.0);
                self.mixture(stage, &s.data, s.sequence, &rows)?
            }
            StageKind::Sft(s) => StageData::Conversations(Conversations::new(
                self.conversations(&s.data)?,
                key(Stream::Order),
                s.epochs,
                s.batch,
            )),
            StageKind::RewardModel(s) => StageData::Preferences(Preferences::new(
                self.pairs(&s.data, 0)?,
                key(Stream::Order),
                s.epochs,
                s.batch,
            )),
            StageKind::Grpo(s) => StageData::Prompts(Prompts::new(
                self.prompts(&s.data, 0)?,
                key(Stream::Prompts),
                s.prompts,
                s.steps,
            )),
        })
    }

    fn mixture(
        &self,
        stage: u64,
        entries: &[MixtureEntry],
        sequence: usize,
        rows: &[usize],
    ) -> Result<StageData> {
        let mut corpora = Vec::new();
        for (set, entry) in entries.iter().enumerate() {
            let stream = Stream::Order;
            let key = OrderKey { seed: self.seed, stream, stage, set: set as u64 };
            let documents = self.documents(&entry.set)?.map(|d| d.map(|d| d.tokens));
            let corpus = Corpus::new(documents, sequence, key)?;
            if corpus.is_empty() {
                return Err(self.nothing(&entry.set));
            }
            corpora.push(corpus);
        }
        let shares: Vec<f64> = entries.iter().map(|entry| entry.share).collect();
        Ok(StageData::Text(Mixture::new(corpora, &shares, rows)))
    }

    /// The documents of a set as tokens: texts with their control tokens recognised, conversations
    /// through the chat template. A document that holds no end token is given one at its end.
    pub fn documents(&self, name: &str) -> Result<impl Iterator<Item = Result<Sequence>> + '_> {
        let (path, records) = self.sources.records(name)?;
        let end = self.tokenizer.end();
        Ok(records.map(move |located| {
            let located = located?;
            let Record::Text(text) = &located.record else {
                return self.conversation(&path, located);
            };
            let mut tokens = self.tokenizer.encode_text(text);
            if !tokens.contains(&end) {
                tokens.push(end);
            }
            Ok(Sequence::all_targets(tokens))
        }))
    }

    /// The first `limit` texts of a set (0 for all), as evaluation measures them: no end token is
    /// added, and long texts are cut into pieces of the context.
    pub fn texts(&self, name: &str, limit: usize) -> Result<Vec<Sequence>> {
        let (path, records) = self.sources.records(name)?;
        let (mut texts, mut read) = (Vec::new(), 0);
        for located in records.take(most(limit)) {
            let located = located?;
            read += 1;
            let tokens = match &located.record {
                Record::Text(text) => self.tokenizer.encode_text(text),
                _ => self.conversation(&path, located)?.tokens,
            };
            let pieces = tokens.chunks(self.context).filter(|piece| piece.len() > 1);
            texts.extend(pieces.map(|piece| Sequence::all_targets(piece.to_vec())));
        }
        if texts.is_empty() && read > 0 {
            return Err(Fault::user(format!(
                "{}: none of {read} texts has two tokens or more, and the first of a text is not predicted",
                path.display()
            )));
        }
        self.not_empty(name, texts)
    }

    /// The conversations of a set: of messages, or of prompts with their answers as replies.
    pub fn conversations(&self, name: &str) -> Result<Vec<Sequence>> {
        let (path, records) = self.sources.records(name)?;
        let sequences: Result<Vec<Sequence>> =
            records.map(|located| self.conversation(&path, located?)).collect();
        self.not_empty(name, sequences?)
    }

    fn conversation(&self, path: &Path, located: Located) -> Result<Sequence> {
        let fault = |reason: &str| fault_at(path, located.index, reason);
        let sequence = match located.record {
            Record::Messages(messages) => self.encode_messages(&messages),
            Record::Prompt { prompt, answer: Some(answer) } => self.answered(&prompt, &answer),
            Record::Prompt { answer: None, .. } => {
                return Err(fault("the answer is null, but a conversation needs a reply"));
            }
            Record::Text(_) | Record::Preference { .. } => {
                return Err(fault("the set's schema must be messages or prompts for this use"));
            }
        };
        let sequence = sequence.map_err(|error| fault(&error.to_string()))?;
        if sequence.targets() == 0 {
            return Err(fault("the conversation has no reply of the assistant to learn from"));
        }
        self.fits(sequence.tokens.len(), "the conversation").map_err(|reason| fault(&reason))?;
        Ok(sequence)
    }

    fn encode_messages(&self, messages: &[Message]) -> Result<Sequence> {
        self.chat.encode_conversation(&self.tokenizer, messages)
    }

    /// A prompt with a reply and the end token.
    fn answered(&self, prompt: &PromptText, reply: &str) -> Result<Sequence> {
        match prompt {
            PromptText::Chat(messages) => {
                let mut messages = messages.clone();
                messages.push(Message::new(Role::Assistant, reply));
                self.encode_messages(&messages)
            }
            PromptText::Raw(text) => {
                let mut tokens = self.tokenizer.encode_text(text);
                let prompt_tokens = tokens.len().max(1);
                tokens.extend(self.tokenizer.encode_content(reply));
                tokens.push(self.tokenizer.end());
                let target = (0..tokens.len()).map(|i| i >= prompt_tokens).collect();
                Ok(Sequence { tokens, target })
            }
        }
    }

    /// The first `limit` preference pairs of a set (0 for all).
    pub fn pairs(&self, name: &str, limit: usize) -> Result<Vec<Pair>> {
        let (path, records) = self.sources.records(name)?;
        let mut pairs = Vec::new();
        for located in records.take(most(limit)) {
            let located = located?;
            let fault = |reason: &str| fault_at(&path, located.index, reason);
            let Record::Preference { prompt, chosen, rejected } = &located.record else {
                return Err(self.wrong_schema(name, Schema::Preferences));
            };
            let encode = |reply: &str| -> Result<Vec<u32>> {
                let sequence = self.answered(prompt, reply).map_err(|e| fault(&e.to_string()))?;
                let mut tokens = sequence.tokens;
                // The score is read at the end token: nothing may follow it.
                if let Some(last) = tokens.iter().rposition(|id| *id == self.tokenizer.end()) {
                    tokens.truncate(last + 1);
                } else {
                    tokens.push(self.tokenizer.end());
                }
                self.fits(tokens.len(), "the pair").map_err(|reason| fault(&reason))?;
                Ok(tokens)
            };
            pairs.push(Pair { chosen: encode(chosen)?, rejected: encode(rejected)? });
        }
        self.not_empty(name, pairs)
    }

    /// The first `limit` prompts of a set (0 for all).
    pub fn prompts(&self, name: &str, limit: usize) -> Result<Vec<Prompt>> {
        let (path, records) = self.sources.records(name)?;
        let mut prompts = Vec::new();
        for located in records.take(most(limit)) {
            let located = located?;
            let Record::Prompt { prompt, answer } = located.record else {
                return Err(self.wrong_schema(name, Schema::Prompts));
            };
            let made = self.prompt(located.index, &prompt, answer);
            prompts.push(made.map_err(|error| fault_at(&path, located.index, &error.to_string()))?);
        }
        self.not_empty(name, prompts)
    }

    /// Encodes one prompt; it must leave room for a reply in the context.
    pub fn prompt(
        &self,
        index: u64,
        prompt: &PromptText,
        answer: Option<String>,
    ) -> Result<Prompt> {
        let (text, tokens) = match prompt {
            PromptText::Raw(text) => (text.clone(), self.tokenizer.encode_text(text)),
            PromptText::Chat(messages) => (
                self.chat.prompt_text(messages)?,
                self.chat.encode_prompt(&self.tokenizer, messages)?,
            ),
        };
        if tokens.is_empty() {
            return Err(Fault::user("the prompt is empty"));
        }
        self.fits(tokens.len() + 1, "the prompt with one new token").map_err(Fault::user)?;
        Ok(Prompt { index, text, tokens, answer })
    }

    fn fits(&self, tokens: usize, what: &str) -> Result<(), String> {
        if tokens <= self.context {
            return Ok(());
        }
        Err(format!(
            "{what} has {tokens} tokens, more than the context of {}; shorten it or raise \
             model.max_position_embeddings",
            self.context
        ))
    }

    fn not_empty<T>(&self, name: &str, items: Vec<T>) -> Result<Vec<T>> {
        if items.is_empty() { Err(self.nothing(name)) } else { Ok(items) }
    }

    fn nothing(&self, name: &str) -> anyhow::Error {
        let file = self.sources.set(name).map(|(path, _)| path.display().to_string());
        let file = file.unwrap_or_default();
        Fault::user(format!("{file}: data set {name:?} holds no example (see its `split`)"))
    }

    fn wrong_schema(&self, name: &str, wanted: Schema) -> anyhow::Error {
        Fault::user(format!(
            "data.sets.{name}.schema must be {wanted:?} (in lower case) for this use"
        ))
    }
}

fn most(limit: usize) -> usize {
    if limit == 0 { usize::MAX } else { limit }
}

#[cfg(test)]
mod tests;
