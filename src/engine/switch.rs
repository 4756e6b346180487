//! The switch: from the layout of training to that of sampling (deepseek_v2.md 4.5).
//!
//! Both are parts of one model, and the plan between them is data that every rank makes for itself. What a rank holds in
//! both is copied; the rest goes from rank to rank in buckets, so that nobody ever has more than its two parts and a bucket.
//! Training's weights stay as they are, so that the way back moves nothing. Ranks that only sample get theirs the same way.
//!
//! Invariants:
//!   * no plan moves fewer elements
//!   * all ranks switch weights of one policy version, which every message names

use super::hybrid::HybridEngine;
use super::phase::Phase;
use super::resident::{interrupted, out_of_memory};
use super::utilisation::Switched;
use crate::cluster::layout::{Sampling, Slice};
use crate::cluster::link::Lane;
use crate::cluster::reshard::least;
use crate::cluster::{Group, Moved, Pipe, Plan, Team, Tensor, Timeline};
use crate::config::ModelConfig;
use crate::model::{
    ExpertRanks, Layout, Params, Part, PassError, TensorRanks, Transformer, placement,
};
use anyhow::{Result, bail, ensure};
use rehearsal_kernels::{Kernels, OutOfMemory, Slab, View, ViewMut};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Elements that a rank sends, and receives, at once at most.
pub const BUCKET: usize = 4 << 20;

/// The policy's way to the layout in which it is sampled and scored, as one rank sees it.
pub(super) struct Switch {
    /// The policy's part there.
    pub model: Transformer,
    way: Way,
}

/// A way of weights from one layout to another.
pub(super) struct Way {
    plan: Plan,
    least: usize,
    /// Where each tensor of the whole model lies in what this rank holds, and in what it is to hold, if it is there.
    held: Vec<Lying>,
    wanted: Vec<Lying>,
    /// Ends of the pipes to and from each rank.
    to: Vec<Pipe>,
    from: Vec<Pipe>,
    everybody: Group,
}

/// A rank's part of a model in sampling and scoring, with the ranks that have the rest of it.
pub(super) fn sampled(
    kernels: &dyn Kernels,
    team: &Team,
    config: &ModelConfig,
    value_head: bool,
    timeline: &Arc<Timeline>,
) -> Result<Transformer, OutOfMemory> {
    let Sampling { tensor, expert, .. } = team.sampling;
    let group = |size: usize| {
        let first = team.rank() - team.place() % size;
        team.group((first..first + size).collect())
    };
    let experts = (expert > 1).then(|| {
        let (group, timeline) = (group(expert), timeline.clone());
        Arc::new(ExpertRanks { group, timeline, is_serial: team.is_serial })
    });
    let sharers = (tensor > 1)
        .then(|| Arc::new(TensorRanks { group: group(tensor), timeline: timeline.clone() }));
    let part = Part::in_sampling(config, &team.sampling, team.place());
    Ok(Transformer::of_part(kernels, config, value_head, part, experts)?.sharing(sharers))
}

/// Whether a rank that trains holds something else of the policy when it samples or scores with it.
pub fn switches(team: &Team) -> bool {
    let (mesh, sampling) = (team.mesh, team.sampling);
    mesh.pipeline() > 1 || mesh.expert() != sampling.expert || sampling.tensor > 1
}

impl Switch {
    /// The way of a model with `training` as this rank's part in training; `None` if all ranks hold the same in both.
    pub fn new(
        kernels: &dyn Kernels,
        team: &Team,
        config: &ModelConfig,
        training: &Layout,
        timeline: &Arc<Timeline>,
    ) -> Result<Option<Switch>, OutOfMemory> {
        let (mesh, sampling) = (team.mesh, team.sampling);
        if !switches(team) {
            return Ok(None);
        }
        let value_head = training.has_value_head;
        let model = sampled(kernels, team, config, value_head, timeline)?;
        let tensors = placement::of_model(config, value_head);
        let layout = team.layout(config.num_hidden_layers);
        let ranks = 0..mesh.ranks();
        let held = ranks.clone().map(|rank| layout.weights(rank, &tensors)).collect();
        let wanted = ranks.map(|rank| sampling.weights(rank, &tensors)).collect();
        let way = Way::new(team, &tensors, held, wanted, Some(training), Some(&model.layout));
        Ok(Some(Switch { model, way }))
    }
}

