//! Stages: the passes of a step's micro-batches through the pieces of this rank's stage, in the order of its schedule.
//!
//! A single stage runs forward and backward of one micro-batch after another. Of several, each follows its list: it takes
//! the residual stream from the rank below and hands it to the one above, and gradients the other way.
//!
//! Invariants:
//!   * micro-batch k of the step is number k / D of data rank k % D: all data ranks have as many, the last ones may be empty
//!   * gradients of a rank are added in order of its micro-batches

use super::objective::{Micro, Tally};
use super::pipeline::{Entry, Kind, Pass as Step, Schedule};
use super::step::{StepSettings, Trainee};
use super::{Items, Ranks};
use crate::cluster::{Broken, Doing, Pipe, Team, Work, made};
use crate::config::failpoint::failpoint;
use crate::model::moe::Routing;
use crate::model::pass::{floats, indices};
use crate::model::transformer::{Pending, Saved};
use crate::model::{Capacity, Documents, Pass, PassError, Transformer};
use rehearsal_kernels::{Activity, Buffer, Kernels, OutOfMemory};
use std::ops::Range;

/// What goes up between stages, and what comes down.
const UP: &str = "residual stream";
const DOWN: &str = "gradient of the residual stream";

/// What the micro-batches of this rank add up to.
#[derive(Default)]
pub(super) struct Summed {
    pub tally: Tally,
    /// By micro-batch, then by piece: what the router of each MoE layer did.
    pub routings: Vec<Vec<Vec<Routing>>>,
    /// Token rows that went through the uppermost layer here.
    pub rows: u64,
}

/// A micro-batch between its passes.
struct Flight {
    range: Range<usize>,
    documents: Documents,
    pieces: Vec<InPiece>,
}

/// What a piece keeps of a micro-batch.
#[derive(Default)]
struct InPiece {
    /// From the piece below, where that is this rank's too.
    x: Option<Buffer>,
    /// From the piece above, likewise.
    dy: Option<Buffer>,
    saved: Option<Saved>,
    /// The residual stream below the heads.
    hidden: Option<Buffer>,
    pending: Option<Pending>,
}

/// The step on this rank.
struct Stages<'a, 't> {
    trainee: &'a mut Trainee<'t>,
    settings: &'a StepSettings<'a>,
    items: &'a Items<'a>,
    schedule: &'a Schedule,
    flights: Vec<Option<Flight>>,
    summed: Summed,
}

/// The micro-batches of a data rank: ranges of the step's atoms, `at_once` in each.
pub(super) fn micro_batches(atoms: usize, at_once: usize, ranks: &Ranks) -> Vec<Range<usize>> {
    let data = ranks.team.mesh.data();
    let each = micro_batches_of(atoms, at_once, &ranks.team);
    let range = |number: usize| {
        let first = ((number * data + ranks.data()) * at_once).min(atoms);
        first..atoms.min(first + at_once)
    };
    (0..each).map(range).collect()
}

/// Micro-batches of each data rank, the last of which may be empty.
pub fn micro_batches_of(atoms: usize, at_once: usize, team: &Team) -> usize {
    let least = team.schedule().least_micro_batches(team.mesh.pipeline());
    atoms.div_ceil(at_once).div_ceil(team.mesh.data()).max(least)
}

/// Loss and gradients of this rank's micro-batches.
pub(super) fn run(
    trainee: &mut Trainee<'_>,
    settings: &StepSettings<'_>,
    items: &Items<'_>,
    at_once: usize,
) -> Result<Summed, PassError> {
    let ranks = trainee.ranks;
    let ranges = micro_batches(items.len(), at_once, ranks);
    let stages = ranks.team.mesh.pipeline();
    let schedule = Schedule::new(ranks.schedule(), stages, ranges.len());
    let schedule = schedule.expect("there are micro-batches enough");
    let mut stages = Stages {
        settings,
        items,
        schedule: &schedule,
        flights: ranges.iter().map(|_| None).collect(),
        summed: Summed {
            routings: ranges.iter().map(|_| vec![Vec::new(); schedule.kind.chunks()]).collect(),
            ..Summed::default()
        },
        trainee,
    };
    for entry in &schedule.stages[ranks.stage()] {
        stages.entry(*entry, &ranges)?;
    }
    Ok(stages.summed)
}

