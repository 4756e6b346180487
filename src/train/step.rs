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
use super::objective::{Items, Tally};
use super::optimizer::Optimizer;
use super::ranks::Ranks;
use super::routing::{balance_loss, layer_routing};
use super::stages;
use crate::cluster::link::Operation;
use crate::cluster::wire::{decode, encode};
use crate::cluster::{Doing, Team};
use crate::config::routing::Balance;
use crate::config::stage::OptimizerConfig;
use crate::model::moe::Routing;
use crate::model::{Gradients, PackedModel, Params, PassError, Transformer};
use rehearsal_kernels::{Activity, Kernels};
use serde::{Deserialize, Serialize};
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
    /// Who else trains it.
    pub ranks: &'a Ranks,
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
    /// Layers of each piece of the stack, from the lowest, whose activations are computed again. Changes no bit.
    pub recompute: usize,
}

/// Runs one step. The caller repacks the weights if `!report.skipped`. All ranks of a team run it with the same settings
/// and items, and all return the same figures but for bytes, seconds and, beyond rank 0, what routers did.
pub fn train_step(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    items: &Items<'_>,
) -> Result<StepReport, PassError> {
    let began = Instant::now();
    let fits = |d: &Dropping| matches!(items, Items::Documents(documents) if documents.len() == d.protected.len());
    assert!(
        settings.dropping.is_none_or(fits),
        "dropping is for documents, and knows each of them"
    );
    let ranks = trainee.ranks;
    ranks.timeline.take();
    let mut at_once = atoms_at_once(items, settings.micro_batch, &ranks.team);
    let summed = loop {
        trainee.gradients.clear(trainee.kernels);
        // What can go through in parts makes nothing leave the device. Ranks of a team would have to do so together.
        let can_part = at_once > 1 && ranks.team.is_alone();
        let modest = trainee.kernels.arena().modest(can_part);
        let attempt = stages::run(trainee, settings, items, at_once);
        drop(modest);
        match attempt {
            Err(PassError::Memory(_)) if can_part => at_once = at_once.div_ceil(2),
            outcome => break outcome?,
        }
    };
    let scalar_head = items.uses_scalar_head();
    if stages::micro_batches(items.len(), at_once, ranks).iter().any(|range| !range.is_empty()) {
        let missing = trainee.gradients.missing(&trainee.model.layout, scalar_head);
        assert!(missing.is_empty(), "no gradient was written for {missing:?}");
    }
    let routings = all_routings(ranks, summed.routings)?;
    let rate = learning_rate(settings.optimizer, settings.step, settings.steps, settings.share);
    let own = Figures { tally: summed.tally, rows: summed.rows, ..Figures::default() };
    let own = Figures { balance_loss: balance_loss(&routings), ..own };
    let Updated { figures, gradient_norm, skipped, was_taken_back } =
        update(trainee, settings, own, rate, scalar_head)?;
    let Figures { tally, balance_loss, rows, .. } = figures;
    // A picture takes one step, and every step's would fill the journal.
    let is_taken_down = !ranks.team.is_alone() && (settings.step + 1).is_power_of_two();
    let own = is_taken_down.then(|| (ranks.team.rank() as u32, ranks.timeline.passes()));
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
        seconds: began.elapsed().as_secs_f64(),
        micro_batch: examples_of(items, at_once),
        memory_high_water: trainee.kernels.arena().high_water(),
        skipped,
        was_taken_back,
        policy_version: 0,
        routing: layer_routing(&routings),
        ran: own.into_iter().collect(),
        exchanged: ranks.timeline.exchanged(),
        accuracy: scalar_head.then(|| tally.ordered as f64 / items.len().max(1) as f64),
        grpo: match items {
            Items::Rollouts(rollouts) => Some(tally.grpo(rollouts)),
            _ => None,
        },
    })
}

/// What ranks tell each other of their part of a step.
#[derive(Default, Serialize, Deserialize)]
struct Figures {
    tally: Tally,
    /// Only rank 0 has it.
    balance_loss: f64,
    rows: u64,
    /// Squares of the gradients that the rank answers for.
    squares: f64,
}

impl Figures {
    /// Adds another rank's.
    fn add(&mut self, other: Figures) {
        self.tally.join(other.tally);
        self.balance_loss += other.balance_loss;
        self.rows += other.rows;
        self.squares += other.squares;
    }

    fn is_finite(&self) -> bool {
        [self.tally.loss, self.balance_loss, self.squares].iter().all(|figure| figure.is_finite())
    }
}

/// What became of the weights.
struct Updated {
    figures: Figures,
    gradient_norm: f64,
    skipped: bool,
    was_taken_back: bool,
}

