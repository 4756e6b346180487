//! The hybrid engine: what is resident in each phase, what a stamp refuses, what comes back bit for bit.

use crate::tiny::config;
use rehearsal::cluster::Team;
use rehearsal::config::engine::{AttentionForm, Prefill};
use rehearsal::config::routing::Balance;
use rehearsal::config::stage::{LengthNorm, OptimizerConfig, RatioLevel};
use rehearsal::config::{Bytes, EngineConfig, Fault, Offload};
use rehearsal::data::example::{Batch, Prompt, Sequence};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine, SavedState};
use rehearsal::engine::phase::*;
use rehearsal::rl::grpo::GrpoSettings;
use rehearsal::rl::rollout::{Group, ScoredGroup};
use std::collections::BTreeMap;
use tempfile::TempDir;

pub fn engine(folder: &TempDir, edit: impl FnOnce(&mut EngineConfig)) -> HybridEngine {
    let mut engine = EngineConfig { threads: 2, page_tokens: 4, ..EngineConfig::default() };
    edit(&mut engine);
    HybridEngine::new(EngineSetup {
        model: config(),
        engine,
        seed: 1,
        spill: folder.path().join("spill"),
        team: Team::alone(),
    })
    .unwrap()
}

pub fn stage(reference: Option<ModelSource>) -> PrepareStage {
    PrepareStage {
        policy: ModelSource::Fresh,
        reference,
        rewards: BTreeMap::new(),
        optimizer: Some(OptimizerConfig::default()),
        steps: 10,
        value_head: false,
        yarn: None,
        form: AttentionForm::Absorbed,
        prefill: Prefill::Absorbed,
        balance: Balance::of_experts(0.01),
    }
}

pub fn batch() -> TrainJob {
    let document = |d: u32| Sequence::all_targets((0..12).map(|i| (i * 5 + d) % 29).collect());
    let batch = Batch::Documents((0..3).map(document).collect());
    TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None }
}

pub fn job(policy_version: u64) -> GenerateJob {
    let request = |slot: u32| GenerateRequest {
        slot,
        tokens: vec![slot + 2, 3, 4, 5, 6],
        prompt: slot.into(),
        samples: 3,
    };
    GenerateJob {
        requests: (0..2).map(request).collect(),
        max_new_tokens: 6,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        stop_tokens: vec![1],
        seed: 4,
        step: 2,
        policy_version,
    }
}

pub fn rollouts(engine: &mut HybridEngine, version: u64) -> Vec<TokenGroup> {
    engine.enter_phase(Phase::Generate).unwrap();
    let mut groups = Vec::new();
    engine.generate(&job(version), &mut |group| groups.push(group)).unwrap();
    groups.sort_by_key(|g| g.slot);
    groups
}

pub fn held(report: &PhaseReport, kind: &str) -> u64 {
    report.held.iter().filter(|(name, _)| name.ends_with(kind)).map(|(_, bytes)| bytes).sum()
}

#[test]
fn each_phase_holds_what_it_needs_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder, |engine| engine.offload = Some(Offload::ALL.to_vec()));
    engine.prepare(&stage(Some(ModelSource::Fresh))).unwrap();
    for _ in 0..2 {
        engine.enter_phase(Phase::Train).unwrap();
        engine.train(&batch()).unwrap();
        let train = engine.holdings();
        assert!(
            held(&train, "/gradients") > 0
                && held(&train, "/moments") > 0
                && held(&train, "/packed") > 0
        );
        assert_eq!((held(&train, "/cache"), held(&train, "reference/weights")), (0, 0));

        let version = engine.train(&batch()).unwrap().policy_version;
        rollouts(&mut engine, version);
        // A commit reads the moments; sampling goes on without them.
        let place = TempDir::new().unwrap();
        engine.save(place.path(), true).unwrap();
        rollouts(&mut engine, version);
        let generate = engine.holdings();
        assert!(held(&generate, "/cache") > 0 && held(&generate, "/packed") > 0);
        assert_eq!((held(&generate, "/gradients"), held(&generate, "/moments")), (0, 0));
        assert_eq!(held(&generate, "reference/weights"), 0);
        assert!(
            held(&generate, "/packed") < held(&train, "/packed"),
            "no input gradients are packed for sampling"
        );

        engine.enter_phase(Phase::Score).unwrap();
        let sequences = vec![vec![1, 2, 3, 4, 5]];
        engine
            .score(&ScoreJob { role: Role::Reference, sequences, temperature: 1.0, first: vec![2] })
            .unwrap();
        let score = engine.holdings();
        assert!(held(&score, "reference/weights") > 0);
        assert_eq!(
            (held(&score, "/cache"), held(&score, "/gradients"), held(&score, "/moments")),
            (0, 0, 0)
        );
    }
}

