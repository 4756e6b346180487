//! Signals: SIGTERM and Ctrl-C finish the step and commit, a second Ctrl-C stops at once, and one
//! folder has one run.
//!
//! A test follows the journal to know where the run is; what is sent in mid-run and what the run
//! did with it are both witnessed there.

use crate::runs::{
    check_each_step_once, check_refused, check_says, done, events, finished, said, smoke_with,
    steps, wait_for, weights,
};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

/// Ten times the steps of the smoke run's first stage: about a second in which a signal can land.
const LONGER: [&str; 2] = ["stage.base.steps=200", "checkpoint.every_steps=50"];

/// Steps of half a second, so that a second signal comes while the first one waits for the step.
const SLOWER: [&str; 5] = [
    "stage.base.steps=2",
    "stage.base.optimizer.warmup_steps=1",
    "stage.base.batch=256",
    "stage.base.batch_start=256",
    "stage.base.micro_batch=4",
];

/// The run with these settings that nobody disturbs.
fn undisturbed() -> &'static Path {
    static RUN: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = RUN.get_or_init(|| {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let out = folder.path().join("longer");
        done(smoke_with(&out, &LONGER));
        (folder, out)
    });
    path
}

/// The same run on its way: its first step is in the journal.
fn begun(out: &Path, settings: &[&str]) -> Child {
    let mut command = smoke_with(out, settings);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, out, "step");
    child
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn check_resumes_to(out: &Path, settings: &[&str], expected: &Path) {
    let mut resume = smoke_with(out, settings);
    resume.arg("--resume");
    done(resume);
    assert!(weights(out) == weights(expected), "other weights after a resume");
    check_each_step_once(out, expected);
}

/// The run stopped after a commit of its last step, says how to go on, and goes on to the same end.
fn check_stopped_after_a_commit(child: Child, out: &Path, code: i32) {
    let output: Output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", said(&output));
    check_says(&output, &["is committed", "--resume", out.to_str().unwrap()]);
    let (last, commit) = (steps(out).pop().unwrap(), events(out, "commit").pop().unwrap());
    assert_eq!((&commit["stage"], &commit["step"]), (&last["stage"], &last["step"]));
    assert!(Path::new(commit["folder"].as_str().unwrap()).join("manifest.json").exists());
    assert_eq!(events(out, "end").pop().unwrap()["state"], "stopped");
    assert!(steps(out).len() < steps(undisturbed()).len(), "the signal came too late");
    check_resumes_to(out, &LONGER, undisturbed());
    let again = events(out, "end").pop().unwrap()["computed_steps"].as_u64().unwrap();
    let whole = steps(out).len() as u64;
    let before = steps(out).iter().position(|step| step == &last).unwrap() as u64 + 1;
    assert_eq!(again, whole - before, "a committed step was computed again");
}

#[test]
fn a_sigterm_ends_with_143_after_a_commit_and_a_resume_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let child = begun(&out, &LONGER);
    send(&child, Signal::TERM);
    check_stopped_after_a_commit(child, &out, 143);
}

#[test]
fn a_ctrl_c_ends_with_130_after_a_commit_and_a_resume_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let child = begun(&out, &LONGER);
    send(&child, Signal::INT);
    check_stopped_after_a_commit(child, &out, 130);
}

#[test]
fn a_second_ctrl_c_stops_at_once_and_a_resume_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let mut child = begun(&out, &SLOWER);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    send(&child, Signal::INT);
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("press Ctrl-C again"), "{line}");
    send(&child, Signal::INT);
    let status = child.wait().unwrap();
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!((status.code(), status.signal()), (Some(130), None), "{rest}");
    assert_eq!((steps(&out).len(), events(&out, "end").len()), (1, 0), "it finished the step");

    let expected = folder.path().join("expected");
    done(smoke_with(&expected, &SLOWER));
    check_resumes_to(&out, &SLOWER, &expected);
}

#[test]
fn two_runs_in_one_folder_are_refused_while_the_first_one_lives() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let mut first = begun(&out, &LONGER);
    let owner = format!("process {}", first.id());
    for wish in ["--resume", "--fresh"] {
        let mut second = smoke_with(&out, &LONGER);
        second.arg(wish);
        check_refused(second, 2, &["another run works in", &owner, "--out"]);
    }
    assert_eq!(first.try_wait().unwrap(), None, "the first run goes on");
    // A kill releases the lock with the process; nothing has to be cleaned up by hand.
    first.kill().unwrap();
    first.wait().unwrap();
    check_resumes_to(&out, &LONGER, undisturbed());
    assert!(weights(&out) != weights(finished()), "more steps give other weights");
}
