//! Mail: what processes of one run ask of each other, over their control links.
//!
//! Rank 0 gives every other rank jobs; these answer with groups, an outcome, their pulse, and signals that they got. Outlives the
//! actors on both sides, so that a restarted one goes on with what is open. Knows no device.
//!
//! Invariants:
//!   * a reply goes to the request whose number it bears, or nowhere
//!   * what is open on either side is bounded; a process that asks for more is refused
//!   * once the ranks stop, every wait here ends with their words

use super::contents::{Failure, FailureKind, Outcome, Pulse, Wait};
use super::crew::{Job, Yield};
use super::messages::WorkId;
use super::port::Desk;
use crate::cluster::wire::{decode, encode};
use crate::cluster::{Broken, Control, Letter};
use crate::engine::phase::TokenGroup;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, watch};

/// Replies to one request that may wait to be read. A rank's groups are fewer than the prompts of a step.
const MOST_REPLIES: usize = 1 << 16;

/// What a letter holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Parcel {
    /// Rank 0: do this.
    Do {
        /// Id of the work, the same on all ranks.
        id: WorkId,
        /// The job.
        job: Box<Job>,
    },
    /// Rank 0: the run is over.
    End {
        /// How.
        outcome: Outcome,
    },
    /// A group is finished, while others are being sampled.
    Group {
        /// The group.
        group: TokenGroup,
    },
    /// The job is done.
    Done {
        /// What it gave.
        outcome: Result<Yield, Failure>,
    },
    /// How the worker there is.
    Pulse {
        /// Its pulse.
        pulse: Pulse,
    },
    /// The process got a signal.
    Signal {
        /// Its number.
        number: i32,
    },
}

/// A job that another process is asked for: its number, and the replies.
pub struct Asked {
    mail: Arc<Mail>,
    number: u64,
    /// Groups, then the outcome.
    pub replies: mpsc::Receiver<Parcel>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.mail.lock().asked.remove(&self.number);
    }
}

/// The mail of one process.
pub struct Mail {
    control: Arc<Control>,
    /// Requests that may be open on a rank.
    most_open: usize,
    inner: Mutex<Inner>,
    next: AtomicU64,
    broken: watch::Receiver<Option<Broken>>,
    /// Something new is open, or the run is over.
    pub arrived: Notify,
}

#[derive(Default)]
struct Inner {
    /// Rank 0: who waits for which replies.
    asked: HashMap<u64, mpsc::Sender<Parcel>>,
    /// Rank 0: a desk that shows each other rank's worker.
    mirrors: BTreeMap<usize, Arc<Desk>>,
    /// Rank 0: set by a signal of any rank.
    stop: Option<Arc<AtomicI32>>,
    /// Others: what is asked and not answered.
    open: BTreeMap<u64, (WorkId, Job)>,
    /// Others: how the run ended.
    ended: Option<Outcome>,
}

impl Mail {
    /// The mail over these links, with so many requests open at a rank at most.
    pub fn new(control: Arc<Control>, most_open: usize) -> Arc<Mail> {
        let (tell, broken) = watch::channel(None);
        control.stop().on_stop(move |why| drop(tell.send_replace(Some(why.clone()))));
        let mail = Arc::new(Mail {
            control,
            most_open,
            inner: Mutex::default(),
            next: AtomicU64::new(1),
            broken,
            arrived: Notify::new(),
        });
        // The links are held by the mail: it must not hold itself through them.
        let reader = Arc::downgrade(&mail);
        mail.control.listen(move |from, letter| match reader.upgrade() {
            Some(mail) => mail.take(from, &letter),
            None => Ok(()),
        });
        mail
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.control.rank()
    }

    /// The other ranks and how they are called.
    pub fn others(&self) -> impl Iterator<Item = (usize, &str)> {
        self.control.peers()
    }

    /// For whom this rank's device waits, if it has waited for a while.
    pub fn awaits(&self) -> Option<Wait> {
        let (waited, since) = self.control.waits()?;
        let (actor, message) = (format!("rank {}", waited.rank), waited.purpose().to_string());
        Some(Wait { actor, message, seconds: since.elapsed().as_secs_f64() })
    }

    /// Shows each other rank's worker on a desk, and tells signals of any rank to `stop`.
    pub fn show(&self, mirrors: BTreeMap<usize, Arc<Desk>>, stop: &Arc<AtomicI32>) {
        let mut inner = self.lock();
        (inner.mirrors, inner.stop) = (mirrors, Some(Arc::clone(stop)));
    }

