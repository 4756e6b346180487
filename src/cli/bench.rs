//! `rehearsal bench`: our own hot paths, timed on random tokens.

mod args;

pub use args::{BenchArgs, BenchGenerateArgs, BenchGrpoArgs, BenchTrainArgs, BenchWhat};

use super::command::Threads;
use super::formats::sampled_as;
use super::machine::{free_memory, measured, share_for_arenas};
use super::open_model::{engine, spill_folder};
use super::output::{say, say_json};
use super::profile::{ProfileReport, counting};
use super::stopwatch::{Spent, Stopwatch};
use super::{bench_cache, bench_machine};
use crate::actors::messages::BenchStep;
use crate::actors::{BenchRequest, bench_grpo};
use crate::checkpoint::read_model_config;
use crate::config::stage::{Deviation, GrpoStage, LengthNorm, OptimizerConfig, RatioLevel};
use crate::config::{Bytes, Dtype, EngineConfig, Fault, ModelConfig, load_model};
use crate::data::example::{Batch, Sequence};
use crate::engine::Profile;
use crate::engine::phase::{GenerateJob, GenerateRequest, ModelSource, Phase, TrainJob};
use crate::engine::utilisation::{Machines, useful_share};
use crate::plan::cache_bytes_per_token;
use crate::plan::limit::{self, Sampling};
use anyhow::Result;
use rehearsal_kernels::machine::{Effort, Machine};
use rehearsal_kernels::random::{Stream, below};
use serde_json::{Value, json};
use std::path::Path;

/// The most tokens a second that the machine's measured rates allow, beside `tokens_per_second`.
const LIMIT: &str = "limit_tokens_per_second";

/// Times what was asked.
pub fn run(args: BenchArgs) -> Result<()> {
    let (json, result) = match &args.what {
        BenchWhat::Machine(args) => return bench_machine::run(args),
        BenchWhat::Cache(args) => return bench_cache::run(args),
        BenchWhat::Train(args) => (args.timing.json, train(args)?),
        BenchWhat::Generate(args) => (args.timing.json, generate(args)?),
        BenchWhat::Grpo(args) => (args.timing.json, grpo(args)?),
    };
    result.say(json)
}

/// What a benchmark found.
struct Outcome {
    /// Figures by name.
    figures: Value,
    /// What the machine does in a second.
    machine: Machine,
    /// Where the time went, if that was asked.
    profile: Option<ProfileReport>,
}

impl Outcome {
    fn say(&self, json: bool) -> Result<()> {
        if json {
            let mut all = self.figures.clone();
            all["machine"] = json!(self.machine);
            if let Some(profile) = &self.profile {
                all["profile"] = json!(profile);
            }
            return say_json(&all);
        }
        let Value::Object(figures) = &self.figures else { unreachable!("figures have names") };
        figures.iter().try_for_each(|(name, value)| say(&format!("{name:30} {value}")))?;
        say("")?;
        bench_machine::lines(&self.machine).iter().try_for_each(|line| say(line))?;
        let Some(profile) = &self.profile else { return Ok(()) };
        say("")?;
        profile.lines().iter().try_for_each(|line| say(line))
    }
}

/// The config of a folder of weights, or a config.json.
pub fn model_config(path: &Path) -> Result<ModelConfig> {
    Ok(model(path)?.0)
}

/// A folder of weights, or a config.json for random ones.
fn model(path: &Path) -> Result<(ModelConfig, ModelSource)> {
    if path.is_dir() {
        return Ok((read_model_config(path)?, ModelSource::Folder(path.to_path_buf())));
    }
    Ok((load_model(path)?, ModelSource::Fresh))
}

/// Random tokens: a function of their place alone.
fn tokens(config: &ModelConfig, sequence: usize, count: usize) -> Vec<u32> {
    let token = |i: usize| {
        below(1, Stream::Data, [sequence as u64, i as u64, 0, 0], config.vocab_size as u64)
    };
    (0..count).map(|i| token(i) as u32).collect()
}

