//! Pipeline schedules as data: in which order each stage runs the forward, input-gradient and weight-gradient passes of
//! its micro-batches, and what that costs in idle time (deepseek_v2.md 3; zero bubble: arXiv 2401.10241).
//!
//! Knows no tensors. A stage follows its list; what it waits for comes from its neighbours.
//!
//! Invariants (tested for 2 to 16 stages):
//!   * every stage runs each pass of each micro-batch once, a weight-gradient pass after its input-gradient pass
//!   * no two stages wait for each other
//!   * idle time and live activations are those of the formulas in [`Kind`]

use std::collections::{BTreeMap, VecDeque};

/// How a stage orders its passes. Where F, B and W are the times of a micro-batch's passes through a stage, p the stages:
///   * `OneForwardOneBackward`: B and W are one pass. Idle (p - 1)(F + B + W), at most p micro-batches live.
///   * `ZeroBubbleH1`: idle (p - 1)(F + B - W), at most p live.
///   * `ZeroBubbleH2`: idle (p - 1)(F + B - 2W), at most 2p - 1 live; needs that many micro-batches.
///   * `ZeroBubbleV`: two pieces of the stack for each stage, in the form of a V. Idle 0 where F = B = W, at most p live;
///     needs 2p micro-batches.
pub use crate::config::cluster::PipelineSchedule as Kind;

impl Kind {
    /// Pieces of the stack that each stage has.
    pub fn chunks(self) -> usize {
        if self == Kind::ZeroBubbleV { 2 } else { 1 }
    }

    /// The uppermost place of a stack of so many stages.
    pub fn last_place(self, stages: usize) -> usize {
        stages * self.chunks() - 1
    }

    /// Place in the stack of a stage's piece, the lowest 0.
    pub fn place(self, stages: usize, stage: usize, chunk: usize) -> usize {
        if chunk == 0 { stage } else { self.last_place(stages) - stage }
    }

    /// The stage of a place in the stack, and which of its pieces it is.
    pub fn owner(self, stages: usize, place: usize) -> (usize, usize) {
        if place < stages { (place, 0) } else { (self.last_place(stages) - place, 1) }
    }

    /// Micro-batches that it needs to keep its promise.
    pub fn least_micro_batches(self, stages: usize) -> usize {
        match self {
            Kind::OneForwardOneBackward | Kind::ZeroBubbleH1 => 1,
            Kind::ZeroBubbleH2 => 2 * stages - 1,
            Kind::ZeroBubbleV => 2 * stages,
        }
    }

    /// Idle time of a stage between its first pass and its last, where passes take `times`.
    pub fn bubble(self, stages: usize, times: Times) -> f64 {
        let Times { forward, backward_input, backward_weight } = times;
        let both = forward + backward_input;
        let each = match self {
            Kind::OneForwardOneBackward => both + backward_weight,
            Kind::ZeroBubbleH1 => both - backward_weight,
            Kind::ZeroBubbleH2 => both - 2.0 * backward_weight,
            Kind::ZeroBubbleV => 0.0,
        };
        (stages - 1) as f64 * each
    }
}

/// Seconds of the passes of one micro-batch through one piece of a stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// F.
    pub forward: f64,
    /// B.
    pub backward_input: f64,
    /// W.
    pub backward_weight: f64,
}

/// A pass of a micro-batch through a piece of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// Activations go up.
    Forward,
    /// Gradients of activations go down.
    BackwardInput,
    /// Gradients of weights; nobody waits for them.
    BackwardWeight,
}

/// One entry of a stage's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// What runs.
    pub pass: Pass,
    /// Of which micro-batch.
    pub micro_batch: usize,
    /// Through which piece of the stage.
    pub chunk: usize,
}

/// The lists of all stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// How it was made.
    pub kind: Kind,
    /// A list for each stage, the one with the embedding first.
    pub stages: Vec<Vec<Entry>>,
    /// Micro-batches.
    pub micro_batches: usize,
}

/// A schedule that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the schedule {kind:?} of {stages} stages needs {needed} micro-batches of a step and has {micro_batches}; make them \
     smaller, or take fewer stages"
)]
pub struct TooFew {
    kind: Kind,
    stages: usize,
    needed: usize,
    micro_batches: usize,
}

