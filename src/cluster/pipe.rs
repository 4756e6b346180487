//! Pipe: what two ranks of a pipeline pass each other in one direction and one order.
//!
//! Invariant: the one sends what the other takes, in the same order, each under its name; whoever finds another one tells
//! all ranks.

use super::link::{Broken, Call, Frame, Lane, Link, Operation};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One end of a pipe.
pub struct Pipe {
    link: Arc<dyn Link>,
    other: usize,
    lane: Lane,
    calls: AtomicU64,
    deadline: Duration,
}

impl Pipe {
    /// An end, to send to `other` or to receive from it.
    pub fn new(link: Arc<dyn Link>, other: usize, lane: Lane, deadline: Duration) -> Pipe {
        Pipe { link, other, lane, calls: AtomicU64::new(0), deadline }
    }

    /// Sends `elements` numbers of `width` bytes; does not wait for the other to take them.
    pub fn send(&self, name: &str, width: usize, bytes: Vec<u8>) -> Result<(), Broken> {
        let call = self.call(name, bytes.len() / width, width);
        let sent = self.link.send(self.other, Frame { lane: self.lane, call, bytes });
        sent.inspect_err(|why| self.link.stop(why))
    }

    /// Takes as many numbers.
    pub fn receive(&self, name: &str, elements: usize, width: usize) -> Result<Vec<u8>, Broken> {
        let call = self.call(name, elements, width);
        let frame = self.link.receive(self.other, self.lane, &call, self.deadline);
        let frame = frame.inspect_err(|why| self.link.stop(why))?;
        if frame.call == call && frame.bytes.len() == elements * width {
            return Ok(frame.bytes);
        }
        let why = Broken::Apart {
            rank: self.link.rank(),
            call: call.to_string(),
            other: self.other,
            theirs: format!("{} with {} bytes", frame.call, frame.bytes.len()),
        };
        self.link.stop(&why);
        Err(why)
    }

    fn call(&self, name: &str, elements: usize, width: usize) -> Call {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        Call { name: name.to_string(), operation: Operation::Pass, number, elements, width }
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::Local;
    use super::*;
    use std::thread;

    #[test]
    fn lanes_keep_their_order_whatever_the_other_does_first() {
        let mut links = Local::new(2).into_iter();
        let [first, second] = [links.next().unwrap(), links.next().unwrap()];
        let pipes = |link: Local, other| {
            let link: Arc<dyn Link> = Arc::new(link);
            let end = |lane| Pipe::new(link.clone(), other, lane, Duration::from_secs(1));
            [end(Lane::Up(1)), end(Lane::Down(0))]
        };
        let [up, down] = pipes(first, 1);
        let [up_taken, down_taken] = pipes(second, 0);
        for i in 0..3 {
            up.send("x", 1, vec![i]).unwrap();
            down.send("dx", 1, vec![10 + i]).unwrap();
        }
        let taken: Vec<u8> = (0..3).map(|_| down_taken.receive("dx", 1, 1).unwrap()[0]).collect();
        assert_eq!(taken, [10, 11, 12]);
        let taken: Vec<u8> = (0..3).map(|_| up_taken.receive("x", 1, 1).unwrap()[0]).collect();
        assert_eq!(taken, [0, 1, 2]);
    }

    #[test]
    fn another_message_than_the_one_waited_for_is_named_on_both_sides() {
        let mut links = Local::new(2).into_iter();
        let [first, second]: [Arc<dyn Link>; 2] =
            [Arc::new(links.next().unwrap()), Arc::new(links.next().unwrap())];
        let second = thread::spawn(move || {
            let pipe = Pipe::new(second, 0, Lane::Up(0), Duration::from_secs(1));
            pipe.send("micro-batch 3", 4, vec![0; 8]).unwrap();
            pipe.receive("nothing", 1, 4).unwrap_err().to_string()
        });
        let pipe = Pipe::new(first, 1, Lane::Up(0), Duration::from_secs(1));
        let here = pipe.receive("micro-batch 2", 2, 4).unwrap_err().to_string();
        let there = second.join().unwrap();
        for words in [&here, &there] {
            assert!(words.contains("micro-batch 3") && words.contains("micro-batch 2"), "{words}");
        }
    }
}
