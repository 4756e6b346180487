//! What the plan says that each rank holds, against the arenas of ranks that did the work: never less, and no more than
//! [`factor`] times as much. A budget of what it says is enough, to the byte.

use crate::engine::settings;
use crate::runs::{check_refused, done, finished, least_budget, rehearsal, smoke_with, weights};
use rehearsal::cluster::layout::Sampling;
use rehearsal::cluster::mesh::Load;
use rehearsal::cluster::{Local, Mesh, Team};
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::{GrpoStage, OptimizerConfig};
use rehearsal::config::{Bytes, ModelConfig, Offload, RunConfig, Stage, StageKind};
use rehearsal::data::example::{Batch, Pair, Prompt, Sequence};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use rehearsal::plan::memory::total;
use rehearsal::plan::{DeviceMemory, device_memory};
use rehearsal::rl::grpo::GrpoSettings;
use rehearsal::rl::rollout::{Group, Rollout, ScoredGroup, Stop};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// A plan is at most so many times what is measured. What is planned and does not happen here: all tokens of all ranks choosing
/// the experts of one, of up to four.
fn factor(config: &RunConfig) -> f64 {
    let cluster = &config.cluster;
    match cluster.expert.max(cluster.rollout.expert) {
        // One rank takes as many examples at once as hold so many tokens, and could of shorter ones.
        1 if cluster.data * cluster.pipeline == 1 => 2.0,
        1 => 1.25,
        2 => 1.5,
        _ => 2.5,
    }
}

/// Tokens of an example, as long as the plan takes it to be: the smoke model's positions.
const EXAMPLE: usize = 128;

/// A model whose weights outweigh its activations.
const HEAVY: [&str; 4] = [
    "model.n_routed_experts=64",
    "model.moe_intermediate_size=64",
    "stage.base.micro_batch=1",
    "stage.align.micro_batch=4",
];

/// A run, with evals left out: how many examples they have is not known to the plan.
fn run(set: &[&str]) -> (RunConfig, Vec<ModelConfig>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
    let set: Vec<String> =
        set.iter().chain(&["engine.threads=1"]).map(|text| text.to_string()).collect();
    let loaded = RunConfig::load(&path, &set).unwrap();
    let mut config = loaded.config.clone();
    config.stages.iter_mut().for_each(|stage| stage.eval.clear());
    let models = (0..config.stages.len()).map(|i| config.stage_model(&loaded.folder, i).unwrap());
    (config.clone(), models.collect())
}

/// The team of a rank.
fn team(config: &RunConfig, link: Local) -> Team {
    let (cluster, model) = (&config.cluster, &config.model);
    let load = Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
    let sizes = [cluster.data, cluster.pipeline, cluster.expert];
    let mesh = Mesh::new(sizes, cluster.data * cluster.pipeline, load).unwrap();
    let rollout = |ranks| Sampling::new(cluster.rollout, ranks, model).unwrap();
    let (sampling, samplers_layout) = match cluster.samplers {
        0 => (rollout(mesh.ranks()), Team::alone().samplers_layout),
        samplers => {
            (Sampling { ranks: mesh.ranks(), tensor: 1, expert: mesh.expert() }, rollout(samplers))
        }
    };
    let is_sampler = rehearsal::cluster::Link::rank(&link) >= mesh.ranks();
    Team {
        sampling: if is_sampler { samplers_layout } else { sampling },
        link: Arc::new(link),
        mesh,
        schedule: cluster.schedule,
        samplers: cluster.samplers,
        samplers_layout,
        deadline: Duration::from_secs(60),
        ..Team::alone()
    }
}

fn setup(config: &RunConfig, team: Team, spill: PathBuf) -> EngineSetup {
    EngineSetup { model: config.model.clone(), engine: config.engine.clone(), seed: 1, spill, team }
}