impl Schedule {
    /// The lists for so many stages and micro-batches.
    pub fn new(kind: Kind, stages: usize, micro_batches: usize) -> Result<Schedule, TooFew> {
        let needed = kind.least_micro_batches(stages);
        if micro_batches < needed {
            return Err(TooFew { kind, stages, needed, micro_batches });
        }
        let list = |stage| {
            let list = List::new(micro_batches);
            match kind {
                Kind::OneForwardOneBackward => list.in_a_line(stages - stage, 0),
                Kind::ZeroBubbleH1 => list.in_a_line(stages - stage, stage),
                Kind::ZeroBubbleH2 => list.in_a_line(2 * (stages - stage) - 1, 2 * stage),
                Kind::ZeroBubbleV => list.in_a_v(stages, stage),
            }
        };
        Ok(Schedule { kind, stages: (0..stages).map(list).collect(), micro_batches })
    }

    /// Place in the stack of a stage's piece, the lowest 0.
    pub fn place(&self, stage: usize, chunk: usize) -> usize {
        self.kind.place(self.stages.len(), stage, chunk)
    }

    /// The stage of a place in the stack, and which of its pieces it is.
    pub fn owner(&self, place: usize) -> (usize, usize) {
        self.kind.owner(self.stages.len(), place)
    }

    /// The uppermost place of the stack.
    pub fn last(&self) -> usize {
        self.kind.last_place(self.stages.len())
    }

    /// The entry that `entry` of a stage waits for, and whose: what comes from a neighbour, or from the stage itself.
    pub fn waits_for(&self, stage: usize, entry: Entry) -> Vec<(usize, Entry)> {
        let place = self.place(stage, entry.chunk);
        let of = |pass, place: usize| {
            let (stage, chunk) = self.owner(place);
            (stage, Entry { pass, micro_batch: entry.micro_batch, chunk })
        };
        match entry.pass {
            Pass::Forward if place == 0 => Vec::new(),
            Pass::Forward => vec![of(Pass::Forward, place - 1)],
            Pass::BackwardInput if place == self.last() => vec![of(Pass::Forward, place)],
            Pass::BackwardInput => {
                // One backward pass hands on its gradient when all of it is done.
                let above = match self.kind {
                    Kind::OneForwardOneBackward => Pass::BackwardWeight,
                    _ => Pass::BackwardInput,
                };
                vec![of(Pass::Forward, place), of(above, place + 1)]
            }
            Pass::BackwardWeight => vec![of(Pass::BackwardInput, place)],
        }
    }

    /// When each entry runs, if passes take `times` and messages none; `None` if stages wait for each other.
    pub fn simulate(&self, times: Times) -> Option<Timeline> {
        self.simulate_uneven(|_, _| times)
    }

    /// The same where the pieces of stages differ: `times` of a stage and of its piece.
    pub fn simulate_uneven(&self, times: impl Fn(usize, usize) -> Times) -> Option<Timeline> {
        let mut ends: BTreeMap<(usize, Entry), f64> = BTreeMap::new();
        let mut stages = vec![Vec::new(); self.stages.len()];
        loop {
            let before = ends.len();
            for (stage, list) in self.stages.iter().enumerate() {
                let done: &mut Vec<Ran> = &mut stages[stage];
                while let Some(entry) = list.get(done.len()).copied() {
                    let waited = self.waits_for(stage, entry);
                    let ready = waited.iter().map(|key| ends.get(key).copied());
                    let Some(ready) = ready.collect::<Option<Vec<f64>>>() else { break };
                    let free = done.last().map_or(0.0, |ran| ran.end);
                    let start = ready.into_iter().fold(free, f64::max);
                    let end = start + times(stage, entry.chunk).of(entry.pass);
                    done.push(Ran { entry, start, end });
                    ends.insert((stage, entry), end);
                }
            }
            if ends.len() == self.stages.iter().map(Vec::len).sum::<usize>() {
                return Some(Timeline { stages });
            }
            if ends.len() == before {
                return None;
            }
        }
    }

    /// Micro-batches, whole ones, whose activations a stage holds at most: from the forward to the weight-gradient pass.
    pub fn most_live(&self, stage: usize) -> f64 {
        let (mut live, mut most) = (0usize, 0);
        for entry in &self.stages[stage] {
            match entry.pass {
                Pass::Forward => live += 1,
                Pass::BackwardInput => {}
                Pass::BackwardWeight => live -= 1,
            }
            most = most.max(live);
        }
        most as f64 / self.kind.chunks() as f64
    }
}

