//! Prompts by cost: chunks in the expanded form, merged by log-sum-exp, against one absorbed pass.

use crate::tiny::{Tiny, config, config_lite, cpu, reference, worst};
use rehearsal::cluster::Team;
use rehearsal::config::engine::Prefill::{self, Absorbed, ByCost};
use rehearsal::config::{EngineConfig, ModelConfig};
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::{GenerateJob, GenerateRequest, Phase, PrepareStage, TokenGroup};
use rehearsal::model::{DecodeRows, LatentCache, PackFor};
use rehearsal_kernels::random::{Draws, Stream};
use rehearsal_kernels::{CacheFormat, Kernels, Kind};
use tempfile::TempDir;

const CONTEXT: usize = 2048;

/// A tiny model with room for long prompts, whose latent is much wider than a head.
fn roomy(mut config: ModelConfig) -> ModelConfig {
    (config.max_position_embeddings, config.kv_lora_rank) = (CONTEXT, 16);
    config.num_hidden_layers = 2;
    config
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i + 3 * i) % 29).collect()
}

/// Logits of the last row of each chunk that ends in `cuts`, and then of one token more.
fn logits(tiny: &Tiny<'_>, prefill: Prefill, tokens: &[u32], cuts: &[usize]) -> Vec<f64> {
    let packed = tiny.pack_for(PackFor { prefill, ..PackFor::SAMPLING });
    let page = 16;
    let count = tokens.len().div_ceil(page);
    let mut cache =
        LatentCache::new(tiny.kernels, &tiny.model.config, CacheFormat::F32, count, page).unwrap();
    let mut pages: Vec<u32> = (0..count as u32).collect();
    Draws::new(5, Stream::Data, [0, 0, 0]).shuffle(&mut pages);
    let (mut all, mut first) = (Vec::new(), 0);
    for end in cuts.iter().copied().chain([tokens.len()]) {
        let mut rows = DecodeRows::default();
        rows.begin(&pages);
        (first..end).for_each(|position| rows.push(tokens[position], position, page));
        rows.want_last();
        let logits =
            tiny.model.decode(tiny.kernels, &tiny.params, &packed, &mut cache, &rows).unwrap();
        all.extend(tiny.kernels.download_f64(&logits));
        first = end;
    }
    all
}

/// The chunks that end in `cuts` against the same rows in the absorbed form, and against one absorbed pass.
fn check_chunks(kernels: &dyn Kernels, config: &ModelConfig, cuts: &[usize], tolerance: f64) {
    let tiny = Tiny::new(kernels, config, false);
    let tokens = tokens(cuts.last().unwrap() + 1);
    let found = logits(&tiny, ByCost, &tokens, cuts);
    let wanted = logits(&tiny, Absorbed, &tokens, cuts);
    assert_ne!(found, wanted, "the prompt was expanded");
    let (index, error) = worst(&found, &wanted, 1.0);
    assert!(error < tolerance, "{cuts:?}, logit {index}: {error:e}");
    let whole = logits(&tiny, Absorbed, &tokens, &cuts[cuts.len() - 1..]);
    let (index, error) = worst(&found[found.len() - whole.len()..], &whole, 1.0);
    assert!(error < tolerance, "{cuts:?} against one pass, logit {index}: {error:e}");
}

#[test]
fn a_prompt_in_chunks_by_cost_equals_one_absorbed_pass() {
    for config in [roomy(config()), roomy(config_lite())] {
        // Ranges of 512 tokens of context: one, several, and parts of one.
        for cuts in [&[700][..], &[512, 1024, 1100], &[3, 515, 516, 900]] {
            check_chunks(&reference(), &config, cuts, 1e-10);
            check_chunks(&cpu(2), &config, cuts, 1e-4);
        }
    }
}

#[test]
fn no_more_than_one_range_of_the_context_is_expanded_at_once() {
    let kernels = cpu(1);
    let mut config = roomy(config());
    (config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim) = (4, 32, 32);
    (config.kv_lora_rank, config.vocab_size) = (96, 29);
    let tiny = Tiny::new(&kernels, &config, false);
    let tokens = tokens(2001);
    logits(&tiny, ByCost, &tokens, &[512, 1024, 1536, 2000]);
    let (expanded, largest) = (4 * 64 * 4, kernels.arena().largest(Kind::Activations));
    assert!((512 * expanded..1024 * expanded).contains(&largest), "{largest}");
}

/// Rollouts of prompts of these lengths from an engine that takes prompts by `prefill`.
fn rollouts(prefill: Prefill, lengths: &[(u32, usize)], engine: EngineConfig) -> Vec<TokenGroup> {
    let folder = TempDir::new().unwrap();
    let model = roomy(config());
    let spill = folder.path().join("spill");
    let mut device =
        HybridEngine::new(EngineSetup { model, engine, seed: 1, spill, team: Team::alone() })
            .unwrap();
    device.prepare(&PrepareStage { prefill, ..crate::engine::stage(None) }).unwrap();
    device.enter_phase(Phase::Generate).unwrap();
    let request = |(slot, length): &(u32, usize)| GenerateRequest {
        slot: *slot,
        tokens: tokens(*length),
        prompt: u64::from(*slot),
        samples: 2,
    };
    let requests = lengths.iter().map(request).collect();
    let job = GenerateJob { requests, policy_version: 0, ..crate::engine::job(0) };
    let mut groups = Vec::new();
    device.generate(&job, &mut |group| groups.push(group)).unwrap();
    groups.sort_by_key(|group| group.slot);
    groups
}

#[test]
fn by_cost_no_batch_order_page_or_thread_changes_a_bit_of_a_rollout() {
    let mut prompts = vec![(0, 700), (1, 30), (2, 513), (3, 5), (4, 1100), (5, 512)];
    let settings = |threads, page_tokens, decode_batch| EngineConfig {
        threads,
        page_tokens,
        decode_batch,
        ..EngineConfig::default()
    };
    let together = rollouts(ByCost, &prompts, settings(2, 16, 128));
    let alone: Vec<TokenGroup> =
        prompts.iter().flat_map(|one| rollouts(ByCost, &[*one], settings(1, 16, 1))).collect();
    assert_eq!(together, alone);
    prompts.reverse();
    assert_eq!(together, rollouts(ByCost, &prompts, settings(2, 7, 3)));
    // It is another form: the same numbers up to rounding, and not the same bits.
    let absorbed = rollouts(Absorbed, &prompts, settings(2, 16, 128));
    let logprobs = |groups: &[TokenGroup]| -> Vec<f64> {
        let rollouts = groups.iter().flat_map(|group| &group.rollouts);
        rollouts.map(|rollout| f64::from(rollout.logprobs[0])).collect()
    };
    let (index, error) = worst(&logprobs(&together), &logprobs(&absorbed), 1.0);
    assert!(error > 0.0 && error < 1e-4, "rollout {index}: {error:e}");
}
