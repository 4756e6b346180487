//! Local: ranks that are threads of one process.
//!
//! Frames go through channels; nothing is copied. It serves one process with several devices, and the tests of whatever
//! several ranks do.

use super::link::{Broken, Call, Frame, Lane, Link};
use super::progress::Board;
use super::stop::Stop;
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
    stop: Arc<Stop>,
    board: Arc<Board>,
}

impl Local {
    /// Links of so many ranks.
    pub fn new(ranks: usize) -> Vec<Local> {
        let (stop, board) = (Arc::<Stop>::default(), Board::new(ranks));
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
            Local { rank, to, from, early, stop: stop.clone(), board: board.clone() }
        };
        ends.map(rank).collect()
    }

    fn gone(&self, other: usize, call: &Call) -> Broken {
        let found = format!("rank {} was at {call}", self.rank);
        Broken::Gone { rank: self.rank, gone: other, found }
    }

    /// Takes the first frame of a lane out of those that came early.
    fn early(&self, from: usize, lane: Lane) -> Option<Frame> {
        let mut early = self.early[from].lock().unwrap_or_else(|e| e.into_inner());
        let place = early.iter().position(|frame| frame.lane == lane)?;
        early.remove(place)
    }
}

/// The links between devices of one process, which are made anew together after one of them was lost.
pub struct Renewed {
    ends: Mutex<Vec<Arc<Local>>>,
}

impl Renewed {
    /// Links of so many devices.
    pub fn new(devices: usize) -> Arc<Renewed> {
        Arc::new(Renewed { ends: Mutex::new(Renewed::made(devices)) })
    }

    /// A device's end of links that have not stopped: nothing that was sent before a stop comes over them.
    pub fn end(&self, device: usize) -> Arc<Local> {
        let mut ends = self.ends.lock().unwrap_or_else(|e| e.into_inner());
        if ends[device].stopped().is_some() {
            *ends = Renewed::made(ends.len());
        }
        Arc::clone(&ends[device])
    }

    fn made(devices: usize) -> Vec<Arc<Local>> {
        Local::new(devices).into_iter().map(Arc::new).collect()
    }
}

impl Link for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken> {
        self.to[to].send(frame).map_err(|unsent| {
            let call = unsent.into_inner().call;
            // Whoever stops says why before it goes.
            self.stopped().unwrap_or_else(|| self.gone(to, &call))
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
                    return Err(self.stopped().unwrap_or_else(|| self.gone(from, call)));
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
        self.stop.set(why);
    }

    fn stopped(&self) -> Option<Broken> {
        self.stop.why()
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::Operation;
    use super::*;

    #[test]
    fn after_a_stop_all_devices_have_ends_of_one_new_set() {
        let (name, operation) = ("x".to_string(), Operation::Pass);
        let call = Call { name, operation, number: 0, elements: 1, width: 1 };
        let frame = |byte| Frame { lane: Lane::Switch, call: call.clone(), bytes: vec![byte] };
        let links = Renewed::new(2);
        let (first, second) = (links.end(0), links.end(1));
        first.send(1, frame(1)).unwrap();
        second.stop(&Broken::Failed { rank: 1, why: "lost".to_string(), code: 1 });
        assert!(first.stopped().is_some());
        // Whoever is made first, and if it is lost again before the other one is made.
        links.end(1).stop(&Broken::Failed { rank: 1, why: "again".to_string(), code: 1 });
        let (first, second) = (links.end(0), links.end(1));
        assert!(first.stopped().is_none() && second.stopped().is_none());
        first.send(1, frame(2)).unwrap();
        let got = second.receive(0, Lane::Switch, &call, Duration::from_secs(5)).unwrap();
        assert_eq!(got.bytes, [2], "what was sent before the stop is gone");
    }
}
