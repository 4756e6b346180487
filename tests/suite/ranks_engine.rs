//! Engines of several ranks: the rollouts and scores of one, and alignment steps that switch between two layouts.

use crate::engine::{settings, stage};
use crate::ranks::{model, team};
use rehearsal::cluster::layout::Sampling;
use rehearsal::cluster::mesh::Load;
use rehearsal::cluster::{Local, Mesh, Team};
use rehearsal::config::cluster::PipelineSchedule::{self, *};
use rehearsal::config::routing::Balance;
use rehearsal::config::{EngineConfig, ModelConfig};
use rehearsal::data::example::Prompt;
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine, SavedState};
use rehearsal::engine::phase::*;
use rehearsal::rl::grpo::GrpoSettings;
use rehearsal::rl::rollout::{Group, ScoredGroup};
use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// Layouts of training and of sampling.
#[derive(Clone, Copy, Debug)]
pub struct Layouts {
    pub sizes: [usize; 3],
    pub schedule: PipelineSchedule,
    pub sampling_expert: usize,
    pub tensor: usize,
}

/// What alignment steps gave on one rank.
#[derive(Default)]
struct Steps {
    /// Groups that this rank sampled in each step.
    sampled: Vec<usize>,
    groups: Vec<Vec<TokenGroup>>,
    scores: Vec<Vec<SequenceScore>>,
    reports: Vec<StepReport>,
    /// Of each rank's changes to Generate.
    switches: Vec<PhaseReport>,
}

/// Runs `work` on the engine of every rank; the results in order of the ranks.
pub fn on_engines<T: Send>(
    layouts: Layouts,
    work: impl Fn(&mut HybridEngine, usize) -> T + Sync,
) -> Vec<T> {
    on_engines_of(&model(), layouts, work)
}

