//! A model whose weights and cache are kept in few bits: the same numbers in every form and pass, and close to f32.

use crate::engine::{engine, stage};
use crate::runs::{check_refused, done, finished, rehearsal};
use crate::tiny::{Tiny, config, config_dense, config_lite, cpu, worst};
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::AttentionForm::{Absorbed, Expanded};
use rehearsal::engine::phase::{Phase, PrepareStage};
use rehearsal::engine::{Formats, HybridEngine};
use rehearsal::model::{DecodeRows, Documents, LatentCache, PackFor, PackedModel};
use rehearsal_kernels::{CacheFormat, WeightFormat};

fn document() -> Vec<u32> {
    (0..23).map(|i| i * 11 % 29).collect()
}

fn pack(tiny: &Tiny<'_>, pack: PackFor) -> PackedModel {
    tiny.model.pack(tiny.kernels, &tiny.params, "policy", 1, pack).unwrap()
}

/// Log-probabilities of the document's tokens from the second on, through whole sequences.
fn scored(tiny: &Tiny<'_>, packed: &PackedModel) -> Vec<f64> {
    let document = document();
    let documents = Documents::pack(tiny.kernels, &[&document]).unwrap();
    let pass = tiny.model.pass(tiny.kernels, &documents, packed);
    let hidden = tiny.model.forward_only(&pass, &tiny.params, packed).unwrap();
    let rows: Vec<u32> = (0..document.len() as u32 - 1).collect();
    let heads = packed.heads();
    heads
        .logprobs(&pass, &tiny.params, &hidden, &rows, &document[1..], 1.0, false)
        .unwrap()
        .logprobs
}

/// The same token by token through a cache.
fn decoded(
    tiny: &Tiny<'_>,
    config: &ModelConfig,
    packed: &PackedModel,
    format: CacheFormat,
) -> Vec<f64> {
    let document = document();
    let mut cache = LatentCache::new(tiny.kernels, config, format, 8, 4).unwrap();
    let mut logprobs = Vec::new();
    for (position, next) in document[1..].iter().enumerate() {
        let mut rows = DecodeRows::default();
        rows.begin(&[5, 2, 7, 0, 1, 3]);
        rows.push(document[position], position, 4);
        rows.want_last();
        let logits = tiny.model.decode(tiny.kernels, &tiny.params, packed, &mut cache, &rows);
        let row = tiny.kernels.download_f64(&logits.unwrap());
        logprobs.push(row[*next as usize] - row.iter().map(|l| l.exp()).sum::<f64>().ln());
    }
    logprobs
}

fn mean_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
}

#[test]
fn the_absorbed_form_of_a_quantised_model_sees_the_weights_of_the_expanded_one() {
    for config in [config(), config_lite(), config_dense()] {
        let kernels = cpu(2);
        let tiny = Tiny::new(&kernels, &config, false);
        let full = scored(&tiny, &pack(&tiny, PackFor { form: Expanded, ..PackFor::SAMPLING }));
        for format in WeightFormat::ALL {
            let of = |form| pack(&tiny, PackFor { form, format, ..PackFor::SAMPLING });
            let expanded = scored(&tiny, &of(Expanded));
            let absorbed = of(Absorbed);
            for found in
                [scored(&tiny, &absorbed), decoded(&tiny, &config, &absorbed, CacheFormat::F32)]
            {
                let (index, error) = worst(&found, &expanded, 1.0);
                assert!(error < 1e-4, "{format:?}, position {index}: {error:e}");
            }
            // The format is not without effect, and the effect is small for random weights.
            let distance = mean_distance(&expanded, &full);
            assert_eq!(distance > 0.0, format != WeightFormat::F32, "{format:?}");
            assert!(distance < 0.5, "{format:?}: {distance}");
        }
    }
}