impl Stages<'_, '_> {
    fn entry(&mut self, entry: Entry, ranges: &[Range<usize>]) -> Result<(), PassError> {
        let Entry { pass, micro_batch, chunk } = entry;
        if self.flights[micro_batch].is_none() {
            let range = ranges[micro_batch].clone();
            let documents = self.items.pack(self.trainee.kernels, range.clone())?;
            let pieces = (0..self.schedule.kind.chunks()).map(|_| InPiece::default()).collect();
            self.flights[micro_batch] = Some(Flight { range, documents, pieces });
        }
        let mut flight = self.flights[micro_batch].take().expect("just made");
        match pass {
            Step::Forward => self.forward(&mut flight, micro_batch, chunk)?,
            Step::BackwardInput => self.backward_input(&mut flight, micro_batch, chunk)?,
            Step::BackwardWeight => self.backward_weight(&mut flight, micro_batch, chunk)?,
        }
        // A micro-batch is over with the weight gradients of the lowest piece here.
        if pass != Step::BackwardWeight || chunk != 0 {
            self.flights[micro_batch] = Some(flight);
        } else {
            failpoint("mid-gradient");
        }
        Ok(())
    }

    fn forward(
        &mut self,
        flight: &mut Flight,
        number: usize,
        chunk: usize,
    ) -> Result<(), PassError> {
        let Trainee { kernels, model, ranks, packed, .. } = *self.trainee;
        let (pipes, rows) = (&ranks.pipes[chunk], flight.documents.tokens.rows());
        let x = match (&pipes.from_below, flight.pieces[chunk].x.take()) {
            (Some(pipe), _) => Some(self.receive(pipe, &name(UP, number), rows)?),
            (None, handed) => handed,
        };
        kernels.enter(Activity::Forward);
        let since = ranks.timeline.now();
        let pass = self.pass(kernels, model, flight)?;
        let (y, saved) = model.forward(&pass, self.trainee.params, packed, chunk, x)?;
        drop(pass);
        flight.pieces[chunk].saved = Some(saved);
        ranks.timeline.add(Doing::Forward(number as u32, chunk as u32), since);
        if let Some(pipe) = &pipes.to_above {
            return Ok(self.send(pipe, &name(UP, number), &y)?);
        }
        let place = self.schedule.place(ranks.stage(), chunk);
        if place == self.schedule.last() {
            self.summed.rows += rows as u64;
            flight.pieces[chunk].hidden = Some(y);
        } else {
            flight.pieces[self.schedule.owner(place + 1).1].x = Some(y);
        }
        Ok(())
    }

    fn backward_input(
        &mut self,
        flight: &mut Flight,
        number: usize,
        chunk: usize,
    ) -> Result<(), PassError> {
        let Trainee { kernels, model, ranks, packed, .. } = *self.trainee;
        let (pipes, rows) = (&ranks.pipes[chunk], flight.documents.tokens.rows());
        let received = match &pipes.from_above {
            Some(pipe) => Some(self.receive(pipe, &name(DOWN, number), rows)?),
            None => flight.pieces[chunk].dy.take(),
        };
        let since = ranks.timeline.now();
        let dy = match (flight.pieces[chunk].hidden.take(), received) {
            (Some(hidden), _) => self.objective(flight, &hidden)?,
            (None, received) => received.expect("the piece above is this rank's"),
        };
        kernels.enter(Activity::Backward);
        let saved = flight.pieces[chunk].saved.take().expect("its forward pass came before");
        let pass = self.pass(kernels, model, flight)?;
        let Trainee { params, gradients, .. } = &mut *self.trainee;
        let dx = if self.schedule.kind == Kind::OneForwardOneBackward {
            let (dx, routing) =
                model.backward(&pass, params, packed, chunk, saved, dy, gradients)?;
            self.summed.routings[number][chunk] = routing;
            dx
        } else {
            let (dx, pending) = model.backward_input(&pass, params, packed, chunk, saved, dy)?;
            drop(pass);
            flight.pieces[chunk].pending = Some(pending);
            dx
        };
        ranks.timeline.add(Doing::BackwardInput(number as u32, chunk as u32), since);
        match (dx, &pipes.to_below) {
            (Some(dx), Some(pipe)) => self.send(pipe, &name(DOWN, number), &dx)?,
            (Some(dx), None) => {
                let place = self.schedule.place(ranks.stage(), chunk);
                flight.pieces[self.schedule.owner(place - 1).1].dy = Some(dx);
            }
            (None, _) => {}
        }
        Ok(())
    }

