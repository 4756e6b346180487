//! A port whose actors die while it asks them.

use crate::actors::messages::{AskStatus, Failure, Pulse, Wait};
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

#[test]
fn a_desk_shows_what_the_device_waits_for_and_how_long_another_process_says_nothing() {
    let wait = || Wait { actor: "rank 3".to_string(), message: "tokens".to_string(), seconds: 2.0 };
    let (own, other) = (Desk::new("worker"), Desk::new("worker-1"));
    own.shows(move || Some(wait()));
    assert_eq!(own.pulse().waits, [wait()]);
    other.mirror(own.pulse());
    std::thread::sleep(Duration::from_millis(50));
    let shown = other.pulse();
    assert_eq!((shown.actor.as_str(), &shown.reason), ("worker-1", &None));
    assert!(shown.since >= own.pulse().since - 0.02 && shown.waits[0].seconds > 2.04, "{shown:?}");
    // Three of its words have not come.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(other.pulse().reason.as_deref(), Some("no word of it for 3 s"));
    other.mirror(own.pulse());
    assert_eq!(other.pulse().reason, None);
}
