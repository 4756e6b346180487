//! Supervisor: starts, watches, restarts and stops every actor, and ends the run.
//!
//! 1. An actor that dies is known by its [`Death`], or at the next look at its mailbox; one that
//!    hangs, at the next roll call.
//! 2. Its seat gets a new holder and the journal a `restart`; whoever had asked the dead one asks
//!    the new one.
//! 3. An actor that dies too often is given up: its seat is closed, and the run fails with its
//!    name.
//! 4. An actor that is stopped by name is not replaced: whoever asks it is told. Nobody asks the
//!    Director, so that the run ends with it.
//! 5. Where the processes of a run stop, each of them ends, with the same words; rank 0 leads the others,
//!    and hears of their signals. Its leader has a moment to say how it ended.
//!
//! Knows no work. Invariants:
//!   * a run has exactly one outcome, the first
//!   * a run without an outcome has somebody at work, or it fails after the deadline

use super::mail::{Mail, Parcel};
use super::messages::*;
use super::port::{Desk, Port, Seat};
use super::post::{Death, Injection, Post};
use super::roll_call::RollCall;
use super::staff::Staff;
use crate::cluster::Broken;
use crate::console::Event;
use actix::fut::wrap_future;
use actix::{Actor, AsyncContext, Context, Handler, ResponseActFuture};
use std::cell::{Cell, RefCell};
use std::io::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// How often every actor is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// How long the leader of rank 0 has at most to write down that the ranks stop: what the devices do is of no use any more, and the
/// launcher ends all processes when the first of them goes, which takes leave of the others for a second.
const LAST_LINE: Duration = Duration::from_millis(800);

/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// What the supervisor is made with.
pub struct Charge {
    /// The staff.
    pub staff: Vec<Box<dyn Staff>>,
    /// The news that actors are gone.
    pub deaths: (mpsc::Sender<Death>, mpsc::Receiver<Death>),
    /// Where the outcome goes.
    pub ending: mpsc::Sender<Outcome>,
    /// Tells the Director of a signal.
    pub stop: Arc<AtomicI32>,
    /// The journal.
    pub record: Port<Record>,
    /// Who leads the process: the Director, or the Deputy of rank 0.
    pub leader: &'static str,
    /// The leader, to begin.
    pub begin: Port<BeginRun>,
    /// What it is to begin with.
    pub bench: Option<Bench>,
    /// A fault that a test has planted.
    pub injection: Arc<Injection>,
    /// The name of the actor that writes the journal.
    pub journal_writer: &'static str,
    /// How long a request may take.
    pub deadline: Duration,
    /// The other processes, if there are any.
    pub mail: Option<Arc<Mail>>,
}

/// See the module.
pub struct Supervisor {
    inner: Rc<Inner>,
    deaths: Option<mpsc::Receiver<Death>>,
}

/// What the handlers and the watch share.
struct Inner {
    desk: Arc<Desk>,
    staff: RefCell<Vec<Box<dyn Staff>>>,
    deaths: mpsc::Sender<Death>,
    ending: mpsc::Sender<Outcome>,
    stop: Arc<AtomicI32>,
    record: Port<Record>,
    leader: &'static str,
    begin: Port<BeginRun>,
    bench: Option<Bench>,
    injection: Arc<Injection>,
    journal_writer: &'static str,
    deadline: Duration,
    mail: Option<Arc<Mail>>,
    ended: Cell<bool>,
}

impl Supervisor {
    /// The supervisor on `seat`.
    pub fn new(seat: &Seat<Supervisor>, charge: Charge) -> Supervisor {
        let (deaths, received) = charge.deaths;
        let inner = Inner {
            desk: Arc::clone(seat.desk()),
            staff: RefCell::new(charge.staff),
            deaths,
            ending: charge.ending,
            stop: charge.stop,
            record: charge.record,
            leader: charge.leader,
            begin: charge.begin,
            bench: charge.bench,
            injection: charge.injection,
            journal_writer: charge.journal_writer,
            deadline: charge.deadline,
            mail: charge.mail,
            ended: Cell::new(false),
        };
        Supervisor { inner: Rc::new(inner), deaths: Some(received) }
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        for member in self.inner.staff.borrow_mut().iter_mut() {
            self.inner.seat(member.as_mut());
        }
        self.inner.call_the_roll();
        Rc::clone(&self.inner).begin_run();
        Rc::clone(&self.inner).end_with_the_others();
        let deaths = self.deaths.take().expect("an actor starts once");
        context.spawn(wrap_future(Rc::clone(&self.inner).watch(deaths)));
    }
}

impl Handler<EndRun> for Supervisor {
    type Result = Result<(), Failure>;

    fn handle(&mut self, message: EndRun, _: &mut Self::Context) -> Self::Result {
        self.inner.end(message.outcome);
        Ok(())
    }
}

impl Handler<AskStatus> for Supervisor {
    type Result = Result<Pulse, Failure>;