    fn backward_weight(
        &mut self,
        flight: &mut Flight,
        number: usize,
        chunk: usize,
    ) -> Result<(), PassError> {
        let Trainee { kernels, model, ranks, packed, .. } = *self.trainee;
        let since = ranks.timeline.now();
        // Where both are one pass the weights have theirs already.
        if let Some(pending) = flight.pieces[chunk].pending.take() {
            let pass = self.pass(kernels, model, flight)?;
            self.summed.routings[number][chunk] =
                model.backward_weight(&pass, packed, chunk, pending, self.trainee.gradients);
        }
        ranks.timeline.add(Doing::BackwardWeight(number as u32, chunk as u32), since);
        Ok(())
    }

    /// Adds the objective of a micro-batch and the gradients of the heads; returns that of the residual stream.
    fn objective(&mut self, flight: &Flight, hidden: &Buffer) -> Result<Buffer, PassError> {
        let Trainee { kernels, model, packed, .. } = *self.trainee;
        let pass = self.pass(kernels, model, flight)?;
        let mut d_hidden = pass.floats(hidden.rows(), hidden.cols())?;
        kernels.fill(&mut d_hidden, 0.0);
        if !flight.range.is_empty() {
            let mut micro = Micro {
                pass: &pass,
                params: self.trainee.params,
                heads: packed.heads(),
                hidden,
                d_hidden: &mut d_hidden,
                gradients: self.trainee.gradients,
            };
            self.items.evaluate(flight.range.clone(), &mut micro, &mut self.summed.tally)?;
            made(Work::Backward);
        }
        Ok(d_hidden)
    }

    fn pass<'f>(
        &self,
        kernels: &'f dyn Kernels,
        model: &'f Transformer,
        flight: &'f Flight,
    ) -> Result<Pass<'f>, OutOfMemory> {
        let mut pass = model.pass(kernels, &flight.documents, self.trainee.packed);
        pass.balance = self.settings.balance;
        pass.sequences = self.items.documents();
        pass.recompute = self.settings.recompute;
        if let Some(dropping) = self.settings.dropping {
            let protected = dropping.protected[flight.range.clone()].iter();
            let protected: Vec<u32> = protected.map(|is| u32::from(*is)).collect();
            let protected = indices(kernels, &protected)?;
            pass.capacity = Some(Capacity { factor: dropping.capacity_factor, protected });
        }
        Ok(pass)
    }

    fn send(&self, pipe: &Pipe, name: &str, x: &Buffer) -> Result<(), Broken> {
        let kernels = self.trainee.kernels;
        pipe.send(name, kernels.float().size(), kernels.download_bytes(x))
    }

    fn receive(&self, pipe: &Pipe, name: &str, rows: usize) -> Result<Buffer, PassError> {
        let (kernels, width) = (self.trainee.kernels, self.trainee.model.config.hidden_size);
        let mut x = floats(kernels, rows, width)?;
        let bytes = pipe.receive(name, rows * width, kernels.float().size())?;
        kernels.upload_bytes(&bytes, &mut x);
        Ok(x)
    }
}

fn name(what: &str, micro_batch: usize) -> String {
    format!("{what} of micro-batch {micro_batch}")
}
