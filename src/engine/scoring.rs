//! Forward passes of one model over whole sequences: log-probabilities, or a reward model's score.

use super::phase::{ScoreJob, SequenceScore};
use super::resident::{Calibration, out_of_memory};
use super::sampling::each_distribution;
use crate::config::fault::Fault;
use crate::model::{Documents, PackedModel, Params, Transformer};
use anyhow::{Result, bail};
use rehearsal_kernels::{Kernels, OutOfMemory};
use std::ops::Range;

/// Rows that go through the model at once, if the budget allows; a longer sequence goes alone.
pub const ROWS_AT_ONCE: usize = 4096;

/// Rows whose logits are held at once.
const LOGIT_ROWS: usize = 64;

/// One model, ready for forward passes.
pub(super) struct Scorer<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// The model.
    pub model: &'a Transformer,
    /// Its weights.
    pub params: &'a Params,
    /// The same weights, packed for forward passes.
    pub packed: &'a PackedModel,
    /// A reward model's calibration; log-probabilities are wanted of a model without one.
    pub calibration: Option<Calibration>,
}

impl Scorer<'_> {
    /// Scores every sequence of `job`, in order. Which sequences share a pass changes no bit, so that a pass that
    /// does not fit into the budget is begun again with half the rows.
    pub fn score(&self, job: &ScoreJob) -> Result<Vec<SequenceScore>> {
        check(self.model, job)?;
        let mut scores = Vec::with_capacity(job.sequences.len());
        let (mut first, mut rows_at_once) = (0, ROWS_AT_ONCE);
        while first < job.sequences.len() {
            let end = first + fitting(&job.sequences[first..], rows_at_once);
            match self.pass(job, first..end) {
                Err(_) if end > first + 1 => {
                    let rows: usize = job.sequences[first..end].iter().map(Vec::len).sum();
                    rows_at_once = rows / 2;
                }
                outcome => {
                    scores.extend(outcome.map_err(out_of_memory)?);
                    first = end;
                }
            }
        }
        Ok(scores)
    }

    /// Calls `each(sequence, position, log-probabilities of all tokens that may follow)` for every token but the last.
    pub fn each_distribution(
        &self,
        sequences: &[Vec<u32>],
        each: &mut dyn FnMut(usize, usize, &[f64]),
    ) -> Result<()> {
        let first = vec![1; sequences.len()];
        let role = super::phase::Role::Policy;
        let job = ScoreJob { role, sequences: sequences.to_vec(), temperature: 1.0, first };
        check(self.model, &job)?;
        for (index, sequence) in sequences.iter().enumerate() {
            let documents = Documents::pack(self.kernels, &[sequence]).map_err(out_of_memory)?;
            let pass = self.model.pass(self.kernels, &documents, self.packed);
            let hidden = self.model.forward_only(&pass, self.params, self.packed);
            let hidden = hidden.map_err(out_of_memory)?;
            let rows: Vec<u32> = (0..sequence.len() as u32 - 1).collect();
            for (tile, rows) in rows.chunks(LOGIT_ROWS).enumerate() {
                let heads = &self.packed.heads;
                let logits = heads.logits(self.kernels, self.params, &hidden, rows);
                let logits = logits.map_err(out_of_memory)?;
                each_distribution(self.kernels, &logits, &mut |row, logprobs| {
                    each(index, tile * LOGIT_ROWS + row, logprobs);
                });
            }
        }
        Ok(())
    }

    /// One forward pass over some of the sequences.
    fn pass(&self, job: &ScoreJob, range: Range<usize>) -> Result<Vec<SequenceScore>, OutOfMemory> {
        let documents: Vec<&[u32]> =
            job.sequences[range.clone()].iter().map(Vec::as_slice).collect();
        let packed_documents = Documents::pack(self.kernels, &documents)?;
        let pass = self.model.pass(self.kernels, &packed_documents, self.packed);
        let hidden = self.model.forward_only(&pass, self.params, self.packed)?;
        let heads = &self.packed.heads;
        if let Some(Calibration { mean, deviation }) = self.calibration {
            let output = heads.scores(&pass, self.params, &hidden, &last_rows(&documents))?;
            let calibrated = |raw: &f64| SequenceScore::Reward((raw - mean) / deviation);
            return Ok(output.scores.iter().map(calibrated).collect());
        }
        let first = &job.first[range];
        let (rows, targets) = wanted(&documents, first);
        let logprobs = if rows.is_empty() {
            Vec::new()
        } else {
            heads.logprobs(&pass, self.params, &hidden, &rows, &targets, job.temperature)?.logprobs
        };
        let mut next = logprobs.iter().map(|logprob| *logprob as f32);
        let own = |(document, first): (&&[u32], &usize)| {
            SequenceScore::Logprobs(next.by_ref().take(document.len() - first).collect())
        };
        Ok(documents.iter().zip(first).map(own).collect())
    }
}

/// How many of the first sequences have at most `rows` tokens together; at least one.
fn fitting(sequences: &[Vec<u32>], rows: usize) -> usize {
    let mut held = 0;
    let fits = |sequence: &&Vec<u32>| {
        held += sequence.len();
        held <= rows
    };
    sequences.iter().take_while(fits).count().max(1)
}

/// The last row of each document.
fn last_rows(documents: &[&[u32]]) -> Vec<u32> {
    let mut end = 0;
    let last = |document: &&[u32]| {
        end += document.len() as u32;
        end - 1
    };
    documents.iter().map(last).collect()
}

/// Hidden rows and the tokens that follow them, for every wanted token.
fn wanted(documents: &[&[u32]], first: &[usize]) -> (Vec<u32>, Vec<u32>) {
    let (mut rows, mut targets, mut base) = (Vec::new(), Vec::new(), 0);
    for (document, first) in documents.iter().zip(first) {
        for (position, token) in document.iter().enumerate().skip(*first) {
            rows.push(base + position as u32 - 1);
            targets.push(*token);
        }
        base += document.len() as u32;
    }
    (rows, targets)
}

fn check(model: &Transformer, job: &ScoreJob) -> Result<()> {
    let (context, vocabulary) = (model.config.max_position_embeddings, model.config.vocab_size);
    for (index, sequence) in job.sequences.iter().enumerate() {
        if sequence.is_empty() {
            bail!(Fault::User(format!("sequence {index} has no token to score")));
        }
        if sequence.len() > context {
            let tokens = sequence.len();
            bail!(Fault::User(format!(
                "sequence {index} has {tokens} tokens, the model's context is {context}; shorten it"
            )));
        }
        if let Some(token) = sequence.iter().find(|t| **t as usize >= vocabulary) {
            bail!(Fault::User(format!(
                "sequence {index} holds token id {token}, the vocabulary ends at {}",
                vocabulary - 1
            )));
        }
    }
    assert!(job.first.len() == job.sequences.len() && job.first.iter().all(|f| *f >= 1));
    Ok(())
}
