//! A port whose actors die while it asks them.

use crate::actors::messages::{AskStatus, Failure, Pulse};
use crate::actors::port::{Desk, Limits, Seat};
use actix::{Actor, ActorContext, Context, Handler, ResponseActFuture};
use std::time::{Duration, Instant};

/// Dies of the first question.
struct Mortal;

impl Actor for Mortal {
    type Context = Context<Self>;
}

impl Handler<AskStatus> for Mortal {
    type Result = ResponseActFuture<Self, Result<Pulse, Failure>>;

    fn handle(&mut self, _: AskStatus, context: &mut Self::Context) -> Self::Result {
        context.terminate();
        Box::pin(actix::fut::wrap_future(std::future::pending()))
    }
}

#[test]
fn all_attempts_of_a_request_share_one_deadline() {
    let limits = Limits { mailbox: 4, deadline: Duration::from_secs(2), attempts: 5 };
    actix::System::new().block_on(async move {
        let seat = Seat::new("mortal", limits);
        seat.point(Mortal.start());
        let next = seat.clone();
        actix::spawn(async move {
            tokio::time::sleep(limits.deadline * 3 / 4).await;
            next.point(Mortal.start());
        });
        let began = Instant::now();
        let asked = seat.port::<AskStatus>(&Desk::new("asker")).ask(AskStatus {}).await;
        let text = asked.unwrap_err().text;
        assert!(text.starts_with("asker waited 2.0 s for AskStatus from mortal"), "{text}");
        // A deadline of its own for the second holder would end after seven quarters.
        assert!(began.elapsed() < limits.deadline * 3 / 2, "{:?}", began.elapsed());
    });
}
