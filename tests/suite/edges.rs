//! Faults at the edges, through the binary: what a person types, what files hold, what the machine lacks.
//!
//! A small run of two stages from files of its own, so that each test takes a second or two. Knows no module of ours.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_rehearsal");

const RUN: &str = r#"[model]
config = "MODEL"

[tokenizer]
vocab_size = 288
train_on = ["text"]

[data]
held_out = ["held"]
[data.sets.text]
file = "text.jsonl"
schema = "text"
[data.sets.talk]
file = "talk.jsonl"
schema = "prompts"
chat = true
[data.sets.held]
file = "held.jsonl"
schema = "prompts"
chat = true

[checkpoint]
every_steps = 2

[[stage]]
name = "base"
kind = "pretrain"
data = [{ set = "text" }]
steps = 4
batch = 2
sequence = 16

[[stage]]
name = "talk"
kind = "sft"
data = "talk"
batch = 4
[[stage.eval]]
name = "solved"
data = "held"
verifier = "exact"
max_new_tokens = 4
[stage.gate]
eval = "solved"
minimum = 0
"#;

/// A folder with the run's TOML and its files.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(TempDir::new().unwrap());
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        place.write("run.toml", &RUN.replace("MODEL", &model.display().to_string()));
        let text = |i: u32| format!("{{\"text\": \"the {i} cats sat on {} mats\"}}\n", i * 7);
        place.write("text.jsonl", &(0..60).map(text).collect::<String>());
        let line = |i: u32| format!("{{\"prompt\": \"say {i}\", \"answer\": \"{i}\"}}\n");
        place.write("talk.jsonl", &(0..8).map(line).collect::<String>());
        place.write("held.jsonl", &(100..104).map(line).collect::<String>());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// The binary in this folder.
    fn rehearsal(&self, arguments: &[&str]) -> Output {
        Command::new(BINARY).args(arguments).current_dir(self.0.path()).output().unwrap()
    }

    /// A run of `run.toml` into `out`.
    fn run(&self, extra: &[&str]) -> Output {
        self.rehearsal(&[&["run", "run.toml", "--out", "out", "--console", "off"], extra].concat())
    }

    fn steps(&self) -> usize {
        let journal = std::fs::read_to_string(self.path("out/journal.jsonl")).unwrap_or_default();
        journal.lines().filter(|line| line.contains("\"event\":\"step\"")).count()
    }
}

/// The end that was wanted; gives what was said.
fn told(output: &Output, code: i32) -> String {
    let [out, err] =
        [&output.stdout, &output.stderr].map(|s| String::from_utf8_lossy(s).into_owned());
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    format!("{out}{err}")
}

/// A finished run that tests read and copy from.
fn finished() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Place::new();
        told(&place.run(&[]), 0);
        place
    })
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Starts a command line in a shell, signals it once it has printed `until`, and gives its end and what it printed.
fn interrupted(place: &Place, line: &str, until: &str, signal: &str) -> (Option<i32>, String) {
    // The words that are printed begin with the program's name.
    let bin = place.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    if !bin.join("rehearsal").exists() {
        std::os::unix::fs::symlink(BINARY, bin.join("rehearsal")).unwrap();
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut child = Command::new("sh")
        .args(["-c", &format!("exec {line} --console plain")])
        .env("PATH", path)
        .current_dir(place.0.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut text = String::new();
    for line in lines.by_ref() {
        text += &(line.unwrap() + "\n");
        if text.contains(until) {
            break;
        }
    }
    Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    lines.for_each(|line| text += &(line.unwrap() + "\n"));
    let status = child.wait().unwrap();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (status.code(), text)
}

fn hangups_are_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1
}

#[test]
fn the_command_that_a_stopped_run_prints_goes_on_with_it() {
    let place = Place::new();
    let line = "rehearsal run run.toml --set stage.base.steps=200000 --set 'stage.base.optimizer.decay_at=[0.5, 0.9]' \
                --seed 4 --out 'an out'";
    let (code, text) = interrupted(&place, line, "/200000", "-INT");
    assert_eq!(code, Some(130), "{text}");
    let shown = |text: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix("go on with: "))
            .unwrap_or_else(|| panic!("{text}"))
            .to_string()
    };
    let command = shown(&text);
    assert_eq!(command, format!("{line} --resume"));
    assert!(text.contains("stopped by SIGINT"), "{text}");
    let status = told(&place.rehearsal(&["status", "an out"]), 0);
    assert!(status.contains(&format!("  go on with: {command}\n")), "{status}");
    assert!(!status.contains("running"), "{status}");
    // Under nohup a run goes on when its terminal goes away, and so do those that this process starts.
    let (signal, end) = if hangups_are_ignored() { ("-TERM", 143) } else { ("-HUP", 129) };
    let (code, text) = interrupted(&place, &command, "resumes", signal);
    assert_eq!(code, Some(end), "{text}");
    assert_eq!(shown(&text), command);
}

