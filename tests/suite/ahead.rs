//! Rollouts that are sampled one batch ahead (`max_staleness = 1`): which policy samples what, and that no kill changes it.

use crate::runs::{check_refused, done, events, smoke_with, steps, weights};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const AHEAD: [&str; 3] =
    ["stage.align.max_staleness=1", "stage.align.steps=7", "checkpoint.every_steps=3"];

fn ahead(out: &Path) -> Command {
    smoke_with(out, &AHEAD)
}

#[test]
fn each_batch_but_the_first_is_sampled_by_the_policy_before_the_one_that_it_updates() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    done(ahead(&out));
    let steps = steps(&out);
    let steps = steps.iter().filter(|step| step["stage"] == "align");
    let versions: Vec<[u64; 2]> = steps
        .map(|e| ["sampled_version", "policy_version"].map(|key| e[key].as_u64().unwrap()))
        .collect();
    assert_eq!(versions, [[0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]);
    check_refused(
        smoke_with(&folder.path().join("other"), &["stage.align.max_staleness=2"]),
        2,
        &["stage.align.max_staleness = 2", "use 1"],
    );
}

#[test]
fn a_kill_between_a_commit_and_the_batch_that_was_sampled_ahead_of_it_changes_nothing() {
    let folder = TempDir::new().unwrap();
    let whole = folder.path().join("whole");
    done(ahead(&whole));
    for point in ["mid-generation:40", "mid-generation:44"] {
        let out = folder.path().join(point.replace(':', "-"));
        let witness = folder.path().join("witness");
        let mut killed = ahead(&out);
        killed.env("REHEARSAL_FAIL_AT", point).env("REHEARSAL_FAIL_WITNESS", &witness);
        assert!(!killed.output().unwrap().status.success());
        assert!(witness.exists(), "{point} was not reached");
        let commits = events(&out, "commit");
        let last = commits.last().unwrap();
        assert!(last["stage"] == "align" && last["step"] != 7, "killed within the stage: {last}");
        std::fs::remove_file(&witness).unwrap();
        done(ahead(&out));
        assert!(weights(&out) == weights(&whole), "{point}");
    }
}