impl Way {
    /// From trainers to the ranks that only sample; `own` is what this rank holds of the policy.
    pub fn to_samplers(team: &Team, config: &ModelConfig, own: &Layout) -> Way {
        let tensors = placement::of_model(config, own.has_value_head);
        let (layout, trainers) = (team.layout(config.num_hidden_layers), team.mesh.ranks());
        let ranks = 0..trainers + team.samplers;
        let held = |rank: usize| match rank < trainers {
            true => layout.weights(rank, &tensors),
            false => Vec::new(),
        };
        let wanted = |rank: usize| match rank < trainers {
            true => Vec::new(),
            false => team.samplers_layout.weights(rank - trainers, &tensors),
        };
        let (held, wanted) = (ranks.clone().map(held).collect(), ranks.map(wanted).collect());
        let [from, to] = if team.is_sampler() { [None, Some(own)] } else { [Some(own), None] };
        Way::new(team, &tensors, held, wanted, from, to)
    }

    /// From what each rank holds to what each wants; `from` and `to` are this rank's parts in the two.
    fn new(
        team: &Team,
        tensors: &[Tensor],
        held: Vec<Vec<Slice>>,
        wanted: Vec<Vec<Slice>>,
        from: Option<&Layout>,
        to: Option<&Layout>,
    ) -> Way {
        let ranks = 0..held.len();
        let plan = Plan::new(tensors, &held, &wanted, BUCKET);
        let pipe = |other| Pipe::new(team.link.clone(), other, Lane::Switch, team.deadline);
        let lying = |part: Option<&Layout>| {
            let mut all = vec![Lying { index: usize::MAX, first_row: 0 }; tensors.len()];
            let specs = part.into_iter().flat_map(|part| part.specs.iter().enumerate());
            specs.for_each(|(index, spec)| {
                all[spec.number] = Lying { index, first_row: spec.first_row };
            });
            all
        };
        Way {
            plan: plan.expect("training holds every tensor somewhere"),
            least: least(&held, &wanted),
            held: lying(from),
            wanted: lying(to),
            to: ranks.clone().map(pipe).collect(),
            from: ranks.clone().map(pipe).collect(),
            everybody: team.group(ranks.collect()),
        }
    }

    /// Carries out the plan: what this rank holds lies in `from`, what it is to hold goes to `to`.
    pub fn run(
        &self,
        kernels: &dyn Kernels,
        version: u64,
        from: Option<&Slab>,
        to: Option<&mut Slab>,
    ) -> Result<Switched, PassError> {
        let (began, spent, width) = (Instant::now(), processor_seconds(), kernels.float().size());
        let from = from.map(|slab| Side { slab, places: &self.held });
        let to = to.map(|slab| SideMut { slab, places: &self.wanted });
        let [sent_bytes, received_bytes] = self.execute(kernels, &self.plan, version, from, to)?;
        Ok(Switched {
            moved_bytes: (self.plan.sent() * width) as u64,
            least_bytes: (self.least * width) as u64,
            sent_bytes,
            received_bytes,
            seconds: began.elapsed().as_secs_f64(),
            cpu_seconds: processor_seconds() - spent,
        })
    }

