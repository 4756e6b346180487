//! Routing in training: what full devices drop, what routers tell, what balance is for, and a run of all of it.

use crate::engine::stage;
use crate::runs::{contents, done, rehearsal, steps, weights};
use crate::tiny::config_grouped;
use crate::training::saved;
use rehearsal::cluster::Team;
use rehearsal::config::EngineConfig;
use rehearsal::config::engine::AttentionForm::Expanded;
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::OptimizerConfig;
use rehearsal::data::example::{Batch, Sequence};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use rehearsal_kernels::random::{self, Stream};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The paper's weights (DeepSeek-V2, section 3.1.2).
const PAPER: Balance = Balance { expert: 0.003, device: 0.05, communication: 0.02 };

fn engine_of(folder: &TempDir, threads: usize) -> HybridEngine {
    let engine = EngineConfig { threads, ..EngineConfig::default() };
    let spill = folder.path().join("spill");
    HybridEngine::new(EngineSetup {
        model: config_grouped(),
        engine,
        seed: 1,
        spill,
        team: Team::alone(),
    })
    .unwrap()
}

fn plan(balance: Balance, learning_rate: f64) -> PrepareStage {
    let optimizer = Some(OptimizerConfig { learning_rate, ..OptimizerConfig::default() });
    PrepareStage { balance, form: Expanded, optimizer, ..stage(None) }
}

/// Texts of unlike lengths, in which few tokens are frequent.
fn texts(step: u64, count: u64) -> Vec<Sequence> {
    let draw = |d, i, bound| random::below(8, Stream::Data, [step, d, i, 0], bound);
    let document = |d: u64| {
        let token = |i: u64| draw(d, i, 1 + draw(d, i + 100, 28)) as u32;
        Sequence::all_targets((1..4 + draw(d, 0, 28)).map(token).collect())
    };
    (0..count).map(document).collect()
}

fn train_job(step: u64, micro_batch: usize, capacity_factor: Option<f64>) -> TrainJob {
    let batch = texts(step, 7);
    let dropping = capacity_factor.map(|capacity_factor| Dropping {
        capacity_factor,
        protected: (0..batch.len()).map(|i| i == 2).collect(),
    });
    TrainJob::Batch { batch: Batch::Documents(batch), share: 0.0, micro_batch, dropping }
}

