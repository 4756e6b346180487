//! What a profile counts: calls, seconds and costs by activity and operation, and the seconds of each activity.
//!
//! Seconds of an activity are those on the profile's `clock` from its beginning to the next one's, less those that the
//! profile itself took; what no operation took of them is "between operations".

use super::clock::{Clock, ClockKind};
use super::cost::Cost;
use crate::activity::Activity;
use crate::machine::Machine;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// What kernels did since its making, or since it was cleared.
#[derive(Debug)]
pub struct Profile {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    activity: Activity,
    since: f64,
    spans: BTreeMap<Activity, Span>,
    operations: BTreeMap<Key, Count>,
}

/// Activity, place in the list of operations, shape.
type Key = (Activity, usize, [usize; 2]);

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    seconds: f64,
    overhead: f64,
    resting: u64,
}

/// What one operation took in one activity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// Calls.
    pub calls: u64,
    /// Seconds inside of them.
    pub seconds: f64,
    /// The sum of what they cost at least.
    pub cost: Cost,
}

/// What one activity took.
#[derive(Clone, Debug, PartialEq)]
pub struct ActivityProfile {
    /// Which.
    pub activity: Activity,
    /// Seconds of it, the profile's own apart.
    pub seconds: f64,
    /// Seconds that the profile itself took.
    pub overhead_seconds: f64,
    /// Bytes of what rests between calls: everything that the arena held but activations.
    pub resting_bytes: u64,
    /// Operations by name and shape, in the order of the trait.
    pub operations: Vec<(&'static str, Count)>,
}

impl Profile {
    /// A profile of a device with so many threads.
    pub fn new(threads: usize) -> Profile {
        let kind = if threads == 1 { ClockKind::Processor } else { ClockKind::Wall };
        let clock = Clock::new(kind);
        let state = State {
            activity: Activity::Outside,
            since: clock.now(),
            spans: BTreeMap::new(),
            operations: BTreeMap::new(),
        };
        Profile { clock, state: Mutex::new(state) }
    }

    /// Which seconds it counts.
    pub fn clock(&self) -> ClockKind {
        self.clock.kind
    }

    /// Forgets everything; the present activity begins now.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.spans.clear();
        state.operations.clear();
        state.since = self.clock.now();
    }

    /// What was counted so far, by activity; those that never were are left out.
    pub fn activities(&self) -> Vec<ActivityProfile> {
        let mut state = self.lock();
        state.count_time(self.clock.now());
        let of = |activity: Activity| {
            let span = state.spans.get(&activity)?;
            let operations = state.operations.iter().filter(|((found, ..), _)| *found == activity);
            let operations =
                operations.map(|((_, index, _), count)| (super::OPERATIONS[*index], *count));
            Some(ActivityProfile {
                activity,
                seconds: span.seconds - span.overhead,
                overhead_seconds: span.overhead,
                resting_bytes: span.resting,
                operations: operations.collect(),
            })
        };
        Activity::ALL.into_iter().filter_map(of).collect()
    }

    /// Ends the present activity, during which `resting` bytes rested, and begins another.
    pub(super) fn enter(&self, activity: Activity, resting: impl FnOnce() -> u64) {
        let mut state = self.lock();
        if state.activity == activity {
            return;
        }
        state.count_time(self.clock.now());
        let left = state.activity;
        let span = state.spans.entry(left).or_default();
        span.resting = span.resting.max(resting());
        state.activity = activity;
        // What this took is nobody's time.
        state.since = self.clock.now();
    }

    /// The time on its clock.
    pub(super) fn now(&self) -> f64 {
        self.clock.now()
    }

    /// Counts a call that was announced at the first of three times, and ran from the second to the third.
    pub(super) fn add(&self, index: usize, cost: Cost, [announced, began, ended]: [f64; 3]) {
        let seconds = self.clock.between(began, ended);
        let mut state = self.lock();
        let activity = state.activity;
        let count = state.operations.entry((activity, index, cost.shape)).or_default();
        count.calls += 1;
        count.seconds += seconds;
        count.cost = Cost {
            flops: count.cost.flops + cost.flops,
            recomputed: count.cost.recomputed + cost.recomputed,
            resting: count.cost.resting + cost.resting,
            passing: count.cost.passing + cost.passing,
            ..cost
        };
        let span = state.spans.entry(activity).or_default();
        span.overhead += self.clock.now() - announced - seconds;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("counting does not panic")
    }
}

impl State {
    /// Gives the present activity the time up to `now` since it was last given any.
    fn count_time(&mut self, now: f64) {
        let seconds = now - self.since;
        self.since = now;
        self.spans.entry(self.activity).or_default().seconds += seconds;
    }
}

impl ActivityProfile {
    /// Seconds that no operation took.
    pub fn between_seconds(&self) -> f64 {
        self.seconds - self.operations.iter().map(|(_, count)| count.seconds).sum::<f64>()
    }

    /// Seconds that an operation of this activity takes at least on `machine` with all threads: its operations at the
    /// peak of products, or its bytes at the speed of the memory that holds them, whichever takes longer. What rests is
    /// read from the smallest level that holds all of what rests; what passes from the smallest that holds one call's.
    pub fn roof_seconds(&self, count: &Count, machine: &Machine) -> f64 {
        let Count { calls, cost, .. } = count;
        let rates = &machine.all_threads;
        let peak =
            if cost.is_int8 { rates.int8_ops_per_second } else { rates.f32_flops_per_second };
        let of_one_call = cost.passing / (*calls).max(1) as f64;
        let bytes = cost.resting / machine.bandwidth(self.resting_bytes as f64)
            + cost.passing / machine.bandwidth(of_one_call);
        ((cost.flops + cost.recomputed) / peak).max(bytes)
    }
}
