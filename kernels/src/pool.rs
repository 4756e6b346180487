//! Pool: our own threads, and work handed to them in fixed pieces.
//!
//! [`Pool::run`] calls a closure once for every piece number; the caller works too. Each thread has its own
//! range of numbers, the same for every operation of as many pieces, so that what one operation leaves in
//! its core's cache is there for the next one; who is done takes from the others' ranges, so that nobody
//! waits for a thread that the system has put aside. Pieces are cut by the operation, never by the pool, so
//! that the number of threads cannot change a bit. It knows no buffer and no operation.
//!
//! Invariants:
//!   * when `run` returns, every piece was run exactly once (or a panic goes on in the caller)
//!   * no worker holds the closure after `run` has returned: a worker enters through the gate, and `run`
//!     closes the gate and waits until those inside have left; who comes late finds it closed
//!   * an idle worker spins at most [`SPIN`], then sleeps; the caller too; a busy one yields every [`TURN`]
//!   * a worker at rest is not woken and not waited for

mod rest;

use crossbeam::utils::CachePadded;
use rest::Rest;
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for work (or for the others' end) before it sleeps.
const SPIN: Duration = Duration::from_micros(20);

/// How long a worker computes before it lets others have its core, between two jobs. The system takes a core away
/// after a few of these; in the middle of a piece that makes the caller wait for the others' turn too.
const TURN: Duration = Duration::from_micros(700);

/// The gate's bit that lets workers in; the bits below count who is inside. The next bit says that the caller
/// sleeps until they have left, those above number the jobs.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const ASLEEP: u64 = OPEN << 1;
const JOB: u64 = OPEN << 2;

/// A core that nobody is on.
const NOWHERE: usize = usize::MAX;

/// Threads that share the pieces of one operation at a time.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: a second caller, or a piece that calls `run` itself, works alone.
    busy: Mutex<()>,
}

