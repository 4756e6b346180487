//! Courier: one rank's worker as rank 0 sees it. Carries a job there, and its groups and its outcome back.
//!
//! There is one for each other rank. A second request with the same id, from a restarted asker or through a restarted courier, is
//! carried again: the worker there follows the same work. Knows no job's content.
//!
//! Invariant: a failure there is a failure here with the rank's name, and stops all ranks, which may wait for that one.

use super::crew::Yield;
use super::mail::{Mail, Parcel, whose};
use super::messages::*;
use super::port::Port;
use super::post::{Post, answers_for_itself};
use actix::{Handler, ResponseActFuture};
use std::sync::Arc;

/// See the module.
pub struct Courier {
    post: Post,
    mail: Arc<Mail>,
    rank: usize,
    groups: Port<AcceptGroup>,
}

impl Courier {
    /// The courier between this process and `rank`; finished groups go to `groups`.
    pub fn new(post: Post, mail: Arc<Mail>, rank: usize, groups: Port<AcceptGroup>) -> Courier {
        Courier { post, mail, rank, groups }
    }
}

answers_for_itself!(Courier);

impl Handler<Carry> for Courier {
    type Result = ResponseActFuture<Self, Result<Yield, Failure>>;

    fn handle(&mut self, message: Carry, _: &mut Self::Context) -> Self::Result {
        let Carry { id, job } = message;
        let (mail, groups, rank) = (Arc::clone(&self.mail), self.groups.clone(), self.rank);
        let desk = Arc::clone(self.post.desk());
        self.post.work(Carry::NAME, async move {
            let _waiting = desk.wait_for(&format!("rank {rank}"), job.name());
            let mut asked = mail.ask(rank, id, job)?;
            let outcome = loop {
                let reply = tokio::select! {
                    // What has come goes before the end of everything.
                    biased;
                    reply = asked.replies.recv() => reply,
                    why = mail.broken() => return Err(Failure::from(why)),
                };
                match reply {
                    Some(Parcel::Group { group }) => groups.ask(AcceptGroup { id, group }).await?,
                    Some(Parcel::Done { outcome }) => break outcome,
                    other => unreachable!("a reply is a group or an outcome, not {other:?}"),
                }
            };
            outcome.map_err(|failure| {
                let text = match whose(&failure.text) {
                    Some(_) => failure.text,
                    None => format!("rank {rank}: {}", failure.text),
                };
                let failure = Failure { text, ..failure };
                mail.fail(rank, &failure);
                failure
            })
        })
    }
}