    /// Returns the bytes that this rank sent and received.
    fn execute(
        &self,
        kernels: &dyn Kernels,
        plan: &Plan,
        version: u64,
        from: Option<Side<'_>>,
        mut to: Option<SideMut<'_>>,
    ) -> Result<[u64; 2], PassError> {
        const HELD: &str = "the plan knows who holds what";
        let (own, width) = (self.everybody.own(), kernels.float().size());
        for (_, part) in plan.kept.iter().filter(|(rank, _)| *rank == own) {
            let (from, to) = (from.as_ref().expect(HELD), to.as_mut().expect(HELD));
            let (rows, cols) = (from.rows(part), part.cols.clone());
            let into = (to.rows(part), part.cols.clone());
            kernels.copy(
                &from.tensor(part).block(rows, cols),
                &mut to.tensor(part).block_mut(into.0, into.1),
            );
        }
        let mut bytes_of = [0, 0];
        for (number, round) in plan.rounds.iter().enumerate() {
            let name = |moved: &Moved| {
                format!("weights of policy version {version}, tensor {}", moved.part.tensor)
            };
            for moved in round.iter().filter(|moved| moved.from == own) {
                let (part, from) = (&moved.part, from.as_ref().expect(HELD));
                let held = from.tensor(part);
                let bytes = kernels.download_bytes(&held.block(from.rows(part), part.cols.clone()));
                bytes_of[0] += bytes.len() as u64;
                self.to[moved.to].send(&name(moved), width, bytes)?;
            }
            for moved in round.iter().filter(|moved| moved.to == own) {
                let (part, elements) = (&moved.part, moved.part.elements());
                let bytes = self.from[moved.from].receive(&name(moved), elements, width)?;
                bytes_of[1] += bytes.len() as u64;
                let to = to.as_mut().expect(HELD);
                let rows = to.rows(part);
                let mut wanted = to.tensor(part);
                kernels.upload_bytes(&bytes, &mut wanted.block_mut(rows, part.cols.clone()));
            }
            // Nobody runs ahead of who has not taken its bucket yet.
            self.everybody.barrier(&format!("bucket {number} of the switch"))?;
        }
        Ok(bytes_of)
    }
}

/// Seconds of a processor that the device's own thread has had: it sends, receives and lays out what was received.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Where a tensor of the whole model lies in a part of it.
#[derive(Clone, Copy)]
struct Lying {
    /// Its index there.
    index: usize,
    /// The first of its rows that is there.
    first_row: usize,
}

impl Lying {
    /// The rows of a piece of it, there.
    fn rows(&self, part: &Slice) -> Range<usize> {
        part.rows.start - self.first_row..part.rows.end - self.first_row
    }
}

/// What a rank holds, and where in it each tensor of the whole model is.
struct Side<'a> {
    slab: &'a Slab,
    places: &'a [Lying],
}

/// What a rank is to hold.
struct SideMut<'a> {
    slab: &'a mut Slab,
    places: &'a [Lying],
}

impl Side<'_> {
    fn tensor(&self, part: &Slice) -> View<'_> {
        self.slab.tensor(self.places[part.tensor].index)
    }

    fn rows(&self, part: &Slice) -> Range<usize> {
        self.places[part.tensor].rows(part)
    }
}

impl SideMut<'_> {
    fn tensor(&mut self, part: &Slice) -> ViewMut<'_> {
        self.slab.tensor_mut(self.places[part.tensor].index)
    }

    fn rows(&self, part: &Slice) -> Range<usize> {
        self.places[part.tensor].rows(part)
    }
}

impl HybridEngine {
    /// The policy's weights in the layout of sampling, if that is another than the one of training.
    pub(super) fn switched(&mut self) -> Result<Option<Params>> {
        let Some(switch) = &self.switch else { return Ok(None) };
        let kernels = self.kernels.as_ref();
        let policy = self.policy.as_mut().expect("a policy has its switch");
        let (held, _) = policy.take(kernels)?;
        let mut wanted = Params::new(kernels, switch.model.layout.clone(), "policy in sampling")
            .map_err(out_of_memory)?;
        let (from, to) = (Some(&held.slab), Some(&mut wanted.slab));
        let switched = switch.way.run(kernels, self.policy_version, from, to);
        policy.weights.put(held.slab);
        let switched = switched.map_err(interrupted)?;
        self.chores.switched(switched);
        Ok(Some(wanted))
    }

