//! Rollouts that are sampled one batch ahead (`max_staleness = 1`): which policy samples what, and that no kill changes it.

use crate::runs::{check_refused, done, events, smoke_with, steps, weights};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
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

#[test]
fn a_device_that_only_samples_changes_no_bit_and_samples_while_the_other_trains() {
    let folder = TempDir::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    done(ahead(&one));
    let mut beside = ahead(&two);
    beside.args(["--set", "cluster.samplers=1", "--threads", "2"]);
    done(beside);
    assert!(weights(&two) == weights(&one));
    let versions = |out: &Path| -> Vec<Value> {
        steps(out).iter().map(|step| step["sampled_version"].clone()).collect()
    };
    assert_eq!(versions(&two), versions(&one));
    // Sampling ahead began before the update ended, and scoring and the update before it did: one device does one after
    // the other.
    let aligned = steps(&two).into_iter().filter(|step| !step["intervals"]["ahead"].is_null());
    let overlapping = aligned.filter(|step| {
        let at = |name: &str, end: usize| step["intervals"][name][end].as_f64().unwrap();
        at("ahead", 0) < at("train", 1) && at("score", 0) < at("ahead", 1)
    });
    assert_eq!(overlapping.count(), 6);
    let alone = steps(&one).into_iter().filter(|step| {
        let at = |name: &str, end: usize| step["intervals"][name][end].as_f64();
        at("ahead", 1).is_some_and(|end| at("score", 0) < Some(end))
    });
    assert_eq!(alone.count(), 0);
}

#[test]
fn a_device_that_is_lost_in_a_hand_over_is_made_anew_with_the_other_one() {
    let folder = TempDir::new().unwrap();
    let whole = folder.path().join("whole");
    done(ahead(&whole));
    for (point, words) in [
        // Either of the two devices, before anything is sent; then in the middle of it, with frames under way.
        ("HandOver:1", "the device panicked in HandOver: panic at the failpoint HandOver"),
        ("HandOver:6", "the device panicked in HandOver: panic at the failpoint HandOver"),
        ("frame-taken:9", "the device panicked in HandOver: panic at the failpoint frame-taken"),
        // While the other one samples.
        ("Train:40", "the device panicked in Train: panic at the failpoint Train"),
    ] {
        let out = folder.path().join(point.replace(':', "-"));
        let mut lost = ahead(&out);
        lost.args(["--set", "cluster.samplers=1", "--threads", "2"]);
        lost.env("REHEARSAL_FAIL_AT", point).env("REHEARSAL_FAIL_HOW", "panic");
        let began = Instant::now();
        done(lost);
        assert!(began.elapsed() < Duration::from_secs(40), "{point}: a device waited in vain");
        let restarts = events(&out, "restart");
        let [restart] = &restarts[..] else { panic!("{point}: {restarts:?}") };
        let reason = restart["reason"].as_str().unwrap();
        assert!(reason.contains(words), "{point}: {reason}");
        assert!(weights(&out) == weights(&whole), "{point}");
    }
}

#[test]
fn a_kill_while_one_device_samples_and_the_other_trains_changes_nothing() {
    let folder = TempDir::new().unwrap();
    let [whole, out] = ["whole", "killed"].map(|name| folder.path().join(name));
    done(ahead(&whole));
    let beside = |out: &Path| {
        let mut run = ahead(out);
        run.args(["--set", "cluster.samplers=1", "--threads", "2"]);
        run
    };
    let mut killed = beside(&out);
    assert!(
        !killed.env("REHEARSAL_FAIL_AT", "mid-generation:42").output().unwrap().status.success()
    );
    done(beside(&out));
    assert!(weights(&out) == weights(&whole));
}
