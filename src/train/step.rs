//! One optimizer step: forward, objective, backward, clip, update.
//!
//! Invariants:
//!   * after the backward passes every trainable tensor has a gradient (asserted: nothing is cut in silence)
//!   * a loss or gradient that is not finite changes no weight and no moment
//!   * the split into micro-batches changes no bit of the gradient; so a step that does not fit into the budget is
//!     begun again with half as many examples at once, down to one

use super::job::{Dropping, StepReport};
use super::learning_rate::learning_rate;
use super::objective::{Items, Micro, Tally};
use super::optimizer::Optimizer;
use super::routing::{balance_loss, layer_routing};
use crate::config::failpoint::failpoint;
use crate::config::routing::Balance;
use crate::config::stage::OptimizerConfig;
use crate::model::moe::Routing;
use crate::model::pass::indices;
use crate::model::{Capacity, Documents, Gradients, PackedModel, Params, Transformer};
use rehearsal_kernels::{Kernels, OutOfMemory};
use std::ops::Range;
use std::time::Instant;

/// A model in training.
pub struct Trainee<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// The model.
    pub model: &'a Transformer,
    /// Its weights.
    pub params: &'a mut Params,
    /// The same weights, packed for training.
    pub packed: &'a PackedModel,
    /// Gradients; cleared by the step.
    pub gradients: &'a mut Gradients,
    /// Moments.
    pub optimizer: &'a mut Optimizer,
}

/// What a step is to do, apart from its examples.
pub struct StepSettings<'a> {
    /// Optimizer and schedule.
    pub optimizer: &'a OptimizerConfig,
    /// Number of the step, from 0, for the schedule.
    pub step: u64,
    /// Steps of the stage, for the schedule.
    pub steps: u64,
    /// The share of the stage's tokens that were trained on before this step, for schedules in tokens.
    pub share: f64,
    /// Weights of the balance losses.
    pub balance: Balance,
    /// What full devices drop; `None` for nothing.
    pub dropping: Option<&'a Dropping>,
    /// Examples that go through the model at once, if the budget allows; 0 for all.
    pub micro_batch: usize,
}

/// Runs one step. The caller repacks the weights if `!report.skipped`.
pub fn train_step(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    items: &Items<'_>,
) -> Result<StepReport, OutOfMemory> {
    let began = Instant::now();
    let fits = |d: &Dropping| matches!(items, Items::Documents(documents) if documents.len() == d.protected.len());
    assert!(
        settings.dropping.is_none_or(fits),
        "dropping is for documents, and knows each of them"
    );
    let mut micro_batch = match settings.micro_batch {
        0 => items.len().max(1),
        asked => asked.min(items.len().max(1)),
    };
    let (tally, routings) = loop {
        match gradients(trainee, settings, micro_batch, items) {
            Err(_) if micro_batch > 1 => micro_batch = micro_batch.div_ceil(2),
            outcome => break outcome?,
        }
    };
    let tokens = items.sequences(0..items.len()).iter().map(|s| s.len() as u64).sum();
    let scalar_head = items.uses_scalar_head();
    let missing = trainee.gradients.missing(&trainee.model.layout, scalar_head);
    assert!(missing.is_empty() || items.is_empty(), "no gradient was written for {missing:?}");

    let gradient_norm = trainee.kernels.squared_sum(&trainee.gradients.slab.whole()).sqrt();
    let rate = learning_rate(settings.optimizer, settings.step, settings.steps, settings.share);
    let balance_loss = balance_loss(&routings);
    let skipped =
        !(tally.loss.is_finite() && balance_loss.is_finite() && gradient_norm.is_finite());
    if !skipped {
        trainee.optimizer.update(
            trainee.kernels,
            settings.optimizer,
            rate,
            gradient_norm,
            trainee.params,
            trainee.gradients,
            scalar_head,
        );
    }
    Ok(StepReport {
        loss: tally.loss,
        balance_loss,
        learning_rate: rate,
        gradient_norm,
        tokens,
        seconds: began.elapsed().as_secs_f64(),
        micro_batch,
        memory_high_water: trainee.kernels.arena().high_water(),
        skipped,
        policy_version: 0,
        routing: layer_routing(&routings),
        accuracy: scalar_head.then(|| tally.ordered as f64 / items.len().max(1) as f64),
        grpo: matches!(items, Items::Rollouts(..)).then(|| tally.grpo()),
    })
}

/// Loss and gradients of all examples, so many at once.
fn gradients(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    micro_batch: usize,
    items: &Items<'_>,
) -> Result<(Tally, Vec<Vec<Routing>>), OutOfMemory> {
    trainee.gradients.clear(trainee.kernels);
    let (mut tally, mut routings) = (Tally::default(), Vec::new());
    let documents = items.sequences(0..items.len()).len();
    for first in (0..items.len()).step_by(micro_batch) {
        let range = first..items.len().min(first + micro_batch);
        routings.push(backpropagate(trainee, settings, documents, items, range, &mut tally)?);
        failpoint("mid-gradient");
    }
    Ok((tally, routings))
}

/// Forward and backward of one micro-batch.
fn backpropagate(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    documents_in_step: usize,
    items: &Items<'_>,
    range: Range<usize>,
    tally: &mut Tally,
) -> Result<Vec<Routing>, OutOfMemory> {
    let (kernels, model, packed) = (trainee.kernels, trainee.model, trainee.packed);
    let documents = Documents::pack(kernels, &items.sequences(range.clone()))?;
    let mut pass = model.pass(kernels, &documents, packed);
    pass.balance = settings.balance;
    pass.sequences = documents_in_step;
    pass.capacity = settings.dropping.map(|d| capacity(kernels, d, range.clone())).transpose()?;
    let (hidden, saved) = model.forward(&pass, trainee.params, packed)?;
    let mut d_hidden = pass.floats(hidden.rows(), hidden.cols())?;
    kernels.fill(&mut d_hidden, 0.0);
    let mut micro = Micro {
        pass: &pass,
        params: trainee.params,
        heads: &packed.heads,
        hidden: &hidden,
        d_hidden: &mut d_hidden,
        gradients: trainee.gradients,
    };
    items.evaluate(range, &mut micro, tally)?;
    model.backward(&pass, trainee.params, packed, saved, d_hidden, trainee.gradients)
}

/// What the devices may process of the documents in `range`.
fn capacity(
    kernels: &dyn Kernels,
    dropping: &Dropping,
    range: Range<usize>,
) -> Result<Capacity, OutOfMemory> {
    let protected: Vec<u32> = dropping.protected[range].iter().map(|p| u32::from(*p)).collect();
    let protected = indices(kernels, &protected)?;
    Ok(Capacity { factor: dropping.capacity_factor, protected })
}
