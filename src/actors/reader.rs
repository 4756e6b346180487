//! Reader: a run's data, readied once and opened stage by stage, for the actors that open `data`.
//!
//! Readying writes generated files, trains or takes the tokenizer, and searches the training sets
//! for held-out examples; each product gets its name by a rename, so that a killed run finds it
//! whole or not at all. All methods block: actors call them through `post::aside`. Knows no
//! weights.

use super::messages::{DataReport, StageShape};
use super::stage_data::check_stage_data;
use crate::config::stage::{EvalConfig, Metric, StageKind};
use crate::config::{Fault, RunConfig};
use crate::data::audit::{audit, repeats};
use crate::data::chat::ChatTemplate;
use crate::data::example::Batch;
use crate::data::needle_files::write_needle_files;
use crate::data::protected::protected;
use crate::data::word_machine_files::write_files;
use crate::data::{Loader, Pair, Prompt, Sequence, Sources, StageData, Tokenizer};
use crate::engine::phase::{Dropping, TrainJob};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// See the module.
pub struct Reader {
    config: Arc<RunConfig>,
    folder: PathBuf,
    sources: Sources,
    /// Held while data is readied: a second request finds it done.
    readying: Mutex<()>,
    opened: Mutex<Option<(Arc<Tokenizer>, Arc<ChatTemplate>)>>,
    stages: Mutex<BTreeMap<usize, Arc<Mutex<StageData>>>>,
}

impl Reader {
    /// A reader of the run in `folder`, whose paths are relative to `config_dir`.
    pub fn new(config: Arc<RunConfig>, folder: PathBuf, config_dir: PathBuf) -> Reader {
        let sources =
            Sources { data: config.data.clone(), base: config_dir, generated: folder.join("data") };
        Reader {
            config,
            folder,
            sources,
            readying: Mutex::default(),
            opened: Mutex::default(),
            stages: Mutex::default(),
        }
    }

    /// The run's config.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// Readies the run's data; what is done already is left as it is.
    pub fn prepare(&self) -> Result<DataReport> {
        let _readying = self.readying.lock().expect("a panic here ends the actor that shares it");
        self.write_generated()?;
        self.write_tokenizer()?;
        let (tokenizer, _) = self.language()?;
        let (needed, rows) = (tokenizer.vocab_size(), self.config.model.vocab_size);
        if needed > rows {
            return Err(Fault::user(format!(
                "model.vocab_size = {rows} is smaller than the tokenizer's {needed} tokens; set it to {needed} or more"
            )));
        }
        self.check_starts()?;
        let notes = self.audits()?;
        for (index, stage) in self.config.stages.iter().enumerate() {
            check_stage_data(&self.loader(index)?, stage, &|_| true)?;
        }
        Ok(DataReport { vocabulary: needed, notes })
    }

    /// Refuses weights that were trained with another tokenizer than the run's.
    fn check_starts(&self) -> Result<()> {
        let (tokenizer, _) = self.language()?;
        for (index, stage) in self.config.stages.iter().enumerate() {
            let Some(folder) = self.config.start_folder(&self.sources.base, index) else {
                continue;
            };
            if let Some(difference) = tokenizer.difference_from(&folder)? {
                return Err(Fault::user(format!(
                    "stage {:?} starts from {}, {difference}",
                    stage.name,
                    folder.display()
                )));
            }
        }
        Ok(())
    }

    /// Searches what is trained on for what it must not hold.
    fn audits(&self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let trained = self.config.trained_sets();
        let held_out = audit(&self.sources, &self.config.data.held_out, &trained.all())?;
        held_out.require_clean()?;
        if held_out.held_out > 0 {
            notes.push(format!(
                "audit: none of {} held-out examples occurs in {} that are trained on",
                held_out.held_out, held_out.trained
            ));
        }
        let repeated = repeats(&self.sources, &trained.tuned, &trained.pretrained)?;
        if !self.config.data.pretrain_on_sft {
            repeated.require_clean()?;
        }
        if !trained.tuned.is_empty() && !trained.pretrained.is_empty() {
            notes.push(match repeated.found.len() {
                0 => format!(
                    "audit: none of {} SFT conversations is pretrained on",
                    repeated.conversations
                ),
                found => format!(
                    "audit: {found} of {} SFT conversations are pretrained on, as data.pretrain_on_sft allows",
                    repeated.conversations
                ),
            });
        }
        Ok(notes)
    }

    /// The data of a stage; opened at the first call.
    fn stage(&self, index: usize) -> Result<Arc<Mutex<StageData>>> {
        let mut stages = self.stages.lock().expect("a panic here ends the actor that shares it");
        if let Some(known) = stages.get(&index) {
            return Ok(Arc::clone(known));
        }
        let data = self.loader(index)?.stage(index as u64, &self.config.stages[index].kind)?;
        let data = Arc::new(Mutex::new(data));
        // One stage runs at a time: the one before is not needed again.
        stages.clear();
        stages.insert(index, Arc::clone(&data));
        Ok(data)
    }

    /// Steps of a stage; opens its data.
    pub fn shape(&self, index: usize) -> Result<StageShape> {
        let data = self.stage(index)?;
        let steps = data.lock().expect("a panic here ends the actor that shares it").steps();
        Ok(StageShape { steps })
    }

    /// The batch of a training step, as a job.
    pub fn train_job(&self, stage: usize, step: u64) -> Result<TrainJob> {
        let micro_batch = match &self.config.stages[stage].kind {
            StageKind::Pretrain(s) => s.micro_batch,
            StageKind::LongContext(s) => s.micro_batch,
            StageKind::Sft(s) => s.micro_batch,
            StageKind::RewardModel(s) => s.micro_batch,
            StageKind::Grpo(_) => panic!("a grpo stage trains on rollouts"),
        };
        let data = self.stage(stage)?;
        let mut data = data.lock().expect("a panic here ends the actor that shares it");
        let (share, batch) = (data.share(step), data.batch(step));
        let dropping = self.dropping(stage, step, &batch);
        Ok(TrainJob::Batch { share, batch, micro_batch, dropping })
    }

