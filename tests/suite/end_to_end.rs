//! Whole runs through the binary: every stage kind, equal bytes, and kills that change none.

use crate::runs::{
    check_each_step_once, check_refused, check_says, done, events, finished, instruction_sets,
    rehearsal, smoke, smoke_with, steps, weights,
};
use rehearsal_kernels::random::{self, Stream};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use tempfile::TempDir;

fn each_step_once(run: &Path) {
    check_each_step_once(run, finished());
}

#[test]
fn a_run_goes_through_every_kind_of_stage_and_exports() {
    let run = finished();
    let kinds: BTreeSet<String> =
        steps(run).iter().map(|s| s["kind"].as_str().unwrap().to_string()).collect();
    let all = ["pretrain", "long-context", "sft", "reward-model", "grpo"];
    assert_eq!(kinds, all.map(str::to_string).into_iter().collect());
    each_step_once(run);
    for step in steps(run).iter().filter(|s| s["kind"] == "grpo") {
        assert_eq!(step["logprob_gap_max"].as_f64(), Some(0.0), "{step}");
        for key in
            ["reward_mean", "kl", "entropy", "clip_share", "length_mean", "zero_variance_groups"]
        {
            assert!(step[key].is_number(), "{key}");
        }
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        assert!(run.join("export").join(file).exists(), "{file}");
    }
}

#[test]
fn every_step_tells_what_it_made_of_the_machine_whose_rates_stand_in_the_first_line() {
    let run = finished();
    let machine = &events(run, "run")[0]["machine"];
    let rates = &machine["all_threads"];
    assert_eq!(rates["threads"], 2);
    for rate in ["f32_flops_per_second", "l2_bytes_per_second", "l3_bytes_per_second"] {
        assert!(rates[rate].as_f64().unwrap() > 1e6, "{rate}: {rates}");
    }
    assert!(rates["dram_bytes_per_second"].is_null(), "a small run is not to grow by measuring");
    assert!(machine["seconds"].as_f64().unwrap() < 2.0, "{machine}");
    for step in steps(run) {
        let number = |key: &str| step[key].as_f64().unwrap_or_else(|| panic!("{key}: {step}"));
        let share = if step["kind"] == "grpo" { "rfu" } else { "useful_share" };
        assert!(number(share) > 0.0 && number(share) <= 1.0, "{share}: {step}");
        if step["kind"] != "grpo" {
            continue;
        }
        assert!(number("rollout_bandwidth") > 0.0 && number("rollout_bandwidth") <= 1.0, "{step}");
        assert!(number("tail_factor") > 0.1 && number("tail_factor") < 100.0, "{step}");
        assert_eq!(number("padding_share"), 0.0, "prompts are shared and nothing is padded");
        let exposed = step["exposed_seconds"].as_object().unwrap();
        let names: Vec<&str> = exposed.keys().map(String::as_str).collect();
        assert_eq!(names, ["reward", "reference", "sync", "offload"]);
        let seconds: Vec<f64> = exposed.values().map(|value| value.as_f64().unwrap()).collect();
        // This machine has room for all models, so that nothing moves.
        let (offload, others) = seconds.split_last().unwrap();
        assert!(*offload == 0.0 && others.iter().all(|seconds| *seconds > 0.0), "{step}");
        assert!(step["offload"].is_null() && step["offload_exposed_share"].is_null(), "{step}");
        assert!(seconds.iter().sum::<f64>() < number("seconds"), "{step}");
    }
}

#[test]
fn every_bench_tells_the_most_that_the_machine_allows_and_stays_below() {
    for line in ["train", "generate --dtype int8", "generate", "grpo --steps 1"] {
        let mut words = vec!["bench"];
        words.extend(line.split(' '));
        words.extend(["--model", "configs/model/smoke.json", "--json"]);
        let output = done(rehearsal(&words));
        let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number =
            |key: &str| figures[key].as_f64().unwrap_or_else(|| panic!("{key}: {figures}"));
        let (rate, limit) = (number("tokens_per_second"), number("limit_tokens_per_second"));
        assert!(0.0 < rate && rate < limit && limit < 1e12, "{line}: {rate} of {limit}");
        assert_eq!(figures.get("rfu").is_some(), line.starts_with("grpo"), "{line}");
        if line.starts_with("grpo") {
            assert!(number("rfu") > 0.0 && number("rfu") < 1.0, "{figures}");
        }
    }
}

#[test]
fn a_finished_group_is_scored_while_others_are_generated() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    // The four samples of a group at a time: the first group is whole long before the last one begins.
    done(smoke_with(&out, &["engine.decode_batch=4"]));
    let overlaps = |step: &Value| {
        let [judge, generate] = ["judge", "generate"].map(|name| &step["intervals"][name]);
        judge[0].as_f64().zip(generate[1].as_f64()).is_some_and(|(begins, ends)| begins < ends)
    };
    assert!(steps(&out).iter().any(overlaps), "scoring begins before generation ends");
    assert!(weights(&out) == weights(finished()), "the batch mix changes no bit");
}

