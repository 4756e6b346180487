//! Rest: when a worker of the pool is in the caller's way, and how long it then stays away.
//!
//! Where others keep the cores busy, a further thread can cost more than it gives. A worker that is woken on the
//! caller's core runs instead of the caller, and does so again at every job; it moves to another core, or rests if it may
//! use no other. One that the system puts aside in the middle of a piece keeps the caller waiting for somebody else's turn;
//! it rests if that happens often. While it rests nobody wakes it, and the system has a core for each of the others. Knows no gate and no job, and takes the time as an argument.
//!
//! Invariants:
//!   * a piece that is long because there is much to do is no hold-up: only what the system made the thread wait counts
//!   * rests in a row double up to a bound, so that what they answer stays a small share of the time, and a core that
//!     comes free is found soon

use std::fs::File;
use std::time::{Duration, Instant};

/// The first rest of a worker that has no core but the caller's: a turn of somebody else, at 250 turns a second.
const FIRST: Duration = Duration::from_millis(4);

/// The longest rest of such a worker, to which an attempt costs some microseconds.
const LONGEST_CROWDED: Duration = Duration::from_millis(32);

/// The shortest time in a job that is looked at.
const HOLD_UP: Duration = Duration::from_micros(200);

/// How many times what a hold-up took the first rest after it lasts.
const FACTOR: u32 = 8;

/// A hold-up after more than so many times its own length of good work is not answered with a rest.
const GOOD: u32 = 8;

/// The longest rest after a hold-up, where an attempt can cost another one.
const LONGEST_HELD: Duration = Duration::from_millis(256);

/// What a worker remembers of having been in the way.
pub(super) struct Rest {
    /// Rests in a row for want of a core.
    crowded: u32,
    /// Rests in a row for holding the caller up.
    held: u32,
    /// When it last came back from a rest or held the caller up.
    since: Instant,
}

impl Rest {
    pub fn new(now: Instant) -> Rest {
        Rest { crowded: 0, held: 0, since: now }
    }

    /// How long to rest after being woken, by whether there was no core but the caller's.
    pub fn woken(&mut self, crowded_now: bool) -> Option<Duration> {
        let crowded = std::mem::take(&mut self.crowded);
        if !crowded_now {
            return None;
        }
        self.crowded = crowded + 1;
        Some((FIRST * (1 << crowded.min(8))).min(LONGEST_CROWDED))
    }

    /// How long to rest after a job that the caller slept for, `inside` in all; `waited` tells for how much of it the
    /// system let this thread wait.
    pub fn kept_the_caller(
        &mut self,
        now: Instant,
        inside: Duration,
        waited: impl FnOnce() -> Duration,
    ) -> Option<Duration> {
        if inside < HOLD_UP {
            return None;
        }
        let lost = waited().min(inside);
        if 2 * lost < inside {
            return None;
        }
        let good = now.saturating_duration_since(self.since);
        self.since = now;
        if good > GOOD * lost {
            self.held = 0;
            return None;
        }
        self.held += 1;
        Some((lost * (FACTOR << (self.held - 1).min(8))).min(LONGEST_HELD))
    }

    /// The rest is over.
    pub fn over(&mut self, now: Instant) {
        self.since = now;
    }
}

/// How long the system let this thread wait for a core although it could have gone on.
pub(super) struct Waits {
    /// Absent where the system does not tell; then there are no hold-ups.
    file: Option<File>,
    seen: Duration,
}

impl Waits {
    pub fn of_this_thread() -> Waits {
        let mut waits =
            Waits { file: File::open("/proc/thread-self/schedstat").ok(), seen: Duration::ZERO };
        waits.since_last();
        waits
    }

    /// What came since this was last called.
    pub fn since_last(&mut self) -> Duration {
        let all = self.all().unwrap_or(self.seen);
        let since = all.saturating_sub(self.seen);
        self.seen = all;
        since
    }

    #[cfg(unix)]
    fn all(&self) -> Option<Duration> {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 80];
        let length = self.file.as_ref()?.read_at(&mut bytes, 0).ok()?;
        waited(std::str::from_utf8(&bytes[..length]).ok()?)
    }

    #[cfg(not(unix))]
    fn all(&self) -> Option<Duration> {
        None
    }
}

/// The second number of a `schedstat`, in nanoseconds (Documentation/scheduler/sched-stats.rst of Linux).
fn waited(text: &str) -> Option<Duration> {
    text.split(' ').nth(1)?.parse().ok().map(Duration::from_nanos)
}

/// The core that this thread is on, some nanoseconds ago; None where the system does not tell.
#[cfg(target_os = "linux")]
pub(super) fn core() -> Option<usize> {
    unsafe extern "C" {
        // Of the C library, which the standard library is linked with.
        safe fn sched_getcpu() -> std::ffi::c_int;
    }
    usize::try_from(sched_getcpu()).ok()
}

