//! What this machine does in a second: products, memory reads and the pool's barrier, measured in a fraction of one.
//!
//! A speed means little without the machine that it was measured on. A rate is the median of short windows, each judged by
//! the thread's own processor time, so that a busy neighbour changes it little; the rate of all threads is the sum of what
//! each does while the others do the same. Knows no model.

mod loops;

use crate::arena::{Arena, Kind};
use crate::buffer::{Buffer, DType};
use crate::ops::Isa;
use crate::pool::Pool;
use loops::{Product, Reader};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::Instant;

/// This machine, as far as a speed depends on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's own name.
    pub processor: String,
    /// Instruction set that the kernels use: "avx512", "avx2" or "portable".
    pub instruction_set: String,
    /// What `int8_ops_per_second` was measured with.
    pub int8_instruction: String,
    /// Bytes of a core's second-level cache.
    pub l2_cache_bytes: u64,
    /// Bytes of the third-level cache, which cores share; 0 if there is none.
    pub l3_cache_bytes: u64,
    /// What one thread does.
    pub one_thread: Rates,
    /// What all threads do together.
    pub all_threads: Rates,
    /// Seconds that measuring took.
    pub seconds: f64,
}

/// Rates of some threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// How many.
    pub threads: usize,
    /// f32 operations of fused multiply-adds, two each: the peak that shares of a peak are of.
    pub f32_flops_per_second: f64,
    /// Multiplications and additions of 8-bit integers, two a product.
    pub int8_ops_per_second: f64,
    /// As f32, of 16-bit floats; absent where the instruction set has none.
    pub fp16_flops_per_second: Option<f64>,
    /// As f32, of dot products of brain floats; absent where the instruction set has none.
    pub bf16_flops_per_second: Option<f64>,
    /// Bytes read from each core's second-level cache.
    pub l2_bytes_per_second: f64,
    /// Bytes read from the third-level cache.
    pub l3_bytes_per_second: f64,
    /// Bytes read from memory; absent where there was no room to measure it.
    pub dram_bytes_per_second: Option<f64>,
    /// Seconds of an empty operation on the pool of the kernels: hand over, meet again.
    pub barrier_seconds: f64,
}

/// How long to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Windows whose median is taken.
    pub windows: usize,
    /// Seconds of a window.
    pub window_seconds: f64,
    /// Bytes that may be held to measure memory; with less than twice the last cache memory is not measured.
    pub room_bytes: u64,
}

impl Effort {
    /// About half a second.
    pub fn thorough(room_bytes: u64) -> Effort {
        Effort { windows: 11, window_seconds: 2e-3, room_bytes }
    }

    /// About a tenth of a second: what a run spends at its start.
    pub fn brief(room_bytes: u64) -> Effort {
        Effort { windows: 3, window_seconds: 0.7e-3, room_bytes }
    }
}

impl Machine {
    /// Bytes a second that `all_threads` read of a working set of so many bytes: from the smallest level that holds it.
    pub fn bandwidth(&self, working_bytes: f64) -> f64 {
        let rates = &self.all_threads;
        let l2 = self.l2_cache_bytes as f64 * rates.threads as f64;
        match rates.dram_bytes_per_second {
            _ if working_bytes <= l2 => rates.l2_bytes_per_second,
            Some(dram) if working_bytes > self.l3_cache_bytes as f64 => dram,
            _ => rates.l3_bytes_per_second,
        }
    }
}

