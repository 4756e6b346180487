//! States of a device and its channel, what may follow each, and what no step through one falls below.
//!
//! Nothing begins but at an event (a phase begins or ends, a transfer ends), for whatever begins
//! later could begin at the event before it; and items leave when their room is wanted, no sooner.

use super::{Problem, Tier};
use std::cmp::Reverse;

/// Items that may leave for one another in every combination; more leave in order of their next use.
const COMBINED: u32 = 6;

/// Where everything is. The slot is twice the phase in the gap before it, one more while it computes, and twice the number
/// of phases at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) slot: usize,
    pub(super) device: u32,
    pub(super) host: u32,
    pub(super) disk: u32,
    pub(super) flight: Option<Flight>,
}

/// What the channel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Flight {
    Write(usize, Tier),
    Read(usize),
}

/// A state at a time, in nanoseconds since the step began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) state: State,
    pub(super) now: u64,
    /// When the phase ends; now in a gap.
    pub(super) run_end: u64,
    /// When the channel is idle again; now if it is.
    pub(super) flight_end: u64,
    pub(super) moved: u64,
    /// Where it came from, by number.
    pub(super) parent: Option<usize>,
    pub(super) action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Start,
    Begin(u32),
    Write(usize, Tier),
    Read(usize, u32),
    End,
    Wait,
}

/// A problem in whole numbers.
pub(super) struct Search<'a> {
    pub(super) problem: &'a Problem,
    pub(super) run: Vec<u64>,
    pub(super) needed: Vec<u32>,
    pub(super) changed: Vec<u32>,
    /// Items that some phase changes.
    pub(super) changing: u32,
    /// Where items are at the start of the step, and must be at its end.
    pub(super) start: State,
    /// All labels ever made, which tell a plan's way.
    pub(super) labels: Vec<Label>,
}

pub(super) fn bit(item: usize) -> u32 {
    1 << item
}

pub(super) fn items(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |item| mask & bit(*item) != 0)
}

/// All sets of some of these items, from none to all.
pub(super) fn subsets(of: u32) -> impl Iterator<Item = u32> {
    // The bits that are not of the set carry on to its next one.
    let next = move |set: &u32| (*set != of).then(|| set.wrapping_sub(of) & of);
    std::iter::successors(Some(0), next)
}

