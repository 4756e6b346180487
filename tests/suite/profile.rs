//! `--profile`: it counts what a step does, changes nothing of it, and is told as a table and as JSON.

use crate::engine::{batch, job, stage};
use rehearsal::cluster::Team;
use rehearsal::config::engine::AttentionForm;
use rehearsal::config::{EngineConfig, ModelConfig, load_model};
use rehearsal::data::example::{Batch, Sequence};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use rehearsal::model::flops_per_token;
use rehearsal_kernels::profiled::Count;
use rehearsal_kernels::{Activity, Profile};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;

fn engine(model: ModelConfig, place: &TempDir, profile: Option<Arc<Profile>>) -> HybridEngine {
    let engine = EngineConfig { threads: 2, page_tokens: 4, ..EngineConfig::default() };
    let spill = place.path().join("spill");
    HybridEngine::profiled(
        EngineSetup { model, engine, seed: 1, spill, team: Team::alone() },
        profile,
    )
    .unwrap()
}

fn preset(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model").join(name)
}

/// Counts of all operations of the activities.
fn counted(profile: &Profile, activities: &[Activity]) -> Vec<(&'static str, Count)> {
    let found = profile.activities().into_iter();
    found.filter(|one| activities.contains(&one.activity)).flat_map(|one| one.operations).collect()
}

#[test]
fn a_step_has_the_flops_of_the_models_formula() {
    let (place, profile) = (TempDir::new().unwrap(), Arc::new(Profile::new(2)));
    let config = load_model(&preset("tiny.json")).unwrap();
    let mut engine = engine(config.clone(), &place, Some(profile.clone()));
    engine.prepare(&PrepareStage { form: AttentionForm::Expanded, ..stage(None) }).unwrap();
    engine.enter_phase(Phase::Train).unwrap();
    let (documents, length) = (3, 40);
    let document = |d: u32| Sequence::all_targets((0..length).map(|i| i * 7 + d).collect());
    let batch = Batch::Documents((0..documents).map(document).collect());
    profile.clear();
    engine.train(&TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None }).unwrap();
    // The formula counts products. A document's last token has no target and does not pass the head.
    let tokens = f64::from(documents * length);
    let head = 6.0 * (config.hidden_size * config.vocab_size) as f64 * f64::from(documents);
    let wanted = tokens * flops_per_token(&config, length as usize) - head;
    let operations = counted(&profile, &[Activity::Forward, Activity::Backward]);
    let products = operations
        .iter()
        .filter(|(name, count)| name.starts_with("mla_") || count.cost.shape != [0, 0]);
    let found: f64 = products.map(|(_, count)| count.cost.flops).sum();
    // It has norms among the weights too: 0.3 % here.
    assert!((found / wanted - 1.0).abs() < 0.005, "{found:e} {wanted:e} {}", found / wanted);
    // And what is made again is attention's scores alone: the head's probabilities are kept.
    let again = operations.iter().filter(|(_, count)| count.cost.recomputed > 0.0);
    let again: Vec<_> = again.map(|(name, _)| *name).collect();
    assert_eq!(again, ["mla_train_backward_input"]);
}

