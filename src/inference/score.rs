//! Log-probabilities of given tokens through the sampler's own path: token by token, from the paged
//! cache.
//!
//! Samples nothing. It shows that sampler and trainer agree; whole sequences at once are
//! `engine::scoring`'s.

use super::generate::Limits;
use super::pages::PageTable;
use crate::config::fault::Fault;
use crate::model::cache::DecodeRows;
use anyhow::Result;
use std::collections::VecDeque;

/// A model with its cache that says how likely every next token is.
pub trait ForwardRows {
    /// Writes the rows' cache entries, then calls `each(row, log-probabilities of all tokens)` for every row, at
    /// temperature 1. Every row is wanted.
    fn logprobs(&mut self, rows: &DecodeRows, each: &mut dyn FnMut(usize, &[f64])) -> Result<()>;
}

/// A sequence on its way through the cache.
struct Reading {
    index: usize,
    pages: Vec<u32>,
    cached: usize,
}

/// For each sequence the log-probabilities of its tokens from the second on.
pub fn score_decoded(
    forward: &mut dyn ForwardRows,
    sequences: &[Vec<u32>],
    limits: &Limits,
) -> Result<Vec<Vec<f32>>> {
    let mut scores: Vec<Vec<f32>> = vec![Vec::new(); sequences.len()];
    read_decoded(forward, sequences, limits, &mut |index, position, logprobs| {
        scores[index].push(logprobs[sequences[index][position + 1] as usize] as f32);
    })?;
    Ok(scores)
}

/// Calls `each(sequence, position, log-probabilities of all tokens that may follow)` for every token but a sequence's
/// last. One row per sequence and step; at most `decode_batch` sequences run together, in their order.
pub fn read_decoded(
    forward: &mut dyn ForwardRows,
    sequences: &[Vec<u32>],
    limits: &Limits,
    each: &mut dyn FnMut(usize, usize, &[f64]),
) -> Result<()> {
    check(sequences, limits)?;
    let mut table = PageTable::new(limits.page_count);
    let mut waiting: VecDeque<usize> =
        (0..sequences.len()).filter(|i| sequences[*i].len() > 1).collect();
    let mut running: Vec<Reading> = Vec::new();
    let mut rows = DecodeRows::default();
    while !(waiting.is_empty() && running.is_empty()) {
        while running.len() < limits.decode_batch
            && let Some(index) = waiting.front().copied()
        {
            let count = pages_of(&sequences[index], limits);
            if count > table.free() {
                break;
            }
            waiting.pop_front();
            let pages = (0..count).map(|_| table.alloc().expect("counted above")).collect();
            running.push(Reading { index, pages, cached: 0 });
        }
        assert!(!running.is_empty(), "an empty cache has room for every checked sequence");
        rows.clear();
        for reading in &running {
            let tokens = &sequences[reading.index];
            rows.begin(&reading.pages[..=reading.cached / limits.page_tokens]);
            rows.push(tokens[reading.cached], reading.cached, limits.page_tokens);
            rows.want_last();
        }
        forward.logprobs(&rows, &mut |row, logprobs| {
            let reading = &mut running[row];
            each(reading.index, reading.cached, logprobs);
            reading.cached += 1;
        })?;
        running.retain(|reading| {
            let goes_on = reading.cached + 1 < sequences[reading.index].len();
            if !goes_on {
                reading.pages.iter().for_each(|page| table.release(*page));
            }
            goes_on
        });
    }
    Ok(())
}

/// Pages of a sequence whose last token never enters the cache.
fn pages_of(tokens: &[u32], limits: &Limits) -> usize {
    tokens.len().saturating_sub(1).div_ceil(limits.page_tokens)
}

fn check(sequences: &[Vec<u32>], limits: &Limits) -> Result<()> {
    assert!(
        limits.decode_batch > 0 && limits.page_tokens > 0,
        "the config's checks keep these above 0"
    );
    for (index, tokens) in sequences.iter().enumerate() {
        let (count, context) = (tokens.len(), limits.context);
        if count > context {
            let text =
                format!("sequence {index} has {count} tokens and the model's context is {context}");
            return Err(Fault::user(format!("{text}; shorten it")));
        }
        let (needed, held) = (pages_of(tokens, limits), limits.page_count);
        if needed > held {
            let text = format!("sequence {index} needs {needed} cache pages, the cache has {held}");
            return Err(Fault::resources(format!("{text}; raise engine.budget")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::oracle::{Machine, naive_logprobs};
    use super::*;

    fn sequences() -> Vec<Vec<u32>> {
        [9, 1, 0, 33, 16, 17, 2].iter().map(|n| (0..*n).map(|i| i * 7 % 11).collect()).collect()
    }

    #[test]
    fn decoded_scores_see_exactly_the_tokens_before() {
        let expected: Vec<Vec<f32>> =
            sequences().iter().map(|tokens| naive_logprobs(tokens)).collect();
        for decode_batch in [1, 3, 64] {
            for (page_tokens, page_count) in [(1, 32), (4, 8), (4, 11), (16, 40)] {
                let limits = Limits { decode_batch, context: 33, page_count, page_tokens };
                let mut machine = Machine::new(&limits);
                let got = score_decoded(&mut machine, &sequences(), &limits).unwrap();
                assert_eq!(
                    got, expected,
                    "batch {decode_batch}, {page_count} pages of {page_tokens}"
                );
            }
        }
    }

    #[test]
    fn a_sequence_that_cannot_fit_is_refused_with_both_numbers() {
        let limits = Limits { decode_batch: 1, context: 32, page_count: 9, page_tokens: 4 };
        let refused = |limits: &Limits| {
            let error = score_decoded(&mut Machine::new(limits), &sequences(), limits).unwrap_err();
            (error.downcast_ref::<Fault>().unwrap().exit_code(), error.to_string())
        };
        let (code, text) = refused(&limits);
        assert!(
            code == 2
                && text.contains("sequence 3 has 33 tokens")
                && text.contains("context is 32"),
            "{text}"
        );
        let (code, text) = refused(&Limits { context: 33, page_count: 7, ..limits });
        assert!(code == 4 && text.contains("needs 8 cache pages, the cache has 7"), "{text}");
    }
}
