//! What every actor holds of itself: its desk, the news of its death, and the fault a test has
//! planted in it.
//!
//! Work runs through [`Post::work`], inside the actor: a panic in it kills the actor, and dropping
//! the post tells the supervisor. Knows no message's content.
//!
//! Invariants:
//!   * an actor cannot vanish without a [`Death`]: the post is a field of it
//!   * an injected panic is in the journal before it happens

use super::messages::{Failure, Pulse, Record};
use super::port::{Desk, Port};
use crate::config::Fault;
use crate::console::Event;
use actix::fut::wrap_future;
use actix::{Actor, ResponseActFuture};
use std::any::Any;
use std::convert::Infallible;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The news that an actor is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Its name.
    pub name: String,
    /// Which holder of the seat it was.
    pub generation: u64,
}

/// A fault that a test wants: `REHEARSAL_INJECT=panic:ACTOR:N`, in the actor's N-th work message,
/// or `panic:ACTOR:MESSAGE:N`, in its N-th of that name; with `hang` the actor does not die but
/// blocks for ever, and its thread with it. The Director is given one message only, so the
/// requests that it sends count as well: it dies while the reply is awaited.
#[derive(Debug, Default)]
pub struct Injection {
    target: Option<Target>,
    seen: AtomicU64,
}

#[derive(Debug)]
struct Target {
    hangs: bool,
    actor: String,
    message: Option<String>,
    nth: u64,
}

impl Injection {
    /// The one that the environment asks for.
    pub fn from_environment() -> anyhow::Result<Injection> {
        Injection::parse(&std::env::var("REHEARSAL_INJECT").unwrap_or_default())
    }

    /// Reads `panic:ACTOR:N`, `panic:ACTOR:MESSAGE:N` or the like with `hang`; an empty text
    /// injects nothing.
    pub fn parse(text: &str) -> anyhow::Result<Injection> {
        if text.is_empty() {
            return Ok(Injection::default());
        }
        let parts: Vec<&str> = text.split(':').collect();
        let (actor, message, nth) = match parts[..] {
            ["panic" | "hang", actor, nth] => (actor, None, nth),
            ["panic" | "hang", actor, message, nth] => (actor, Some(message.to_string()), nth),
            _ => ("", None, ""),
        };
        match nth.parse::<u64>() {
            Ok(nth) if nth > 0 => {
                let (hangs, actor) = (parts[0] == "hang", actor.to_string());
                let target = Some(Target { hangs, actor, message, nth });
                Ok(Injection { target, seen: AtomicU64::new(0) })
            }
            _ => Err(Fault::user(format!(
                "REHEARSAL_INJECT = {text:?}: expected panic:ACTOR:N or panic:ACTOR:MESSAGE:N with N at least 1"
            ))),
        }
    }

    /// Counts a message of `actor`; true if the fault is due in it, which happens once.
    fn is_due(&self, actor: &str, message: &str) -> bool {
        let Some(target) = &self.target else { return false };
        target.actor == actor
            && target.message.as_deref().is_none_or(|name| name == message)
            && self.seen.fetch_add(1, Ordering::Relaxed) + 1 == target.nth
    }
}

/// The fault that a test has planted, as one actor carries it.
#[derive(Clone)]
pub struct Hazard {
    actor: String,
    injection: Arc<Injection>,
    /// The journal, for the fault's witness; the Monitor writes its own.
    journal: Option<Port<Record>>,
}

impl Hazard {
    /// Counts a message; true if the fault is due in it.
    pub fn is_due(&self, message: &str) -> bool {
        self.injection.is_due(&self.actor, message)
    }

    /// Panics or hangs, once the journal has the witness.
    pub async fn strike(&self, message: &str) -> Result<Infallible, Failure> {
        if let Some(journal) = &self.journal {
            let event = Event::new("inject").with("actor", &self.actor).with("message", message);
            journal.ask(Record { event }).await?;
        }
        while self.injection.target.as_ref().is_some_and(|target| target.hangs) {
            std::thread::park();
        }
        panic!("injected fault in {message}");
    }
}

/// An actor's own end of its seat.
pub struct Post {
    desk: Arc<Desk>,
    generation: u64,
    deaths: mpsc::Sender<Death>,
    hazard: Hazard,
}

impl Post {
    /// The post of holder `generation` of a seat.
    pub fn new(
        desk: &Arc<Desk>,
        generation: u64,
        deaths: &mpsc::Sender<Death>,
        injection: &Arc<Injection>,
        journal: Option<Port<Record>>,
    ) -> Post {
        Post {
            desk: Arc::clone(desk),
            generation,
            deaths: deaths.clone(),
            hazard: Hazard {
                actor: desk.name().to_string(),
                injection: Arc::clone(injection),
                journal,
            },
        }
    }

    /// What the actor is doing.
    pub fn pulse(&self) -> Pulse {
        self.desk.pulse()
    }

