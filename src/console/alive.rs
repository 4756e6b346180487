//! Alive: whether the process of a run lives, as far as it can be told from here.

use super::board::{BOARD_FILE, LOCK_FILE};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, test_kill_process};
use std::fs::File;
use std::path::Path;
use std::time::Duration;

/// The board is written twice a second. Where nobody did for so long, nobody will.
const SILENCE: Duration = Duration::from_secs(60);

/// This host.
pub(super) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// True if the run's process lives: there is one of its number, and somebody holds the run's lock.
/// The lock is only tried if that number exists, so that a look at a dead run can never stand in
/// the way of one that starts. Of a process on another host only what it writes is seen.
pub(super) fn is_alive(run_dir: &Path, pid: u32, its_host: &str) -> bool {
    if !its_host.is_empty() && its_host != host() {
        let written = std::fs::metadata(run_dir.join(BOARD_FILE)).and_then(|file| file.modified());
        // The clock of a shared disk may be ahead.
        return written.is_ok_and(|at| at.elapsed().map_or(true, |age| age < SILENCE));
    }
    let exists = i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| {
        // A process of another user may not be signalled, but it exists.
        test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
    });
    if exists == Some(false) {
        return false;
    }
    let Ok(lock) = File::open(run_dir.join(LOCK_FILE)) else { return false };
    flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
}
