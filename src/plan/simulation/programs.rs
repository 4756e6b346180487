//! What each rank does in a step: entries of the real schedule with their messages, exchanges among experts, sums of
//! gradients.
//!
//! Line r is rank r's computation. Ranks of an expert group go through their passes together, because tokens travel
//! between them in each; what travels while shared experts are computed takes no time of its own.

use super::engine::{Act, Channel, Links, Program, What};
use crate::cluster::mesh::Mesh;
use crate::plan::cluster::load::Passes;
use crate::train::pipeline::{Entry, Pass, Schedule};

/// A step of training through a pipeline.
pub struct Pipeline<'a> {
    /// Order of passes.
    pub schedule: &'a Schedule,
    /// Ranks.
    pub mesh: Mesh,
    /// A token's passes through each piece of each stage.
    pub passes: Vec<Vec<Passes>>,
    /// Tokens of a data rank's micro-batch.
    pub tokens: &'a dyn Fn(usize, usize) -> f64,
    /// Bytes of a token between pieces.
    pub boundary: f64,
    /// What joins ranks.
    pub links: Links,
}

/// Seconds of a stage's end of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct End {
    /// Sums of gradients over data ranks.
    pub reduce: f64,
    /// The optimizer.
    pub update: f64,
    /// Weights that come back from who updated them.
    pub gather: f64,
}

impl Program {
    /// Lines of so many ranks, one each.
    pub fn new(ranks: usize) -> Program {
        Program { ranks: (0..ranks).collect(), lines: vec![Vec::new(); ranks], groups: Vec::new() }
    }

    /// A group that will meet.
    pub fn group(&mut self, lines: Vec<usize>) -> usize {
        self.groups.push(lines);
        self.groups.len() - 1
    }
}

impl Pipeline<'_> {
    /// Adds all passes to the lines of all ranks.
    pub fn passes(&self, program: &mut Program) {
        let groups = self.expert_groups(program);
        for (rank, group) in groups.into_iter().enumerate() {
            let stage = self.mesh.place(rank).stage;
            for entry in &self.schedule.stages[stage] {
                self.entry(program, rank, *entry, group);
            }
        }
    }

    /// Adds forward passes alone, all micro-batches through one piece of a stage and then through the next.
    pub fn forward(&self, program: &mut Program) {
        let groups = self.expert_groups(program);
        for (rank, group) in groups.into_iter().enumerate() {
            for chunk in 0..self.schedule.kind.chunks() {
                for micro_batch in 0..self.schedule.micro_batches {
                    let entry = Entry { pass: Pass::Forward, micro_batch, chunk };
                    self.entry(program, rank, entry, group);
                }
            }
        }
    }

    /// Adds the end of a step: sums, optimizer, weights.
    pub fn end(&self, program: &mut Program, ends: &[End]) {
        for (stage, end) in ends.iter().enumerate() {
            let lines = self.mesh.data_group(stage * self.mesh.data());
            let group = program.group(lines.clone());
            let End { reduce, update, gather } = *end;
            for line in lines {
                let meet = |seconds| Act::Meet { group, seconds, what: What::Reduce };
                let update = Act::Run { seconds: update, what: What::Update };
                program.lines[line].extend([meet(reduce), update, meet(gather)]);
            }
        }
    }

    /// The group of each rank, for each rank; one line alone meets nobody.
    fn expert_groups(&self, program: &mut Program) -> Vec<Option<usize>> {
        let mut groups = vec![None; self.mesh.ranks()];
        if self.mesh.expert() == 1 {
            return groups;
        }
        for first in (0..self.mesh.ranks()).step_by(self.mesh.expert()) {
            let members = self.mesh.expert_group(first);
            let group = program.group(members.clone());
            members.iter().for_each(|rank| groups[*rank] = Some(group));
        }
        groups
    }

    fn entry(&self, program: &mut Program, rank: usize, entry: Entry, group: Option<usize>) {
        let place = self.mesh.place(rank);
        let (stage, data) = (place.stage, place.data);
        let rank_of = |stage: usize| stage * self.mesh.data() + data;
        let tokens = (self.tokens)(data, entry.micro_batch);
        let passes = &self.passes[stage][entry.chunk];
        let line = &mut program.lines[rank];
        // 1. What comes from neighbours.
        for (from, other) in self.schedule.waits_for(stage, entry) {
            if from != stage || other.chunk != entry.chunk {
                let channel = channel(entry.pass, entry.chunk);
                line.push(Act::Receive { from: rank_of(from), channel });
            }
        }
        // 2. The pass, and what its exchanges take beyond the shared experts.
        let (rate, latency) = match group {
            Some(_) => self.links.spread(&self.mesh.expert_group(rank)),
            None => (f64::INFINITY, 0.0),
        };
        let (times, exposed) = passes.times(tokens, rate, latency);
        let what = match entry.pass {
            Pass::Forward => What::Forward(entry.micro_batch),
            Pass::BackwardInput => What::BackwardInput(entry.micro_batch),
            Pass::BackwardWeight => What::BackwardWeight(entry.micro_batch),
        };
        line.push(Act::Run { seconds: times.of(entry.pass), what });
        if let Some(group) = group
            && entry.pass != Pass::BackwardWeight
            && passes.exchanges > 0
        {
            line.push(Act::Meet { group, seconds: exposed, what: What::Exchange });
        }
        // 3. What goes to them.
        if let Some((to, pass, chunk)) = self.next(stage, entry) {
            let bytes = tokens * self.boundary;
            line.push(Act::Send { to: rank_of(to), channel: channel(pass, chunk), bytes });
        }
    }

    /// Stage and piece that wait for an entry, and their pass.
    fn next(&self, stage: usize, entry: Entry) -> Option<(usize, Pass, usize)> {
        let place = self.schedule.place(stage, entry.chunk);
        let next = match entry.pass {
            Pass::Forward => (place < self.schedule.last()).then(|| place + 1),
            _ => place.checked_sub(1),
        }?;
        let pass = if entry.pass == Pass::Forward { Pass::Forward } else { Pass::BackwardInput };
        let (to, chunk) = self.schedule.owner(next);
        // Whether it is this entry that the other waits for: gradients go on after one pass of the two.
        let other = Entry { pass, micro_batch: entry.micro_batch, chunk };
        self.schedule.waits_for(to, other).contains(&(stage, entry)).then_some((to, pass, chunk))
    }
}