fn require_context(config: &ModelConfig, tokens: usize) -> Result<()> {
    let context = config.max_position_embeddings;
    match tokens > context {
        true => Err(Fault::user(format!(
            "{tokens} tokens do not fit in the model's context of {context}"
        ))),
        false => Ok(()),
    }
}

/// Refuses what the machine cannot even hold as tokens: `sequences` of `tokens` each, a few copies of them.
fn require_room(sequences: usize, tokens: usize) -> Result<()> {
    let each = 128_u64.saturating_add((tokens as u64).saturating_mul(32));
    let (needed, free) = ((sequences as u64).saturating_mul(each), free_memory());
    match free.filter(|free| needed > *free) {
        Some(free) => Err(Fault::resources(format!(
            "{sequences} sequences of {tokens} tokens take about {}, and {} are free; ask for fewer",
            Bytes(needed),
            Bytes(free)
        ))),
        None => Ok(()),
    }
}

/// Figures of every benchmark beside its own.
fn with_spent(
    mut figures: Value,
    spent: &Spent,
    path: &Path,
    threads: Threads,
    profile: Option<&Profile>,
) -> Outcome {
    figures["wall_seconds"] = json!(spent.wall_seconds);
    figures["cpu_seconds"] = json!(spent.cpu_seconds);
    figures["peak_rss_bytes"] = json!(spent.peak_rss_bytes);
    figures["model"] = json!(path);
    figures["threads"] = json!(threads.count());
    // After the work, so that it disturbs neither its time nor its memory.
    let machine = measured(threads.count(), Effort::brief);
    let profile = profile.map(|profile| ProfileReport::new(profile, &machine));
    Outcome { figures, machine, profile }
}

/// Starts to time, and to count anew.
fn start(profile: Option<&Profile>) -> Stopwatch {
    profile.inspect(|profile| profile.clear());
    Stopwatch::start()
}

fn train(args: &BenchTrainArgs) -> Result<Outcome> {
    let (config, source) = model(&args.model)?;
    require_context(&config, args.sequence)?;
    require_room(args.batch, args.sequence)?;
    let profile = counting(args.timing.profile, args.timing.threads.count());
    let (threads, optimizer) = (args.timing.threads.count(), Some(OptimizerConfig::default()));
    let mut engine = engine(&config, source, threads, 1, optimizer, profile.clone())?;
    engine.enter_phase(Phase::Train)?;
    let documents =
        (0..args.batch).map(|i| Sequence::all_targets(tokens(&config, i, args.sequence)));
    let batch = Batch::Documents(documents.collect());
    let job = TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None };
    engine.train(&job)?;
    let stopwatch = start(profile.as_deref());
    for _ in 0..args.steps {
        engine.train(&job)?;
    }
    let spent = stopwatch.spent();
    let trained = (args.batch * args.sequence * args.steps) as f64;
    let figures = json!({
        "bench": "train", "batch": args.batch, "sequence": args.sequence, "steps": args.steps, "dtype": "f32",
        "tokens_per_second": trained / spent.wall_seconds,
        "seconds_per_step": spent.wall_seconds / args.steps as f64,
        "page_faults_per_step": spent.page_faults as f64 / args.steps as f64,
        "heap_allocations_per_step": spent.heap_allocations as f64 / args.steps as f64,
    });
    let mut outcome =
        with_spent(figures, &spent, &args.model, args.timing.threads, profile.as_deref());
    outcome.figures[LIMIT] = json!(limit::training(&config, args.sequence, &outcome.machine));
    Ok(outcome)
}