    fn handle(&mut self, _: AskStatus, _: &mut Self::Context) -> Self::Result {
        Ok(self.inner.desk.pulse())
    }
}

impl Handler<StopActor> for Supervisor {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, message: StopActor, _: &mut Self::Context) -> Self::Result {
        let inner = Rc::clone(&self.inner);
        Box::pin(wrap_future(async move { inner.stop_actor(&message.name).await }))
    }
}

impl Inner {
    /// Puts a new actor on a member's seat.
    fn seat(&self, member: &mut dyn Staff) {
        member.begin(&|desk: &Arc<Desk>, generation| {
            // The journal's writer cannot ask itself for the witness of a fault.
            let journal = (desk.name() != self.journal_writer).then(|| self.record.clone());
            Post::new(desk, generation, &self.deaths, &self.injection, journal)
        });
    }

    /// Asks every actor how it is, for as long as the run lasts.
    fn call_the_roll(self: &Rc<Self>) {
        let staff = self.staff.borrow();
        let everybody: Vec<Arc<Desk>> = staff.iter().map(|m| Arc::clone(m.desk())).collect();
        for member in staff.iter() {
            let roll = RollCall {
                status: member.status(),
                desk: Arc::clone(member.desk()),
                everybody: everybody.clone(),
                deadline: self.deadline,
            };
            let inner = Rc::clone(self);
            actix::spawn(async move {
                if let Err(failure) = roll.keep(|event| inner.tell(event)).await {
                    inner.end(Outcome::Failed(failure));
                }
            });
        }
    }

    /// Says an event to the person and to the journal, whose writer may be the one it is about.
    fn tell(&self, event: Event) {
        eprintln!("{}", event.remark().expect("the event is a remark"));
        let record = self.record.clone();
        // What the journal does not take is not lost: it has been said.
        actix::spawn(async move { drop(record.ask(Record { event }).await) });
    }

    /// Sets the leader off. It answers at once, so this waits for its mailbox only.
    fn begin_run(self: Rc<Self>) {
        actix::spawn(async move {
            if let Err(failure) = self.begin.ask(BeginRun { bench: self.bench.clone() }).await {
                self.end(Outcome::Failed(failure));
            }
        });
    }

    /// Ends this process's part when the processes of the run stop.
    fn end_with_the_others(self: Rc<Self>) {
        actix::spawn(async move {
            if let Some(mail) = &self.mail {
                let why = mail.broken().await;
                let until = Instant::now() + LAST_LINE;
                while mail.rank() == 0 && !self.ended.get() && Instant::now() < until {
                    tokio::time::sleep(LOOK).await;
                }
                self.end(Outcome::Failed(Failure::from(why)));
            }
        });
    }

    /// Deaths, signals, and a look at everybody now and then.
    async fn watch(self: Rc<Self>, mut deaths: mpsc::Receiver<Death>) {
        let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
            (listen(SignalKind::interrupt()), listen(SignalKind::terminate()), listen_for_hangup())
        else {
            let text = "cannot listen for SIGINT, SIGTERM and SIGHUP";
            return self.end(Outcome::Failed(Failure::new(FailureKind::Other, text)));
        };
        let mut look = tokio::time::interval(WATCH_INTERVAL);
        loop {
            tokio::select! {
                death = deaths.recv() => {
                    // The sender is a field of self, so there is always another death to wait for.
                    let Some(death) = death else { return };
                    self.replace(&death);
                }
                _ = look.tick() => self.look_around(),
                _ = interrupt.recv() => self.on_signal(libc_number(SignalKind::interrupt())),
                _ = terminate.recv() => self.on_signal(libc_number(SignalKind::terminate())),
                _ = hung_up(&mut hangup) => self.on_signal(libc_number(SignalKind::hangup())),
            }
        }
    }

    /// Finds actors whose death was not announced.
    fn look_around(self: &Rc<Self>) {
        let dead = |member: &dyn Staff| Death {
            name: member.name().to_string(),
            generation: member.generation(),
        };
        let gone: Vec<Death> = self
            .staff
            .borrow()
            .iter()
            .filter(|m| !m.is_alive())
            .map(|m| dead(m.as_ref()))
            .collect();
        gone.iter().for_each(|death| self.replace(death));
        let pulses = self.staff.borrow().iter().map(|m| m.desk().pulse()).collect::<Vec<_>>();
        if is_deserted(&pulses, self.deadline) {
            let text = "no actor has been at work for so long as a request may take, and the run has no outcome";
            self.end(Outcome::Failed(Failure::new(FailureKind::Actor, text)));
        }
    }