#[test]
fn threads_change_no_byte_and_a_lost_scorer_or_generator_changes_none_either() {
    let folder = TempDir::new().unwrap();
    for (name, variable, threads) in [
        ("one-thread", "", "1"),
        ("scorer", "panic:reward-scorer:3", "2"),
        ("generator", "panic:rollout-generator:2", "2"),
    ] {
        let out = folder.path().join(name);
        let mut command = smoke(&out, &["--threads", threads]);
        if !variable.is_empty() {
            command.env("REHEARSAL_INJECT", variable);
        }
        done(command);
        assert!(weights(&out) == weights(finished()), "{name}: other weights");
        let has = |name: &str| !events(&out, name).is_empty();
        assert_eq!(
            (has("inject"), has("restart")),
            (!variable.is_empty(), !variable.is_empty()),
            "{name}"
        );
        each_step_once(&out);
    }
}

#[test]
fn the_instruction_set_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    let mut unknown = smoke(&folder.path().join("unknown"), &[]);
    unknown.env("REHEARSAL_ISA", "sse9");
    check_refused(unknown, 2, &["REHEARSAL_ISA = \"sse9\"", "portable", "leave the variable out"]);
    for isa in instruction_sets() {
        let out = folder.path().join(isa);
        let mut command = smoke(&out, &["--threads", "5"]);
        command.env("REHEARSAL_ISA", isa);
        check_says(&done(command), &["5 threads on", "no more than"]);
        assert!(weights(&out) == weights(finished()), "{isa} gives other weights");
    }
}

#[test]
fn a_director_that_dies_in_mid_step_changes_no_byte() {
    let folder = TempDir::new().unwrap();
    // Two updates a step: the second is under way, or still to be sent, when the Director is gone.
    let twice = ["--set", "stage.align.updates=2"];
    let undisturbed = folder.path().join("undisturbed");
    done(smoke(&undisturbed, &twice));
    for place in ["ScoreGroups:2", "UpdatePolicy:3", "CommitCheckpoint:9", "KeepArtefact:6"] {
        let out = folder.path().join(place.replace(':', "-"));
        let mut command = smoke(&out, &twice);
        command.env("REHEARSAL_INJECT", format!("panic:director:{place}"));
        done(command);
        assert!(weights(&out) == weights(&undisturbed), "{place}: other weights");
        let message = place.split(':').next().unwrap();
        assert!(events(&out, "inject").iter().any(|event| event["message"] == message));
        let restarts = events(&out, "restart");
        assert!(restarts.len() == 1 && restarts[0]["actor"] == "director", "{restarts:?}");
        each_step_once(&out);
    }
}

/// Where a run is killed: what the failpoint is called, and how often it is passed at least.
const KILLS: [(&str, &str, u64); 5] = [
    ("mid-checkpoint", "checkpoint-write", 1200),
    ("mid-generation", "mid-generation", 16),
    ("mid-gradient", "mid-gradient", 42),
    ("mid-export", "export-write", 40),
    ("between stages", "between-stages", 6),
];

/// Steps that a resumed run has to compute again: those in the journal that no checkpoint holds.
fn steps_since_the_last_commit(run: &Path) -> u64 {
    let newest = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten();
    let newest = newest.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let newest = newest.filter(|name| !name.starts_with("tmp-")).max();
    let steps = steps(run);
    let Some(newest) = newest else { return steps.len() as u64 };
    let held = |step: &Value| {
        newest.ends_with(&format!("-{}-{}", step["stage"].as_str().unwrap(), step["step"]))
    };
    let last = steps.iter().position(held).expect("a step is in the journal before its commit");
    (steps.len() - 1 - last) as u64
}

#[test]
fn a_kill_anywhere_changes_nothing_and_repeats_only_the_steps_since_the_last_commit() {
    let folder = TempDir::new().unwrap();
    let mut recomputed_somewhere = false;
    for seed in 1..=5_u64 {
        let (name, point, passages) = KILLS[(seed as usize - 1) % KILLS.len()];
        let passage = 1 + random::below(seed, Stream::Data, [0; 4], passages);
        let (out, witness) =
            (folder.path().join(seed.to_string()), folder.path().join(format!("{seed}.witness")));
        let mut killed = smoke(&out, &[]);
        killed.env("REHEARSAL_FAIL_AT", format!("{point}:{passage}"));
        killed.env("REHEARSAL_FAIL_WITNESS", &witness);
        let status = killed.output().unwrap().status;
        let place = format!("seed {seed}: {name} at passage {passage}");
        assert!(!status.success() && witness.exists(), "{place} never came: {status}");

        let (before, repeatable) = (steps(&out).len(), steps_since_the_last_commit(&out));
        done(smoke(&out, &["--resume"]));
        assert!(weights(&out) == weights(finished()), "{place}: other weights after a resume");
        each_step_once(&out);
        let end = events(&out, "end").pop().unwrap();
        let new = (steps(&out).len() - before) as u64;
        let again = end["computed_steps"].as_u64().unwrap() - new;
        assert!(
            again <= repeatable,
            "{place}: {again} steps were computed again, {repeatable} were not committed"
        );
        recomputed_somewhere |= again > 0;
        println!("{place}: {before} steps before, {again} computed again, {new} new");
    }
    assert!(recomputed_somewhere, "no kill fell between two commits: choose other seeds");
}
