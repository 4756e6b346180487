//! What an optimizer step minimises: the next-token, preference or GRPO loss, as one match.
//!
//! A step's examples are `Items`. They go through the model one micro-batch of atoms at a time (a document, a pair, or
//! rollouts that share a prompt); every mean is taken over the whole step, so that the split changes no gradient.

use super::job::{GrpoReport, Importance};
use super::rollouts::Rollouts;
use crate::config::ModelConfig;
use crate::data::example::{Batch, Pair, Sequence};
use crate::model::cost::{forward_flops, head_flops};
use crate::model::heads::{Heads, VocabularyOutput};
use crate::model::{Documents, Family, Gradients, Params, Pass};
use crate::rl::grpo::{TokenLoss, k3_value};
use rehearsal_kernels::{Activity, Buffer, Kernels, OutOfMemory};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The examples of one optimizer step.
pub enum Items<'a> {
    /// Next-token loss, mean over all targets of the step.
    Documents(&'a [Sequence]),
    /// Preference loss -log σ(r_chosen - r_rejected), mean over pairs.
    Pairs(&'a [Pair]),
    /// GRPO (deepseek_v2.md 4.3), mean over groups and rollouts.
    Rollouts(Rollouts<'a>),
}

/// Sums over a step.
#[derive(Default, Serialize, Deserialize)]
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
    sampler_kl: f64,
    weights: f64,
    truncated: u64,
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

    /// Number of atoms.
    pub fn len(&self) -> usize {
        match self {
            Items::Documents(documents) => documents.len(),
            Items::Pairs(pairs) => pairs.len(),
            Items::Rollouts(rollouts) => rollouts.len(),
        }
    }

    /// True if there is nothing to train on.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of examples: documents, pairs or rollouts.
    pub fn examples(&self) -> usize {
        match self {
            Items::Rollouts(rollouts) => rollouts.trained(),
            _ => self.len(),
        }
    }

    /// Most examples of an atom; at least 1.
    pub fn largest(&self) -> usize {
        match self {
            Items::Rollouts(rollouts) => rollouts.largest(),
            _ => 1,
        }
    }

    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        match self {
            Items::Documents(documents) => documents.iter().map(|d| d.tokens.len()).sum(),
            Items::Pairs(pairs) => pairs.iter().map(|p| p.chosen.len() + p.rejected.len()).sum(),
            Items::Rollouts(rollouts) => rollouts.tokens(),
        }
    }

    /// Token rows that the step must have, each token of an example once and a prompt once for all its rollouts.
    pub fn unique_rows(&self) -> usize {
        match self {
            Items::Rollouts(rollouts) => rollouts.unique_rows(),
            _ => self.tokens(),
        }
    }

    /// FLOPs of a forward pass over all examples, attention expanded: a prompt once for all its rollouts, and no
    /// vocabulary where the scalar head is trained.
    pub fn forward_flops(&self, model: &ModelConfig) -> f64 {
        let whole = |tokens: &[u32]| forward_flops(model, 0, tokens.len());
        match self {
            Items::Documents(documents) => documents.iter().map(|d| whole(&d.tokens)).sum(),
            Items::Pairs(pairs) => {
                let both = |pair: &Pair| whole(&pair.chosen) + whole(&pair.rejected);
                let vocabulary = self.tokens() as f64 * head_flops(model);
                pairs.iter().map(both).sum::<f64>() - vocabulary
            }
            Items::Rollouts(rollouts) => rollouts.forward_flops(model),
        }
    }

    /// Documents of the step, over which balance losses are means.
    pub fn documents(&self) -> usize {
        match self {
            Items::Pairs(pairs) => 2 * pairs.len(),
            _ => self.examples(),
        }
    }

    /// True if the scalar head is trained and not the vocabulary's.
    pub fn uses_scalar_head(&self) -> bool {
        matches!(self, Items::Pairs(_))
    }

    /// The rows of some atoms.
    pub fn pack(
        &self,
        kernels: &dyn Kernels,
        range: Range<usize>,
    ) -> Result<Documents, OutOfMemory> {
        let families: Vec<Family<'_>> = match self {
            Items::Documents(documents) => {
                documents[range].iter().map(|d| Family::alone(&d.tokens)).collect()
            }
            Items::Pairs(pairs) => pairs[range]
                .iter()
                .flat_map(|p| [Family::alone(&p.chosen), Family::alone(&p.rejected)])
                .collect(),
            Items::Rollouts(rollouts) => rollouts.families(range),
        };
        Documents::pack_families(kernels, &families)
    }

    /// Adds the loss and the gradients of some atoms.
    pub fn evaluate(
        &self,
        range: Range<usize>,
        micro: &mut Micro<'_>,
        tally: &mut Tally,
    ) -> Result<(), OutOfMemory> {
        match self {
            Items::Documents(documents) => next_token(documents, range, micro, tally),
            Items::Pairs(pairs) => preference(pairs, range, micro, tally),
            Items::Rollouts(rollouts) => rollouts.evaluate(range, micro, tally),
        }
    }
}