    /// Puts a new actor on a dead one's seat, or gives up.
    fn replace(self: &Rc<Self>, death: &Death) {
        let mut staff = self.staff.borrow_mut();
        let Some(member) = staff.iter_mut().find(|member| member.name() == death.name) else {
            return;
        };
        let is_stopped = member.desk().pulse().state == ActorState::Stopped;
        if self.ended.get() || is_stopped || member.generation() != death.generation {
            return;
        }
        let reason = member.desk().reason().unwrap_or_else(|| "its mailbox is closed".to_string());
        if !member.may_restart(Instant::now()) {
            let text =
                format!("{} died too often and is not restarted again: {reason}", death.name);
            let failure = Failure::new(FailureKind::Actor, text);
            member.close(failure.clone());
            return self.end(Outcome::Failed(failure));
        }
        self.seat(member.as_mut());
        let count = member.desk().pulse().restarts;
        let event = Event::new("restart")
            .with("actor", &death.name)
            .with("reason", reason)
            .with("count", count);
        // Apart from the watch: the journal's writer may be the next to die.
        let (inner, is_leader) = (Rc::clone(self), death.name == self.leader);
        actix::spawn(async move {
            if let Err(failure) = inner.record.ask(Record { event }).await {
                inner.end(Outcome::Failed(failure));
            } else if is_leader {
                inner.begin_run();
            }
        });
    }

    /// Stops one actor for good.
    async fn stop_actor(&self, name: &str) -> Result<(), Failure> {
        let failure = Failure::new(FailureKind::Actor, format!("{name} was stopped by name"));
        if name == self.desk.name() {
            self.end(Outcome::Failed(failure));
            return Ok(());
        }
        let halt = {
            let staff = self.staff.borrow();
            let Some(member) = staff.iter().find(|member| member.name() == name) else {
                let names: Vec<&str> = staff.iter().map(|member| member.name()).collect();
                let text = format!("there is no actor {name:?}; there are {}", names.join(", "));
                return Err(Failure::new(FailureKind::User, text));
            };
            // Known as stopped before it stops, so that its death is no reason to restart it.
            member.desk().stopped(&failure.text);
            member.halt()
        };
        let halted = halt.ask(Halt {}).await;
        if let Some(member) = self.staff.borrow().iter().find(|member| member.name() == name) {
            member.close(failure.clone());
        }
        if name == self.leader {
            self.end(Outcome::Failed(failure));
        }
        halted
    }

    /// The first signal asks for a stop after the step at hand; a second Ctrl-C ends the process at
    /// once.
    fn on_signal(&self, number: i32) {
        if let Some(mail) = self.mail.as_ref().filter(|mail| mail.rank() > 0) {
            // Rank 0 decides; where it cannot be told, the processes stop anyway.
            let _ = mail.send(0, 0, &Parcel::Signal { number });
        } else if self.why_all_stop().is_some() {
            // The launcher ends who is left.
        } else if self.stop.swap(number, Ordering::SeqCst) == 0 {
            // After a hang-up nobody may be there to read it.
            let _ = writeln!(
                std::io::stderr(),
                "stopping after this step and its commit; press Ctrl-C again to stop at once"
            );
        } else if number == libc_number(SignalKind::interrupt()) {
            std::process::exit(128 + number);
        }
    }

    /// Why the ranks stop, if they do.
    fn why_all_stop(&self) -> Option<Broken> {
        self.mail.as_ref().and_then(|mail| mail.why())
    }

    fn end(&self, outcome: Outcome) {
        let outcome = match (outcome, self.why_all_stop()) {
            // A leader whose work came to nothing for that reason may have it in other words.
            (Outcome::Failed(_), Some(why)) => Outcome::Failed(Failure::from(why)),
            (outcome, _) => outcome,
        };
        if !self.ended.replace(true) {
            // The channel has room for the one outcome that is sent.
            let _ = self.ending.try_send(outcome);
        }
    }
}

/// True if nobody has been at work for longer than `deadline`.
fn is_deserted(pulses: &[Pulse], deadline: Duration) -> bool {
    let deadline = deadline.as_secs_f64();
    pulses.iter().all(|pulse| pulse.state != ActorState::Busy && pulse.since > deadline)
}

fn listen(kind: SignalKind) -> std::io::Result<Signal> {
    signal(kind)
}

/// Listens for a terminal that hangs up, unless the process was told to outlive it (`nohup`): then `None`.
fn listen_for_hangup() -> std::io::Result<Option<Signal>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    match mask & 1 {
        1 => Ok(None),
        _ => listen(SignalKind::hangup()).map(Some),
    }
}

async fn hung_up(hangup: &mut Option<Signal>) {
    match hangup {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

fn libc_number(kind: SignalKind) -> i32 {
    kind.as_raw_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_deserted_once_nobody_has_been_at_work_for_the_deadline() {
        let pulse = |state, since| Pulse { state, since, ..Pulse::default() };
        let (idle, stopped) = (pulse(ActorState::Idle, 9.0), pulse(ActorState::Stopped, 9.0));
        let deserted = |pulses: &[Pulse]| is_deserted(pulses, Duration::from_secs(8));
        assert!(deserted(&[idle.clone(), stopped.clone()]));
        assert!(!deserted(&[idle.clone(), pulse(ActorState::Busy, 900.0)]), "long work is work");
        assert!(!deserted(&[stopped, pulse(ActorState::Idle, 7.0)]), "the deadline is to come");
    }
}
