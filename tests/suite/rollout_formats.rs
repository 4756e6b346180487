//! Rollouts sampled from weights in few bits: what they hold, weigh and teach, and what stays in f32.

use crate::engine::{held, job, settings, stage};
use crate::runs::{
    check_each_step_once, check_refused, check_says, done, events, rehearsal, smoke, smoke_with,
    steps, weights,
};
use crate::training::saved;
use rehearsal::cluster::Team;
use rehearsal::config::engine::Prefill;
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::{OptimizerConfig, Stage};
use rehearsal::config::{Dtype, EngineConfig, Offload, RunConfig, load_model};
use rehearsal::data::example::Prompt;
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use rehearsal::plan::device_memory;
use rehearsal::rl::grpo::GrpoSettings;
use rehearsal::rl::rollout::{Group, ScoredGroup};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// The quickstart's model, wide enough that bits outweigh scales.
fn ready(folder: &TempDir, learning_rate: f64) -> HybridEngine {
    let model =
        load_model(&Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/quickstart.json"));
    let mut engine = HybridEngine::new(EngineSetup {
        model: model.unwrap(),
        engine: EngineConfig {
            threads: 2,
            offload: Some(Offload::ALL.to_vec()),
            ..EngineConfig::default()
        },
        seed: 1,
        spill: folder.path().join("spill"),
        team: Team::alone(),
    })
    .unwrap();
    let optimizer = Some(OptimizerConfig { learning_rate, ..OptimizerConfig::default() });
    engine.prepare(&PrepareStage { optimizer, balance: Balance::NONE, ..stage(None) }).unwrap();
    engine
}

/// True if this processor multiplies integers, and else says that the test was left out.
fn has_integers(engine: &mut HybridEngine) -> bool {
    let found = engine.enter_generate(Dtype::Int8).unwrap().sampled_as == Some(Dtype::Int8);
    if !found {
        println!("left out: no instructions for products of integers here");
    }
    found
}

fn sampled(engine: &mut HybridEngine, dtype: Dtype, version: u64) -> Vec<TokenGroup> {
    assert_eq!(engine.enter_generate(dtype).unwrap().sampled_as, Some(dtype));
    let mut groups = Vec::new();
    let job = GenerateJob { max_new_tokens: 12, stop_tokens: Vec::new(), ..job(version) };
    let job = GenerateJob { step: version, ..job };
    let requests = job.requests.into_iter().map(|r| GenerateRequest { samples: 8, ..r }).collect();
    engine.generate(&GenerateJob { requests, ..job }, &mut |group| groups.push(group)).unwrap();
    groups.sort_by_key(|group| group.slot);
    groups
}

/// What a reply is worth: the share of its tokens in the lower half of the vocabulary.
fn worth(tokens: &[u32]) -> f64 {
    tokens.iter().filter(|token| **token < 256).count() as f64 / tokens.len() as f64
}

/// The groups with their advantages, and the mean reward.
fn scored(groups: Vec<TokenGroup>) -> (Vec<ScoredGroup>, f64) {
    let mut total = 0.0;
    let mut scored = |group: TokenGroup| {
        let rewards: Vec<f64> = group.rollouts.iter().map(|r| worth(&r.tokens)).collect();
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        total += mean;
        let tokens = job(0).requests[group.slot as usize].tokens.clone();
        let TokenGroup { slot, policy_version, rollouts } = group;
        let prompt = Prompt { index: slot.into(), text: String::new(), tokens, answer: None };
        ScoredGroup {
            components: vec![vec![Some(0.0)]; rewards.len()],
            advantages: rewards.iter().map(|reward| (reward - mean) / 0.15).collect(),
            rewards,
            reference: Vec::new(),
            group: Group { slot, prompt: prompt.into(), policy_version, rollouts: rollouts.into() },
        }
    };
    let groups: Vec<ScoredGroup> = groups.into_iter().map(&mut scored).collect();
    let count = groups.len() as f64;
    (groups, total / count)
}

fn update(engine: &mut HybridEngine, groups: Vec<ScoredGroup>, limit: Option<f64>) -> StepReport {
    engine.enter_phase(Phase::Train).unwrap();
    let settings = GrpoSettings { importance_limit: limit, ..settings() };
    let job = TrainJob::Grpo { groups, settings, micro_batch: 0, share_prompts: true };
    engine.train(&job).unwrap()
}

#[test]
fn rollouts_in_few_bits_hold_fewer_bytes_and_leave_an_eval_the_trainers_weights() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder, 1e-3);
    let full = sampled(&mut engine, Dtype::F32, 0);
    let packed = |engine: &HybridEngine| held(&engine.holdings(), "/packed");
    let bytes = packed(&engine);
    let integers = has_integers(&mut engine);
    for dtype in Dtype::ALL.into_iter().filter(|dtype| *dtype != Dtype::F32) {
        if dtype == Dtype::Int8 && !integers {
            continue;
        }
        let few = sampled(&mut engine, dtype, 0);
        // Attention's inner products stay f32 in int8; scales fill pages.
        let share = packed(&engine) as f64 / bytes as f64;
        let most = if dtype == Dtype::Bf16 { 0.53 } else { 0.55 };
        assert!(share > 0.2 && share < most, "{dtype:?}: {share}");
        assert_ne!(few[0].rollouts[0].logprobs, full[0].rollouts[0].logprobs, "{dtype:?}");
        // An eval in between, without a phase between.
        let eval = sampled(&mut engine, Dtype::F32, 0);
        assert_eq!(packed(&engine), bytes);
        assert!(eval == full, "{dtype:?}: an eval is sampled from f32");
        assert!(sampled(&mut engine, dtype, 0) == few, "{dtype:?}: the same rollouts again");
    }
}