#[test]
fn a_cache_of_fewer_bits_changes_little_and_bf16_less_than_eight_or_six() {
    for config in [config(), config_lite(), config_dense()] {
        let kernels = cpu(2);
        let tiny = Tiny::new(&kernels, &config, false);
        let packed = pack(&tiny, PackFor::SAMPLING);
        let full = scored(&tiny, &packed);
        let [f32, bf16, fp8, six_bit] = CacheFormat::ALL
            .map(|format| mean_distance(&decoded(&tiny, &config, &packed, format), &full));
        assert!(f32 < 1e-5, "{f32}");
        assert!(bf16 > 1e-5 && bf16 < 0.01, "{bf16}");
        assert!(fp8 > bf16 && six_bit > bf16 && fp8 < 0.1 && six_bit < 0.1, "{fp8} {six_bit}");
    }
}

#[test]
fn an_engine_scores_alike_with_and_without_a_cache_in_formats_that_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = engine(&folder, |_| {});
    engine.prepare(&PrepareStage { optimizer: None, ..stage(None) }).unwrap();
    let sequences: Vec<Vec<u32>> = vec![document(), document()[3..].to_vec()];
    let read = |engine: &mut HybridEngine, phase, formats| {
        engine.set_formats(formats).unwrap();
        engine.enter_phase(phase).unwrap();
        let mut logprobs = Vec::new();
        let each = &mut |index: usize, position: usize, all: &[f64]| {
            let total: f64 = all.iter().map(|l| l.exp()).sum();
            assert!((total - 1.0).abs() < 1e-9, "{total}");
            logprobs.push((index, position, all[sequences[index][position + 1] as usize]));
        };
        engine.each_distribution(&sequences, each).unwrap();
        logprobs.sort_by_key(|(index, position, _)| (*index, *position));
        assert_eq!(logprobs.len(), 22 + 19);
        let bytes = (engine.packed_bytes(), engine.cache_bytes_per_token());
        (logprobs.into_iter().map(|(.., l)| l).collect::<Vec<f64>>(), bytes)
    };
    let full = read(&mut engine, Phase::Score, Formats::default());
    let formats = Formats { weights: WeightFormat::Fp8Channel, cache: CacheFormat::F32 };
    let scored = read(&mut engine, Phase::Score, formats);
    let cached = read(&mut engine, Phase::Generate, formats);
    assert!(worst(&cached.0, &scored.0, 1.0).1 < 1e-4);
    let distance = mean_distance(&scored.0, &full.0);
    assert!(distance > 0.0 && distance < 0.5, "{distance}");
    // So small a model's scales fill pages of the arena, so that it shrinks not at all; but it is packed anew.
    assert_ne!(scored.1.0, full.1.0);
    assert!(scored.1.1.is_none() && cached.1.1.is_some());
    let formats = Formats { cache: CacheFormat::SixBit, ..formats };
    let small = read(&mut engine, Phase::Generate, formats);
    assert!(mean_distance(&small.0, &cached.0) > 0.0);
    // A page of the arena is the least: the tiny cache's bytes shrink no further than that.
    assert!(small.1.1 <= cached.1.1);
}

#[test]
fn every_command_that_only_reads_a_model_takes_weights_and_cache_in_few_bits() {
    let model = finished().join("export");
    let text = finished().join("data/held-out.jsonl");
    let run = |arguments: &[&str], formats: &str| {
        let mut command = rehearsal(arguments);
        command.arg(&model).args(formats.split_whitespace()).args(["--json", "--threads", "1"]);
        command
    };
    let told = |command| String::from_utf8(done(command).stdout).unwrap();
    let prompt = ["--chat", "--prompt", "rotate: p u n k", "--temperature", "0"];
    for formats in ["--dtype bf16 --cache-dtype bf16", "--dtype int8 --cache-dtype 6bit"] {
        let mut generate = run(&["generate"], formats);
        generate.args(prompt).args(["--max-tokens", "8"]);
        let reply: serde_json::Value = serde_json::from_str(&told(generate)).unwrap();
        let tokens = reply["tokens"].as_array().map(Vec::len);
        assert!(matches!(tokens, Some(1..=8)), "{reply}");
        let mut eval = run(&["eval"], formats);
        eval.arg("--data").arg(&text).args(["--verifier", "answer-line", "--max-tokens", "8"]);
        assert!(told(eval).contains("pass_at_1"));
    }
    let mut score = run(&["score"], "--cache-dtype fp8");
    score.arg("--input").arg(&text);
    check_refused(score, 2, &["--decode"]);
}
