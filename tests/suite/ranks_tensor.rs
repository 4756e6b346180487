//! Tensor parallelism in sampling and scoring: the rollouts and scores of one rank, whatever is cut; and what it sends.

use crate::engine::stage;
use crate::ranks::{Counted, team};
use crate::ranks_engine::job;
use crate::tiny::{config_dense, config_dense_long, config_grouped, config_lite};
use rehearsal::cluster::layout::Sampling;
use rehearsal::cluster::mesh::Load;
use rehearsal::cluster::{Local, Mesh, Team};
use rehearsal::config::cluster::{PipelineSchedule, RolloutLayout};
use rehearsal::config::engine::{AttentionForm, Prefill};
use rehearsal::config::{Attention, Bytes, Dtype, EngineConfig, ModelConfig, load_model};
use rehearsal::data::example::{Batch, Pair};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::*;
use rehearsal::model::cost::tensor_elements_sent;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use tempfile::TempDir;

/// Four heads, so that up to four ranks share them.
fn latent() -> ModelConfig {
    ModelConfig { num_attention_heads: 4, ..config_grouped() }
}

/// The engine of each rank of so many, all of one stage, that sample as `rollout` says.
fn on_engines<T: Send>(
    config: &ModelConfig,
    layout: (usize, RolloutLayout),
    sent: &Arc<AtomicU64>,
    work: impl Fn(&mut HybridEngine, usize) -> T + Sync,
) -> Vec<T> {
    on_engines_within(config, layout, &|_| None, sent, work)
}