/// The quickstart's last stage alone, with rollouts of this type and without evals, which are sampled from f32.
fn aligned_in(dtype: Dtype) -> RunConfig {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml");
    let set = format!("stage.align.rollout_dtype=\"{}\"", dtype.name());
    let mut config =
        RunConfig::load(&file, &["engine.exact=false".to_string(), set]).unwrap().config;
    let align = config.stages.pop().unwrap();
    config.stages = vec![Stage { eval: Vec::new(), ..align }];
    config
}

#[test]
fn the_plan_of_a_stage_counts_what_its_rollouts_are_packed_in() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder, 1e-3);
    engine.prepare(&PrepareStage { prefill: Prefill::ByCost, ..stage(None) }).unwrap();
    for dtype in Dtype::ALL {
        if engine.enter_generate(dtype).unwrap().sampled_as != Some(dtype) {
            continue;
        }
        let held = held(&engine.holdings(), "policy/packed") as f64;
        let config = aligned_in(dtype);
        let plan = device_memory(&config, std::slice::from_ref(&config.model), 1).unwrap();
        let planned = plan[0].memory.stages[0].phases["generate"]["policy/packed"] as f64;
        // A processor without instructions for integers samples from f32 in place of int8, and is planned for.
        let is_planned = if dtype == Dtype::Int8 { held < planned } else { held == planned };
        assert!(is_planned, "{dtype:?}: {held} of {planned}");
    }
}

#[test]
fn a_stamp_is_refused_in_any_format() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder, 1e-3);
    for dtype in [Dtype::Int8, Dtype::Bf16] {
        engine.enter_generate(dtype).unwrap();
        assert!(engine.generate(&job(7), &mut |_| {}).is_err(), "{dtype:?}");
    }
    let (groups, _) = scored(sampled(&mut engine, Dtype::Bf16, 0));
    assert_eq!(update(&mut engine, groups, Some(2.0)).policy_version, 1);
    engine.enter_generate(Dtype::Bf16).unwrap();
    let error = engine.generate(&job(0), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("version"), "{error}");
    sampled(&mut engine, Dtype::Bf16, 1);
}

#[test]
fn the_gap_of_int8_rollouts_is_told_and_their_weights_enter_the_gradient() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder, 1e-3);
    if !has_integers(&mut engine) {
        return;
    }
    let (groups, _) = scored(sampled(&mut engine, Dtype::Int8, 0));
    let after = |limit: Option<f64>| {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder, 1e-3);
        let report = update(&mut engine, groups.clone(), limit);
        (report.grpo.unwrap(), saved(&mut engine))
    };
    let (plain, unweighted) = after(None);
    assert_eq!(plain.importance, None);
    let (grpo, weighted) = after(Some(2.0));
    assert!(grpo.logprob_gap_max > 1e-5 && grpo.logprob_gap_max < 0.2, "{grpo:?}");
    assert!(grpo.sampler_kl > 1e-9 && grpo.sampler_kl < 1e-3, "{grpo:?}");
    assert_eq!((grpo.logprob_gap_max, grpo.sampler_kl), (plain.logprob_gap_max, plain.sampler_kl));
    let importance = grpo.importance.unwrap();
    assert!((importance.weight_mean - 1.0).abs() < 0.01, "{importance:?}");
    assert_eq!(importance.truncated_share, 0.0, "no token is twice as likely");
    assert_eq!(grpo.clip_share, 0.0, "the ratio to the trainer's own is 1");
    // A weight that no limit cuts has the gradient of a ratio to the sampler that no clip cuts.
    assert!(weighted == unweighted, "weights enter the gradient");
    let (cut, all_cut) = after(Some(1.0));
    let share = cut.importance.unwrap().truncated_share;
    assert!(share > 0.2 && share < 0.8, "about half of the weights are above 1: {share}");
    assert!(cut.importance.unwrap().weight_mean < 1.0 && all_cut != weighted);
    // Rollouts of the trainer's own numbers weigh 1, to the bit.
    let (own, _) = scored(sampled(&mut engine, Dtype::F32, 0));
    let step = |limit| {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder, 1e-3);
        update(&mut engine, own.clone(), limit);
        saved(&mut engine)
    };
    assert!(step(Some(2.0)) == step(None));
}