fn generate(args: &BenchGenerateArgs) -> Result<Outcome> {
    let (batch, samples) = (args.batch, args.samples_per_prompt);
    if !batch.is_multiple_of(samples) {
        return Err(Fault::user(format!(
            "--samples-per-prompt {samples} does not divide --batch {batch}; every prompt has the same number of samples"
        )));
    }
    let (config, source) = model(&args.model)?;
    let tokens_each = args.prompt_tokens.saturating_add(args.new_tokens);
    require_context(&config, tokens_each)?;
    require_room(batch, tokens_each)?;
    let profile = counting(args.timing.profile, args.timing.threads.count());
    let mut engine =
        engine(&config, source, args.timing.threads.count(), 1, None, profile.clone())?;
    let request = |slot: usize| GenerateRequest {
        slot: slot as u32,
        tokens: tokens(&config, slot, args.prompt_tokens),
        prompt: slot as u64,
        samples: samples as u32,
    };
    let job = GenerateJob {
        requests: (0..batch / samples).map(request).collect(),
        max_new_tokens: args.new_tokens,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        stop_tokens: Vec::new(),
        seed: 1,
        step: 0,
        policy_version: 0,
    };
    args.formats.apply(&mut engine)?;
    engine.enter_phase(Phase::Generate)?;
    let warm_up = GenerateJob { max_new_tokens: args.new_tokens.min(2), ..job.clone() };
    engine.generate(&warm_up, &mut |_| {})?;
    let stopwatch = start(profile.as_deref());
    let report = engine.generate(&job, &mut |_| {})?;
    let spent = stopwatch.spent();
    let decoded = report.new_tokens.saturating_sub(batch as u64) as f64;
    let figures = json!({
        "bench": "generate", "batch": batch, "samples_per_prompt": samples, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "dtype": args.formats.dtype, "cache_dtype": args.formats.cache_dtype,
        "weight_bytes": engine.packed_bytes(), "cache_bytes_per_token": engine.cache_bytes_per_token(),
        "tokens_per_second": report.new_tokens as f64 / spent.wall_seconds,
        "prefill_tokens_per_second": report.prompt_tokens as f64 / report.prefill_seconds.max(1e-9),
        "decode_tokens_per_second": decoded / (report.seconds - report.prefill_seconds).max(1e-9),
    });
    let shape = [batch / samples, samples, args.prompt_tokens, args.new_tokens];
    let cache_bytes = engine.cache_bytes_per_token().unwrap_or_default();
    let sampling = Sampling::new(shape, args.formats.dtype, cache_bytes);
    let mut outcome =
        with_spent(figures, &spent, &args.model, args.timing.threads, profile.as_deref());
    let seconds = sampling.seconds(&config, &outcome.machine);
    outcome.figures[LIMIT] = json!(sampling.new_tokens() / seconds);
    Ok(outcome)
}

/// Refuses rollouts in few bits that are promised to be exact.
fn require_one_promise(args: &BenchGrpoArgs) -> Result<()> {
    match args.exact && args.rollout_dtype != Dtype::F32 {
        true => Err(Fault::user(format!(
            "--rollout-dtype {} samples from other numbers than the trainer's, and --exact promises the same; add --exact \
             false, or sample in f32",
            args.rollout_dtype.name()
        ))),
        false => Ok(()),
    }
}

