//! Whole runs through the binary: how a test starts one, follows it, and reads what it left.
//!
//! Knows no feature. A run is the smoke config with seed 3 unless a test says otherwise, so that all
//! runs without further settings end with the same weights as [`finished`].

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that a test waits for something that a run does within a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The binary, in the repository's root.
pub fn rehearsal(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rehearsal"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// The smoke run into `out`.
pub fn smoke(out: &Path, extra: &[&str]) -> Command {
    let mut command = rehearsal(&["run", "configs/smoke.toml", "--console", "off", "--seed", "3"]);
    command.arg("--out").arg(out).args(extra);
    command
}

/// The same with `--set` before each assignment.
pub fn smoke_with(out: &Path, assignments: &[&str]) -> Command {
    let mut command = smoke(out, &[]);
    assignments.iter().for_each(|assignment| {
        command.args(["--set", assignment]);
    });
    command
}

/// Runs a command that must succeed.
pub fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    output
}

/// Runs a command that must end with `code` and whose message must hold every one of `texts`.
pub fn check_refused(mut command: Command, code: i32, texts: &[&str]) {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {}", said(&output));
    check_says(&output, texts);
}

/// The message must hold every one of `texts`.
pub fn check_says(output: &Output, texts: &[&str]) {
    let said = said(output);
    for text in texts {
        assert!(said.contains(text), "the message does not name {text:?}: {said}");
    }
}

/// What a process wrote to standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The instruction sets of this processor, best first, as the program tells them.
pub fn instruction_sets() -> Vec<&'static str> {
    let mut unknown = rehearsal(&["check", "configs/smoke.toml", "--plan-only"]);
    let refusal = said(&unknown.env("REHEARSAL_ISA", "sse9").output().unwrap());
    let known = ["avx512", "avx2", "portable"].into_iter().filter(|name| refusal.contains(name));
    let known: Vec<&str> = known.collect();
    assert!(known.contains(&"portable"), "{refusal}");
    known
}

/// A finished smoke run that all tests share and none changes.
pub fn finished() -> &'static Path {
    static RUN: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = RUN.get_or_init(|| {
        // A folder that outlives the process is left where `cargo clean` finds it.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let out = folder.path().join("run");
        done(smoke(&out, &["--threads", "2"]));
        (folder, out)
    });
    path
}

/// The exported weights, by file.
pub fn weights(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = contents(&run.join("export"));
    files.retain(|path, _| path.extension().is_some_and(|e| e == "safetensors"));
    assert!(!files.is_empty(), "{} has no export", run.display());
    files
}

/// Every file under a folder with its bytes.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_path_buf();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Two folders have the same files with the same bytes.
pub fn check_same(one: &BTreeMap<PathBuf, Vec<u8>>, other: &BTreeMap<PathBuf, Vec<u8>>) {
    let names: BTreeSet<_> = one.keys().chain(other.keys()).collect();
    let differing: Vec<_> =
        names.into_iter().filter(|name| one.get(*name) != other.get(*name)).collect();
    assert!(differing.is_empty(), "these files differ: {differing:?}");
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    for (name, bytes) in contents(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// The whole lines of a run's journal; none if there is no journal yet.
pub fn journal(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("journal.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The journal's events of one name.
pub fn events(run: &Path, name: &str) -> Vec<Value> {
    journal(run).into_iter().filter(|event| event["event"] == name).collect()
}

/// The journal's steps.
pub fn steps(run: &Path) -> Vec<Value> {
    events(run, "step")
}

/// Every step of `like` stands in the run's journal, and each once.
pub fn check_each_step_once(run: &Path, like: &Path) {
    let place = |step: &Value| (step["stage"].to_string(), step["step"].to_string());
    let places: Vec<_> = steps(run).iter().map(place).collect();
    let distinct: BTreeSet<_> = places.iter().cloned().collect();
    assert_eq!(places.len(), distinct.len(), "a step stands in the journal twice");
    let wanted: BTreeSet<_> = steps(like).iter().map(place).collect();
    assert_eq!(distinct, wanted, "a step is missing or too many");
}

/// Waits until the run's journal has an event of this name. The run must be alive meanwhile.
pub fn wait_for(child: &mut Child, run: &Path, name: &str) {
    let until = Instant::now() + PATIENCE;
    while events(run, name).is_empty() {
        let status = child.try_wait().unwrap();
        assert!(status.is_none(), "the run ended before its first {name:?}: {status:?}");
        assert!(Instant::now() < until, "no {name:?} in the journal of {}", run.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a device needs at least in the smoke run, by `check`: the smallest budget of a rank.
pub fn least_budget(settings: &[&str]) -> u64 {
    let mut check = rehearsal(&["check", "configs/smoke.toml", "--plan-only", "--json"]);
    for set in settings {
        check.args(["--set", set]);
    }
    let report: Value = serde_json::from_slice(&done(check).stdout).unwrap();
    let devices = report["devices"].as_array().unwrap().iter();
    let stages = devices.flat_map(|device| device["stages"].as_array().unwrap());
    let phases = stages.flat_map(|stage| stage["least"].as_object().unwrap().values());
    let sum =
        |owners: &Value| owners.as_object().unwrap().values().map(|b| b.as_u64().unwrap()).sum();
    phases.map(sum).max().unwrap()
}
