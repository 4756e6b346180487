//! Exact rollouts on whole runs: sampler and trainer agree to the bit at every step, and how the work is cut moves no byte.
//!
//! A run fits a small reward model and then aligns a model with it, through the binary. Runs that differ in threads, batch
//! mix, pages, micro-batches and instruction set must leave the same figures, rollouts and weights; whether prompts are
//! shared moves a gradient's last bits, so that only runs that agree in it are compared. Mounted by suite and proof.

use crate::runs::{done, finished, rehearsal, steps, weights};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How a run is cut.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    pub threads: usize,
    /// Sequences that decode together at most.
    pub decode_batch: usize,
    pub page_tokens: usize,
    pub share_prompts: bool,
    pub micro_batch: usize,
    /// Instruction set; empty for the best.
    pub isa: &'static str,
}

/// Four ways that differ in everything, two with shared prompts and two without.
pub const WAYS: [Way; 4] = [
    Way {
        threads: 1,
        decode_batch: 128,
        page_tokens: 16,
        share_prompts: true,
        micro_batch: 0,
        isa: "",
    },
    Way {
        threads: 4,
        decode_batch: 3,
        page_tokens: 5,
        share_prompts: true,
        micro_batch: 4,
        isa: "",
    },
    Way {
        threads: 2,
        decode_batch: 1,
        page_tokens: 1,
        share_prompts: false,
        micro_batch: 3,
        isa: "",
    },
    Way {
        threads: 1,
        decode_batch: 9,
        page_tokens: 32,
        share_prompts: false,
        micro_batch: 0,
        isa: "",
    },
];

/// The model that is aligned.
pub struct Subject {
    /// Its config, in `configs/model`.
    pub model: &'static str,
    /// What it starts from; initial weights if absent.
    pub start_from: Option<PathBuf>,
    pub prompts: usize,
    pub group_size: usize,
    pub max_new_tokens: usize,
}

impl Subject {
    /// 29 thousand parameters, as SFT left them. A reply reaches over three blocks of keys.
    pub fn smoke() -> Subject {
        let start_from = Some(finished().join("stages/03-sft"));
        Subject { model: "smoke.json", start_from, prompts: 4, group_size: 4, max_new_tokens: 60 }
    }

    fn toml(&self, way: &Way, steps: u64) -> String {
        let (run, model) = (finished().display(), self.model);
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model");
        let start = match &self.start_from {
            Some(folder) => format!("start_from = \"{}\"", folder.display()),
            None => String::new(),
        };
        let Way { decode_batch, page_tokens, share_prompts, micro_batch, .. } = way;
        let Subject { prompts, group_size, max_new_tokens, .. } = self;
        format!(
            r#"seed = 3
            model = {{ config = "{models}/{model}" }}
            tokenizer = {{ file = "{run}/tokenizer.json" }}
            engine = {{ decode_batch = {decode_batch}, page_tokens = {page_tokens} }}
            [data.sets]
            prompts = {{ file = "{run}/data/prompts-mixed.jsonl", schema = "prompts" }}
            pairs = {{ file = "{run}/data/helpful.jsonl", schema = "preferences" }}
            calibration = {{ file = "{run}/data/helpful-calibration.jsonl", schema = "preferences" }}
            [[stage]]
            name = "helpful"
            kind = "reward-model"
            {start}
            data = "pairs"
            calibration = "calibration"
            batch = 8
            [[stage]]
            name = "align"
            kind = "grpo"
            {start}
            data = "prompts"
            steps = {steps}
            prompts = {prompts}
            group_size = {group_size}
            max_new_tokens = {max_new_tokens}
            temperature = 0.9
            kl_weight = 0.01
            share_prompts = {share_prompts}
            micro_batch = {micro_batch}
            reward = [{{ model = "helpful" }}]
            optimizer = {{ learning_rate = 1e-3 }}
            "#,
            models = models.display()
        )
    }
}

