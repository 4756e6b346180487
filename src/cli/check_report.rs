//! What `check` found: the figures, which are its JSON with stable keys, and why a run is refused.

mod cluster;
mod devices;
mod text;

use super::machine::FreeMemory;
use crate::config::{Attention, ConfigError, Loaded, ModelConfig, Stage, StageKind, idle_samplers};
use crate::model::{Parameters, flops_per_token, parameters};
use crate::plan::comparison::PAPER;
use crate::plan::cost::CACHE_DTYPE;
use crate::plan::estimate::{generated_lines, sequence};
use crate::plan::memory::{Owners, total};
use crate::plan::{
    ClusterPlan, Comparison, DeviceMemory, Estimate, OffloadPlan, PlanError, Utilisation,
    cache_bytes_per_token, cache_elements_per_token, cluster_picture, cluster_plan, compare,
    device_memory, estimate, host_bytes, model_memory, offload, utilisation,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The sequence length of a model's FLOPs, if it has as many positions.
const MODEL_SEQUENCE: usize = 4096;

/// What a run or a model costs.
#[derive(Debug, Serialize)]
pub struct CheckReport {
    /// What was checked.
    pub file: String,
    /// Counts of the model.
    pub parameters: Parameters,
    /// Bytes of the cache.
    pub cache_bytes_per_token: u64,
    /// Type of its elements.
    pub cache_dtype: &'static str,
    /// Elements of the cache.
    pub cache_elements_per_token: u64,
    /// Bytes of the cache by type of its elements; 6 bits, scales included, only of a latent cache.
    pub cache_bytes_by_type: BTreeMap<&'static str, u64>,
    /// FLOPs of a token in training, causal.
    pub flops_per_token: f64,
    /// The sequence length that they are for.
    pub sequence: usize,
    /// What `--gpu-hours` makes of a GPU.
    pub utilisation: Option<Utilisation>,
    /// The model it is compared with, the ratios, and those of the paper.
    pub comparison: Option<Against>,
    /// Bytes by phase and owner; of a run, those of the stage that holds most in the phase.
    pub memory: BTreeMap<&'static str, Owners>,
    /// `engine.budget`.
    pub budget_bytes: Option<u64>,
    /// Whether sampler and trainer agree to the bit in the `grpo` stages (`engine.exact`), if there are any.
    pub exact: Option<bool>,
    /// The `grpo` stages whose rollouts are sampled a batch ahead (`max_staleness`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sampled_ahead: Vec<String>,
    /// What is to be said of ranks that only sample and have to wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_samplers: Option<String>,
    /// Steps, tokens, seconds and disk of a run.
    pub estimate: Option<Estimate>,
    /// Why no file of the run was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unread: Option<String>,
    /// Examples of the data sets that were read.
    pub lines: BTreeMap<String, u64>,
    /// Of a run on many processes, or for machines that its config describes.
    #[serde(rename = "plan")]
    pub cluster: Option<ClusterPlan>,
    /// Of each stage with rollouts, where everything is in each phase of a step under the budget, and what moves when.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub offload: Vec<OffloadPlan>,
    /// Bytes of the devices of a run on machines like this one, by stage, phase and owner: as asked for, and at least.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceMemory>,
    /// What the devices are planned from.
    #[serde(skip)]
    run: Option<devices::Run>,
    /// Stage that holds most outside the arenas, and its bytes.
    #[serde(skip)]
    host: Option<(String, u64)>,
    /// What this machine has free; another one has other figures, so that they are told as text alone.
    #[serde(skip)]
    free: Option<FreeMemory>,
}

/// `--against`.
#[derive(Debug, Serialize)]
pub struct Against {
    /// The other model.
    pub file: String,
    /// This model's figures as shares of the other's.
    pub ratios: Comparison,
    /// DeepSeek-V2's as shares of DeepSeek 67B's.
    pub paper: Comparison,
}

impl CheckReport {
    /// The report of a model alone.
    pub fn of_model(file: &Path, model: &ModelConfig) -> CheckReport {
        CheckReport {
            memory: model_memory(model),
            ..CheckReport::costs(file, model, MODEL_SEQUENCE.min(model.max_position_embeddings))
        }
    }

    /// The report of a run on `threads` threads that do `products` f32 operations a second together, with the examples
    /// that were counted.
    pub fn of_run(
        loaded: &Loaded,
        lines: BTreeMap<String, u64>,
        threads: usize,
        products: f64,
    ) -> Result<CheckReport, ConfigError> {
        let config = &loaded.config;
        let models = stage_models(loaded)?;
        let unplanned = |error| unplannable(loaded, error);
        let devices = match config.cluster.hardware {
            // Those machines are elsewhere.
            Some(_) => Vec::new(),
            None => device_memory(config, &models, threads).map_err(unplanned)?,
        };
        let mut cluster = cluster_plan(config, &models).map_err(unplanned)?;
        if let Some(plan) = cluster.as_mut().filter(|_| !devices.is_empty()) {
            plan.hold(&devices);
        }
        let is_alone = config.cluster.data * config.cluster.pipeline + config.cluster.samplers == 1;
        let has_rollouts = config.stages.iter().any(|s| matches!(s.kind, StageKind::Grpo(_)));
        let is_ahead =
            |s: &Stage| matches!(&s.kind, StageKind::Grpo(grpo) if grpo.max_staleness > 0);
        let name = |stage: &Stage| stage.name.clone();
        let mut known = generated_lines(config);
        known.extend(lines.clone());
        Ok(CheckReport {
            memory: by_phase(&devices, cluster.as_ref()),
            budget_bytes: config.engine.budget.map(|budget| budget.0),
            exact: has_rollouts.then_some(config.engine.exact),
            sampled_ahead: config.stages.iter().filter(|s| is_ahead(s)).map(name).collect(),
            idle_samplers: idle_samplers(config),
            estimate: Some(estimate(config, &models, &lines, threads, products)),
            host: host_bytes(config, &known).map(|(stage, bytes)| (stage.to_string(), bytes)),
            lines,
            // Each rank plans its own.
            offload: match devices.first().filter(|_| is_alone) {
                Some(device) => offload(config, &models, &device.memory, products),
                None => Vec::new(),
            },
            cluster,
            run: (!devices.is_empty()).then(|| devices::Run::new(config, &models, threads)),
            devices,
            ..CheckReport::costs(&loaded.file, &config.model, sequence(config))
        })
    }

    /// The same report with what a GPU did in training that took `gpu_hours` a trillion tokens.
    pub fn trained_in(self, gpu_hours: f64) -> CheckReport {
        CheckReport { utilisation: Some(utilisation(self.flops_per_token, gpu_hours)), ..self }
    }

    /// The same report beside another model.
    pub fn against(self, model: &ModelConfig, file: &Path, other: &ModelConfig) -> CheckReport {
        let against = Against {
            file: file.display().to_string(),
            ratios: compare(model, other, self.sequence),
            paper: PAPER,
        };
        CheckReport { comparison: Some(against), ..self }
    }

    fn costs(file: &Path, model: &ModelConfig, sequence: usize) -> CheckReport {
        CheckReport {
            file: file.display().to_string(),
            parameters: parameters(model),
            cache_bytes_per_token: cache_bytes_per_token(model),
            cache_dtype: CACHE_DTYPE,
            cache_elements_per_token: cache_elements_per_token(model),
            cache_bytes_by_type: cache_bytes_by_type(model),
            utilisation: None,
            comparison: None,
            flops_per_token: flops_per_token(model, sequence),
            sequence,
            memory: BTreeMap::new(),
            budget_bytes: None,
            exact: None,
            sampled_ahead: Vec::new(),
            idle_samplers: None,
            unread: None,
            estimate: None,
            lines: BTreeMap::new(),
            offload: Vec::new(),
            devices: Vec::new(),
            run: None,
            cluster: None,
            host: None,
            free: None,
        }
    }

    /// The same report, on a machine with so much free.
    pub fn on_machine(self, free: FreeMemory) -> CheckReport {
        CheckReport { free: Some(free), ..self }
    }

    /// Most bytes that a run is planned to hold at once.
    pub fn peak_bytes(&self) -> u64 {
        let peaks = self.devices.iter().filter_map(|device| Some(device.memory.peak()?.2));
        peaks.max().unwrap_or(0)
    }

    /// Most bytes that the run folder takes.
    pub fn disk_bytes(&self) -> u64 {
        self.estimate.as_ref().map_or(0, |estimate| estimate.disk_bytes)
    }
}

/// For each phase the owners of the stage and device that holds most in it: of devices here, or of those of a plan.
fn by_phase(
    devices: &[DeviceMemory],
    plan: Option<&ClusterPlan>,
) -> BTreeMap<&'static str, Owners> {
    let here = devices.iter().map(|device| device.memory.by_phase());
    let elsewhere = plan.into_iter().flat_map(|plan| plan.bytes.iter().map(|of| of.phases.clone()));
    let mut largest: BTreeMap<&'static str, Owners> = BTreeMap::new();
    for (phase, owners) in here.chain(elsewhere.filter(|_| devices.is_empty())).flatten() {
        let held = largest.entry(phase).or_default();
        if total(&owners) > total(held) {
            *held = owners;
        }
    }
    largest
}

