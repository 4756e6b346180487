//! The train phase of a device: its micro-batches in the order of its schedule, and the update.

use super::items::{Atoms, MicroBatch};
use super::{Device, Extent, Phase};
use crate::model::PackFor;
use crate::model::pass_bytes::{LayerBytes, PassBytes, PassRows};
use crate::model::weight_bytes::{
    gradient_bytes, moment_bytes, packed_bytes_of, scratch_bytes, weight_bytes,
};
use crate::plan::memory::Owners;
use crate::train::pipeline::{Entry, Kind, Pass, Schedule};
use crate::train::stages::micro_batches_of;
use crate::train::zero::BUCKET;
use std::collections::BTreeMap;

/// Micro-batches, for each stage, whose passes are followed; further ones find the same.
const FOLLOWED: usize = 4;

impl Device<'_> {
    pub(super) fn train(&self, extent: Extent) -> Phase {
        let needed = Owners::from([
            ("policy/weights".to_string(), weight_bytes(&self.own)),
            ("policy/moments".to_string(), moment_bytes(self.moments.elements)),
        ]);
        let packed = packed_bytes_of(&self.own, self.model, PackFor::documents(self.form, true));
        let activations = self.passes(extent).max(self.update());
        let working = Owners::from([
            ("policy/packed".to_string(), packed),
            ("policy/gradients".to_string(), gradient_bytes(&self.own)),
            ("policy/activations".to_string(), activations),
        ]);
        Phase { needed, working }
    }

    /// What an update holds beside gradients: sums of other ranks' by runs, or what it changes as it was before.
    fn update(&self) -> u64 {
        let run = self.moments.longest.min(BUCKET);
        let sums = if self.team.mesh.data() > 1 { 2 * scratch_bytes(run) } else { 0 };
        let elements = self.moments.elements;
        let before = match self.team.mesh.pipeline() {
            1 => 0,
            _ => 3 * scratch_bytes(elements).max(moment_bytes(elements) / 2),
        };
        sums.max(before)
    }

    /// Most bytes of a step's passes.
    fn passes(&self, extent: Extent) -> u64 {
        let atoms = Atoms::of(self.config, self.model, &self.stage.kind);
        // Whoever trains alone takes less at once where memory is short.
        let micro_batch = match extent == Extent::Least && self.team.is_alone() {
            true => atoms.times(1),
            false => atoms.micro_batch(self.team),
        };
        let mesh = self.team.mesh;
        let all = micro_batches_of(atoms.count, micro_batch.atoms, self.team);
        let full = atoms.count.div_ceil(micro_batch.atoms).div_ceil(mesh.data());
        let kind = self.team.schedule();
        let least = kind.least_micro_batches(mesh.pipeline()).max(FOLLOWED * mesh.pipeline());
        let schedule = Schedule::new(kind, mesh.pipeline(), all.min(least));
        let Ok(schedule) = schedule else { return 0 };
        let stage = self.place.unwrap_or(0);
        let bytes = self.training_passes();
        let empty = MicroBatch { atoms: 0, rows: PassRows::default(), wanted: 0 };
        let layers = self.team.layout(self.model.num_hidden_layers).layers(stage);
        let sizes = |of: MicroBatch| Sizes {
            documents: bytes.documents(of.rows),
            stream: bytes.stream(of.rows.tokens),
            objective: bytes.objective(of.rows.tokens, of.wanted, atoms.is_scalar),
            pieces: pieces(&bytes, &layers, of.rows),
        };
        let recompute = self.config.engine.recompute;
        let mut walk = Walk {
            schedule: &schedule,
            stage,
            recompute,
            sizes: [sizes(micro_batch), sizes(empty)],
            full,
            held: BTreeMap::new(),
            live: 0,
            most: 0,
        };
        schedule.stages[stage].iter().for_each(|entry| walk.entry(*entry));
        debug_assert_eq!(walk.live, 0, "a step gives back what it takes");
        walk.most
    }
}

fn pieces(
    bytes: &PassBytes<'_>,
    layers: &[std::ops::Range<usize>],
    rows: PassRows,
) -> Vec<Vec<LayerBytes>> {
    let piece = |piece: &std::ops::Range<usize>| {
        piece.clone().map(|layer| bytes.layer(layer, rows)).collect()
    };
    layers.iter().map(piece).collect()
}

/// Bytes of a micro-batch.
struct Sizes {
    documents: u64,
    stream: u64,
    objective: u64,
    pieces: Vec<Vec<LayerBytes>>,
}