/// Moves this thread to another core, if it may run on one.
#[cfg(target_os = "linux")]
pub(super) fn leave(core: usize) -> bool {
    use std::ffi::{c_int, c_ulong};
    type Cores = [c_ulong; 16];
    const BITS: usize = c_ulong::BITS as usize;
    unsafe extern "C" {
        // Of the C library, as above; 0 is the calling thread.
        unsafe fn sched_getaffinity(thread: c_int, bytes: usize, cores: *mut Cores) -> c_int;
        unsafe fn sched_setaffinity(thread: c_int, bytes: usize, cores: *const Cores) -> c_int;
    }
    let bytes = size_of::<Cores>();
    let mut all: Cores = [0; 16];
    // SAFETY: `all` has so many bytes.
    if core >= BITS * all.len() || unsafe { sched_getaffinity(0, bytes, &mut all) } != 0 {
        return false;
    }
    let mut others = all;
    others[core / BITS] &= !(1 << (core % BITS));
    // The system moves us at once; then we may be anywhere again.
    // SAFETY: both have so many bytes.
    others != [0; 16]
        && unsafe { sched_setaffinity(0, bytes, &others) } == 0
        && unsafe { sched_setaffinity(0, bytes, &all) } == 0
}

#[cfg(not(target_os = "linux"))]
pub(super) fn leave(_core: usize) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
pub(super) fn core() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn without_a_core_rests_double_until_there_is_one() {
        let mut rest = Rest::new(Instant::now());
        let rests: Vec<_> = (0..6).map(|_| rest.woken(true)).collect();
        assert_eq!(rests, [4, 8, 16, 32, 32, 32].map(|ms| Some(ms * MS)));
        assert_eq!(rest.woken(false), None);
        assert_eq!(rest.woken(true), Some(4 * MS), "a core of its own begins anew");
        let rests: Vec<_> = (0..100).filter_map(|_| rest.woken(true)).collect();
        assert!(rests.len() == 100 && rests.iter().all(|&rest| rest <= 32 * MS));
    }

    #[test]
    fn rests_follow_hold_ups_that_come_soon_and_grow_with_them() {
        let mut now = Instant::now();
        let mut rest = Rest::new(now);
        let mut after = |good: Duration, lost: Duration| {
            now += good + lost;
            let pause = rest.kept_the_caller(now, lost, || lost);
            now += pause.unwrap_or_default();
            if pause.is_some() {
                rest.over(now);
            }
            pause
        };
        // The first after long good work is let pass; those that follow soon are not.
        assert_eq!(after(100 * MS, 4 * MS), None);
        assert_eq!(after(10 * MS, 4 * MS), Some(32 * MS));
        assert_eq!(after(10 * MS, 4 * MS), Some(64 * MS));
        assert_eq!(after(10 * MS, 4 * MS), Some(128 * MS));
        assert_eq!(after(10 * MS, 4 * MS), Some(256 * MS));
        assert_eq!(after(10 * MS, 4 * MS), Some(256 * MS), "no rest is longer");
        // A rest is no good work; good work begins anew.
        assert_eq!(after(70 * MS, 4 * MS), None);
        assert_eq!(after(10 * MS, 4 * MS), Some(32 * MS));
        assert_eq!(after(MS, MS / 2), Some(8 * MS), "by what was lost");
    }

    #[test]
    fn a_long_piece_and_a_short_wait_are_no_hold_ups() {
        let now = Instant::now();
        let mut rest = Rest::new(now);
        // Ten milliseconds of work, of which the system took four.
        assert_eq!(rest.kept_the_caller(now, 10 * MS, || 4 * MS), None);
        assert_eq!(rest.kept_the_caller(now, 10 * MS, || Duration::ZERO), None);
        // What is short is not even looked at.
        assert_eq!(rest.kept_the_caller(now, MS / 10, || unreachable!("looked")), None);
        // Waiting before the job began does not make the loss longer than the job.
        assert_eq!(rest.kept_the_caller(now, MS, || 50 * MS), Some(8 * MS));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_leaves_its_core_and_may_come_back_to_it() {
        let cores = || std::thread::available_parallelism().unwrap().get();
        let before = cores();
        // The system may bring it back at any moment, but hardly each time.
        let leaves = || {
            let was = core().unwrap();
            leave(was) && core() != Some(was)
        };
        assert_eq!((0..100).any(|_| leaves()), before > 1);
        assert_eq!(cores(), before);
    }

    #[test]
    fn what_a_thread_waited_is_the_second_number() {
        assert_eq!(waited("37156 4200000 9\n"), Some(42 * MS / 10));
        assert_eq!(waited("0 0 0\n"), Some(Duration::ZERO));
        assert_eq!(waited("37156"), None);
    }
}
