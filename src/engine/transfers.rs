//! The channel between a device and what is below it: one thread that makes transfers in the order in which they were asked for.
//!
//! A transfer that finds its item elsewhere than was expected, or no room, is left out: whoever needs the item moves it then.
//! So a run never depends on the thread's pace; only how long the device waits does.
//!
//! Invariants:
//!   * the thread asks the arena for what is at hand and makes nobody give up anything, so that no budget is exceeded
//!   * copies on the host never take more than the host's budget: what has no room there goes to the disk

use super::offload::Slot;
use super::offload_plan::{Bandwidth, Tier};
use super::timeline::Recorder;
use crate::cluster::progress::beside;
use rehearsal_kernels::{Arena, HostMemory, Kind};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes a second that a way is taken to carry before anything was carried.
pub const RATE: f64 = 1e9;
/// Fewer bytes tell nothing of a rate.
const TELLING: u64 = 64 << 10;

/// What the thread is asked to do.
pub(super) enum Job {
    /// Copy an item.
    Write(Arc<Slot>, Tier),
    /// Have items leave, then read one.
    Read(Arc<Slot>, Vec<Arc<Slot>>),
}

/// The channel, and what is known of it.
pub(super) struct Transfers {
    pub arena: Arena,
    /// Folder of the copies.
    pub folder: PathBuf,
    /// Where copies on the host lie.
    pub host: Arc<dyn HostMemory>,
    pub record: Recorder,
    /// Longest that a transfer may take.
    pub deadline: Duration,
    host_budget: u64,
    host_used: Arc<AtomicU64>,
    /// Working memory that the present phase is expected to take: no transfer takes its room.
    reserve: AtomicU64,
    queue: Mutex<Queue>,
    wake: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Bytes a second to and from host and disk, as of late.
    rates: Mutex<[Option<f64>; 4]>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    is_over: bool,
}

/// Room on the host that a copy takes. Dropping it gives the room back.
pub(super) struct HostRoom(Arc<AtomicU64>, u64);

impl Drop for HostRoom {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Transfers {
    /// A channel without a thread: it comes with the first job.
    pub fn new(
        arena: Arena,
        folder: PathBuf,
        host: Arc<dyn HostMemory>,
        host_budget: u64,
        deadline: Duration,
    ) -> Transfers {
        Transfers {
            arena,
            folder,
            host,
            record: Recorder::default(),
            deadline,
            host_budget,
            host_used: Arc::default(),
            reserve: AtomicU64::new(0),
            queue: Mutex::default(),
            wake: Condvar::new(),
            thread: Mutex::default(),
            rates: Mutex::default(),
        }
    }

    /// Asks for a transfer.
    pub fn ask(self: &Arc<Self>, job: Job) {
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let this = self.clone();
            let spawned = std::thread::Builder::new().name("transfers".to_string());
            // A system that starts no thread has the device move everything itself.
            let Ok(spawned) = spawned.spawn(beside(move || this.work())) else { return };
            *thread = Some(spawned);
        }
        lock(&self.queue).jobs.push_back(job);
        self.wake.notify_one();
    }

    /// Forgets what was asked for and is not begun.
    pub fn call_off(&self) {
        for job in std::mem::take(&mut lock(&self.queue).jobs) {
            let (Job::Write(slot, _) | Job::Read(slot, _)) = job;
            slot.forget_asked();
        }
    }

    /// Ends the thread after the transfer that it makes.
    pub fn end(&self) {
        self.call_off();
        lock(&self.queue).is_over = true;
        self.wake.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        lock(&self.queue).is_over = false;
    }

    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let job = loop {
                if queue.is_over {
                    return;
                }
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None => {
                        queue =
                            self.wake.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner())
                    }
                }
            };
            drop(queue);
            match job {
                Job::Write(slot, tier) => slot.write_asked(tier),
                Job::Read(slot, leave) => {
                    for slot in leave {
                        slot.leave_if_copied();
                    }
                    if self.has_room(slot.bytes()) {
                        slot.read_asked();
                    }
                    slot.forget_asked();
                }
            }
        }
    }

    /// Whether an item fits beside what lasts and what the phase is expected to take.
    fn has_room(&self, bytes: u64) -> bool {
        let Some(budget) = self.arena.budget() else { return true };
        let lasting = self.lasting();
        let working = self.arena.in_use().saturating_sub(lasting);
        lasting + working.max(self.reserve.load(Ordering::Relaxed)) + bytes <= budget
    }

    /// Bytes of weights and moments on the device.
    pub fn lasting(&self) -> u64 {
        self.arena.held_by(Kind::Weights) + self.arena.held_by(Kind::Moments)
    }

    /// Keeps so many bytes free of transfers, as working memory.
    pub fn reserve(&self, bytes: u64) {
        self.reserve.store(bytes, Ordering::Relaxed);
    }

    /// Where a copy of so many bytes goes that is wanted in a tier, and the room it takes there.
    pub fn room_below(&self, tier: Tier, bytes: u64) -> (Tier, Option<HostRoom>) {
        let take = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.host_budget);
        let order = Ordering::Relaxed;
        match tier != Tier::Disk && self.host_used.fetch_update(order, order, take).is_ok() {
            true => (Tier::Host, Some(HostRoom(self.host_used.clone(), bytes))),
            false => (Tier::Disk, None),
        }
    }

    /// Learns a rate from a transfer.
    pub fn learn(&self, copy: Tier, is_read: bool, bytes: u64, seconds: f64) {
        if bytes >= TELLING && seconds > 0.0 {
            let rate = &mut lock(&self.rates)[index(copy, is_read)];
            let found = bytes as f64 / seconds;
            *rate = Some(rate.map_or(found, |known| known + 0.3 * (found - known)));
        }
    }

    /// What the ways carry: as measured, or a guess.
    pub fn bandwidth(&self, copy: Tier) -> Bandwidth {
        let rates = lock(&self.rates);
        let rate = |is_read| rates[index(copy, is_read)].unwrap_or(RATE);
        Bandwidth { read: rate(true), write: rate(false) }
    }

    /// Bytes that copies on the host may take.
    pub fn host_budget(&self) -> u64 {
        self.host_budget
    }
}

fn index(copy: Tier, is_read: bool) -> usize {
    2 * usize::from(copy == Tier::Disk) + usize::from(is_read)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
