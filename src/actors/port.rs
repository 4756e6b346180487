//! Ports: how one actor asks another, and desks: what can be seen of an actor from outside.
//!
//! A [`Seat`] is an actor's place; the supervisor points it at the actor that holds it now. A
//! [`Port`] is a seat seen by one asker for one message. `ask` waits for a place in the mailbox and
//! for the reply; if the actor dies meanwhile, it waits for the next one and asks again, all within
//! one deadline. Knows no actor by type and no work.
//!
//! Invariants:
//!   * nothing is sent past a mailbox's bound, and no wait is without deadline
//!   * while `ask` waits, the asker's desk names whom it waits for, for what, and since when
//!   * a message is sent again only after the actor that had it is gone, and at most `attempts`
//!     times in all

use super::messages::{ActorState, AskStatus, Failure, FailureKind, Named, Pulse, Wait};
use actix::dev::ToEnvelope;
use actix::{Actor, Addr, Context, Handler, MailboxError, Message, Recipient};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout_at;

/// After so long without a word an actor of another process, which has one every second, is shown as silent.
const SILENCE: Duration = Duration::from_secs(3);

/// Numbers that bound every queue and every wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Messages in a mailbox or a channel at most.
    pub mailbox: usize,
    /// How long a request may take, all its attempts together.
    pub deadline: Duration,
    /// How often a request is sent at most, counting the first time.
    pub attempts: usize,
}

/// What can be seen of an actor from outside: its state, its mailbox, and whom it waits for.
pub struct Desk {
    name: String,
    state: Mutex<DeskState>,
    /// What the actor's device waits for, which asks no actor.
    device: OnceLock<Box<dyn Fn() -> Option<Wait> + Send + Sync>>,
}