    /// What others can see of the actor.
    pub fn desk(&self) -> &Arc<Desk> {
        &self.desk
    }

    /// The fault that a test has planted.
    pub fn hazard(&self) -> &Hazard {
        &self.hazard
    }

    /// The journal; the Monitor, who writes it, has none.
    pub fn journal(&self) -> Option<Port<Record>> {
        self.hazard.journal.clone()
    }

    /// Which holder of its seat the actor is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Serves a message: counts it, runs `work` inside the actor, and lets a panic in it kill the
    /// actor.
    pub fn work<A, R>(
        &self,
        message: &'static str,
        work: impl Future<Output = Result<R, Failure>> + 'static,
    ) -> ResponseActFuture<A, Result<R, Failure>>
    where
        A: Actor,
        R: 'static,
    {
        let working = self.desk.take(message);
        let desk = Arc::clone(&self.desk);
        let hazard = self.hazard.is_due(message).then(|| self.hazard.clone());
        let work = async move {
            let _working = working;
            if let Some(hazard) = hazard {
                hazard.strike(message).await?;
            }
            work.await
        };
        Box::pin(wrap_future(Observed { work: Box::pin(work), desk, message }))
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        self.desk.died("it stopped by itself");
        // A full channel loses nothing: the supervisor also looks at every mailbox now and then.
        let _ = self
            .deaths
            .try_send(Death { name: self.desk.name().to_string(), generation: self.generation });
    }
}

/// A future that shows at the desk while it holds the actor's thread, and whose panic leaves its
/// reason there before it goes on to kill the actor.
struct Observed<T> {
    work: Pin<Box<dyn Future<Output = T>>>,
    desk: Arc<Desk>,
    message: &'static str,
}

impl<T> Future for Observed<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.desk.runs(Some(self.message));
        let work = self.work.as_mut();
        let polled = catch_unwind(AssertUnwindSafe(|| work.poll(context)));
        self.desk.runs(None);
        match polled {
            Ok(poll) => poll,
            Err(panic) => {
                self.desk.died(&format!("it panicked: {}", panic_text(panic.as_ref())));
                resume_unwind(panic)
            }
        }
    }
}

/// The time of day that intervals are compared in, in seconds since 1970.
pub fn seconds_now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text")
}

/// Runs plain work beside the actors' thread, so that they answer meanwhile; a panic in it is the
/// caller's own.
pub async fn aside<R: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<R> + Send + 'static,
) -> Result<R, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(error) => Err(Failure::from(anyhow::Error::new(error))),
        },
    }
}

/// The handlers that every actor has: it answers a status question at once, and stops when it is
/// told to.
macro_rules! answers_for_itself {
    ($actor:ty) => {
        answers_for_itself!($actor, |_context| ());
    };
    ($actor:ty, |$context:ident| $started:expr) => {
        impl actix::Actor for $actor {
            type Context = actix::Context<Self>;

            fn started(&mut self, $context: &mut Self::Context) {
                $started;
            }
        }

        impl actix::Handler<$crate::actors::messages::AskStatus> for $actor {
            type Result =
                Result<$crate::actors::messages::Pulse, $crate::actors::messages::Failure>;

            fn handle(
                &mut self,
                _: $crate::actors::messages::AskStatus,
                _: &mut Self::Context,
            ) -> Self::Result {
                Ok(self.post.pulse())
            }
        }

        impl actix::Handler<$crate::actors::messages::Halt> for $actor {
            type Result = Result<(), $crate::actors::messages::Failure>;

            fn handle(
                &mut self,
                _: $crate::actors::messages::Halt,
                context: &mut Self::Context,
            ) -> Self::Result {
                actix::ActorContext::terminate(context);
                Ok(())
            }
        }
    };
}
pub(crate) use answers_for_itself;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_injected_panic_is_due_once_in_the_message_it_names() {
        let injection = Injection::parse("panic:reward-scorer:3").unwrap();
        let due: Vec<bool> =
            (0..5).map(|_| injection.is_due("reward-scorer", "JudgeGroup")).collect();
        assert_eq!(due, [false, false, true, false, false]);
        assert!(!Injection::parse("panic:reward-scorer:1").unwrap().is_due("monitor", "Record"));
        let injection = Injection::parse("panic:director:UpdatePolicy:2").unwrap();
        let sent = ["UpdatePolicy", "Record", "UpdatePolicy", "UpdatePolicy"];
        assert_eq!(
            sent.map(|message| injection.is_due("director", message)),
            [false, false, true, false]
        );
    }

    #[test]
    fn a_malformed_injection_is_refused() {
        for text in
            ["panic", "panic:monitor:0", "panic:monitor:x", "kill:monitor:1", "panic:a:b:1:2"]
        {
            assert!(Injection::parse(text).is_err(), "{text}");
        }
    }
}