/// The timeline of a step of a run's first stage that trains on text, as SVG.
pub fn timeline(loaded: &Loaded) -> Result<Option<String>, ConfigError> {
    cluster_picture(&loaded.config, &stage_models(loaded)?)
        .map_err(|error| unplannable(loaded, error))
}

fn stage_models(loaded: &Loaded) -> Result<Vec<ModelConfig>, ConfigError> {
    let stages = 0..loaded.config.stages.len();
    stages.map(|index| loaded.config.stage_model(&loaded.folder, index)).collect()
}

fn unplannable(loaded: &Loaded, error: PlanError) -> ConfigError {
    let path: Vec<&str> = std::iter::once("cluster").chain(error.path).collect();
    loaded.fault(&path, error.message)
}

fn cache_bytes_by_type(model: &ModelConfig) -> BTreeMap<&'static str, u64> {
    let elements = cache_elements_per_token(model);
    let mut bytes = BTreeMap::from([("bf16", 2 * elements), ("f32", 4 * elements)]);
    if model.attention() == Attention::Mla {
        bytes.insert("6 bits", elements * 6 / 8);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, load_model};
    use std::path::PathBuf;

    fn configs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
    }

    fn run(assignments: &[&str]) -> CheckReport {
        let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
        let loaded = RunConfig::load(&configs().join("quickstart.toml"), &assignments).unwrap();
        CheckReport::of_run(&loaded, BTreeMap::new(), 2, 2e11).unwrap()
    }

    /// A machine with so many bytes free, and without limits of a process.
    fn machine(free: u64) -> FreeMemory {
        FreeMemory { shared: Some(free), own: None }
    }

    #[test]
    fn the_stable_keys_are_there() {
        let json = serde_json::to_value(run(&[])).unwrap();
        for key in ["total", "active", "active_without_input_embedding", "tensors"] {
            assert!(json["parameters"][key].is_u64(), "{key}");
        }
        assert_eq!(json["cache_bytes_per_token"], 3 * (48 + 16) * 4);
        assert_eq!(json["cache_dtype"], "f32");
        assert_eq!(json["sequence"], 64);
        assert!(json["flops_per_token"].as_f64().unwrap() > 3e6);
        assert!(json["memory"]["train"]["policy/gradients"].is_u64());
        assert!(json["estimate"]["seconds"].is_f64());
    }

    #[test]
    fn a_model_is_told_at_4096_tokens() {
        let path = configs().join("model/deepseek-v2.json");
        let report = CheckReport::of_model(&path, &load_model(&path).unwrap());
        let text = report.to_string();
        assert!(text.contains("235 741 434 880 parameters in 29 102 tensors"), "{text}");
        assert!(text.contains("155.3") && text.contains("GFLOP a token at 4 096 tokens"), "{text}");
        assert_eq!(report.memory["train"]["policy/weights"], 4 * 235_741_434_880);
    }

    #[test]
    fn a_pair_is_told_beside_the_papers_ratios() {
        let load = |name: &str| {
            let path = configs().join("model").join(name);
            let model = load_model(&path).unwrap();
            (path, model)
        };
        let ((path, model), (other, dense)) = (load("deepseek-v2.json"), load("deepseek-67b.json"));
        let report = CheckReport::of_model(&path, &model).trained_in(172.8e3);
        let report = report.against(&model, &other, &dense);
        let text = report.to_string();
        for line in [
            "1607.5 tokens a second and GPU, 25.2 % of 989.4 TFLOP/s",
            "cache     138 240 bytes a token (f32), 34 560 elements\n",
            "          25 920 bytes in 6 bits\n          69 120 bytes in bf16\n",
            "0.3132 of its active parameters (0.313)\n",
            "3.4964 of its parameters (3.5)\n",
            "0.1776 of its cached elements (0.1776)\n",
            "82.24 % of its cache saved in elements (82.24 %)\n",
            "93.34 % of its cache saved in bytes, 6 bits against bf16 (93.34 %)\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["cache_bytes_by_type"]["6 bits"], 25_920);
        assert_eq!(json["comparison"]["paper"]["active"], 0.313);
        assert!(json["comparison"]["ratios"]["cache_saved_at_6_bits"].as_f64().unwrap() > 0.933);
    }

    #[test]
    fn a_budget_below_the_least_is_refused_with_the_plan() {
        assert_eq!(run(&[]).over_budget(), None);
        let refusal = run(&["engine.budget=\"8 MiB\""]).over_budget().unwrap();
        assert!(refusal.starts_with("the run needs ") && !refusal.contains("rank"), "{refusal}");
        assert!(refusal.contains(" and engine.budget leaves it 8.00 MiB; set engine.budget = "));
        assert!(refusal.contains("policy/moments"), "the plan is printed: {refusal}");
    }

    #[test]
    fn a_group_that_is_too_large_at_once_is_told_to_go_through_one_by_one() {
        // A group of the second stage holds 1024 replies; one rollout alone is small.
        let set = ["stage.align.group_size=1024", "stage.align.prompts=1"];
        let least = |more: &[&str]| {
            let report = run(&[&set[..], more].concat());
            let (stage, phase, bytes) = report.devices[0].least().unwrap();
            (stage.to_string(), phase, bytes)
        };
        let (stage, phase, shared) = least(&[]);
        let unshare = "stage.align.share_prompts=false";
        let (_, _, unshared) = least(&[unshare]);
        assert_eq!((&*stage, phase), ("align", "train"));
        assert!(unshared < shared / 4, "{unshared} {shared}");
        let told = |bytes: u64, more: &[&str]| {
            let budget = format!("engine.budget={bytes}");
            let report = run(&[&set[..], &[&*budget], more].concat());
            let text = report.over_budget()?;
            assert!(text.contains("set engine.budget = ") && text.contains("policy/moments"));
            Some(text.contains("set stage.align.share_prompts = false"))
        };
        assert_eq!(told(shared, &[]), None);
        assert_eq!(told(shared - 1, &[]), Some(true));
        assert_eq!(told(shared - 1, &[unshare]), None, "the advice is right");
        assert_eq!(told(unshared / 2, &[]), Some(false), "it would not help");
        assert_eq!(told(unshared / 2, &[unshare]), Some(false), "it is so already");
        let report = run(&[&set[..], &["engine.budget=\"8 GiB\""]].concat());
        let text = report.on_machine(machine(shared - 1)).over_memory().unwrap();
        assert!(text.contains("(ulimit), or set stage.align.share_prompts = false, "), "{text}");
    }

    #[test]
    fn a_run_that_the_machine_cannot_hold_is_refused_with_the_plan() {
        let over =
            |assignments: &[&str], free| run(assignments).on_machine(machine(free)).over_memory();
        assert_eq!(over(&[], 4 << 30), None);
        let small = over(&[], 8 << 20).unwrap();
        assert!(
            small.contains("its part of what this machine has free")
                && small.contains("policy/moments"),
            "{small}"
        );
        let batch = over(&["stage.base.batch=1000000000"], 64 << 30).unwrap();
        assert!(batch.contains("stage base holds") && batch.contains("lower its batch"), "{batch}");
        let loaded = RunConfig::load(&configs().join("smoke.toml"), &[]).unwrap();
        let free = CheckReport::of_run(&loaded, BTreeMap::new(), 2, 2e11).unwrap();
        let text = free.on_machine(machine(10 << 30)).to_string();
        assert!(text.contains("budget    none; here the arenas take at most 9.00 GiB"), "{text}");
        let text = run(&["engine.budget=\"1 GiB\""]).on_machine(machine(10 << 30)).to_string();
        assert!(text.contains("budget    1.00 GiB\n"), "{text}");
    }

    #[test]
    fn processes_share_what_the_machine_has_and_examples_are_held_beside_their_arenas() {
        let lacks = |set: &[&str], shared, own| {
            let free = FreeMemory { shared: Some(shared), own };
            run(set).on_machine(free).over_memory()
        };
        let two = ["cluster.data=2"];
        let least = run(&two).devices[0].least().unwrap().2;
        let enough = least + (32 << 20);
        assert_eq!(lacks(&two, 2 * enough, Some(enough)), None);
        let text = lacks(&two, 2 * (least - 1), None).unwrap();
        assert!(text.contains("start fewer processes on a host"), "{text}");
        // A limit is of each process and not divided.
        let text = lacks(&two, 1 << 40, Some(least - 1)).unwrap();
        assert!(text.contains("raise the limit of a process (ulimit)"), "{text}");
        let batch = ["cluster.data=2", "stage.base.batch=1000000000"];
        let text = lacks(&batch, 1 << 36, None).unwrap();
        assert!(
            text.starts_with("this machine has 32.00 GiB free for a process, and stage base"),
            "{text}"
        );
        let text = lacks(&["cluster.samplers=1"], 8 << 20, None).unwrap();
        assert!(text.starts_with("the device that trains needs"), "{text}");
        assert!(text.contains("half of what this machine has free; free memory"), "{text}");
        assert!(text.contains("set cluster.samplers = 0"), "{text}");
    }

    #[test]
    fn whether_rollouts_are_exact_is_told_of_runs_that_have_any() {
        for (exact, word) in [(true, "rollouts  exact: "), (false, "rollouts  fast: ")] {
            let report = run(&[&format!("engine.exact={exact}")]);
            assert_eq!(report.exact, Some(exact));
            assert!(report.to_string().contains(word), "{report}");
        }
        let loaded = RunConfig::load(&configs().join("small/needle.toml"), &[]).unwrap();
        let without = CheckReport::of_run(&loaded, BTreeMap::new(), 2, 2e11).unwrap();
        assert!(!run(&[]).to_string().contains("max_staleness"));
        let ahead = run(&["stage.solve.max_staleness=1"]).to_string();
        assert!(ahead.contains("of stage solve (max_staleness) are compared"), "{ahead}");
        let waiting = run(&["stage.solve.max_staleness=1", "cluster.samplers=1"]).to_string();
        assert!(
            waiting.contains("samplers  cluster.samplers = 1: in stage \"align\" "),
            "{waiting}"
        );
        let samplers = ["cluster.samplers=1".to_string()];
        let refused = RunConfig::load(&configs().join("small/needle.toml"), &samplers).unwrap_err();
        assert!(refused.to_string().contains("no stage of the run is of kind grpo"), "{refused}");
        assert!(without.exact.is_none() && !without.to_string().contains("rollouts  "));
    }
}