/// A reward model's folder.
fn reward(config: &RunConfig, place: &Path) -> PathBuf {
    let folder = place.join("reward");
    std::fs::create_dir_all(&folder).unwrap();
    let setup = setup(config, Team::alone(), place.join("spill-of-one"));
    let mut engine = HybridEngine::new(setup).unwrap();
    let stage = PrepareStage { value_head: true, ..prepare(config, &config.stages[0], place) };
    engine.prepare(&stage).unwrap();
    engine.save(&folder, false).unwrap();
    folder
}

fn prepare(config: &RunConfig, stage: &Stage, reward: &Path) -> PrepareStage {
    let mut prepared = PrepareStage {
        policy: ModelSource::Fresh,
        reference: None,
        rewards: BTreeMap::new(),
        optimizer: Some(OptimizerConfig::default()),
        steps: 10,
        value_head: matches!(stage.kind, StageKind::RewardModel(_)),
        yarn: None,
        form: config.engine.attention,
        prefill: rehearsal::config::engine::Prefill::ByCost,
        balance: Balance::NONE,
    };
    if let StageKind::Grpo(grpo) = &stage.kind {
        (prepared.form, prepared.prefill) = config.engine.grpo_forms();
        prepared.reference = (grpo.kl_weight != 0.0).then_some(ModelSource::Fresh);
        let models = grpo.reward.iter().filter_map(|entry| entry.model.clone());
        prepared.rewards = models.map(|name| (name, reward.to_path_buf())).collect();
    }
    prepared
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7 + seed * 13) % 280 + 3) as u32).collect()
}

fn batch(stage: &Stage) -> (Batch, usize) {
    let document = |length| move |d| Sequence::all_targets(tokens(length, d));
    match &stage.kind {
        StageKind::Pretrain(s) => {
            (Batch::Documents((0..s.batch).map(document(s.sequence)).collect()), s.micro_batch)
        }
        StageKind::Sft(s) => {
            (Batch::Documents((0..s.batch).map(document(EXAMPLE)).collect()), s.micro_batch)
        }
        StageKind::RewardModel(s) => {
            let pair = |d| Pair { chosen: tokens(EXAMPLE, d), rejected: tokens(EXAMPLE, d + 1) };
            (Batch::Pairs((0..s.batch).map(pair).collect()), s.micro_batch)
        }
        _ => panic!("no batch"),
    }
}

/// The groups of a step, all rollouts as long as they may be.
fn scored_groups(grpo: &GrpoStage) -> Vec<ScoredGroup> {
    let (new, prompt) = (grpo.max_new_tokens, EXAMPLE - grpo.max_new_tokens);
    let rollout = |slot: usize, i: usize| Rollout {
        sample: i as u32,
        tokens: tokens(new, slot * grpo.group_size + i + 50),
        logprobs: vec![-5.0; new],
        stop: Stop::Length,
        text: String::new(),
    };
    let group = |slot: usize| {
        let prompt = Prompt {
            index: slot as u64,
            text: String::new(),
            tokens: tokens(prompt, slot),
            answer: None,
        };
        let size = grpo.group_size;
        ScoredGroup {
            group: Group {
                slot: slot as u32,
                prompt: prompt.into(),
                policy_version: 0,
                rollouts: (0..size).map(|i| rollout(slot, i)).collect(),
            },
            components: Vec::new(),
            rewards: vec![0.0; size],
            advantages: (0..size).map(|i| i as f64 - 1.5).collect(),
            reference: vec![vec![-5.0; new]; size],
        }
    };
    (0..grpo.prompts).map(group).collect()
}

/// A job of the first version, with no sequence that stops early.
fn job(requests: Vec<GenerateRequest>, max_new_tokens: usize, temperature: f64) -> GenerateJob {
    GenerateJob {
        requests,
        max_new_tokens,
        temperature,
        top_p: 1.0,
        top_k: 0,
        stop_tokens: Vec::new(),
        seed: 4,
        step: 0,
        policy_version: 0,
    }
}

