//! Memory: a budget is kept by the whole process, the ledger equals what the process holds, and what
//! is offloaded leaves memory and comes back bit for bit.
//!
//! The limit of a process is RLIMIT_DATA (`ulimit -d`): it counts private writable mappings, which
//! is what arenas, heap and stacks are made of. RLIMIT_AS would also count the program's own code
//! and the 64 MiB of addresses that the allocator reserves per thread without touching them; a
//! limit on resident memory (RLIMIT_RSS) is not enforced by Linux; a cgroup needs root.
//!
//! Measurements of the process's own memory run in a process of their own: this test binary again,
//! with one test and a variable that says so.

use crate::runs::{check_refused, done, finished, rehearsal, smoke_with, steps, weights};
use crate::tiny::config;
use rehearsal::cluster::Team;
use rehearsal::config::{EngineConfig, ModelConfig, Offload};
use rehearsal::data::example::{Batch, Sequence};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// What a process needs beside its arenas: 16 MiB of stack of the device's thread, 2 MiB for each
/// of the other threads (two of kernels, two of the tokenizer's, the actors' arbiter, the blocking
/// pool of tokio), and the heap: the data sets of the smoke run, its tokenizer, journal and messages
/// (about 12 MiB).
const BASE: u64 = 48 * MIB;

/// The budget of the tests below.
const BUDGET: u64 = 112 * MIB;

/// A first stage whose activations take most of [`BUDGET`].
fn large_batches(out: &Path) -> Command {
    let budget = format!("engine.budget={BUDGET}");
    let set = [
        &*budget,
        "stage.base.steps=2",
        "stage.base.optimizer.warmup_steps=1",
        "stage.base.batch=480",
        "stage.base.batch_start=480",
        "stage.base.micro_batch=480",
    ];
    let mut command = smoke_with(out, &set);
    // The tokenizer's library starts a thread for every core if it is not told otherwise.
    command.args(["--threads", "2"]).env("RAYON_NUM_THREADS", "2");
    command
}

/// The same command under a limit on private writable memory.
fn limited(command: &Command, bytes: u64) -> Command {
    let mut limited = Command::new("sh");
    limited.arg("-c").arg(format!("ulimit -d {} && exec \"$0\" \"$@\"", bytes / 1024));
    limited.arg(command.get_program()).args(command.get_args());
    limited.current_dir(command.get_current_dir().unwrap());
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited
}

#[test]
fn a_run_keeps_its_budget_under_a_limit_of_the_system() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    done(limited(&large_batches(&out), BUDGET + BASE));
    let high_water = |step: &serde_json::Value| step["memory_high_water"].as_u64().unwrap();
    let peak = steps(&out).iter().map(high_water).max().unwrap();
    assert!(peak <= BUDGET, "{peak} bytes in a budget of {BUDGET}");
    assert!(peak > BUDGET / 4 * 3, "{peak} bytes: the run must need most of its budget");

    // Where the system gives less, steps go through in smaller parts, to the same bits.
    let tight = folder.path().join("tight");
    done(limited(&large_batches(&tight), BUDGET / 2 + BASE));
    let at_once = |run: &Path| steps(run)[0]["micro_batch"].as_u64().unwrap();
    assert!(at_once(&tight) < at_once(&out), "the limit is real");
    assert!(weights(&tight) == weights(&out));
}

#[test]
fn a_budget_makes_parts_smaller_and_changes_no_bit() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("tight");
    let budget = format!("engine.budget={}", 5 * MIB / 2);
    done(smoke_with(&out, &[&budget]));
    let parts = |run: &Path| -> Vec<u64> {
        steps(run).iter().map(|step| step["micro_batch"].as_u64().unwrap()).collect()
    };
    assert!(parts(&out).iter().zip(parts(finished())).any(|(few, all)| *few < all));
    let high_water = |step: &serde_json::Value| step["memory_high_water"].as_u64().unwrap();
    assert!(steps(&out).iter().all(|step| high_water(step) <= 5 * MIB / 2));
    assert!(weights(&out) == weights(finished()));
}

