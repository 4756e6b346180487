//! Bad input, damaged checkpoints and a full disk: a message with the place and a way out, the exit
//! code of the contract, and nothing written or lost.

use crate::runs::{
    check_each_step_once, check_refused, check_same, check_says, contents, copy, done, events,
    finished, rehearsal, said, smoke, smoke_with, wait_for, weights,
};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

const SMOKE: &str = "configs/smoke.toml";

#[test]
fn bad_input_ends_with_2_or_4_a_place_and_a_way_out() {
    let folder = TempDir::new().unwrap();
    let truncated = folder.path().join("truncated");
    copy(&finished().join("export"), &truncated);
    damage(&truncated.join("model-00001-of-00001.safetensors"), truncate);
    let long = "swap, rotate: p u n k ".repeat(200);
    let export = finished().join("export");
    let new = folder.path().join("run");
    let new = new.to_str().unwrap();
    let (run, export) = (finished().to_str().unwrap(), export.to_str().unwrap());
    let (truncated, none) = (truncated.to_str().unwrap(), folder.path().to_str().unwrap());
    let cases: [(&[&str], i32, &str); 6] = [
        (&["run", SMOKE, "--out", new, "--set", "seeed=1"], 2, "seed"),
        (&["run", SMOKE, "--out", new, "--set", "engine.budget=\"100 KiB\""], 4, "budget"),
        (&["run", SMOKE, "--out", run, "--seed", "9"], 2, "--fresh"),
        (&["generate", export, "--prompt", &long], 2, "context"),
        (&["generate", truncated, "--prompt", "x"], 2, "safetensors"),
        (&["generate", none, "--prompt", "x"], 2, "config.json"),
    ];
    for (arguments, code, text) in cases {
        check_refused(rehearsal(arguments), code, &[text]);
    }
    assert!(!Path::new(new).exists());
}

#[test]
fn bad_data_and_starts_are_refused_at_their_place_and_nothing_is_written() {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let data = |file: &str| format!("data.sets.pages.file={file:?}");
    let malformed =
        write("malformed.jsonl", "{\"text\":\"a\"}\n{\"text\":\"b\"\n{\"text\":\"c\"}\n");
    let empty = write("empty.jsonl", "");
    let empty_line = write("empty-line.jsonl", "{\"text\":\"a\"}\n\n{\"text\":\"c\"}\n");
    let missing = folder.path().join("missing.jsonl").to_str().unwrap().to_string();
    let export = finished().join("export").to_str().unwrap().to_string();
    let start = format!("stage.base.start_from={export:?}");
    let cases: [(&[&str], &[&str]); 8] = [
        (&[&data(&malformed)], &[&format!("{malformed}:2:"), "malformed JSON"]),
        (&[&data(&empty)], &[&format!("{empty}: holds no example")]),
        (&[&data(&empty_line)], &[&format!("{empty_line}:2: the line is empty")]),
        (&[&data(&missing)], &[&missing, "data.sets.pages.file", "No such file"]),
        (&["stage.sft.start_from=\"nowhere\""], &["stage sft", "nowhere", "earlier stage"]),
        (&["stage.align.reward.1.model=\"kind\""], &["stage.align.reward.1.model", "kind"]),
        (&[&start, "model.hidden_size=32"], &["model.hidden_size = 32 in the run, 24 in", &export]),
        (
            &[&start, "model.num_hidden_layers=3"],
            &["model.num_hidden_layers = 3 in the run", &export],
        ),
    ];
    for (set, texts) in cases {
        let out = folder.path().join("run");
        check_refused(smoke_with(&out, set), 2, texts);
        assert!(!out.exists(), "{set:?}: a refused run writes nothing");
    }
    let fitting = folder.path().join("run");
    done(smoke_with(&fitting, &[&start]));
}