    /// Asks a rank for a job.
    pub fn ask(self: &Arc<Mail>, rank: usize, id: WorkId, job: Job) -> Result<Asked, Failure> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, replies) = mpsc::channel(MOST_REPLIES);
        self.lock().asked.insert(number, sender);
        let asked = Asked { mail: Arc::clone(self), number, replies };
        self.send(rank, number, &Parcel::Do { id, job: Box::new(job) })?;
        Ok(asked)
    }

    /// Sends a parcel to a rank.
    pub fn send(&self, to: usize, number: u64, parcel: &Parcel) -> Result<(), Failure> {
        let letter = Letter { correlation: number, body: encode(parcel) };
        self.control.send(to, &letter).map_err(Failure::from)
    }

    /// What is asked of this rank and not answered.
    pub fn open(&self) -> Vec<(u64, WorkId, Job)> {
        let inner = self.lock();
        inner.open.iter().map(|(number, (id, job))| (*number, *id, job.clone())).collect()
    }

    /// Answers a request.
    pub fn answer(&self, number: u64, outcome: Result<Yield, Failure>) -> Result<(), Failure> {
        self.lock().open.remove(&number);
        self.send(0, number, &Parcel::Done { outcome })
    }

    /// How the run ended, if rank 0 has said so.
    pub fn ended(&self) -> Option<Outcome> {
        self.lock().ended.clone()
    }

    /// Why the ranks stop, if they do.
    pub fn why(&self) -> Option<Broken> {
        self.broken.borrow().clone()
    }

    /// The same, once they do.
    pub async fn broken(&self) -> Broken {
        let mut broken = self.broken.clone();
        let why = broken.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        match why {
            Some(why) => why,
            None => std::future::pending().await,
        }
    }

    /// Stops all ranks because this one, or `rank`, could not do its part.
    pub fn fail(&self, rank: usize, failure: &Failure) {
        let code = match failure.kind {
            FailureKind::User => 2,
            FailureKind::Resources => 4,
            _ => 1,
        };
        // What all ranks were told of one of them has its name already, whoever passes it on.
        let (rank, why) = whose(&failure.text).unwrap_or((rank, &failure.text));
        self.control.stop().set(&Broken::Failed { rank, why: why.to_string(), code });
    }

    /// Tells all ranks how the run ended, and takes leave of them.
    pub fn part(&self, outcome: &Outcome) {
        if let Outcome::Failed(failure) = outcome {
            self.fail(self.rank(), failure);
        } else if self.rank() == 0 {
            let parcel = Parcel::End { outcome: outcome.clone() };
            for (rank, _) in self.others() {
                if let Err(failure) = self.send(rank, 0, &parcel) {
                    self.fail(0, &failure);
                }
            }
        }
        if self.control.stop().why().is_none() {
            self.control.leave();
        }
        self.control.flush();
    }

    /// Takes a letter; on the thread that reads, so that nothing here waits.
    fn take(&self, from: usize, letter: &Letter) -> Result<(), String> {
        let parcel: Parcel = decode(&letter.body).map_err(|error| error.to_string())?;
        let mut inner = self.lock();
        match parcel {
            Parcel::Do { id, job } => {
                if inner.open.len() >= self.most_open {
                    return Err(format!("more than {} requests at once", self.most_open));
                }
                inner.open.insert(letter.correlation, (id, *job));
                self.arrived.notify_one();
            }
            Parcel::End { outcome } => {
                inner.ended = Some(outcome);
                self.arrived.notify_one();
            }
            Parcel::Pulse { pulse } => {
                if let Some(desk) = inner.mirrors.get(&from) {
                    desk.mirror(pulse);
                }
            }
            Parcel::Signal { number } => {
                let stop = inner.stop.clone();
                drop(inner);
                if let Some(stop) = stop {
                    let _ = stop.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
                }
            }
            reply @ (Parcel::Group { .. } | Parcel::Done { .. }) => {
                let waiter = inner.asked.get(&letter.correlation).cloned();
                drop(inner);
                // Whoever asked may have been given up meanwhile.
                let Some(waiter) = waiter else { return Ok(()) };
                if let Err(mpsc::error::TrySendError::Full(_)) = waiter.try_send(reply) {
                    return Err(format!("more than {MOST_REPLIES} replies to one request"));
                }
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("lists are only read and changed")
    }
}

/// The rank that a failure's text begins with, and the rest.
pub(super) fn whose(text: &str) -> Option<(usize, &str)> {
    let (rank, why) = text.strip_prefix("rank ")?.split_once(": ")?;
    Some((rank.parse().ok()?, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_of_the_rank_that_it_names() {
        assert_eq!(whose("rank 12: no room left: x"), Some((12, "no room left: x")));
        for text in ["no room left: x", "rank 1 is gone: x", "rank of 4: x", "rank 3"] {
            assert_eq!(whose(text), None, "{text}");
        }
    }
}