impl Tally {
    /// Adds what another rank summed.
    pub fn join(&mut self, other: Tally) {
        self.loss += other.loss;
        self.ordered += other.ordered;
        self.kl += other.kl;
        self.entropy += other.entropy;
        self.clipped += other.clipped;
        self.gap += other.gap;
        if other.gap_max > self.gap_max || other.gap_max.is_nan() {
            self.gap_max = other.gap_max;
        }
        self.sampler_kl += other.sampler_kl;
        self.weights += other.weights;
        self.truncated += other.truncated;
        self.tokens += other.tokens;
    }

    /// Adds a rollout: its loss, the trainer's log-probabilities and entropies, the sampler's log-probabilities.
    pub(super) fn add(
        &mut self,
        loss: &TokenLoss,
        trainer: &[f64],
        entropies: &[f64],
        sampler: &[f32],
    ) {
        self.loss += loss.loss;
        self.kl += loss.kl_sum;
        self.clipped += loss.clipped;
        self.tokens += trainer.len() as u64;
        self.entropy += entropies.iter().sum::<f64>();
        for (trainer, sampler) in trainer.iter().zip(sampler) {
            let gap = (trainer - f64::from(*sampler)).abs();
            self.gap += gap;
            // Not `max`, which would hide what is not a number.
            if gap > self.gap_max || gap.is_nan() {
                self.gap_max = gap;
            }
            self.sampler_kl += k3_value(trainer - f64::from(*sampler));
        }
        self.weights += loss.weights.iter().sum::<f64>();
        self.truncated += loss.truncated;
    }

    /// GRPO's figures, means over the reply tokens of the rollouts that were trained on.
    pub fn grpo(&self, rollouts: &Rollouts<'_>) -> GrpoReport {
        let tokens = self.tokens.max(1) as f64;
        let importance = rollouts.are_weighted().then(|| Importance {
            weight_mean: self.weights / tokens,
            truncated_share: self.truncated as f64 / tokens,
        });
        GrpoReport {
            kl: self.kl / tokens,
            entropy: self.entropy / tokens,
            clip_share: self.clipped as f64 / tokens,
            logprob_gap_max: self.gap_max,
            logprob_gap_mean: self.gap / tokens,
            sampler_kl: self.sampler_kl / tokens,
            importance,
            trained_share: rollouts.trained_share(),
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
        // No target among these documents: the heads' gradient is zero, and not forgotten.
        micro.heads.nothing(micro.gradients);
        return Ok(());
    }
    let output = micro.logprobs(&rows, &targets, 1.0)?;
    tally.loss -= output.logprobs.iter().sum::<f64>() / total as f64;
    micro.backward_logprobs(output, &vec![-1.0 / total as f64; rows.len()])
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
    micro.pass.kernels.enter(Activity::Backward);
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

impl Micro<'_> {
    pub(super) fn logprobs(
        &self,
        rows: &[u32],
        targets: &[u32],
        temperature: f64,
    ) -> Result<VocabularyOutput, OutOfMemory> {
        self.heads.logprobs(self.pass, self.params, self.hidden, rows, targets, temperature, true)
    }

    pub(super) fn backward_logprobs(
        &mut self,
        output: VocabularyOutput,
        coefficients: &[f64],
    ) -> Result<(), OutOfMemory> {
        self.pass.kernels.enter(Activity::Backward);
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