/// What a step computes; how long it took and what it held is not compared.
const FIGURES: [&str; 15] = [
    "step",
    "loss",
    "gradient_norm",
    "tokens",
    "new_tokens",
    "reward_mean",
    "reward_deviation",
    "rewards",
    "kl",
    "entropy",
    "clip_share",
    "length_mean",
    "stopped_by_length",
    "trained_share",
    "logprob_gap_max",
];

/// What a run left.
#[derive(PartialEq)]
pub struct Left {
    figures: Vec<Vec<Value>>,
    rollouts: Vec<u8>,
    weights: BTreeMap<PathBuf, Vec<u8>>,
}

/// Aligns a model for so many steps.
pub fn aligned(subject: &Subject, way: &Way, count: u64, extra: &[&str]) -> Left {
    let folder = tempfile::tempdir().unwrap();
    let (config, out) = (folder.path().join("run.toml"), folder.path().join("run"));
    std::fs::write(&config, subject.toml(way, count)).unwrap();
    let mut command = rehearsal(&["run", "--console", "off", "--threads"]);
    command.arg(way.threads.to_string()).arg("--out").arg(&out).arg(&config).args(extra);
    if !way.isa.is_empty() {
        command.env("REHEARSAL_ISA", way.isa);
    }
    done(command);
    let steps: Vec<Value> = steps(&out).into_iter().filter(|step| step["kind"] == "grpo").collect();
    assert_eq!(steps.len() as u64, count);
    for step in &steps {
        // Nothing was left out of the comparison, and the replies were sampled and not foregone.
        assert_eq!(step["trained_share"], 1.0, "{step}");
        assert!(step["entropy"].as_f64().unwrap() > 0.1, "{step}");
    }
    // The policy moves, or all steps would be the first.
    assert!(steps.last().unwrap()["kl"].as_f64().unwrap() > 1e-4, "{steps:?}");
    let figures = steps.iter().map(|step| FIGURES.map(|key| step[key].clone()).to_vec());
    Left {
        figures: figures.collect(),
        rollouts: std::fs::read(out.join("rollouts/align.jsonl")).unwrap(),
        weights: weights(&out),
    }
}

impl Left {
    /// The largest gap between sampler and trainer of each step.
    pub fn gaps(&self) -> Vec<f64> {
        let gap = FIGURES.iter().position(|key| *key == "logprob_gap_max").unwrap();
        self.figures.iter().map(|figures| figures[gap].as_f64().unwrap()).collect()
    }
}

/// Every way has a gap of exactly 0 at every step, and leaves what the others with shared prompts, or without, leave.
pub fn check_exact(subject: &Subject, ways: &[Way], count: u64) {
    let mut first: BTreeMap<bool, (Left, Way)> = BTreeMap::new();
    for way in ways {
        let left = aligned(subject, way, count, &[]);
        for (index, gap) in left.gaps().iter().enumerate() {
            assert_eq!(*gap, 0.0, "step {}, {way:?}", index + 1);
        }
        println!("{}, {count} steps, {way:?}: every gap is 0", subject.model);
        let Some((other, beside)) = first.get(&way.share_prompts) else {
            first.insert(way.share_prompts, (left, *way));
            continue;
        };
        let differing = left.figures.iter().zip(&other.figures).position(|(a, b)| a != b);
        assert_eq!(differing, None, "the first step that differs, from 0: {way:?} and {beside:?}");
        assert!(left.rollouts == other.rollouts, "other rollouts: {way:?} and {beside:?}");
        assert!(left.weights == other.weights, "other weights: {way:?} and {beside:?}");
    }
    let mut starts = first.values().map(|(left, _)| rollouts_of_first_step(&left.rollouts));
    if let (Some(one), Some(other)) = (starts.next(), starts.next()) {
        assert!(one == other, "before the first update nothing depends on how it is made");
    }
}

fn rollouts_of_first_step(lines: &[u8]) -> Vec<Value> {
    let lines = std::str::from_utf8(lines).unwrap().lines();
    let rows = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.take_while(|row| row["step"] == 1).collect()
}
