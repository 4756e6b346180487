//! One optimizer step: forward, objective, backward, clip, update.
//!
//! Invariants:
//!   * after the backward passes every trainable tensor has a gradient (asserted: nothing is cut in silence)
//!   * a loss or gradient that is not finite changes no weight and no moment
//!   * the split into micro-batches changes no bit of the gradient; so a step takes no more at once than fill the
//!     products, and one that does not fit into the budget is begun again with half as many, down to one document,
//!     pair or group of rollouts

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
use crate::model::{Capacity, Gradients, PackedModel, Params, Transformer};
use rehearsal_kernels::{Activity, Kernels, OutOfMemory};
use std::ops::Range;
use std::time::Instant;

/// Tokens that go through the model at once where nobody asks for another number: enough rows for every expert's
/// products, and so few that a step's activations are a fraction of the whole batch's.
pub const TOKENS_AT_ONCE: usize = 1024;

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
    /// Examples that go through the model at once, if the budget allows, in whole groups of rollouts that share a
    /// prompt; 0 for about [`TOKENS_AT_ONCE`] tokens.
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
    let mut at_once = atoms_at_once(items, settings.micro_batch);
    let Summed { tally, routings, rows } = loop {
        match gradients(trainee, settings, at_once, items) {
            Err(_) if at_once > 1 => at_once = at_once.div_ceil(2),
            outcome => break outcome?,
        }
    };
    let scalar_head = items.uses_scalar_head();
    let missing = trainee.gradients.missing(&trainee.model.layout, scalar_head);
    assert!(missing.is_empty() || items.is_empty(), "no gradient was written for {missing:?}");

    trainee.kernels.enter(Activity::Update);
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
        tokens: items.tokens() as u64,
        rows,
        unique_rows: items.unique_rows() as u64,
        useful_flops: match skipped {
            true => 0.0,
            false => 3.0 * items.forward_flops(&trainee.model.config),
        },
        pack_seconds: 0.0,
        seconds: began.elapsed().as_secs_f64(),
        micro_batch: examples_of(items, at_once),
        memory_high_water: trainee.kernels.arena().high_water(),
        skipped,
        policy_version: 0,
        routing: layer_routing(&routings),
        accuracy: scalar_head.then(|| tally.ordered as f64 / items.len().max(1) as f64),
        grpo: match items {
            Items::Rollouts(rollouts) => Some(tally.grpo(rollouts)),
            _ => None,
        },
    })
}

/// What the micro-batches of a step add up to.
#[derive(Default)]
struct Summed {
    tally: Tally,
    /// By micro-batch and layer.
    routings: Vec<Vec<Routing>>,
    /// Token rows that went through the model.
    rows: u64,
}

/// Atoms that go through the model at once if the budget allows: those of `asked` examples, or if that is 0 as many as
/// hold [`TOKENS_AT_ONCE`] tokens on the average.
fn atoms_at_once(items: &Items<'_>, asked: usize) -> usize {
    let atoms = match asked {
        0 => TOKENS_AT_ONCE * items.len() / items.tokens().max(1),
        asked => asked / items.largest(),
    };
    atoms.clamp(1, items.len().max(1))
}

/// Examples of so many atoms, as a step reports them.
fn examples_of(items: &Items<'_>, atoms: usize) -> usize {
    (atoms * items.largest()).min(items.examples().max(1))
}

/// Examples that a step takes at once if the budget allows; `asked` is [`StepSettings::micro_batch`].
pub fn examples_at_once(items: &Items<'_>, asked: usize) -> usize {
    examples_of(items, atoms_at_once(items, asked))
}

/// Loss and gradients of all atoms, so many at once.
fn gradients(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    at_once: usize,
    items: &Items<'_>,
) -> Result<Summed, OutOfMemory> {
    trainee.gradients.clear(trainee.kernels);
    let mut summed = Summed::default();
    for first in (0..items.len()).step_by(at_once) {
        let range = first..items.len().min(first + at_once);
        backpropagate(trainee, settings, items, range, &mut summed)?;
        failpoint("mid-gradient");
    }
    Ok(summed)
}

/// Forward and backward of one micro-batch.
fn backpropagate(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    items: &Items<'_>,
    range: Range<usize>,
    summed: &mut Summed,
) -> Result<(), OutOfMemory> {
    let (kernels, model, packed) = (trainee.kernels, trainee.model, trainee.packed);
    kernels.enter(Activity::Forward);
    let documents = items.pack(kernels, range.clone())?;
    let mut pass = model.pass(kernels, &documents, packed);
    pass.balance = settings.balance;
    pass.sequences = items.documents();
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
    items.evaluate(range, &mut micro, &mut summed.tally)?;
    kernels.enter(Activity::Backward);
    let routing =
        model.backward(&pass, trainee.params, packed, saved, d_hidden, trainee.gradients)?;
    summed.routings.push(routing);
    summed.rows += hidden.rows() as u64;
    Ok(())
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
