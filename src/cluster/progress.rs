//! Progress: that a rank goes on, as those see it who wait for it.
//!
//! A rank counts what it does piece by piece: a layer, a tensor read, a frame taken. Whoever waits for it (`wait`) is patient
//! for as long as the count moves. Threads of one process see each other's counts; processes tell theirs over the control
//! links. The thread that does a rank's work says so once ([`work_for`]), and what it does is counted wherever it is done
//! ([`made`]), which costs an addition. Each kind of work is a failpoint, too.
//!
//! Invariant: a count moves by work that ends, never by waiting.

use crate::config::failpoint::failpoint;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A piece of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// None so far.
    #[default]
    Nothing,
    /// A frame of another rank was taken.
    Take,
    /// A layer's forward pass, of training or scoring.
    Forward,
    /// A layer's backward pass, or a part of it.
    Backward,
    /// A layer's pass of sampling.
    Sample,
    /// A layer's weights were packed.
    Pack,
    /// Some of a tensor was updated.
    Update,
    /// A tensor was drawn, loaded or read.
    Read,
    /// A tensor was written.
    Write,
    /// Some of a file was hashed.
    Hash,
    /// Weights or moments went to the device or away from it.
    Park,
}

/// All kinds, by their number.
const KINDS: [Work; 11] = [
    Work::Nothing,
    Work::Take,
    Work::Forward,
    Work::Backward,
    Work::Sample,
    Work::Pack,
    Work::Update,
    Work::Read,
    Work::Write,
    Work::Hash,
    Work::Park,
];

impl Work {
    /// The failpoint.
    pub fn point(self) -> &'static str {
        match self {
            Work::Nothing => "nothing-done",
            Work::Take => "frame-taken",
            Work::Forward => "layer-forward",
            Work::Backward => "layer-backward",
            Work::Sample => "layer-sampled",
            Work::Pack => "layer-packed",
            Work::Update => "tensor-updated",
            Work::Read => "tensor-read",
            Work::Write => "tensor-written",
            Work::Hash => "piece-hashed",
            Work::Park => "slab-moved",
        }
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Work::Nothing => "nothing",
            Work::Take => "to take a frame",
            Work::Forward => "a layer's forward pass",
            Work::Backward => "a layer's backward pass",
            Work::Sample => "a layer's pass of sampling",
            Work::Pack => "to pack a layer's weights",
            Work::Update => "to update a tensor",
            Work::Read => "to read a tensor",
            Work::Write => "to write a tensor",
            Work::Hash => "to hash a file",
            Work::Park => "to move weights to or from the device",
        })
    }
}

/// A rank that is waited for, and in which call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// Which.
    pub rank: usize,
    /// The call.
    pub call: String,
}

impl Waited {
    /// What the call is for, which is its last word where it is a collective's.
    pub fn purpose(&self) -> &str {
        self.call.split_once(" for ").map_or(&self.call, |(_, name)| name)
    }
}

/// How far a rank is, as it tells others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Pieces of work so far.
    pub count: u64,
    /// The last of them.
    pub last: Work,
    /// For whom it waits, if it has waited for a while.
    pub waits: Option<Waited>,
}

/// How far all ranks are.
pub struct Board {
    ranks: Box<[Progress]>,
    /// Milliseconds until the others hear of what a rank did.
    delay: AtomicU64,
}

#[derive(Default)]
struct Progress {
    count: AtomicU64,
    last: AtomicU8,
    waits: Mutex<Option<(Waited, Instant)>>,
}

impl Board {
    /// So many ranks that have done nothing.
    pub fn new(ranks: usize) -> Arc<Board> {
        let ranks = (0..ranks).map(|_| Progress::default()).collect();
        Arc::new(Board { ranks, delay: AtomicU64::new(0) })
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.ranks.len()
    }

    /// The others hear of what a rank did so much later at most.
    pub fn tells_within(&self, delay: Duration) {
        let whole = delay.as_millis().try_into().unwrap_or(u64::MAX);
        self.delay.store(whole, Ordering::Relaxed);
    }

    /// How long a rank may be seen to stand still that may do so for `deadline`.
    pub fn patience(&self, deadline: Duration) -> Duration {
        deadline.saturating_add(Duration::from_millis(self.delay.load(Ordering::Relaxed)))
    }

