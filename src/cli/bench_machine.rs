//! `rehearsal bench machine`: what this machine does in a second, with which every speed is told.

use super::command::Threads;
use super::machine::measured;
use super::output::{say, say_json};
use crate::config::Bytes;
use anyhow::Result;
use clap::Args;
use rehearsal_kernels::machine::{Effort, Machine, Rates};

/// `bench machine`.
#[derive(Debug, Args)]
pub struct BenchMachineArgs {
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// Measures and prints.
pub fn run(args: &BenchMachineArgs) -> Result<()> {
    let machine = measured(args.threads.count(), Effort::thorough);
    if args.json {
        return say_json(&machine);
    }
    lines(&machine).iter().try_for_each(|line| say(line))
}

/// The figures as a table of 80 columns.
pub fn lines(machine: &Machine) -> Vec<String> {
    let both = [&machine.one_thread, &machine.all_threads];
    let row = |name: &str, unit: &str, scale: f64, figure: &dyn Fn(&Rates) -> Option<f64>| {
        let cell = |rates: &&Rates| {
            figure(rates).map_or("absent".to_string(), |value| format!("{:.1}", value * scale))
        };
        let [one, all] = [0, 1].map(|i| cell(&both[i]));
        format!("{name:<16} {unit:<8} {one:>12} {all:>12}")
    };
    let threads = machine.all_threads.threads;
    vec![
        format!("{}, {}", machine.processor, machine.instruction_set),
        format!(
            "caches: L2 {} a core, L3 {}",
            Bytes(machine.l2_cache_bytes),
            Bytes(machine.l3_cache_bytes)
        ),
        format!("{:<25} {:>12} {:>12}", "", "1 thread", format!("{threads} threads")),
        row("f32 products", "GFLOP/s", 1e-9, &|rates| Some(rates.f32_flops_per_second)),
        row("int8 products", "GOP/s", 1e-9, &|rates| Some(rates.int8_ops_per_second)),
        row("fp16 products", "GFLOP/s", 1e-9, &|rates| rates.fp16_flops_per_second),
        row("bf16 products", "GFLOP/s", 1e-9, &|rates| rates.bf16_flops_per_second),
        row("read L2", "GB/s", 1e-9, &|rates| Some(rates.l2_bytes_per_second)),
        row("read L3", "GB/s", 1e-9, &|rates| Some(rates.l3_bytes_per_second)),
        row("read memory", "GB/s", 1e-9, &|rates| rates.dram_bytes_per_second),
        row("barrier", "ns", 1e9, &|rates| Some(rates.barrier_seconds)),
        format!("int8 with {}; measured in {:.2} s", machine.int8_instruction, machine.seconds),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_every_rate_and_what_is_absent_in_80_columns() {
        let rates = |threads: usize| Rates {
            threads,
            f32_flops_per_second: 94.2e9 * threads as f64,
            fp16_flops_per_second: None,
            dram_bytes_per_second: Some(15e9),
            barrier_seconds: 1.5e-7,
            ..Rates::default()
        };
        let machine = Machine {
            processor: "AMD EPYC".to_string(),
            l2_cache_bytes: 1 << 19,
            one_thread: rates(1),
            all_threads: rates(2),
            ..Machine::default()
        };
        let lines = lines(&machine);
        assert!(lines.iter().all(|line| line.len() < 80), "{lines:?}");
        let line = |name: &str| {
            let line = lines.iter().find(|line| line.starts_with(name)).expect(name);
            line.split_whitespace().map(str::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("f32"), "f32 products GFLOP/s 94.2 188.4");
        assert_eq!(line("fp16"), "fp16 products GFLOP/s absent absent");
        assert_eq!(line("read memory"), "read memory GB/s 15.0 15.0");
        assert_eq!(line("barrier"), "barrier ns 150.0 150.0");
    }
}