/// A model whose weights outweigh its activations: many experts, two of which see a token.
const HEAVY: [&str; 6] = [
    "model.n_routed_experts=128",
    "model.moe_intermediate_size=128",
    "stage.base.steps=4",
    "stage.helpful.micro_batch=2",
    "stage.safety.micro_batch=2",
    "stage.align.micro_batch=4",
];

/// `memory` of `check --json`: the most that is certain to be held in a phase, activations apart.
fn certain_bytes(assignments: &[&str]) -> u64 {
    let mut check = rehearsal(&["check", "configs/smoke.toml", "--plan-only", "--json"]);
    assignments.iter().for_each(|assignment| {
        check.args(["--set", assignment]);
    });
    let report: serde_json::Value = serde_json::from_slice(&done(check).stdout).unwrap();
    let phases = report["memory"].as_object().unwrap().values();
    let certain = |owners: &serde_json::Value| {
        let owners = owners.as_object().unwrap().iter();
        let owners = owners.filter(|(owner, _)| !owner.ends_with("/activations"));
        owners.map(|(_, bytes)| bytes.as_u64().unwrap()).sum::<u64>()
    };
    phases.map(certain).max().unwrap()
}

#[test]
fn a_budget_that_is_too_small_without_offload_is_refused_and_completes_with_it() {
    let folder = TempDir::new().unwrap();
    let without = ["engine.offload=[]"];
    let resident = certain_bytes(&[&HEAVY[..], &without].concat());
    assert_eq!(certain_bytes(&HEAVY), resident, "without a budget nothing has to leave");
    let offloaded = certain_bytes(&[&HEAVY[..], &["engine.budget=1 GiB"]].concat());
    let budget = format!("engine.budget={}", resident - MIB);
    assert!(resident > offloaded + 8 * MIB, "{resident} against {offloaded} bytes");
    let settings = [&HEAVY[..], &[&*budget]].concat();

    let refused = folder.path().join("refused");
    check_refused(
        smoke_with(&refused, &[&settings[..], &without].concat()),
        4,
        &[
            "engine.budget leaves it",
            "leave engine.offload out",
            "policy/moments",
            "reward helpful/weights",
        ],
    );
    assert!(!refused.exists(), "a refused run writes nothing");

    let out = folder.path().join("run");
    let mut offloading = smoke_with(&out, &settings);
    // Each thread has scratch of its own.
    offloading.args(["--threads", "2"]);
    done(offloading);
    assert!(!weights(&out).is_empty());
}

/// Runs a test of this binary alone in a process of its own. True in that process.
pub fn is_alone(test: &str) -> bool {
    const ALONE: &str = "REHEARSAL_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--test-threads", "1", "--nocapture"]).env(ALONE, "1");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    println!("{said}");
    false
}

/// Private memory of this process.
fn private_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = |line: &str| {
        let rest =
            line.strip_prefix("Private_Clean:").or_else(|| line.strip_prefix("Private_Dirty:"))?;
        rest.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    1024 * text.lines().filter_map(line).sum::<u64>()
}

/// 7.8 million parameters: weights of 31 MB, so that what the process does beside is noise.
fn large() -> ModelConfig {
    let mut config = config();
    (config.vocab_size, config.hidden_size) = (4096, 128);
    (config.n_routed_experts, config.moe_intermediate_size) = (32, 256);
    config
}

fn large_engine(spill: PathBuf) -> HybridEngine {
    let offload = Some(Offload::ALL.to_vec());
    let engine = EngineConfig { threads: 2, offload, ..EngineConfig::default() };
    HybridEngine::new(EngineSetup { model: large(), engine, seed: 1, spill, team: Team::alone() })
        .unwrap()
}

fn stage(policy: ModelSource, reference: Option<ModelSource>) -> PrepareStage {
    PrepareStage { policy, ..crate::engine::stage(reference) }
}

fn train(engine: &mut HybridEngine) {
    let document = |d: u32| Sequence::all_targets((0..24).map(|i| (i * 5 + d) % 4096).collect());
    let batch = Batch::Documents((0..8).map(document).collect());
    engine.train(&TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None }).unwrap();
}

