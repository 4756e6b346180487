//! Team: the ranks of a run, as one of them sees them, and how they train together.

use super::collective::Group;
use super::layout::{Sampling, Training};
use super::link::Link;
use super::local::Local;
use super::mesh::{Mesh, MeshError};
use crate::config::cluster::PipelineSchedule;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
#[derive(Clone)]
pub struct Team {
    /// The ways to the other ranks.
    pub link: Arc<dyn Link>,
    /// Who works with whom in training.
    pub mesh: Mesh,
    /// Order of a stage's passes.
    pub schedule: PipelineSchedule,
    /// Who holds what in sampling and scoring, of the ranks that this one samples and scores with.
    pub sampling: Sampling,
    /// Ranks behind the trainers that only sample, while those train; 0 if the trainers sample.
    pub samplers: usize,
    /// Who of them holds what.
    pub samplers_layout: Sampling,
    /// How long a call may take.
    pub deadline: Duration,
    /// Whether nothing is computed while tokens of experts are under way. Changes no result.
    pub is_serial: bool,
    /// Whether the processors of all ranks multiply integers, as far as the others are known.
    pub has_integers: bool,
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Team of rank {} in {:?}", self.rank(), self.mesh)
    }
}

impl Team {
    /// A run of one process.
    pub fn alone() -> Team {
        Team {
            link: Arc::new(Local::new(1).remove(0)),
            mesh: Mesh::ONE,
            schedule: PipelineSchedule::OneForwardOneBackward,
            sampling: Sampling { ranks: 1, tensor: 1, expert: 1 },
            samplers: 0,
            samplers_layout: Sampling { ranks: 0, tensor: 1, expert: 1 },
            deadline: Duration::from_secs(60),
            is_serial: false,
            has_integers: true,
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.link.rank()
    }

    /// Whether this rank only samples.
    pub fn is_sampler(&self) -> bool {
        self.rank() >= self.mesh.ranks()
    }

    /// The ranks that sample and score together with this one: trainers, or those that only sample.
    pub fn peers(&self) -> Range<usize> {
        let trainers = self.mesh.ranks();
        if self.is_sampler() { trainers..trainers + self.samplers } else { 0..trainers }
    }

    /// The number of this rank among its peers.
    pub fn place(&self) -> usize {
        self.rank() - self.peers().start
    }

    /// Some of the ranks, this one among them, whose calls together may take as long as any.
    pub fn group(&self, ranks: Vec<usize>) -> Group {
        Group::new(self.link.clone(), ranks, self.deadline)
    }

    /// Groups of its peers that have sequences of their own in sampling and scoring.
    pub fn sequence_groups(&self) -> usize {
        self.peers().len() / self.sampling.tensor
    }

    /// The number of this rank's group among them.
    pub fn sequence_group(&self) -> usize {
        self.place() / self.sampling.tensor
    }

    /// Whether this rank hands out what its group has sampled and scored: all ranks of a group have the same.
    pub fn hands_out(&self) -> bool {
        self.sampling.share(self.place()).place == 0
    }

    /// Whether there is no other rank to train, sample or score with.
    pub fn is_alone(&self) -> bool {
        self.peers().len() == 1
    }

    /// Order of a stage's passes; a single stage has nobody to wait for.
    pub fn schedule(&self) -> PipelineSchedule {
        match self.mesh.pipeline() {
            1 => PipelineSchedule::OneForwardOneBackward,
            _ => self.schedule,
        }
    }

    /// Who holds what of a model with so many layers.
    pub fn layout(&self, layers: usize) -> Training {
        match self.schedule() {
            PipelineSchedule::ZeroBubbleV => Training::in_a_v(self.mesh, layers),
            _ => Training::new(self.mesh, layers),
        }
    }

    /// Refuses a schedule that wants more pieces of the stack than there are layers.
    pub fn require_pieces(
        mesh: Mesh,
        schedule: PipelineSchedule,
        layers: usize,
    ) -> Result<(), MeshError> {
        let pipeline = mesh.pipeline();
        match schedule == PipelineSchedule::ZeroBubbleV && pipeline > 1 && 2 * pipeline > layers {
            true => Err(MeshError::Pieces { pipeline, layers }),
            false => Ok(()),
        }
    }
}
