//! Local: ranks that are threads of one process.
//!
//! Frames go through channels; nothing is copied. It serves one process with several devices, and the tests of whatever
//! several ranks do.

use super::link::{Broken, Call, Frame, Lane, Link};
use super::progress::Board;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a wait looks whether another rank has stopped.
const LOOK: Duration = Duration::from_millis(5);

/// A rank of a group of threads.
pub struct Local {
    rank: usize,
    to: Vec<Sender<Frame>>,
    from: Vec<Receiver<Frame>>,
    /// Of each rank, frames that came while another lane's were waited for.
    early: Vec<Mutex<VecDeque<Frame>>>,
    stopped: Arc<Mutex<Option<Broken>>>,
    board: Arc<Board>,
}

impl Local {
    /// Links of so many ranks.
    pub fn new(ranks: usize) -> Vec<Local> {
        let (stopped, board) = (Arc::new(Mutex::new(None)), Board::new(ranks));
        // A channel for each ordered pair.
        let mut senders: Vec<Vec<Sender<Frame>>> = (0..ranks).map(|_| Vec::new()).collect();
        let mut receivers = Vec::new();
        for _ in 0..ranks {
            let (to, from): (Vec<_>, Vec<_>) = (0..ranks).map(|_| unbounded()).unzip();
            to.into_iter().enumerate().for_each(|(rank, to)| senders[rank].push(to));
            receivers.push(from);
        }
        let ends = senders.into_iter().zip(receivers).enumerate();
        let rank = |(rank, (to, from))| {
            let early = (0..ranks).map(|_| Mutex::default()).collect();
            Local { rank, to, from, early, stopped: stopped.clone(), board: board.clone() }
        };
        ends.map(rank).collect()
    }

    /// Takes the first frame of a lane out of those that came early.
    fn early(&self, from: usize, lane: Lane) -> Option<Frame> {
        let mut early = self.early[from].lock().unwrap_or_else(|e| e.into_inner());
        let place = early.iter().position(|frame| frame.lane == lane)?;
        early.remove(place)
    }

    fn stopped(&self) -> Option<Broken> {
        self.stopped.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

impl Link for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken> {
        self.to[to].send(frame).map_err(|unsent| {
            let call = unsent.into_inner().call.to_string();
            // Whoever stops says why before it goes.
            self.stopped().unwrap_or(Broken::Gone { rank: self.rank, gone: to, call })
        })
    }

    fn take(
        &self,
        from: usize,
        lane: Lane,
        call: &Call,
        until: Instant,
    ) -> Result<Option<Frame>, Broken> {
        if let Some(frame) = self.early(from, lane) {
            return Ok(Some(frame));
        }
        loop {
            match self.from[from].recv_deadline(until.min(Instant::now() + LOOK)) {
                Ok(frame) if frame.lane == lane => return Ok(Some(frame)),
                Ok(frame) => {
                    let early = &self.early[from];
                    early.lock().unwrap_or_else(|e| e.into_inner()).push_back(frame);
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let gone = Broken::Gone { rank: self.rank, gone: from, call: call.to_string() };
                    return Err(self.stopped().unwrap_or(gone));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(why) = self.stopped() {
                return Err(why);
            }
            if Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    fn board(&self) -> &Arc<Board> {
        &self.board
    }

    fn stop(&self, why: &Broken) {
        // The first reason is the one that all are told.
        self.stopped.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(why.clone());
    }
}
