//! Ranks: what a rank needs of the others to train one model.

use super::zero::Zero;
use crate::cluster::link::Lane;
use crate::cluster::{Group, Pipe, Team, Timeline};
use crate::config::ModelConfig;
use crate::config::cluster::PipelineSchedule;
use crate::model::{ExpertRanks, Layout, Part};
use std::sync::Arc;
use std::time::Instant;

/// See the module.
pub struct Ranks {
    /// The team.
    pub team: Team,
    /// All ranks.
    pub world: Group,
    /// Who answers for which gradients and moments.
    pub zero: Zero,
    /// To and from the places of the stack above and below each piece of this stage.
    pub(super) pipes: Vec<PiecePipes>,
    /// When this rank did what in its last step.
    pub timeline: Arc<Timeline>,
}

/// The ends of a piece's pipes; `None` where the neighbour is this rank, or where there is none.
#[derive(Default)]
pub(super) struct PiecePipes {
    pub from_below: Option<Pipe>,
    pub to_above: Option<Pipe>,
    pub from_above: Option<Pipe>,
    pub to_below: Option<Pipe>,
}

impl Ranks {
    /// For a rank that holds `part` of a model. All ranks of a team make theirs at the same time.
    pub fn new(team: &Team, config: &ModelConfig, part: &Layout, timeline: Arc<Timeline>) -> Ranks {
        Ranks {
            world: team.group((0..team.mesh.ranks()).collect()),
            zero: Zero::new(team, config, part),
            pipes: pipes(team),
            team: team.clone(),
            timeline,
        }
    }

    /// A run of one process.
    pub fn alone(config: &ModelConfig, layout: &Layout) -> Ranks {
        Ranks::new(&Team::alone(), config, layout, Arc::new(Timeline::since(Instant::now())))
    }

    /// The stage of the pipeline.
    pub fn stage(&self) -> usize {
        self.team.mesh.place(self.team.rank()).stage
    }

    /// The number among the data ranks of a stage.
    pub fn data(&self) -> usize {
        self.team.mesh.place(self.team.rank()).data
    }

    /// Order of a stage's passes.
    pub fn schedule(&self) -> PipelineSchedule {
        self.team.schedule()
    }
}

/// What a rank holds of a model in training.
pub fn part_of(team: &Team, config: &ModelConfig) -> Part {
    Part::in_training(config, &team.layout(config.num_hidden_layers), team.rank())
}

/// The ranks that share a rank's experts in training; `None` if it has them all.
pub fn experts_of(team: &Team, timeline: &Arc<Timeline>) -> Option<Arc<ExpertRanks>> {
    let ranks = team.mesh.expert_group(team.rank());
    (ranks.len() > 1).then(|| {
        let group = team.group(ranks);
        Arc::new(ExpertRanks { group, timeline: timeline.clone(), is_serial: team.is_serial })
    })
}

fn pipes(team: &Team) -> Vec<PiecePipes> {
    let (mesh, stages) = (team.mesh, team.mesh.pipeline());
    let own = mesh.place(team.rank());
    let schedule = team.schedule();
    let last = schedule.last_place(stages);
    let rank_of = |place: usize| schedule.owner(stages, place).0 * mesh.data() + own.data;
    let pipe = |other: usize, lane: Lane| {
        let is_other = other != team.rank();
        is_other.then(|| Pipe::new(team.link.clone(), other, lane, team.deadline))
    };
    let of_piece = |chunk: usize| {
        let place = schedule.place(stages, own.stage, chunk);
        let mut pipes = PiecePipes::default();
        if place > 0 {
            pipes.from_below = pipe(rank_of(place - 1), Lane::Up(place as u32));
            pipes.to_below = pipe(rank_of(place - 1), Lane::Down(place as u32 - 1));
        }
        if place < last {
            pipes.to_above = pipe(rank_of(place + 1), Lane::Up(place as u32 + 1));
            pipes.from_above = pipe(rank_of(place + 1), Lane::Down(place as u32));
        }
        pipes
    };
    (0..schedule.chunks()).map(of_piece).collect()
}
