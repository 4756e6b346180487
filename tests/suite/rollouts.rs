//! Rollouts in the update: prompts that are shared, groups that are left out, and what neither may change.

use crate::engine::{engine, settings, stage};
use crate::tiny::{Tiny, config, config_dense, config_lite, cpu, reference, relative_l2};
use crate::training::saved;
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::AttentionForm;
use rehearsal::config::routing::Balance;
use rehearsal::data::example::Prompt;
use rehearsal::engine::hybrid::HybridEngine;
use rehearsal::engine::phase::*;
use rehearsal::engine::utilisation::padding_share;
use rehearsal::rl::rollout::{Group, Rollout, ScoredGroup, Stop};
use rehearsal::train::{Items, Rollouts};
use rehearsal_kernels::Kernels;
use tempfile::TempDir;

/// Tokens of the prompts: around a block of keys, and of one token.
const PROMPTS: [usize; 5] = [5, 31, 32, 33, 1];

fn prompt(slot: u32) -> Vec<u32> {
    (0..PROMPTS[slot as usize] as u32).map(|i| (i * 7 + slot * 3 + 2) % 29).collect()
}

/// Samples three rollouts of each prompt; some end at once, some at the limit.
fn sampled(engine: &mut HybridEngine, version: u64) -> Vec<TokenGroup> {
    generated(engine, version).0
}

/// The same with what it took.
fn generated(engine: &mut HybridEngine, version: u64) -> (Vec<TokenGroup>, GenerateReport) {
    let request =
        |slot: u32| GenerateRequest { slot, tokens: prompt(slot), prompt: slot.into(), samples: 3 };
    let job = GenerateJob {
        requests: (0..PROMPTS.len() as u32).map(request).collect(),
        max_new_tokens: 30,
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        stop_tokens: vec![1, 4],
        seed: 4,
        step: version,
        policy_version: version,
    };
    engine.enter_phase(Phase::Generate).unwrap();
    let mut groups = Vec::new();
    let report = engine.generate(&job, &mut |group| groups.push(group)).unwrap();
    groups.sort_by_key(|g| g.slot);
    (groups, report)
}

/// The groups as the update wants them; `advantage` of slot and sample.
fn scored(groups: Vec<TokenGroup>, advantage: impl Fn(u32, usize) -> f64) -> Vec<ScoredGroup> {
    let scored = |TokenGroup { slot, rollouts, policy_version }: TokenGroup| {
        let count = rollouts.len();
        let prompt =
            Prompt { index: slot.into(), text: String::new(), tokens: prompt(slot), answer: None };
        ScoredGroup {
            components: vec![vec![Some(0.0)]; count],
            rewards: vec![0.0; count],
            advantages: (0..count).map(|sample| advantage(slot, sample)).collect(),
            reference: Vec::new(),
            group: Group { slot, prompt: prompt.into(), policy_version, rollouts: rollouts.into() },
        }
    };
    groups.into_iter().map(scored).collect()
}

fn ready(folder: &TempDir) -> HybridEngine {
    let mut engine = engine(folder, |_| {});
    engine.prepare(&PrepareStage { balance: Balance::NONE, ..stage(None) }).unwrap();
    engine
}

fn usual(slot: u32, sample: usize) -> f64 {
    [1.3, -0.5, -0.8][sample] * if slot.is_multiple_of(2) { 1.0 } else { -0.7 }
}

fn update(engine: &mut HybridEngine, groups: Vec<ScoredGroup>, share_prompts: bool) -> StepReport {
    engine.enter_phase(Phase::Train).unwrap();
    let settings = settings();
    engine.train(&TrainJob::Grpo { groups, settings, micro_batch: 0, share_prompts }).unwrap()
}

/// An advantage that is not zero and whose gradient is: it vanishes in f32.
const TINY: f64 = 1e-300;

#[test]
fn leaving_out_groups_of_zero_advantage_changes_no_byte_of_weights_and_moments() {
    // Slots whose advantages are zero, step by step: some, none, all, some.
    let zero = |step: u64, slot: u32| match step {
        0 => slot == 1 || slot == 3,
        1 => false,
        2 => true,
        _ => slot < 4,
    };
    let outcome = |instead: f64, share_prompts: bool| {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder);
        let mut reports = Vec::new();
        for step in 0..4 {
            let groups =
                scored(sampled(&mut engine, step), |slot, sample| match zero(step, slot) {
                    true => instead,
                    false => usual(slot, sample),
                });
            reports.push(update(&mut engine, groups, share_prompts));
        }
        (saved(&mut engine), reports)
    };
    for share_prompts in [true, false] {
        let (left_out, reports) = outcome(0.0, share_prompts);
        let (kept, all) = outcome(TINY, share_prompts);
        assert!(left_out == kept, "the same bytes, prompts shared: {share_prompts}");
        let share = |report: &StepReport| report.grpo.as_ref().unwrap().trained_share;
        assert_eq!(reports.iter().map(share).collect::<Vec<_>>(), [0.6, 1.0, 0.0, 0.2]);
        assert!(all.iter().all(|report| share(report) == 1.0));
        assert!(reports.iter().zip(&all).all(|(less, more)| {
            !less.skipped && (less.rows < more.rows) == (share(less) < 1.0)
        }));
        assert_eq!(reports[2].rows, 0);
        assert!(
            reports.iter().map(|report| report.policy_version).eq(1..=4),
            "a step without rollouts is a step"
        );
    }
}