#[test]
fn counting_changes_no_bit_and_tells_every_activity() {
    let profile = Arc::new(Profile::new(2));
    let run = |profile: Option<Arc<Profile>>| {
        let (place, saved) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let mut engine = engine(crate::tiny::config(), &place, profile);
        engine.prepare(&stage(Some(ModelSource::Fresh))).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let version = engine.train(&batch()).unwrap().policy_version;
        engine.enter_phase(Phase::Generate).unwrap();
        let mut groups = Vec::new();
        engine.generate(&job(version), &mut |group| groups.push(group)).unwrap();
        engine.enter_phase(Phase::Score).unwrap();
        let job = ScoreJob {
            role: Role::Reference,
            sequences: vec![vec![1, 2, 3, 4, 5]],
            temperature: 1.0,
            first: vec![2],
        };
        let scores = engine.score(&job).unwrap();
        engine.save(saved.path(), true).unwrap();
        let read = |name: &str| std::fs::read(saved.path().join(name)).unwrap();
        let files =
            std::fs::read_dir(saved.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let files: BTreeSet<_> = files.map(|name| name.into_string().unwrap()).collect();
        assert!(files.len() > 2, "{files:?}");
        let bytes: Vec<_> = files.iter().map(|name| read(name)).collect();
        (groups, scores, files, bytes)
    };
    assert!(run(None) == run(Some(profile.clone())), "counting changed something");
    let told: Vec<_> = profile.activities().iter().map(|one| one.activity).collect();
    assert_eq!(told, Activity::ALL);
    for one in profile.activities() {
        assert!(one.seconds > 0.0 && one.between_seconds() > -1e-9, "{one:?}");
    }
    let names = |activity| -> BTreeSet<&str> {
        counted(&profile, &[activity]).into_iter().map(|(name, _)| name).collect()
    };
    // Each activity holds what it is for, and nothing of the others.
    for (activity, has, lacks) in [
        (Activity::Switch, "pack", "linear"),
        (Activity::Prefill, "mla_decode", "mla_train"),
        (Activity::Decode, "sample", "pack"),
        (Activity::Score, "head_logprob", "pack"),
        (Activity::Forward, "mla_train", "head_logprob_backward"),
        (Activity::Backward, "head_logprob_backward", "mla_train"),
        (Activity::Update, "adamw", "linear"),
    ] {
        let names = names(activity);
        assert!(names.contains(has) && !names.contains(lacks), "{activity:?}: {names:?}");
    }
    assert!(names(Activity::Outside).is_empty(), "{:?}", names(Activity::Outside));
}

fn bench(arguments: &[&str]) -> String {
    let model = preset("quickstart.json");
    let output = Command::new(env!("CARGO_BIN_EXE_rehearsal"))
        .arg("bench")
        .args(arguments)
        .arg("--model")
        .arg(model)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bench_tells_its_profile_in_80_columns_and_as_json() {
    let train = ["train", "--batch", "2", "--sequence", "16", "--steps", "2", "--profile"];
    let plain = bench(&train[..7]);
    assert!(!plain.contains("between operations") && plain.contains("\nread memory "));
    let plain: Value = serde_json::from_str(&bench(&[&train[..7], &["--json"]].concat())).unwrap();
    assert!(plain.get("profile").is_none() && plain["tokens_per_second"].is_f64());
    let generate =
        ["generate", "--batch", "2", "--prompt-tokens", "5", "--new-tokens", "3", "--profile"];
    let grpo = "grpo --prompts 1 --group 2 --prompt-tokens 4 --new-tokens 3 --steps 1 --profile";
    let grpo: Vec<&str> = grpo.split(' ').collect();
    for (arguments, activities) in [
        (&train[..], &["forward", "backward", "update"][..]),
        (&generate[..], &["prefill", "decode"][..]),
        (
            &grpo[..],
            &["load", "switch", "prefill", "decode", "score", "forward", "backward", "update"][..],
        ),
    ] {
        let text = bench(arguments);
        let table = text.split_once("\noperation ").expect("a table").1;
        assert!(text.contains("\nread memory ") && table.contains("  between operations "));
        let long = table.lines().find(|line| line.chars().count() > 80);
        assert_eq!(long, None);
        let json: Value = serde_json::from_str(&bench(&[arguments, &["--json"]].concat())).unwrap();
        if arguments[0] != "generate" {
            let counts = ["page_faults_per_step", "heap_allocations_per_step"];
            let counts = counts.map(|name| json[name].as_f64().unwrap());
            assert!(counts[0] >= 0.0 && counts[1] >= 1.0, "{counts:?}");
        }
        let profile = &json["profile"];
        let told: Vec<_> = profile["activities"].as_array().unwrap().iter().collect();
        let names: Vec<_> = told.iter().map(|one| one["activity"].as_str().unwrap()).collect();
        assert_eq!(names, activities);
        let number = |value: &Value| value.as_f64().unwrap();
        let mut shares = 0.0;
        for activity in told {
            let operations = activity["operations"].as_array().unwrap();
            let seconds: f64 = operations.iter().map(|one| number(&one["seconds"])).sum();
            let all = seconds + number(&activity["between_seconds"]);
            assert!((all - number(&activity["seconds"])).abs() < 1e-9, "{activity}");
            assert!(number(&activity["between_seconds"]) > -1e-9, "{activity}");
            shares += number(&activity["share"]);
            // A row of the table for each.
            for one in operations {
                let calls = one["calls"].as_u64().unwrap();
                assert!(calls > 0 && number(&one["roof_share"]) >= 0.0, "{one}");
                let start = one["operation"].as_str().unwrap().split("_backward").next().unwrap();
                let is_row = |line: &str| line.trim_start().starts_with(start);
                assert!(table.lines().any(is_row), "{one}");
            }
        }
        assert!((shares - 1.0).abs() < 1e-9);
    }
}

#[test]
fn the_seconds_of_a_profile_are_those_that_the_work_took() {
    let work = "train --batch 4 --sequence 64 --steps 4 --profile --json --threads";
    for (threads, clock, seconds) in
        [("1", "processor", "cpu_seconds"), ("2", "wall", "wall_seconds")]
    {
        let arguments: Vec<&str> = work.split(' ').chain([threads]).collect();
        let found: Value = serde_json::from_str(&bench(&arguments)).unwrap();
        let profile = &found["profile"];
        assert_eq!(profile["clock"], clock);
        let number = |value: &Value| value.as_f64().unwrap();
        let overhead = number(&profile["overhead_seconds"]);
        assert!(overhead > 0.0, "counting took {overhead} s");
        let counted = number(&profile["seconds"]) + overhead;
        // Nothing but the engine works meanwhile.
        let share = counted / number(&found[seconds]);
        assert!((0.8..1.02).contains(&share), "{share} of {seconds} with {threads} threads");
        let activities = profile["activities"].as_array().unwrap().iter();
        let operations = activities.flat_map(|one| one["operations"].as_array().unwrap());
        let operations: f64 = operations.map(|one| number(&one["seconds"])).sum();
        let share = operations / number(&profile["seconds"]);
        assert!((0.5..1.0).contains(&share), "{share} of the time in operations");
    }
}

#[test]
fn a_run_writes_its_profile_into_its_folder_and_says_where() {
    for name in ["profile.txt", "profile.json"] {
        assert!(!crate::runs::finished().join(name).exists(), "nobody asked for {name}");
    }
    let place = TempDir::new().unwrap();
    let out = place.path().join("run");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
    let output = Command::new(env!("CARGO_BIN_EXE_rehearsal"))
        .args(["run", "--profile", "--console", "plain"])
        .arg(config)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| {
        let path = out.join(name);
        let said = String::from_utf8_lossy(&output.stdout).contains(&path.display().to_string());
        assert!(said, "{} is not told", path.display());
        std::fs::read_to_string(path).unwrap()
    };
    let (table, json) = (read("profile.txt"), read("profile.json"));
    let profile: Value = serde_json::from_str(&json).unwrap();
    let told = profile["activities"].as_array().unwrap();
    let names: BTreeSet<_> = told.iter().map(|one| one["activity"].as_str().unwrap()).collect();
    for wanted in ["load", "switch", "prefill", "decode", "score", "forward", "backward", "update"]
    {
        assert!(names.contains(wanted), "{wanted} is not in {names:?}");
    }
    assert!(table.starts_with("operation ") && table.contains("\ntrain: backward "), "{table}");
}

#[test]
fn the_profile_of_a_run_has_its_sampler_too() {
    let place = TempDir::new().unwrap();
    let out = place.path().join("run");
    let sets = ["cluster.samplers=1", "stage.align.max_staleness=1"];
    let mut run = crate::runs::smoke_with(&out, &sets);
    run.args(["--profile", "--threads", "1"]);
    crate::runs::done(run);
    let json = std::fs::read(out.join("profile.json")).unwrap();
    let profile: Value = serde_json::from_slice(&json).unwrap();
    let names = |profile: &Value| -> BTreeSet<String> {
        let told = profile["activities"].as_array().unwrap();
        told.iter().map(|one| one["activity"].as_str().unwrap().to_string()).collect()
    };
    let (trainer, sampler) = (names(&profile), names(&profile["sampler"]));
    assert!(trainer.contains("backward") && !trainer.contains("decode"), "{trainer:?}");
    assert!(sampler.contains("decode") && !sampler.contains("backward"), "{sampler:?}");
    assert_eq!((&profile["clock"], &profile["sampler"]["clock"]), (&"wall".into(), &"wall".into()));
    let table = std::fs::read_to_string(out.join("profile.txt")).unwrap();
    assert!(table.contains("\nThe device that only samples:\noperation "), "{table}");
}
