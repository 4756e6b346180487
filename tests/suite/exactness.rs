//! Exactness: the sampler's log-probabilities are the trainer's, and a sequence's are its own, to the bit.

use crate::exact::{Subject, WAYS, aligned, check_exact};
use crate::tiny::{Tiny, config, config_dense, config_lite, cpu};
use rehearsal::config::{ModelConfig, load_model};
use rehearsal::model::{DecodeRows, LatentCache, PackFor, PackedModel};
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{CacheFormat, WeightFormat};
use std::path::Path;

#[test]
fn sampler_and_trainer_agree_to_the_bit_at_every_step_however_the_work_is_cut() {
    check_exact(&Subject::smoke(), &WAYS, 10);
}

#[test]
fn without_the_promise_they_agree_to_rounding_and_the_gap_is_told() {
    let gaps = aligned(&Subject::smoke(), &WAYS[0], 10, &["--set", "engine.exact=false"]).gaps();
    // If no step had a gap, the comparison above would compare nothing.
    assert!(gaps.iter().all(|gap| *gap < 1e-4) && gaps.iter().any(|gap| *gap > 0.0), "{gaps:?}");
}

/// Sequences that decode together.
const TOGETHER: usize = 64;
const PAGE_TOKENS: usize = 4;
/// Pages of a sequence.
const PAGES: usize = 10;

/// Tokens of sequence number `index`: up to two blocks of 32 keys.
fn sequence(config: &ModelConfig, index: usize) -> Vec<u32> {
    let token = |i: usize| {
        let drawn = random::below(
            8,
            Stream::Data,
            [index as u64, i as u64, 0, 0],
            config.vocab_size as u64,
        );
        drawn as u32
    };
    (0..2 + index * 13 % (PAGES * PAGE_TOKENS - 1)).map(token).collect()
}

/// Bits of the logits after each sequence: all but its last token as one prompt, the last as a step of its own.
fn logits(
    tiny: &Tiny<'_>,
    packed: &PackedModel,
    format: CacheFormat,
    sequences: std::ops::Range<usize>,
) -> Vec<u32> {
    let config = &tiny.model.config;
    let pages = PAGES * sequences.len();
    let mut cache = LatentCache::new(tiny.kernels, config, format, pages, PAGE_TOKENS).unwrap();
    let (mut prompts, mut steps) = (DecodeRows::default(), DecodeRows::default());
    for (place, index) in sequences.enumerate() {
        let tokens = sequence(config, index);
        let table: Vec<u32> =
            (0..PAGES).map(|page| (page * pages / PAGES + place) as u32).collect();
        let last = tokens.len() - 1;
        for rows in [&mut prompts, &mut steps] {
            rows.begin(&table);
        }
        (0..last).for_each(|position| prompts.push(tokens[position], position, PAGE_TOKENS));
        steps.push(tokens[last], last, PAGE_TOKENS);
        steps.want_last();
    }
    let mut found = Vec::new();
    for rows in [&prompts, &steps] {
        let decoded = tiny.model.decode(tiny.kernels, &tiny.params, packed, &mut cache, rows);
        found = tiny.kernels.download_f64(&decoded.unwrap());
    }
    found.into_iter().map(|logit| (logit as f32).to_bits()).collect()
}

/// Every sequence alone on one thread against all of them at once on two.
fn check_rows(config: &ModelConfig, formats: &[(WeightFormat, CacheFormat)]) {
    let (one, two) = (cpu(1), cpu(2));
    let [alone, together] = [&one, &two].map(|kernels| Tiny::new(kernels, config, false));
    for (weights, cache) in formats {
        let pack = PackFor { format: *weights, ..PackFor::SAMPLING };
        let whole = logits(&together, &together.pack_for(pack), *cache, 0..TOGETHER);
        let packed = alone.pack_for(pack);
        for (index, row) in whole.chunks(config.vocab_size).enumerate() {
            let own = logits(&alone, &packed, *cache, index..index + 1);
            let differing = own.iter().zip(row).filter(|(a, b)| a != b).count();
            assert_eq!(
                (own.len(), differing),
                (row.len(), 0),
                "{weights:?} weights, {cache:?} cache, sequence {index}: logits that differ"
            );
        }
    }
}

#[test]
fn a_sequence_has_the_same_logits_alone_and_among_64_in_every_format() {
    let every = |(weights, caches): (WeightFormat, [CacheFormat; 4])| caches.map(|c| (weights, c));
    let formats: Vec<_> =
        WeightFormat::ALL.into_iter().map(|w| (w, CacheFormat::ALL)).flat_map(every).collect();
    for config in [config(), config_lite(), config_dense()] {
        check_rows(&config, &formats);
    }
}

#[test]
fn a_sequence_has_the_same_logits_alone_and_among_64_where_products_are_cut() {
    // Wide enough that products have several panels and blocks over k, and experts several rows.
    let presets = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model");
    let mut config = load_model(&presets.join("tiny.json")).unwrap();
    (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (672, 1056, 2);
    (config.vocab_size, config.kv_lora_rank) = (512, 352);
    let formats = [
        (WeightFormat::F32, CacheFormat::F32),
        (WeightFormat::Int8, CacheFormat::SixBit),
        (WeightFormat::Bf16, CacheFormat::Bf16),
        (WeightFormat::Fp8Block, CacheFormat::Fp8),
    ];
    check_rows(&config, &formats);
}
