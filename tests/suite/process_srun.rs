//! Runs that srun starts: the run of one process, who is named when one of them dies, and the command that goes on.
//!
//! Needs a Slurm whose srun knows PMIx and whose nodes are idle, such as `.ci/slurm.sh` starts; elsewhere the tests say aloud
//! that they are left out.

use crate::mpirun::{skipped, text};
use crate::process_runs::{
    check_failed, check_is_the_run_of_one, check_nothing_is_left, program, rank,
};
use crate::runs::{done, steps};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// srun for so many tasks; `None` where there is none that could start them.
fn srun(tasks: usize) -> Option<Command> {
    let told = |program: &str, word: &str| {
        let output = Command::new(program).arg(word).output();
        output.map(|output| text(&output)).unwrap_or_default()
    };
    let (how, state) = (told("srun", "--mpi=list"), told("sinfo", "-ho%t"));
    if !how.contains("pmix") || !["idle", "mix", "alloc"].contains(&state.trim()) {
        skipped("no Slurm with PMIx is up here; .ci/slurm.sh starts one");
        return None;
    }
    let mut command = Command::new("srun");
    // Minutes; nothing takes nearly as long.
    command.args(["--mpi=pmix", "--time=2", "-n", &tasks.to_string()]);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    Some(command)
}

#[test]
fn a_run_of_processes_that_srun_starts_is_the_run_of_one() {
    let Some(mut command) = srun(4) else { return };
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let layout = ["cluster.data=2", "cluster.pipeline=2", "cluster.expert=2"];
    command.args(rank(&program(), &out, &layout, &[]));
    done(command);
    check_is_the_run_of_one(&out);
    check_nothing_is_left(&out);
}

#[test]
fn a_process_of_srun_that_dies_is_named_and_the_command_that_is_said_goes_on() {
    let Some(mut command) = srun(2) else { return };
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let settings = ["cluster.data=2", "checkpoint.every_steps=3"];
    let words = rank(&program(), &out, &settings, &[]).join(" ");
    let dying = "env REHEARSAL_FAIL_AT=Train:8 REHEARSAL_FAIL_HOW=kill";
    let tasks = folder.path().join("tasks");
    std::fs::write(&tasks, format!("0 {words}\n1 {dying} {words}\n")).unwrap();
    let output = command.arg("--multi-prog").arg(&tasks).output().unwrap();
    check_failed(&output, &out, &["rank 0 of 2 ends: rank 1 is gone"]);
    let go_on = status(&out);
    assert!(go_on.starts_with("srun --mpi=pmix -n 2 "), "{go_on}");
    assert_eq!(steps(&out).len(), 7);
    let mut again = Command::new("sh");
    again.args(["-c", &go_on]).current_dir(env!("CARGO_MANIFEST_DIR"));
    done(again);
    check_is_the_run_of_one(&out);
    check_nothing_is_left(&out);
}

/// The command that goes on with a run, as its status tells it.
fn status(out: &Path) -> String {
    let output = Command::new(program()).arg("status").arg(out).output().unwrap();
    let said = text(&output);
    let line = said.lines().find_map(|line| line.trim().strip_prefix("go on with: "));
    line.unwrap_or_else(|| panic!("no command: {said}")).to_string()
}