struct DeskState {
    state: ActorState,
    since: Instant,
    working: u64,
    queued: u64,
    handled: u64,
    last_message: Option<&'static str>,
    restarts: u64,
    reason: Option<String>,
    doing: Option<String>,
    waits: BTreeMap<u64, (String, &'static str, Instant)>,
    next_wait: u64,
    /// The message whose handler holds the actor's thread, and since when.
    running: Option<(&'static str, Instant)>,
    /// What an actor of another process said of itself, and when, where the desk shows one.
    mirrored: Option<(Pulse, Instant)>,
}

impl Desk {
    /// The desk of an actor that has not begun.
    pub fn new(name: &str) -> Arc<Desk> {
        let state = DeskState {
            state: ActorState::Idle,
            since: Instant::now(),
            working: 0,
            queued: 0,
            handled: 0,
            last_message: None,
            restarts: 0,
            reason: None,
            doing: None,
            waits: BTreeMap::new(),
            next_wait: 0,
            running: None,
            mirrored: None,
        };
        Arc::new(Desk { name: name.to_string(), state: Mutex::new(state), device: OnceLock::new() })
    }

    /// The actor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the actor is doing now.
    pub fn pulse(&self) -> Pulse {
        let device = self.device.get().and_then(|waits| waits());
        let desk = self.lock();
        if let Some((pulse, heard)) = &desk.mirrored {
            return older(pulse.clone(), heard.elapsed());
        }
        let waits = desk.waits.values().map(|(actor, message, since)| Wait {
            actor: actor.clone(),
            message: message.to_string(),
            seconds: since.elapsed().as_secs_f64(),
        });
        Pulse {
            actor: self.name.clone(),
            state: desk.state,
            since: desk.since.elapsed().as_secs_f64(),
            queued: desk.queued,
            handled: desk.handled,
            last_message: desk.last_message.map(str::to_string),
            restarts: desk.restarts,
            waits: waits.chain(device).collect(),
            reason: desk.reason.clone(),
            doing: desk.doing.clone(),
        }
    }

    /// Shows the pulse of an actor in another process, under this desk's name.
    pub fn mirror(&self, pulse: Pulse) {
        let pulse = Pulse { actor: self.name.clone(), ..pulse };
        self.lock().mirrored = Some((pulse, Instant::now()));
    }

    /// Whoever looks is shown what the actor's device waits for, too.
    pub fn shows(&self, waits: impl Fn() -> Option<Wait> + Send + Sync + 'static) {
        // The first stays: there is one device.
        let _ = self.device.set(Box::new(waits));
    }

    /// The actor says what it is doing.
    pub fn say(&self, doing: &str) {
        self.lock().doing = Some(doing.to_string());
    }

    /// A handler gets the actor's thread, or gives it back.
    pub fn runs(&self, message: Option<&'static str>) {
        self.lock().running = message.map(|message| (message, Instant::now()));
    }

    /// The message whose handler holds the actor's thread, and for how long.
    pub fn running(&self) -> Option<(&'static str, Duration)> {
        self.lock().running.map(|(message, since)| (message, since.elapsed()))
    }

    /// The actor takes a message out of its mailbox; it is busy until the guard is dropped.
    pub fn take(self: &Arc<Desk>, message: &'static str) -> Working {
        let mut desk = self.lock();
        desk.queued = desk.queued.saturating_sub(1);
        desk.handled += 1;
        desk.last_message = Some(message);
        desk.working += 1;
        if desk.working == 1 {
            (desk.state, desk.since) = (ActorState::Busy, Instant::now());
        }
        Working(Arc::clone(self))
    }

    /// The actor is gone, for this reason; what its mailbox held is lost. The first reason stays.
    pub fn died(&self, reason: &str) {
        let mut desk = self.lock();
        if desk.state == ActorState::Stopped {
            return;
        }
        if desk.state != ActorState::Restarting {
            desk.reason = Some(reason.to_string());
        }
        (desk.state, desk.since, desk.queued) = (ActorState::Restarting, Instant::now(), 0);
    }

    /// Why the actor died last.
    pub fn reason(&self) -> Option<String> {
        self.lock().reason.clone()
    }

    /// A new actor has taken the seat.
    pub fn restarted(&self) {
        let mut desk = self.lock();
        desk.restarts += 1;
        (desk.state, desk.since, desk.working) = (ActorState::Idle, Instant::now(), 0);
    }

    /// The actor will not come back.
    pub fn stopped(&self, reason: &str) {
        let mut desk = self.lock();
        desk.reason = Some(reason.to_string());
        (desk.state, desk.since) = (ActorState::Stopped, Instant::now());
    }

    /// The actor waits for a reply until the guard is dropped.
    pub fn wait_for(self: &Arc<Desk>, actor: &str, message: &'static str) -> Waiting {
        let mut desk = self.lock();
        let number = desk.next_wait;
        desk.next_wait += 1;
        desk.waits.insert(number, (actor.to_string(), message, Instant::now()));
        Waiting { desk: Arc::clone(self), number }
    }

    fn enqueued(&self) {
        self.lock().queued += 1;
    }

    fn lock(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().expect("a desk is only read and written, which cannot panic")
    }
}

/// A pulse that was heard so long ago: all that it tells of went on since, as far as is known.
fn older(mut pulse: Pulse, age: Duration) -> Pulse {
    let seconds = age.as_secs_f64();
    pulse.since += seconds;
    pulse.waits.iter_mut().for_each(|wait| wait.seconds += seconds);
    if age >= SILENCE {
        pulse.reason = Some(format!("no word of it for {seconds:.0} s"));
    }
    pulse
}

/// An actor is busy with a message as long as this lives.
pub struct Working(Arc<Desk>);

impl Drop for Working {
    fn drop(&mut self) {
        let mut desk = self.0.lock();
        desk.working = desk.working.saturating_sub(1);
        if desk.working == 0 && desk.state == ActorState::Busy {
            (desk.state, desk.since) = (ActorState::Idle, Instant::now());
        }
    }
}

/// An actor waits for a reply as long as this lives.
pub struct Waiting {
    desk: Arc<Desk>,
    number: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.desk.lock().waits.remove(&self.number);
    }
}

/// Who holds a seat: which actor in turn, or why nobody will again.
#[derive(Clone, Debug, Default)]
struct Holder {
    generation: u64,
    closed: Option<Failure>,
}

/// An actor's place in the run.
pub struct Seat<A: Actor> {
    desk: Arc<Desk>,
    address: Arc<Mutex<Option<Addr<A>>>>,
    holder: Arc<watch::Sender<Holder>>,
    limits: Limits,
}

impl<A: Actor> Clone for Seat<A> {
    fn clone(&self) -> Self {
        Seat {
            desk: Arc::clone(&self.desk),
            address: Arc::clone(&self.address),
            holder: Arc::clone(&self.holder),
            limits: self.limits,
        }
    }
}

impl<A: Actor<Context = Context<A>>> Seat<A> {
    /// An empty seat.
    pub fn new(name: &str, limits: Limits) -> Seat<A> {
        let holder = Arc::new(watch::channel(Holder::default()).0);
        Seat { desk: Desk::new(name), address: Arc::new(Mutex::new(None)), holder, limits }
    }

    /// What can be seen of whoever holds it.
    pub fn desk(&self) -> &Arc<Desk> {
        &self.desk
    }

    /// Points the seat, and with it every port, at a new actor.
    pub fn point(&self, address: Addr<A>) {
        *self.address.lock().expect("only set and cloned") = Some(address);
        self.holder.send_modify(|holder| holder.generation += 1);
    }

    /// Number of the actor that holds it, counting from 1; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.holder.borrow().generation
    }

    /// Nobody will hold the seat again; who asks is told why.
    pub fn close(&self, why: Failure) {
        self.desk.stopped(&why.text);
        self.holder.send_modify(|holder| holder.closed = Some(why));
    }

    /// True unless the holder's mailbox is closed.
    pub fn is_alive(&self) -> bool {
        self.address().is_none_or(|address| address.connected())
    }

