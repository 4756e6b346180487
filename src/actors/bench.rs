//! `bench grpo`: alignment steps on random tokens through the same actors as a run.
//!
//! Prompts are drawn from the vocabulary, the reward is a rule that about half of the replies
//! fulfil (the parity of their last token, which stands for their text), and nothing is written.
//! Knows no more of a step than the Director does.

use super::company::{Setup, run};
use super::director::{Direction, Position};
use super::messages::*;
use super::port::Limits;
use super::stage_plan::Folders;
use super::worker::DeviceMaker;
use crate::cluster::Team;
use crate::config::stage::{GrpoStage, RewardEntry, StageKind, VerifierKind};
use crate::config::{
    CheckpointConfig, ClusterConfig, ConsoleConfig, DataConfig, EngineConfig, Fault, ModelConfig,
    RunConfig, Stage, TokenizerConfig,
};
use crate::data::example::Prompt;
use crate::engine::hybrid::{EngineSetup, HybridEngine};
use crate::engine::phase::{ModelSource, PrepareStage};
use crate::engine::{Machine, Profile, heap};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// The parity that is rewarded.
const ODD: &str = "1";

/// What to time.
#[derive(Clone, Debug)]
pub struct BenchRequest {
    /// The model.
    pub model: ModelConfig,
    /// Its weights; `None` for random ones.
    pub weights: Option<PathBuf>,
    /// Device and bounds.
    pub engine: EngineConfig,
    /// Settings of the step: prompts, group size, new tokens, objective. Its reward is replaced.
    pub settings: GrpoStage,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Groups of a step to which the rule does not apply, so that all their rewards are 0.
    pub equal_rewards: usize,
    /// Timed steps; one more is made before them.
    pub steps: u64,
    /// Seed of weights, prompts and samples.
    pub seed: u64,
    /// A folder for offloaded models; removed at the end.
    pub spill: PathBuf,
    /// Counts what the device does, if that is asked.
    pub profile: Option<Arc<Profile>>,
}

/// Times alignment steps on random tokens.
pub fn bench_grpo(request: BenchRequest) -> anyhow::Result<Vec<BenchStep>> {
    let setup = EngineSetup {
        model: request.model.clone(),
        engine: request.engine.clone(),
        seed: request.seed,
        spill: request.spill.clone(),
        team: Team::alone(),
    };
    let profile = request.profile.clone();
    let device: DeviceMaker =
        Arc::new(move || Ok(Box::new(HybridEngine::profiled(setup.clone(), profile.clone())?)));
    match run(self::setup(request, device), |_| {})? {
        Outcome::Timed(steps) => Ok(steps),
        Outcome::Failed(failure) => Err(failure.into_error()),
        Outcome::Stopped(signal) => Err(Fault::Stopped(signal).into()),
        Outcome::Done => unreachable!("a bench ends with its times"),
    }
}

/// The company of a bench, on this device.
pub(super) fn setup(request: BenchRequest, device: DeviceMaker) -> Setup {
    let BenchRequest { model, weights, engine, mut settings, seed, spill, .. } = request;
    let (prompt_tokens, equal_rewards, steps) =
        (request.prompt_tokens, request.equal_rewards, request.steps);
    let prompts = settings.prompts;
    let bench = Bench { weights, prompts, prompt_tokens, equal_rewards, steps };
    let rule = RewardEntry {
        verifier: Some(VerifierKind::Number),
        model: None,
        weight: 1.0,
        partial: 0.0,
    };
    settings.reward = vec![rule];
    Setup {
        limits: Limits::of(&engine),
        config: Arc::new(run_config(model, engine, settings, seed)),
        folders: Folders { run: spill.clone(), config: spill },
        console: None,
        machine: Machine::default(),
        device,
        sampler: None,
        injection: Arc::default(),
        bench: Some(bench),
        stop: Arc::default(),
        mail: None,
        processes: None,
    }
}

/// A run of one stage that reads no file.
fn run_config(
    model: ModelConfig,
    engine: EngineConfig,
    settings: GrpoStage,
    seed: u64,
) -> RunConfig {
    let stage = Stage {
        name: "bench".to_string(),
        start_from: None,
        eval: Vec::new(),
        gate: None,
        kind: StageKind::Grpo(settings),
    };
    RunConfig {
        seed,
        model,
        tokenizer: TokenizerConfig::default(),
        data: DataConfig::default(),
        engine,
        cluster: ClusterConfig::default(),
        checkpoint: CheckpointConfig::default(),
        console: ConsoleConfig::default(),
        stages: vec![stage],
    }
}

impl Direction {
    /// Alignment steps on random tokens, each timed.
    pub(super) async fn bench(&self, bench: Bench) -> Outcome {
        match self.timed_steps(&bench).await {
            Ok(steps) => Outcome::Timed(steps),
            Err(failure) => Outcome::Failed(failure),
        }
    }

    async fn timed_steps(&self, bench: &Bench) -> Result<Vec<BenchStep>, Failure> {
        let StageKind::Grpo(settings) = &self.config.stages[0].kind else {
            unreachable!("a bench has one GRPO stage")
        };
        let (form, prefill) = self.config.engine.grpo_forms();
        let source = bench.weights.clone().map_or(ModelSource::Fresh, ModelSource::Folder);
        let stage = PrepareStage {
            policy: source.clone(),
            reference: (settings.kl_weight != 0.0).then_some(source),
            rewards: BTreeMap::new(),
            optimizer: Some(settings.optimizer.clone()),
            steps: (bench.steps + 1) * settings.updates,
            value_head: false,
            yarn: None,
            form,
            prefill,
            balance: crate::config::routing::Balance::NONE,
        };
        self.ask(&self.ports.prepare_device, PrepareDevice { id: self.id(), stage }).await?;
        let (mut version, mut steps) = (0, Vec::new());
        for step in 0..=bench.steps {
            let prompts =
                random_prompts(bench, self.config.seed, step, self.config.model.vocab_size);
            let before = [heap::page_faults(), heap::allocations()];
            let at = Position { index: 0, step, steps: step + 1, version };
            let aligned = self.align(&at, settings, Some(prompts)).await?;
            self.require_exact(&self.config.stages[0], step + 1, &aligned).await?;
            let after = [heap::page_faults(), heap::allocations()];
            version = aligned.report.policy_version;
            // The first step touches memory for the first time; the others are alike.
            if step > 0 {
                steps.push(aligned.times([0, 1].map(|i| after[i] - before[i])));
            }
        }
        Ok(steps)
    }
}

/// Prompts of random tokens. What is drawn does not matter, only that it differs.
fn random_prompts(bench: &Bench, seed: u64, step: u64, vocabulary: usize) -> Vec<Prompt> {
    let mut state = seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary.max(1) as u64) as u32
    };
    (0..bench.prompts as u64)
        .map(|slot| Prompt {
            index: step * bench.prompts as u64 + slot,
            text: String::new(),
            tokens: (0..bench.prompt_tokens).map(|_| next()).collect(),
            answer: (slot >= bench.equal_rewards as u64).then(|| ODD.to_string()),
        })
        .collect()
}
