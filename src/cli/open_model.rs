//! A checkpoint that a person names, ready to answer and to score.
//!
//! One of our folders or a Hugging Face folder: config.json, safetensors, tokenizer.json.

use super::extension::Extension;
use super::machine::{free_memory, share_for_arenas};
use crate::checkpoint::read_model_config;
use crate::cluster::Team;
use crate::config::data::{DataConfig, Schema, SetConfig};
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::routing::Balance;
use crate::config::stage::OptimizerConfig;
use crate::config::{Bytes, EngineConfig, Fault, ModelConfig};
use crate::data::chat::ChatTemplate;
use crate::data::loader::Loader;
use crate::data::sources::Sources;
use crate::data::tokenizer::Tokenizer;
use crate::engine::Profile;
use crate::engine::hybrid::{EngineSetup, HybridEngine};
use crate::engine::phase::{
    GenerateJob, GenerateReport, GenerateRequest, ModelSource, Phase, PrepareStage, TokenGroup,
};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the one set of a loader made for a file of the command line.
pub const FILE: &str = "file";

/// A model on a device of its own, with its tokenizer and chat template.
pub struct OpenModel {
    /// The device.
    pub engine: HybridEngine,
    /// Published config.
    pub config: ModelConfig,
    /// Text to tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to tokens.
    pub chat: Arc<ChatTemplate>,
}

/// An engine with a model that nothing trains, or that `optimizer` trains; counted if a profile is given.
pub fn engine(
    config: &ModelConfig,
    source: ModelSource,
    threads: usize,
    seed: u64,
    optimizer: Option<OptimizerConfig>,
    profile: Option<Arc<Profile>>,
) -> Result<HybridEngine> {
    let plan = plan(config, source, optimizer);
    prepared(config, threads, seed, &plan, profile)
}

/// What readies an engine for one model.
fn plan(
    config: &ModelConfig,
    source: ModelSource,
    optimizer: Option<OptimizerConfig>,
) -> PrepareStage {
    PrepareStage {
        policy: source,
        reference: None,
        rewards: BTreeMap::new(),
        steps: 1,
        value_head: false,
        yarn: None,
        form: AttentionForm::Expanded,
        prefill: Prefill::ByCost,
        balance: Balance::of_experts(optimizer.as_ref().map_or(0.0, |_| config.aux_loss_alpha)),
        optimizer,
    }
}

fn prepared(
    config: &ModelConfig,
    threads: usize,
    seed: u64,
    plan: &PrepareStage,
    profile: Option<Arc<Profile>>,
) -> Result<HybridEngine> {
    let budget = free_memory().map(|free| Bytes(share_for_arenas(free)));
    let settings =
        EngineConfig { threads, budget, offload: Some(Vec::new()), ..EngineConfig::default() };
    let setup = EngineSetup {
        model: config.clone(),
        engine: settings,
        seed,
        spill: spill_folder(),
        team: Team::alone(),
    };
    let mut engine = HybridEngine::profiled(setup, profile)?;
    engine.prepare(plan)?;
    Ok(engine)
}

/// True if a file's name says plain text, compressed or not.
fn is_plain_text(file: &Path) -> bool {
    let name = file.file_name().map(|name| name.to_string_lossy().to_lowercase());
    name.is_some_and(|name| name.trim_end_matches(".gz").ends_with(".txt"))
}

/// A folder of this process for offloaded models; the engine removes it.
pub fn spill_folder() -> PathBuf {
    std::env::temp_dir().join(format!("rehearsal-{}", std::process::id()))
}

impl OpenModel {
    /// Opens a checkpoint folder.
    pub fn open(folder: &Path, threads: usize) -> Result<OpenModel> {
        OpenModel::open_extended(folder, threads, Extension::default())
    }

    /// Opens a checkpoint folder; the model may get more positions than it has.
    pub fn open_extended(folder: &Path, threads: usize, extension: Extension) -> Result<OpenModel> {
        let mut config = read_model_config(folder)?;
        let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Fault::user(format!(
                "{}: the tokenizer has {} tokens, vocab_size is {}; they belong to different models",
                folder.display(),
                tokenizer.vocab_size(),
                config.vocab_size
            )));
        }
        let chat = ChatTemplate::from_folder(folder)?.unwrap_or_else(ChatTemplate::own);
        let mut plan = plan(&config, ModelSource::Folder(folder.to_path_buf()), None);
        if let Some(extended) = extension.of(&config)? {
            plan.yarn = Some((extended.rope_scaling.clone(), extended.max_position_embeddings));
            config = extended;
        }
        let engine = prepared(&config, threads, 0, &plan, None)?;
        Ok(OpenModel { engine, config, tokenizer: Arc::new(tokenizer), chat: Arc::new(chat) })
    }

    /// A loader whose set [`FILE`] is `file`: JSONL, or of texts one plain text.
    pub fn loader(&self, file: &Path, schema: Schema, chat: bool) -> Loader {
        let is_plain = schema == Schema::Text && is_plain_text(file);
        let plain_text_bytes = if is_plain { usize::MAX } else { 0 };
        let set = SetConfig {
            file: file.to_string_lossy().into_owned(),
            schema,
            fields: Default::default(),
            chat,
            plain_text_bytes,
            rejected_from_previous_line: false,
            split: None,
        };
        let sets = BTreeMap::from([(FILE.to_string(), set)]);
        let data = DataConfig { sets, ..DataConfig::default() };
        let base = std::env::current_dir().unwrap_or_default();
        Loader {
            sources: Sources { data, base, generated: PathBuf::new() },
            tokenizer: Arc::clone(&self.tokenizer),
            chat: Arc::clone(&self.chat),
            seed: 0,
            context: self.config.max_position_embeddings,
        }
    }

    /// Tokens that end a reply: the config's, else the tokenizer's.
    pub fn stop_tokens(&self) -> Vec<u32> {
        match &self.config.eos_token_id {
            Some(tokens) => tokens.ids().to_vec(),
            None => vec![self.tokenizer.end()],
        }
    }

    /// Samples `samples` replies to each prompt; groups come in the order of the prompts.
    pub fn answer(
        &mut self,
        prompts: &[Vec<u32>],
        samples: u32,
        ask: &Ask,
    ) -> Result<(Vec<TokenGroup>, GenerateReport)> {
        let request = |(slot, tokens): (usize, &Vec<u32>)| GenerateRequest {
            slot: slot as u32,
            tokens: tokens.clone(),
            prompt: slot as u64,
            samples,
        };
        let job = GenerateJob {
            requests: prompts.iter().enumerate().map(request).collect(),
            max_new_tokens: ask.max_tokens,
            temperature: ask.temperature,
            top_p: ask.top_p,
            top_k: 0,
            stop_tokens: self.stop_tokens(),
            seed: ask.seed,
            step: 0,
            policy_version: 0,
        };
        self.engine.enter_phase(Phase::Generate)?;
        let mut groups = Vec::with_capacity(prompts.len());
        let report = self.engine.generate(&job, &mut |group| groups.push(group))?;
        groups.sort_by_key(|group| group.slot);
        for rollout in groups.iter_mut().flat_map(|group| &mut group.rollouts) {
            rollout.text = self.tokenizer.decode(&rollout.tokens);
        }
        Ok((groups, report))
    }
}

/// How replies are sampled.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Most new tokens.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus; 1 keeps all.
    pub top_p: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}
