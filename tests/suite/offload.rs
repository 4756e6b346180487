//! Offloading by plan: a step under a tight budget computes the same bits, keeps the budget at every moment, and moves beside
//! its computation; where transfers are forced to be serial nothing overlaps.

use crate::engine::{batch, rollouts};
use crate::tiny::config;
use rehearsal::cluster::layout::Sampling;
use rehearsal::cluster::{Local, Team};
use rehearsal::config::{Bytes, EngineConfig, ModelConfig};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::offload_plan::Tier;
use rehearsal::engine::phase::*;
use rehearsal::engine::timeline::Timeline;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use tempfile::TempDir;

/// 3.4 million parameters, so that a transfer takes milliseconds.
fn model() -> ModelConfig {
    let mut config = config();
    (config.hidden_size, config.n_routed_experts, config.moe_intermediate_size) = (128, 32, 128);
    config
}

fn engine(folder: &Path, edit: impl FnOnce(&mut EngineConfig)) -> HybridEngine {
    let mut engine = EngineConfig { threads: 1, page_tokens: 4, ..EngineConfig::default() };
    edit(&mut engine);
    let (spill, team) = (folder.join("spill"), Team::alone());
    HybridEngine::new(EngineSetup { model: model(), engine, seed: 1, spill, team }).unwrap()
}

/// A folder with weights that reference and reward models are made from.
fn weights(folder: &Path) -> ModelSource {
    let place = folder.join("weights");
    std::fs::create_dir(&place).unwrap();
    let mut engine = engine(folder, |_| {});
    engine.prepare(&crate::engine::stage(None)).unwrap();
    engine.save(&place, false).unwrap();
    ModelSource::Folder(place)
}

fn stage(weights: &ModelSource) -> PrepareStage {
    let ModelSource::Folder(folder) = weights else { unreachable!("it was saved") };
    let rewards = ["helpful", "safety"].map(|name| (name.to_string(), folder.clone()));
    PrepareStage { rewards: rewards.into(), ..crate::engine::stage(Some(weights.clone())) }
}

/// Steps of alignment. Tells everything that was computed, and the timeline of each step.
fn steps(engine: &mut HybridEngine, count: u64) -> (Vec<String>, Vec<Timeline>) {
    let (mut seen, mut timelines) = (Vec::new(), Vec::new());
    for step in 0..count {
        seen.push(format!("{:?}", rollouts(engine, step)));
        seen.push(scores_and_update(engine));
        timelines.push(engine.enter_phase(Phase::Train).unwrap().timeline);
    }
    (seen, timelines)
}

/// Scores of the models, and the loss of an update.
fn scores_and_update(engine: &mut HybridEngine) -> String {
    engine.enter_phase(Phase::Score).unwrap();
    let mut seen = String::new();
    let rewards = ["helpful", "safety"].map(|name| Role::Reward(name.to_string()));
    for role in rewards.into_iter().chain([Role::Reference]) {
        let sequences = vec![(0..24).collect(), (3..20).collect()];
        let job = ScoreJob { role, sequences, temperature: 1.0, first: vec![2, 2] };
        seen += &format!("{:?}", engine.score(&job).unwrap());
    }
    engine.enter_phase(Phase::Train).unwrap();
    format!("{seen} {:x}", engine.train(&batch()).unwrap().loss.to_bits())
}

/// What `steps` gives from a new engine, with the most bytes it held and its checkpoint.
struct Outcome {
    seen: Vec<String>,
    timelines: Vec<Timeline>,
    high_water: u64,
    saved: Vec<Vec<u8>>,
}

fn outcome(edit: impl FnOnce(&mut EngineConfig)) -> Outcome {
    let folder = TempDir::new().unwrap();
    let source = weights(folder.path());
    let mut engine = engine(folder.path(), edit);
    engine.prepare(&stage(&source)).unwrap();
    let (seen, timelines) = steps(&mut engine, 4);
    let place = folder.path().join("saved");
    std::fs::create_dir(&place).unwrap();
    engine.save(&place, true).unwrap();
    let file = |name| std::fs::read(place.join(name)).unwrap();
    let saved = ["model.safetensors", "optimizer.safetensors"].map(file).into();
    let high_water = engine.holdings().high_water;
    drop(engine);
    assert!(!folder.path().join("spill").exists(), "copies go with the engine");
    Outcome { seen, timelines, high_water, saved }
}

