//! What a device computed and what moved beside it, as intervals of time since a step began.
//!
//! Invariants:
//!   * waiting is the device's: whatever it waits for, those seconds are exposed
//!   * a transfer is told when it has ended, by whichever thread made it

use super::offload_plan::Tier;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// Intervals that a timeline keeps: a step has some tens.
const INTERVALS: usize = 512;

/// A phase at work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// The phase.
    pub phase: String,
    /// Start and end, in seconds since the step began.
    pub at: [f64; 2],
}

/// An item on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// Its name, as in the ledger.
    pub item: String,
    /// Where it goes to.
    pub to: Tier,
    /// Where its copy is.
    pub copy: Tier,
    /// Its size.
    pub bytes: u64,
    /// Start and end, in seconds since the step began.
    pub at: [f64; 2],
}

/// A step, or as much of it as has passed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Seconds since the step began.
    pub seconds: f64,
    /// Phases, in order.
    pub computed: Vec<Span>,
    /// When the device waited for a transfer, in order.
    pub waited: Vec<[f64; 2]>,
    /// Transfers, in order of their ends.
    pub moved: Vec<Moved>,
}

impl Timeline {
    /// Seconds in which the device waited.
    pub fn exposed_seconds(&self) -> f64 {
        self.waited.iter().map(|[start, end]| end - start).fold(0.0, |sum, one| sum + one)
    }

    /// The share of the step in which the device waited.
    pub fn exposed_share(&self) -> f64 {
        if self.seconds > 0.0 { self.exposed_seconds() / self.seconds } else { 0.0 }
    }

    /// The share of the transfers' seconds in which the device computed; absent if nothing moved.
    pub fn overlap_share(&self) -> Option<f64> {
        let seconds: f64 = self.moved.iter().map(|moved| moved.at[1] - moved.at[0]).sum();
        let beside = |moved: &Moved| {
            let computed: f64 = self.computed.iter().map(|span| common(moved.at, span.at)).sum();
            let waited = self.waited.iter().map(|wait| {
                let part = [moved.at[0].max(wait[0]), moved.at[1].min(wait[1])];
                self.computed.iter().map(|span| common(part, span.at)).sum::<f64>()
            });
            computed - waited.sum::<f64>()
        };
        (seconds > 0.0).then(|| self.moved.iter().map(beside).sum::<f64>() / seconds)
    }

    /// Bytes that were read, and that were written.
    pub fn bytes(&self) -> [u64; 2] {
        let sum = |is_read| {
            let of = self.moved.iter().filter(|moved| (moved.to == Tier::Device) == is_read);
            of.map(|moved| moved.bytes).sum()
        };
        [sum(true), sum(false)]
    }
}

/// Seconds that two intervals have in common.
pub fn common(one: [f64; 2], other: [f64; 2]) -> f64 {
    (one[1].min(other[1]) - one[0].max(other[0])).max(0.0)
}

/// Takes down a timeline, from several threads.
pub struct Recorder(Mutex<Record>);

struct Record {
    origin: Instant,
    open: Option<(String, f64)>,
    timeline: Timeline,
    waited: f64,
    bytes: [u64; 2],
}

impl Default for Recorder {
    fn default() -> Recorder {
        let record = Record {
            origin: Instant::now(),
            open: None,
            timeline: Timeline::default(),
            waited: 0.0,
            bytes: [0; 2],
        };
        Recorder(Mutex::new(record))
    }
}

impl Record {
    fn since(&self, at: Instant) -> f64 {
        // What began before the step is told as if it began with it.
        at.saturating_duration_since(self.origin).as_secs_f64()
    }

    fn close(&mut self) {
        let now = self.since(Instant::now());
        if let Some((phase, start)) = self.open.take() {
            keep(&mut self.timeline.computed, Span { phase, at: [start, now] });
        }
    }
}

fn keep<T>(list: &mut Vec<T>, one: T) {
    if list.len() < INTERVALS {
        list.push(one);
    }
}