/// What a stage holds as its passes go by, as `train::stages` runs them.
struct Walk<'a> {
    schedule: &'a Schedule,
    stage: usize,
    recompute: usize,
    /// Of a micro-batch, and of one without rows.
    sizes: [Sizes; 2],
    /// Micro-batches with rows.
    full: usize,
    held: BTreeMap<(usize, usize, What), u64>,
    live: u64,
    most: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Documents,
    /// The stream, from the piece below or to the heads.
    Stream,
    /// Its gradient, from the piece above.
    Gradient,
    /// What weight gradients wait for.
    Pending,
}

impl Walk<'_> {
    fn entry(&mut self, entry: Entry) {
        let Entry { pass, micro_batch, chunk } = entry;
        let index = usize::from(micro_batch >= self.full);
        if !self.held.contains_key(&(micro_batch, 0, What::Documents)) {
            self.hold(micro_batch, 0, What::Documents, self.sizes[index].documents);
        }
        match pass {
            Pass::Forward => self.forward(index, micro_batch, chunk),
            Pass::BackwardInput => self.backward(index, micro_batch, chunk),
            Pass::BackwardWeight => {
                self.drop(micro_batch, chunk, What::Pending);
                if chunk == 0 {
                    self.drop(micro_batch, 0, What::Documents);
                }
            }
        }
    }

    fn forward(&mut self, index: usize, micro_batch: usize, chunk: usize) {
        let stream = self.sizes[index].stream;
        if self.held.remove(&(micro_batch, chunk, What::Stream)).is_none() {
            self.grow(stream);
        }
        for number in 0..self.sizes[index].pieces[chunk].len() {
            let layer = self.sizes[index].pieces[chunk][number];
            // Of a layer that is computed again its input is kept.
            if number < self.recompute {
                self.grow(stream);
                self.peak(layer.forward);
            } else {
                self.peak(layer.forward);
                self.grow(layer.kept + stream);
            }
        }
        let place = self.schedule.place(self.stage, chunk);
        if place == self.schedule.last() {
            self.held.insert((micro_batch, chunk, What::Stream), stream);
            return;
        }
        let (stage, above) = self.schedule.owner(place + 1);
        match stage == self.stage {
            true => drop(self.held.insert((micro_batch, above, What::Stream), stream)),
            false => self.live -= stream,
        }
    }

    fn backward(&mut self, index: usize, micro_batch: usize, chunk: usize) {
        let Sizes { stream, objective, .. } = self.sizes[index];
        let place = self.schedule.place(self.stage, chunk);
        if place == self.schedule.last() {
            // Without rows there is no loss, and a gradient all the same.
            self.peak(objective.max(stream));
            self.grow(stream);
            self.drop(micro_batch, chunk, What::Stream);
        } else if self.held.remove(&(micro_batch, chunk, What::Gradient)).is_none() {
            self.grow(stream);
        }
        let (mut waiting, at_once) = (0, self.schedule.kind == Kind::OneForwardOneBackward);
        for number in (0..self.sizes[index].pieces[chunk].len()).rev() {
            let layer = self.sizes[index].pieces[chunk][number];
            if number < self.recompute {
                self.peak(layer.forward);
                self.grow(layer.kept);
            }
            self.peak(layer.backward);
            let saved = layer.kept + stream;
            match at_once {
                // What was saved and the gradient above go, the one below comes.
                true => self.live -= saved,
                false => {
                    self.grow(layer.pending + stream);
                    waiting += saved + layer.pending + stream;
                }
            }
        }
        match place {
            0 if at_once => self.live -= stream,
            0 => waiting += stream,
            _ => {
                let (stage, below) = self.schedule.owner(place - 1);
                match stage == self.stage {
                    true => drop(self.held.insert((micro_batch, below, What::Gradient), stream)),
                    false => self.live -= stream,
                }
            }
        }
        self.held.insert((micro_batch, chunk, What::Pending), waiting);
    }

    fn peak(&mut self, bytes: u64) {
        self.most = self.most.max(self.live + bytes);
    }

    fn grow(&mut self, bytes: u64) {
        self.live += bytes;
        self.peak(0);
    }

    fn hold(&mut self, micro_batch: usize, chunk: usize, what: What, bytes: u64) {
        self.held.insert((micro_batch, chunk, what), bytes);
        self.grow(bytes);
    }

    fn drop(&mut self, micro_batch: usize, chunk: usize, what: What) {
        self.live -= self.held.remove(&(micro_batch, chunk, what)).unwrap_or(0);
    }
}
