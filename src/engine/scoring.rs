//! Forward passes of one model over whole sequences: log-probabilities, or a reward model's score.

use super::phase::{ScoreJob, SequenceScore};
use super::resident::{Calibration, out_of_memory};
use crate::config::fault::Fault;
use crate::model::{Documents, PackedModel, Params, Transformer};
use anyhow::{Result, bail};
use rehearsal_kernels::Kernels;

/// Rows that go through the model at once; a longer sequence goes alone.
const ROWS_AT_ONCE: usize = 4096;

/// Scores every sequence of `job`, in order.
pub fn score(
    kernels: &dyn Kernels,
    model: &Transformer,
    params: &Params,
    packed: &PackedModel,
    calibration: Option<Calibration>,
    job: &ScoreJob,
) -> Result<Vec<SequenceScore>> {
    check(model, job)?;
    let mut scores = Vec::with_capacity(job.sequences.len());
    let mut first = 0;
    while first < job.sequences.len() {
        let mut end = first + 1;
        let mut rows = job.sequences[first].len();
        while end < job.sequences.len() && rows + job.sequences[end].len() <= ROWS_AT_ONCE {
            rows += job.sequences[end].len();
            end += 1;
        }
        let documents: Vec<&[u32]> = job.sequences[first..end].iter().map(Vec::as_slice).collect();
        let packed_documents = Documents::pack(kernels, &documents).map_err(out_of_memory)?;
        let pass = model.pass(kernels, &packed_documents, packed);
        let hidden = model.forward_only(&pass, params, packed).map_err(out_of_memory)?;
        match calibration {
            Some(calibration) => {
                let mut end_row = 0;
                let last: Vec<u32> = documents
                    .iter()
                    .map(|d| {
                        end_row += d.len() as u32;
                        end_row - 1
                    })
                    .collect();
                let output =
                    packed.heads.scores(&pass, params, &hidden, &last).map_err(out_of_memory)?;
                let calibrated = |raw: &f64| {
                    SequenceScore::Reward((raw - calibration.mean) / calibration.deviation)
                };
                scores.extend(output.scores.iter().map(calibrated));
            }
            None => {
                let (rows, targets) = wanted(&documents, &job.first[first..end]);
                let mut logprobs = Vec::new();
                if !rows.is_empty() {
                    let output = packed.heads.logprobs(
                        &pass,
                        params,
                        &hidden,
                        &rows,
                        &targets,
                        job.temperature,
                    );
                    logprobs = output.map_err(out_of_memory)?.logprobs;
                }
                let mut next = logprobs.iter();
                for (document, first) in documents.iter().zip(&job.first[first..end]) {
                    let own = next.by_ref().take(document.len() - first).map(|l| *l as f32);
                    scores.push(SequenceScore::Logprobs(own.collect()));
                }
            }
        }
        first = end;
    }
    Ok(scores)
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