#[test]
fn a_wrong_type_is_told_with_file_line_and_column() {
    let folder = TempDir::new().unwrap();
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let text = std::fs::read_to_string(configs.join("smoke.toml")).unwrap();
    let model = configs.join("model/smoke.json");
    let text = text.replace("model/smoke.json", model.to_str().unwrap());
    let text = text.replacen("steps = 20", "steps = \"twenty\"", 1);
    let line = 1 + text.lines().position(|line| line.contains("twenty")).unwrap();
    let file = folder.path().join("wrong.toml");
    std::fs::write(&file, text).unwrap();
    let (name, out) = (file.to_str().unwrap(), folder.path().join("run"));
    let place = format!("wrong.toml:{line}:9: stage.base.steps = \"twenty\" is a text");
    let mut run = rehearsal(&["run", name]);
    run.arg("--out").arg(&out);
    check_refused(run, 2, &[&place, "expected a whole number"]);
    check_refused(rehearsal(&["check", name]), 2, &[&place]);
    assert!(!out.exists());
}

#[test]
fn a_fresh_start_refuses_a_folder_that_is_no_run_and_keeps_what_is_in_it() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("photos");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("one.jpg"), "a picture").unwrap();
    let before = contents(&out);
    check_refused(smoke(&out, &["--fresh"]), 2, &["photos", "is no run folder", "--out"]);
    check_same(&contents(&out), &before);

    let run = folder.path().join("run");
    copy(finished(), &run);
    done(smoke(&run, &["--fresh"]));
    let mut aside = contents(&folder.path().join("run.old-1"));
    let mut expected = contents(finished());
    // The lock names the last process that held it.
    for files in [&mut aside, &mut expected] {
        files.remove(Path::new("lock"));
    }
    check_same(&aside, &expected);
    assert!(weights(&run) == weights(finished()));
}

#[test]
fn a_finished_run_that_is_resumed_ends_at_once_and_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    copy(finished(), &out);
    let output = done(smoke(&out, &["--resume"]));
    assert!(String::from_utf8_lossy(&output.stdout).contains("is finished"));
    check_same(&contents(&out), &contents(finished()));
    check_refused(smoke(&out, &[]), 2, &["finished", "--fresh"]);
    check_same(&contents(&out), &contents(finished()));
}

/// What can happen to a file.
type Damage = fn(Vec<u8>) -> Vec<u8>;

fn flip(mut bytes: Vec<u8>) -> Vec<u8> {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    bytes
}

fn truncate(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() / 2);
    bytes
}

fn damage(path: &Path, how: Damage) {
    std::fs::write(path, how(std::fs::read(path).unwrap())).unwrap();
}

/// A run that was killed here.
fn killed_at(point: &str, out: &Path) {
    let mut killed = smoke(out, &[]);
    let status = killed.env("REHEARSAL_FAIL_AT", point).output().unwrap().status;
    assert!(!status.success(), "{point} never came");
}

#[test]
fn a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used() {
    let folder = TempDir::new().unwrap();
    let killed = folder.path().join("killed");
    killed_at("mid-gradient:13", &killed);
    let newest = Path::new("checkpoints/000002-base-10");
    for (name, file, how) in [
        ("flipped", "model.safetensors", flip as Damage),
        ("truncated", "optimizer.safetensors", truncate),
        ("manifest", "manifest.json", flip),
    ] {
        let out = folder.path().join(name);
        copy(&killed, &out);
        damage(&out.join(newest).join(file), how);
        done(smoke(&out, &["--resume"]));
        let rejected = events(&out, "rejected");
        assert_eq!(rejected.len(), 1, "{name}");
        assert_eq!(rejected[0]["folder"], out.join(newest).to_str().unwrap());
        assert!(rejected[0]["reason"].as_str().unwrap().contains(file), "{}", rejected[0]);
        assert!(weights(&out) == weights(finished()), "{name}: other weights");
        check_each_step_once(&out, finished());
    }
}