/// The same, each rank within a budget of its own.
fn on_engines_within<T: Send>(
    config: &ModelConfig,
    (ranks, rollout): (usize, RolloutLayout),
    budget: &(dyn Fn(usize) -> Option<u64> + Sync),
    sent: &Arc<AtomicU64>,
    work: impl Fn(&mut HybridEngine, usize) -> T + Sync,
) -> Vec<T> {
    let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
    let mesh = Mesh::new([ranks, 1, 1], ranks, load).unwrap();
    let sampling = Sampling::new(rollout, ranks, config).unwrap();
    let folder = TempDir::new().unwrap();
    thread::scope(|scope| {
        let start = |(rank, inner): (usize, Local)| {
            let link = Counted { inner, sent: sent.clone() };
            let schedule = PipelineSchedule::OneForwardOneBackward;
            let team = Team { sampling, ..team(link, mesh, schedule) };
            let (work, spill) = (&work, folder.path().join(rank.to_string()));
            let budget = budget(rank).map(Bytes);
            let engine = EngineConfig { threads: 1, page_tokens: 4, ..EngineConfig::default() };
            let engine = EngineConfig { budget, ..engine };
            let setup = EngineSetup { model: config.clone(), engine, seed: 1, spill, team };
            scope.spawn(move || work(&mut HybridEngine::new(setup).unwrap(), rank))
        };
        let links = Local::new(ranks).into_iter().enumerate();
        let threads: Vec<_> = links.map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn alone(config: &ModelConfig) -> (usize, RolloutLayout) {
    assert!(config.num_attention_heads > 1);
    (1, RolloutLayout::default())
}

/// A reward model with a scalar head that is not zero.
fn reward_model(config: &ModelConfig, folder: &Path) {
    let pair = |i: u32| Pair { chosen: vec![i + 2, 3, 4, i + 5], rejected: vec![i + 2, 9, 8] };
    on_engines(config, alone(config), &Arc::default(), |engine, _| {
        engine.prepare(&PrepareStage { value_head: true, ..stage(None) }).unwrap();
        engine.enter_phase(Phase::Train).unwrap();
        let batch = Batch::Pairs((0..4).map(pair).collect());
        let job = TrainJob::Batch { batch, share: 0.0, micro_batch: 0, dropping: None };
        engine.train(&job).unwrap();
        engine.calibrate(0.01, 0.2);
        engine.save(folder, false).unwrap();
    });
}

/// What all ranks have sampled and scored, put together.
#[derive(Debug, PartialEq)]
struct Made {
    groups: Vec<TokenGroup>,
    /// By the policy, the reference and the reward model.
    scores: Vec<Vec<SequenceScore>>,
    prompt_tokens: u64,
    new_tokens: u64,
}

/// Samples from weights kept as `dtype` and scores what one rank has sampled.
fn made(
    config: &ModelConfig,
    layout: (usize, RolloutLayout),
    plan: &PrepareStage,
    dtype: Dtype,
) -> Made {
    let ranks = on_engines(config, layout, &Arc::default(), |engine, _| {
        engine.prepare(plan).unwrap();
        engine.enter_generate(dtype).unwrap();
        let mut groups = Vec::new();
        let report = engine.generate(&job(0), &mut |group| groups.push(group)).unwrap();
        engine.enter_phase(Phase::Score).unwrap();
        let sequences: Vec<Vec<u32>> =
            (0..9).map(|i| (0..5 + i % 4).map(|j| (i * 5 + j * 3) % 27 + 2).collect()).collect();
        let scores = [Role::Policy, Role::Reference, Role::Reward("taste".into())].map(|role| {
            let (sequences, first) = (sequences.clone(), vec![2; sequences.len()]);
            engine.score(&ScoreJob { role, sequences, temperature: 0.8, first }).unwrap()
        });
        (groups, scores, report)
    });
    let mut made =
        Made { groups: vec![], scores: vec![vec![]; 3], prompt_tokens: 0, new_tokens: 0 };
    for (groups, scores, report) in ranks {
        made.groups.extend(groups);
        made.scores.iter_mut().zip(scores).for_each(|(all, own)| all.extend(own));
        made.prompt_tokens += report.prompt_tokens;
        made.new_tokens += report.new_tokens;
    }
    made.groups.sort_by_key(|group| group.slot);
    made
}

/// Compares layouts of `config` with one rank, in the forms of `plan` and weights kept as `dtype`.
fn check_layouts(
    config: &ModelConfig,
    layouts: &[[usize; 3]],
    forms: (AttentionForm, Prefill),
    dtype: Dtype,
) {
    let folder = TempDir::new().unwrap();
    reward_model(config, folder.path());
    let (form, prefill) = forms;
    let rewards = BTreeMap::from([("taste".to_string(), PathBuf::from(folder.path()))]);
    let plan = PrepareStage { rewards, form, prefill, ..stage(Some(ModelSource::Fresh)) };
    let one = made(config, alone(config), &plan, dtype);
    let SequenceScore::Reward(reward) = one.scores[2][0] else { panic!("{:?}", one.scores[2]) };
    assert!(reward.is_finite() && one.scores[2][1] != one.scores[2][0]);
    for [ranks, tensor, expert] in layouts {
        let layout = (*ranks, RolloutLayout { tensor: *tensor, expert: *expert });
        let many = made(config, layout, &plan, dtype);
        let name = format!("{:?} {layout:?} {dtype:?}", config.attention());
        assert_eq!(many.groups, one.groups, "{name}");
        assert_eq!(many.scores, one.scores, "{name}");
        assert_eq!(many, one, "{name}");
    }
}

const FORMS: (AttentionForm, Prefill) = (AttentionForm::Absorbed, Prefill::Absorbed);
const BY_COST: (AttentionForm, Prefill) = (AttentionForm::Expanded, Prefill::ByCost);

#[test]
fn latent_attention_over_2_and_4_ranks_samples_and_scores_as_one_to_the_bit() {
    // Ranks, tensor, expert. Vocabulary, widths and rows do not divide.
    let layouts = [[2, 2, 1], [2, 2, 2], [4, 2, 4], [4, 4, 2], [4, 4, 1], [8, 4, 8]];
    check_layouts(&latent(), &layouts, FORMS, Dtype::F32);
    // Without compressed queries they are rows of the same product as the latent.
    let lite = ModelConfig { num_attention_heads: 4, ..config_lite() };
    check_layouts(&lite, &[[2, 2, 1], [4, 4, 4]], BY_COST, Dtype::F32);
}

#[test]
fn grouped_queries_a_tied_head_and_no_shared_experts_sample_and_score_as_one_to_the_bit() {
    check_layouts(&config_dense(), &[[2, 2, 1], [4, 2, 1]], FORMS, Dtype::F32);
    check_layouts(&config_dense_long().completed(), &[[4, 4, 1]], FORMS, Dtype::F32);
    let tied = ModelConfig { tie_word_embeddings: true, ..latent() };
    check_layouts(&tied, &[[2, 2, 2]], BY_COST, Dtype::F32);
    let unshared = ModelConfig { n_shared_experts: 0, ..latent() };
    check_layouts(&unshared, &[[4, 4, 2]], FORMS, Dtype::F32);
}

#[test]
fn weights_in_few_bits_are_the_same_however_their_rows_are_cut() {
    for dtype in [Dtype::Bf16, Dtype::Fp8, Dtype::Int8] {
        check_layouts(&latent(), &[[4, 4, 2]], FORMS, dtype);
    }
}

#[test]
fn blocks_of_128_rows_that_share_a_scale_are_refused_where_rows_are_cut() {
    let layout = (2, RolloutLayout { tensor: 2, expert: 1 });
    let told = on_engines(&latent(), layout, &Arc::default(), |engine, _| {
        engine.prepare(&stage(None)).unwrap();
        engine.enter_generate(Dtype::Fp8Block).unwrap_err().to_string()
    });
    assert!(told[1].contains("fp8-block") && told[1].contains("rollout.tensor = 2"), "{told:?}");
}

#[test]
fn the_latent_is_whole_on_every_rank_and_keys_of_groups_are_cut() {
    for (config, copies) in [(latent(), 2), (config_dense(), 1)] {
        assert_eq!(config.attention() == Attention::Mla, copies == 2);
        let held = |layout| {
            on_engines(&config, layout, &Arc::default(), |engine, _| {
                engine.prepare(&stage(None)).unwrap();
                engine.enter_phase(Phase::Generate).unwrap();
                engine.generate(&job(0), &mut |_| {}).unwrap();
                engine.cache_bytes_per_token().unwrap()
            })
        };
        let two = held((2, RolloutLayout { tensor: 2, expert: 1 }));
        let one = held(alone(&config))[0];
        let sum = two.iter().sum::<f64>() / one;
        // The arena rounds what is as small as this.
        assert_eq!(sum.round() as i32, copies, "{sum}");
    }
}

/// Groups that a rank sampled, and what it took; with the bytes that it held before and at most.
struct Sampled {
    groups: Vec<TokenGroup>,
    report: GenerateReport,
    held: u64,
    most: u64,
}

#[test]
fn ranks_that_share_heads_agree_on_the_pages_of_the_one_that_has_least() {
    // So that the cache is most of what is held.
    let config = ModelConfig { kv_lora_rank: 64, ..latent() };
    let job = GenerateJob { max_new_tokens: 24, stop_tokens: vec![], ..job(0) };
    let (layout, sent) = ((2, RolloutLayout { tensor: 2, expert: 1 }), Arc::default());
    let sampled = |budget: &(dyn Fn(usize) -> Option<u64> + Sync)| {
        on_engines_within(&config, layout, budget, &sent, |engine, _| {
            engine.prepare(&stage(None)).unwrap();
            engine.enter_phase(Phase::Generate).unwrap();
            let held = engine.holdings().held.values().sum();
            let mut groups = Vec::new();
            let report = engine.generate(&job, &mut |group| groups.push(group)).unwrap();
            groups.sort_by_key(|group: &TokenGroup| group.slot);
            Sampled { groups, report, held, most: engine.holdings().high_water }
        })
    };
    let roomy = sampled(&|_| None);
    let Sampled { held, most, .. } = roomy[0];
    let pages = |sampled: &[Sampled]| sampled[0].report.pages_high_water;
    println!("{} pages, {held} bytes before, {most} at most", pages(&roomy));
    // The second rank has less room: with pages by its own budget each, they would admit other sequences.
    let left = [0.8, 0.6].map(|share| held + ((most - held) as f64 * share) as u64);
    let tight = sampled(&|rank| Some(left[rank]));
    println!("{} pages within the budgets", pages(&tight));
    assert!(pages(&tight) < pages(&roomy), "sequences wait for pages");
    assert_eq!(tight[0].groups, roomy[0].groups);
    assert_eq!(pages(&tight), tight[1].report.pages_high_water);
}

/// Bytes that all ranks send each other for a row, in steady decoding: of two jobs, the longer less the shorter.
fn sent_per_token(config: &ModelConfig, layout: (usize, RolloutLayout)) -> f64 {
    let sent = Arc::<AtomicU64>::default();
    let of = |max_new_tokens: usize| {
        let before = sent.load(Ordering::Relaxed);
        let reports = on_engines(config, layout, &sent, |engine, _| {
            engine.prepare(&stage(None)).unwrap();
            engine.enter_phase(Phase::Generate).unwrap();
            let job = GenerateJob { max_new_tokens, stop_tokens: vec![], ..job(0) };
            engine.generate(&job, &mut |_| {}).unwrap().new_tokens
        });
        (sent.load(Ordering::Relaxed) - before, reports.iter().sum::<u64>())
    };
    let [(long, many), (short, few)] = [of(20), of(10)];
    (long - short) as f64 / (many - few) as f64
}

#[test]
fn a_token_sends_what_the_formula_says_and_more_than_attention_by_data_does() {
    for config in [latent(), config_dense_long()] {
        for tensor in [2, 4] {
            let layout = (tensor, RolloutLayout { tensor, expert: 1 });
            let sent = sent_per_token(&config, layout);
            let [layers, logits] = tensor_elements_sent(&config, tensor);
            let wanted = 4.0 * (layers + logits) * tensor as f64;
            println!("{:?} over {tensor}: {sent} bytes a token", config.attention());
            assert!((sent / wanted - 1.0).abs() < 0.02, "{sent} for {wanted}");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/tiny.json");
    let tiny = load_model(&path).unwrap();
    let of = |tensor| sent_per_token(&tiny, (4, RolloutLayout { tensor, expert: 4 }));
    let [by_data, by_heads, by_more_heads] = [1, 2, 4].map(of);
    println!("tiny: {by_data} bytes a token by data, {by_heads} and {by_more_heads} by heads");
    assert!(by_data < by_heads && by_heads < by_more_heads);
}
