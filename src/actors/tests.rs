//! The actors at work on real files with a stand-in for the device: whole runs, and runs with every
//! kind of fault.
//!
//! The stand-in's "weights" are a hash of everything that was trained on, in order: two runs with
//! equal weights made the same steps. It writes down every call.

mod ahead;
mod fake_device;
mod faults;
mod plans;
mod ports;
mod ranks;
mod utilisation;

use super::bench::{self, BenchRequest};
use super::company::{Seats, Setup, run};
use super::mail::Mail;
use super::messages::*;
use super::port::Limits;
use super::post::Injection;
use super::stage_plan::Folders;
use crate::config::{ConsoleMode, RunConfig, StageKind};
use crate::console::{Event, read_events};
use fake_device::{Fake, Script};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::time::Duration;

const CONFIG: &str = r#"
seed = 5
[model]
vocab_size = 300
hidden_size = 8
num_hidden_layers = 1
first_k_dense_replace = 1
intermediate_size = 16
moe_intermediate_size = 8
n_routed_experts = 2
n_shared_experts = 1
num_experts_per_tok = 1
num_attention_heads = 1
kv_lora_rank = 4
qk_nope_head_dim = 4
qk_rope_head_dim = 2
v_head_dim = 4
max_position_embeddings = 64
[tokenizer]
vocab_size = 270
train_on = ["texts"]
[data]
held_out = ["held-out"]
[data.sets.texts]
file = "texts.jsonl"
schema = "text"
[data.sets.talks]
file = "talks.jsonl"
schema = "messages"
[data.sets.pairs]
file = "pairs.jsonl"
schema = "preferences"
[data.sets.prompts]
file = "prompts.jsonl"
schema = "prompts"
[data.sets.held-out]
file = "held-out.jsonl"
schema = "prompts"
[engine]
restarts = 2
[checkpoint]
every_steps = 2
[[stage]]
name = "base"
kind = "pretrain"
data = [{ set = "texts" }]
steps = 3
batch = 2
sequence = 32
[[stage]]
name = "talk"
kind = "sft"
data = "talks"
batch = 2
[[stage]]
name = "nice"
kind = "reward-model"
data = "pairs"
batch = 2
[[stage.eval]]
name = "agrees"
data = "pairs"
metric = "accuracy"
[[stage]]
name = "align"
kind = "grpo"
data = "prompts"
steps = 3
prompts = 2
group_size = 2
max_new_tokens = 4
reward = [{ verifier = "exact" }, { model = "nice", weight = 0.5 }]
[[stage.eval]]
name = "solved"
data = "held-out"
verifier = "exact"
max_new_tokens = 4
before = true
every = 2
show = 1
"#;

/// A folder with a config and its files.
struct Place {
    folder: tempfile::TempDir,
}

/// How a run is disturbed.
#[derive(Clone, Default)]
struct Disturbance {
    inject: &'static str,
    script: Script,
    set: &'static [&'static str],
    deadline: Option<Duration>,
    stop: Arc<AtomicI32>,
}

/// What came of a run.
struct Result {
    outcome: Outcome,
    calls: Vec<String>,
    events: Vec<Event>,
}

impl Place {
    fn new() -> Place {
        Place::with(CONFIG)
    }