#[test]
fn a_shared_prompt_leaves_the_gap_at_zero_and_takes_its_rows_once() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder);
    let groups = scored(sampled(&mut engine, 0), usual);
    let lengths: Vec<usize> =
        groups.iter().flat_map(|g| g.group.rollouts.iter().map(|r| r.tokens.len())).collect();
    assert!(lengths.contains(&30) && lengths.iter().any(|length| *length < 4), "{lengths:?}");
    let prompts: usize = PROMPTS.iter().sum();
    // The last token of a reply predicts nothing.
    let own: usize = lengths.iter().map(|length| length - 1).sum();
    for (share_prompts, rows) in [(true, prompts + own), (false, 3 * prompts + own)] {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder);
        let report = update(&mut engine, groups.clone(), share_prompts);
        let grpo = report.grpo.unwrap();
        assert_eq!((grpo.logprob_gap_max, report.rows), (0.0, rows as u64), "{share_prompts}");
        assert_eq!(report.tokens as usize, 3 * prompts + own + lengths.len());
    }
}

/// FLOPs of a forward pass over `count` tokens behind `first` others, term by term: two for each weight that a token
/// passes, and for each token that it sees two for each of the 2 heads' 8 + 5 elements, in each of 3 layers.
fn flops(first: usize, count: usize) -> f64 {
    // Compressed queries and latents with their norms and products, output; two norms a layer.
    let attention = 12 * 8 + 8 + 8 * 16 + 12 * 10 + 6 + 6 * 18 + 10 * 12 + 24;
    // One dense layer, two with a router, two of four experts and two shared ones; the last norm and the head.
    let weights = 3 * attention + 3 * 12 * 10 + 2 * (4 * 12 + 4 * 3 * 12 * 6) + 12 + 29 * 12;
    (first..first + count).map(|at| (2 * weights + 3 * 2 * 2 * 13 * (at + 1)) as f64).sum()
}

#[test]
fn useful_flops_take_each_prompt_once_and_each_reply_once_or_thrice() {
    let of_group = |group: &TokenGroup| {
        let prompt = PROMPTS[group.slot as usize];
        let replies = group.rollouts.iter().map(|rollout| flops(prompt, rollout.tokens.len()));
        flops(0, prompt) + replies.sum::<f64>()
    };
    // Groups of slots 1 and 3 teach nothing: they were sampled, and are not trained on.
    let teaches = |slot: u32| slot != 1 && slot != 3;
    for share_prompts in [true, false] {
        let folder = TempDir::new().unwrap();
        let mut engine = ready(&folder);
        let (groups, report) = generated(&mut engine, 0);
        assert_eq!(report.useful_flops, groups.iter().map(of_group).sum::<f64>());
        let trained = groups.iter().filter(|group| teaches(group.slot));
        let wanted: f64 = trained.clone().map(|group| 3.0 * of_group(group)).sum();
        let prompts: usize = trained.clone().map(|group| PROMPTS[group.slot as usize]).sum();
        let own: usize = trained.flat_map(|g| g.rollouts.iter().map(|r| r.tokens.len() - 1)).sum();
        let advantage = |slot, sample| if teaches(slot) { usual(slot, sample) } else { 0.0 };
        let report = update(&mut engine, scored(groups.clone(), advantage), share_prompts);
        assert_eq!(report.useful_flops, wanted, "prompts shared: {share_prompts}");
        assert_eq!(report.unique_rows as usize, prompts + own);
        let padding = padding_share(&report).unwrap();
        let repeated = 2.0 * prompts as f64 / (3 * prompts + own) as f64;
        let expected = if share_prompts { 0.0 } else { repeated };
        assert!((padding - expected).abs() < 1e-12, "{padding} and not {expected}");
        let lost = scored(groups, |_, _| f64::NAN);
        let report = update(&mut engine, lost, share_prompts);
        assert!(report.skipped && report.useful_flops == 0.0, "nothing was learned: {report:?}");
    }
}

