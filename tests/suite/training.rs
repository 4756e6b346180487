//! Training through the engine: how weights begin, what an update does to them, and what must change no bit.

use crate::engine::{engine, rollouts, scored, settings, stage};
use crate::tiny::{Tiny, config, cpu, reference};
use rehearsal::config::EngineConfig;
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::{OptimizerConfig, RatioLevel};
use rehearsal::data::example::{Batch, Pair, Sequence};
use rehearsal::engine::hybrid::HybridEngine;
use rehearsal::engine::phase::*;
use rehearsal::model::{Gradients, Params};
use rehearsal::train::Optimizer;
use rehearsal::train::Ranks;
use rehearsal_kernels::Kernels;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// The bytes of the weights (and moments) that the engine would commit.
pub fn saved(engine: &mut HybridEngine) -> BTreeMap<String, Vec<u8>> {
    let folder = TempDir::new().unwrap();
    engine.save(folder.path(), true).unwrap();
    let files = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect()
}

fn prepared(folder: &TempDir, stage: &PrepareStage) -> HybridEngine {
    let mut engine = engine(folder, |_| {});
    engine.prepare(stage).unwrap();
    engine.enter_phase(Phase::Train).unwrap();
    engine
}

/// Documents of unlike lengths.
fn documents(lengths: &[u32]) -> Batch {
    let document = |(d, length): (usize, &u32)| {
        let token = |i: u32| (i * 5 + d as u32 * 7 + 1) % 29;
        let tokens: Vec<u32> = (0..*length).map(token).collect();
        let target = (0..*length).map(|i| i > 0 && !(i + d as u32).is_multiple_of(4)).collect();
        Sequence { tokens, target }
    };
    Batch::Documents(lengths.iter().enumerate().map(document).collect())
}

/// Pairs whose chosen reply says 5 and whose rejected one says 6, after a prompt that depends on `first`.
fn pairs(first: u32, count: u32) -> Vec<Pair> {
    let reply = |i: u32, said: u32| {
        let mut tokens: Vec<u32> = (0..3 + i % 4).map(|t| 7 + (t * 3 + i * 5) % 20).collect();
        tokens.extend([said, 1]);
        tokens
    };
    (first..first + count).map(|i| Pair { chosen: reply(i, 5), rejected: reply(i, 6) }).collect()
}

/// A GRPO update whose groups share their prompts.
fn grpo(groups: Vec<rehearsal::rl::rollout::ScoredGroup>, micro_batch: usize) -> TrainJob {
    TrainJob::Grpo { groups, settings: settings(), micro_batch, share_prompts: true }
}

#[test]
fn weights_begin_with_the_configs_deviation_and_norms_with_one() {
    let kernels = cpu(1);
    let mut wide = config();
    (wide.hidden_size, wide.vocab_size, wide.initializer_range) = (96, 400, 0.006);
    let tiny = Tiny::new(&kernels, &wide, true);
    let mut params = Params::new(&kernels, tiny.model.layout.clone(), "policy").unwrap();
    params.initialize(&kernels, 7, wide.initializer_range);
    let mut seen = Vec::new();
    for (index, spec) in tiny.model.layout.specs.iter().enumerate() {
        let values = kernels.download_f64(&params.slab.tensor(index));
        if spec.is_norm {
            assert!(values.iter().all(|value| *value == 1.0), "{}", spec.name);
        } else if tiny.model.layout.score == Some(index) {
            assert!(values.iter().all(|value| *value == 0.0), "{}", spec.name);
        } else {
            seen.extend(values);
        }
    }
    let mean = seen.iter().sum::<f64>() / seen.len() as f64;
    let deviation =
        (seen.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / seen.len() as f64).sqrt();
    assert!((deviation / 0.006 - 1.0).abs() < 0.02, "deviation {deviation}");
    assert!(mean.abs() < 0.006 * 0.02, "mean {mean}");
}

#[test]
fn an_update_clips_by_the_global_norm_and_decays_matrices_only() {
    let kernels = reference();
    let mut tiny = Tiny::new(&kernels, &config(), false);
    let layout = tiny.model.layout.clone();
    let mut gradients = Gradients::new(&kernels, &layout, "policy").unwrap();
    let gradient = |index: usize, i: usize| ((index * 31 + i * 17) % 13) as f32 - 6.0;
    for (index, spec) in layout.specs.iter().enumerate() {
        let values: Vec<f32> = (0..spec.rows * spec.cols).map(|i| gradient(index, i)).collect();
        kernels.upload(&values, &mut gradients.slab.tensor_mut(index));
    }
    let norm = kernels.squared_sum(&gradients.slab.whole()).sqrt();
    let runs = Ranks::alone(&tiny.model.config, &layout).zero.own;
    let settings = OptimizerConfig { weight_decay: 0.1, clip: 1.0, ..OptimizerConfig::default() };
    let before: Vec<Vec<f64>> = weights(&kernels, &tiny.params);
    let mut optimizer = Optimizer::new(&kernels, &runs, "policy").unwrap();
    let (params, scale) = (&mut tiny.params, settings.clip / norm);
    optimizer.update(&kernels, &settings, 0.01, scale, &runs, params, &gradients, false);
    let after = weights(&kernels, &tiny.params);
    for (index, spec) in layout.specs.iter().enumerate() {
        for (i, (before, after)) in before[index].iter().zip(&after[index]).enumerate() {
            // The first step of AdamW by its formula: m/(1-b1) = g and v/(1-b2) = g^2.
            let g = f64::from(gradient(index, i)) / norm;
            let decay = if spec.is_norm { 0.0 } else { 0.1 * before };
            let expected = before - 0.01 * (g / (g.abs() + settings.epsilon) + decay);
            assert!((after - expected).abs() < 1e-9, "{} {i}: {after} {expected}", spec.name);
        }
    }
}