fn score(engine: &mut HybridEngine, role: Role) -> Vec<SequenceScore> {
    let sequences = vec![(0..24).collect()];
    engine.score(&ScoreJob { role, sequences, temperature: 1.0, first: vec![1] }).unwrap()
}

#[test]
fn the_ledger_changes_as_the_private_memory_of_the_process_does() {
    if !is_alone("budget::the_ledger_changes_as_the_private_memory_of_the_process_does") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut engine = large_engine(folder.path().join("spill"));
    engine.prepare(&stage(ModelSource::Fresh, Some(ModelSource::Fresh))).unwrap();
    let ledger = |engine: &HybridEngine| engine.holdings().held.values().sum::<u64>();
    let mut before = (ledger(&engine), private_bytes());
    for phase in [Phase::Train, Phase::Generate, Phase::Score, Phase::Train, Phase::Idle] {
        engine.enter_phase(phase).unwrap();
        let after = (ledger(&engine), private_bytes());
        let counted = after.0 as f64 - before.0 as f64;
        let real = after.1 as f64 - before.1 as f64;
        println!("{phase:?}: ledger {:+.2} MB, process {:+.2} MB", counted / 1e6, real / 1e6);
        assert!(counted.abs() > 20e6, "{phase:?} changes too little to be measured: {counted}");
        assert!((real - counted).abs() <= 0.05 * counted.abs(), "{phase:?}: {counted} {real}");
        // What the phase's work leaves behind belongs to the next change.
        match phase {
            Phase::Train => train(&mut engine),
            Phase::Score => drop(score(&mut engine, Role::Reference)),
            Phase::Generate | Phase::Idle => {}
        }
        before = (ledger(&engine), private_bytes());
    }
}

#[test]
fn what_is_offloaded_leaves_memory_and_comes_back_bit_for_bit() {
    if !is_alone("budget::what_is_offloaded_leaves_memory_and_comes_back_bit_for_bit") {
        return;
    }
    let folder = TempDir::new().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    for place in [&first, &second] {
        std::fs::create_dir(place).unwrap();
    }
    let mut engine = large_engine(folder.path().join("spill"));
    engine.prepare(&stage(ModelSource::Fresh, None)).unwrap();
    engine.enter_phase(Phase::Train).unwrap();
    train(&mut engine);
    let saved = engine.save(&first, true).unwrap();

    // A restored optimizer is resident; Score holds nothing of its own before its first job, so
    // that all memory that goes is the optimizer's.
    let source = ModelSource::Folder(first.clone());
    engine.prepare(&stage(source, None)).unwrap();
    engine.restore(&first, &saved).unwrap();
    let before = private_bytes();
    let report = engine.enter_phase(Phase::Score).unwrap();
    let fell = before as f64 - private_bytes() as f64;
    println!("offloaded {} bytes, the process's memory fell by {fell}", report.bytes_out);
    assert!(report.bytes_out > 50 * MIB, "the moments of all weights: {}", report.bytes_out);
    assert!(fell >= 0.9 * report.bytes_out as f64, "{fell} of {} bytes", report.bytes_out);

    let back = engine.enter_phase(Phase::Train).unwrap();
    assert_eq!(back.bytes_in, report.bytes_out);
    engine.save(&second, true).unwrap();
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let hash = |folder: &Path| blake3::hash(&std::fs::read(folder.join(file)).unwrap());
        assert_eq!(hash(&first), hash(&second), "{file}");
    }
}

#[test]
fn a_reference_that_was_offloaded_answers_as_the_policy_that_it_equals() {
    let folder = TempDir::new().unwrap();
    let mut engine = large_engine(folder.path().join("spill"));
    engine.prepare(&stage(ModelSource::Fresh, Some(ModelSource::Fresh))).unwrap();
    for _ in 0..2 {
        engine.enter_phase(Phase::Score).unwrap();
        assert_eq!(score(&mut engine, Role::Policy), score(&mut engine, Role::Reference));
        let weights = engine.holdings().held["reference/weights"];
        let report = engine.enter_phase(Phase::Idle).unwrap();
        assert!(!report.held.contains_key("reference/weights"), "{:?}", report.held);
        assert!(weights > 0 && report.bytes_out == 0, "it has a copy and is not written again");
    }
}
