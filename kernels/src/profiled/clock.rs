//! The clock of a profile: seconds of the process where one thread computes, seconds on the wall where several do.
//!
//! Processor time of one thread does not grow while others have its core, so that a busy neighbour changes no figure; of
//! several threads it says nothing about how long an operation took. Reading it takes half a microsecond, which is
//! taken off again.

use serde::Serialize;
use std::time::Instant;

/// Which seconds are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockKind {
    /// On the wall.
    Wall,
    /// Of the process, all its threads together.
    Processor,
}

/// A clock, and what reading it takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    pub kind: ClockKind,
    start: Instant,
    /// Seconds between two reads with nothing between them.
    reading: f64,
}

impl Clock {
    pub fn new(kind: ClockKind) -> Clock {
        let mut clock = Clock { kind, start: Instant::now(), reading: 0.0 };
        let mut reads: Vec<f64> = (0..100)
            .map(|_| {
                let began = clock.now();
                clock.now() - began
            })
            .collect();
        reads.sort_by(f64::total_cmp);
        clock.reading = reads[reads.len() / 2];
        clock
    }

    /// Seconds since some fixed moment.
    pub fn now(&self) -> f64 {
        match self.kind {
            ClockKind::Wall => self.start.elapsed().as_secs_f64(),
            ClockKind::Processor => processor_seconds(self.start),
        }
    }

    /// Seconds of what ran between two reads.
    pub fn between(&self, began: f64, ended: f64) -> f64 {
        (ended - began - self.reading).max(0.0)
    }
}

#[cfg(target_os = "linux")]
fn processor_seconds(_start: Instant) -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Wall time, where the process's own is not told.
#[cfg(not(target_os = "linux"))]
fn processor_seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}
