//! Wall time, processor time and memory of a benchmark, as the operating system counts them; and allocations.

use rehearsal_kernels::heap;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::time::Instant;

/// Time since its making.
pub struct Stopwatch {
    wall: Instant,
    processor: f64,
    page_faults: u64,
    heap_allocations: u64,
}

/// What a benchmark took.
#[derive(Debug, Serialize)]
pub struct Spent {
    /// Seconds on the clock.
    pub wall_seconds: f64,
    /// Processor seconds of all threads.
    pub cpu_seconds: f64,
    /// Most resident memory of the process so far.
    pub peak_rss_bytes: u64,
    /// Pages touched for the first time.
    pub page_faults: u64,
    /// Allocations of the heap, by all threads.
    pub heap_allocations: u64,
}

impl Stopwatch {
    /// Starts.
    pub fn start() -> Stopwatch {
        let (page_faults, heap_allocations) = (heap::page_faults(), heap::allocations());
        let (wall, processor) = (Instant::now(), processor_seconds());
        Stopwatch { wall, processor, page_faults, heap_allocations }
    }

    /// Reads it.
    pub fn spent(&self) -> Spent {
        Spent {
            wall_seconds: self.wall.elapsed().as_secs_f64(),
            cpu_seconds: processor_seconds() - self.processor,
            peak_rss_bytes: peak_rss_bytes(),
            page_faults: heap::page_faults() - self.page_faults,
            heap_allocations: heap::allocations() - self.heap_allocations,
        }
    }
}

fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// `VmHWM` of /proc/self/status; 0 where there is none.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