    /// Counts a piece of work.
    pub fn made(&self, rank: usize, work: Work) {
        let own = &self.ranks[rank];
        own.last.store(work as u8, Ordering::Relaxed);
        own.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a transfer that ended beside whatever the rank does.
    pub fn moved(&self, rank: usize) {
        self.ranks[rank].count.fetch_add(1, Ordering::Relaxed);
    }

    /// Pieces of work so far.
    pub fn count(&self, rank: usize) -> u64 {
        self.ranks[rank].count.load(Ordering::Relaxed)
    }

    /// The last of them.
    pub fn last(&self, rank: usize) -> Work {
        KINDS[usize::from(self.ranks[rank].last.load(Ordering::Relaxed))]
    }

    /// For whom a rank waits, if it has waited for a while.
    pub fn waits(&self, rank: usize) -> Option<Waited> {
        self.waits_since(rank).map(|(waited, _)| waited)
    }

    /// The same, and since when; of a rank of another process, when it said so.
    pub fn waits_since(&self, rank: usize) -> Option<(Waited, Instant)> {
        self.ranks[rank].waits().clone()
    }

    /// Tells the others for whom a rank waits, until the guard is dropped.
    pub fn wait_for(&self, rank: usize, other: usize, call: String) -> Told<'_> {
        self.ranks[rank].waits().replace((Waited { rank: other, call }, Instant::now()));
        Told(&self.ranks[rank])
    }

    /// How far a rank is.
    pub fn seen(&self, rank: usize) -> Seen {
        Seen { count: self.count(rank), last: self.last(rank), waits: self.waits(rank) }
    }

    /// Notes what a rank of another process told of itself; of a rank that is not there, nothing.
    pub fn note(&self, rank: usize, seen: Seen) {
        let Some(other) = self.ranks.get(rank) else { return };
        other.last.store(seen.last as u8, Ordering::Relaxed);
        other.count.store(seen.count, Ordering::Relaxed);
        let waits = seen.waits.filter(|waited| waited.rank < self.ranks.len());
        *other.waits() = waits.map(|waited| (waited, Instant::now()));
    }
}

/// See [`Board::wait_for`].
pub struct Told<'a>(&'a Progress);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.waits().take();
    }
}

impl Progress {
    fn waits(&self) -> MutexGuard<'_, Option<(Waited, Instant)>> {
        self.waits.lock().unwrap_or_else(|e| e.into_inner())
    }
}

thread_local! {
    static OWN: RefCell<Option<(Arc<Board>, usize)>> = const { RefCell::new(None) };
}

/// What this thread does from now on is work of `rank`.
pub fn work_for(board: &Arc<Board>, rank: usize) {
    OWN.with(|own| own.replace(Some((Arc::clone(board), rank))));
}

/// Work for a thread of its own, which is work of the same rank as this one's.
pub fn beside<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let own = OWN.with(|own| own.borrow().clone());
    move || {
        OWN.with(|here| here.replace(own));
        work()
    }
}

/// Counts a piece of work of the rank that this thread works for, if it works for one.
pub fn made(work: Work) {
    // Before it is counted: what is stuck here has not moved.
    failpoint(work.point());
    OWN.with(|own| {
        if let Some((board, rank)) = &*own.borrow() {
            board.made(*rank, work);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_work_is_at_its_number_and_has_a_point_of_its_own() {
        let points: std::collections::BTreeSet<_> = KINDS.iter().map(|kind| kind.point()).collect();
        assert_eq!(points.len(), KINDS.len());
        for (number, kind) in KINDS.into_iter().enumerate() {
            assert_eq!(kind as usize, number);
        }
    }

    #[test]
    fn what_a_thread_does_is_counted_for_its_rank_and_told_as_it_is() {
        let (board, elsewhere) = (Board::new(3), Board::new(3));
        made(Work::Read);
        work_for(&board, 1);
        made(Work::Forward);
        made(Work::Hash);
        std::thread::spawn(beside(|| made(Work::Hash))).join().unwrap();
        assert_eq!([0, 1, 2].map(|rank| board.count(rank)), [0, 3, 0]);
        let waiting = board.wait_for(1, 2, "a call".to_string());
        elsewhere.note(1, board.seen(1));
        assert_eq!(elsewhere.seen(1), board.seen(1));
        assert_eq!(elsewhere.last(1), Work::Hash);
        let waited = elsewhere.waits(1).unwrap();
        assert_eq!((waited.rank, waited.purpose()), (2, "a call"));
        let call = "call 3, Pass of 8 elements of 4 bytes for tokens for 2 ranks".to_string();
        assert_eq!(Waited { rank: 2, call }.purpose(), "tokens for 2 ranks");
        drop(waiting);
        assert_eq!(board.waits(1), None);
        // What nobody should have told harms nobody.
        elsewhere.note(3, Seen::default());
        let waits = Some(Waited { rank: 9, call: String::new() });
        elsewhere.note(0, Seen { waits, ..Seen::default() });
        assert_eq!(elsewhere.waits(0), None);
    }
}