struct Shared {
    /// What a worker reads to begin lies in one cache line.
    door: CachePadded<Door>,
    /// How many pieces of each thread's range are taken; the caller's is the first.
    taken: Vec<CachePadded<AtomicUsize>>,
    sleeping: Vec<CachePadded<AtomicBool>>,
    /// The core on which the caller last woke a worker.
    core: AtomicUsize,
    stop: AtomicBool,
    /// The caller that sleeps.
    caller: Mutex<Option<Thread>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What a worker keeps for itself.
struct Worker {
    index: usize,
    /// The job that it last took part in.
    seen: u64,
    /// When it last gave its core away.
    yielded: Instant,
    rest: Rest,
}

struct Door {
    gate: AtomicU64,
    job: UnsafeCell<Job>,
}

/// What the threads inside the gate work on.
#[derive(Clone, Copy)]
struct Job {
    pieces: usize,
    call: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `job` is written by the one caller that holds `busy`, while the gate is closed and nobody is inside;
// workers read it only between entering and leaving. `call` points to a `Sync` closure that outlives the job.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller included; 0 takes one per core.
    pub fn new(threads: usize) -> Pool {
        let cores = || thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if threads == 0 { cores() } else { threads }.min(INSIDE as usize);
        let idle: *const (dyn Fn(usize) + Sync) = &|_| {};
        let shared = Arc::new(Shared {
            door: CachePadded::new(Door {
                gate: AtomicU64::new(0),
                job: UnsafeCell::new(Job { pieces: 0, call: idle }),
            }),
            taken: (0..threads).map(|_| CachePadded::new(AtomicUsize::new(0))).collect(),
            sleeping: (1..threads).map(|_| CachePadded::new(AtomicBool::new(false))).collect(),
            core: AtomicUsize::new(NOWHERE),
            stop: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        let spawn = |index: usize| {
            let shared = shared.clone();
            let name = format!("kernels-{}", index + 1);
            let thread = thread::Builder::new().name(name).spawn(move || shared.work(index));
            // A system that refuses a thread leaves us fewer workers, never fewer results.
            thread.ok()
        };
        let workers = (0..threads - 1).map_while(spawn).collect();
        Pool { shared, workers, busy: Mutex::new(()) }
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `call(0)`, ..., `call(pieces - 1)`, each once, on any thread and in any order.
    pub fn run(&self, pieces: usize, call: &(dyn Fn(usize) + Sync)) {
        let busy =
            if pieces > 1 && !self.workers.is_empty() { self.busy.try_lock().ok() } else { None };
        let Some(_busy) = busy else {
            (0..pieces).for_each(call);
            return;
        };
        self.open(pieces, call);
        self.shared.take_pieces(0, pieces, call);
        self.close();
        let panic = self.shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(payload) = panic {
            drop(_busy);
            resume_unwind(payload);
        }
    }

    fn open(&self, pieces: usize, call: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes, and `close` waits until nobody uses the pointer.
        let call: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(call) };
        // SAFETY: the gate is closed and empty, and `busy` keeps other callers out.
        unsafe { *shared.door.job.get() = Job { pieces, call } };
        shared.taken.iter().for_each(|taken| taken.store(0, Ordering::Relaxed));
        let gate = shared.door.gate.load(Ordering::Relaxed);
        shared.door.gate.store(gate + JOB + OPEN, Ordering::Release);
        // Either a worker about to sleep sees the open gate, or we see its flag.
        fence(Ordering::SeqCst);
        for (worker, sleeping) in self.workers.iter().zip(&shared.sleeping).take(pieces - 1) {
            if sleeping.load(Ordering::Relaxed) && sleeping.swap(false, Ordering::AcqRel) {
                shared.core.store(rest::core().unwrap_or(NOWHERE), Ordering::Relaxed);
                worker.thread().unpark();
            }
        }
    }

    /// Closes the gate and waits until those inside have left.
    fn close(&self) {
        let gate = &self.shared.door.gate;
        if gate.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE == 0 {
            return;
        }
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..16 {
                if gate.load(Ordering::Acquire) & INSIDE == 0 {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        *self.shared.caller() = Some(thread::current());
        let mut inside = gate.fetch_or(ASLEEP, Ordering::AcqRel) & INSIDE;
        while inside > 0 {
            // The last worker to leave wakes us; a stray token only makes us look again.
            thread::park();
            inside = gate.load(Ordering::Acquire) & INSIDE;
        }
        gate.fetch_and(!ASLEEP, Ordering::AcqRel);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its pieces, so there is none to pass on.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut worker = Worker { index, seen: 0, yielded: Instant::now(), rest: Rest::default() };
        while let Some(gate) = self.wait(&mut worker) {
            let door = &*self.door;
            let entered =
                door.gate.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
            if entered.is_err() {
                continue;
            }
            worker.seen = gate / JOB;
            // SAFETY: we are inside the gate, so the job stays as it is.
            let (pieces, call) = unsafe {
                let job = *door.job.get();
                (job.pieces, &*job.call)
            };
            self.take_pieces(index + 1, pieces, call);
            let before = door.gate.fetch_sub(1, Ordering::AcqRel);
            if before & (OPEN | INSIDE) == 1
                && before & ASLEEP != 0
                && let Some(caller) = self.caller().take()
            {
                caller.unpark();
            }
        }
    }

    fn caller(&self) -> MutexGuard<'_, Option<Thread>> {
        self.caller.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits for an open gate of a job that the worker has not seen; None when the pool ends.
    fn wait(&self, worker: &mut Worker) -> Option<u64> {
        let seen = worker.seen;
        let ready = || {
            let gate = self.door.gate.load(Ordering::Acquire);
            (gate & OPEN != 0 && gate / JOB != seen).then_some(gate)
        };
        let mut start = Instant::now();
        if start - worker.yielded > TURN {
            thread::yield_now();
            worker.yielded = Instant::now();
        }
        loop {
            for _ in 0..16 {
                if let Some(gate) = ready() {
                    return Some(gate);
                }
                std::hint::spin_loop();
            }
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            if start.elapsed() > SPIN {
                self.sleep(worker, &|| ready().is_none());
                start = Instant::now();
                worker.yielded = start;
            }
        }
    }

    /// Sleeps while nothing is to be done. Who is woken on the caller's core moves, or rests if there is no other.
    fn sleep(&self, worker: &mut Worker, idle: &dyn Fn() -> bool) {
        let sleeping = &self.sleeping[worker.index];
        let mut rested = false;
        while !self.stop.load(Ordering::Acquire) {
            sleeping.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            match rested {
                false if idle() => thread::park(),
                false => {}
                // The next job wakes us, where there is room if anywhere; without one the caller is long at this job.
                true => thread::park_timeout(TURN),
            }
            let woken = !sleeping.swap(false, Ordering::AcqRel);
            let callers = self.core.load(Ordering::Relaxed);
            let crowded = woken && rest::core() == Some(callers) && !rest::leave(callers);
            let Some(rest) = worker.rest.woken(crowded) else {
                return;
            };
            self.stay_away(rest);
            rested = true;
        }
    }

    fn stay_away(&self, rest: Duration) {
        let start = Instant::now();
        while let Some(left) = rest.checked_sub(start.elapsed())
            && !self.stop.load(Ordering::Acquire)
        {
            thread::park_timeout(left);
        }
    }

    /// Runs the pieces of thread `own`'s range, then what is left of the others'.
    fn take_pieces(&self, own: usize, pieces: usize, call: &(dyn Fn(usize) + Sync)) {
        let ranges = self.taken.len().min(pieces);
        let all = || {
            for range in (0..ranges).map(|i| (own + i) % ranges) {
                let (first, end) = (range * pieces / ranges, (range + 1) * pieces / ranges);
                let taken = &self.taken[range];
                // Looking at a range that is done leaves its line where it is.
                while taken.load(Ordering::Relaxed) < end - first {
                    let piece = first + taken.fetch_add(1, Ordering::Relaxed);
                    if piece >= end {
                        break;
                    }
                    call(piece);
                }
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(all)) {
            // No further piece starts; the first panic is the one that the caller sees.
            self.taken.iter().for_each(|taken| taken.store(usize::MAX / 2, Ordering::Relaxed));
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_runs_once_for_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for pieces in (0..40).chain([1000]).cycle().take(400) {
                let counts: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                pool.run(pieces, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                    "{threads} {pieces}"
                );
            }
        }
    }

    /// Runs `work` on a thread of its own; a minute without an end is a fault.
    fn check_ends(work: impl FnOnce() + Send + 'static) {
        let (done, ended) = std::sync::mpsc::channel();
        thread::spawn(move || {
            work();
            done.send(()).unwrap();
        });
        ended.recv_timeout(Duration::from_secs(60)).expect("the pool ends its work");
    }

    #[test]
    fn a_thread_that_is_held_up_keeps_nothing_but_its_piece() {
        check_ends(|| {
            let pool = Pool::new(2);
            for held in [0, 3, 4, 7] {
                let others = AtomicUsize::new(0);
                pool.run(8, &|i| {
                    if i != held {
                        others.fetch_add(1, Ordering::SeqCst);
                    }
                    // Whoever has this piece waits for all others, some of its own range among them.
                    while i == held && others.load(Ordering::SeqCst) < 7 {
                        std::hint::spin_loop();
                    }
                });
            }
        });
    }

    #[test]
    fn a_caller_that_went_to_sleep_is_woken_by_the_last_worker() {
        check_ends(|| {
            let pool = Pool::new(3);
            for _ in 0..20 {
                let caller = thread::current().id();
                let begun = AtomicUsize::new(0);
                pool.run(3, &|_| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    // The caller's piece ends when all have begun, the workers' long after it.
                    while begun.load(Ordering::SeqCst) < 3 {
                        std::hint::spin_loop();
                    }
                    let start = Instant::now();
                    while thread::current().id() != caller && start.elapsed() < 20 * SPIN {
                        std::hint::spin_loop();
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for bad in [0, 7, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|i| assert!(i != bad, "piece {bad}"));
            }));
            let payload = caught.unwrap_err();
            let message = payload.downcast_ref::<String>().unwrap();
            assert_eq!(*message, format!("piece {bad}"));
            let sum = AtomicUsize::new(0);
            pool.run(64, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 63 * 32);
        }
    }

    #[test]
    fn a_run_inside_a_run_and_two_callers_at_once_complete() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        let count = |_: usize| {
            sum.fetch_add(1, Ordering::Relaxed);
        };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(4, &|_| pool.run(5, &count));
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 2 * 100 * 4 * 5);
    }
}