/// Sampling, scoring by all other models and an update; a rank that only samples does that alone.
fn align(engine: &mut HybridEngine, config: &RunConfig, grpo: &GrpoStage, is_sampler: bool) {
    let (new, prompt) = (grpo.max_new_tokens, EXAMPLE - grpo.max_new_tokens);
    let request = |slot: usize| GenerateRequest {
        slot: slot as u32,
        tokens: tokens(prompt, slot),
        prompt: slot as u64,
        samples: grpo.group_size as u32,
    };
    if config.cluster.samplers == 0 || is_sampler {
        engine.enter_generate(grpo.rollout_dtype).unwrap();
        let job = job((0..grpo.prompts).map(request).collect(), new, 1.0);
        engine.generate(&job, &mut |_| {}).unwrap();
    }
    if is_sampler {
        engine.hand_over(1).unwrap();
        return;
    }
    let sequence = |i: usize| [tokens(prompt, i / grpo.group_size), tokens(new, i + 50)].concat();
    let count = grpo.prompts * grpo.group_size;
    engine.enter_phase(Phase::Score).unwrap();
    let models = grpo.reward.iter().filter_map(|entry| entry.model.clone()).map(Role::Reward);
    let reference = (grpo.kl_weight != 0.0).then_some(Role::Reference);
    for role in models.chain(reference) {
        let sequences = (0..count).map(sequence).collect();
        let job = ScoreJob { role, sequences, temperature: 1.0, first: vec![prompt; count] };
        engine.score(&job).unwrap();
    }
    engine.enter_phase(Phase::Train).unwrap();
    let settings = GrpoSettings { max_new_tokens: new, kl_weight: grpo.kl_weight, ..settings() };
    let (micro_batch, share_prompts) = (grpo.micro_batch, grpo.share_prompts);
    let groups = scored_groups(grpo);
    engine.train(&TrainJob::Grpo { groups, settings, micro_batch, share_prompts }).unwrap();
    if config.cluster.samplers > 0 {
        engine.hand_over(1).unwrap();
    }
}

/// Scores as many pairs as the stage's calibration has.
fn calibrate(engine: &mut HybridEngine) {
    const PAIRS: usize = 16;
    engine.enter_phase(Phase::Score).unwrap();
    let sequences: Vec<_> = (0..2 * PAIRS).map(|d| tokens(EXAMPLE, d)).collect();
    let (role, first) = (Role::Policy, vec![1; 2 * PAIRS]);
    engine.score(&ScoreJob { role, sequences, temperature: 1.0, first }).unwrap();
}

/// Does the work of a stage on all ranks. Of each the bytes that were in use at once at most.
fn measured(config: &RunConfig, stage: &Stage, place: &Path) -> Vec<u64> {
    let reward = reward(&RunConfig { engine: Default::default(), ..config.clone() }, place);
    let cluster = &config.cluster;
    let trainers = cluster.data * cluster.pipeline;
    thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let (reward, spill) = (&reward, place.join(rank.to_string()));
            scope.spawn(move || {
                let setup = setup(config, team(config, link), spill);
                let mut engine = HybridEngine::new(setup).unwrap();
                engine.prepare(&prepare(config, stage, reward)).unwrap();
                match &stage.kind {
                    StageKind::Grpo(grpo) => align(&mut engine, config, grpo, rank >= trainers),
                    _ if rank >= trainers => {}
                    _ => {
                        engine.enter_phase(Phase::Train).unwrap();
                        let (batch, micro_batch) = batch(stage);
                        let job =
                            TrainJob::Batch { batch, share: 0.0, micro_batch, dropping: None };
                        engine.train(&job).unwrap();
                        if matches!(stage.kind, StageKind::RewardModel(_)) {
                            calibrate(&mut engine);
                        }
                    }
                }
                engine.holdings().most_used
            })
        };
        let links = Local::new(trainers + cluster.samplers).into_iter().enumerate();
        let threads: Vec<_> = links.map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The most that a device is planned to hold in a stage: as asked for, and at least.