/// Sums the gradients and updates the weights. Stages of a pipeline do not wait for each other's figures: they update
/// as if nothing had to be clipped, and take it back if something has to be (optimizer post-validation, arXiv 2401.10241).
fn update(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    mut own: Figures,
    rate: f64,
    scalar_head: bool,
) -> Result<Updated, PassError> {
    let Trainee { kernels, ranks, .. } = *trainee;
    let (zero, timeline) = (&ranks.zero, &ranks.timeline);
    kernels.enter(Activity::Update);
    let since = timeline.now();
    zero.reduce(kernels, &mut trainee.gradients.slab)?;
    timeline.add(Doing::Reduce, since);
    own.squares = zero.squares(kernels, &trainee.gradients.slab);
    let bytes = encode(&own);
    let sent = ranks.world.send_to_all("figures", Operation::AllGather, 0, 1, |_| bytes.clone())?;

    let apply = |trainee: &mut Trainee<'_>, scale: f64| {
        let since = timeline.now();
        trainee.optimizer.update(
            kernels,
            settings.optimizer,
            rate,
            scale,
            &zero.own,
            trainee.params,
            trainee.gradients,
            scalar_head,
        );
        timeline.add(Doing::Update, since);
    };
    let before = match ranks.team.mesh.pipeline() > 1 && own.is_finite() {
        true => Some(trainee.optimizer.before(kernels, &zero.own, trainee.params)?),
        false => None,
    };
    if before.is_some() {
        apply(trainee, 1.0);
    }
    let figures = joined(own, sent.take()?);
    let gradient_norm = figures.squares.sqrt();
    let (clip, skipped) = (settings.optimizer.clip, !figures.is_finite());
    let scale = if clip > 0.0 && gradient_norm > clip { clip / gradient_norm } else { 1.0 };
    let was_taken_back = before.is_some() && (skipped || scale != 1.0);
    if let Some(before) = before.as_ref().filter(|_| was_taken_back) {
        trainee.optimizer.take_back(kernels, &zero.own, trainee.params, before);
    }
    if !skipped && (before.is_none() || was_taken_back) {
        apply(trainee, scale);
    }
    if !skipped {
        let since = timeline.now();
        zero.gather(kernels, &mut trainee.params.slab)?;
        timeline.add(Doing::Gather, since);
    }
    Ok(Updated { figures, gradient_norm, skipped, was_taken_back })
}

/// All ranks' figures, added in order of the ranks.
fn joined(own: Figures, others: Vec<Option<Vec<u8>>>) -> Figures {
    let mut own = Some(own);
    let figures = others.into_iter().map(|bytes| match bytes {
        Some(bytes) => decode(&bytes).expect("ranks run the same program"),
        None => own.take().expect("one place is the own one"),
    });
    let add = |mut sum: Figures, other| {
        sum.add(other);
        sum
    };
    figures.reduce(add).expect("there is a rank")
}

/// What all routers did, by micro-batch of the step and by layer; rank 0 has it.
fn all_routings(
    ranks: &Ranks,
    own: Vec<Vec<Vec<Routing>>>,
) -> Result<Vec<Vec<Routing>>, PassError> {
    if ranks.team.is_alone() {
        return Ok(own.into_iter().map(|pieces| pieces.concat()).collect());
    }
    let all = ranks.world.gather("what routers did", 0, encode(&own))?;
    let mut all: Vec<Vec<Vec<Vec<Routing>>>> =
        all.iter().map(|bytes| decode(bytes).expect("ranks run the same program")).collect();
    let (mesh, schedule) = (ranks.team.mesh, ranks.schedule());
    let batches = all.first().map_or(0, Vec::len) * mesh.data();
    let last = schedule.last_place(mesh.pipeline());
    let of_batch = |batch: usize| {
        let (data, number) = (batch % mesh.data(), batch / mesh.data());
        let of_place = |place: usize| {
            let (stage, chunk) = schedule.owner(mesh.pipeline(), place);
            std::mem::take(&mut all[stage * mesh.data() + data][number][chunk])
        };
        (0..=last).flat_map(of_place).collect::<Vec<Routing>>()
    };
    let routings: Vec<Vec<Routing>> = (0..batches).map(of_batch).collect();
    // Micro-batches that only fill up the schedule have no tokens; a step of nothing has one.
    let has_tokens = |routing: &Vec<Routing>| routing.iter().any(|layer| layer.tokens > 0);
    let (full, mut empty): (Vec<_>, Vec<_>) = routings.into_iter().partition(has_tokens);
    empty.truncate(usize::from(full.is_empty()));
    Ok([full, empty].concat())
}

/// Atoms that go through the model at once if the budget allows: those of `asked` examples, or if that is 0 as many as
/// hold [`TOKENS_AT_ONCE`] tokens on the average.
fn atoms_at_once(items: &Items<'_>, asked: usize, team: &Team) -> usize {
    let counts = Counts { atoms: items.len(), tokens: items.tokens(), largest: items.largest() };
    counts.atoms_at_once(asked, team)
}

/// What the examples of a step are, as far as it decides how many go through at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Atoms.
    pub atoms: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Most examples of an atom.
    pub largest: usize,
}

impl Counts {
    /// Atoms that go through the model at once if the budget allows; `asked` is [`StepSettings::micro_batch`].
    pub fn atoms_at_once(&self, asked: usize, team: &Team) -> usize {
        let atoms = match asked {
            0 => TOKENS_AT_ONCE * self.atoms / self.tokens.max(1),
            asked => asked / self.largest,
        };
        atoms.clamp(1, self.most_at_once(team))
    }

    /// Atoms that may go through at once: all data ranks have something to do, and a pipeline has micro-batches to fill it.
    pub fn most_at_once(&self, team: &Team) -> usize {
        let stages = team.mesh.pipeline();
        let least = match stages {
            1 => 1,
            _ => team.schedule().least_micro_batches(stages).max(2 * stages),
        };
        (self.atoms / (team.mesh.data() * least)).max(1)
    }
}

/// Examples of so many atoms, as a step reports them.
fn examples_of(items: &Items<'_>, atoms: usize) -> usize {
    (atoms * items.largest()).min(items.examples().max(1))
}

/// Examples that a step takes at once if the budget allows; `asked` is [`StepSettings::micro_batch`].
pub fn examples_at_once(items: &Items<'_>, asked: usize, team: &Team) -> usize {
    examples_of(items, atoms_at_once(items, asked, team))
}
