//! What a step made of the machine: shares of the rates that were measured when the run began, and where the device
//! waited (docs/performance.md, "What a step made of the machine").
//!
//! A figure whose rate or work is not known is absent, and no figure is cut to lie between 0 and 1: noise that puts one
//! above is to be seen. Knows reports and no clock.
//!
//! Invariants:
//!   * useful FLOPs depend on prompts and replies alone, so that no way of computing them raises a share but its speed
//!   * where all passes of a rollout have equally many rows the tail factor is 1

use super::phase::{GenerateReport, StepReport};
use rehearsal_kernels::machine::Machine;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Passes with at least this share of the widest pass's rows are full.
const FULL: f64 = 0.9;

/// Seconds in which a device did nothing but ready or park weights, or run the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Chores {
    /// Packing weights for what comes next: bringing a new policy to the sampler, the trainer or the scorer.
    pub pack_seconds: f64,
    /// Waiting for weights and moments on their way to the host or the disk and back.
    pub offload_seconds: f64,
    /// Forward passes of the reference.
    pub reference_seconds: f64,
    /// Changes of the layout of ranks.
    pub switched: Switched,
}

/// What changes of the layout of ranks took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Switched {
    /// Bytes that all ranks sent.
    pub moved_bytes: u64,
    /// Bytes that any plan would have had to send.
    pub least_bytes: u64,
    /// Bytes that this rank sent.
    pub sent_bytes: u64,
    /// Bytes that came to it.
    pub received_bytes: u64,
    /// Seconds.
    pub seconds: f64,
    /// Seconds of a processor, of all devices' threads together; waiting for messages is among them where it polls.
    pub cpu_seconds: f64,
}

impl Switched {
    /// Seconds of a processor for each byte that was moved.
    pub fn cpu_seconds_per_byte(&self) -> Option<f64> {
        ratio(self.cpu_seconds, self.moved_bytes as f64)
    }
}

impl Chores {
    /// Adds what was packed since then.
    pub fn packed_since(&mut self, began: Instant) {
        self.pack_seconds += began.elapsed().as_secs_f64();
    }

    /// Adds a change of layout.
    pub fn switched(&mut self, switched: Switched) {
        let sum = &mut self.switched;
        sum.moved_bytes += switched.moved_bytes;
        sum.least_bytes += switched.least_bytes;
        sum.sent_bytes += switched.sent_bytes;
        sum.received_bytes += switched.received_bytes;
        sum.seconds += switched.seconds;
        sum.cpu_seconds += switched.cpu_seconds;
    }
}

/// The machines that a run is made on: one for each process, all taken to be like the one that was measured.
#[derive(Clone, Debug, Default)]
pub struct Machines {
    /// What one does in a second.
    pub each: Machine,
    /// How many there are.
    pub count: usize,
    /// How many of them sample.
    pub sampling: usize,
}

impl Machines {
    /// That of a run of one process.
    pub fn one(each: Machine) -> Machines {
        Machines { each, count: 1, sampling: 1 }
    }
}

/// The share of the machines' f32 products that these FLOPs are in so many seconds: of a GRPO step the useful-FLOP
/// utilisation (RFU), of any other its useful share.
pub fn useful_share(flops: f64, seconds: f64, machines: &Machines) -> Option<f64> {
    let each = machines.each.all_threads.f32_flops_per_second;
    ratio(flops, seconds * each * machines.count as f64)
}

/// The share of the measured bandwidth that a rollout's least bytes are in its seconds, those of prompts included.
pub fn rollout_bandwidth(rollout: &GenerateReport, machines: &Machines) -> Option<f64> {
    let each = machines.each.bandwidth(rollout.working_bytes);
    ratio(rollout.least_bytes, rollout.seconds * each * machines.sampling as f64)
}

/// Seconds of the passes that decoded, over those that as many tokens would take if every pass were as wide as the full
/// ones (at least nine tenths of the widest pass's rows), at the mean seconds a token of these.
pub fn tail_factor(rollout: &GenerateReport) -> Option<f64> {
    let widest = rollout.decode.last()?.rows as f64;
    let (mut seconds, mut tokens) = (0.0, 0.0);
    let (mut full_seconds, mut full_tokens) = (0.0, 0.0);
    for passes in &rollout.decode {
        let drawn = (passes.rows * passes.passes) as f64;
        (seconds, tokens) = (seconds + passes.seconds, tokens + drawn);
        if passes.rows as f64 >= FULL * widest {
            (full_seconds, full_tokens) = (full_seconds + passes.seconds, full_tokens + drawn);
        }
    }
    ratio(seconds, tokens * ratio(full_seconds, full_tokens)?)
}

