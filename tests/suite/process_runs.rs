//! Whole runs of several processes under mpirun: the run of one process, whatever kills or stops a process, and what a person is
//! told.
//!
//! A fault is planted in one rank alone, by the environment of its process. No test leaves a process behind, and each looks
//! whether the run did.

use crate::mpirun::{mpirun, text};
use crate::runs::{done, events, finished, least_budget, rehearsal, smoke_with, steps, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest time in which a process must be gone after its run.
const PATIENCE: Duration = Duration::from_secs(20);

/// The smoke run with seed 3 in `out`, as one of the ranks; `own` are settings of this rank alone.
pub fn rank(program: &Path, out: &Path, settings: &[&str], own: &[&str]) -> Vec<String> {
    let mut words = vec![program.display().to_string()];
    words
        .extend(["run", "configs/smoke.toml", "--console", "off", "--seed", "3"].map(String::from));
    words.extend(["--out".to_string(), out.display().to_string()]);
    for assignment in settings.iter().chain(own) {
        words.extend(["--set".to_string(), assignment.to_string()]);
    }
    words
}

pub fn program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_rehearsal"))
}

/// The smoke run over so many ranks.
pub fn over(ranks: usize, out: &Path, settings: &[&str]) -> Command {
    let mut command = mpirun(ranks, &[]);
    command.args(rank(&program(), out, settings, &[]));
    command
}

/// Who of two dies, and before which job: the name of a failpoint with its number.
pub type Death<'a> = (usize, &'a str);

/// Two ranks, one of which kills itself.
fn over_two_with_death(out: &Path, settings: &[&str], death: Death) -> Command {
    over_two_with_fault(out, settings, death, "kill")
}

/// Two ranks, one of which does something else at a failpoint.
fn over_two_with_fault(out: &Path, settings: &[&str], fault: Death, how: &str) -> Command {
    let mut command = mpirun(1, &[]);
    let (odd, point) = fault;
    for place in 0..2 {
        if place > 0 {
            command.args([":", "-n", "1"]);
        }
        if place == odd {
            let witness = out.with_extension("witness");
            command.args(["env".to_string(), format!("REHEARSAL_FAIL_AT={point}")]);
            command.arg(format!("REHEARSAL_FAIL_HOW={how}"));
            command.arg(format!("REHEARSAL_FAIL_WITNESS={}", witness.display()));
        }
        command.args(rank(&program(), out, settings, &[]));
    }
    command
}

/// Processes whose command line names `out`.
fn alive(out: &Path) -> Vec<u32> {
    let own = |entry: std::io::Result<std::fs::DirEntry>| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(out.to_str()?).then_some(pid)
    };
    std::fs::read_dir("/proc").unwrap().filter_map(own).collect()
}

