//! Outbox: what is on its way to a rank over its control link, in the order in which it was put there.
//!
//! Letters are bounded, words are not: of those a rank says no more than why it stops and that it leaves, and these must
//! never be what there is no room for.
//!
//! Invariant: once the outbox is closed nothing goes into it, and nobody waits for it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// Letters on their way to a rank at most.
pub const MOST_LETTERS: usize = 1024;

/// Why a letter is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untaken {
    /// As many as may be are on their way.
    Full,
    /// The link is closed.
    Closed,
}

/// What comes next out of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// What a frame is to carry.
    Carried(Vec<u8>),
    /// Nothing by then.
    Nothing,
    /// Nothing ever again.
    Closed,
}

/// See the module.
#[derive(Default)]
pub struct Outbox {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Vec<u8>>,
    /// Whether what came out last is still being written.
    is_writing: bool,
    is_closed: bool,
}

impl Outbox {
    /// Puts a letter last.
    pub fn letter(&self, carried: Vec<u8>) -> Result<(), Untaken> {
        let mut inner = self.lock();
        match inner.waiting.len() {
            _ if inner.is_closed => return Err(Untaken::Closed),
            MOST_LETTERS.. => return Err(Untaken::Full),
            _ => inner.waiting.push_back(carried),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Puts a word last, whatever is before it.
    pub fn word(&self, carried: Vec<u8>) {
        let mut inner = self.lock();
        if !inner.is_closed {
            inner.waiting.push_back(carried);
            self.changed.notify_all();
        }
    }

    /// Puts a word first: what waits is of less use.
    pub fn word_first(&self, carried: Vec<u8>) {
        let mut inner = self.lock();
        if !inner.is_closed {
            inner.waiting.push_front(carried);
            self.changed.notify_all();
        }
    }

    /// Takes out the next; what was taken out before is written.
    pub fn next(&self, until: Instant) -> Next {
        let mut inner = self.lock();
        inner.is_writing = false;
        self.changed.notify_all();
        loop {
            if inner.is_closed {
                return Next::Closed;
            }
            let left = until.saturating_duration_since(Instant::now());
            // First, so that a sign of life is not put off by what there is to send.
            if left.is_zero() {
                return Next::Nothing;
            }
            if let Some(carried) = inner.waiting.pop_front() {
                inner.is_writing = true;
                return Next::Carried(carried);
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Waits until all of it is written, or will never be.
    pub fn flush(&self, until: Instant) {
        let mut inner = self.lock();
        while (inner.is_writing || !inner.waiting.is_empty()) && !inner.is_closed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Takes nothing any more, and gives nothing out.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    #[test]
    fn words_are_taken_where_there_is_no_room_for_letters() {
        let outbox = Outbox::default();
        (0..MOST_LETTERS).for_each(|_| outbox.letter(vec![1]).unwrap());
        assert_eq!(outbox.letter(vec![1]), Err(Untaken::Full));
        outbox.word(vec![2]);
        outbox.word_first(vec![3]);
        assert_eq!(outbox.next(soon()), Next::Carried(vec![3]));
        (0..MOST_LETTERS).for_each(|_| assert_eq!(outbox.next(soon()), Next::Carried(vec![1])));
        assert_eq!(outbox.next(soon()), Next::Carried(vec![2]));
        assert_eq!(outbox.next(Instant::now()), Next::Nothing);
    }

    #[test]
    fn a_flush_ends_when_all_is_written_or_never_will_be() {
        let outbox = Outbox::default();
        outbox.letter(vec![1]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(outbox.next(soon()), Next::Carried(vec![1]));
                outbox.letter(vec![2]).unwrap();
                assert_eq!(outbox.next(soon()), Next::Carried(vec![2]));
                assert_eq!(outbox.next(Instant::now() + Duration::from_millis(1)), Next::Nothing);
            });
            outbox.flush(soon());
        });
        // What is being written is not written yet.
        outbox.letter(vec![3]).unwrap();
        assert_eq!(outbox.next(soon()), Next::Carried(vec![3]));
        let began = Instant::now();
        outbox.flush(began + Duration::from_millis(50));
        assert!(began.elapsed() >= Duration::from_millis(50));
        outbox.close();
        outbox.flush(soon());
        assert!(began.elapsed() < PATIENCE);
        assert_eq!(
            (outbox.letter(vec![4]), outbox.next(soon())),
            (Err(Untaken::Closed), Next::Closed)
        );
    }
}