/// The same for another model.
pub fn on_engines_of<T: Send>(
    config: &ModelConfig,
    layouts: Layouts,
    work: impl Fn(&mut HybridEngine, usize) -> T + Sync,
) -> Vec<T> {
    let Layouts { sizes, schedule, sampling_expert, tensor } = layouts;
    let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
    let mesh = Mesh::new(sizes, sizes[0] * sizes[1], load).unwrap();
    let sampling = Sampling { ranks: mesh.ranks(), tensor, expert: sampling_expert };
    let folder = TempDir::new().unwrap();
    let spill: PathBuf = folder.path().into();
    thread::scope(|scope| {
        let start = |(rank, link): (usize, Local)| {
            let team = Team { sampling, ..team(link, mesh, schedule) };
            let (work, spill) = (&work, spill.join(rank.to_string()));
            let engine = EngineConfig { threads: 1, page_tokens: 4, ..EngineConfig::default() };
            let setup = EngineSetup { model: config.clone(), engine, seed: 1, spill, team };
            scope.spawn(move || work(&mut HybridEngine::new(setup).unwrap(), rank))
        };
        let links = Local::new(mesh.ranks()).into_iter().enumerate();
        let threads: Vec<_> = links.map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

pub fn job(policy_version: u64) -> GenerateJob {
    let request = |slot: u32| GenerateRequest {
        slot,
        tokens: (0..3 + slot % 5).map(|i| (slot * 7 + i * 3) % 27 + 2).collect(),
        prompt: slot.into(),
        samples: 2 + slot % 2,
    };
    GenerateJob {
        requests: (0..7).map(request).collect(),
        max_new_tokens: 9,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        stop_tokens: vec![1, 2],
        seed: 4,
        step: policy_version,
        policy_version,
    }
}

/// What ranks have sampled, for all of them.
struct Pool {
    groups: Mutex<Vec<TokenGroup>>,
    everybody: Barrier,
}

impl Pool {
    /// All ranks' groups in order of slot.
    fn share(&self, groups: Vec<TokenGroup>) -> Vec<TokenGroup> {
        self.groups.lock().unwrap().extend(groups);
        self.everybody.wait();
        let mut all = self.groups.lock().unwrap().clone();
        all.sort_by_key(|group| group.slot);
        if self.everybody.wait().is_leader() {
            self.groups.lock().unwrap().clear();
        }
        self.everybody.wait();
        all
    }
}

/// Sampling, scoring by the policy and by the reference, and an update.
fn step(engine: &mut HybridEngine, pool: &Pool, steps: &mut Steps) {
    let version = steps.reports.last().map_or(0, |report| report.policy_version);
    steps.switches.push(engine.enter_phase(Phase::Generate).unwrap());
    let (job, mut groups) = (job(version), Vec::new());
    engine.generate(&job, &mut |group| groups.push(group)).unwrap();
    steps.sampled.push(groups.len());
    let groups = pool.share(groups);
    let (mut sequences, mut first) = (Vec::new(), Vec::new());
    for group in &groups {
        let prompt = &job.requests[group.slot as usize].tokens;
        for rollout in &group.rollouts {
            sequences.push([prompt.as_slice(), &rollout.tokens].concat());
            first.push(prompt.len());
        }
    }
    engine.enter_phase(Phase::Score).unwrap();
    for role in [Role::Policy, Role::Reference] {
        let (sequences, first) = (sequences.clone(), first.clone());
        let job = ScoreJob { role, sequences, temperature: 1.0, first };
        steps.scores.push(engine.score(&job).unwrap());
    }
    engine.enter_phase(Phase::Train).unwrap();
    let groups_scored = groups.iter().map(|group| scored(group, &job)).collect();
    let settings = GrpoSettings { max_new_tokens: 9, ..settings() };
    let job =
        TrainJob::Grpo { groups: groups_scored, settings, micro_batch: 0, share_prompts: true };
    steps.reports.push(engine.train(&job).unwrap());
    steps.groups.push(groups);
}

/// Long replies are better than short ones.
fn scored(group: &TokenGroup, job: &GenerateJob) -> ScoredGroup {
    let lengths: Vec<f64> = group.rollouts.iter().map(|r| r.tokens.len() as f64).collect();
    let mean = lengths.iter().sum::<f64>() / lengths.len() as f64;
    let tokens = job.requests[group.slot as usize].tokens.clone();
    let prompt = Prompt { index: 0, text: String::new(), tokens, answer: None };
    let group = Group {
        slot: group.slot,
        prompt: prompt.into(),
        policy_version: group.policy_version,
        rollouts: group.rollouts.clone().into(),
    };
    let advantages = lengths.iter().map(|length| length - mean).collect();
    let (components, reference) = (Vec::new(), Vec::new());
    ScoredGroup { group, components, rewards: lengths, advantages, reference }
}

fn two_steps(layouts: Layouts) -> Vec<Steps> {
    let ranks = layouts.sizes[0] * layouts.sizes[1];
    let pool = Pool { groups: Mutex::default(), everybody: Barrier::new(ranks) };
    on_engines(layouts, |engine, _| {
        let balance = Balance::NONE;
        engine.prepare(&PrepareStage { balance, ..stage(Some(ModelSource::Fresh)) }).unwrap();
        let mut steps = Steps::default();
        (0..2).for_each(|_| step(engine, &pool, &mut steps));
        steps
    })
}

#[test]
fn ranks_sample_and_score_as_one_to_the_bit_and_take_the_same_steps() {
    let one_rank = Layouts {
        sizes: [1, 1, 1],
        schedule: OneForwardOneBackward,
        sampling_expert: 1,
        tensor: 1,
    };
    let one = two_steps(one_rank).remove(0);
    assert!(one.reports.iter().all(|report| report.gradient_norm > 0.0));
    for (sizes, schedule, [tensor, sampling_expert]) in [
        ([2, 1, 1], OneForwardOneBackward, [1, 1]),
        ([2, 1, 2], OneForwardOneBackward, [1, 2]),
        ([2, 2, 2], ZeroBubbleH1, [1, 4]),
        ([1, 3, 1], ZeroBubbleV, [1, 1]),
        ([4, 1, 4], OneForwardOneBackward, [1, 2]),
        ([2, 2, 2], ZeroBubbleH1, [2, 4]),
        ([2, 1, 2], OneForwardOneBackward, [2, 2]),
        ([1, 2, 1], ZeroBubbleV, [2, 1]),
    ] {
        let layouts = Layouts { sizes, schedule, sampling_expert, tensor };
        let many = two_steps(layouts);
        let first = &many[0];
        // The same weights to the bit in the first step: so the same rollouts and scores, whoever sampled them.
        assert_eq!(first.groups[0], one.groups[0], "{layouts:?}");
        assert_eq!(first.scores[..2], one.scores[..2], "{layouts:?}");
        assert!(many[1..].iter().all(|other| other.scores.iter().all(Vec::is_empty)));
        let sampled: Vec<usize> = many.iter().map(|steps| steps.sampled[0]).collect();
        let hands_out = |rank: usize| rank.is_multiple_of(tensor);
        let is_due = |(rank, groups): (usize, &usize)| (*groups > 0) == hands_out(rank);
        assert!(sampled.iter().enumerate().all(is_due), "everybody samples: {sampled:?}");
        for (many, one) in first.reports.iter().zip(&one.reports) {
            assert!((many.loss - one.loss).abs() < 1e-3, "{layouts:?}");
            assert!((many.gradient_norm / one.gradient_norm - 1.0).abs() < 1e-3, "{layouts:?}");
            let gap = many.grpo.as_ref().unwrap().logprob_gap_max;
            assert_eq!(gap, 0.0, "{layouts:?}: the sampler's numbers are the trainer's");
        }
        // A share of heads is part of what a rank of one stage trains; others' experts and layers are not.
        let switches = sizes[1] > 1 || sizes[2] != sampling_expert;
        for steps in &many {
            for entered in &steps.switches {
                let switched = entered.chores.switched;
                assert_eq!(switched.moved_bytes > 0, switches, "{layouts:?}");
                assert_eq!(switched.moved_bytes, switched.least_bytes, "{layouts:?}");
            }
        }
    }
}

/// An update by groups of which none teaches anything.
fn taught_nothing(sizes: [usize; 3], schedule: PipelineSchedule) -> StepReport {
    let layouts = Layouts { sizes, schedule, sampling_expert: 1, tensor: 1 };
    let mut reports = on_engines(layouts, |engine, _| {
        let balance = Balance::NONE;
        engine.prepare(&PrepareStage { balance, ..stage(None) }).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let settings = GrpoSettings { kl_weight: 0.0, ..settings() };
        let (groups, micro_batch, share_prompts) = (Vec::new(), 0, true);
        engine.train(&TrainJob::Grpo { groups, settings, micro_batch, share_prompts }).unwrap()
    });
    reports.remove(0)
}

#[test]
fn a_step_that_trains_on_nothing_tells_as_much_of_its_layers_over_ranks() {
    let one = taught_nothing([1, 1, 1], OneForwardOneBackward);
    assert!(!one.routing.is_empty() && one.rows == 0 && one.gradient_norm == 0.0, "{one:?}");
    for (sizes, schedule) in
        [([2, 1, 2], OneForwardOneBackward), ([2, 2, 1], ZeroBubbleH2), ([1, 2, 1], ZeroBubbleV)]
    {
        let many = taught_nothing(sizes, schedule);
        assert_eq!((many.routing, many.rows), (one.routing.clone(), 0), "{sizes:?}");
    }
}

/// Three updates, each by rollouts of the version before the one that it changes (the first by its own): those of the next
/// step are asked for before the update.
fn updates(
    engine: &mut HybridEngine,
    mut ask: impl FnMut(&mut HybridEngine, u64, u64),
    mut take: impl FnMut(&mut HybridEngine) -> Vec<TokenGroup>,
) -> (Vec<Vec<TokenGroup>>, Vec<StepReport>) {
    let (mut all, mut reports) = (Vec::new(), Vec::new());
    ask(engine, 0, 0);
    for step in 0..3 {
        let groups = take(engine);
        ask(engine, step + 1, step);
        engine.enter_phase(Phase::Train).unwrap();
        let job = asked(step, step.saturating_sub(1));
        let groups_scored = groups.iter().map(|group| scored(group, &job)).collect();
        let settings = GrpoSettings { max_new_tokens: 9, ..settings() };
        let job =
            TrainJob::Grpo { groups: groups_scored, settings, micro_batch: 0, share_prompts: true };
        reports.push(engine.train(&job).unwrap());
        all.push(groups);
    }
    take(engine);
    (all, reports)
}

fn asked(step: u64, policy_version: u64) -> GenerateJob {
    GenerateJob { step, ..job(policy_version) }
}

/// One rank, which samples ahead and then trains.
fn samples_ahead(engine: &mut HybridEngine) -> (Vec<Vec<TokenGroup>>, Vec<StepReport>) {
    engine.prepare(&PrepareStage { balance: Balance::NONE, ..stage(None) }).unwrap();
    let ahead = RefCell::new(Vec::new());
    let ask = |engine: &mut HybridEngine, step, version| {
        engine.enter_phase(Phase::Generate).unwrap();
        let job = asked(step, version);
        engine.generate(&job, &mut |group| ahead.borrow_mut().push(group)).unwrap();
    };
    let take = |_: &mut HybridEngine| {
        let mut groups = std::mem::take(&mut *ahead.borrow_mut());
        groups.sort_by_key(|group: &TokenGroup| group.slot);
        groups
    };
    updates(engine, ask, take)
}

/// Two ranks that only sample and share the experts.
pub const SHARED_EXPERTS: Sampling = Sampling { ranks: 2, tensor: 1, expert: 2 };

/// A trainer, or one of two ranks that only sample.
pub fn trainer_or_sampler(
    rank: usize,
    link: Local,
    spill: PathBuf,
    samplers_layout: Sampling,
) -> HybridEngine {
    let sampling = if rank > 0 { samplers_layout } else { Team::alone().sampling };
    let whole = team(link, Mesh::ONE, OneForwardOneBackward);
    let team = Team { sampling, samplers: 2, samplers_layout, ..whole };
    let engine = EngineConfig { threads: 1, page_tokens: 4, ..EngineConfig::default() };
    let setup = EngineSetup { model: model(), engine, seed: 1, spill, team };
    let mut engine = HybridEngine::new(setup).unwrap();
    engine.prepare(&PrepareStage { balance: Balance::NONE, ..stage(None) }).unwrap();
    engine
}

/// Samples what is asked for, each step from the version that was handed over for it.
fn sample_all(mut engine: HybridEngine, work: Receiver<(u64, u64)>, made: Sender<Vec<TokenGroup>>) {
    for (step, version) in work {
        if step > 0 {
            engine.hand_over(version).unwrap();
        }
        engine.enter_phase(Phase::Generate).unwrap();
        let (job, mut groups) = (asked(step, version), Vec::new());
        engine.generate(&job, &mut |group| groups.push(group)).unwrap();
        made.send(groups).unwrap();
    }
}

#[test]
fn who_only_samples_gets_each_version_and_samples_beside_training_what_one_rank_would() {
    check_samplers(SHARED_EXPERTS);
}

#[test]
fn samplers_that_share_heads_sample_what_one_rank_would() {
    // With experts whole on each, and with experts shared as well.
    check_samplers(Sampling { ranks: 2, tensor: 2, expert: 1 });
    check_samplers(Sampling { ranks: 2, tensor: 2, expert: 2 });
}

fn check_samplers(layout: Sampling) {
    let alone = Layouts {
        sizes: [1, 1, 1],
        schedule: OneForwardOneBackward,
        sampling_expert: 1,
        tensor: 1,
    };
    let one = on_engines(alone, |engine, _| samples_ahead(engine)).remove(0);
    let folder = TempDir::new().unwrap();
    let spill = |rank: usize| folder.path().join(rank.to_string());
    let many = thread::scope(|scope| {
        let mut links = Local::new(3).into_iter();
        let first = links.next().unwrap();
        let (made, groups) = channel();
        let sampler = |(place, link)| {
            let (orders, work) = channel();
            let (made, spill) = (made.clone(), spill(1 + place));
            scope.spawn(move || {
                sample_all(trainer_or_sampler(1 + place, link, spill, layout), work, made)
            });
            orders
        };
        let orders: Vec<_> = links.enumerate().map(sampler).collect();
        let ask = |engine: &mut HybridEngine, step: u64, version: u64| {
            orders.iter().for_each(|order| order.send((step, version)).unwrap());
            if step > 0 {
                // An eval of the policy lends its weights to the scoring.
                engine.enter_phase(Phase::Score).unwrap();
                let (sequences, first) = (vec![vec![3, 4, 5, 6]], vec![1]);
                let job = ScoreJob { role: Role::Policy, sequences, temperature: 1.0, first };
                engine.score(&job).unwrap();
                let switched = engine.hand_over(version).unwrap();
                assert_eq!(switched.moved_bytes, switched.least_bytes);
                assert_eq!(switched.sent_bytes, switched.moved_bytes, "it alone has them");
            }
        };
        let take = |_: &mut HybridEngine| {
            let next = || groups.recv_timeout(Duration::from_secs(60)).unwrap();
            let mut all = [next(), next()].concat();
            all.sort_by_key(|group: &TokenGroup| group.slot);
            all
        };
        updates(&mut trainer_or_sampler(0, first, spill(0), layout), ask, take)
    });
    assert_eq!(many.0, one.0, "the same rollouts to the bit");
    let figures = |reports: &[StepReport]| -> Vec<[u64; 2]> {
        reports.iter().map(|r| [r.loss, r.gradient_norm].map(f64::to_bits)).collect()
    };
    assert_eq!(figures(&many.1), figures(&one.1));
    let versions: Vec<u64> = many.0.iter().map(|groups| groups[0].policy_version).collect();
    assert_eq!(versions, [0, 0, 1]);
}

#[test]
fn a_rank_whose_weights_are_another_version_is_refused_before_its_first_token() {
    let layouts =
        Layouts { sizes: [1, 2, 1], schedule: ZeroBubbleH1, sampling_expert: 1, tensor: 1 };
    let folder = TempDir::new().unwrap();
    let errors = on_engines(layouts, |engine, rank| {
        engine.prepare(&stage(None)).unwrap();
        let saved = engine.save(folder.path(), true).unwrap();
        // As if a step had not reached this rank.
        let policy_version = if rank == 1 { 3 } else { saved.policy_version };
        engine.restore(folder.path(), &SavedState { policy_version, ..saved }).unwrap();
        engine.enter_phase(Phase::Generate).unwrap_err().to_string()
    });
    for error in errors {
        assert!(
            error.contains("policy version 3") && error.contains("policy version 0"),
            "{error}"
        );
    }
}