pub fn check_nothing_is_left(out: &Path) {
    let until = Instant::now() + PATIENCE;
    while !alive(out).is_empty() {
        assert!(Instant::now() < until, "processes are left behind: {:?}", alive(out));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The run has every step of the undisturbed run of one process once, with its losses to rounding.
pub fn check_is_the_run_of_one(out: &Path) {
    let key = |step: &Value| (step["stage"].to_string(), step["step"].as_u64().unwrap());
    let expected = steps(finished());
    let got = steps(out);
    assert_eq!(
        got.iter().map(key).collect::<Vec<_>>(),
        expected.iter().map(key).collect::<Vec<_>>()
    );
    for (got, expected) in got.iter().zip(&expected) {
        let [own, other] = [got, expected].map(|step| step["loss"].as_f64().unwrap());
        assert!((own - other).abs() < 1e-3, "{:?}: {own} against {other}", key(got));
    }
}

/// The run failed, everybody who could says why, and nobody is left.
pub fn check_failed(output: &Output, out: &Path, texts: &[&str]) {
    assert!(!output.status.success(), "{}", text(output));
    for part in texts {
        assert!(text(output).contains(part), "{part:?} is not said: {}", text(output));
    }
    check_nothing_is_left(out);
}

/// Steps 1, 2, 4, 8 of pretraining tell what each rank that trains did, which is drawn; no other step does.
fn check_passes_are_taken_down(out: &Path, trainers: usize) {
    for step in steps(out).iter().filter(|step| step["stage"] == "base") {
        let is_told = trainers > 1 && step["step"].as_u64().unwrap().is_power_of_two();
        let passes = step["ranks"].as_array().cloned().unwrap_or_default();
        let mut ranks: Vec<u64> = passes.iter().map(|pass| pass[0].as_u64().unwrap()).collect();
        ranks.dedup();
        let all: Vec<u64> = (0..if is_told { trainers as u64 } else { 0 }).collect();
        assert_eq!(ranks, all, "{step}");
        let of = |name: &str, rank: u64| {
            let passes = passes.iter().filter(|pass| pass[1] == name && pass[0] == rank);
            passes
                .map(|pass| [&pass[2], &pass[3]].map(|at| at.as_f64().unwrap()))
                .collect::<Vec<_>>()
        };
        for rank in all {
            let (forward, update) = (of("forward", rank), of("update", rank));
            assert!(!update.is_empty() && forward.len() == of("weight gradients", rank).len());
            assert!(forward.iter().all(|[start, end]| 0.0 <= *start && start <= end), "{step}");
        }
    }
    assert_eq!(out.join("plots/ranks.svg").exists(), trainers > 1);
}

#[test]
fn runs_of_two_and_four_and_eight_processes_are_the_run_of_one() {
    let folder = TempDir::new().unwrap();
    let layouts: [(usize, &[&str]); 6] = [
        (2, &["cluster.data=2"]),
        (2, &["cluster.pipeline=2"]),
        (
            4,
            &[
                "cluster.data=2",
                "cluster.pipeline=2",
                "cluster.expert=2",
                "cluster.rollout.expert=2",
            ],
        ),
        (8, &["cluster.data=8", "cluster.expert=4"]),
        // One that trains, and two that sample and share the experts.
        (3, &["cluster.samplers=2", "cluster.rollout.expert=2"]),
        // And two that sample and share the heads.
        (3, &["cluster.samplers=2", "cluster.rollout.tensor=2"]),
    ];
    for (at, (ranks, settings)) in layouts.into_iter().enumerate() {
        let out = folder.path().join(format!("run-{at}"));
        done(over(ranks, &out, settings));
        check_is_the_run_of_one(&out);
        check_nothing_is_left(&out);
        check_passes_are_taken_down(&out, if ranks == 3 { 1 } else { ranks });
        let has_exchanges = settings.iter().any(|setting| setting.starts_with("cluster.expert="));
        for step in steps(&out) {
            let covered = step["all_to_all"]["covered"].as_f64();
            assert_eq!(covered.is_some(), has_exchanges, "{step}");
            assert!(covered.is_none_or(|covered| (0.0..=1.0).contains(&covered)), "{step}");
        }
        // Where layouts of training and sampling differ, each alignment step tells what the switch moved: no byte too much.
        let differ = settings.contains(&"cluster.pipeline=2") || ranks == 8 || ranks == 3;
        for step in steps(&out).iter().filter(|step| step["kind"] == "grpo") {
            // Samplers load the stage's first version for themselves.
            let is_loaded = ranks == 3 && step["step"] == 1;
            let switch = &step["switch"];
            assert_eq!(switch.is_object(), differ && !is_loaded, "{settings:?}: {switch}");
            assert_eq!(switch["moved_bytes"], switch["least_bytes"]);
        }
        assert!(out.join("export/config.json").exists());
        let told = events(&out, "run").pop().unwrap()["processes"].to_string();
        assert!(told.contains(&format!("{ranks} processes on ")), "{told}");
        assert!(told.contains(" over ") && told.contains("without fault tolerance"), "{told}");
    }
}

#[test]
fn what_mpirun_passes_on_into_a_log_is_lines_without_a_bar() {
    let folder = TempDir::new().unwrap();
    let mut words = rank(&program(), &folder.path().join("run"), &["cluster.data=2"], &[]);
    words.iter_mut().filter(|word| *word == "off").for_each(|word| *word = "plain".to_string());
    let mut shown = mpirun(2, &[]);
    shown.args(words);
    // Each process has a terminal of mpirun's.
    let text = text(&done(shown));
    assert!(text.contains("\nbase 20/20  loss ") && !text.contains("]   0%"), "{text}");
}

/// One process after the other dies before its job and is named; the same command goes on to the same end as `rest` says:
/// over so many processes, with these settings. Tells how many steps were computed again after the last death.
pub fn check_deaths(settings: &[&str], deaths: &[Death], rest: (usize, &[&str])) -> u64 {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let settings = [settings, &[OFTEN]].concat();
    for (dying, job) in deaths {
        let output = over_two_with_death(&out, &settings, (*dying, job)).output().unwrap();
        let witness = out.with_extension("witness");
        let point = std::fs::read_to_string(&witness).unwrap_or_default();
        assert_eq!(point.trim(), job.split(':').next().unwrap(), "{}", text(&output));
        std::fs::remove_file(witness).unwrap();
        let named = format!("rank {} of 2 ends: rank {dying} is gone", 1 - dying);
        check_failed(&output, &out, &[&named, "the control link of process"]);
        if *dying > 0 {
            check_says_how_to_go_on(&out, *dying);
        }
    }
    let before = steps(&out).len();
    let (ranks, settings) = rest;
    let settings = [settings, &[OFTEN]].concat();
    match ranks {
        1 => drop(done(smoke_with(&out, &settings))),
        ranks => drop(done(over(ranks, &out, &settings))),
    }
    check_is_the_run_of_one(&out);
    let computed = events(&out, "end").pop().unwrap()["computed_steps"].as_u64().unwrap();
    let again = (before as u64 + computed) - steps(&out).len() as u64;
    assert!(again <= 3, "{again} steps were computed again, {deaths:?}");
    check_nothing_is_left(&out);
    again
}

/// Commits every third step.
const OFTEN: &str = "checkpoint.every_steps=3";

/// The journal and the board of a run that ended with a rank tell who is gone, and the command that goes on.
fn check_says_how_to_go_on(out: &Path, gone: usize) {
    let end = events(out, "end").pop().unwrap();
    assert_eq!(end["state"], "failed");
    assert!(end["reason"].as_str().unwrap().contains(&format!("rank {gone} is gone")), "{end}");
    let status = rehearsal(&["status", out.to_str().unwrap()]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        status.contains("go on with: mpirun -n 2 ")
            && status.contains("/rehearsal run configs/smoke.toml"),
        "{status}"
    );
}

#[test]
fn a_process_that_dies_in_training_is_named_and_the_same_command_goes_on() {
    check_deaths(&["cluster.data=2"], &[(1, "Train:8")], (2, &["cluster.data=2"]));
}

#[test]
fn a_process_that_dies_in_sampling_is_named_and_one_process_goes_on() {
    check_deaths(&["cluster.data=2"], &[(1, "Generate:2")], (1, &[]));
}

#[test]
fn a_process_that_dies_while_the_policy_is_saved_or_loaded_is_named() {
    // The second is rank 0, which has the actors and everybody's control link.
    let deaths = [(1, "Save:2"), (0, "Restore:1")];
    check_deaths(&["cluster.data=2"], &deaths, (2, &["cluster.data=2"]));
}

/// The process of a rank.
pub fn process_of(out: &Path, rank: usize) -> Option<Pid> {
    let is_rank = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let name = format!("OMPI_COMM_WORLD_RANK={rank}");
        environment.split(|byte| *byte == 0).any(|variable| variable == name.as_bytes())
    };
    let pid = alive(out).into_iter().find(is_rank)?;
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// A run of two over many steps, on its way.
fn begun(out: &Path, settings: &[&str]) -> Child {
    let mut command = over(2, out, settings);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, out, "step");
    child
}

const LONG: [&str; 2] = ["cluster.data=2", "stage.base.steps=5000"];

/// The status of a run tells whom rank 0's device waits for, and that nothing is heard of that one.
fn check_is_waited_for(out: &Path, rank: usize) {
    let told = format!("worker waits for rank {rank} (");
    let until = Instant::now() + PATIENCE;
    loop {
        let status = rehearsal(&["status", out.to_str().unwrap()]).output().unwrap();
        let status = String::from_utf8_lossy(&status.stdout).into_owned();
        if status.contains(&told) && status.contains("no word of it for") {
            return;
        }
        assert!(Instant::now() < until && status.contains("running"), "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_process_that_hangs_is_named_within_the_deadline_and_ended() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let child = begun(&out, &[LONG[0], LONG[1], "cluster.deadline_seconds=6"]);
    let stopped = process_of(&out, 1).unwrap();
    let began = Instant::now();
    kill_process(stopped, Signal::STOP).unwrap();
    check_is_waited_for(&out, 1);
    let output = child.wait_with_output().unwrap();
    let seconds = began.elapsed().as_secs_f64();
    check_failed(&output, &out, &["rank 0 of 2 ends: rank", "rank 1", "for 6 s; "]);
    assert!(seconds < 20.0, "after {seconds} s");
}

/// Few steps, and a deadline of two seconds.
const SHORT: [&str; 4] = [
    "cluster.data=2",
    "stage.base.steps=6",
    "checkpoint.every_steps=3",
    "cluster.deadline_seconds=2",
];

#[test]
fn a_process_that_works_for_longer_than_the_deadline_ends_no_run() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    // From its first layer on, each of them takes a part of the deadline, and a step several deadlines.
    let mut slow = over_two_with_fault(&out, &SHORT, (1, "layer-backward:1"), "delay:700");
    let (began, mut child) = (Instant::now(), slow.spawn().unwrap());
    let until = began + 3 * PATIENCE;
    while steps(&out).len() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        assert!(Instant::now() < until, "no step was made");
        std::thread::sleep(Duration::from_millis(20));
    }
    let seconds = steps(&out)[1]["seconds"].as_f64().unwrap();
    assert!(seconds > 2.0, "a step takes longer than the deadline: {seconds} s");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    check_nothing_is_left(&out);
}

#[test]
fn a_process_that_is_stuck_is_named_with_what_it_did_last() {
    let folder = TempDir::new().unwrap();
    for (point, last) in [
        ("layer-backward:3", "the last that it did was a layer's"),
        ("tensor-written:5", "the last that it did was to write a tensor"),
    ] {
        let out = folder.path().join(point.replace(':', "-"));
        let began = Instant::now();
        let output = over_two_with_fault(&out, &SHORT, (1, point), "hang").output().unwrap();
        let late =
            ["rank 0 of 2 ends: rank 0 waited in", "for rank 1, which made no progress for 2 s"];
        check_failed(&output, &out, &[late[0], late[1], last]);
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    }
}

#[test]
fn ctrl_c_ends_all_processes_after_a_commit_and_the_command_goes_on() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let settings = [LONG[0], LONG[1], "checkpoint.every_steps=1000"];
    let mut command = over(2, &out, &settings);
    // mpirun asks after so many seconds, and kills as many later: one by default, which a busy machine may not keep.
    command.env("OMPI_MCA_odls_base_sigkill_timeout", "4");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, &out, "step");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    check_failed(
        &output,
        &out,
        &["is committed; go on with\n", "--oversubscribe -n 2 ", "--resume"],
    );
    let said = text(&output);
    let go_on = said.lines().skip_while(|line| !line.ends_with("go on with")).nth(1).unwrap();
    let (last, commit) = (steps(&out).pop().unwrap(), events(&out, "commit").pop().unwrap());
    assert_eq!((&commit["stage"], &commit["step"]), (&last["stage"], &last["step"]));
    assert_eq!(events(&out, "end").pop().unwrap()["state"], "stopped");

    let stopped = steps(&out).len();
    // As it was said, options of mpirun included.
    let mut again = Command::new("sh");
    again.args(["-c", &format!("exec {}", go_on.trim())]).stdout(Stdio::null());
    let plain = mpirun(2, &[]);
    again.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut again = again.current_dir(env!("CARGO_MANIFEST_DIR")).spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    while steps(&out).len() == stopped {
        assert!(Instant::now() < until && again.try_wait().unwrap().is_none(), "it does not go on");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_child(&again), Signal::TERM).unwrap();
    again.wait().unwrap();
    let next = steps(&out)[stopped]["step"].as_u64();
    assert_eq!(next, last["step"].as_u64().map(|step| step + 1), "no step was computed again");
    check_nothing_is_left(&out);
}

