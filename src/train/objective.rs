//! What an optimizer step minimises: the next-token, preference or GRPO loss, as one match.
//!
//! A step's examples are `Items`. They go through the model one micro-batch at a time; every mean is taken over
//! the whole step, so that the split changes no gradient.

use super::job::GrpoReport;
use crate::data::example::{Batch, Pair, Sequence};
use crate::model::heads::{Heads, VocabularyOutput};
use crate::model::{Gradients, Params, Pass};
use crate::rl::grpo::{GrpoSettings, rollout_loss};
use crate::rl::rollout::{Rollout, ScoredGroup};
use rehearsal_kernels::{Buffer, OutOfMemory};
use std::ops::Range;

/// The examples of one optimizer step.
pub enum Items<'a> {
    /// Next-token loss, mean over all targets of the step.
    Documents(&'a [Sequence]),
    /// Preference loss -log σ(r_chosen - r_rejected), mean over pairs.
    Pairs(&'a [Pair]),
    /// GRPO (deepseek_v2.md 4.3), mean over groups and rollouts.
    Rollouts(Vec<Item<'a>>, &'a GrpoSettings),
}

/// A rollout with what its loss needs.
pub struct Item<'a> {
    tokens: Vec<u32>,
    prompt: usize,
    rollout: &'a Rollout,
    advantage: f64,
    reference: Option<&'a [f32]>,
}

/// Sums over a step.
#[derive(Default)]
pub struct Tally {
    /// The objective.
    pub loss: f64,
    /// Pairs whose chosen reply scores higher.
    pub ordered: usize,
    kl: f64,
    entropy: f64,
    clipped: u64,
    gap: f64,
    gap_max: f64,
    tokens: u64,
}

/// One micro-batch in flight: its pass, the residual stream after the last block, and where gradients go.
pub struct Micro<'a> {
    /// The pass.
    pub pass: &'a Pass<'a>,
    /// Weights.
    pub params: &'a Params,
    /// Packed heads.
    pub heads: &'a Heads,
    /// Residual stream `[T, d]`.
    pub hidden: &'a Buffer,
    /// Its gradient, zeroed.
    pub d_hidden: &'a mut Buffer,
    /// Gradients of the weights.
    pub gradients: &'a mut Gradients,
}

impl<'a> Items<'a> {
    /// The examples of a batch.
    pub fn of_batch(batch: &'a Batch) -> Items<'a> {
        match batch {
            Batch::Documents(documents) => Items::Documents(documents),
            Batch::Pairs(pairs) => Items::Pairs(pairs),
        }
    }

    /// The rollouts of scored groups.
    pub fn rollouts(groups: &'a [ScoredGroup], settings: &'a GrpoSettings) -> Items<'a> {
        let items = groups.iter().flat_map(|scored| {
            scored.group.rollouts.iter().enumerate().map(move |(i, rollout)| {
                let prompt = &scored.group.prompt.tokens;
                Item {
                    tokens: prompt.iter().chain(&rollout.tokens).copied().collect(),
                    prompt: prompt.len(),
                    rollout,
                    advantage: scored.advantages[i],
                    reference: scored.reference.get(i).map(Vec::as_slice),
                }
            })
        });
        Items::Rollouts(items.collect(), settings)
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        match self {
            Items::Documents(documents) => documents.len(),
            Items::Pairs(pairs) => pairs.len(),
            Items::Rollouts(items, _) => items.len(),
        }
    }

    /// True if there is nothing to train on.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if the scalar head is trained and not the vocabulary's.
    pub fn uses_scalar_head(&self) -> bool {
        matches!(self, Items::Pairs(_))
    }

    /// The token sequences of some examples, in the order in which they are packed.
    pub fn sequences(&self, range: Range<usize>) -> Vec<&[u32]> {
        match self {
            Items::Documents(documents) => {
                documents[range].iter().map(|d| d.tokens.as_slice()).collect()
            }
            Items::Pairs(pairs) => pairs[range]
                .iter()
                .flat_map(|p| [p.chosen.as_slice(), p.rejected.as_slice()])
                .collect(),
            Items::Rollouts(items, _) => items[range].iter().map(|i| i.tokens.as_slice()).collect(),
        }
    }

    /// Adds the loss and the gradients of some examples.
    pub fn evaluate(
        &self,
        range: Range<usize>,
        micro: &mut Micro<'_>,
        tally: &mut Tally,
    ) -> Result<(), OutOfMemory> {
        match self {
            Items::Documents(documents) => next_token(documents, range, micro, tally),
            Items::Pairs(pairs) => preference(pairs, range, micro, tally),
            Items::Rollouts(items, settings) => grpo(items, settings, range, micro, tally),
        }
    }
}

impl Tally {
    /// GRPO's figures, means over reply tokens.
    pub fn grpo(&self) -> GrpoReport {
        let tokens = self.tokens.max(1) as f64;
        GrpoReport {
            kl: self.kl / tokens,
            entropy: self.entropy / tokens,
            clip_share: self.clipped as f64 / tokens,
            logprob_gap_max: self.gap_max,
            logprob_gap_mean: self.gap / tokens,
        }
    }
}

