//! A member of the staff: one actor's seat, the factory of its next holder, and the times of its
//! restarts.
//!
//! Knows no actor by type; the supervisor holds members of every kind behind [`Staff`].
//!
//! Invariant: a seat gets at most `restarts` new holders within `window`; then its member is given
//! up.

use super::messages::{AskStatus, Failure, Halt};
use super::port::{Desk, Port, Seat};
use super::post::Post;
use actix::{Actor, ArbiterHandle, Context, Handler};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an actor may be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intensity {
    /// Restarts at most ...
    pub restarts: usize,
    /// ... within this time.
    pub window: Duration,
}

/// A member, whatever its actor.
pub trait Staff {
    /// Its name.
    fn name(&self) -> &str;
    /// Puts a new actor on the seat.
    fn begin(&mut self, post: &dyn Fn(&Arc<Desk>, u64) -> Post);
    /// True if one more restart is allowed at `now`; it is then counted.
    fn may_restart(&mut self, now: Instant) -> bool;
    /// Number of the present holder.
    fn generation(&self) -> u64;
    /// True unless the holder's mailbox is closed.
    fn is_alive(&self) -> bool;
    /// Nobody will hold the seat again.
    fn close(&self, why: Failure);
    /// A port to stop the holder.
    fn halt(&self) -> Port<Halt>;
    /// A port to ask how the holder is.
    fn status(&self) -> Port<AskStatus>;
    /// What can be seen of it.
    fn desk(&self) -> &Arc<Desk>;
}

/// One actor's seat, and how its holders are made.
pub struct Member<A: Actor> {
    seat: Seat<A>,
    make: Arc<dyn Fn(Post) -> A + Send + Sync>,
    arbiter: ArbiterHandle,
    mailbox: usize,
    intensity: Intensity,
    restarts: VecDeque<Instant>,
    supervisor: Arc<Desk>,
}

impl<A> Member<A>
where
    A: Actor<Context = Context<A>> + Handler<Halt> + Handler<AskStatus>,
{
    /// A member whose holders `make` makes and `arbiter` runs.
    pub fn new(
        seat: &Seat<A>,
        arbiter: &ArbiterHandle,
        mailbox: usize,
        intensity: Intensity,
        supervisor: &Arc<Desk>,
        make: impl Fn(Post) -> A + Send + Sync + 'static,
    ) -> Box<Member<A>> {
        Box::new(Member {
            seat: seat.clone(),
            make: Arc::new(make),
            arbiter: arbiter.clone(),
            mailbox,
            intensity,
            restarts: VecDeque::new(),
            supervisor: Arc::clone(supervisor),
        })
    }
}

impl<A> Staff for Member<A>
where
    A: Actor<Context = Context<A>> + Handler<Halt> + Handler<AskStatus>,
{
    fn name(&self) -> &str {
        self.seat.desk().name()
    }

    fn begin(&mut self, post: &dyn Fn(&Arc<Desk>, u64) -> Post) {
        let generation = self.seat.generation() + 1;
        if generation > 1 {
            self.seat.desk().restarted();
        }
        let (make, mailbox, post) =
            (Arc::clone(&self.make), self.mailbox, post(self.seat.desk(), generation));
        let address = A::start_in_arbiter(&self.arbiter, move |context| {
            context.set_mailbox_capacity(mailbox);
            make(post)
        });
        self.seat.point(address);
    }

    fn may_restart(&mut self, now: Instant) -> bool {
        while self
            .restarts
            .front()
            .is_some_and(|first| now.duration_since(*first) > self.intensity.window)
        {
            self.restarts.pop_front();
        }
        let allowed = self.restarts.len() < self.intensity.restarts;
        if allowed {
            self.restarts.push_back(now);
        }
        allowed
    }

    fn generation(&self) -> u64 {
        self.seat.generation()
    }

    fn is_alive(&self) -> bool {
        self.seat.is_alive()
    }

    fn close(&self, why: Failure) {
        self.seat.close(why);
    }

    fn halt(&self) -> Port<Halt> {
        self.seat.port(&self.supervisor)
    }

    fn status(&self) -> Port<AskStatus> {
        self.seat.port(&self.supervisor)
    }

    fn desk(&self) -> &Arc<Desk> {
        self.seat.desk()
    }
}
