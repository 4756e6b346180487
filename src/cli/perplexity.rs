//! `rehearsal eval --metric perplexity`: how well a model predicts texts, and what formats of few bits change of that.
//!
//! Weights alone are judged by whole sequences, as in training; a cache in a format of its own is judged token by token
//! through the sampler. With `--against-f32` the same texts go through a second engine in f32, chunk by chunk.

use super::eval::EvalArgs;
use super::formats::CacheDtype;
use super::open_model::{FILE, OpenModel};
use super::output::{say, say_json};
use crate::config::data::Schema;
use crate::config::{Dtype, Fault};
use crate::data::jsonl::Records;
use crate::engine::phase::Phase;
use anyhow::Result;
use serde::Serialize;

/// Bytes of f32 log-probabilities that are held of the other model at most, unless one sequence takes more.
const HELD_BYTES: usize = 256 << 20;

/// Stable keys of `--json`.
#[derive(Serialize)]
struct Measured {
    perplexity: f64,
    tokens: usize,
    samples: usize,
    dtype: Dtype,
    cache_dtype: CacheDtype,
    /// Packed weights, by the arena's count.
    weight_bytes: u64,
    /// By the arena's count; absent if the texts went through no cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_bytes_per_token: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    against_f32: Option<Against>,
}

/// Stable keys of `--against-f32`.
#[derive(Serialize)]
struct Against {
    perplexity: f64,
    /// Relative change of the perplexity.
    delta: f64,
    /// Mean over tokens of KL(f32 || this), nats.
    kl: f64,
    weight_bytes: u64,
}

/// Negative log-probabilities of tokens, summed up.
#[derive(Default)]
struct Sum {
    nats: f64,
    tokens: usize,
}

impl Sum {
    fn add(&mut self, logprob: f64) {
        self.nats -= logprob;
        self.tokens += 1;
    }

    fn perplexity(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }
}

/// Measures and prints.
pub fn run(mut model: OpenModel, args: &EvalArgs) -> Result<()> {
    let loader = model.loader(args.data(), Schema::Text, false);
    let (path, set) = loader.sources.set(FILE)?;
    let samples = Records::open(&path, set)?.count();
    let sequences: Vec<Vec<u32>> = loader.texts(FILE, 0)?.into_iter().map(|s| s.tokens).collect();
    if sequences.iter().all(|tokens| tokens.len() < 2) {
        let path = args.data().display();
        return Err(Fault::user(format!("{path}: no text has two tokens or more")));
    }
    let mut other = match args.against_f32 {
        true => {
            let mut other =
                OpenModel::open_extended(&args.checkpoint, args.threads.count(), args.extension)?;
            other.engine.enter_phase(Phase::Score)?;
            Some(other)
        }
        false => None,
    };
    let is_cached = args.formats.cache_dtype != CacheDtype::F32;
    model.engine.enter_phase(if is_cached { Phase::Generate } else { Phase::Score })?;
    let (mut own, mut others, mut kl) = (Sum::default(), Sum::default(), 0.0);
    let rows = HELD_BYTES / (4 * model.config.vocab_size);
    for chunk in chunks(&sequences, if other.is_some() { rows } else { usize::MAX }) {
        let held = match &mut other {
            Some(other) => hold(other, chunk, &mut others)?,
            None => Vec::new(),
        };
        model.engine.each_distribution(chunk, &mut |index, position, logprobs| {
            own.add(logprobs[chunk[index][position + 1] as usize]);
            if let Some(held) = held.get(index) {
                let held = held[position * logprobs.len()..].iter().map(|l| f64::from(*l));
                let term = |(p, q): (f64, &f64)| p.exp() * (p - q);
                kl += held.zip(logprobs).map(term).sum::<f64>();
            }
        })?;
    }
    let against_f32 = other.map(|other| Against {
        perplexity: others.perplexity(),
        delta: own.perplexity() / others.perplexity() - 1.0,
        kl: kl / own.tokens as f64,
        weight_bytes: other.engine.packed_bytes(),
    });
    tell(
        args,
        &Measured {
            perplexity: own.perplexity(),
            tokens: own.tokens,
            samples,
            dtype: args.formats.dtype,
            cache_dtype: args.formats.cache_dtype,
            weight_bytes: model.engine.packed_bytes(),
            cache_bytes_per_token: model.engine.cache_bytes_per_token(),
            against_f32,
        },
    )
}

/// Neighbouring sequences with at most `rows` tokens together, or one alone.
fn chunks(sequences: &[Vec<u32>], rows: usize) -> Vec<&[Vec<u32>]> {
    let (mut chunks, mut first, mut held) = (Vec::new(), 0, 0usize);
    for (index, sequence) in sequences.iter().enumerate() {
        if index > first && held + sequence.len() > rows {
            chunks.push(&sequences[first..index]);
            (first, held) = (index, 0);
        }
        held += sequence.len();
    }
    chunks.push(&sequences[first..]);
    chunks
}

/// All log-probabilities of the other model, sequence by sequence; adds the tokens' own to `sum`.
fn hold(other: &mut OpenModel, chunk: &[Vec<u32>], sum: &mut Sum) -> Result<Vec<Vec<f32>>> {
    let mut held = vec![Vec::new(); chunk.len()];
    other.engine.each_distribution(chunk, &mut |index, position, logprobs| {
        sum.add(logprobs[chunk[index][position + 1] as usize]);
        held[index].extend(logprobs.iter().map(|l| *l as f32));
    })?;
    Ok(held)
}

fn tell(args: &EvalArgs, measured: &Measured) -> Result<()> {
    if args.json {
        return say_json(measured);
    }
    say(&format!("perplexity {:.4} over {} tokens", measured.perplexity, measured.tokens))?;
    if let Some(against) = &measured.against_f32 {
        let Against { perplexity, delta, kl, .. } = against;
        let delta = 100.0 * delta;
        say(&format!(
            "f32 has {perplexity:.4}: {delta:+.4} %; KL(f32 || this) {kl:.3e} nats a token"
        ))?;
    }
    if args.formats != Default::default() || measured.against_f32.is_some() {
        let full = measured.against_f32.as_ref().map(|f32| format!(" (f32: {})", f32.weight_bytes));
        say(&format!(
            "packed weights {} bytes{}",
            measured.weight_bytes,
            full.unwrap_or_default()
        ))?;
    }
    match measured.cache_bytes_per_token {
        Some(bytes) => say(&format!("cache {bytes:.1} bytes a token")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_all_sequences_in_order_and_no_more_rows_than_they_may() {
        let of = |lengths: &[usize]| lengths.iter().map(|n| vec![0; *n]).collect::<Vec<Vec<u32>>>();
        let sizes = |lengths: &[usize], rows| {
            chunks(&of(lengths), rows).iter().map(|chunk| chunk.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[3, 3, 3, 9, 2, 2], 6), [2, 1, 1, 2]);
        assert_eq!(sizes(&[9], 6), [1]);
        assert_eq!(sizes(&[1, 2, 3], usize::MAX), [3]);
    }
}
