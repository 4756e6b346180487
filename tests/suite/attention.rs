//! Multi-head latent attention against plain f64 loops written from the paper, which call no product code.
//!
//! The loops take the other layout of rotary positions: each rope part is permuted to [0, 2, .., 1, 3, ..] and
//! its halves are rotated against each other. The models here have one dense layer whose feed-forward gives
//! nothing, so that logits are a function of attention alone.

use crate::tiny::{Tiny, config, config_lite, cpu, reference, worst};
use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::AttentionForm::{self, Absorbed, Expanded};
use rehearsal::config::engine::Prefill;
use rehearsal::model::{DecodeRows, Documents, LatentCache, PackFor};
use rehearsal_kernels::random::{Draws, Stream};
use rehearsal_kernels::{Arena, CacheFormat, CpuKernels, DType, Kernels, Kind, ReferenceKernels};

/// Property tests with an explicit seed that write no files.
fn fixed(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(31);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

/// Widths of an attention layer.
#[derive(Clone, Copy, Debug)]
struct Widths {
    hidden: usize,
    heads: usize,
    query: Option<usize>,
    latent: usize,
    nope: usize,
    rope: usize,
    value: usize,
}

/// DeepSeek-V2-Lite's.
const LITE: Widths =
    Widths { hidden: 2048, heads: 16, query: None, latent: 512, nope: 128, rope: 64, value: 128 };

/// One layer of these widths, without YaRN.
fn one_layer(widths: &Widths) -> ModelConfig {
    let mut config = config();
    (config.num_hidden_layers, config.n_routed_experts) = (1, 0);
    (config.hidden_size, config.num_attention_heads) = (widths.hidden, widths.heads);
    (config.q_lora_rank, config.kv_lora_rank) = (widths.query, widths.latent);
    config.qk_nope_head_dim = widths.nope;
    (config.qk_rope_head_dim, config.v_head_dim) = (widths.rope, widths.value);
    // Outputs of one size, whatever the widths.
    config.initializer_range = (widths.hidden as f64).powf(-0.5);
    config
}

/// A model whose feed-forward adds nothing.
fn attention_alone<'a>(kernels: &'a dyn Kernels, config: &ModelConfig) -> Tiny<'a> {
    let mut tiny = Tiny::new(kernels, config, false);
    let down = index_of(&tiny, "mlp.down_proj");
    kernels.fill(&mut tiny.params.slab.tensor_mut(down), 0.0);
    tiny
}

fn index_of(tiny: &Tiny<'_>, part: &str) -> usize {
    let specs = &tiny.model.layout.specs;
    specs.iter().position(|spec| spec.name.contains(part)).expect("the layer has this tensor")
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 11 + 3) % 29).collect()
}

/// A weight matrix `[rows, cols]` in f64.
struct Matrix {
    values: Vec<f64>,
    cols: usize,
}

impl Matrix {
    fn new(tiny: &Tiny<'_>, part: &str) -> Matrix {
        let index = index_of(tiny, part);
        let values = tiny.kernels.download_f64(&tiny.params.slab.tensor(index));
        Matrix { values, cols: tiny.model.layout.specs[index].cols }
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.cols..][..self.cols]
    }

    fn times(&self, x: &[f64]) -> Vec<f64> {
        self.values.chunks(self.cols).map(|row| dot(row, x)).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(weight: &Matrix, x: &[f64], epsilon: f64) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + epsilon).sqrt();
    x.iter().zip(&weight.values).map(|(x, w)| w * (x * scale)).collect()
}

/// Permutes to halves, then rotates the halves: y = x cos + [-second, first] sin.
fn rotate_halves(x: &[f64], position: usize, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let permuted: Vec<f64> =
        (0..half).map(|k| x[2 * k]).chain((0..half).map(|k| x[2 * k + 1])).collect();
    let angle = |k: usize| position as f64 * theta.powf(-2.0 * k as f64 / x.len() as f64);
    let first =
        (0..half).map(|k| permuted[k] * angle(k).cos() - permuted[half + k] * angle(k).sin());
    let second =
        (0..half).map(|k| permuted[half + k] * angle(k).cos() + permuted[k] * angle(k).sin());
    first.chain(second).collect()
}