fn grpo(args: &BenchGrpoArgs) -> Result<Outcome> {
    let (config, source) = model(&args.model)?;
    let tokens_each = args.prompt_tokens.saturating_add(args.new_tokens);
    require_context(&config, tokens_each)?;
    require_room(args.prompts.saturating_mul(args.group), tokens_each)?;
    require_one_promise(args)?;
    let weights = match source {
        ModelSource::Folder(folder) => Some(folder),
        ModelSource::Fresh => None,
    };
    let budget = free_memory().map(|free| Bytes(share_for_arenas(free)));
    let profile = counting(args.timing.profile, args.timing.threads.count());
    let shape = [args.prompts, args.group, args.prompt_tokens, args.new_tokens];
    let sampling = Sampling::new(shape, args.rollout_dtype, cache_bytes_per_token(&config) as f64);
    let (threads, exact) = (args.timing.threads.count(), args.exact);
    // The budget is what is free: as in a run without one, nothing has to make room.
    let offload = Some(Vec::new());
    let engine = EngineConfig { threads, budget, exact, offload, ..EngineConfig::default() };
    let spill = spill_folder();
    let stopwatch = Stopwatch::start();
    let steps = bench_grpo(BenchRequest {
        model: config.clone(),
        weights,
        engine,
        settings: settings(args),
        prompt_tokens: args.prompt_tokens,
        equal_rewards: args.equal_rewards,
        steps: args.steps as u64,
        seed: 1,
        spill: spill.clone(),
        profile: profile.clone(),
    });
    // The device removes its own folder, unless the process does not wait for its end.
    let _ = std::fs::remove_dir(&spill);
    let steps = steps?;
    let spent = stopwatch.spent();
    let count = steps.len().max(1) as f64;
    let mean = |figure: fn(&BenchStep) -> f64| steps.iter().map(figure).sum::<f64>() / count;
    // The step in the middle: the first ones still make what the later ones find.
    let middle = |figure: fn(&BenchStep) -> u64| {
        let mut figures: Vec<u64> = steps.iter().map(figure).collect();
        figures.sort_unstable();
        figures.get(figures.len() / 2).copied().unwrap_or(0)
    };
    let figures = json!({
        "bench": "grpo", "prompts": args.prompts, "group": args.group, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "steps": args.steps, "dtype": "f32",
        "kl_weight": args.kl_weight, "equal_rewards": args.equal_rewards, "share_prompts": args.share_prompts,
        "exact": exact, "rollout_dtype": sampled_as(args.rollout_dtype, steps.last().map(|s| s.rollout_dtype)), "sampler_kl": mean(|s| s.sampler_kl),
        "importance_weight_mean": mean(|s| s.importance.map_or(1.0, |weights| weights.weight_mean)),
        "truncated_share": mean(|s| s.importance.map_or(0.0, |weights| weights.truncated_share)),
        "trained_share": mean(|s| s.trained_share), "logprob_gap_max": steps.iter().map(|s| s.logprob_gap_max).fold(0.0, f64::max),
        "seconds_per_step": mean(|s| s.seconds),
        "generate_seconds": mean(|s| s.generate_seconds),
        "score_seconds": mean(|s| s.score_seconds),
        "train_seconds": mean(|s| s.train_seconds),
        "tokens_per_second": mean(|s| s.new_tokens as f64) / mean(|s| s.seconds),
        "page_faults_per_step": middle(|s| s.page_faults),
        "heap_allocations_per_step": middle(|s| s.heap_allocations),
    });
    let mut outcome =
        with_spent(figures, &spent, &args.model, args.timing.threads, profile.as_deref());
    let (trained, references) = (mean(|s| s.trained_share), usize::from(args.kl_weight > 0.0));
    let seconds = limit::alignment(&config, &sampling, trained, references, &outcome.machine);
    outcome.figures[LIMIT] = json!(sampling.new_tokens() / seconds);
    let useful = (mean(|s| s.useful_flops), mean(|s| s.seconds));
    outcome.figures["rfu"] =
        json!(useful_share(useful.0, useful.1, &Machines::one(outcome.machine.clone())));
    Ok(outcome)
}

/// One update per batch, with a KL term, as the quickstart's stages have it.
fn settings(args: &BenchGrpoArgs) -> GrpoStage {
    GrpoStage {
        data: "random".to_string(),
        steps: args.steps as u64,
        prompts: args.prompts,
        group_size: args.group,
        max_new_tokens: args.new_tokens,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        clip: 0.2,
        kl_weight: args.kl_weight,
        updates: 1,
        ratio_level: RatioLevel::Token,
        length_norm: LengthNorm::PerOutput,
        deviation: Deviation::Population,
        deviation_epsilon: 1e-4,
        reward: Vec::new(),
        after: None,
        micro_batch: 0,
        share_prompts: args.share_prompts,
        rollout_dtype: args.rollout_dtype,
        max_staleness: 0,
        importance_limit: None,
        optimizer: OptimizerConfig { learning_rate: 1e-6, ..OptimizerConfig::default() },
    }
}
