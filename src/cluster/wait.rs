//! Wait: how long a rank waits for another one, and whom it names in the end.
//!
//! The clock starts again whenever the rank that is waited for has done a piece of work, or, where that one waits itself, the
//! rank at the end of the waits. So a deadline says how long a rank may stand still, not how long its work may take, and
//! who is named is the one that is stuck, not one that waits for it.
//!
//! Invariant: a wait ends at the deadline after the last change of those that are waited for, and the time that news of one takes.

use super::link::{Broken, Call, Frame, Lane, Link};
use super::progress::{Board, Work};
use crate::config::failpoint::failpoint;
use std::time::{Duration, Instant};

/// Longest time between two looks at how far others are.
const LOOK: Duration = Duration::from_millis(100);

/// The next frame of a rank in a lane.
pub(super) fn receive<L: Link + ?Sized>(
    link: &L,
    from: usize,
    lane: Lane,
    call: &Call,
    deadline: Duration,
) -> Result<Frame, Broken> {
    let (rank, board, look) = (link.rank(), link.board(), (deadline / 16).min(LOOK));
    let took = |frame| {
        failpoint(Work::Take.point());
        board.made(rank, Work::Take);
        Ok(frame)
    };
    let mut clock = Clock::new(board, rank, from, deadline);
    // What comes soon is not worth telling that it is waited for.
    if let Some(frame) = link.take(from, lane, call, clock.still.began + look)? {
        return took(frame);
    }
    let told = board.wait_for(rank, from, call.to_string());
    loop {
        if let Some(frame) = link.take(from, lane, call, Instant::now() + look)? {
            // Who has its frame waits no longer, whatever becomes of it.
            drop(told);
            return took(frame);
        }
        if clock.stands_still() {
            return Err(clock.late(call, deadline));
        }
    }
}

/// Since when nothing changed of those that are waited for.
pub(super) struct Stillness {
    pub(super) began: Instant,
    since: Instant,
    looked: Instant,
    longest: Duration,
}

impl Stillness {
    /// From now on; ranks may stand still for `deadline`.
    pub(super) fn new(board: &Board, deadline: Duration) -> Stillness {
        let now = Instant::now();
        Stillness { began: now, since: now, looked: now, longest: board.patience(deadline) }
    }

    /// Whether it has lasted too long, at a look that found a change or not.
    pub(super) fn lasts(&mut self, is_changed: bool) -> bool {
        let now = Instant::now();
        // Whoever was stopped itself has seen nobody meanwhile.
        let was_away = now - self.looked > self.longest / 2;
        if is_changed || was_away {
            self.since = now;
        }
        self.looked = now;
        now - self.since >= self.longest
    }
}

/// How far those are that are waited for.
struct Clock<'a> {
    board: &'a Board,
    rank: usize,
    from: usize,
    /// They and how far they were: the one that is waited for, whom that one waits for, and so on.
    chain: Vec<(usize, u64)>,
    still: Stillness,
}

impl Clock<'_> {
    fn new(board: &Board, rank: usize, from: usize, deadline: Duration) -> Clock<'_> {
        let still = Stillness::new(board, deadline);
        Clock { board, rank, from, chain: chain(board, rank, from), still }
    }

    /// Whether there was no change for too long.
    fn stands_still(&mut self) -> bool {
        let now = chain(self.board, self.rank, self.from);
        let before = std::mem::replace(&mut self.chain, now);
        self.still.lasts(before != self.chain)
    }

    /// Names the one at the end of the waits.
    fn late(&self, call: &Call, deadline: Duration) -> Broken {
        let (missing, _) = *self.chain.last().expect("somebody is waited for");
        let mut call = call.to_string();
        for (between, _) in &self.chain[..self.chain.len() - 1] {
            if let Some(waited) = self.board.waits(*between) {
                call = format!("{call} for rank {between}, which waits in {}", waited.call);
            }
        }
        let (rank, last) = (self.rank, standing(self.board, missing));
        Broken::Late { rank, missing, call, seconds: deadline.as_secs(), last }
    }
}

/// What a rank that stands still is at, for the end of a sentence about it.
pub(super) fn standing(board: &Board, rank: usize) -> String {
    match (board.waits(rank), board.last(rank)) {
        (Some(waited), _) => format!("; it waits in {} for rank {}", waited.call, waited.rank),
        (None, Work::Nothing) => "; it has done nothing yet".to_string(),
        (None, last) => format!("; the last that it did was {last}"),
    }
}

/// Whom `own` waits for, whom that one waits for, and so on, up to one that does not wait, or waits for one of them.
fn chain(board: &Board, own: usize, from: usize) -> Vec<(usize, u64)> {
    let mut chain = vec![(from, board.count(from))];
    while let Some(waited) = board.waits(chain[chain.len() - 1].0)
        && waited.rank != own
        && chain.iter().all(|(rank, _)| *rank != waited.rank)
    {
        chain.push((waited.rank, board.count(waited.rank)));
    }
    chain
}

#[cfg(test)]
mod tests;
