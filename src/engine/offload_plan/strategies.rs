//! Ways to search: the best of all steps, a good one, and one that there always is.

use super::bounds::lower_bound;
use super::search::{Action, Label, Search, State, bit, items, seconds};
use super::{Plan, Problem, Step, Tier, Transfer};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// States that a beam keeps.
const BEAM: usize = 48;

/// The best plan that is found by looking at so many states.
pub(super) fn search(problem: &Problem, effort: usize) -> Plan {
    let mut search = Search::new(problem);
    let mut best: Option<(u64, u64, Plan)> = None;
    let mut left = effort;
    let mut starts = search.starts();
    let is_small = starts.len() <= effort / 64;
    // The most promising first: what they reach bounds the others.
    starts.sort_by_cached_key(|start| {
        search.begin(*start);
        (search.bound(&search.labels[0]), start.device, start.host, start.disk)
    });
    for start in starts.into_iter().take(if is_small { usize::MAX } else { 0 }) {
        search.begin(start);
        let bound = best.as_ref().map(|(time, moved, _)| (*time, *moved));
        if let Some(goal) = search.exact(bound, &mut left) {
            best = Some(search.told(goal));
        }
    }
    let is_optimal = is_small && left > 0;
    if !is_optimal {
        for start in search.likely_starts() {
            search.begin(start);
            let goals = [search.beam(), search.synchronous()];
            for goal in goals.into_iter().flatten() {
                let found = search.told(goal);
                let is_better = |old: &(u64, u64, Plan)| (found.0, found.1) < (old.0, old.1);
                if best.as_ref().is_none_or(is_better) {
                    best = Some(found);
                }
            }
        }
    }
    let (_, _, mut plan) = best.expect("`synchronous` finds a way where nothing is to stay");
    plan.is_optimal = is_optimal;
    plan.least_exposed_seconds = match is_optimal {
        true => plan.exposed_seconds,
        false => lower_bound(problem).min(plan.exposed_seconds),
    };
    plan
}