impl Times {
    /// Seconds of a pass.
    pub fn of(self, pass: Pass) -> f64 {
        match pass {
            Pass::Forward => self.forward,
            Pass::BackwardInput => self.backward_input,
            Pass::BackwardWeight => self.backward_weight,
        }
    }
}

/// When the entries of each stage's list began and ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// What each stage did, in order.
    pub stages: Vec<Vec<Ran>>,
}

/// An entry that ran.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ran {
    /// The entry.
    pub entry: Entry,
    /// Seconds from the start of the step.
    pub start: f64,
    /// The same of its end.
    pub end: f64,
}

impl Timeline {
    /// The longest idle time of a stage between its first entry and its last. What lies before and after belongs to the
    /// step before and the next one where the optimizer waits for nobody (post-validation).
    pub fn bubble(&self) -> f64 {
        let idle = |ran: &Vec<Ran>| {
            let busy: f64 = ran.iter().map(|ran| ran.end - ran.start).sum();
            let span = |(first, last): (&Ran, &Ran)| last.end - first.start;
            ran.first().zip(ran.last()).map_or(0.0, span) - busy
        };
        self.stages.iter().map(idle).fold(0.0, f64::max)
    }
}

/// A stage's list in the making.
struct List {
    entries: Vec<Entry>,
    micro_batches: usize,
    /// Forward and input-gradient passes so far, of each piece.
    forward: [usize; 2],
    backward: [usize; 2],
    /// Input-gradient passes whose weight gradients are still to come, in order.
    waiting: VecDeque<(usize, usize)>,
}

impl List {
    fn new(micro_batches: usize) -> List {
        let (entries, waiting) = (Vec::new(), VecDeque::new());
        List { entries, micro_batches, forward: [0; 2], backward: [0; 2], waiting }
    }

    fn forward(&mut self, chunk: usize) {
        if self.forward[chunk] < self.micro_batches {
            let micro_batch = self.forward[chunk];
            self.entries.push(Entry { pass: Pass::Forward, micro_batch, chunk });
            self.forward[chunk] += 1;
        }
    }

    fn backward_input(&mut self, chunk: usize) {
        let micro_batch = self.backward[chunk];
        self.entries.push(Entry { pass: Pass::BackwardInput, micro_batch, chunk });
        self.backward[chunk] += 1;
        self.waiting.push_back((micro_batch, chunk));
    }

    fn backward_weight(&mut self) {
        if let Some((micro_batch, chunk)) = self.waiting.pop_front() {
            self.entries.push(Entry { pass: Pass::BackwardWeight, micro_batch, chunk });
        }
    }

    fn rest(mut self) -> Vec<Entry> {
        while !self.waiting.is_empty() {
            self.backward_weight();
        }
        self.entries
    }

    /// `first` forward passes, then backward and forward in turns, weight gradients `late` micro-batches behind.
    fn in_a_line(mut self, first: usize, late: usize) -> Vec<Entry> {
        (0..first).for_each(|_| self.forward(0));
        for _ in 0..self.micro_batches {
            self.backward_input(0);
            if self.waiting.len() > late {
                self.backward_weight();
            }
            self.forward(0);
        }
        self.rest()
    }

    fn in_a_v(mut self, stages: usize, stage: usize) -> Vec<Entry> {
        let above = stages - 1 - stage;
        // 1. Fill the way down and back.
        (0..2 * above).for_each(|_| self.forward(0));
        for _ in 0..=stage {
            self.forward(0);
            self.forward(1);
        }
        // 2. The first gradients come back through the upper piece.
        for _ in 0..above {
            self.backward_input(1);
            self.backward_weight();
            self.forward(1);
        }
        // 3. All six passes of a micro-batch in turn, then without new ones.
        let both = |list: &mut List| {
            for chunk in [1, 0] {
                list.backward_input(chunk);
                list.backward_weight();
            }
        };
        for _ in 0..self.micro_batches + stage + 1 - 2 * stages {
            both(&mut self);
            self.forward(0);
            self.forward(1);
        }
        for _ in 0..above {
            both(&mut self);
            self.forward(1);
        }
        // 4. The gradients of the last ones; weights wait.
        for _ in 0..=stage {
            self.backward_input(1);
            self.backward_input(0);
        }
        for _ in 0..above {
            self.backward_weight();
            self.backward_input(0);
        }
        self.rest()
    }
}

#[cfg(test)]
mod tests {
    use super::Kind::*;
    use super::*;
    use std::collections::BTreeSet;

