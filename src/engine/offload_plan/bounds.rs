//! What no plan can do without: the smallest budget, and seconds that are exposed in any case.

use super::{Item, Problem};

/// The phase that needs most on the device, and how much: its working memory and the items that it needs.
pub fn least_device_bytes(problem: &Problem) -> (usize, u64) {
    let needs = (0..problem.phases.len()).map(|phase| (phase, problem.least_in(phase)));
    needs.rev().max_by_key(|(_, bytes)| *bytes).expect("a step has a phase")
}

/// Seconds that are exposed whatever the plan: the larger of two bounds.
///
/// What does not fit beside one phase and is needed in the next is read in the gap between them. And what cannot be on
/// the device in some phase is read at least once a step, over a channel that has no more time than the step.
pub fn lower_bound(problem: &Problem) -> f64 {
    let count = problem.phases.len();
    let read = problem.host.read.max(problem.disk.read);
    let in_gaps = (0..count).map(|phase| {
        let before = (phase + count - 1) % count;
        let room = problem.device_bytes - problem.least_in(before);
        let new = |item: &&Item| item.needed[phase] && !item.needed[before];
        let new: u64 = problem.items.iter().filter(new).map(|item| item.bytes).sum();
        new.saturating_sub(room) as f64 / read
    });
    let all: u64 =
        problem.items.iter().filter(|item| item.needed.contains(&true)).map(|i| i.bytes).sum();
    let away = problem.phases.iter();
    let away = away.map(|phase| (all + phase.working_bytes).saturating_sub(problem.device_bytes));
    let computed: f64 = problem.phases.iter().map(|phase| phase.seconds).sum();
    let busy = away.max().unwrap_or(0) as f64 / read - computed;
    // A phase alone has a gap before it and nothing to read there.
    let gaps = if count > 1 { in_gaps.sum() } else { 0.0 };
    busy.max(gaps).max(0.0)
}

impl Problem {
    /// Bytes that a phase needs on the device.
    pub(super) fn least_in(&self, phase: usize) -> u64 {
        let needed = self.items.iter().filter(|item| item.needed[phase]);
        self.phases[phase].working_bytes + needed.map(|item| item.bytes).sum::<u64>()
    }
}
