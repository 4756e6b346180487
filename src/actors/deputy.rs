//! Deputy: rank 0's requests in the process of another rank.
//!
//! Asks the worker here for what rank 0 asks for, sends groups and outcomes back, and the worker's pulse every second, so that
//! rank 0's console shows it. Ends the process's part when rank 0 says so, or when the ranks stop. A restarted deputy
//! asks again for what is open; the worker follows the same work. Knows no job's content.

use super::mail::{Mail, Parcel};
use super::messages::*;
use super::port::{Desk, Port};
use super::post::{Post, answers_for_itself};
use actix::fut::wrap_future;
use actix::{AsyncContext, Handler, ResponseActFuture};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often rank 0 hears how the worker is.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);

/// Whom a deputy asks.
#[derive(Clone)]
pub struct DeputyPorts {
    /// The worker.
    pub carry: Port<Carry>,
    /// The supervisor.
    pub end: Port<EndRun>,
}

/// See the module.
pub struct Deputy {
    post: Post,
    service: Rc<Service>,
}

struct Service {
    mail: Arc<Mail>,
    ports: DeputyPorts,
    worker: Arc<Desk>,
    /// The letters that this deputy answers, and which request a work belongs to.
    served: RefCell<BTreeSet<u64>>,
    numbers: RefCell<Numbers>,
    answers: RefCell<Vec<JoinHandle<()>>>,
}

/// The request that a work's groups go to: the last one that asked for it.
#[derive(Default)]
struct Numbers(BTreeMap<WorkId, u64>);

impl Numbers {
    fn asked(&mut self, id: WorkId, number: u64) {
        self.0.insert(id, number);
    }

    fn of(&self, id: WorkId) -> Option<u64> {
        self.0.get(&id).copied()
    }

    /// A request is answered; a later one for the same work may still want its groups.
    fn answered(&mut self, id: WorkId, number: u64) {
        if self.of(id) == Some(number) {
            self.0.remove(&id);
        }
    }
}

impl Deputy {
    /// The deputy of the worker at this desk.
    pub fn new(post: Post, mail: Arc<Mail>, ports: DeputyPorts, worker: Arc<Desk>) -> Deputy {
        let (served, numbers, answers) = Default::default();
        let service = Service { mail, ports, worker, served, numbers, answers };
        Deputy { post, service: Rc::new(service) }
    }
}

impl Drop for Deputy {
    fn drop(&mut self) {
        // What this one would answer is the next one's to answer, whose groups would come too late.
        self.service.answers.borrow().iter().for_each(JoinHandle::abort);
    }
}

answers_for_itself!(Deputy, |context| context
    .run_interval(PULSE_INTERVAL, |deputy, _| deputy.service.send_pulse()));

impl Handler<BeginRun> for Deputy {
    type Result = Result<(), Failure>;

    fn handle(&mut self, _: BeginRun, context: &mut Self::Context) -> Self::Result {
        let (service, working) = (Rc::clone(&self.service), self.post.desk().take(BeginRun::NAME));
        context.spawn(wrap_future(async move {
            let _working = working;
            let outcome = service.serve().await;
            // If this fails the supervisor is gone, and with it the process's part.
            let _ = service.ports.end.ask(EndRun { outcome }).await;
        }));
        Ok(())
    }
}

impl Handler<AcceptGroup> for Deputy {
    type Result = ResponseActFuture<Self, Result<(), Failure>>;

    fn handle(&mut self, message: AcceptGroup, _: &mut Self::Context) -> Self::Result {
        let AcceptGroup { id, group } = message;
        let number = self.service.numbers.borrow().of(id);
        let mail = Arc::clone(&self.service.mail);
        self.post.work(AcceptGroup::NAME, async move {
            match number {
                Some(number) => mail.send(0, number, &Parcel::Group { group }),
                // A deputy before this one asked for it; the worker will hand it out again.
                None => Ok(()),
            }
        })
    }
}

impl Service {
    /// Serves rank 0 until the run is over.
    async fn serve(self: &Rc<Self>) -> Outcome {
        loop {
            for (number, id, job) in self.mail.open() {
                if self.served.borrow_mut().insert(number) {
                    self.numbers.borrow_mut().asked(id, number);
                    let mut answers = self.answers.borrow_mut();
                    answers.retain(|answer| !answer.is_finished());
                    answers.push(actix::spawn(Rc::clone(self).answer(number, id, job)));
                }
            }
            if let Some(outcome) = self.mail.ended() {
                return outcome;
            }
            tokio::select! {
                () = self.mail.arrived.notified() => {}
                why = self.mail.broken() => return Outcome::Failed(Failure::from(why)),
            }
        }
    }

    async fn answer(self: Rc<Self>, number: u64, id: WorkId, job: super::crew::Job) {
        let outcome = self.ports.carry.ask(Carry { id, job }).await;
        let failure = outcome.as_ref().err().cloned();
        self.numbers.borrow_mut().answered(id, number);
        // Where it cannot be sent the ranks have stopped, and rank 0 waits for it no more.
        let _ = self.mail.answer(number, outcome);
        if let Some(failure) = failure {
            // The devices of other ranks may wait for this one.
            self.mail.fail(self.mail.rank(), &failure);
        }
    }

    fn send_pulse(&self) {
        // A pulse that is not sent is followed by the next one.
        let _ = self.mail.send(0, 0, &Parcel::Pulse { pulse: self.worker.pulse() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_go_to_the_last_request_for_their_work_until_that_one_is_answered() {
        let (mut numbers, id) = (Numbers::default(), WorkId { director: 1, number: 2, part: 0 });
        assert_eq!(numbers.of(id), None);
        numbers.asked(id, 7);
        numbers.asked(id, 9);
        numbers.answered(id, 7);
        assert_eq!(numbers.of(id), Some(9), "it was asked for again");
        numbers.answered(id, 9);
        assert_eq!(numbers.of(id), None);
    }
}