    fn with(config: &str) -> Place {
        let folder = tempfile::tempdir().unwrap();
        let lines =
            |line: &dyn Fn(usize) -> String| (0..6).map(|i| line(i) + "\n").collect::<String>();
        let files = [
            ("run.toml", config.to_string()),
            (
                "texts.jsonl",
                lines(&|i| format!(r#"{{"text": "a text with number {i} and some more words"}}"#)),
            ),
            (
                "talks.jsonl",
                lines(&|i| {
                    format!(
                        r#"{{"messages": [{{"role": "user", "content": "say {i}"}}, {{"role": "assistant", "content": "{i}"}}]}}"#
                    )
                }),
            ),
            (
                "pairs.jsonl",
                lines(&|i| {
                    format!(
                        r#"{{"prompt": "rate {i}", "chosen": "good {i}", "rejected": "bad {i}"}}"#
                    )
                }),
            ),
            ("prompts.jsonl", lines(&|i| format!(r#"{{"prompt": "ask {i}", "answer": "{i}"}}"#))),
            ("held-out.jsonl", lines(&|i| format!(r#"{{"prompt": "quiz {i}", "answer": "{i}"}}"#))),
        ];
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Place { folder }
    }

    fn run_folder(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn run(&self, disturbance: &Disturbance) -> Result {
        self.run_visited(disturbance, |_| {})
    }

    fn run_visited(&self, disturbance: &Disturbance, visit: impl FnOnce(&Seats)) -> Result {
        let fake = Fake::new(disturbance.script.clone(), &self.config(disturbance.set));
        self.run_on(&fake, disturbance, None, visit)
    }

    fn run_on(
        &self,
        fake: &Fake,
        disturbance: &Disturbance,
        mail: Option<Arc<Mail>>,
        visit: impl FnOnce(&Seats),
    ) -> Result {
        let config = self.config(disturbance.set);
        std::fs::create_dir_all(self.run_folder()).unwrap();
        let calls = fake.calls();
        let deadline = disturbance.deadline.unwrap_or(Duration::from_secs(60));
        let setup = Setup {
            limits: Limits { deadline, ..Limits::of(&config.engine) },
            config: Arc::new(config),
            folders: Folders { run: self.run_folder(), config: self.folder.path().to_path_buf() },
            console: Some(ConsoleMode::Off),
            machine: utilisation::machine(),
            device: fake.maker(),
            sampler: (fake.samples && mail.is_none()).then(|| fake.maker()),
            injection: Arc::new(Injection::parse(disturbance.inject).unwrap()),
            bench: None,
            stop: Arc::clone(&disturbance.stop),
            processes: mail.as_ref().map(|_| "three threads".to_string()),
            mail,
        };
        let outcome = run(setup, visit).unwrap();
        let events = read_events(&self.run_folder().join("journal.jsonl")).unwrap();
        let calls = calls.lock().unwrap().clone();
        Result { outcome, calls, events }
    }

    fn config(&self, set: &[&str]) -> RunConfig {
        let assignments: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        RunConfig::load(&self.folder.path().join("run.toml"), &assignments).unwrap().config
    }

    /// The last policy's weights.
    fn weights(&self) -> Vec<u8> {
        std::fs::read(self.run_folder().join("stages/04-align/model.safetensors")).unwrap()
    }
}

impl Result {
    fn named(&self, name: &str) -> Vec<&Event> {
        self.events.iter().filter(|event| event.name() == name).collect()
    }

    fn steps(&self) -> Vec<(String, u64)> {
        let key = |e: &&Event| (e.text("stage").unwrap().to_string(), e.whole("step").unwrap());
        self.named("step").iter().map(key).collect()
    }

    fn failure(&self) -> &Failure {
        match &self.outcome {
            Outcome::Failed(failure) => failure,
            other => panic!("the run did not fail: {other:?}"),
        }
    }
}

fn all_steps() -> Vec<(String, u64)> {
    ["base", "talk", "nice", "align"]
        .iter()
        .flat_map(|stage| (1..=3).map(|n| (stage.to_string(), n)))
        .collect()
}

fn rollout_keys(run: &Path) -> BTreeMap<(u64, u64, u64), usize> {
    let text = std::fs::read_to_string(run.join("rollouts/align.jsonl")).unwrap();
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let key = |name: &str| line[name].as_u64().unwrap();
        *counts.entry((key("step"), key("slot"), key("sample"))).or_default() += 1;
    }
    counts
}

#[test]
fn a_run_goes_through_every_stage_and_exports() {
    let place = Place::new();
    let done = place.run(&Disturbance::default());
    assert_eq!(done.outcome, Outcome::Done);
    assert_eq!(done.steps(), all_steps());
    for stage in ["01-base", "02-talk", "03-nice", "04-align"] {
        let folder = place.run_folder().join("stages").join(stage);
        assert!(folder.join("tokenizer.json").exists(), "{stage}");
    }
    assert!(place.run_folder().join("export/config.json").exists());
    let step =
        done.named("step").into_iter().find(|event| event.text("kind") == Some("grpo")).unwrap();
    for key in [
        "loss",
        "reward_mean",
        "rewards",
        "kl",
        "entropy",
        "clip_share",
        "length_mean",
        "memory",
        "intervals",
    ] {
        assert!(step.get(key).is_some(), "{key} in {step:?}");
    }
    let evals: Vec<_> = done
        .named("eval")
        .iter()
        .map(|e| (e.text("name").unwrap(), e.whole("step").unwrap()))
        .collect();
    assert_eq!(evals, [("agrees", 3), ("solved", 0), ("solved", 2), ("solved", 3)]);
    assert!(done.named("eval").last().unwrap().get("replies").is_some());
    let counts = rollout_keys(&place.run_folder());
    assert_eq!((counts.len(), counts.values().max()), (3 * 2 * 2, Some(&1)));
    // The reward model's scale was fitted before its artefact was saved; the reference is the
    // stage's start.
    let at = |needle: &str| {
        done.calls
            .iter()
            .position(|call| call.contains(needle))
            .unwrap_or_else(|| panic!("{needle}"))
    };
    assert!(at("calibrate") < at("save 03-nice"));
    assert!(
        done.calls
            .iter()
            .any(|call| call.contains("prepare") && call.contains("reference=02-talk")),
        "{:?}",
        done.calls
    );
}

#[test]
fn rollouts_are_sampled_as_the_stage_says_and_evals_from_f32() {
    let set = &["engine.exact=false", "stage.align.rollout_dtype=bf16"];
    let done = Place::new().run(&Disturbance { set, ..Disturbance::default() });
    assert_eq!(done.outcome, Outcome::Done);
    let (mut phase, mut sampled) = ("", Vec::new());
    for call in &done.calls {
        match call.strip_prefix("phase ") {
            Some(entered) => phase = entered,
            None if call.starts_with("generate 2 ") => sampled.push(("step", phase)),
            None if call.starts_with("generate ") => sampled.push(("eval", phase)),
            None => {}
        }
    }
    let [step, eval] = [("step", "Generate bf16"), ("eval", "Generate")];
    assert_eq!(sampled, [eval, step, step, eval, step, eval]);
    let steps = done.named("step");
    assert_eq!(steps.last().unwrap().text("rollout_dtype"), Some("bf16"));
    assert!(done.named("fallback").is_empty());
}

#[test]
fn a_group_is_judged_while_others_are_sampled() {
    let place = Place::new();
    // The stand-in does not end its second group before the first was judged: without overlap it
    // waits for ever.
    let disturbance = Disturbance {
        script: Script { await_judge: true, ..Script::default() },
        ..Disturbance::default()
    };
    let script = disturbance.script.clone();
    let done = place
        .run_visited(&disturbance, |seats| script.watch(&seats.desk("reward-scorer").unwrap()));
    assert_eq!(done.outcome, Outcome::Done);
    for step in done.named("step").iter().filter(|event| event.text("kind") == Some("grpo")) {
        let interval =
            |name: &str, end: usize| step.get("intervals").unwrap()[name][end].as_f64().unwrap();
        assert!(interval("judge", 0) < interval("generate", 1), "{step:?}");
    }
}

#[test]
fn a_signal_ends_the_run_after_a_commit_and_the_next_run_ends_with_the_same_weights() {
    let undisturbed = Place::new();
    undisturbed.run(&Disturbance::default());
    for step in [2, 5, 7, 10] {
        let place = Place::new();
        let stop = Arc::new(AtomicI32::new(0));
        let script =
            Script { signal_in_train: Some((step, Arc::clone(&stop))), ..Script::default() };
        let stopped = place.run(&Disturbance { script, stop, ..Disturbance::default() });
        assert_eq!(stopped.outcome, Outcome::Stopped(15), "step {step}");
        assert_eq!(stopped.steps().len() as u64, step, "the step was finished and no other begun");
        let done = place.run(&Disturbance::default());
        assert_eq!(done.outcome, Outcome::Done, "step {step}");
        assert_eq!(done.steps(), all_steps(), "step {step}");
        assert_eq!(
            done.calls.iter().filter(|call| call.starts_with("train")).count() as u64,
            12 - step
        );
        assert_eq!(place.weights(), undisturbed.weights(), "step {step}");
    }
}

#[test]
fn a_grpo_stage_that_comes_first_keeps_the_initial_weights_as_its_reference() {
    let (head, stages) = CONFIG.split_once("[[stage]]").unwrap();
    let align = stages
        .split("[[stage]]")
        .last()
        .unwrap()
        .replace(", { model = \"nice\", weight = 0.5 }", "");
    let place = Place::with(&format!("{head}[[stage]]{align}"));
    let stop = Arc::new(AtomicI32::new(0));
    let script = Script { signal_in_train: Some((2, Arc::clone(&stop))), ..Script::default() };
    let stopped = place.run(&Disturbance { script, stop, ..Disturbance::default() });
    assert_eq!(stopped.outcome, Outcome::Stopped(15));
    assert_eq!(
        stopped.calls[..3],
        ["prepare fresh reference= rewards=[]", "save 00-initial", READY]
    );
    let done = place.run(&Disturbance::default());
    assert_eq!(done.outcome, Outcome::Done);
    assert_eq!(done.calls[..2], [READY, "restore 000001-align-2"], "the reference is found again");
}

const READY: &str = "prepare 00-initial reference=00-initial rewards=[]";

#[test]
fn a_missed_gate_stops_the_run_and_leaves_no_artefact() {
    let gated = format!("{CONFIG}[stage.gate]\neval = \"solved\"\nminimum = 0.9\n");
    let place = Place::with(&gated);
    // Running it again does not slip through: the gate stands before the artefact.
    for _ in 0..2 {
        let failed = place.run(&Disturbance::default());
        let text = &failed.failure().text;
        assert!(text.contains("stage \"align\" did not reach its gate: solved = "), "{text}");
        assert!(!place.run_folder().join("stages/04-align").exists());
    }
}

#[test]
fn a_bench_times_its_steps_and_writes_nothing() {
    let place = Place::new();
    let config = place.config(&[]);
    let StageKind::Grpo(settings) = config.stages[3].kind.clone() else {
        panic!("stage 4 is GRPO")
    };
    let fake = Fake::new(Script::default(), &config);
    let (model, engine, spill) = (config.model, config.engine, place.run_folder());
    let request = BenchRequest {
        model,
        weights: None,
        engine,
        settings,
        prompt_tokens: 3,
        equal_rewards: 0,
        steps: 2,
        seed: 1,
        spill,
        profile: None,
    };
    let outcome = run(bench::setup(request, fake.maker()), |_| {}).unwrap();
    let Outcome::Timed(steps) = outcome else { panic!("{outcome:?}") };
    assert_eq!(steps.len(), 2);
    assert!(
        steps.iter().all(|step| step.new_tokens == 4
            && step.trained_tokens == 10
            && step.useful_flops == utilisation::FLOPS),
        "{steps:?}"
    );
    assert!(!place.run_folder().exists());
    let updates =
        fake.calls().lock().unwrap().iter().filter(|call| call.starts_with("train")).count();
    assert_eq!(updates, 3, "one step warms up");
}