impl Recorder {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A step begins.
    pub fn restart(&self) {
        let mut record = self.record();
        record.origin = Instant::now();
        record.timeline = Timeline::default();
        if let Some((_, start)) = &mut record.open {
            *start = 0.0;
        }
    }

    /// A phase begins to compute.
    pub fn begin(&self, phase: &str) {
        let mut record = self.record();
        record.close();
        let now = record.since(Instant::now());
        record.open = Some((phase.to_string(), now));
    }

    /// It ends.
    pub fn end(&self) {
        self.record().close();
    }

    /// The device waited since then; what it waited for meanwhile, and told, is a part of it.
    pub fn waited_since(&self, began: Instant) {
        let mut record = self.record();
        let at = [record.since(began), record.since(Instant::now())];
        record.waited += at[1] - at[0];
        while let Some([start, end]) = record.timeline.waited.pop_if(|part| part[0] >= at[0]) {
            record.waited -= end - start;
        }
        keep(&mut record.timeline.waited, at);
    }

    /// An item moved since then.
    pub fn moved_since(&self, began: Instant, item: &str, [to, copy]: [Tier; 2], bytes: u64) {
        let mut record = self.record();
        let at = [record.since(began), record.since(Instant::now())];
        record.bytes[usize::from(to != Tier::Device)] += bytes;
        let item = item.to_string();
        keep(&mut record.timeline.moved, Moved { item, to, copy, bytes, at });
    }

    /// Seconds waited, and bytes read and written, since the beginning.
    pub fn totals(&self) -> (f64, [u64; 2]) {
        let record = self.record();
        (record.waited, record.bytes)
    }

    /// The step so far.
    pub fn timeline(&self) -> Timeline {
        let record = self.record();
        let seconds = record.since(Instant::now());
        let mut timeline = Timeline { seconds, ..record.timeline.clone() };
        if let Some((phase, start)) = &record.open {
            timeline.computed.push(Span { phase: phase.clone(), at: [*start, seconds] });
        }
        timeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(at: [f64; 2]) -> Moved {
        Moved { item: "x".to_string(), to: Tier::Device, copy: Tier::Host, bytes: 8, at }
    }

    #[test]
    fn what_overlaps_is_what_was_computed_beside_and_not_waited_for() {
        let span = |start, end| Span { phase: "train".to_string(), at: [start, end] };
        let timeline = Timeline {
            seconds: 10.0,
            computed: vec![span(0.0, 4.0), span(5.0, 10.0)],
            waited: vec![[2.0, 3.0], [4.0, 5.0]],
            moved: vec![moved([1.0, 3.0]), moved([3.5, 5.5])],
        };
        // Of four seconds of transfers the device computed in [1, 2], [3.5, 4] and [5, 5.5].
        assert_eq!(timeline.overlap_share(), Some(0.5));
        assert_eq!((timeline.exposed_seconds(), timeline.exposed_share()), (2.0, 0.2));
        assert_eq!(timeline.bytes(), [16, 0]);
        assert_eq!(Timeline::default().overlap_share(), None);
        let serial = Timeline { waited: vec![[1.0, 3.0], [3.5, 5.5]], ..timeline };
        assert_eq!(serial.overlap_share(), Some(0.0));
    }

    #[test]
    fn a_recorder_tells_a_step_since_it_began() {
        let recorder = Recorder::default();
        let began = Instant::now();
        recorder.begin("train");
        recorder.moved_since(began, "x", [Tier::Host; 2], 8);
        let within = Instant::now();
        recorder.waited_since(within);
        recorder.waited_since(began);
        let told = recorder.timeline();
        assert_eq!(
            (told.bytes(), told.waited.len()),
            ([0, 8], 1),
            "a wait within a wait counts once"
        );
        assert!((recorder.totals().0 - told.exposed_seconds()).abs() < 1e-9);
        recorder.restart();
        let fresh = recorder.timeline();
        assert!(fresh.moved.is_empty() && fresh.waited.is_empty());
        assert_eq!(fresh.computed[0].at[0], 0.0, "the phase goes on");
        recorder.end();
        assert_eq!(recorder.totals().1, [0, 8]);
    }
}