#[test]
fn damage_that_leaves_no_checkpoint_is_refused_and_nothing_is_lost() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    killed_at("mid-gradient:13", &out);
    for (name, how) in [("000001-base-5", flip as Damage), ("000002-base-10", truncate)] {
        let checkpoint = out.join("checkpoints").join(name);
        damage(&checkpoint.join("model.safetensors"), how);
        let generate = rehearsal(&["generate", checkpoint.to_str().unwrap(), "--prompt", "x"]);
        check_refused(generate, 2, &[name, "model.safetensors", "damaged"]);
    }
    let before = contents(&out.join("checkpoints"));
    let places = ["000001-base-5/model.safetensors", "000002-base-10/model.safetensors", "--fresh"];
    check_refused(smoke(&out, &["--resume"]), 2, &places);
    check_same(&contents(&out.join("checkpoints")), &before);
}

#[test]
fn a_damaged_model_of_a_finished_stage_is_refused_by_the_stage_that_starts_from_it() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    killed_at("between-stages:2", &out);
    damage(&out.join("stages/02-long/model.safetensors"), flip);
    check_refused(smoke(&out, &["--resume"]), 2, &["02-long/model.safetensors", "damaged"]);
    damage(&out.join("stages/02-long/model.safetensors"), flip);
    done(smoke(&out, &["--resume"]));
    assert!(weights(&out) == weights(finished()));
}

/// A disk of its own, mounted where this process alone can see it: in a mount namespace that a
/// child holds, reached through /proc, and gone with the child. No root is needed.
struct SmallDisk {
    holder: Child,
    path: PathBuf,
    bytes: u64,
}

impl SmallDisk {
    /// None, with the reason on standard error, where the system allows no namespaces.
    fn new(place: &Path, bytes: u64) -> Option<SmallDisk> {
        let script =
            format!("mount -t tmpfs -o size={bytes} none \"$0\" && echo ready && exec sleep 600");
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]).arg(place);
        let spawned = command.stdout(Stdio::piped()).spawn();
        let mut holder =
            spawned.map_err(|error| eprintln!("skipped: no unshare here: {error}")).ok()?;
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let path = PathBuf::from(format!("/proc/{}/root{}", holder.id(), place.display()));
        let disk = SmallDisk { holder, path, bytes };
        if line.trim() != "ready" || std::fs::read_dir(&disk.path).is_err() {
            eprintln!("skipped: this system lets nobody mount a disk in a namespace of his own");
            return None;
        }
        Some(disk)
    }

    /// Takes all room but so many bytes.
    fn fill_but(&self, left: u64) {
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        // No more than the small disk holds, so that a mistake here fills no other one.
        let mut writes = (0..=self.bytes / 4096).map(|_| ballast.write(&[0; 4096]));
        let full = writes.find_map(Result::err).expect("a small disk gets full");
        assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");
        ballast.set_len(ballast.metadata().unwrap().len() - left).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The holder may have ended already; then there is nothing to end.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn a_full_disk_ends_with_4_and_the_run_goes_on_when_there_is_room() {
    let folder = TempDir::new().unwrap();
    let Some(disk) = SmallDisk::new(folder.path(), 32 << 20) else { return };
    let out = disk.path.join("run");
    let mut command = smoke(&out, &[]);
    let mut run = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut run, &out, "commit");
    // Held where it is, so that it cannot finish while the disk is being filled. What is left takes
    // the journal's lines, but no checkpoint.
    let pid = Pid::from_child(&run);
    kill_process(pid, Signal::STOP).unwrap();
    disk.fill_but(128 << 10);
    kill_process(pid, Signal::CONT).unwrap();
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    let place = out.join("checkpoints");
    check_says(&output, &["no room left", place.to_str().unwrap(), "free some space", "--resume"]);
    let end = events(&out, "end").pop().unwrap();
    assert!(end["reason"].as_str().unwrap().contains("No space left on device"), "{end}");
    assert!(events(&out, "commit").len() < events(finished(), "commit").len());

    let before = contents(&place);
    assert!(!before.is_empty(), "what was committed is there");
    check_refused(smoke(&out, &["--resume"]), 4, &["MiB of disk", "KiB are free", "make room"]);
    check_same(&contents(&place), &before);

    std::fs::remove_file(disk.ballast()).unwrap();
    done(smoke(&out, &["--resume"]));
    assert!(weights(&out) == weights(finished()), "other weights after a resume");
    check_each_step_once(&out, finished());
}