fn weights(kernels: &dyn Kernels, params: &Params) -> Vec<Vec<f64>> {
    let tensor = |index| kernels.download_f64(&params.slab.tensor(index));
    (0..params.slab.count()).map(tensor).collect()
}

#[test]
fn a_step_that_is_not_finite_changes_no_weight_and_no_moment() {
    let folder = TempDir::new().unwrap();
    let mut engine = prepared(&folder, &stage(None));
    let groups = {
        let groups = rollouts(&mut engine, 0);
        engine.enter_phase(Phase::Train).unwrap();
        scored(groups, &[f64::NAN, 1.0, -1.0])
    };
    let batch = documents(&[9, 5]);
    engine.train(&TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None }).unwrap();
    let before = saved(&mut engine);
    let job = grpo(groups, 0);
    let report = engine.train(&job).unwrap();
    assert!(report.skipped && report.policy_version == 1, "{report:?}");
    assert!(saved(&mut engine) == before);
}

#[test]
fn the_micro_batch_changes_no_bit_for_ragged_documents_pairs_and_rollouts() {
    type Job<'a> = &'a dyn Fn(usize) -> TrainJob;
    let balanced = PrepareStage { balance: Balance::of_experts(0.01), ..stage(None) };
    let reward = PrepareStage { value_head: true, balance: Balance::NONE, ..stage(None) };
    let outcome = |plan: &PrepareStage, micro_batch: usize, job: Job<'_>| {
        let folder = TempDir::new().unwrap();
        let mut engine = prepared(&folder, plan);
        for _ in 0..3 {
            engine.train(&job(micro_batch)).unwrap();
        }
        saved(&mut engine)
    };
    let sampled = {
        let folder = TempDir::new().unwrap();
        let mut engine = prepared(&folder, &stage(None));
        scored(rollouts(&mut engine, 0), &[1.0, -0.3, -0.7])
    };
    let share = 0.0;
    let ragged = |micro_batch| TrainJob::Batch {
        batch: documents(&[3, 17, 2, 30, 9, 11, 2]),
        share,
        micro_batch,
        dropping: None,
    };
    let preferred = |micro_batch| TrainJob::Batch {
        batch: Batch::Pairs(pairs(0, 7)),
        share,
        micro_batch,
        dropping: None,
    };
    let aligned = |micro_batch| grpo(sampled.clone(), micro_batch);
    let plain = PrepareStage { balance: Balance::NONE, ..stage(None) };
    let jobs: [(&str, &PrepareStage, Job<'_>); 4] = [
        ("documents", &balanced, &ragged),
        ("pairs", &reward, &preferred),
        ("rollouts", &balanced, &aligned),
        ("groups", &plain, &aligned),
    ];
    for (name, plan, job) in jobs {
        let whole = outcome(plan, 0, job);
        for micro_batch in [1, 2, 3, 5] {
            assert!(outcome(plan, micro_batch, job) == whole, "{name}, {micro_batch} at once");
        }
    }
}

#[test]
fn batch_mix_page_size_and_threads_change_no_rollout() {
    let outcome = |edit: &dyn Fn(&mut EngineConfig)| {
        let folder = TempDir::new().unwrap();
        let mut engine = engine(&folder, edit);
        engine.prepare(&stage(None)).unwrap();
        rollouts(&mut engine, 0)
    };
    let usual = outcome(&|_| {});
    assert!(
        usual.iter().flat_map(|g| &g.rollouts).any(|r| r.tokens != usual[0].rollouts[0].tokens)
    );
    assert_eq!(outcome(&|e| e.decode_batch = 1), usual, "one sequence at a time");
    assert_eq!(outcome(&|e| (e.decode_batch, e.page_tokens) = (4, 3)), usual, "odd pages");
    assert_eq!(outcome(&|e| e.threads = 1), usual, "one thread");
}