fn channel(pass: Pass, chunk: usize) -> Channel {
    match pass {
        Pass::Forward => Channel::Activations(chunk),
        _ => Channel::Gradients(chunk),
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::{Outcome, simulate};
    use super::*;
    use crate::cluster::mesh::Load;
    use crate::train::pipeline::{Kind, Times};

    const KINDS: [Kind; 4] =
        [Kind::OneForwardOneBackward, Kind::ZeroBubbleH1, Kind::ZeroBubbleH2, Kind::ZeroBubbleV];

    /// Uneven passes of the pieces of stages.
    fn uneven(stages: usize, chunks: usize) -> Vec<Vec<Passes>> {
        let of = |stage: usize, chunk: usize| Passes {
            forward: 1.0 + (stage * 7 + chunk * 3) as f64 % 5.0 / 8.0,
            backward_input: 1.5 + (stage * 5 + chunk) as f64 % 3.0 / 4.0,
            backward_weight: 0.5 + (stage + chunk) as f64 % 2.0,
            ..Passes::default()
        };
        (0..stages).map(|stage| (0..chunks).map(|chunk| of(stage, chunk)).collect()).collect()
    }

    fn simulated(
        schedule: &Schedule,
        data: usize,
        passes: &[Vec<Passes>],
        boundary: f64,
        links: Links,
    ) -> Outcome {
        let stages = schedule.stages.len();
        let load = Load { layers: 64, experts: 0 };
        let mesh = Mesh::new([data, stages, 1], data * stages, load).unwrap();
        let tokens = |_, _| 1.0;
        let passes = passes.to_vec();
        let pipeline = Pipeline { schedule, mesh, passes, tokens: &tokens, boundary, links };
        let mut program = Program::new(mesh.ranks());
        pipeline.passes(&mut program);
        simulate(&program, &links).unwrap()
    }

    #[test]
    fn where_messages_cost_nothing_a_pipeline_runs_as_its_schedule_says_to_the_bit() {
        for kind in KINDS {
            for stages in [1, 2, 3, 8, 16] {
                let schedule = Schedule::new(kind, stages, 2 * stages + 3).unwrap();
                let passes = uneven(stages, kind.chunks());
                let outcome = simulated(&schedule, 2, &passes, 0.0, Links::FREE);
                let times =
                    |stage: usize, chunk: usize| passes[stage][chunk].times(1.0, 1.0, 0.0).0;
                let timeline = schedule.simulate_uneven(times).unwrap();
                for stage in 0..stages {
                    for data in 0..2 {
                        let spans = &outcome.spans[2 * stage + data];
                        let found: Vec<_> = spans.iter().map(|s| (s.start, s.end)).collect();
                        let ran = timeline.stages[stage].iter().map(|ran| (ran.start, ran.end));
                        assert_eq!(found, ran.collect::<Vec<_>>(), "{kind:?} {stages} {stage}");
                    }
                }
            }
        }
    }

    #[test]
    fn even_passes_without_messages_idle_as_the_formulas_say() {
        let even =
            Passes { forward: 2.0, backward_input: 3.0, backward_weight: 2.0, ..Passes::default() };
        let times = Times { forward: 2.0, backward_input: 3.0, backward_weight: 2.0 };
        for kind in &KINDS[..3] {
            let schedule = Schedule::new(*kind, 8, 24).unwrap();
            let outcome = simulated(&schedule, 1, &vec![vec![even]; 8], 0.0, Links::FREE);
            let idle = |spans: &Vec<super::super::engine::Span>| {
                spans.last().unwrap().end - spans[0].start - 24.0 * 7.0
            };
            let most = outcome.spans.iter().map(idle).fold(0.0, f64::max);
            assert!((most - kind.bubble(8, times)).abs() < 1e-9, "{kind:?}: {most}");
        }
    }

    #[test]
    fn every_message_is_received_and_none_is_lost_or_doubled() {
        let links = Links {
            node: 8,
            node_rate: 160.0,
            node_latency: 0.01,
            network_rate: 50.0,
            network_latency: 0.02,
        };
        for kind in KINDS {
            let (stages, data, micro_batches) = (4, 3, 9);
            let schedule = Schedule::new(kind, stages, micro_batches).unwrap();
            let passes = uneven(stages, kind.chunks());
            let outcome = simulated(&schedule, data, &passes, 5.0, links);
            let sum = |of: &Vec<[f64; 2]>| of.iter().flatten().sum::<f64>();
            // The V turns back inside its last stage: that takes no link.
            let hops = 2 * (stages * kind.chunks() - 1) - 2 * (kind.chunks() - 1);
            let expected = (hops * data * micro_batches) as f64 * 5.0;
            assert_eq!((sum(&outcome.sent), sum(&outcome.received)), (expected, expected));
            assert_eq!(outcome, simulated(&schedule, data, &passes, 5.0, links), "the same again");
            let free = simulated(&schedule, data, &passes, 0.0, Links::FREE);
            assert!(outcome.seconds > free.seconds, "{kind:?}");
        }
    }
}