    const EVEN: Times = Times { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };

    fn each(check: impl Fn(&Schedule, usize, usize)) {
        for kind in [OneForwardOneBackward, ZeroBubbleH1, ZeroBubbleH2, ZeroBubbleV] {
            for stages in 2..=16 {
                for micro_batches in [2 * stages, 2 * stages + 1, 3 * stages + 2] {
                    check(
                        &Schedule::new(kind, stages, micro_batches).unwrap(),
                        stages,
                        micro_batches,
                    );
                }
            }
        }
    }

    #[test]
    fn every_pass_runs_once_and_weights_after_inputs() {
        each(|schedule, stages, micro_batches| {
            assert_eq!(schedule.stages.len(), stages);
            for list in &schedule.stages {
                let distinct: BTreeSet<_> = list.iter().collect();
                assert_eq!(distinct.len(), list.len(), "{:?}", schedule.kind);
                assert_eq!(list.len(), 3 * micro_batches * schedule.kind.chunks());
                for (place, entry) in list.iter().enumerate() {
                    let input = Entry { pass: Pass::BackwardInput, ..*entry };
                    assert!(
                        entry.pass != Pass::BackwardWeight || list[..place].contains(&input),
                        "{:?}: {entry:?}",
                        schedule.kind
                    );
                }
            }
        });
    }

    #[test]
    fn bubbles_are_those_of_the_formulas() {
        let uneven = [
            EVEN,
            Times { forward: 2.0, backward_input: 3.0, backward_weight: 2.0 },
            Times { forward: 3.0, backward_input: 3.0, backward_weight: 1.0 },
        ];
        each(|schedule, stages, micro_batches| {
            // The V promises nothing for uneven passes.
            let times = if schedule.kind == ZeroBubbleV { &uneven[..1] } else { &uneven };
            for times in times {
                let timeline =
                    schedule.simulate(*times).expect("no two stages wait for each other");
                let (found, formula) = (timeline.bubble(), schedule.kind.bubble(stages, *times));
                assert!(
                    (found - formula).abs() < 1e-9,
                    "{:?} {stages} {times:?}: {found}",
                    schedule.kind
                );
            }
            // As shares of the busy time 3 m: (p - 1) / m, (p - 1) / 3m, 0 and 0.
            let share = schedule.simulate(EVEN).unwrap().bubble() / (3 * micro_batches) as f64;
            let p = (stages - 1) as f64 / micro_batches as f64;
            let expected = match schedule.kind {
                OneForwardOneBackward => p,
                ZeroBubbleH1 => p / 3.0,
                ZeroBubbleH2 | ZeroBubbleV => 0.0,
            };
            assert!((share - expected).abs() < 1e-12, "{:?}", schedule.kind);
        });
    }

    #[test]
    fn activations_are_held_by_no_more_micro_batches_than_promised() {
        each(|schedule, stages, _| {
            let most = (0..stages).map(|stage| schedule.most_live(stage)).fold(0.0, f64::max);
            let promised = if schedule.kind == ZeroBubbleH2 { 2 * stages - 1 } else { stages };
            assert_eq!(most, promised as f64, "{:?} {stages}", schedule.kind);
        });
    }

    #[test]
    fn too_few_micro_batches_are_refused_and_one_stage_idles_never() {
        let text = Schedule::new(ZeroBubbleV, 4, 7).unwrap_err().to_string();
        assert!(
            text.contains("4 stages needs 8 micro-batches") && text.contains("has 7"),
            "{text}"
        );
        assert!(
            Schedule::new(ZeroBubbleH2, 4, 6).is_err() && Schedule::new(ZeroBubbleH2, 4, 7).is_ok()
        );
        for kind in [OneForwardOneBackward, ZeroBubbleH1, ZeroBubbleH2, ZeroBubbleV] {
            assert_eq!(Schedule::new(kind, 1, 3).unwrap().simulate(EVEN).unwrap().bubble(), 0.0);
        }
        // Fewer micro-batches than stages run too.
        assert!(Schedule::new(ZeroBubbleH1, 4, 2).unwrap().simulate(EVEN).is_some());
    }

    #[test]
    fn stages_that_wait_for_each_other_are_found() {
        let mut schedule = Schedule::new(ZeroBubbleH1, 2, 2).unwrap();
        schedule.stages[1].reverse();
        assert_eq!(schedule.simulate(EVEN), None);
    }
}
