//! Presence: which processes of a run have started, while nothing connects them yet.
//!
//! MPI starts on all processes or on none, and whoever waits for it does not learn for whom. But all of them see the run's folder
//! under the same path: each keeps a small file beside it, and writes it anew until MPI is up. Who waits in vain tells
//! whose file is missing, or stands still.
//!
//! Invariants:
//!   * no file outlives a start that succeeds, and a failed one's are neither believed nor kept by the next
//!   * where no file can be written nobody is named, and nothing else changes

use anyhow::{Error, anyhow};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Files are written anew so many times before the deadline, but as often as this at least.
const BEATS: u32 = 8;
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// Whose file is the same for so many beats stands still; a busy machine may hold up one or two.
const STILL: u32 = 4;

/// Ranks that are named one by one.
const NAMED: usize = 8;

/// Words of a file whose process has said why it ends.
const ENDED: &str = "ended";

/// One rank's file, kept up.
pub struct Presence {
    files: Files,
    deadline: Duration,
    began: Instant,
    /// Dropped to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Where the files of all ranks are.
#[derive(Clone)]
struct Files {
    folder: PathBuf,
    rank: usize,
    ranks: usize,
    /// What the launcher calls this start; another start's files tell nothing.
    job: String,
    name: String,
}

impl Presence {
    /// Tells the others that this rank is there, from now on. The launcher calls the start `job`; this process is `name`.
    pub fn begin(
        out: &Path,
        [rank, ranks]: [usize; 2],
        deadline: Duration,
        [job, name]: [String; 2],
    ) -> Presence {
        let files = Files { folder: folder_of(out), rank, ranks, job, name };
        let (end, ended) = channel();
        let kept = files.clone();
        let keep = move || {
            for beat in 0_u64.. {
                // Who cannot write is not seen, and tells of it when that matters.
                kept.write(&beat.to_string()).unwrap_or_default();
                let wait = ended.recv_timeout(beat_of(deadline));
                if !matches!(wait, Err(RecvTimeoutError::Timeout)) {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("presence".to_string()).spawn(keep).ok();
        Presence { files, deadline, began: Instant::now(), end: Some(end), thread }
    }

    /// Tells no more: MPI has started. Files go with [`clear`].
    pub fn end(mut self) {
        self.stop();
    }

    /// Why MPI has not started, with who is missing if that took until the deadline.
    pub fn explain(mut self, why: String) -> Error {
        if self.began.elapsed() < self.deadline {
            self.stop();
            return anyhow!(why);
        }
        let before = self.files.read();
        std::thread::sleep(beat_of(self.deadline) * STILL);
        let said = self.files.missing(&before, &self.files.read());
        self.stop();
        self.files.leave();
        let seconds = self.deadline.as_secs();
        anyhow!(
            "{why}: {said}, and give the same command again (cluster.deadline_seconds is {seconds})"
        )
    }

    fn stop(&mut self) {
        drop(self.end.take());
        // Nothing in it panics; a lost thread is as good as an ended one.
        self.thread.take().map(JoinHandle::join).transpose().unwrap_or_default();
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes away what is left of all starts; rank 0 does once all are connected.
pub fn clear(out: &Path) {
    // It may never have been there.
    std::fs::remove_dir_all(folder_of(out)).unwrap_or_default();
}

/// Where the files of a run in the folder `out` are.
fn folder_of(out: &Path) -> PathBuf {
    let stem = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{stem}.starting"))
}

fn beat_of(deadline: Duration) -> Duration {
    (deadline / BEATS).min(LONGEST_BEAT)
}

impl Files {
    fn path(&self, rank: usize) -> PathBuf {
        self.folder.join(format!("rank-{rank}"))
    }

    fn write(&self, state: &str) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let fresh = self.path(self.rank).with_extension("new");
        std::fs::write(&fresh, format!("{}\n{state}\n{}\n", self.job, self.name))?;
        std::fs::rename(fresh, self.path(self.rank))
    }

    /// State and name of each rank that has a file of this start.
    fn read(&self) -> Vec<Option<[String; 2]>> {
        let of = |rank| {
            let text = std::fs::read_to_string(self.path(rank)).ok()?;
            let mut lines = text.lines().map(str::to_string);
            let job = lines.next()?;
            (job == self.job).then_some([lines.next()?, lines.next()?])
        };
        (0..self.ranks).map(of).collect()
    }

    /// Who is missing by two looks, and what to do about it.
    fn missing(&self, before: &[Option<[String; 2]>], now: &[Option<[String; 2]>]) -> String {
        if now[self.rank].is_none() {
            let folder = self.folder.display();
            return format!(
                "which one cannot be told, for {folder} cannot be written; look at all hosts"
            );
        }
        let is_missing = |rank: &usize| match (&before[*rank], &now[*rank]) {
            (Some([before, _]), Some([now, _])) => before == now && now != ENDED,
            (_, now) => now.is_none(),
        };
        let missing: Vec<usize> = (0..self.ranks).filter(is_missing).collect();
        if missing.is_empty() {
            return format!(
                "all {} processes have started, but MPI does not connect them; see that their hosts reach each other over \
                 a network that MPI uses (Open MPI: --mca btl_tcp_if_include)",
                self.ranks
            );
        }
        let named = missing.iter().take(NAMED).map(|rank| match &now[*rank] {
            Some([_, name]) => format!("rank {rank}, {name}, stands still"),
            None => format!("rank {rank} has not started"),
        });
        let mut named: Vec<String> = named.collect();
        if missing.len() > NAMED {
            named.push(format!("{} more have not", missing.len() - NAMED));
        }
        format!("{}; see that its host answers and starts programs", named.join(", "))
    }

    /// Says that this rank has told why it ends, and takes the files away if it is the last one.
    fn leave(&self) {
        let told = self.write(ENDED);
        let mut others = self.read().into_iter().flatten();
        if told.is_ok() && others.all(|[state, _]| state == ENDED) {
            // The next start would take them away, too.
            std::fs::remove_dir_all(&self.folder).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(800);

    fn begin(out: &Path, rank: usize, job: &str) -> Presence {
        let words = [job.to_string(), format!("process {} on there", 100 + rank)];
        let mut presence = Presence::begin(out, [rank, 4], DEADLINE, words);
        // It has waited already.
        presence.began -= DEADLINE;
        presence
    }

    #[test]
    fn who_has_not_started_or_stands_still_is_named_and_no_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let [own, other] = [0, 1].map(|rank| begin(&out, rank, "job"));
        // Rank 2 stopped after its first file; rank 3 has one of another start.
        begin(&out, 2, "job").end();
        begin(&out, 3, "earlier").end();
        let text = own.explain("MPI has not started".to_string()).to_string();
        assert!(
            text.starts_with(
                "MPI has not started: rank 2, process 102 on there, stands still, rank 3 has not started; see that its host"
            ),
            "{text}"
        );
        assert!(!text.contains("rank 1"), "{text}");
        // Who ends later does not name who has said why it ended.
        let text = other.explain("MPI has not started".to_string()).to_string();
        assert!(text.contains(": rank 2") && !text.contains("rank 0"), "{text}");
        clear(&out);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn where_all_have_started_it_is_the_network_and_where_nothing_is_written_nobody_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let all = [0, 1, 2, 3].map(|rank| begin(&out, rank, "job"));
        for one in all {
            let text = one.explain("MPI has not started".to_string()).to_string();
            assert!(text.contains("all 4 processes have started, but MPI does not"), "{text}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the last took them away");
        std::fs::write(folder.path().join(".run.starting"), "a file").unwrap();
        let alone = begin(&out, 1, "job");
        let text = alone.explain("MPI has not started".to_string()).to_string();
        assert!(
            text.contains("which one cannot be told") && text.contains(".run.starting"),
            "{text}"
        );
    }

    #[test]
    fn another_reason_is_told_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut one = begin(&folder.path().join("run"), 0, "job");
        one.began = Instant::now();
        assert_eq!(one.explain("no library".to_string()).to_string(), "no library");
    }
}