#[test]
fn the_micro_batch_and_threads_change_nothing_of_what_is_dropped_balanced_and_told() {
    let outcome = |threads: usize, micro_batch: usize| {
        let folder = TempDir::new().unwrap();
        let mut engine = engine_of(&folder, threads);
        engine.prepare(&plan(PAPER, 1e-3)).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let told: Vec<_> = (0..3)
            .map(|step| {
                let report = engine.train(&train_job(step, micro_batch, Some(1.0))).unwrap();
                (report.routing, report.balance_loss.to_bits())
            })
            .collect();
        (told, saved(&mut engine))
    };
    let whole = outcome(1, 0);
    for (routing, _) in &whole.0 {
        assert_eq!(routing.len(), 2, "two MoE layers");
        for layer in routing {
            let (devices, drops) = (layer.devices.unwrap(), layer.drops.unwrap());
            assert!((1.0..=2.0).contains(&devices.per_token), "{devices:?}");
            assert!(devices.max_over_mean >= 1.0 && layer.expert_cv > 0.0, "{layer:?}");
            assert!(drops.dropped > 0.0 && drops.protected > 0.0, "{drops:?}");
            assert!((layer.expert_load.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
    for (threads, micro_batch) in [(2, 0), (1, 1), (2, 2), (1, 3), (2, 5)] {
        assert!(outcome(threads, micro_batch) == whole, "{threads} threads, {micro_batch} at once");
    }
}

#[test]
fn measuring_drops_nothing_and_does_not_depend_on_what_is_measured_beside() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine_of(&folder, 2);
    engine.prepare(&plan(PAPER, 1e-3)).unwrap();
    let mut measured = |sequences: Vec<Vec<u32>>| {
        engine.enter_phase(Phase::Score).unwrap();
        let first = vec![1; sequences.len()];
        let job = ScoreJob { role: Role::Policy, sequences, temperature: 1.0, first };
        let logprobs = |score: SequenceScore| match score {
            SequenceScore::Logprobs(logprobs) => logprobs,
            SequenceScore::Reward(_) => panic!("a policy gives log-probabilities"),
        };
        engine.score(&job).unwrap().into_iter().map(logprobs).collect::<Vec<_>>()
    };
    let all: Vec<Vec<u32>> = texts(0, 7).into_iter().map(|text| text.tokens).collect();
    let together = measured(all.clone());
    for (alone, together) in all.into_iter().zip(&together) {
        assert_eq!(measured(vec![alone])[0], *together);
    }
    let tokens = together.concat();
    let mean = -tokens.iter().map(|l| f64::from(*l)).sum::<f64>() / tokens.len() as f64;
    // The loss of a step is that of the weights before it.
    let mut loss = |factor| {
        engine.prepare(&plan(PAPER, 1e-3)).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let report = engine.train(&train_job(0, 0, factor)).unwrap();
        assert_eq!(report.routing[0].drops.is_some(), factor.is_some());
        report.loss
    };
    let (whole, dropped) = (loss(None), loss(Some(1.0)));
    assert!((whole - mean).abs() < 1e-5, "measured {mean}, trained without drops {whole}");
    assert!((dropped - mean).abs() > 1e-3, "trained with drops {dropped}, measured {mean}");
    let roomy = loss(Some(4.0));
    assert!((roomy - mean).abs() < 1e-5, "a device with room for all drops nothing: {roomy}");
}

/// Mean variation of the experts' load over the last steps, over layers.
fn variation(balance: Balance) -> f64 {
    let folder = TempDir::new().unwrap();
    let mut engine = engine_of(&folder, 1);
    engine.prepare(&plan(balance, 0.01)).unwrap();
    engine.enter_phase(Phase::Train).unwrap();
    let mut seen = Vec::new();
    for step in 0..80 {
        let report = engine.train(&train_job(step, 0, None)).unwrap();
        if step >= 60 {
            seen.extend(report.routing.iter().map(|layer| layer.expert_cv));
        }
    }
    seen.iter().sum::<f64>() / seen.len() as f64
}

#[test]
fn experts_are_used_less_evenly_without_the_balance_losses() {
    let (without, with) = (variation(Balance::NONE), variation(PAPER));
    println!("variation of the experts' load: {without:.3} without, {with:.3} with");
    assert!(without > 1.1 * with, "{without} without, {with} with");
}

const RUN: &str = r#"seed = 5
[model]
config = "MODEL"
n_routed_experts = 8
num_experts_per_tok = 3
topk_method = "group_limited_greedy"
n_group = 4
topk_group = 2
[tokenizer]
vocab_size = 288
train_on = ["text"]
[data.sets.text]
file = "text.jsonl"
schema = "text"
[checkpoint]
every_steps = 3
[[stage]]
name = "base"
kind = "pretrain"
data = [{ set = "text" }]
steps = 8
batch = 4
sequence = 48
capacity_factor = 1.0
balance = { expert = 0.003, device = 0.05, communication = 0.02 }
[[stage]]
name = "long"
kind = "long-context"
data = [{ set = "text" }]
steps = 2
batch = 2
sequence = 64
factor = 2
balance = { device = 0.05 }
"#;

fn run(folder: &Path, name: &str, extra: &[&str]) -> (PathBuf, Command) {
    let out = folder.join(name);
    let mut command = rehearsal(&["run"]);
    command.arg(folder.join("run.toml")).args(["--console", "off", "--out"]).arg(&out).args(extra);
    (out, command)
}

/// What the journal says of each step's routers.
fn told(run: &Path) -> Vec<Value> {
    let keys = ["stage", "step", "loss", "balance_loss", "expert_load", "routing", "dropped"];
    let pick = |step: &Value| keys.iter().map(|key| step[*key].clone()).collect();
    steps(run).iter().map(pick).collect()
}

#[test]
fn a_run_that_balances_devices_and_drops_is_the_same_in_parts_and_after_a_kill() {
    let folder = TempDir::new().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
    let toml = RUN.replace("MODEL", &model.display().to_string());
    std::fs::write(folder.path().join("run.toml"), toml).unwrap();
    let text = |i: u32| format!("{{\"text\": \"the {i} cats sat on {} mats\"}}\n", i * 7);
    std::fs::write(folder.path().join("text.jsonl"), (0..60).map(text).collect::<String>())
        .unwrap();
    let (whole, command) = run(folder.path(), "whole", &["--threads", "1"]);
    done(command);
    let (mut dropped, mut protected) = (0.0, 0.0);
    for step in steps(&whole) {
        let [layer] = step["routing"].as_array().unwrap().as_slice() else { panic!("{step}") };
        let number = |key: &str| layer[key].as_f64().unwrap();
        assert_eq!(step["expert_load"][0].as_array().unwrap().len(), 8);
        assert!((1.0..=2.0).contains(&number("devices_per_token")), "{layer}");
        assert!(number("device_load_max") >= 1.0 && number("expert_cv") > 0.0, "{layer}");
        // Near balance a loss is about its weight: that of devices reaches the device.
        assert!(step["balance_loss"].as_f64().unwrap() > 0.045, "{step}");
        if step["stage"] == "base" {
            assert_eq!(step["dropped"], layer["dropped"], "one MoE layer");
            dropped += number("dropped");
            protected += number("protected_overflow");
        } else {
            assert!(step["dropped"].is_null() && layer["dropped"].is_null(), "{step}");
        }
    }
    assert!(dropped > 0.0 && protected > 0.0, "{dropped} dropped, {protected} protected");

    let parts = ["--threads", "2", "--set", "stage.base.micro_batch=3"];
    let (parts, command) = run(folder.path(), "parts", &parts);
    done(command);
    check_equal(&parts, &whole);
    let (killed, mut command) = run(folder.path(), "killed", &[]);
    command.env("REHEARSAL_FAIL_AT", "mid-gradient:6");
    assert!(!command.output().unwrap().status.success());
    assert!(
        !steps(&killed).is_empty() && !contents(&killed).keys().any(|p| p.starts_with("export"))
    );
    done(run(folder.path(), "killed", &["--resume"]).1);
    check_equal(&killed, &whole);
}

fn check_equal(run: &Path, whole: &Path) {
    assert!(weights(run) == weights(whole), "{}: other weights", run.display());
    let by_step = |run: &Path| -> BTreeMap<String, Value> {
        told(run).into_iter().map(|t| (format!("{}{}", t[0], t[1]), t)).collect()
    };
    let (run, whole) = (by_step(run), by_step(whole));
    assert_eq!(run.len(), whole.len());
    for (step, told) in &run {
        // The loss alone is a sum of parts, and its last bits may differ.
        let (loss, wanted) = (told[2].as_f64().unwrap(), whole[step][2].as_f64().unwrap());
        assert!((loss - wanted).abs() < 1e-9, "{step}: {loss} for {wanted}");
        assert_eq!(told.as_array().unwrap()[3..], whole[step].as_array().unwrap()[3..], "{step}");
    }
}