#[test]
fn a_change_of_phase_tells_what_of_it_was_packing_and_moving() {
    for offload in [vec![], vec![Offload::Optimizer, Offload::Reference]] {
        let folder = TempDir::new().unwrap();
        let moves = !offload.is_empty();
        let mut engine = engine(&folder, |engine| engine.offload = Some(offload));
        engine.prepare(&stage(Some(ModelSource::Fresh))).unwrap();
        let check = |report: &PhaseReport, packs: bool, moves: bool| {
            let chores = report.chores;
            assert_eq!(
                (chores.pack_seconds > 0.0, report.bytes_in + report.bytes_out > 0),
                (packs, moves)
            );
            assert!(chores.pack_seconds + chores.offload_seconds <= report.seconds, "{report:?}");
            assert_eq!(chores.reference_seconds, 0.0);
        };
        check(&engine.enter_phase(Phase::Train).unwrap(), true, moves);
        engine.train(&batch()).unwrap();
        let asked = engine.enter_phase(Phase::Train).unwrap();
        check(&asked, false, false);
        assert!(asked.left.pack_seconds > 0.0, "the update packed the new weights");
        let generate = engine.enter_phase(Phase::Generate).unwrap();
        check(&generate, true, moves);
        assert_eq!(generate.left, Default::default(), "it was told before");
        check(&engine.enter_phase(Phase::Score).unwrap(), false, false);
        let sequences = vec![vec![1, 2, 3, 4, 5]];
        let job = ScoreJob { role: Role::Reference, sequences, temperature: 1.0, first: vec![2] };
        engine.score(&job).unwrap();
        let train = engine.enter_phase(Phase::Train).unwrap();
        check(&train, true, moves);
        assert!(train.left.pack_seconds > 0.0 && train.left.reference_seconds > 0.0);
        let again = engine.enter_phase(Phase::Train).unwrap();
        assert_eq!((again.chores, again.left), Default::default(), "nothing was changed");
    }
}

#[test]
fn jobs_are_refused_in_the_wrong_phase_and_with_a_wrong_stamp() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder, |_| {});
    assert!(engine.train(&batch()).unwrap_err().to_string().contains("phase"));
    engine.prepare(&stage(None)).unwrap();
    engine.enter_phase(Phase::Train).unwrap();
    assert_eq!(engine.train(&batch()).unwrap().policy_version, 1);
    assert!(engine.generate(&job(1), &mut |_| {}).is_err(), "the policy is packed for training");
    engine.enter_phase(Phase::Generate).unwrap();
    let mut groups = 0;
    let refused = engine.generate(&job(0), &mut |_| groups += 1).unwrap_err().to_string();
    assert!(refused.contains("version") && groups == 0, "{refused}");
    engine.generate(&job(1), &mut |_| groups += 1).unwrap();
    assert_eq!(groups, 2);
    assert!(engine.train(&batch()).is_err());
}

