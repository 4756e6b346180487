//! Runs under Open MPI 5 with fault tolerance (ULFM): a rank that dies takes nobody along, every other one names it, and the run
//! goes on; console and journal tell which MPI was found.
//!
//! `.ci/run` fetches that MPI into `target/openmpi`. Where it is not there the tests say so and pass. The program is the one that
//! was built with the MPI of the system: both have the same binary interface.

use crate::mpirun::{checked, mpirun_at, skipped, text};
use crate::process_runs::{check_failed, check_is_the_run_of_one, program, rank};
use crate::processes::check_passed;
use crate::runs::{done, events, steps};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const TOLERANT: [&str; 2] = ["--with-ft", "ulfm"];

/// mpirun of Open MPI 5.
fn launcher() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in target");
    let launcher = target.join("openmpi/bin/mpirun");
    if !launcher.exists() {
        skipped(&format!("no Open MPI 5 at {}; .ci/run fetches it", launcher.display()));
        return None;
    }
    Some(launcher)
}

/// The smoke run over four, the third of which kills itself before its eighth step.
fn over_four_with_death(launcher: &Path, out: &Path, settings: &[&str]) -> Command {
    let mut command = mpirun_at(launcher, 1, &TOLERANT);
    for place in 0..4 {
        if place > 0 {
            command.args([":", "-n", "1"]);
        }
        if place == 2 {
            command.args(["env", "REHEARSAL_FAIL_AT=Train:8"]);
        }
        command.args(rank(&program(), out, settings, &[]));
    }
    command
}

#[test]
fn who_dies_takes_nobody_along_and_is_named_by_every_other_one() {
    let Some(launcher) = launcher() else { return };
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let often = "checkpoint.every_steps=3";
    let output = over_four_with_death(&launcher, &out, &["cluster.data=4", often]).output();
    let ends = [0, 1, 3].map(|rank| format!("rank {rank} of 4 ends: rank 2 is gone"));
    check_failed(&output.unwrap(), &out, &ends.each_ref().map(String::as_str));
    // Rank 0 was left to write how it ended, and the others to hear of it.
    let end = events(&out, "end").pop().unwrap();
    assert!(end["reason"].as_str().unwrap().contains("rank 2 is gone"), "{end}");
    let began = events(&out, "run").pop().unwrap();
    let processes = began["processes"].as_str().unwrap();
    assert!(processes.starts_with("4 processes on "), "{processes}");
    assert!(processes.contains(" over Open MPI v5."), "{processes}");
    assert!(processes.contains("with fault tolerance (ULFM)"), "{processes}");

    let mut again = mpirun_at(&launcher, 2, &TOLERANT);
    again.args(rank(&program(), &out, &["cluster.data=2", often], &[]));
    let before = steps(&out).len();
    assert_eq!(before, 7);
    done(again);
    check_is_the_run_of_one(&out);
    let computed = events(&out, "end").pop().unwrap()["computed_steps"].as_u64().unwrap();
    assert!(before as u64 + computed - steps(&out).len() as u64 <= 3, "{computed} of {before}");
}

#[test]
fn links_of_the_others_name_who_is_killed_and_go_on_working_until_then() {
    let Some(launcher) = launcher() else { return };
    let output = checked(mpirun_at(&launcher, 4, &TOLERANT), "killed").output().unwrap();
    check_passed(3, &text(&output));
    let output = checked(mpirun_at(&launcher, 3, &TOLERANT), "collectives").output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    check_passed(3, &text(&output));
}