/// Steps of a trainer that gives each version to a rank that only samples: its figures, and the timeline of each step.
fn beside_a_sampler(folder: &Path, source: &ModelSource, budget: Option<u64>) -> Outcome {
    let one = Sampling { ranks: 1, tensor: 1, expert: 1 };
    let mut links = Local::new(2).into_iter();
    let mut setup = |name: &str| {
        let link = Arc::new(links.next().unwrap());
        let team = Team { link, samplers: 1, samplers_layout: one, ..Team::alone() };
        let engine = EngineConfig { threads: 1, page_tokens: 4, ..EngineConfig::default() };
        EngineSetup { model: model(), engine, seed: 1, spill: folder.join(name), team }
    };
    let (mut trainer, sampler) = (setup("trainer"), setup("sampler"));
    trainer.engine.budget = budget.map(Bytes);
    let (orders, work) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut engine = HybridEngine::new(sampler).unwrap();
            engine.prepare(&stage(source)).unwrap();
            for version in work {
                engine.hand_over(version).unwrap();
            }
        });
        let mut engine = HybridEngine::new(trainer).unwrap();
        engine.prepare(&stage(source)).unwrap();
        let (mut seen, mut timelines) = (Vec::new(), Vec::new());
        for version in 0..5 {
            if version > 0 {
                orders.send(version).unwrap();
                engine.hand_over(version).unwrap();
            }
            seen.push(scores_and_update(&mut engine));
            timelines.push(engine.enter_phase(Phase::Train).unwrap().timeline);
        }
        drop(orders);
        let high_water = engine.holdings().high_water;
        Outcome { seen, timelines, high_water, saved: Vec::new() }
    })
}

fn check_same(one: &Outcome, other: &Outcome) {
    assert!(one.seen == other.seen, "what was computed differs");
    assert!(one.saved == other.saved, "checkpoints differ");
}

#[test]
fn under_any_budget_a_step_has_the_same_bits_and_keeps_the_budget() {
    let roomy = outcome(|_| {});
    assert!(roomy.timelines.iter().all(|t| t.moved.is_empty() && t.waited.is_empty()));
    // Training alone takes two thirds of what a step without a budget holds.
    let mut moved = 0;
    for (share, host) in [(0.9, None), (0.8, None), (0.7, Some(0)), (0.7, Some(20 << 20))] {
        let budget = (roomy.high_water as f64 * share) as u64;
        let tight = outcome(|engine| {
            engine.budget = Some(Bytes(budget));
            engine.host_budget = host.map(Bytes);
        });
        check_same(&tight, &roomy);
        assert!(tight.high_water <= budget, "{} of {budget}", tight.high_water);
        let last = tight.timelines.last().unwrap();
        let tiers = |tier| last.moved.iter().any(|moved| moved.copy == tier);
        println!(
            "{share}: {:?} bytes moved, exposed {:.3}, overlap {:?}",
            last.bytes(),
            last.exposed_share(),
            last.overlap_share()
        );
        assert!(host != Some(0) || !tiers(Tier::Host), "the host has no room: {last:?}");
        assert!(host.is_some() || !tiers(Tier::Disk), "the host has room: {last:?}");
        moved += last.bytes()[0];
    }
    assert!(moved > 0, "the budgets are tight");
}

#[test]
fn transfers_overlap_computation_unless_they_are_forced_to_be_serial() {
    let roomy = outcome(|_| {});
    let budget = Bytes((roomy.high_water as f64 * 0.75) as u64);
    let with =
        |overlap| outcome(|engine| (engine.budget, engine.overlap) = (Some(budget), overlap));
    let (beside, serial) = (with(true), with(false));
    check_same(&beside, &roomy);
    check_same(&serial, &roomy);
    // The first step is planned from guesses. A machine that is busy with other things only lowers what overlaps.
    let shares = |outcome: &Outcome| -> Vec<f64> {
        outcome.timelines[1..].iter().map(|t| t.overlap_share().expect("things move")).collect()
    };
    println!("{:?} {:?}", shares(&beside), shares(&serial));
    assert!(shares(&beside).iter().any(|share| *share > 0.1), "{:?}", beside.timelines);
    assert!(shares(&serial).iter().all(|share| *share < 1e-3), "{:?}", serial.timelines);
    let exposed = |outcome: &Outcome| {
        let of = outcome.timelines[1..].iter().map(Timeline::exposed_seconds);
        of.fold(f64::INFINITY, f64::min)
    };
    assert!(exposed(&beside) < exposed(&serial), "{} {}", exposed(&beside), exposed(&serial));
}

#[test]
fn a_trainer_beside_a_sampler_learns_its_step_and_tells_each_one_apart() {
    let folder = TempDir::new().unwrap();
    let source = weights(folder.path());
    let roomy = beside_a_sampler(folder.path(), &source, None);
    let budget = (roomy.high_water as f64 * 0.75) as u64;
    let tight = beside_a_sampler(folder.path(), &source, Some(budget));
    check_same(&tight, &roomy);
    assert!(tight.high_water <= budget, "{} of {budget}", tight.high_water);
    let cycle = ["score reward helpful", "score reward safety", "score reference", "train"];
    for timeline in &tight.timelines {
        let phases: Vec<&str> = timeline.computed.iter().map(|span| span.phase.as_str()).collect();
        assert_eq!(phases, cycle, "one step, and nothing of the one before");
    }
    // Three models that are scored one after the other are read in each step.
    assert!(
        tight.timelines.iter().all(|timeline| timeline.bytes()[0] > 0),
        "{:?}",
        tight.timelines
    );
}