/// Measures what one thread and what `threads` threads do.
pub fn measure(threads: usize, effort: &Effort) -> Machine {
    let began = Instant::now();
    let isa = Isa::detect();
    let caches = Caches::of_this_machine();
    let memory = Memory::of(caches, threads, effort.room_bytes);
    let rates = |threads| rates(isa, threads, caches, memory.as_ref(), effort);
    let all_threads = rates(threads);
    let one_thread = if threads == 1 { all_threads } else { rates(1) };
    Machine {
        processor: processor_name(),
        instruction_set: isa.name().to_string(),
        int8_instruction: loops::int8(isa).name.to_string(),
        l2_cache_bytes: caches.l2,
        l3_cache_bytes: caches.l3,
        one_thread,
        all_threads,
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// f32 operations a second that `threads` threads do together, alone of all rates: some thousandths of a second.
pub fn measure_products(threads: usize, effort: &Effort) -> f64 {
    products(&Pool::new(threads), loops::f32(Isa::detect()), effort)
}

fn products(pool: &Pool, product: Product, effort: &Effort) -> f64 {
    together(pool, &|_| product_rate(&product, effort))
}

fn rates(
    isa: Isa,
    threads: usize,
    caches: Caches,
    memory: Option<&Memory>,
    effort: &Effort,
) -> Rates {
    let pool = Pool::new(threads);
    let product = |product: Product| products(&pool, product, effort);
    // Half of a level is surely held by it, and four times the level below surely not by that.
    let l2_bytes = (caches.l2 / 2).max(1 << 16);
    let l3_bytes = (caches.l3 / 4 / threads as u64).clamp(2 * caches.l2, 16 * caches.l2);
    let cached = |bytes: u64| {
        together(&pool, &|_| {
            let data = vec![1.0_f32; bytes as usize / 4];
            read_rate(isa, &data, effort)
        })
    };
    Rates {
        threads,
        f32_flops_per_second: product(loops::f32(isa)),
        int8_ops_per_second: product(loops::int8(isa)),
        fp16_flops_per_second: loops::fp16(isa).map(product),
        bf16_flops_per_second: loops::bf16(isa).map(product),
        l2_bytes_per_second: cached(l2_bytes),
        l3_bytes_per_second: cached(l3_bytes),
        dram_bytes_per_second: memory.map(|memory| {
            together(&pool, &|piece| read_rate(isa, memory.part(piece, threads), effort))
        }),
        barrier_seconds: barrier_seconds(&pool, effort),
    }
}

/// The sum of what each thread of the pool measures while the others do the same.
fn together(pool: &Pool, measure: &(dyn Fn(usize) -> f64 + Sync)) -> f64 {
    let rates = Mutex::new(0.0);
    pool.run(pool.threads(), &|piece| {
        let rate = measure(piece);
        *rates.lock().expect("a sum is only added to") += rate;
    });
    rates.into_inner().expect("every piece has ended")
}

/// Operations a second of a loop of products.
fn product_rate(product: &Product, effort: &Effort) -> f64 {
    median_rate(effort, &mut |rounds| (product.run)(rounds)) * product.operations
}

/// Bytes a second of reading `data` again and again.
fn read_rate(isa: Isa, data: &[f32], effort: &Effort) -> f64 {
    let (blocks, mut next) = (data.chunks_exact(loops::BLOCK).len(), 0);
    let read = &mut |rounds: usize| {
        for _ in 0..rounds {
            let block = &data[next * loops::BLOCK..(next + 1) * loops::BLOCK];
            // SAFETY: this processor has the set.
            std::hint::black_box(unsafe { isa.run(Reader(block)) });
            next = (next + 1) % blocks;
        }
    };
    // What is cached is so after the first round; what is not never is.
    read(blocks.min(1 << 10));
    median_rate(effort, read) * (4 * loops::BLOCK) as f64
}

/// Rounds a second of `run(rounds)`: the median of windows.
fn median_rate(effort: &Effort, run: &mut dyn FnMut(usize)) -> f64 {
    let mut timed = |rounds: usize| {
        let began = thread_seconds();
        run(rounds);
        (thread_seconds() - began).max(1e-9)
    };
    let mut rounds = 1;
    loop {
        let seconds = timed(rounds);
        if seconds > effort.window_seconds / 8.0 || rounds > 1 << 40 {
            rounds = ((rounds as f64 * effort.window_seconds / seconds) as usize).max(1);
            break;
        }
        rounds *= 4;
    }
    let rates = (0..effort.windows).map(|_| rounds as f64 / timed(rounds));
    median(rates.collect())
}

/// Seconds that the pool takes to run nothing.
fn barrier_seconds(pool: &Pool, effort: &Effort) -> f64 {
    const RUNS: usize = 100;
    let window = |_| {
        let began = Instant::now();
        (0..RUNS).for_each(|_| pool.run(pool.threads(), &|_| {}));
        began.elapsed().as_secs_f64() / RUNS as f64
    };
    median((0..4 * effort.windows).map(window).collect())
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Processor time of this thread.
#[cfg(target_os = "linux")]
fn thread_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Wall time, where a thread's own is not told.
#[cfg(not(target_os = "linux"))]
fn thread_seconds() -> f64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

fn processor_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

/// Bytes of the caches.
#[derive(Clone, Copy)]
struct Caches {
    l2: u64,
    l3: u64,
}

impl Caches {
    /// As Linux tells them; ordinary ones where it does not.
    fn of_this_machine() -> Caches {
        let read = |index: usize, name: &str| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
            std::fs::read_to_string(path).ok().map(|text| text.trim().to_string())
        };
        let size = |level: &str| {
            let index = (0..8).find(|index| read(*index, "level").as_deref() == Some(level))?;
            kibibytes(&read(index, "size")?)
        };
        match size("2") {
            Some(l2) => Caches { l2, l3: size("3").unwrap_or(0) },
            None => Caches { l2: 1 << 20, l3: 32 << 20 },
        }
    }
}

/// "512K" in bytes.
fn kibibytes(text: &str) -> Option<u64> {
    text.strip_suffix('K')?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory that no cache holds.
struct Memory(Buffer);

impl Memory {
    /// Twice the last cache, at least 32 MiB a thread and 256 MiB at most; none if there is no room.
    fn of(caches: Caches, threads: usize, room: u64) -> Option<Memory> {
        let bytes = (2 * caches.l3).clamp(64 << 20, 256 << 20).max((threads as u64) << 25);
        if bytes > room {
            return None;
        }
        // Outside the arena of the kernels: it is no memory of theirs. The arena touches every page.
        let arena = Arena::new(None);
        let owner = arena.owner("machine", Kind::Activations);
        let mut data = arena.buffer(owner, DType::F32, 1, bytes as usize / 4).ok()?;
        data.host_mut::<f32>().row_mut(0).iter_mut().step_by(1024).for_each(|x| *x = 1.0);
        Some(Memory(data))
    }

    /// A thread's part of it.
    fn part(&self, index: usize, parts: usize) -> &[f32] {
        let data = self.0.host::<f32>();
        let count = data.cols / parts;
        &data.row(0)[index * count..][..count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIEF: Effort = Effort { windows: 3, window_seconds: 2e-4, room_bytes: 0 };

    #[test]
    fn every_instruction_set_of_this_processor_has_a_rate_for_each_kind_of_number() {
        for isa in Isa::available() {
            let products = [Some(loops::f32(isa)), Some(loops::int8(isa)), loops::fp16(isa)];
            for product in products.into_iter().flatten().chain(loops::bf16(isa)) {
                let rate = product_rate(&product, &BRIEF);
                assert!(rate.is_finite() && rate > 1e5, "{} {}: {rate}", isa.name(), product.name);
            }
            let data = vec![1.0; 4 * loops::BLOCK];
            // SAFETY: this processor has the set.
            let sum = unsafe { isa.run(Reader(&data[..loops::BLOCK])) };
            assert_eq!(sum, loops::BLOCK as f32, "{}: not every number was read", isa.name());
        }
    }

    #[test]
    fn a_loop_does_the_operations_that_it_is_counted_with() {
        for isa in Isa::available() {
            let product = loops::f32(isa);
            // SAFETY: this processor has the set.
            let [short, long] =
                [1000, 3000].map(|rounds| unsafe { loops::f32_sum(isa, rounds) } as f64);
            // Each fused multiply-add adds 1 to one of its lanes: two operations.
            assert_eq!(2.0 * (long - short), 2000.0 * product.operations, "{}", isa.name());
        }
    }

    #[test]
    fn a_working_set_is_read_from_the_smallest_level_that_holds_it() {
        let all_threads = Rates {
            threads: 2,
            l2_bytes_per_second: 3.0,
            l3_bytes_per_second: 2.0,
            dram_bytes_per_second: Some(1.0),
            ..Rates::default()
        };
        let mut machine = Machine {
            l2_cache_bytes: 100,
            l3_cache_bytes: 1000,
            all_threads,
            ..Machine::default()
        };
        let read = |machine: &Machine| [200.0, 201.0, 1000.0, 1001.0].map(|b| machine.bandwidth(b));
        assert_eq!(read(&machine), [3.0, 2.0, 2.0, 1.0]);
        machine.all_threads.dram_bytes_per_second = None;
        assert_eq!(read(&machine), [3.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn memory_is_measured_where_there_is_room_and_left_out_where_there_is_none() {
        let caches = Caches { l2: 1 << 19, l3: 1 << 20 };
        assert!(Memory::of(caches, 1, (64 << 20) - 1).is_none());
        let memory = Memory::of(caches, 1, 64 << 20).expect("64 MiB are there");
        let [low, high] = [0, 1].map(|index| memory.part(index, 2));
        assert_eq!((low.len(), high.len()), (8 << 20, 8 << 20));
        assert_eq!((low[0], high[high.len() - 1024]), (1.0, 1.0));
        assert_eq!(kibibytes("512K"), Some(524_288));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
