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
    let at = |step: &Value, name: &str, end: usize| step["intervals"][name][end].as_f64().unwrap();
    let beside = |out: &Path| {
        let steps = steps(out).into_iter().filter(|step| !step["intervals"]["ahead"].is_null());
        let is_beside = |step: &Value| {
            at(step, "ahead", 0) < at(step, "train", 1)
                && at(step, "score", 0) < at(step, "ahead", 1)
        };
        steps.filter(is_beside).count()
    };
    // On a busy machine one device or the other may be held up for a whole step, but not in most of them.
    let [two_devices, one_device] = [beside(&two), beside(&one)];
    assert!(two_devices >= 3 && one_device == 0, "of 6: {two_devices}, {one_device}");
    for out in [&one, &two] {
        let aligned: Vec<_> = steps(out).into_iter().filter(|e| e["stage"] == "align").collect();
        for step in &aligned {
            assert_eq!(step["logprob_gap_max"], 0.0, "compared by the version that sampled it");
            let window = [0, 1].map(|end| step["window"][end].as_f64().unwrap());
            for (name, interval) in step["intervals"].as_object().unwrap() {
                let [start, end] = [0, 1].map(|end| interval[end].as_f64().unwrap());
                assert!(window[0] <= start && start <= end && end <= window[1], "{name}: {step}");
            }
        }
        // The policy has moved meanwhile; only the first batch is trained on by the version that sampled it.
        let moved = aligned.iter().map(|step| step["stale_gap_max"].as_f64());
        assert!(
            moved.enumerate().all(|(step, gap)| gap.is_some_and(|gap| gap > 0.0) == (step > 0))
        );
        // Every batch is counted in the step in which it was sampled.
        let tokens: Vec<_> = aligned.iter().map(|e| e["new_tokens"].as_u64().unwrap()).collect();
        assert!(tokens[..6].iter().all(|tokens| *tokens > 0) && tokens[6] == 0, "{tokens:?}");
        let sampled: Vec<_> =
            aligned.iter().map(|e| e["sampled"]["step"].as_u64().unwrap()).collect();
        assert_eq!(sampled, [1, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn the_step_that_hands_the_policy_over_tells_when_it_did() {
    let folder = TempDir::new().unwrap();
    for (staleness, handed_over) in [("0", [false, true, true]), ("1", [false, true, false])] {
        let out = folder.path().join(staleness);
        let staleness = format!("stage.align.max_staleness={staleness}");
        let mut run = smoke_with(&out, &[&staleness, "stage.align.steps=3", "cluster.samplers=1"]);
        run.args(["--threads", "2"]);
        done(run);
        let aligned: Vec<_> = steps(&out).into_iter().filter(|e| e["stage"] == "align").collect();
        for told in [
            |step: &Value| !step["switch"].is_null(),
            |step: &Value| step["intervals"]["hand_over"].is_array(),
        ] {
            assert_eq!(aligned.iter().map(told).collect::<Vec<_>>(), handed_over, "{staleness}");
        }
    }
}

/// Sampling of single sequences, which takes longer than scoring by a rule and the update together.
const SAMPLES_LONG: [&str; 5] = [
    "stage.align.reward=[{ verifier = \"answer-line\", partial = 0.5 }]",
    "stage.align.kl_weight=0.0",
    "stage.align.max_new_tokens=96",
    "stage.align.steps=21",
    "engine.decode_batch=1",
];

#[test]
fn where_sampling_takes_as_long_as_training_most_of_training_has_it_beside_and_none_in_serial_order()
 {
    let folder = TempDir::new().unwrap();
    let share = |name: &str, samplers: &str| {
        let out = folder.path().join(name);
        let mut run = ahead(&out);
        run.args(SAMPLES_LONG.iter().flat_map(|set| ["--set", set]));
        run.args(["--set", samplers, "--threads", "2"]);
        done(run);
        let (mut trained, mut beside, mut steps_ahead) = (0.0, 0.0, 0);
        for step in steps(&out) {
            let interval = |name: &str| [0, 1].map(|end| step["intervals"][name][end].as_f64());
            let [Some(start), Some(end)] = interval("ahead") else { continue };
            let [Some(from), Some(to)] = interval("train") else { panic!("{step}") };
            let both = (end.min(to) - start.max(from)).max(0.0);
            let told = step["sampling_overlap"].as_f64().unwrap();
            assert!((told - both / (to - from)).abs() < 1e-3, "{told}: {step}");
            (trained, beside, steps_ahead) = (trained + to - from, beside + both, steps_ahead + 1);
        }
        assert_eq!(steps_ahead, 20);
        beside / trained
    };
    let (beside, serial) = (share("two", "cluster.samplers=1"), share("one", "cluster.samplers=0"));
    println!("{beside} {serial}");
    assert!(beside >= 0.5 && serial == 0.0, "{beside} {serial}");
    let [one, two] = ["one", "two"].map(|name| weights(&folder.path().join(name)));
    assert!(one == two);
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