#[test]
fn int8_rollouts_teach_what_f32_rollouts_teach() {
    let learned = |dtype: Dtype| {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder, 3e-3);
        if !has_integers(&mut engine) {
            return None;
        }
        let limit = (dtype != Dtype::F32).then_some(2.0);
        let mut rewards = Vec::new();
        for version in 0..16 {
            let (groups, reward) = scored(sampled(&mut engine, dtype, version));
            rewards.push(reward);
            let report = update(&mut engine, groups, limit);
            let kl = report.grpo.unwrap().sampler_kl;
            assert!(kl < 1e-3, "{dtype:?}, step {version}: KL {kl}");
        }
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        Some((mean(&rewards[..3]), mean(&rewards[13..])))
    };
    let (Some(full), Some(few)) = (learned(Dtype::F32), learned(Dtype::Int8)) else { return };
    for (before, after) in [full, few] {
        assert!(before < 0.62 && after > before + 0.2, "{before} {after}");
    }
    assert!((full.1 - few.1).abs() < 0.15, "{full:?} {few:?}");
}

const INT8: [&str; 2] = ["engine.exact=false", "stage.align.rollout_dtype=int8"];

fn grpo_steps(run: &Path) -> Vec<Value> {
    let mut steps = steps(run);
    steps.retain(|step| step["kind"] == "grpo");
    steps
}

fn with(mut command: Command, variable: &str, value: &str) -> Command {
    command.env(variable, value);
    command
}

#[test]
fn a_run_with_int8_rollouts_is_the_same_with_any_threads_instructions_and_after_a_kill() {
    let folder = TempDir::new().unwrap();
    let place = |name: &str| folder.path().join(name);
    let whole = place("whole");
    done(smoke_with(&whole, &INT8));
    let lines = grpo_steps(&whole);
    if lines[0]["rollout_dtype"] == "f32" {
        return println!("left out: no instructions for products of integers here");
    }
    for step in &lines {
        assert_eq!(step["rollout_dtype"], "int8");
        let number = |key: &str| step[key].as_f64().unwrap_or_else(|| panic!("{key}"));
        assert!(number("logprob_gap_max") > 0.0 && number("logprob_gap_mean") > 0.0);
        assert!(number("sampler_kl") > 0.0 && number("sampler_kl") < 1e-3);
        assert!((number("importance_weight_mean") - 1.0).abs() < 0.05);
        assert!(number("truncated_share") < 0.05 && number("clip_share") == 0.0);
    }
    assert!(events(&whole, "alarm").is_empty() && events(&whole, "fallback").is_empty());
    let one = place("one-thread");
    let mut command = smoke_with(&one, &INT8);
    command.args(["--threads", "1"]);
    done(with(command, "REHEARSAL_ISA", "avx2"));
    assert!(weights(&one) == weights(&whole), "threads or instructions change a byte");
    // After the 16 replies of an earlier eval and the 4 groups of a step.
    let cut = place("cut");
    let witness = place("witness");
    let killed = with(smoke_with(&cut, &INT8), "REHEARSAL_FAIL_AT", "mid-generation:22");
    let output = with(killed, "REHEARSAL_FAIL_WITNESS", witness.to_str().unwrap()).output();
    assert!(!output.unwrap().status.success() && witness.exists(), "the kill never came");
    assert!(!grpo_steps(&cut).is_empty() && grpo_steps(&cut).len() < lines.len());
    let mut command = smoke(&cut, &["--resume"]);
    INT8.iter().for_each(|set| {
        command.args(["--set", set]);
    });
    done(command);
    assert!(weights(&cut) == weights(&whole), "other weights after a resume");
    check_each_step_once(&cut, &whole);
}

#[test]
fn without_instructions_for_integers_rollouts_are_sampled_in_f32_and_the_journal_says_so() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    done(with(smoke_with(&out, &INT8), "REHEARSAL_ISA", "portable"));
    let lines = grpo_steps(&out);
    assert!(lines.iter().all(|step| step["rollout_dtype"] == "f32"));
    assert!(lines.iter().all(|step| step["sampler_kl"].as_f64().unwrap() < 1e-9));
    let told = events(&out, "fallback");
    assert_eq!(told.len(), 1, "once a stage");
    let reason = told[0]["reason"].as_str().unwrap();
    assert!(reason.contains("int8") && reason.contains("f32"), "{reason}");
    let model = out.join("export");
    let bench = |exact: &str| {
        let mut command = rehearsal(&["bench", "grpo", "--json", "--steps", "1", "--exact", exact]);
        command.args(["--rollout-dtype", "int8", "--model"]).arg(&model);
        command
    };
    check_refused(bench("true"), 2, &["--rollout-dtype int8", "--exact false"]);
    let command = bench("false");
    let output = done(with(command, "REHEARSAL_ISA", "portable"));
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(figures["rollout_dtype"], "f32");
    check_says(&output, &["no instructions for int8", "sampled in f32"]);
}