fn planned(device: &DeviceMemory, stage: &str) -> [u64; 2] {
    let held = device.memory.stages.iter().find(|held| held.stage == stage).unwrap();
    [&held.phases, &held.least].map(|phases| phases.values().map(total).max().unwrap_or(0))
}

/// The stages whose plan is held against arenas.
const STAGES: [&str; 4] = ["base", "sft", "helpful", "align"];

const LAYOUTS: [&[&str]; 11] = [
    &[],
    &["cluster.data=2"],
    &["cluster.data=2", "cluster.expert=2"],
    // All scores are equal, so that all tokens go to the first experts: those of one rank.
    &["cluster.data=2", "cluster.expert=2", "model.initializer_range=1e-30"],
    &["cluster.pipeline=2"],
    &["cluster.pipeline=2", "cluster.schedule=zb-h1"],
    &["model.num_hidden_layers=4", "cluster.pipeline=2", "cluster.schedule=zb-v"],
    &["cluster.data=2", "cluster.pipeline=2", "cluster.expert=2", "cluster.rollout.expert=4"],
    &["cluster.data=2", "cluster.rollout.tensor=2"],
    &["cluster.samplers=1"],
    &["cluster.data=2", "cluster.expert=2", "cluster.samplers=2", "cluster.rollout.expert=2"],
];

/// Does the work of each of [`STAGES`] in all layouts, of the smoke model and of a heavier one, where nothing but what `offload` says
/// leaves a device that has just what is planned. `check` is given what was measured of each device: what it is, bytes in use at
/// most, planned ones, the budget, and the factor.
fn on_all_layouts(
    offload: Option<Vec<Offload>>,
    extent: usize,
    mut check: impl FnMut(String, u64, u64, u64, f64),
) {
    let folder = TempDir::new().unwrap();
    for layout in LAYOUTS {
        for model in [&[][..], &HEAVY] {
            let (mut config, models) = run(&[layout, model].concat());
            config.engine.offload = offload.clone();
            let devices = device_memory(&config, &models, 1).unwrap();
            for name in STAGES {
                let stage = config.stages.iter().find(|stage| stage.name == name).unwrap().clone();
                let budget =
                    devices.iter().map(|device| planned(device, name)[extent]).max().unwrap();
                config.engine.budget = Some(Bytes(budget));
                let measured = measured(&config, &stage, folder.path());
                for device in &devices {
                    let most = measured[device.first_rank..=device.last_rank].iter().max().unwrap();
                    let what = format!("{layout:?} {name} rank {}", device.first_rank);
                    let planned = planned(device, name)[extent];
                    check(what, *most, planned, budget, factor(&config));
                }
            }
        }
    }
}

