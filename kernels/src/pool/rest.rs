//! Rest: when a worker of the pool is in the caller's way, and what it then does.
//!
//! Where others keep the cores busy, a worker that is woken on the caller's core runs instead of the caller, and does so
//! again at every job. It moves to another core, or rests if it may use no other; while it rests nobody wakes it. Knows no
//! gate and no job.
//!
//! Invariants:
//!   * rests in a row double up to a bound, so that a core that comes free is found soon
//!   * where a thread may run is in the end what it was

use std::time::Duration;

/// The first rest of a worker that has no core but the caller's: a turn of somebody else, at 250 turns a second.
const FIRST: Duration = Duration::from_millis(4);

/// The longest rest of such a worker, to which an attempt costs some microseconds.
const LONGEST: Duration = Duration::from_millis(32);

/// What a worker remembers of having been in the way.
#[derive(Default)]
pub(super) struct Rest {
    /// Rests in a row for want of a core.
    crowded: u32,
}

impl Rest {
    /// How long to rest after being woken, by whether there was no core but the caller's.
    pub fn woken(&mut self, crowded_now: bool) -> Option<Duration> {
        let crowded = std::mem::take(&mut self.crowded);
        if !crowded_now {
            return None;
        }
        self.crowded = crowded + 1;
        Some((FIRST * (1 << crowded.min(8))).min(LONGEST))
    }
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
        let mut rest = Rest::default();
        let rests: Vec<_> = (0..6).map(|_| rest.woken(true)).collect();
        assert_eq!(rests, [4, 8, 16, 32, 32, 32].map(|ms| Some(ms * MS)));
        assert_eq!(rest.woken(false), None);
        assert_eq!(rest.woken(true), Some(4 * MS), "a core of its own begins anew");
        let rests: Vec<_> = (0..100).filter_map(|_| rest.woken(true)).collect();
        assert!(rests.len() == 100 && rests.iter().all(|&rest| rest <= 32 * MS));
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
}