/// What the plain loops give.
struct Plain {
    /// Logits of every position.
    logits: Vec<f64>,
    /// Latent of each token after its norm.
    latents: Vec<Vec<f64>>,
    /// Rope key of each token before and after its rotation, the latter in halves.
    keys: Vec<(Vec<f64>, Vec<f64>)>,
}

/// The whole one-layer model, from deepseek_v2.md 1.2 and nothing else.
fn plain(tiny: &Tiny<'_>, widths: &Widths, tokens: &[u32]) -> Plain {
    let config = &tiny.model.config;
    let (epsilon, theta) = (config.rms_norm_eps, config.rope_theta);
    let matrix = |part: &str| Matrix::new(tiny, part);
    let (embed, input_norm) = (matrix("embed_tokens"), matrix("input_layernorm"));
    type Product = Box<dyn Fn(&[f64]) -> Vec<f64>>;
    let query: Product = match widths.query {
        Some(_) => {
            let (a, n, b) = (matrix("q_a_proj"), matrix("q_a_layernorm"), matrix("q_b_proj"));
            Box::new(move |x| b.times(&norm(&n, &a.times(x), epsilon)))
        }
        None => {
            let w = matrix("q_proj");
            Box::new(move |x| w.times(x))
        }
    };
    let (kv_a, kv_norm, kv_b) =
        (matrix("kv_a_proj"), matrix("kv_a_layernorm"), matrix("kv_b_proj"));
    let (output, last_norm, head) = (matrix("o_proj"), matrix("model.norm"), matrix("lm_head"));
    let (per_query, per_kv) = (widths.nope + widths.rope, widths.nope + widths.value);
    let scale = (per_query as f64).powf(-0.5);
    let mut all = Plain { logits: Vec::new(), latents: Vec::new(), keys: Vec::new() };
    let mut expanded: Vec<Vec<f64>> = Vec::new();
    for (t, token) in tokens.iter().enumerate() {
        let mut h = embed.row(*token as usize).to_vec();
        let x = norm(&input_norm, &h, epsilon);
        let q = query(&x);
        let a = kv_a.times(&x);
        let latent = norm(&kv_norm, &a[..widths.latent], epsilon);
        expanded.push(kv_b.times(&latent));
        all.latents.push(latent);
        let raw = a[widths.latent..].to_vec();
        let turned = rotate_halves(&raw, t, theta);
        all.keys.push((raw, turned));
        let mut o = Vec::new();
        for i in 0..widths.heads {
            let q = &q[i * per_query..][..per_query];
            let q_rope = rotate_halves(&q[widths.nope..], t, theta);
            let scores: Vec<f64> = (0..=t)
                .map(|j| {
                    let key = &expanded[j][i * per_kv..][..widths.nope];
                    scale * (dot(&q[..widths.nope], key) + dot(&q_rope, &all.keys[j].1))
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            o.extend((0..widths.value).map(|c| {
                let value = |j: usize| expanded[j][i * per_kv + widths.nope + c];
                scores.iter().enumerate().map(|(j, s)| s.exp() / sum * value(j)).sum::<f64>()
            }));
        }
        h.iter_mut().zip(output.times(&o)).for_each(|(h, u)| *h += u);
        all.logits.extend(head.times(&norm(&last_norm, &h, epsilon)));
    }
    all
}

/// Logits of every position through the training forward.
fn trained_logits(tiny: &Tiny<'_>, form: AttentionForm, tokens: &[u32]) -> Vec<f64> {
    let packed = tiny.pack(form, false);
    let documents = Documents::pack(tiny.kernels, &[tokens]).unwrap();
    let pass = tiny.model.pass(tiny.kernels, &documents, &packed);
    let hidden = tiny.model.forward_only(&pass, &tiny.params, &packed).unwrap();
    let all: Vec<u32> = (0..tokens.len() as u32).collect();
    let logits = packed.heads().logits(tiny.kernels, &tiny.params, &hidden, &all).unwrap();
    tiny.kernels.download_f64(&logits)
}

/// Rows of `range` of one sequence's tokens, all wanted.
fn rows_of(
    tokens: &[u32],
    range: std::ops::Range<usize>,
    pages: &[u32],
    page: usize,
) -> DecodeRows {
    let mut rows = DecodeRows::default();
    rows.begin(pages);
    for position in range {
        rows.push(tokens[position], position, page);
        rows.want_last();
    }
    rows
}

/// Logits of rows through the sampler's step.
fn decoded(tiny: &Tiny<'_>, cache: &mut LatentCache, rows: &DecodeRows) -> Vec<f64> {
    let packed = tiny.pack(Absorbed, false);
    let logits = tiny.model.decode(tiny.kernels, &tiny.params, &packed, cache, rows).unwrap();
    tiny.kernels.download_f64(&logits)
}

/// Both forms and the sampler against the plain loops.
fn check_forms(kernels: &dyn Kernels, widths: &Widths, count: usize, tolerance: f64) {
    let tiny = attention_alone(kernels, &one_layer(widths));
    let tokens = tokens(count);
    let wanted = plain(&tiny, widths, &tokens).logits;
    let mut cache =
        LatentCache::new(kernels, &tiny.model.config, CacheFormat::F32, count, 1).unwrap();
    let pages: Vec<u32> = (0..count as u32).rev().collect();
    let found = [
        ("expanded", trained_logits(&tiny, Expanded, &tokens)),
        ("absorbed", trained_logits(&tiny, Absorbed, &tokens)),
        ("sampler", decoded(&tiny, &mut cache, &rows_of(&tokens, 0..count, &pages, 1))),
    ];
    for (form, logits) in found {
        let (index, error) = worst(&logits, &wanted, 1.0);
        assert!(error < tolerance, "{widths:?}, {form}, logit {index}: {error:e}");
    }
}

proptest! {
    #![proptest_config(fixed(48))]
    #[test]
    fn both_forms_and_the_sampler_equal_the_plain_loops_over_random_shapes(
        hidden in 2usize..20, heads in 1usize..6, query in prop::option::of(1usize..12),
        latent in 1usize..14, nope in 1usize..10, half in 1usize..5, value in 1usize..10,
        count in 1usize..12,
    ) {
        let widths = Widths { hidden, heads, query, latent, nope, rope: 2 * half, value };
        check_forms(&reference(), &widths, count, 1e-10);
        check_forms(&cpu(2), &widths, count, 1e-4);
    }
}

#[test]
fn both_forms_and_the_sampler_equal_the_plain_loops_in_the_shape_of_v2_lite() {
    check_forms(&reference(), &LITE, 4, 1e-10);
}

#[test]
fn a_cache_entry_is_the_latent_after_its_norm_and_the_key_after_its_rotation() {
    let widths =
        Widths { hidden: 24, heads: 3, query: Some(10), latent: 12, nope: 6, rope: 8, value: 5 };
    let kernels = reference();
    let tiny = attention_alone(&kernels, &one_layer(&widths));
    let tokens = tokens(9);
    let wanted = plain(&tiny, &widths, &tokens);
    let mut cache = LatentCache::new(&kernels, &tiny.model.config, CacheFormat::F32, 3, 4).unwrap();
    decoded(&tiny, &mut cache, &rows_of(&tokens, 0..9, &[2, 0, 1], 4));
    let entries = kernels.download_f64(&cache.layers[0]);
    let close = |a: &[f64], b: &[f64]| worst(a, b, 1.0).1 < 1e-12;
    for position in 0..tokens.len() {
        let slot = [2, 0, 1][position / 4] * 4 + position % 4;
        let (latent, key) = entries[slot * 20..][..20].split_at(12);
        let (raw, halves) = &wanted.keys[position];
        assert!(close(latent, &wanted.latents[position]), "latent of token {position}");
        // The published order: pair k at 2k and 2k + 1. The loops' own keys are the same in two halves.
        let pairs: Vec<f64> = (0..4).flat_map(|k| [halves[k], halves[4 + k]]).collect();
        assert!(close(key, &pairs), "rope key of token {position}");
        assert!(!close(key, halves), "the permutation is not the identity");
        assert_eq!(close(key, raw), position == 0, "only position 0 is not rotated");
    }
}

#[test]
fn a_decode_step_writes_one_entry_of_576_elements_a_layer_and_nothing_else() {
    let mut config = one_layer(&Widths { hidden: 16, heads: 2, nope: 4, value: 4, ..LITE });
    config.num_hidden_layers = 2;
    config.first_k_dense_replace = 2;
    let kernels = cpu(1);
    let tiny = Tiny::new(&kernels, &config, false);
    let mut cache = LatentCache::new(&kernels, &config, CacheFormat::F32, 4, 4).unwrap();
    let tokens = tokens(7);
    for layer in &mut cache.layers {
        kernels.fill(layer, f64::NAN);
    }
    let written = |cache: &LatentCache| -> Vec<usize> {
        let count = |layer| kernels.download(layer).iter().filter(|x| !x.is_nan()).count();
        cache.layers.iter().map(count).collect()
    };
    decoded(&tiny, &mut cache, &rows_of(&tokens, 0..5, &[3, 1], 4));
    assert_eq!(written(&cache), [5 * 576, 5 * 576]);
    let held = kernels.arena().held_by(Kind::Cache);
    for position in 5..7 {
        decoded(&tiny, &mut cache, &rows_of(&tokens, position..position + 1, &[3, 1], 4));
        assert_eq!(written(&cache), [(position + 1) * 576; 2]);
    }
    assert_eq!(kernels.arena().held_by(Kind::Cache), held, "entries go into pages that are there");
}

#[test]
fn absorbed_products_are_never_formed() {
    // W_UK W_UQ and W_O W_UV would have 64 x 64 x 8 elements; every weight has fewer, and so have the rows.
    let widths =
        Widths { hidden: 64, heads: 8, query: Some(64), latent: 64, nope: 8, rope: 4, value: 8 };
    let product = (64 * 64 * 8 * DType::F32.size()) as u64;
    let training = PackFor::documents(Absorbed, true);
    let by_cost = PackFor { prefill: Prefill::ByCost, ..PackFor::SAMPLING };
    for pack in [training, PackFor::SAMPLING, by_cost] {
        let kernels = cpu(2);
        let tiny = attention_alone(&kernels, &one_layer(&widths));
        let packed = tiny.pack_for(pack);
        let tokens = tokens(20);
        let mut cache =
            LatentCache::new(&kernels, &tiny.model.config, CacheFormat::F32, 5, 4).unwrap();
        let rows = rows_of(&tokens, 0..20, &[4, 3, 2, 1, 0], 4);
        tiny.model.decode(&kernels, &tiny.params, &packed, &mut cache, &rows).unwrap();
        trained_logits(&tiny, Absorbed, &tokens);
        for kind in [Kind::Packed, Kind::Activations, Kind::Cache] {
            let largest = kernels.arena().largest(kind);
            assert!(largest > 0 && largest < product, "{kind:?}: {largest} of {product} bytes");
        }
    }
}

/// Mixed lengths, one more token each: from pages of `page` tokens in a scattered order, by batches of `at_once`.
fn logits_of_mixed_lengths(tiny: &Tiny<'_>, page: usize, at_once: usize) -> Vec<Vec<f64>> {
    const LENGTHS: [usize; 5] = [1, 14, 7, 3, 30];
    let across = 30_usize.div_ceil(page);
    let count = across * LENGTHS.len();
    let mut cache =
        LatentCache::new(tiny.kernels, &tiny.model.config, CacheFormat::F32, count, page).unwrap();
    let mut numbers: Vec<u32> = (0..count as u32).collect();
    Draws::new(page as u64, Stream::Data, [1, 2, 3]).shuffle(&mut numbers);
    let tables: Vec<&[u32]> = numbers.chunks(across).collect();
    let token = |s: usize, i: usize| ((s * 5 + i * 7) % 29) as u32;
    for (s, length) in LENGTHS.iter().enumerate() {
        let tokens: Vec<u32> = (0..*length).map(|i| token(s, i)).collect();
        decoded(tiny, &mut cache, &rows_of(&tokens, 0..length - 1, tables[s], page));
    }
    let mut logits = Vec::new();
    for sequences in [0, 1, 2, 3, 4].chunks(at_once) {
        let mut rows = DecodeRows::default();
        for s in sequences {
            rows.begin(tables[*s]);
            rows.push(token(*s, LENGTHS[*s] - 1), LENGTHS[*s] - 1, page);
            rows.want_last();
        }
        let flat = decoded(tiny, &mut cache, &rows);
        logits.extend(flat.chunks(tiny.model.config.vocab_size).map(<[f64]>::to_vec));
    }
    logits
}

#[test]
fn paged_and_contiguous_caches_agree_to_the_bit_for_mixed_lengths() {
    for config in [config(), config_lite()] {
        let kernels = cpu(2);
        let tiny = Tiny::new(&kernels, &config, false);
        // One page a sequence is a contiguous cache.
        let contiguous = logits_of_mixed_lengths(&tiny, 30, 1);
        for page in [1, 4, 7, 16] {
            for at_once in [1, 2, 5] {
                let paged = logits_of_mixed_lengths(&tiny, page, at_once);
                assert!(paged == contiguous, "pages of {page}, {at_once} at once");
            }
        }
    }
}

/// Published rotary positions, with YaRN up to 163840 tokens.
fn published() -> ModelConfig {
    let mut config = one_layer(&LITE);
    (config.rope_theta, config.max_position_embeddings) = (10_000.0, 163_840);
    config.rope_scaling = Some(
        serde_json::from_str(
            r#"{"type":"yarn","factor":40.0,"original_max_position_embeddings":4096,"mscale":0.707,
                "mscale_all_dim":0.707}"#,
        )
        .unwrap(),
    );
    config
}

/// Rows of `x`, each rotated to its position.
fn rotated(
    kernels: &dyn Kernels,
    table: &rehearsal_kernels::RopeTable,
    x: &[f64],
    positions: &[u32],
) -> Vec<f64> {
    let (arena, owner) = (kernels.arena(), kernels.scratch());
    let cols = x.len() / positions.len();
    let mut rows = arena.buffer(owner, kernels.float(), positions.len(), cols).unwrap();
    kernels.upload_f64(x, &mut rows);
    let mut at = arena.buffer(owner, DType::U32, positions.len(), 1).unwrap();
    kernels.upload_indices(positions, &mut at);
    kernels.rope(&mut rows, &at, table, 1, 0, cols, false);
    kernels.download_f64(&rows)
}

#[test]
fn rotation_is_the_identity_at_position_0_and_scores_depend_on_the_distance_alone() {
    let config = published();
    let (exact, fast) =
        (ReferenceKernels::new(Arena::new(None)), CpuKernels::new(1, Arena::new(None)));
    for (kernels, tolerance) in [(&exact as &dyn Kernels, 1e-9), (&fast, 2e-5)] {
        let table = rehearsal::model::rope::table(kernels, &config, 163_840).unwrap();
        let mut draws = Draws::new(17, Stream::Data, [0, 0, 0]);
        for case in 0..200 {
            let x: Vec<f64> = (0..128).map(|_| draws.below(4097) as f64 / 2048.0 - 1.0).collect();
            assert_eq!(rotated(kernels, &table, &x, &[0, 0]), x, "position 0 leaves every bit");
            let [i, j] = [(); 2].map(|()| draws.below(80_000) as u32);
            let shift = draws.below(80_000) as u32;
            let score = |positions: [u32; 2]| {
                let turned = rotated(kernels, &table, &x, &positions);
                dot(&turned[..64], &turned[64..])
            };
            let (here, there) = (score([i, j]), score([i + shift, j + shift]));
            assert!(
                (here - there).abs() < tolerance,
                "{case}: {i}, {j} by {shift}: {here} {there}"
            );
            assert!(
                (here - score([i, j + 1])).abs() > tolerance,
                "a score depends on the distance"
            );
        }
    }
}