#[test]
fn a_rollout_reads_at_least_its_weights_and_what_it_sees_of_the_cache() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder);
    let (groups, report) = generated(&mut engine, 0);
    let drawn: u64 = report.decode.iter().map(|passes| passes.rows * passes.passes).sum();
    assert_eq!(
        drawn + 3 * PROMPTS.len() as u64,
        report.new_tokens,
        "prompts draw the first tokens"
    );
    let seconds: f64 = report.decode.iter().map(|passes| passes.seconds).sum();
    assert!(seconds > 0.0 && seconds + report.prefill_seconds <= report.seconds, "{report:?}");
    // A cached token has 6 + 4 floats in each of 3 layers. Whole pages of four tokens of a prompt are seen once a pass by
    // its group, everything else by each rollout.
    let longest = |group: &TokenGroup| group.rollouts.iter().map(|r| r.tokens.len()).max().unwrap();
    let seen = |group: &TokenGroup| {
        let prompt = PROMPTS[group.slot as usize];
        let own = |length: usize| (1..length).map(|t| prompt % 4 + t).sum::<usize>();
        let own: usize = group.rollouts.iter().map(|rollout| own(rollout.tokens.len())).sum();
        own + (longest(group) - 1) * (prompt - prompt % 4)
    };
    let cached: u64 = report.decode.iter().map(|passes| passes.cached_tokens).sum();
    assert_eq!(cached as usize, groups.iter().map(seen).sum::<usize>());
    let cache_bytes = (cached * 4 * 3 * 10) as f64;
    let passes: u64 = report.decode.iter().map(|passes| passes.passes).sum();
    let weights = engine.packed_bytes() as f64;
    let read = report.least_bytes - cache_bytes;
    assert!(read > 0.5 * weights * passes as f64 && read < weights * passes as f64, "{report:?}");
    assert!(report.working_bytes > weights && report.working_bytes < 2.0 * weights);
}

/// Rollouts of a made-up sampler.
fn invented(config: &ModelConfig) -> Vec<ScoredGroup> {
    let rollout = |slot: u32, sample: u32| {
        let length = [1, 2, 9, 30, 14][((slot * 3 + sample * 2) % 5) as usize];
        let tokens: Vec<u32> =
            (0..length).map(|i| (i * 11 + slot * 5 + sample) % config.vocab_size as u32).collect();
        let logprobs = tokens.iter().map(|token| -3.0 - *token as f32 * 0.02).collect();
        Rollout { sample, tokens, logprobs, stop: Stop::Length, text: String::new() }
    };
    let group = |slot: u32| TokenGroup {
        slot,
        rollouts: (0..3).map(|sample| rollout(slot, sample)).collect(),
        policy_version: 0,
    };
    scored((0..PROMPTS.len() as u32).map(group).collect(), usual)
}

fn gradients(tiny: &Tiny<'_>, form: AttentionForm, share_prompts: bool) -> (f64, Vec<Vec<f64>>) {
    let (groups, settings) = (invented(&tiny.model.config), settings());
    let rollouts = Rollouts::new(&groups, &settings, share_prompts, &Balance::NONE);
    assert_eq!(rollouts.len(), if share_prompts { PROMPTS.len() } else { 3 * PROMPTS.len() });
    let (loss, gradients) = tiny.loss_and_gradients(&Items::Rollouts(rollouts), form, 0.0);
    let tensor = |index| tiny.kernels.download_f64(&gradients.slab.tensor(index));
    (loss, (0..gradients.slab.count()).map(tensor).collect())
}

#[test]
fn the_gradient_through_a_shared_prompt_is_that_of_repeated_ones() {
    let (exact, single) = (reference(), cpu(2));
    let kernels: [(&dyn Kernels, f64); 2] = [(&exact, 1e-11), (&single, 2e-5)];
    for (kernels, tolerance) in kernels {
        for config in [config(), config_lite(), config_dense()] {
            let tiny = Tiny::new(kernels, &config, false);
            for form in [AttentionForm::Absorbed, AttentionForm::Expanded] {
                let (loss, shared) = gradients(&tiny, form, true);
                let (wanted, alone) = gradients(&tiny, form, false);
                assert_eq!(loss.to_bits(), wanted.to_bits(), "the forward pass has the same bits");
                for (index, spec) in tiny.model.layout.specs.iter().enumerate() {
                    let error = relative_l2(&shared[index], &alone[index]);
                    assert!(error < tolerance, "{} {form:?}: {error:e}", spec.name);
                }
            }
        }
    }
}

#[test]
fn sequences_that_begin_alike_are_scored_as_each_alone() {
    let folder = TempDir::new().unwrap();
    let mut engine = ready(&folder);
    engine.enter_phase(Phase::Score).unwrap();
    let replies: [&[u32]; 4] = [&[9, 8, 7], &[], &[4; 20], &[6]];
    let mut job =
        ScoreJob { role: Role::Policy, sequences: Vec::new(), temperature: 0.7, first: Vec::new() };
    for slot in [1, 1, 3, 0] {
        for reply in replies {
            job.sequences.push([prompt(slot), reply.to_vec()].concat());
            job.first.push(PROMPTS[slot as usize]);
        }
    }
    let together = engine.score(&job).unwrap();
    for (index, wanted) in together.iter().enumerate() {
        let alone = ScoreJob {
            sequences: vec![job.sequences[index].clone()],
            first: vec![job.first[index]],
            ..job.clone()
        };
        assert_eq!(&engine.score(&alone).unwrap()[0], wanted, "sequence {index}");
        let SequenceScore::Logprobs(logprobs) = wanted else { panic!("a policy") };
        assert_eq!(logprobs.len(), replies[index % 4].len());
    }
}