fn next_token(
    documents: &[Sequence],
    range: Range<usize>,
    micro: &mut Micro<'_>,
    tally: &mut Tally,
) -> Result<(), OutOfMemory> {
    let total: usize = documents.iter().map(Sequence::targets).sum();
    let (mut rows, mut targets, mut first) = (Vec::new(), Vec::new(), 0);
    for document in &documents[range] {
        for position in (1..document.tokens.len()).filter(|p| document.target[*p]) {
            rows.push(first + position as u32 - 1);
            targets.push(document.tokens[position]);
        }
        first += document.tokens.len() as u32;
    }
    if rows.is_empty() {
        return Ok(());
    }
    let output = micro.logprobs(&rows, &targets, 1.0)?;
    tally.loss -= output.logprobs.iter().sum::<f64>() / total as f64;
    micro.backward_logprobs(&output, &vec![-1.0 / total as f64; rows.len()])
}

fn preference(
    pairs: &[Pair],
    range: Range<usize>,
    micro: &mut Micro<'_>,
    tally: &mut Tally,
) -> Result<(), OutOfMemory> {
    let (mut rows, mut end) = (Vec::new(), 0);
    for pair in &pairs[range] {
        for tokens in [&pair.chosen, &pair.rejected] {
            end += tokens.len() as u32;
            rows.push(end - 1);
        }
    }
    let output = micro.heads.scores(micro.pass, micro.params, micro.hidden, &rows)?;
    let scale = 1.0 / pairs.len() as f64;
    let mut coefficients = Vec::with_capacity(rows.len());
    for scores in output.scores.chunks_exact(2) {
        let (loss, slope) = preference_loss(scores[0] - scores[1]);
        tally.loss += scale * loss;
        tally.ordered += usize::from(scores[0] > scores[1]);
        coefficients.extend([scale * slope, -scale * slope]);
    }
    micro.heads.backward_scores(
        micro.pass,
        micro.params,
        &output,
        &coefficients,
        micro.d_hidden,
        micro.gradients,
    )
}

/// -log σ(margin) and its derivative; neither overflows.
pub fn preference_loss(margin: f64) -> (f64, f64) {
    let loss = (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
    let slope = if margin >= 0.0 {
        let small = (-margin).exp();
        -small / (1.0 + small)
    } else {
        -1.0 / (1.0 + margin.exp())
    };
    (loss, slope)
}

fn grpo(
    items: &[Item<'_>],
    settings: &GrpoSettings,
    range: Range<usize>,
    micro: &mut Micro<'_>,
    tally: &mut Tally,
) -> Result<(), OutOfMemory> {
    let (mut rows, mut targets, mut first) = (Vec::new(), Vec::new(), 0);
    for item in &items[range.clone()] {
        let start = first + item.prompt as u32 - 1;
        rows.extend(start..start + item.rollout.tokens.len() as u32);
        targets.extend_from_slice(&item.rollout.tokens);
        first += item.tokens.len() as u32;
    }
    let output = micro.logprobs(&rows, &targets, settings.temperature)?;
    let scale = 1.0 / items.len() as f64;
    let (mut coefficients, mut next) = (Vec::with_capacity(rows.len()), 0);
    for item in &items[range] {
        let own = next..next + item.rollout.tokens.len();
        next = own.end;
        let new = &output.logprobs[own.clone()];
        let token_loss = rollout_loss(
            settings,
            item.advantage,
            scale,
            new,
            &item.rollout.logprobs,
            item.reference,
        );
        tally.loss += token_loss.loss;
        tally.kl += token_loss.kl_sum;
        tally.clipped += token_loss.clipped;
        tally.tokens += new.len() as u64;
        tally.entropy += output.entropies[own].iter().sum::<f64>();
        for (trainer, sampler) in new.iter().zip(&item.rollout.logprobs) {
            let gap = (trainer - f64::from(*sampler)).abs();
            tally.gap += gap;
            tally.gap_max = tally.gap_max.max(gap);
        }
        coefficients.extend(token_loss.coefficients);
    }
    micro.backward_logprobs(&output, &coefficients)
}

impl Micro<'_> {
    fn logprobs(
        &self,
        rows: &[u32],
        targets: &[u32],
        temperature: f64,
    ) -> Result<VocabularyOutput, OutOfMemory> {
        self.heads.logprobs(self.pass, self.params, self.hidden, rows, targets, temperature)
    }

    fn backward_logprobs(
        &mut self,
        output: &VocabularyOutput,
        coefficients: &[f64],
    ) -> Result<(), OutOfMemory> {
        self.heads.backward_logprobs(
            self.pass,
            self.params,
            output,
            coefficients,
            self.d_hidden,
            self.gradients,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapping_a_pair_negates_the_margin_and_no_margin_costs_ln_2() {
        let (loss, slope) = preference_loss(0.0);
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-15 && (slope + 0.5).abs() < 1e-15);
        for margin in [-700.0, -3.0, -0.2, 0.7, 5.0, 700.0] {
            let (forward, backward) = (preference_loss(margin), preference_loss(-margin));
            assert!((forward.0 - backward.0 + margin).abs() < 1e-9 * margin.abs().max(1.0));
            assert!((forward.1 + backward.1 + 1.0).abs() < 1e-12);
            if margin.abs() < 10.0 {
                let step = 1e-6;
                let numeric = (preference_loss(margin + step).0 - preference_loss(margin - step).0)
                    / (2.0 * step);
                assert!((numeric - forward.1).abs() < 1e-8);
            }
        }
    }
}
