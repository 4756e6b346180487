//! Whole runs through the binary: every stage kind, equal bytes, kills at named points, exit codes.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use tempfile::TempDir;

/// The binary in the repository's root.
fn rehearsal(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rehearsal"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn smoke(out: &Path, extra: &[&str]) -> Command {
    let mut command = rehearsal(&["run", "configs/smoke.toml", "--console", "off", "--seed", "3"]);
    command.arg("--out").arg(out).args(extra);
    command
}

fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A finished smoke run that the tests of this module share.
fn finished() -> &'static Path {
    static RUN: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = RUN.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        let out = folder.path().join("run");
        done(smoke(&out, &["--threads", "2"]));
        (folder, out)
    });
    path
}

/// The exported weights.
fn weights(run: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(run.join("export"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

fn journal(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("journal.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn steps(run: &Path) -> Vec<Value> {
    journal(run).into_iter().filter(|event| event["event"] == "step").collect()
}

fn each_step_once(run: &Path) {
    let places: Vec<_> =
        steps(run).iter().map(|s| (s["stage"].to_string(), s["step"].to_string())).collect();
    let distinct: BTreeSet<_> = places.iter().collect();
    assert_eq!(places.len(), distinct.len(), "a step stands in the journal twice");
    assert_eq!(places.len(), steps(finished()).len(), "a step is missing");
}

#[test]
fn a_run_goes_through_every_kind_of_stage_and_exports() {
    let run = finished();
    let kinds: BTreeSet<String> =
        steps(run).iter().map(|s| s["kind"].as_str().unwrap().to_string()).collect();
    let all = ["pretrain", "long-context", "sft", "reward-model", "grpo"];
    assert_eq!(kinds, all.map(str::to_string).into_iter().collect());
    each_step_once(run);
    for step in steps(run).iter().filter(|s| s["kind"] == "grpo") {
        assert!(step["logprob_gap_max"].as_f64().unwrap() < 1e-5, "{}", step["logprob_gap_max"]);
        for key in
            ["reward_mean", "kl", "entropy", "clip_share", "length_mean", "zero_variance_groups"]
        {
            assert!(step[key].is_number(), "{key}");
        }
    }
    let overlaps = |step: &Value| {
        let [judge, generate] = ["judge", "generate"].map(|name| &step["intervals"][name]);
        judge[0].as_f64().zip(generate[1].as_f64()).is_some_and(|(begins, ends)| begins < ends)
    };
    assert!(steps(run).iter().any(overlaps), "scoring begins before generation ends");
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        assert!(run.join("export").join(file).exists(), "{file}");
    }
}

#[test]
fn threads_change_no_byte_and_a_lost_scorer_or_generator_changes_none_either() {
    let folder = TempDir::new().unwrap();
    for (name, variable, threads) in [
        ("one-thread", "", "1"),
        ("scorer", "panic:reward-scorer:3", "2"),
        ("generator", "panic:rollout-generator:2", "2"),
    ] {
        let out = folder.path().join(name);
        let mut command = smoke(&out, &["--threads", threads]);
        if !variable.is_empty() {
            command.env("REHEARSAL_INJECT", variable);
        }
        done(command);
        assert!(weights(&out) == weights(finished()), "{name}: other weights");
        let has = |name: &str| journal(&out).iter().any(|event| event["event"] == name);
        assert_eq!(
            (has("inject"), has("restart")),
            (!variable.is_empty(), !variable.is_empty()),
            "{name}"
        );
        each_step_once(&out);
    }
}

#[test]
fn a_director_that_dies_in_mid_step_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    // Two updates a step: the second is under way, or still to be sent, when the Director is gone.
    let twice = ["--set", "stage.align.updates=2"];
    let undisturbed = folder.path().join("undisturbed");
    done(smoke(&undisturbed, &twice));
    for place in ["ScoreGroups:2", "UpdatePolicy:3", "CommitCheckpoint:9", "KeepArtefact:6"] {
        let out = folder.path().join(place.replace(':', "-"));
        let mut command = smoke(&out, &twice);
        command.env("REHEARSAL_INJECT", format!("panic:director:{place}"));
        done(command);
        assert!(weights(&out) == weights(&undisturbed), "{place}: other weights");
        let (journal, message) = (journal(&out), place.split(':').next().unwrap());
        assert!(journal.iter().any(|e| e["event"] == "inject" && e["message"] == message));
        let restarts: Vec<_> = journal.iter().filter(|e| e["event"] == "restart").collect();
        assert!(restarts.len() == 1 && restarts[0]["actor"] == "director", "{restarts:?}");
        each_step_once(&out);
    }
}

#[test]
fn a_kill_at_any_point_changes_nothing_in_the_result() {
    let folder = TempDir::new().unwrap();
    for point in [
        "checkpoint-write:30",
        "mid-generation:2",
        "mid-gradient:17",
        "export-write:5",
        "between-stages:2",
    ] {
        let name = point.replace(':', "-");
        let (out, witness) =
            (folder.path().join(&name), folder.path().join(format!("{name}.witness")));
        let mut killed = smoke(&out, &[]);
        killed.env("REHEARSAL_FAIL_AT", point).env("REHEARSAL_FAIL_WITNESS", &witness);
        let status = killed.output().unwrap().status;
        assert!(!status.success() && witness.exists(), "{point} never came: {status}");
        done(smoke(&out, &["--resume"]));
        assert!(weights(&out) == weights(finished()), "{point}: other weights after a resume");
        each_step_once(&out);
    }
}

#[test]
fn bad_input_ends_with_2_a_place_and_a_way_out() {
    let folder = TempDir::new().unwrap();
    let run = finished();
    let truncated = folder.path().join("truncated");
    std::fs::create_dir(&truncated).unwrap();
    for file in std::fs::read_dir(run.join("export")).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if path.extension().is_some_and(|e| e == "safetensors") {
            bytes.truncate(bytes.len() / 2);
        }
        std::fs::write(truncated.join(path.file_name().unwrap()), bytes).unwrap();
    }
    let long = "swap, rotate: p u n k ".repeat(200);
    let export = run.join("export");
    let (export, truncated) = (export.to_str().unwrap(), truncated.to_str().unwrap());
    let cases: [(&[&str], i32, &str); 6] = [
        (&["run", "configs/smoke.toml", "--set", "seeed=1"], 2, "seed"),
        (&["run", "configs/smoke.toml", "--set", "engine.budget=\"1 MiB\""], 4, "budget"),
        (
            &["run", "configs/smoke.toml", "--out", run.to_str().unwrap(), "--seed", "9"],
            2,
            "--fresh",
        ),
        (&["generate", export, "--prompt", &long], 2, "context"),
        (&["generate", truncated, "--prompt", "x"], 2, "safetensors"),
        (&["generate", folder.path().to_str().unwrap(), "--prompt", "x"], 2, "config.json"),
    ];
    for (arguments, code, text) in cases {
        let output = rehearsal(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(text), "{arguments:?} does not name {text}: {said}");
    }
}