    /// The seat as `asker` sees it, for one message.
    pub fn port<M>(&self, asker: &Arc<Desk>) -> Port<M>
    where
        M: Message + Send + 'static,
        M::Result: Send,
        A: Handler<M>,
        Context<A>: ToEnvelope<A, M>,
    {
        let seat = self.clone();
        Port {
            asker: Arc::clone(asker),
            target: Arc::clone(&self.desk),
            resolve: Arc::new(move || seat.address().map(Addr::recipient)),
            holder: self.holder.subscribe(),
            limits: self.limits,
        }
    }

    fn address(&self) -> Option<Addr<A>> {
        self.address.lock().expect("only set and cloned").clone()
    }
}

/// A handle to whoever holds a seat now, for one message.
pub struct Port<M>
where
    M: Message + Send,
    M::Result: Send,
{
    asker: Arc<Desk>,
    target: Arc<Desk>,
    resolve: Arc<dyn Fn() -> Option<Recipient<M>> + Send + Sync>,
    holder: watch::Receiver<Holder>,
    limits: Limits,
}

impl<M> Clone for Port<M>
where
    M: Message + Send,
    M::Result: Send,
{
    fn clone(&self) -> Self {
        Port {
            asker: Arc::clone(&self.asker),
            target: Arc::clone(&self.target),
            resolve: Arc::clone(&self.resolve),
            holder: self.holder.clone(),
            limits: self.limits,
        }
    }
}

impl<M, R> Port<M>
where
    M: Message<Result = Result<R, Failure>> + Named + Clone + Send + 'static,
    R: Send + 'static,
{
    /// Sends a message and waits for the reply.
    pub async fn ask(&self, message: M) -> Result<R, Failure> {
        let _waiting = self.asker.wait_for(self.target.name(), M::NAME);
        let deadline = tokio::time::Instant::now() + self.limits.deadline;
        let mut lost_with = 0;
        for _ in 0..self.limits.attempts.max(1) {
            let (generation, recipient) = self.holder_after(lost_with, deadline).await?;
            // A question that is answered on the spot is no work that waits.
            if M::NAME != AskStatus::NAME {
                self.target.enqueued();
            }
            match timeout_at(deadline, recipient.send(message.clone())).await {
                Ok(Ok(reply)) => return reply,
                Ok(Err(MailboxError::Closed)) => lost_with = generation,
                Ok(Err(MailboxError::Timeout)) | Err(_) => return Err(self.overdue::<M>()),
            }
        }
        let why = self.target.reason().unwrap_or_else(|| "no reason is known".to_string());
        let (target, attempts) = (self.target.name(), self.limits.attempts);
        let text = format!(
            "{target} died {attempts} times while it had {} from {}: {why}",
            M::NAME,
            self.asker.name()
        );
        Err(Failure::new(FailureKind::Actor, text))
    }

    /// Waits until somebody holds the seat whose generation is later than `generation`.
    async fn holder_after(
        &self,
        generation: u64,
        deadline: tokio::time::Instant,
    ) -> Result<(u64, Recipient<M>), Failure> {
        let mut holder = self.holder.clone();
        let ready =
            holder.wait_for(|holder| holder.closed.is_some() || holder.generation > generation);
        let ready = match timeout_at(deadline, ready).await {
            Ok(Ok(holder)) => holder.clone(),
            Ok(Err(_)) => Holder { closed: Some(self.gone()), generation },
            Err(_) => return Err(self.overdue::<M>()),
        };
        match (ready.closed, (self.resolve)()) {
            (None, Some(recipient)) => Ok((ready.generation, recipient)),
            (Some(why), _) => Err(why),
            (None, None) => Err(self.gone()),
        }
    }

    fn gone(&self) -> Failure {
        Failure::new(FailureKind::Actor, format!("{} is gone", self.target.name()))
    }

    /// Names who waits for whom.
    fn overdue<T: Named>(&self) -> Failure {
        let pulse = self.target.pulse();
        let doing = match (pulse.waits.first(), pulse.state) {
            (Some(wait), _) => {
                format!(
                    "which waits for {} from {} since {:.1} s",
                    wait.message, wait.actor, wait.seconds
                )
            }
            (None, ActorState::Busy) => format!("which is busy since {:.1} s", pulse.since),
            (None, state) => {
                format!("which is {} with {} messages queued", state.word(), pulse.queued)
            }
        };
        let text = format!(
            "{} waited {:.1} s for {} from {}, {doing}; raise engine.deadline_seconds if the work is that long",
            self.asker.name(),
            self.limits.deadline.as_secs_f64(),
            T::NAME,
            pulse.actor,
        );
        Failure::new(FailureKind::Actor, text)
    }
}

impl ActorState {
    /// The state as a word for people.
    pub fn word(self) -> &'static str {
        match self {
            ActorState::Idle => "idle",
            ActorState::Busy => "busy",
            ActorState::Restarting => "restarting",
            ActorState::Stopped => "stopped",
        }
    }
}