/// The share of a step's rows that it could have done without: prompts once more, and padding if there were any.
pub fn padding_share(step: &StepReport) -> Option<f64> {
    Some(1.0 - ratio(step.unique_rows as f64, step.rows as f64)?)
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::job::DecodePasses;
    use rehearsal_kernels::machine::Rates;

    fn machines() -> Machines {
        let all_threads = Rates {
            threads: 2,
            f32_flops_per_second: 1000.0,
            l2_bytes_per_second: 80.0,
            l3_bytes_per_second: 20.0,
            ..Rates::default()
        };
        let (l2_cache_bytes, l3_cache_bytes) = (50, 1000);
        Machines::one(Machine { l2_cache_bytes, l3_cache_bytes, all_threads, ..Machine::default() })
    }

    fn passes(rows: u64, passes: u64, seconds: f64) -> DecodePasses {
        DecodePasses { rows, passes, seconds, cached_tokens: 0 }
    }

    #[test]
    fn a_share_is_of_the_products_of_all_threads_and_absent_where_none_were_measured() {
        assert_eq!(useful_share(500.0, 2.0, &machines()), Some(0.25));
        assert_eq!(useful_share(500.0, 2.0, &Machines::one(Machine::default())), None);
        assert_eq!(useful_share(0.0, 2.0, &machines()), Some(0.0));
        let five = Machines { count: 5, sampling: 2, ..machines() };
        assert_eq!(useful_share(500.0, 2.0, &five), Some(0.05), "of all processes together");
    }

    #[test]
    fn the_bandwidth_is_that_of_the_level_which_holds_weights_and_cache() {
        let rollout = |working_bytes| GenerateReport {
            least_bytes: 40.0,
            seconds: 4.0,
            working_bytes,
            ..GenerateReport::default()
        };
        // Two second-level caches of 50 bytes hold 100.
        assert_eq!(rollout_bandwidth(&rollout(100.0), &machines()), Some(40.0 / (4.0 * 80.0)));
        assert_eq!(rollout_bandwidth(&rollout(101.0), &machines()), Some(40.0 / (4.0 * 20.0)));
        let two_sample = Machines { count: 5, sampling: 2, ..machines() };
        assert_eq!(rollout_bandwidth(&rollout(100.0), &two_sample), Some(40.0 / (4.0 * 160.0)));
    }

    #[test]
    fn narrow_passes_make_a_tail_and_equal_ones_make_none() {
        let rollout = |decode: &[DecodePasses]| GenerateReport {
            decode: decode.to_vec(),
            ..Default::default()
        };
        assert_eq!(tail_factor(&rollout(&[])), None);
        assert_eq!(tail_factor(&rollout(&[passes(8, 5, 3.0)])), Some(1.0));
        // Full passes draw 8 tokens in 0.4 s: the 8 + 80 tokens would take 4.4 s, and take 4.4 - 0.4 + 2 s.
        let tail = tail_factor(&rollout(&[passes(1, 8, 2.0), passes(8, 10, 4.0)])).unwrap();
        assert!((tail - 6.0 / 4.4).abs() < 1e-12, "{tail}");
        // Nine rows of ten are full, eight are not.
        let near = tail_factor(&rollout(&[passes(9, 1, 1.8), passes(10, 1, 1.0)])).unwrap();
        assert!((near - 1.0).abs() < 1e-12, "{near}");
        let far = tail_factor(&rollout(&[passes(8, 1, 1.6), passes(10, 1, 1.0)])).unwrap();
        assert!((far - 2.6 / 1.8).abs() < 1e-12, "{far}");
    }

    #[test]
    fn rows_that_a_step_could_do_without_are_its_padding() {
        let step = |unique_rows, rows| StepReport { unique_rows, rows, ..StepReport::default() };
        assert_eq!(padding_share(&step(30, 40)), Some(0.25));
        assert_eq!(padding_share(&step(40, 40)), Some(0.0));
        assert_eq!(padding_share(&step(0, 0)), None, "a step that trains on nothing");
    }
}