impl<'a> Search<'a> {
    pub(super) fn new(problem: &'a Problem) -> Search<'a> {
        let mask = |phase: usize, of: fn(&super::Item) -> &Vec<bool>| {
            let set = problem.items.iter().enumerate().filter(|(_, item)| of(item)[phase]);
            set.map(|(index, _)| bit(index)).sum::<u32>()
        };
        let phases = 0..problem.phases.len();
        let changed: Vec<u32> = phases.clone().map(|p| mask(p, |item| &item.changed)).collect();
        Search {
            problem,
            run: problem.phases.iter().map(|phase| nanoseconds(phase.seconds)).collect(),
            needed: phases.map(|p| mask(p, |item| &item.needed)).collect(),
            changing: changed.iter().fold(0, |all, mask| all | mask),
            changed,
            start: State { slot: 0, device: 0, host: 0, disk: 0, flight: None },
            labels: Vec::new(),
        }
    }

    pub(super) fn begin(&mut self, start: State) {
        self.start = start;
        self.labels.clear();
        let action = Action::Start;
        self.labels.push(Label {
            state: start,
            now: 0,
            run_end: 0,
            flight_end: 0,
            moved: 0,
            parent: None,
            action,
        });
    }

    pub(super) fn bytes(&self, mask: u32) -> u64 {
        items(mask).map(|item| self.problem.items[item].bytes).sum()
    }

    pub(super) fn last(&self) -> usize {
        self.run.len() - 1
    }

    /// Ways for an item to be at the start: on the device alone, there with a copy, away.
    fn ways(&self, item: usize) -> Vec<(bool, Option<Tier>)> {
        let needs = |masks: &[u32]| masks.iter().any(|mask| mask & bit(item) != 0);
        if self.changed[self.last()] & bit(item) != 0 {
            return vec![(true, None)];
        }
        let mut tiers = Vec::new();
        let Problem { host, disk, .. } = self.problem;
        if self.problem.host_bytes >= self.problem.items[item].bytes {
            tiers.push(Tier::Host);
        }
        let all: u64 = self.problem.items.iter().map(|item| item.bytes).sum();
        // Where the host has room for everything a slower disk is no use.
        let is_spare =
            self.problem.host_bytes >= all && host.read >= disk.read && host.write >= disk.write;
        if !is_spare {
            tiers.push(Tier::Disk);
        }
        let mut ways = vec![(true, None)];
        if needs(&self.needed) && self.needed.iter().all(|mask| mask & bit(item) != 0) {
            return ways;
        }
        ways.extend(tiers.iter().map(|tier| (true, Some(*tier))));
        if self.needed[self.last()] & bit(item) == 0 {
            ways.extend(tiers.iter().map(|tier| (false, Some(*tier))));
        }
        ways
    }

    /// All states that a step may start and end in.
    pub(super) fn starts(&self) -> Vec<State> {
        let empty = State { slot: 0, device: 0, host: 0, disk: 0, flight: None };
        let mut starts = vec![empty];
        for item in 0..self.problem.items.len() {
            let ways = self.ways(item);
            let with = |start: &State| -> Vec<State> {
                ways.iter()
                    .map(|(on_device, copy)| placed(*start, item, *on_device, *copy))
                    .collect()
            };
            starts =
                starts.iter().flat_map(with).filter(|start| self.fits_at_rest(start)).collect();
            if starts.len() > 4096 {
                break;
            }
        }
        starts
    }

    /// Whether the device holds these items and the host these copies.
    fn fits_at_rest(&self, start: &State) -> bool {
        self.bytes(start.host) <= self.problem.host_bytes
            && self.bytes(start.device) <= self.problem.device_bytes
    }

    /// Starts for large problems: as many items as fit stay for good, the smallest or the largest first, or none.
    pub(super) fn likely_starts(&self) -> Vec<State> {
        let count = self.problem.items.len();
        let mut by_size: Vec<usize> = (0..count).collect();
        by_size.sort_by_key(|item| self.problem.items[*item].bytes);
        let all_but = |order: Vec<usize>| {
            let mut stays = 0;
            for item in order {
                let fits = (0..self.run.len()).all(|phase| {
                    let held = self.bytes(stays | bit(item) | self.needed[phase]);
                    held + self.problem.phases[phase].working_bytes <= self.problem.device_bytes
                });
                stays |= if fits { bit(item) } else { 0 };
            }
            stays
        };
        let mut choices =
            vec![0, all_but(by_size.clone()), all_but(by_size.into_iter().rev().collect())];
        choices.dedup();
        choices.into_iter().map(|stays| self.start_with(stays)).collect()
    }

    /// The start at which `stays` stay for good and everything else is away as far as it can be.
    fn start_with(&self, stays: u32) -> State {
        let mut start = State { slot: 0, device: 0, host: 0, disk: 0, flight: None };
        for item in 0..self.problem.items.len() {
            let tier = match self.bytes(start.host | bit(item)) <= self.problem.host_bytes {
                true => Tier::Host,
                false => Tier::Disk,
            };
            let must_stay = self.changed[self.last()] & bit(item) != 0 || stays & bit(item) != 0;
            let (on_device, copy) = match (must_stay, self.needed[self.last()] & bit(item) != 0) {
                (true, _) => (true, None),
                (false, on_device) => (on_device, Some(tier)),
            };
            start = placed(start, item, on_device, copy);
        }
        start
    }

    /// Whether an item of a lower number is the same in every respect, so that it may go first.
    fn has_earlier_twin(&self, state: &State, item: usize) -> bool {
        let of = &self.problem.items;
        let alike = |other: usize| {
            let same = |mask: u32| (mask & bit(item) != 0) == (mask & bit(other) != 0);
            let (one, two) = (&of[item], &of[other]);
            (one.bytes, &one.needed, &one.changed) == (two.bytes, &two.needed, &two.changed)
                && [state, &self.start]
                    .iter()
                    .all(|s| same(s.device) && same(s.host) && same(s.disk))
        };
        (0..item).any(alike)
    }

    /// Bytes on the device, those that are being read and the phase's working memory included.
    pub(super) fn held(&self, state: &State) -> u64 {
        let reading = match state.flight {
            Some(Flight::Read(item)) => bit(item),
            _ => 0,
        };
        let working = match state.slot % 2 {
            0 => 0,
            _ => self.problem.phases[state.slot / 2].working_bytes,
        };
        self.bytes(state.device | reading) + working
    }

    fn transfer_time(&self, item: usize, tier: Tier, is_read: bool) -> u64 {
        let way = if tier == Tier::Host { &self.problem.host } else { &self.problem.disk };
        let rate = if is_read { way.read } else { way.write };
        nanoseconds(self.problem.items[item].bytes as f64 / rate)
    }

    /// Sets of items, none larger than it must be, that give up so many bytes if `may_leave` do.
    fn leaving(&self, state: &State, may_leave: u32, wanted: u64) -> Vec<u32> {
        if wanted == 0 {
            return vec![0];
        }
        if self.bytes(may_leave) < wanted {
            return Vec::new();
        }
        if may_leave.count_ones() > COMBINED {
            return vec![self.latest_used(state, may_leave, wanted)];
        }
        let is_enough = |set: u32| self.bytes(set) >= wanted;
        let is_least =
            |set: &u32| is_enough(*set) && items(*set).all(|item| !is_enough(*set & !bit(item)));
        subsets(may_leave).filter(is_least).collect()
    }

    /// Those that are needed again last, until they give up enough.
    fn latest_used(&self, state: &State, may_leave: u32, wanted: u64) -> u32 {
        let phases = self.run.len();
        let distance = |item: usize| {
            let next = (0..phases).find(|ahead| {
                self.needed[(state.slot.div_ceil(2) + ahead) % phases] & bit(item) != 0
            });
            next.unwrap_or(phases)
        };
        let mut order: Vec<usize> = items(may_leave).collect();
        order.sort_by_key(|item| (Reverse(distance(*item)), *item));
        let mut set = 0;
        for item in order {
            if self.bytes(set) < wanted {
                set |= bit(item);
            }
        }
        items(set).fold(set, |set, item| {
            if self.bytes(set & !bit(item)) >= wanted { set & !bit(item) } else { set }
        })
    }

    /// Whether a label is the end of a step: as it began, but for items that may leave at once.
    pub(super) fn is_goal(&self, state: &State) -> bool {
        let spare = state.device & !self.start.device;
        state.slot == 2 * self.run.len()
            && state.flight.is_none()
            && (state.host, state.disk) == (self.start.host, self.start.disk)
            && self.start.device & !state.device == 0
            && spare & !(state.host | state.disk) == 0
    }

    /// What may follow.
    pub(super) fn successors(&self, number: usize, out: &mut Vec<Label>) {
        out.clear();
        let label = self.labels[number];
        let state = label.state;
        let next = |state: State, now: u64, action: Action| Label {
            state,
            now,
            run_end: now.max(label.run_end),
            flight_end: if state.flight.is_some() { label.flight_end } else { now },
            moved: label.moved,
            parent: Some(number),
            action,
        };
        let phase = state.slot / 2;
        let (is_run, is_end) = (state.slot % 2 == 1, state.slot == 2 * self.run.len());
        if !is_run && !is_end {
            self.begin_phase(&label, phase, &next, out);
        }
        match state.flight {
            Some(flight) if !is_run || label.flight_end <= label.run_end => {
                out.push(next(landed(state, flight), label.flight_end, Action::Wait));
            }
            None => self.start_transfers(&label, phase, is_run, is_end, &next, out),
            Some(_) => {}
        }
        if is_run && (state.flight.is_none() || label.flight_end > label.run_end) {
            let ended = State { slot: state.slot + 1, ..state };
            out.push(next(ended, label.run_end, Action::End));
        }
    }

    fn begin_phase(
        &self,
        label: &Label,
        phase: usize,
        next: &dyn Fn(State, u64, Action) -> Label,
        out: &mut Vec<Label>,
    ) {
        let state = label.state;
        let writes_what_changes = matches!(state.flight, Some(Flight::Write(item, _)) if self.changed[phase] & bit(item) != 0);
        if self.needed[phase] & !state.device != 0 || writes_what_changes {
            return;
        }
        let begun = State {
            slot: state.slot + 1,
            host: state.host & !self.changed[phase],
            disk: state.disk & !self.changed[phase],
            ..state
        };
        let copies = state.host | state.disk;
        let wanted = self.held(&begun).saturating_sub(self.problem.device_bytes);
        for leave in self.leaving(&state, state.device & copies & !self.needed[phase], wanted) {
            let begun = State { device: begun.device & !leave, ..begun };
            let run_end = label.now + self.run[phase];
            out.push(Label { run_end, ..next(begun, label.now, Action::Begin(leave)) });
        }
    }

    fn start_transfers(
        &self,
        label: &Label,
        phase: usize,
        is_run: bool,
        is_end: bool,
        next: &dyn Fn(State, u64, Action) -> Label,
        out: &mut Vec<Label>,
    ) {
        let (state, now) = (label.state, label.now);
        let copies = state.host | state.disk;
        let changing = if is_run { self.changed[phase] } else { 0 };
        for item in items(state.device & !copies & self.changing & !changing) {
            let never_leaves = self.needed.iter().all(|mask| mask & bit(item) != 0);
            if never_leaves || self.has_earlier_twin(&state, item) {
                continue;
            }
            let has_room = self.bytes(state.host | bit(item)) <= self.problem.host_bytes;
            let tiers = [(Tier::Host, has_room), (Tier::Disk, true)];
            for (tier, _) in tiers.into_iter().filter(|(_, has_room)| *has_room) {
                let flying = State { flight: Some(Flight::Write(item, tier)), ..state };
                let flight_end = now + self.transfer_time(item, tier, false);
                let moved = label.moved + self.problem.items[item].bytes;
                out.push(Label {
                    flight_end,
                    moved,
                    ..next(flying, now, Action::Write(item, tier))
                });
            }
        }
        if is_end {
            return;
        }
        let used = if is_run { self.needed[phase] } else { 0 };
        for item in items(copies & !state.device) {
            if self.has_earlier_twin(&state, item) {
                continue;
            }
            let flying = State { flight: Some(Flight::Read(item)), ..state };
            let wanted = self.held(&flying).saturating_sub(self.problem.device_bytes);
            for leave in self.leaving(&state, state.device & copies & !used, wanted) {
                let tier = if state.host & bit(item) != 0 { Tier::Host } else { Tier::Disk };
                let flying = State { device: flying.device & !leave, ..flying };
                let flight_end = now + self.transfer_time(item, tier, true);
                let moved = label.moved + self.problem.items[item].bytes;
                out.push(Label {
                    flight_end,
                    moved,
                    ..next(flying, now, Action::Read(item, leave))
                });
            }
        }
    }

    /// Seconds and bytes that no step through this label falls below.
    pub(super) fn bound(&self, label: &Label) -> (u64, u64) {
        let state = &label.state;
        let phases = self.run.len();
        let following = state.slot.div_ceil(2);
        let reading = match state.flight {
            Some(Flight::Read(item)) => bit(item),
            _ => 0,
        };
        let here = state.device | reading;
        let mut ready = label.now.max(label.run_end);
        if following < phases {
            let missing = items(self.needed[following] & !here);
            let tier = |item| if state.host & bit(item) != 0 { Tier::Host } else { Tier::Disk };
            let reads: u64 = missing.map(|item| self.transfer_time(item, tier(item), true)).sum();
            let must_land = if self.needed[following] & reading != 0 || reads > 0 {
                label.flight_end
            } else {
                0
            };
            ready = ready.max(must_land + reads);
        }
        let computing: u64 = self.run[following..].iter().sum();
        let wanted =
            self.needed[following..].iter().fold(self.start.device, |all, mask| all | mask);
        (ready + computing, label.moved + self.bytes(wanted & !here) + self.must_go(label, here))
    }

    /// Bytes that must still be moved of what is on the device now and wanted later: where a phase between leaves no room for
    /// it, it is read again, and written before if it has no copy.
    fn must_go(&self, label: &Label, here: u32) -> u64 {
        let (state, phases) = (&label.state, self.run.len());
        let copies = state.host | state.disk;
        let mut wanted_later = self.start.device;
        let mut most = 0;
        for phase in (state.slot.div_ceil(2)..phases).rev() {
            let (needed, stays) = (self.needed[phase], here & wanted_later & !self.needed[phase]);
            let held = self.problem.phases[phase].working_bytes + self.bytes(needed | stays);
            let over = held.saturating_sub(self.problem.device_bytes);
            let clean = self.bytes(stays & copies);
            most = most.max(over + over.saturating_sub(clean));
            wanted_later |= needed;
        }
        most
    }
}

fn placed(mut state: State, item: usize, on_device: bool, copy: Option<Tier>) -> State {
    state.device |= if on_device { bit(item) } else { 0 };
    state.host |= if copy == Some(Tier::Host) { bit(item) } else { 0 };
    state.disk |= if copy == Some(Tier::Disk) { bit(item) } else { 0 };
    state
}

/// The state when the channel has done.
fn landed(state: State, flight: Flight) -> State {
    let state = State { flight: None, ..state };
    match flight {
        Flight::Read(item) => State { device: state.device | bit(item), ..state },
        Flight::Write(item, tier) => placed(state, item, true, Some(tier)),
    }
}

fn nanoseconds(seconds: f64) -> u64 {
    // A rate of zero moves nothing in any time that counts.
    (seconds * 1e9).round().min(1e18) as u64
}

pub(super) fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}