impl Search<'_> {
    /// The best way to the end from the start, if it is better than `best`.
    fn exact(&mut self, best: Option<(u64, u64)>, left: &mut usize) -> Option<usize> {
        let mut open = BinaryHeap::from([Reverse((self.bound(&self.labels[0]), 0, 0))]);
        let mut known: HashMap<State, Vec<[u64; 4]>> = HashMap::new();
        let mut next = Vec::new();
        while let Some(Reverse((bound, _, number))) = open.pop() {
            if best.is_some_and(|best| bound >= best) || *left == 0 {
                return None;
            }
            *left -= 1;
            if self.is_goal(&self.labels[number].state) {
                return Some(number);
            }
            self.successors(number, &mut next);
            for label in next.drain(..) {
                let bound = self.bound(&label);
                let is_late = best.is_some_and(|best| bound >= best);
                if is_late || !is_new(known.entry(label.state).or_default(), &label) {
                    continue;
                }
                // Of equals the one that is further on.
                open.push(Reverse((bound, usize::MAX - label.state.slot, self.labels.len())));
                self.labels.push(label);
            }
        }
        None
    }

    /// A way to the end that keeps a few of the best states at a time.
    fn beam(&mut self) -> Option<usize> {
        let mut front = vec![0];
        let mut found: Option<((u64, u64), usize)> = None;
        let (mut next, levels) = (Vec::new(), 4 * (self.run.len() + self.problem.items.len()) * 2);
        for _ in 0..levels {
            let mut by_state: HashMap<State, Label> = HashMap::new();
            for number in std::mem::take(&mut front) {
                self.successors(number, &mut next);
                for label in next.drain(..) {
                    let value = |label: &Label| (self.bound(label), Reverse(label.state.slot));
                    let kept = by_state.entry(label.state).or_insert(label);
                    if value(&label) < value(kept) {
                        *kept = label;
                    }
                }
            }
            let mut labels: Vec<((u64, u64), Label)> =
                by_state.into_values().map(|label| (self.bound(&label), label)).collect();
            labels.retain(|(bound, _)| found.as_ref().is_none_or(|(best, _)| bound < best));
            let order = |(bound, label): &((u64, u64), Label)| {
                let State { slot, device, host, disk, .. } = label.state;
                (*bound, Reverse(slot), device, host, disk, label.now, label.flight_end)
            };
            labels.sort_by_key(order);
            labels.truncate(BEAM);
            for (bound, label) in labels {
                self.labels.push(label);
                let number = self.labels.len() - 1;
                if self.is_goal(&label.state) {
                    found = Some((bound, number));
                } else {
                    front.push(number);
                }
            }
            if front.is_empty() {
                break;
            }
        }
        found.map(|(_, number)| number)
    }

    /// A way to the end that moves in gaps alone, and only what must be moved.
    ///
    /// There is one from the first of `likely_starts`, where each phase has room for what it needs (`plan_within` has seen to
    /// that). In the gap before a phase:
    ///
    /// 1. What the phase does not need can leave: it has a copy, or may be written. A copy that rests between steps has its
    ///    room kept, one of what the last phase changes may lie on disk until then.
    /// 2. So what the phase needs fits, in the gap as in the phase, and what is not there has a copy: nothing has left without.
    ///    Nothing that it needs leaves for another (the third rank), so that each item moves twice at most, and the phase begins.
    /// 3. Behind the last phase everything is on the device that the step began with, for that phase needs it; what changed is
    ///    written to where its copy rests; copies elsewhere ended when the last phase changed what they were of.
    ///
    /// Where the search was exhaustive instead, that start or one with fewer copies was among those that it went through.
    fn synchronous(&mut self) -> Option<usize> {
        let mut number = 0;
        let mut next = Vec::new();
        // Every item moves at most twice in a gap.
        for _ in 0..8 * (self.run.len() + 1) * (self.problem.items.len() + 2) {
            let state = self.labels[number].state;
            if self.is_goal(&state) {
                return Some(number);
            }
            self.successors(number, &mut next);
            let wanted = self.needed.get(state.slot.div_ceil(2)).copied().unwrap_or(0);
            let rank = |label: &Label| match label.action {
                Action::Begin(_) | Action::End => Some((0, 0, 0)),
                Action::Wait => Some((1, 0, 0)),
                _ if state.slot % 2 == 1 => None,
                Action::Read(item, leave) if wanted & bit(item) != 0 && leave & wanted == 0 => {
                    Some((2, item, leave))
                }
                Action::Write(item, tier) if wanted & bit(item) == 0 => {
                    let is_kept = self.may_rest(&state, item, tier);
                    is_kept.then_some((3 + u32::from(tier == Tier::Disk), item, 0))
                }
                _ => None,
            };
            let ranked = next.drain(..).filter_map(|label| Some((rank(&label)?, label)));
            let label = ranked.min_by_key(|(rank, _)| *rank)?.1;
            self.labels.push(label);
            number = self.labels.len() - 1;
        }
        None
    }

    /// Whether a copy may lie there: where the step begins with one, or until the item changes later in the step, on the host only
    /// in room that those which rest there between steps do not want.
    fn may_rest(&self, state: &State, item: usize, tier: Tier) -> bool {
        let Search { start, .. } = self;
        let (at_rest, elsewhere) = match tier {
            Tier::Host => (start.host, start.disk),
            _ => (start.disk, start.host),
        };
        let later = &self.changed[state.slot.div_ceil(2).min(self.run.len())..];
        let has_room =
            || self.bytes(start.host | state.host | bit(item)) <= self.problem.host_bytes;
        at_rest & bit(item) != 0
            || elsewhere & bit(item) == 0
                && later.iter().any(|mask| mask & bit(item) != 0)
                && (tier != Tier::Host || has_room())
    }

    /// The plan that ends with this label, with its nanoseconds and bytes.
    fn told(&self, goal: usize) -> (u64, u64, Plan) {
        let mut way = vec![goal];
        while let Some(parent) = self.labels[way[way.len() - 1]].parent {
            way.push(parent);
        }
        way.reverse();
        let phases = self.run.len();
        let mut plan = Plan {
            steps: Vec::new(),
            phases: vec![[0.0; 2]; phases],
            places: Vec::new(),
            peaks: vec![0; phases],
            transfers: Vec::new(),
            seconds: 0.0,
            exposed_seconds: 0.0,
            moved_bytes: self.labels[goal].moved,
            least_exposed_seconds: 0.0,
            is_optimal: false,
        };
        for number in way {
            let label = &self.labels[number];
            let phase = (label.state.slot / 2).min(phases - 1);
            plan.peaks[phase] = plan.peaks[phase].max(self.held(&label.state));
            self.tell(label, phase, &mut plan);
        }
        let end = self.labels[goal].now;
        let computed: u64 = self.run.iter().sum();
        (plan.seconds, plan.exposed_seconds) = (seconds(end), seconds(end - computed));
        (end, plan.moved_bytes, plan)
    }

    fn tell(&self, label: &Label, phase: usize, plan: &mut Plan) {
        let state = &label.state;
        let copy_of = |item| if state.host & bit(item) != 0 { Tier::Host } else { Tier::Disk };
        let moves = |item: usize, to, copy| Transfer {
            item,
            name: self.problem.items[item].name.clone(),
            to,
            copy,
            start: seconds(label.now),
            end: seconds(label.flight_end),
        };
        match label.action {
            Action::Start | Action::Wait => {}
            Action::Begin(leave) => {
                plan.phases[phase] = [label.now, label.run_end].map(seconds);
                let place =
                    |item| if state.device & bit(item) != 0 { Tier::Device } else { copy_of(item) };
                plan.places.push((0..self.problem.items.len()).map(place).collect());
                plan.steps.push(Step::Begin { phase, leave: items(leave).collect() });
            }
            Action::Write(item, tier) => {
                plan.transfers.push(moves(item, tier, tier));
                plan.steps.push(Step::Write { item, tier });
            }
            Action::Read(item, leave) => {
                plan.transfers.push(moves(item, Tier::Device, copy_of(item)));
                plan.steps.push(Step::Read { item, leave: items(leave).collect() });
            }
            Action::End => plan.steps.push(Step::End),
        }
    }
}

/// Enters a label among those of its state, unless another is nowhere behind it.
fn is_new(known: &mut Vec<[u64; 4]>, label: &Label) -> bool {
    let own = [label.now, label.run_end, label.flight_end, label.moved];
    let precedes = |one: &[u64; 4], other: &[u64; 4]| one.iter().zip(other).all(|(a, b)| a <= b);
    if known.iter().any(|other| precedes(other, &own)) {
        return false;
    }
    known.retain(|other| !precedes(&own, other));
    known.push(own);
    true
}
