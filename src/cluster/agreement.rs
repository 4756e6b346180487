//! Agreement: ranks that each did a part of something tell all others how it went, so that all succeed or all fail.
//!
//! A rank that fails alone would leave the others waiting for it in their next call until its deadline, and they would name
//! that call, not what was wrong.
//!
//! Invariant: all ranks get the same outcome, and a failure in the same words.

use super::collective::Group;
use super::link::{Broken, Operation};
use crate::config::Fault;
use anyhow::{Error, Result};

/// The first byte of what a rank tells: it did its part; any other is the exit code of its failure.
const DONE: u8 = 0;

impl Group {
    /// What all ranks tell of their parts, in order of the ranks; or, if some failed, the failure of the first of them.
    pub fn agree(&self, name: &str, own: Result<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        if self.ranks().len() == 1 {
            return own.map(|told| vec![told]);
        }
        let told = match own {
            Ok(told) => [&[DONE], told.as_slice()].concat(),
            // Ranks that are no longer together cannot agree.
            Err(error) if error.is::<Broken>() => return Err(error),
            Err(error) => [&[exit_code(&error)], format!("{error:#}").as_bytes()].concat(),
        };
        let sent = self.send_to_all(name, Operation::AllGather, 0, 1, |_| told.clone())?;
        let all: Vec<Vec<u8>> =
            sent.take()?.into_iter().map(|other| other.unwrap_or_else(|| told.clone())).collect();
        match all.iter().position(|told| told.first() != Some(&DONE)) {
            None => Ok(all.into_iter().map(|told| told[1..].to_vec()).collect()),
            Some(place) => Err(failure(self.ranks()[place], &all[place])),
        }
    }
}

/// The exit code that a failure ends a run with.
fn exit_code(error: &Error) -> u8 {
    error.downcast_ref::<Fault>().map_or(1, |fault| match fault {
        // A rank that was stopped has not failed at its part.
        Fault::Stopped(_) => 1,
        fault => fault.exit_code(),
    })
}

/// A rank's failure as every rank tells it.
fn failure(rank: usize, told: &[u8]) -> Error {
    let (code, why) = told.split_first().unwrap_or((&1, b"told nothing"));
    let why = String::from_utf8_lossy(why).into_owned();
    match code {
        2 => Fault::user(format!("rank {rank}: {why}")),
        4 => Fault::resources(format!("rank {rank}: {why}")),
        code => Error::new(Broken::Failed { rank, why, code: *code }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::Local;
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    /// What each of three ranks learns if rank `r` has `outcome(r)` to tell.
    fn told(outcome: impl Fn(usize) -> Result<Vec<u8>> + Sync) -> Vec<Result<Vec<Vec<u8>>>> {
        thread::scope(|scope| {
            let start = |link: Local| {
                let outcome = &outcome;
                scope.spawn(move || {
                    let deadline = Duration::from_secs(5);
                    let group = Group::new(Arc::new(link), (0..3).collect(), deadline);
                    let first = group.agree("save", outcome(group.own()));
                    // After a failure the ranks are still together.
                    group.barrier("afterwards").unwrap();
                    first
                })
            };
            let threads: Vec<_> = Local::new(3).into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn what_each_tells_is_known_to_all() {
        for all in told(|rank| Ok(vec![rank as u8; rank])) {
            assert_eq!(all.unwrap(), [vec![], vec![1], vec![2, 2]]);
        }
    }

    #[test]
    fn one_failure_is_everybody_s_in_the_same_words_and_with_its_exit_code() {
        let full = |rank| match rank {
            1 => Err(Fault::resources("no room left to write x")),
            2 => Err(Fault::user("a later one")),
            _ => Ok(Vec::new()),
        };
        for outcome in told(full) {
            let error = outcome.unwrap_err();
            assert_eq!(error.to_string(), "rank 1: no room left to write x");
            assert_eq!(error.downcast_ref().map(Fault::exit_code), Some(4));
        }
        let other = |rank| if rank == 2 { Err(anyhow::anyhow!("odd")) } else { Ok(Vec::new()) };
        for outcome in told(other) {
            let error = outcome.unwrap_err();
            let failed = Broken::Failed { rank: 2, why: "odd".to_string(), code: 1 };
            assert_eq!(error.downcast_ref(), Some(&failed));
        }
    }
}