#[test]
fn offloading_changes_no_bit_of_what_follows() {
    let outcome = |offload: Vec<Offload>| {
        let folder = TempDir::new().unwrap();
        let mut engine = engine(&folder, |e| e.offload = Some(offload));
        engine.prepare(&stage(Some(ModelSource::Fresh))).unwrap();
        let mut seen = Vec::new();
        for step in 1..=3 {
            engine.enter_phase(Phase::Train).unwrap();
            seen.push(format!("{:?}", engine.train(&batch()).unwrap().loss.to_bits()));
            seen.push(format!("{:?}", rollouts(&mut engine, step)));
            engine.enter_phase(Phase::Score).unwrap();
            let job = ScoreJob {
                role: Role::Reference,
                sequences: vec![vec![5, 6, 7]],
                temperature: 1.0,
                first: vec![1],
            };
            seen.push(format!("{:?}", engine.score(&job).unwrap()));
        }
        seen
    };
    assert_eq!(
        outcome(vec![]),
        outcome(vec![Offload::Optimizer, Offload::Reference, Offload::RewardModels])
    );
}

#[test]
fn a_saved_and_restored_policy_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let mut straight = engine(&folder, |_| {});
    straight.prepare(&stage(None)).unwrap();
    straight.enter_phase(Phase::Train).unwrap();
    straight.train(&batch()).unwrap();
    let place = folder.path().join("saved");
    std::fs::create_dir(&place).unwrap();
    let saved: SavedState = straight.save(&place, true).unwrap();
    assert_eq!((saved.policy_version, saved.optimizer_step), (1, 1));
    let other = TempDir::new().unwrap();
    let mut resumed = engine(&other, |_| {});
    resumed.prepare(&stage(None)).unwrap();
    // What cannot be read takes nothing from the engine: weights that are read before moments that are not there.
    let moments = place.join("optimizer.safetensors");
    std::fs::rename(&moments, folder.path().join("aside")).unwrap();
    let error = format!("{:#}", resumed.restore(&place, &saved).unwrap_err());
    assert!(error.contains("optimizer.safetensors"), "{error}");
    std::fs::rename(folder.path().join("aside"), &moments).unwrap();
    resumed.restore(&place, &saved).unwrap();
    for engine in [&mut straight, &mut resumed] {
        engine.enter_phase(Phase::Train).unwrap();
        engine.train(&batch()).unwrap();
    }
    assert_eq!(rollouts(&mut straight, 2), rollouts(&mut resumed, 2));
}

#[test]
fn micro_batches_change_no_bit() {
    let outcome = |micro: usize| {
        let folder = TempDir::new().unwrap();
        let mut engine = engine(&folder, |_| {});
        engine.prepare(&stage(None)).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let TrainJob::Batch { batch, .. } = batch() else { unreachable!() };
        for _ in 0..3 {
            let batch = batch.clone();
            engine
                .train(&TrainJob::Batch { batch, share: 0.0, micro_batch: micro, dropping: None })
                .unwrap();
        }
        rollouts(&mut engine, 3)
    };
    assert_eq!(outcome(0), outcome(1));
    assert_eq!(outcome(0), outcome(2));
}

#[test]
fn a_budget_is_kept_or_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let mut roomy = engine(&folder, |e| e.budget = Some(Bytes(64 << 20)));
    roomy.prepare(&stage(None)).unwrap();
    roomy.enter_phase(Phase::Train).unwrap();
    roomy.train(&batch()).unwrap();
    let peak = roomy.holdings().high_water;
    assert!(peak <= 64 << 20);
    let other = TempDir::new().unwrap();
    let mut tight = engine(&other, |e| e.budget = Some(Bytes(peak / 3)));
    let refused = tight
        .prepare(&stage(None))
        .and_then(|()| tight.enter_phase(Phase::Train))
        .and_then(|_| tight.train(&batch()));
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("engine.budget"), "{text}");
}