#[test]
fn arenas_of_all_ranks_hold_no_more_than_is_planned_and_nearly_as_much() {
    let mut wrong = Vec::new();
    on_all_layouts(Some(Vec::new()), 0, |what, most, planned, budget, factor| {
        let what = format!("{what}: {most} of {planned}, {:.2}", planned as f64 / most as f64);
        println!("{what}");
        // What a device wastes goes by its budget.
        let is_less = most > planned + budget / 64;
        if is_less || planned as f64 > factor * most as f64 {
            wrong.push(what);
        }
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_least_budget_that_is_planned_is_enough_to_the_byte() {
    on_all_layouts(None, 1, |what, most, planned, budget, _| {
        println!("{what}: {most} of {planned}");
        assert!(most <= budget, "{what}");
    });
}

/// Replies of an eval, and a commit before anything else.
fn sample_and_save(engine: &mut HybridEngine, config: &RunConfig, folder: &Path) {
    let eval =
        config.stages.iter().flat_map(|stage| &stage.eval).find(|eval| eval.every > 0).unwrap();
    engine.enter_generate(rehearsal::config::Dtype::F32).unwrap();
    let request = |slot: usize| GenerateRequest {
        slot: slot as u32,
        tokens: tokens(EXAMPLE - eval.max_new_tokens, slot),
        prompt: slot as u64,
        samples: 1,
    };
    let job = job((0..16).map(request).collect(), eval.max_new_tokens, 0.0);
    engine.generate(&job, &mut |_| {}).unwrap();
    engine.save(folder, true).unwrap();
}

#[test]
fn a_commit_after_an_eval_has_room_for_moments_beside_what_the_eval_made() {
    let folder = TempDir::new().unwrap();
    let (mut config, models) = run(&[
        "cluster.data=2",
        "cluster.expert=2",
        "stage.sft.micro_batch=1",
        "model.n_routed_experts=512",
        "model.moe_intermediate_size=64",
    ]);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
    let mut stage = RunConfig::load(&path, &[]).unwrap().config.stages.swap_remove(2);
    stage.eval[0].every = 1;
    config.stages[2].eval = stage.eval;
    let devices = device_memory(&config, &models, 1).unwrap();
    let phase = |device: &DeviceMemory, phase| total(&device.memory.stages[2].least[phase]);
    let of = |name| devices.iter().map(|device| phase(device, name)).max().unwrap();
    assert!(of("save") > of("train") && of("save") > of("generate"), "the commit needs most");
    config.engine.budget = Some(Bytes(of("save")));
    let saved = folder.path().join("saved");
    std::fs::create_dir(&saved).unwrap();
    thread::scope(|scope| {
        for (rank, link) in Local::new(2).into_iter().enumerate() {
            let (config, saved, spill) = (&config, &saved, folder.path().join(rank.to_string()));
            scope.spawn(move || {
                let mut engine =
                    HybridEngine::new(setup(config, team(config, link), spill)).unwrap();
                engine.prepare(&prepare(config, &config.stages[2], saved)).unwrap();
                sample_and_save(&mut engine, config, saved);
            });
        }
    });
}

#[test]
fn a_process_alone_gets_what_it_needs_or_is_refused() {
    let folder = TempDir::new().unwrap();
    let least = least_budget(&["engine.threads=2"]);
    let run = |budget: u64, name: &str| {
        let out = folder.path().join(name);
        (smoke_with(&out, &["engine.threads=2", &format!("engine.budget={budget}")]), out)
    };
    let why = format!("set engine.budget = {least} (");
    let (refused, out) = run(least - 1, "refused");
    check_refused(refused, 4, &["the run needs", "engine.budget leaves it", &why]);
    assert!(!out.exists(), "nothing was begun");
    let (allowed, out) = run(least, "allowed");
    done(allowed);
    assert!(weights(&out) == weights(finished()), "no bit is another");
}

#[test]
fn a_process_with_a_sampler_gets_twice_what_the_larger_device_needs_or_is_refused() {
    let folder = TempDir::new().unwrap();
    let settings = ["cluster.samplers=1", "engine.threads=2"];
    let least = 2 * least_budget(&settings);
    let run = |budget: u64, name: &str| {
        let out = folder.path().join(name);
        let budget = format!("engine.budget={budget}");
        (smoke_with(&out, &[&settings[..], &[&*budget]].concat()), out)
    };
    let why = format!("set engine.budget = {least} (");
    let (refused, out) = run(least - 1, "refused");
    check_refused(refused, 4, &["the device that trains needs", "half of engine.budget", &why]);
    assert!(!out.exists(), "nothing was begun");
    // `check` says the same.
    let mut check = rehearsal(&["check", "configs/smoke.toml", "--plan-only"]);
    let budget = format!("engine.budget={}", least - 1);
    for set in [settings[0], settings[1], &budget] {
        check.args(["--set", set]);
    }
    check_refused(check, 4, &["the device that trains needs", "half of engine.budget", &why]);
    let (allowed, out) = run(least, "allowed");
    done(allowed);
    assert!(weights(&out) == weights(finished()), "no bit is another");
}