#[test]
fn a_missed_gate_is_gone_through_with_another_one() {
    let place = Place::new();
    let missed = told(&place.run(&["--set", "stage.talk.gate.minimum=2"]), 1);
    assert!(missed.contains("go on with --resume"), "{missed}");
    let steps = place.steps();
    told(&place.run(&["--set", "stage.talk.gate.minimum=0", "--resume"]), 0);
    assert_eq!(place.steps(), steps, "nothing is trained again");
    let config = std::fs::read_to_string(place.path("out/config.toml")).unwrap();
    assert!(config.contains("minimum = 0.0"), "{config}");
}

#[test]
fn an_artefact_that_is_gone_is_asked_for_and_no_commit_is_lost() {
    let place = Place::new();
    told(&place.run(&["--set", "stage.talk.gate.minimum=2"]), 1);
    let commits = || {
        let entries = std::fs::read_dir(place.path("out/checkpoints")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = commits();
    std::fs::rename(place.path("out/stages/01-base"), place.path("aside")).unwrap();
    let text = told(&place.run(&["--resume"]), 2);
    assert!(text.contains("stages/01-base is missing"), "{text}");
    assert_eq!(commits(), before);
    std::fs::rename(place.path("aside"), place.path("out/stages/01-base")).unwrap();
    told(&place.run(&["--resume"]), 0);
}

#[test]
fn a_start_from_that_does_not_fit_is_refused_before_anything_is_written() {
    let place = Place::new();
    copy(&finished().path("out/stages/01-base"), &place.path("old"));
    let text = RUN.replace("name = \"talk\"\nkind", "name = \"talk\"\nstart_from = \"old\"\nkind");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
    place.write("run.toml", &text.replace("MODEL", &model.display().to_string()));
    told(&place.rehearsal(&["check", "run.toml"]), 0);
    let refused = |extra: &[&str], wanted: &str| {
        for command in [&["check", "run.toml"][..], &["run", "run.toml", "--out", "out"]] {
            let text = told(&place.rehearsal(&[command, extra].concat()), 2);
            assert!(text.contains(wanted) && text.contains("run.toml:35:1: "), "{text}");
            assert!(!place.path("out").exists());
        }
    };
    refused(
        &["--set", "model.rms_norm_eps=1e-3"],
        "model.rms_norm_eps = 0.001 in the run, 1e-6 in ",
    );
    let weights = place.path("old/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &flipped).unwrap();
    refused(&[], "its content is not what was written");
    std::fs::remove_file(place.path("old/manifest.json")).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 4]).unwrap();
    refused(&[], "the file is damaged");
    std::fs::write(&weights, &whole).unwrap();
    let config = std::fs::read_to_string(place.path("old/config.json")).unwrap();
    place.write("old/reward.json", "{\"mean\": 0.0, \"deviation\": 1.0}");
    refused(&[], "which is a reward model and no policy");
    std::fs::remove_file(place.path("old/reward.json")).unwrap();
    // A config that the run agrees with and the weights do not.
    place.write(
        "old/config.json",
        &config.replace("\"intermediate_size\": 48", "\"intermediate_size\": 40"),
    );
    refused(
        &["--set", "model.intermediate_size=40"],
        "has shape [48, 24], the config wants [40, 24]",
    );
}

#[test]
fn weights_do_not_go_on_under_another_tokenizer() {
    let place = Place::new();
    copy(&finished().path("out/stages/01-base"), &place.path("old"));
    let start = ["--set", "stage.talk.start_from=old"];
    let other = ["--set", "tokenizer.vocab_size=270"];
    let text = told(&place.run(&[start, other].concat()), 2);
    assert!(text.contains("whose tokenizer.json has another `vocab`"), "{text}");
    assert!(text.contains("[tokenizer] file = "), "{text}");
    assert_eq!(place.steps(), 0);
    let given = ["--set", "tokenizer={file=\"other.json\"}"];
    std::fs::copy(place.path("out/tokenizer.json"), place.path("other.json")).unwrap();
    let text = told(&place.rehearsal(&[&["check", "run.toml"], &start[..], &given].concat()), 2);
    assert!(text.contains("has another `vocab`"), "{text}");
    // The same text makes the same tokenizer.
    told(&place.run(&[&start[..], &["--fresh"]].concat()), 0);
}

#[test]
fn data_that_a_stage_cannot_use_is_refused_before_the_first_step() {
    let place = Place::new();
    let talk = std::fs::read_to_string(place.path("talk.jsonl")).unwrap();
    place.write("talk.jsonl", &(talk.clone() + "{\"prompt\": \"say 101\", \"answer\": \"101\"}\n"));
    let leaked = told(&place.run(&[]), 2);
    assert!(leaked.contains("1 of 4 held-out examples are trained on"), "{leaked}");
    assert!(!place.path("out").exists());
    // Its length is known once the run has a tokenizer.
    let long = format!("{{\"prompt\": \"say\", \"answer\": {:?}}}\n", "x y ".repeat(200));
    place.write("talk.jsonl", &(talk.clone() + &long));
    let text = told(&place.run(&[]), 2);
    assert!(text.contains("talk.jsonl:9: the conversation has "), "{text}");
    assert_eq!(place.steps(), 0, "the stage before it is not trained");
    place.write("talk.jsonl", &format!("\u{feff}{talk}"));
    told(&place.run(&["--fresh"]), 0);
}

#[test]
fn more_threads_than_cores_are_warned_of_once_and_none_are_refused() {
    let place = Place::new();
    let cores = std::thread::available_parallelism().unwrap().get();
    let warned = |line: &str, code: i32| {
        let output = place.rehearsal(&line.split(' ').collect::<Vec<_>>());
        let told = told(&output, code);
        told.matches(" threads on ").count()
    };
    let (enough, more) = (cores, cores + 1);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
    let model = model.display();
    assert_eq!(warned(&format!("check {model} --threads {enough}"), 0), 0);
    assert_eq!(warned(&format!("check {model} --threads {more}"), 0), 1);
    let check = "check run.toml --plan-only --set engine.threads";
    assert_eq!(warned(&format!("{check}={enough}"), 0), 0);
    assert_eq!(warned(&format!("{check}={more}"), 0), 1);
    // A run is warned before anything else can be wrong with it.
    let run = "run run.toml --set engine.budget=100000 --threads";
    assert_eq!(warned(&format!("{run} {enough}"), 4), 0);
    assert_eq!(warned(&format!("{run} {more}"), 4), 1);
    for line in ["check run.toml --threads 0", "run run.toml --set engine.threads=0"] {
        let output = place.rehearsal(&line.split(' ').collect::<Vec<_>>());
        assert!(told(&output, 2).contains("threads"), "{line}");
    }
}

#[test]
fn what_the_machine_cannot_hold_is_refused_before_anything_is_written() {
    let place = Place::new();
    let batch = ["--set", "stage.base.batch=1000000000"];
    let text = told(&place.run(&batch), 4);
    assert!(text.contains("of examples at once") && text.contains("policy/moments"), "{text}");
    assert!(!place.path("out").exists());
    let text = told(&place.rehearsal(&[&["check", "run.toml"], &batch[..]].concat()), 0);
    assert!(
        text.contains("note      this machine has") && text.contains("budget    none; here"),
        "{text}"
    );
    let text = told(&place.run(&["--set", "model.num_hidden_layers=1000000000000"]), 2);
    assert!(text.contains("more than any model has"), "{text}");
    let bench = "bench train --model $MODEL --steps 1";
    for (limit, line, code, wanted) in [
        (
            "ulimit -v 4000000",
            format!("{bench} --batch 100000000"),
            4,
            "100000000 sequences of 64 tokens take about",
        ),
        ("true", format!("{bench} --sequence 1"), 2, "at least 2"),
        ("true", format!("{bench} --threads 65535"), 2, "from 1 to 1024"),
        ("true", format!("{bench} --batch 2 --sequence 8"), 0, "seconds_per_step"),
    ] {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        let output = Command::new("sh")
            .args(["-c", &format!("{limit}; exec {BINARY} {line}")])
            .env("MODEL", model)
            .output()
            .unwrap();
        assert!(told(&output, code).contains(wanted), "{line}");
    }
}

#[test]
fn the_disk_that_is_asked_for_covers_what_a_run_leaves() {
    let place = finished();
    let json = told(&place.rehearsal(&["check", "run.toml", "--json"]), 0);
    let report: Value = serde_json::from_str(&json).unwrap();
    let output =
        Command::new("du").args(["-sk", "out"]).current_dir(place.0.path()).output().unwrap();
    let held: u64 =
        String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().parse().unwrap();
    let asked = report["estimate"]["disk_bytes"].as_u64().unwrap();
    assert!(asked >= 1024 * held, "{asked} bytes are asked for, {held} KiB are held");
}

#[test]
fn a_place_that_can_be_no_folder_is_refused_with_a_way_out() {
    let place = finished();
    for line in [
        &["run", "run.toml", "--out", "run.toml/sub"][..],
        &["export", "out/export", "--out", "run.toml/sub"],
    ] {
        let text = told(&place.rehearsal(line), 2);
        assert!(text.contains("choose another place with --out"), "{text}");
    }
}

#[test]
fn a_line_that_cannot_be_scored_or_answered_is_named() {
    let (place, own) = (finished(), Place::new());
    let export = place.path("out/export").display().to_string();
    let long = vec!["1"; 129].join(", ");
    own.write("long.jsonl", &format!("{{\"tokens\": [1, 2]}}\n{{\"tokens\": [{long}]}}\n"));
    own.write("beyond.jsonl", "{\"tokens\": [288]}\n");
    own.write("names.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}\n");
    own.write("short.jsonl", "{\"text\": \"a\"}\n");
    for (arguments, wanted) in [
        (
            ["score", &export, "--input", "long.jsonl"].to_vec(),
            "long.jsonl:2: 129 tokens are more than",
        ),
        (
            ["score", &export, "--input", "beyond.jsonl"].to_vec(),
            "beyond.jsonl:1: token id 288 is beyond",
        ),
        (
            ["eval", &export, "--data", "names.jsonl", "--verifier", "exact"].to_vec(),
            "names.jsonl:1: field `prompt` is missing (the line has `question`, `answer`); rename it",
        ),
        (
            ["eval", &export, "--data", "short.jsonl", "--metric", "perplexity"].to_vec(),
            "none of 1 texts has two tokens or more",
        ),
    ] {
        let text = told(&own.rehearsal(&arguments), 2);
        assert!(text.contains(wanted), "{text}");
    }
    let once = [
        "eval",
        &export,
        "--data",
        "held.jsonl",
        "--verifier",
        "exact",
        "--chat",
        "--max-tokens",
        "2",
    ];
    let text = told(&own.rehearsal(&once), 0);
    assert_eq!(text.matches("pass@").count(), 1, "{text}");
}

#[test]
fn a_chat_template_that_never_ends_is_stopped() {
    let place = Place::new();
    copy(&finished().path("out/export"), &place.path("model"));
    let path = place.path("model/tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] =
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into();
    std::fs::write(&path, config.to_string()).unwrap();
    let text = told(&place.rehearsal(&["generate", "model", "--chat", "--prompt", "x"]), 2);
    assert!(text.contains("it takes more than 1000000 steps"), "{text}");
}

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_refuses_to_be_one_of_several_processes() {
    let place = Place::new();
    let mut command = Command::new(BINARY);
    command.args(["run", "run.toml", "--out", "out"]).current_dir(place.0.path());
    command.env("OMPI_COMM_WORLD_SIZE", "2").env("OMPI_COMM_WORLD_RANK", "0");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("mpirun started 2 processes") && said.contains("--features mpi"),
        "{said}"
    );
    assert!(!place.path("out").exists());
}
