//! How runs of several processes start under mpirun: with what is refused on all of them, and with one that does not come.

use crate::mpirun::{mpirun, text};
use crate::process_runs::{check_failed, check_nothing_is_left, over, program, rank};
use crate::runs::{done, finished, rehearsal, said, smoke_with, wait_for};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The same over two, the second of which is started by `second`, words before its program included.
fn over_two(out: &Path, settings: &[&str], second: Vec<String>) -> Command {
    let mut command = mpirun(1, &[]);
    command.args(rank(&program(), out, settings, &[]));
    command.args([":", "-n", "1"]).args(second);
    command
}

#[test]
fn another_binary_or_config_on_one_process_is_refused_on_all_of_them() {
    let folder = TempDir::new().unwrap();
    let (out, other) = (folder.path().join("run"), folder.path().join("other-rehearsal"));
    let settings = ["cluster.data=2"];
    let mut binary = std::fs::read(program()).unwrap();
    binary.extend_from_slice(b"changed");
    std::fs::write(&other, binary).unwrap();
    std::fs::set_permissions(&other, std::fs::metadata(program()).unwrap().permissions()).unwrap();
    let second = rank(&other, &out, &settings, &[]);
    let output = over_two(&out, &settings, second).output().unwrap();
    check_failed(&output, &out, &["rank 1: process", "its binary has the hash"]);
    let second = rank(&program(), &out, &settings, &["stage.base.optimizer.learning_rate=0.5"]);
    let output = over_two(&out, &settings, second).output().unwrap();
    check_failed(
        &output,
        &out,
        &["rank 1: process", "learning_rate = 0.5 instead of", "its config has the hash"],
    );
    let mut second = rank(&program(), &out, &settings, &[]);
    second[2] = "configs/not-on-this-host.toml".to_string();
    let output = over_two(&out, &settings, second).output().unwrap();
    check_failed(&output, &out, &["rank 1 of 2 on ", "configs/not-on-this-host.toml: cannot be"]);
    assert!(!out.exists(), "nothing was begun");
}

#[test]
fn processes_that_the_layout_does_not_divide_are_refused_and_a_finished_run_ends_at_once() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    for (layout, words) in [
        (&["cluster.data=3"][..], ["is 3, and 2 processes were started", "set cluster.data = 2"]),
        (
            &["cluster.data=2", "cluster.rollout.expert=3"],
            ["cluster.rollout.expert = 3 does not divide the number of ranks = 2", "use 1 or 2"],
        ),
    ] {
        let output = over(2, &out, layout).output().unwrap();
        check_failed(&output, &out, &words);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(text(&output).matches("error: ").count(), 1, "said once: {}", text(&output));
    }
    crate::runs::copy(finished(), &out);
    let mut again = over(2, &out, &["cluster.data=2"]);
    again.arg("--resume");
    done(again);
    check_nothing_is_left(&out);
}

#[test]
fn a_process_by_itself_starts_no_mpi() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let mut child = smoke_with(&out, &["stage.base.steps=5000"]).spawn().unwrap();
    wait_for(&mut child, &out, "step");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    // The library is linked, but has loaded none of the components that it starts with.
    assert!(maps.contains("libmpi.so") && !maps.contains("/mca_"), "MPI was started");
    let mut check = rehearsal(&["check", "configs/smoke.toml", "--plan-only"]);
    let output = check.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

/// What rank 1 of three does that is stopped before the program begins.
const STOPPED: [&str; 3] = ["sh", "-c", "kill -STOP $$; exec \"$0\" \"$@\""];

#[test]
fn a_process_that_does_not_start_is_named_by_all_others_at_the_deadline() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let own = rank(&program(), &out, &["cluster.data=3", "cluster.deadline_seconds=2"], &[]);
    let mut command = mpirun(1, &[]);
    command.args(&own).args([":", "-n", "1"]).args(STOPPED).args(&own);
    command.args([":", "-n", "1"]).args(&own);
    let began = Instant::now();
    let output = command.output().unwrap();
    let seconds = began.elapsed();
    for place in [0, 2] {
        let said = format!("error: rank {place} of 3 ends: MPI has not started within 2 s");
        check_failed(&output, &out, &[&said]);
    }
    let named = ": rank 1 has not started; see that its host answers and starts programs, and give the same command again \
                 (cluster.deadline_seconds is 2)";
    assert_eq!(text(&output).matches(named).count(), 2, "{}", text(&output));
    assert!(seconds < Duration::from_secs(15), "{seconds:?}");
    assert!(!out.exists(), "nothing was begun");
    // mpirun may have ended the last one before it took their files away; the next start does.
    crate::runs::copy(finished(), &out);
    let mut again = over(2, &out, &["cluster.data=2"]);
    again.arg("--resume");
    done(again);
    let kept = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(kept.count(), 1, "the run's folder alone");
}