#[test]
fn a_rollout_whose_cache_exceeds_the_budget_is_refused_with_the_most_that_fits() {
    let (folder, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let entered = |engine: &mut HybridEngine| {
        engine.prepare(&stage(None)).unwrap();
        engine.enter_phase(Phase::Generate).unwrap();
    };
    let mut roomy = engine(&folder, |e| e.offload = Some(Offload::ALL.to_vec()));
    entered(&mut roomy);
    let resident = roomy.holdings().held;
    // What waits in the pool makes room for a cache.
    let resident: u64 =
        resident.iter().filter(|(k, _)| !k.starts_with("pool")).map(|(_, b)| b).sum();
    let mut tight = engine(&other, |e| e.budget = Some(Bytes(resident + (4 << 10))));
    entered(&mut tight);
    let long = GenerateJob { max_new_tokens: 40, ..job(0) };
    let refused = tight.generate(&long, &mut |_| ()).unwrap_err();
    assert_eq!(refused.downcast_ref::<Fault>().unwrap().exit_code(), 4);
    let text = refused.to_string();
    let most = text.split_once("at most ").unwrap().1.split_once(" new tokens").unwrap().0;
    let most: usize = most.parse().unwrap();
    assert!((1..40).contains(&most) && text.contains("5 + 40 tokens"), "{text}");
    // One more than that is refused for the same reason, and that many is not.
    let told = |max_new_tokens| {
        let job = GenerateJob { max_new_tokens, ..job(0) };
        let outcome = tight.generate(&job, &mut |_| ());
        outcome.err().is_some_and(|error| error.to_string().contains("of latent cache"))
    };
    assert_eq!([most, most + 1].map(told), [false, true], "{text}");
}

/// Settings of the paper's loss without a KL term.
pub fn settings() -> GrpoSettings {
    GrpoSettings {
        clip: 0.2,
        kl_weight: 0.0,
        temperature: 1.0,
        ratio_level: RatioLevel::Token,
        length_norm: LengthNorm::PerOutput,
        max_new_tokens: 6,
        importance_limit: None,
    }
}

/// The groups of a step as the update wants them, with given advantages.
pub fn scored(groups: Vec<TokenGroup>, advantages: &[f64]) -> Vec<ScoredGroup> {
    let requests = job(0).requests;
    let scored = |group: TokenGroup| {
        let prompt = Prompt {
            index: group.slot.into(),
            text: String::new(),
            tokens: requests[group.slot as usize].tokens.clone(),
            answer: None,
        };
        let count = group.rollouts.len();
        ScoredGroup {
            components: vec![vec![Some(0.0)]; count],
            rewards: vec![0.0; count],
            advantages: advantages.to_vec(),
            reference: Vec::new(),
            group: Group {
                slot: group.slot,
                prompt: prompt.into(),
                policy_version: group.policy_version,
                rollouts: group.rollouts.into(),
            },
        }
    };
    groups.into_iter().map(scored).collect()
}

#[test]
fn trainer_and_sampler_agree_and_advantage_moves_the_policy() {
    let folder = TempDir::new().unwrap();
    let mut engine = engine(&folder, |_| {});
    engine.prepare(&PrepareStage { balance: Balance::NONE, ..stage(None) }).unwrap();
    let groups = rollouts(&mut engine, 0);
    let chosen = groups[0].rollouts[0].clone();
    let settings = settings();
    engine.enter_phase(Phase::Train).unwrap();
    let groups = scored(groups, &[1.4, -0.7, -0.7]);
    let report = engine
        .train(&TrainJob::Grpo { groups, settings, micro_batch: 0, share_prompts: true })
        .unwrap();
    let grpo = report.grpo.unwrap();
    assert!(grpo.logprob_gap_max < 1e-5, "gap {}", grpo.logprob_gap_max);
    assert!(grpo.clip_share == 0.0 && grpo.entropy > 0.0 && report.gradient_norm > 0.0);
    engine.enter_phase(Phase::Score).unwrap();
    let mut sequence = job(0).requests[0].tokens.clone();
    sequence.extend(&chosen.tokens);
    let score = ScoreJob {
        role: Role::Policy,
        sequences: vec![sequence],
        temperature: 1.0,
        first: vec![5],
    };
    let SequenceScore::Logprobs(after) = engine.score(&score).unwrap().remove(0) else {
        panic!("a policy scores tokens")
    };
    assert!(
        after.iter().sum::<f32>() > chosen.logprobs.iter().sum::<f32>(),
        "a rewarded reply becomes likelier"
    );
}