#[test]
fn the_reference_stays_and_a_second_update_sees_the_first() {
    let folder = TempDir::new().unwrap();
    let mut engine = prepared(&folder, &stage(Some(ModelSource::Fresh)));
    let asked = || ScoreJob {
        role: Role::Reference,
        sequences: vec![vec![5, 6, 7, 8, 9]],
        temperature: 1.0,
        first: vec![1],
    };
    let logprobs = |engine: &mut HybridEngine, role| {
        engine.enter_phase(Phase::Score).unwrap();
        engine.score(&ScoreJob { role, ..asked() }).unwrap()
    };
    let before = logprobs(&mut engine, Role::Reference);
    assert_eq!(logprobs(&mut engine, Role::Policy), before, "both begin alike");
    let groups = scored(rollouts(&mut engine, 0), &[1.4, -0.7, -0.7]);
    engine.enter_phase(Phase::Train).unwrap();
    let job = |ratio_level| TrainJob::Grpo {
        groups: groups.clone(),
        settings: rehearsal::rl::grpo::GrpoSettings { ratio_level, ..settings() },
        micro_batch: 0,
        share_prompts: true,
    };
    let first = engine.train(&job(RatioLevel::Token)).unwrap().grpo.unwrap();
    let second = engine.train(&job(RatioLevel::Sequence)).unwrap();
    assert_eq!((first.logprob_gap_max, second.policy_version), (0.0, 2));
    assert!(second.grpo.unwrap().logprob_gap_max > 0.0, "the policy has moved from its samples");
    assert_eq!(logprobs(&mut engine, Role::Reference), before);
    assert_ne!(logprobs(&mut engine, Role::Policy), before);
}

/// Fits a reward model that starts from `policy`; returns the share of held-out pairs that it orders right.
fn fitted(engine: &mut HybridEngine, steps: u32) -> f64 {
    for step in 0..steps {
        let batch = Batch::Pairs(pairs(step * 8, 8));
        engine
            .train(&TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None })
            .unwrap();
    }
    let held_out = pairs(100_003, 40);
    let raw = scores(engine, Role::Policy, &held_out);
    raw.chunks(2).filter(|pair| pair[0] > pair[1]).count() as f64 / 40.0
}

fn scores(engine: &mut HybridEngine, role: Role, pairs: &[Pair]) -> Vec<f64> {
    engine.enter_phase(Phase::Score).unwrap();
    let sequences: Vec<Vec<u32>> =
        pairs.iter().flat_map(|pair| [pair.chosen.clone(), pair.rejected.clone()]).collect();
    let first = vec![1; sequences.len()];
    let scores = engine.score(&ScoreJob { role, sequences, temperature: 1.0, first }).unwrap();
    let reward = |score: SequenceScore| match score {
        SequenceScore::Reward(reward) => reward,
        SequenceScore::Logprobs(_) => panic!("a reward model gives one score"),
    };
    scores.into_iter().map(reward).collect()
}

#[test]
fn a_reward_model_begins_as_its_policy_learns_what_is_separable_and_keeps_its_calibration() {
    let folder = TempDir::new().unwrap();
    let (policy, reward) = (folder.path().join("policy"), folder.path().join("reward"));
    let mut engine = prepared(&folder, &stage(None));
    let batch = documents(&[9, 12]);
    engine.train(&TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None }).unwrap();
    let tuned = save(&mut engine, &policy);
    let optimizer =
        OptimizerConfig { learning_rate: 0.01, warmup_steps: 0, ..OptimizerConfig::default() };
    let fit = PrepareStage {
        policy: ModelSource::Folder(policy.clone()),
        value_head: true,
        balance: Balance::NONE,
        optimizer: Some(optimizer),
        steps: 60,
        ..stage(None)
    };
    engine.prepare(&fit).unwrap();
    let begun = save(&mut engine, &folder.path().join("begun"));
    for (name, bytes) in &tuned {
        assert!(begun[name] == *bytes, "{name} is the policy's bit for bit");
    }
    assert_eq!(begun.len(), tuned.len() + 1, "and a head is added");
    engine.enter_phase(Phase::Train).unwrap();
    let accuracy = fitted(&mut engine, 60);
    assert!(accuracy > 0.9, "accuracy {accuracy}");
    let raw = scores(&mut engine, Role::Policy, &pairs(5, 4));
    engine.calibrate(0.75, 2.5);
    save(&mut engine, &reward);
    let judge = PrepareStage {
        policy: ModelSource::Folder(policy),
        rewards: BTreeMap::from([("clear".to_string(), reward)]),
        ..stage(None)
    };
    engine.prepare(&judge).unwrap();
    let calibrated = scores(&mut engine, Role::Reward("clear".to_string()), &pairs(5, 4));
    for (raw, calibrated) in raw.iter().zip(&calibrated) {
        assert!((calibrated - (raw - 0.75) / 2.5).abs() < 1e-6, "{raw} {calibrated}");
    }
}

/// Saves the policy and returns its tensors' bytes by name.
fn save(engine: &mut HybridEngine, folder: &Path) -> BTreeMap<String, Vec<f32>> {
    std::fs::create_dir(folder).unwrap();
    engine.save(folder, false).unwrap();
    let tensors = rehearsal::checkpoint::TensorFolder::open(folder).unwrap();
    let read = |name: &String| (name.clone(), tensors.read_f32(name).unwrap());
    tensors.names().iter().map(|name| read(&name.to_string())).collect()
}