    /// Trainers give the policy of this version to the ranks that only sample. All of both take part, between their jobs.
    pub fn hand_over(&mut self, version: u64) -> Result<Switched> {
        // A scored policy lends its weights to the scoring.
        self.unload_scored()?;
        if !self.setup.team.is_sampler() {
            self.conductor.hand_over();
        }
        let Some(way) = &self.to_samplers else {
            bail!("no rank of this run only samples (cluster.samplers)")
        };
        let (kernels, is_sampler) = (self.kernels.as_ref(), self.setup.team.is_sampler());
        let Some(policy) = self.policy.as_mut() else { bail!("no policy is loaded") };
        ensure!(
            is_sampler || self.policy_version == version,
            "the policy is version {} and is to be handed over as {version}",
            self.policy_version
        );
        if !is_sampler {
            let (own, _) = policy.take(kernels)?;
            let switched = way.run(kernels, version, Some(&own.slab), None);
            policy.weights.put(own.slab);
            return switched.map_err(interrupted);
        }
        let mut own = policy.take_to_change(kernels)?;
        let switched = way.run(kernels, version, None, Some(&mut own.slab));
        policy.weights.put_changed(own.slab);
        let switched = switched.map_err(interrupted)?;
        self.policy_version = version;
        if self.phase == Phase::Generate {
            self.pack_for_sampling(self.working.sampling)?;
        }
        Ok(switched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::mesh::{Load, Mesh};
    use crate::cluster::{Link, Local};
    use crate::config::cluster::PipelineSchedule;
    use crate::config::load_model;
    use crate::model::weight_bytes::{rope_bytes, weight_bytes};
    use crate::train::ranks::part_of;
    use rehearsal_kernels::{Arena, CpuKernels};
    use std::path::Path;
    use std::thread;
    use std::time::Duration;

    /// Hash of each tensor of a part, by its number in the whole model.
    fn hashes(kernels: &dyn Kernels, params: &Params) -> Vec<(usize, blake3::Hash)> {
        let specs = params.layout.specs.iter().enumerate();
        let hash = |index| blake3::hash(&kernels.download_bytes(&params.slab.tensor(index)));
        specs.map(|(index, spec)| (spec.number, hash(index))).collect()
    }

    fn there_and_back(team: &Team, config: &ModelConfig) -> Option<Switched> {
        let kernels = CpuKernels::new(1, Arena::new(None));
        let timeline = Arc::new(Timeline::since(Instant::now()));
        let whole = Transformer::new(&kernels, config, false).unwrap();
        let mut all = Params::new(&kernels, whole.layout.clone(), "all").unwrap();
        all.initialize(&kernels, 7, 1.0);
        let layout = Arc::new(Layout::of_part(config, false, part_of(team, config)));
        let mut held = Params::new(&kernels, layout.clone(), "held").unwrap();
        held.initialize(&kernels, 7, 1.0);
        let switch = Switch::new(&kernels, team, config, &layout, &timeline).unwrap()?;
        let mut wanted = Params::new(&kernels, switch.model.layout.clone(), "wanted").unwrap();
        let (from, to) = (Some(&held.slab), Some(&mut wanted.slab));
        let switched = switch.way.run(&kernels, 3, from, to).unwrap();
        assert_eq!(switched.moved_bytes, switched.least_bytes);
        for (index, spec) in wanted.layout.specs.iter().enumerate() {
            let rows = spec.first_row..spec.first_row + spec.rows;
            let from = kernels.download_bytes(&all.slab.tensor(spec.number).rows_of(rows));
            let to = kernels.download_bytes(&wanted.slab.tensor(index));
            assert_eq!(blake3::hash(&to), blake3::hash(&from), "{}", spec.name);
        }
        // And back, into memory that knows nothing of what it held.
        let tensors = placement::of_model(config, false);
        let ranks = 0..team.mesh.ranks();
        let training = team.layout(config.num_hidden_layers);
        let from: Vec<_> = ranks.clone().map(|r| team.sampling.weights(r, &tensors)).collect();
        let to: Vec<_> = ranks.map(|r| training.weights(r, &tensors)).collect();
        let plan = Plan::new(&tensors, &from, &to, 1000).unwrap();
        let mut back = Params::new(&kernels, layout.clone(), "back").unwrap();
        let from = Side { slab: &wanted.slab, places: &switch.way.wanted };
        let into = SideMut { slab: &mut back.slab, places: &switch.way.held };
        switch.way.execute(&kernels, &plan, 3, Some(from), Some(into)).unwrap();
        assert_eq!(hashes(&kernels, &back), hashes(&kernels, &held));
        Some(switched)
    }

    #[test]
    fn weights_are_bit_for_bit_the_same_there_and_back_and_no_byte_more_than_needed_moves() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        let config = load_model(&path).unwrap();
        let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
        for (sizes, [tensor, expert]) in [
            ([2, 2, 2], [1, 1]),
            ([2, 2, 2], [1, 4]),
            ([4, 1, 4], [1, 2]),
            ([1, 2, 1], [1, 2]),
            ([2, 1, 2], [1, 2]),
            ([2, 1, 1], [2, 1]),
            ([2, 2, 2], [2, 4]),
        ] {
            let mesh = Mesh::new(sizes, sizes[0] * sizes[1], load).unwrap();
            let sampling = Sampling { ranks: mesh.ranks(), tensor, expert };
            let results: Vec<Option<Switched>> = thread::scope(|scope| {
                let start = |link: Local| {
                    let link: Arc<dyn Link> = Arc::new(link);
                    let (schedule, config) = (PipelineSchedule::ZeroBubbleH1, &config);
                    let deadline = Duration::from_secs(20);
                    let team = Team { link, mesh, schedule, sampling, deadline, ..Team::alone() };
                    scope.spawn(move || there_and_back(&team, config))
                };
                let threads: Vec<_> = Local::new(mesh.ranks()).into_iter().map(start).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            // Without stages, and with as many ranks for the experts, nothing has to be done.
            let moves = sizes[1] > 1 || sizes[2] != expert;
            let switches = moves || tensor > 1;
            assert!(
                results.iter().all(|switched| switched.is_some() == switches),
                "{sizes:?} {expert}"
            );
            let sum = |of: fn(&Switched) -> u64| results.iter().flatten().map(of).sum::<u64>();
            let moved = results[0].map_or(0, |switched| switched.moved_bytes);
            assert_eq!([sum(|s| s.sent_bytes), sum(|s| s.received_bytes)], [moved; 2]);
            assert!(moved > 0 || !moves);
        }
    }

    #[test]
    fn a_switch_takes_no_more_of_a_rank_than_its_two_parts() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        let config = load_model(&path).unwrap();
        let load = Load { layers: config.num_hidden_layers, experts: config.n_routed_experts };
        let whole = weight_bytes(&Layout::new(&config, false));
        let switched = |team: &Team| {
            let layout = Arc::new(Layout::of_part(&config, false, part_of(team, &config)));
            let part = Part::in_sampling(&config, &team.sampling, team.place());
            let parts =
                weight_bytes(&layout) + weight_bytes(&Layout::of_part(&config, false, part));
            assert!(parts < 2 * whole, "the model is nowhere whole twice");
            let declared = parts + rope_bytes(&config);
            let kernels = CpuKernels::new(1, Arena::new(Some(declared)));
            let held = Params::new(&kernels, layout.clone(), "held").unwrap();
            let timeline = Arc::new(Timeline::since(Instant::now()));
            let switch = Switch::new(&kernels, team, &config, &layout, &timeline).unwrap().unwrap();
            let mut wanted = Params::new(&kernels, switch.model.layout.clone(), "wanted").unwrap();
            let (from, to) = (Some(&held.slab), Some(&mut wanted.slab));
            switch.way.run(&kernels, 3, from, to).unwrap();
            assert_eq!(kernels.arena().most_used(), declared, "what it declared and no byte more");
            // What is under way beside the arena.
            assert!(switch.way.plan.widest() <= BUCKET);
        };
        for (sizes, expert) in [([2, 2, 2], 4), ([4, 1, 4], 2), ([1, 2, 1], 2)] {
            let mesh = Mesh::new(sizes, sizes[0] * sizes[1], load).unwrap();
            let sampling = Sampling { ranks: mesh.ranks(), tensor: 1, expert };
            thread::scope(|scope| {
                for link in Local::new(mesh.ranks()) {
                    let link: Arc<dyn Link> = Arc::new(link);
                    let deadline = Duration::from_secs(20);
                    let team = Team { link, mesh, sampling, deadline, ..Team::alone() };
                    scope.spawn(|| {
                        let team = team;
                        switched(&team)
                    });
                }
            });
        }
    }
}