#[test]
fn a_process_without_instructions_for_integers_has_all_of_them_sample_from_f32() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let settings = ["cluster.data=2", "engine.exact=false", "stage.align.rollout_dtype=int8"];
    let mut second = vec!["env".to_string(), "REHEARSAL_ISA=portable".to_string()];
    second.extend(rank(&program(), &out, &settings, &[]));
    let mut command = mpirun(1, &[]);
    command.args(rank(&program(), &out, &settings, &[]));
    command.args([":", "-n", "1"]).args(second);
    done(command);
    let aligned: Vec<Value> =
        steps(&out).into_iter().filter(|step| step["kind"] == "grpo").collect();
    assert!(!aligned.is_empty() && aligned.iter().all(|step| step["rollout_dtype"] == "f32"));
    let told = events(&out, "run").pop().unwrap()["processes"].as_str().unwrap().to_string();
    let told: Vec<&str> = told.lines().filter(|line| line.starts_with("rank 1, process")).collect();
    assert!(told.len() == 1 && told[0].ends_with("all ranks sample from f32 weights"), "{told:?}");
}

#[test]
fn a_budget_that_a_rank_does_not_fit_into_is_refused_once_and_one_that_just_fits_is_kept() {
    let folder = TempDir::new().unwrap();
    const HEAVY: &str = "model.n_routed_experts=64";
    let layouts: [(usize, &[&str]); 5] = [
        (2, &["cluster.data=2", "cluster.expert=2"]),
        (2, &["cluster.pipeline=2", "cluster.schedule=zb-h1"]),
        (2, &["cluster.samplers=1"]),
        (
            4,
            &[
                "cluster.data=2",
                "cluster.pipeline=2",
                "cluster.expert=2",
                "cluster.rollout.expert=4",
            ],
        ),
        (2, &["cluster.data=2", "cluster.rollout.tensor=2", HEAVY]),
    ];
    for (number, (ranks, layout)) in layouts.into_iter().enumerate() {
        let settings = [layout, &["engine.threads=1"]].concat();
        let least = least_budget(&settings);
        let run = |budget: u64, name: &str| {
            let out = folder.path().join(format!("{name}-{number}"));
            let budget = format!("engine.budget={budget}");
            (over(ranks, &out, &[&settings[..], &[&*budget]].concat()), out)
        };
        let (mut refused, out) = run(least - 1, "refused");
        let output = refused.output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{}", text(&output));
        check_failed(&output, &out, &["needs", "in phase", &format!("engine.budget = {least} (")]);
        assert_eq!(text(&output).matches("error: ").count(), 1, "{}", text(&output));
        assert!(!out.exists(), "nothing was begun");
        let (allowed, out) = run(least, "allowed");
        done(allowed);
        if !layout.contains(&HEAVY) {
            check_is_the_run_of_one(&out);
        }
        let high_water = |step: &Value| step["memory_high_water"].as_u64().unwrap();
        assert!(steps(&out).iter().all(|step| high_water(step) <= least));
    }
}