    /// What full devices drop of a step's batch: a function of seed, stage, step and place in the batch.
    fn dropping(&self, stage: usize, step: u64, batch: &Batch) -> Option<Dropping> {
        let capacity_factor = self.config.stages[stage].kind.capacity_factor()?;
        let Batch::Documents(documents) = batch else { return None };
        let protected = protected(self.config.seed, stage as u64, step, documents.len());
        Some(Dropping { capacity_factor, protected })
    }

    /// The prompts of an alignment step.
    pub fn step_prompts(&self, stage: usize, step: u64) -> Result<Vec<Prompt>> {
        let data = self.stage(stage)?;
        let prompts =
            data.lock().expect("a panic here ends the actor that shares it").prompts(step);
        Ok(prompts)
    }

    /// Texts of an eval, as measured sequences.
    pub fn texts(&self, stage: usize, eval: &EvalConfig) -> Result<Vec<Sequence>> {
        self.loader(stage)?.texts(&eval.data, eval.limit)
    }

    /// The first `limit` pairs of a set.
    pub fn pairs(&self, stage: usize, set: &str, limit: usize) -> Result<Vec<Pair>> {
        self.loader(stage)?.pairs(set, limit)
    }

    /// Prompts of an eval.
    pub fn prompts(&self, stage: usize, eval: &EvalConfig) -> Result<Vec<Prompt>> {
        self.loader(stage)?.prompts(&eval.data, eval.limit)
    }

    /// The run's tokenizer.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        Ok(self.language()?.0)
    }

    fn loader(&self, stage: usize) -> Result<Loader> {
        let (tokenizer, chat) = self.language()?;
        let context = self.config.stage_model(&self.sources.base, stage)?.max_position_embeddings;
        Ok(Loader {
            sources: self.sources.clone(),
            tokenizer,
            chat,
            seed: self.config.seed,
            context,
        })
    }

    fn language(&self) -> Result<(Arc<Tokenizer>, Arc<ChatTemplate>)> {
        let mut opened = self.opened.lock().expect("a panic here ends the actor that shares it");
        if let Some(known) = &*opened {
            return Ok(known.clone());
        }
        let tokenizer = Tokenizer::load(&self.folder.join("tokenizer.json"))?;
        let chat = ChatTemplate::from_folder(&self.folder)?.unwrap_or_else(ChatTemplate::own);
        let language = (Arc::new(tokenizer), Arc::new(chat));
        *opened = Some(language.clone());
        Ok(language)
    }

    fn write_generated(&self) -> Result<()> {
        let (data, seed) = (&self.config.data, self.config.seed);
        let done = &self.sources.generated;
        if done.exists() || (data.word_machine.is_none() && data.needle.is_none()) {
            return Ok(());
        }
        let aside = self.folder.join("data.tmp");
        remove_folder(&aside)?;
        std::fs::create_dir_all(&aside)
            .with_context(|| format!("failed to create {}", aside.display()))?;
        if let Some(machine) = &data.word_machine {
            write_files(machine, &self.sources.base.join(&machine.words), &aside, seed)?;
        }
        if let Some(needle) = &data.needle {
            write_needle_files(needle, &aside, seed)?;
        }
        rename(&aside, done)
    }

    fn write_tokenizer(&self) -> Result<()> {
        let done = self.folder.join("tokenizer.json");
        if done.exists() {
            return Ok(());
        }
        let tokenizer = self.sources.tokenizer(&self.config.tokenizer)?;
        let given = self.config.tokenizer.file.as_ref().map(|file| self.sources.base.join(file));
        let chat = match given.as_deref().and_then(Path::parent) {
            Some(beside) => ChatTemplate::from_folder(beside)?.unwrap_or_else(ChatTemplate::own),
            None => ChatTemplate::own(),
        };
        let last = self.config.stages.len() - 1;
        let longest = self.config.stage_model(&self.sources.base, last)?.max_position_embeddings;
        let config =
            serde_json::to_vec_pretty(&tokenizer.config(&chat, longest)).expect("it is plain JSON");
        // The tokenizer itself comes last: its presence says that both are whole.
        for (name, bytes) in [
            ("tokenizer_config.json", config.as_slice()),
            ("tokenizer.json", tokenizer.json().as_bytes()),
        ] {
            let aside = self.folder.join(format!("{name}.tmp"));
            std::fs::write(&aside, bytes)
                .with_context(|| format!("failed to write {}", aside.display()))?;
            rename(&aside, &self.folder.join(name))?;
        }
        Ok(())
    }
}

/// Which actor measures an eval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// Replies to prompts, by a verifier.
    Replies,
    /// Perplexity of texts.
    Texts,
    /// A reward model's accuracy on pairs.
    Pairs,
}

/// Which actor measures this eval.
pub fn measured(eval: &EvalConfig) -> Result<Measured> {
    match (eval.verifier, eval.metric) {
        (Some(_), _) => Ok(Measured::Replies),
        (None, Some(Metric::Perplexity)) => Ok(Measured::Texts),
        (None, Some(Metric::Accuracy)) => Ok(Measured::Pairs),
        (None, None) => {
            Err(Fault::user(format!("eval {:?} has neither `verifier` nor `metric`", eval.name)))
        }
    }
}

fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("failed to remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    ensure!(from != to, "a file is not renamed to itself");
    std::fs::rename(from, to)
        .with_context(|| format!("failed to rename {} to {}", from.display(), to.display()))
}
