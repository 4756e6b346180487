//! The company: who acts in a run, who may ask whom, and how it is set up and wound up.
//!
//! The one place that knows every actor. Seats come first and are empty; ports are made of seats;
//! the supervisor then seats an actor on each. Actors run on one arbiter of their own, the
//! supervisor on the main thread, so that a busy arbiter cannot hide a death.

use super::checkpointer::{Checkpointer, CheckpointerPorts};
use super::director::{Director, Site, StopSignal};
use super::director_ports::{DirectorPorts, SamplerPorts, TrainerPorts};
use super::fine_tuner::{FineTuner, FineTunerPorts};
use super::mail::Mail;
use super::messages::*;
use super::monitor::{Monitor, Notes};
use super::outpost::RankSeats;
use super::policy_updater::PolicyUpdater;
use super::port::{Desk, Limits, Port, Seat};
use super::post::{Injection, Post};
use super::pretrainer::{Pretrainer, PretrainerPorts};
use super::reader::Reader;
use super::reward_scorer::RewardScorer;
use super::rollout_generator::{RolloutGenerator, RolloutGeneratorPorts};
use super::staff::{Intensity, Member, Staff};
use super::stage_plan::Folders;
use super::supervisor::{Charge, Supervisor};
use super::worker::{DeviceLink, DeviceMaker, Worker};
use crate::config::{ConsoleMode, EngineConfig, Fault, RunConfig};
use crate::engine::Machine;
use crate::engine::utilisation::Machines;
use actix::{Actor, Arbiter, ArbiterHandle};
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the actors' thread may take to end, and the device's to put away its device; never
/// longer than a request may take.
const FAREWELL: Duration = Duration::from_secs(10);

/// The same where the processes of a run stop: mpirun ends who stays, and what is to be said comes last.
const SHORT_FAREWELL: Duration = Duration::from_millis(300);

/// The same where one of two devices of a process has failed.
const FAREWELL_OF_TWO: Duration = Duration::from_secs(1);

/// What a company is set up with.
pub struct Setup {
    /// The run's config.
    pub config: Arc<RunConfig>,
    /// Its folders.
    pub folders: Folders,
    /// Bounds of queues and waits.
    pub limits: Limits,
    /// How progress is shown; `None` for a run without a journal.
    pub console: Option<ConsoleMode>,
    /// What the machine does in a second.
    pub machine: Machine,
    /// Makes the device.
    pub device: DeviceMaker,
    /// Makes a second one, which only samples.
    pub sampler: Option<DeviceMaker>,
    /// A fault that a test has planted.
    pub injection: Arc<Injection>,
    /// Steps on random tokens instead of the run's stages.
    pub bench: Option<Bench>,
    /// Set by a signal.
    pub stop: StopSignal,
    /// The mail with the other processes of the run, if there are any.
    pub mail: Option<Arc<Mail>>,
    /// What a person is told of those.
    pub processes: Option<String>,
}

impl Setup {
    /// Makes readers: each actor reads for itself, so that a panic in one leaves the others whole.
    fn reader(&self) -> impl Fn() -> Arc<Reader> + Send + Sync + 'static {
        let (config, folders) = (Arc::clone(&self.config), self.folders.clone());
        move || {
            Arc::new(Reader::new(Arc::clone(&config), folders.run.clone(), folders.config.clone()))
        }
    }
}

impl Limits {
    /// The bounds of `[engine]`.
    pub fn of(engine: &EngineConfig) -> Limits {
        Limits {
            mailbox: engine.mailbox.max(1),
            deadline: Duration::from_secs(engine.deadline_seconds.max(1)),
            attempts: engine.restarts + 1,
        }
    }
}

/// Sets up a company, waits for its outcome and winds it up. `visit` is called with the
/// supervisor's seat before anything begins.
pub fn run(setup: Setup, visit: impl FnOnce(&Seats)) -> Result<Outcome> {
    let system = actix::System::new();
    let start = |make: &DeviceMaker| {
        DeviceLink::start(Arc::clone(make), setup.limits).map_err(|error| match error.downcast() {
            Ok(error) => no_thread(error),
            Err(error) => error,
        })
    };
    let (link, farewell) = start(&setup.device)?;
    let sampler = setup.sampler.as_ref().map(start).transpose()?;
    let (sampler, sampler_farewell) = sampler.map_or((None, None), |(l, f)| (Some(l), Some(f)));
    let links = [Some(link), sampler];
    let outcome = system.block_on(async {
        // The library would panic where the system gives no thread.
        std::thread::Builder::new().spawn(|| {}).map_err(no_thread)?;
        let arbiter = Arbiter::new();
        let samplers = setup.config.cluster.samplers;
        let seats = Seats::new(setup.limits, setup.mail.clone(), samplers);
        visit(&seats);
        let (ending, mut outcome) = mpsc::channel(1);
        let charge = seats.charge(&setup, &links, &arbiter.handle(), ending)?;
        let supervisor = Supervisor::new(&seats.supervisor, charge);
        seats.supervisor.point(supervisor.start());
        let gone = || Outcome::Failed(Failure::new(FailureKind::Actor, "the supervisor is gone"));
        let outcome = outcome.recv().await.unwrap_or_else(gone);
        arbiter.stop();
        anyhow::Ok((outcome, arbiter))
    });
    drop(system);
    let (outcome, arbiter) = outcome?;
    drop(links);
    // An actor or a device that is stuck would be waited for in vain; the process's end takes it
    // along.
    let is_broken = setup.mail.as_ref().is_some_and(|mail| mail.why().is_some());
    let longest = if is_broken { SHORT_FAREWELL } else { FAREWELL.min(setup.limits.deadline) };
    let (ended, end) = std::sync::mpsc::channel();
    // Without a thread for it nobody is waited for.
    let _ = std::thread::Builder::new().spawn(move || ended.send(arbiter.join()));
    if let Ok(Ok(())) = end.recv_timeout(longest) {
        let longest = match (&sampler_farewell, &outcome) {
            // The other device may wait for what the one that failed will never send.
            (Some(_), Outcome::Failed(_)) => longest.min(FAREWELL_OF_TWO),
            _ => longest,
        };
        farewell.wait(longest);
        sampler_farewell.map(|farewell| farewell.wait(longest));
    }
    Ok(outcome)
}

/// A system without room for another thread.
fn no_thread(error: std::io::Error) -> anyhow::Error {
    Fault::resources(format!(
        "the system gives no more threads: {error}; raise the limit of processes or of memory, or lower --threads"
    ))
}

/// Everybody's seat.
pub struct Seats {
    /// The supervisor's.
    pub supervisor: Seat<Supervisor>,
    director: Seat<Director>,
    pretrainer: Seat<Pretrainer>,
    fine_tuner: Seat<FineTuner>,
    rollout_generator: Seat<RolloutGenerator>,
    reward_scorer: Seat<RewardScorer>,
    policy_updater: Seat<PolicyUpdater>,
    pub(super) worker: Seat<Worker>,
    checkpointer: Seat<Checkpointer>,
    pub(super) monitor: Seat<Monitor>,
    ranks: RankSeats,
    has_samplers: bool,
}

impl Seats {
    fn new(limits: Limits, mail: Option<Arc<Mail>>, samplers: usize) -> Seats {
        let worker = Seat::new("worker", limits);
        if let Some(mail) = mail.as_ref().map(Arc::downgrade) {
            worker.desk().shows(move || mail.upgrade()?.awaits());
        }
        Seats {
            ranks: RankSeats::new(mail, samplers, limits),
            has_samplers: samplers > 0,
            supervisor: Seat::new("supervisor", limits),
            director: Seat::new("director", limits),
            pretrainer: Seat::new("pretrainer", limits),
            fine_tuner: Seat::new("fine-tuner", limits),
            rollout_generator: Seat::new("rollout-generator", limits),
            reward_scorer: Seat::new("reward-scorer", limits),
            policy_updater: Seat::new("policy-updater", limits),
            worker,
            checkpointer: Seat::new("checkpointer", limits),
            monitor: Seat::new("monitor", limits),
        }
    }

    /// What can be seen of an actor.
    pub fn desk(&self, name: &str) -> Option<Arc<Desk>> {
        self.desks().into_iter().find(|desk| desk.name() == name)
    }

    /// A port to stop actors by name.
    pub fn port_to_stop(&self) -> Port<StopActor> {
        self.supervisor.port(self.supervisor.desk())
    }

    /// A port to ask the worker how it is.
    pub fn port_to_ask_worker(&self) -> Port<AskStatus> {
        self.worker.port(self.supervisor.desk())
    }

    /// What the supervisor is in charge of.
    fn charge(
        &self,
        setup: &Setup,
        links: &[Option<DeviceLink>; 2],
        arbiter: &ArbiterHandle,
        ending: mpsc::Sender<Outcome>,
    ) -> Result<Charge> {
        let own = self.supervisor.desk();
        let (leader, begin) = match self.ranks.is_led() {
            true => ("deputy", self.ranks.deputy.port(own)),
            false => ("director", self.director.port(own)),
        };
        Ok(Charge {
            leader,
            begin,
            mail: self.ranks.mail().cloned(),
            staff: self.staff(setup, links, arbiter)?,
            deaths: mpsc::channel(setup.limits.mailbox),
            ending,
            stop: Arc::clone(&setup.stop),
            record: self.monitor.port(self.supervisor.desk()),
            bench: setup.bench.clone(),
            injection: Arc::clone(&setup.injection),
            journal_writer: "monitor",
            deadline: setup.limits.deadline,
        })
    }

    /// Everybody on the staff, in the order in which they are seated.
    fn staff(
        &self,
        setup: &Setup,
        links: &[Option<DeviceLink>; 2],
        arbiter: &ArbiterHandle,
    ) -> Result<Vec<Box<dyn Staff>>> {
        let engine = &setup.config.engine;
        let window = Duration::from_secs(engine.restart_window_seconds);
        let hiring = Hiring {
            arbiter,
            mailbox: setup.limits.mailbox,
            intensity: Intensity { restarts: engine.restarts, window },
            supervisor: self.supervisor.desk(),
        };
        if self.ranks.is_led() {
            let own = links[0].as_ref().expect("its own device");
            return self.ranks.outpost(self, &hiring, setup, own);
        }
        let [link, sampler] = links;
        let mut staff = self.keepers(&hiring, setup, link.as_ref().expect("its own device"))?;
        if self.has_samplers {
            let groups = self.rollout_generator.port(self.ranks.sampler.desk());
            staff.push(self.ranks.sampler(&hiring, sampler.clone(), groups));
        }
        staff.extend(self.ranks.couriers(&hiring, setup, |desk| self.rollout_generator.port(desk)));
        staff.extend(self.trainers(&hiring, setup));
        staff.extend(self.aligners(&hiring, setup));
        staff.push(self.lead(&hiring, setup));
        Ok(staff)
    }

    /// Who keeps the journal, the device and the checkpoints.
    fn keepers(
        &self,
        hiring: &Hiring,
        setup: &Setup,
        link: &DeviceLink,
    ) -> Result<Vec<Box<dyn Staff>>> {
        let (link, run) = (link.clone(), setup.folders.run.clone());
        let budget = setup.config.engine.budget.map(|bytes| bytes.0);
        let (mailbox, is_launched) = (setup.limits.mailbox, setup.mail.is_some());
        let notes = Notes::open(setup.console, &run, self.desks(), mailbox, budget, is_launched)?;
        let notes = Arc::new(notes);
        let groups = self.rollout_generator.port(self.worker.desk());
        let crew = self.ranks.crew(self.worker.desk());
        let config = Arc::clone(&setup.config);
        let checkpointer = CheckpointerPorts {
            save: self.worker.port(self.checkpointer.desk()),
            record: self.monitor.port(self.checkpointer.desk()),
        };
        Ok(vec![
            hiring.member(&self.monitor, move |post| Monitor::new(post, Arc::clone(&notes))),
            hiring.member(&self.worker, move |post| {
                Worker::new(post, Some(link.clone()), groups.clone(), crew.clone())
            }),
            hiring.member(&self.checkpointer, move |post| {
                Checkpointer::new(post, Arc::clone(&config), run.clone(), checkpointer.clone())
            }),
        ])
    }

    /// Who trains on given examples.
    fn trainers(&self, hiring: &Hiring, setup: &Setup) -> [Box<dyn Staff>; 2] {
        let (read_pages, read_pairs) = (setup.reader(), setup.reader());
        let pretrainer = PretrainerPorts {
            train: self.worker.port(self.pretrainer.desk()),
            score: self.worker.port(self.pretrainer.desk()),
        };
        let fine_tuner = FineTunerPorts {
            train: self.worker.port(self.fine_tuner.desk()),
            score: self.worker.port(self.fine_tuner.desk()),
        };
        [
            hiring.member(&self.pretrainer, move |post| {
                Pretrainer::new(post, read_pages(), pretrainer.clone())
            }),
            hiring.member(&self.fine_tuner, move |post| {
                FineTuner::new(post, read_pairs(), fine_tuner.clone())
            }),
        ]
    }

    /// Who samples, judges and updates.
    fn aligners(&self, hiring: &Hiring, setup: &Setup) -> [Box<dyn Staff>; 3] {
        let read = setup.reader();
        let generator = RolloutGeneratorPorts {
            generate: self.samples().port(self.rollout_generator.desk()),
            judge: self.reward_scorer.port(self.rollout_generator.desk()),
        };
        let score = self.worker.port(self.reward_scorer.desk());
        let train = self.worker.port(self.policy_updater.desk());
        [
            hiring.member(&self.reward_scorer, move |post| RewardScorer::new(post, score.clone())),
            hiring.member(&self.rollout_generator, move |post| {
                RolloutGenerator::new(post, read(), generator.clone())
            }),
            hiring
                .member(&self.policy_updater, move |post| PolicyUpdater::new(post, train.clone())),
        ]
    }

    /// Who leads them all.
    fn lead(&self, hiring: &Hiring, setup: &Setup) -> Box<dyn Staff> {
        let (config, folders) = (Arc::clone(&setup.config), setup.folders.clone());
        let (ports, stop) = (self.director_ports(), Arc::clone(&setup.stop));
        let (count, samplers) = (self.ranks.count(), setup.config.cluster.samplers);
        // A device of one process that only samples has a part of its machine.
        let sampling = if count > 1 && samplers > 0 { samplers } else { count };
        let machines = Machines { each: setup.machine.clone(), count, sampling };
        let site = Site { machines, processes: setup.processes.clone() };
        hiring.member(&self.director, move |post| {
            let (config, stop) = (Arc::clone(&config), Arc::clone(&stop));
            Director::new(post, config, folders.clone(), ports.clone(), site.clone(), stop)
        })
    }

    fn director_ports(&self) -> DirectorPorts {
        let desk = self.director.desk();
        DirectorPorts {
            prepare_data: self.pretrainer.port(desk),
            pretrainer: TrainerPorts {
                open: self.pretrainer.port(desk),
                step: self.pretrainer.port(desk),
                measure: self.pretrainer.port(desk),
            },
            fine_tuner: TrainerPorts {
                open: self.fine_tuner.port(desk),
                step: self.fine_tuner.port(desk),
                measure: self.fine_tuner.port(desk),
            },
            open_prompts: self.rollout_generator.port(desk),
            generate: self.rollout_generator.port(desk),
            measure_replies: self.rollout_generator.port(desk),
            score: self.reward_scorer.port(desk),
            update: self.policy_updater.port(desk),
            fit_scale: self.fine_tuner.port(desk),
            prepare_device: self.worker.port(desk),
            restore: self.worker.port(desk),
            enter_phase: self.worker.port(desk),
            score_sequences: self.worker.port(desk),
            calibrate: self.worker.port(desk),
            hand_over: self.worker.port(desk),
            sampler: self.has_samplers.then(|| SamplerPorts {
                prepare: self.ranks.sampler.port(desk),
                restore: self.ranks.sampler.port(desk),
                enter_phase: self.ranks.sampler.port(desk),
                score: self.ranks.sampler.port(desk),
                hand_over: self.ranks.sampler.port(desk),
            }),
            find_commit: self.checkpointer.port(desk),
            find_ahead: self.checkpointer.port(desk),
            commit: self.checkpointer.port(desk),
            keep: self.checkpointer.port(desk),
            export: self.checkpointer.port(desk),
            record: self.monitor.port(desk),
            record_rollouts: self.monitor.port(desk),
            sync_journal: self.monitor.port(desk),
            end: self.supervisor.port(desk),
        }
    }

    /// Whose device samples.
    fn samples(&self) -> &Seat<Worker> {
        if self.has_samplers { &self.ranks.sampler } else { &self.worker }
    }

    fn desks(&self) -> Vec<Arc<Desk>> {
        let mut desks = vec![
            Arc::clone(self.supervisor.desk()),
            Arc::clone(self.director.desk()),
            Arc::clone(self.pretrainer.desk()),
            Arc::clone(self.fine_tuner.desk()),
            Arc::clone(self.rollout_generator.desk()),
            Arc::clone(self.reward_scorer.desk()),
            Arc::clone(self.policy_updater.desk()),
            Arc::clone(self.worker.desk()),
            Arc::clone(self.checkpointer.desk()),
            Arc::clone(self.monitor.desk()),
        ];
        desks.extend(self.has_samplers.then(|| Arc::clone(self.ranks.sampler.desk())));
        desks.extend(self.ranks.desks());
        desks
    }
}

/// What all members have in common.
pub(super) struct Hiring<'a> {
    arbiter: &'a ArbiterHandle,
    mailbox: usize,
    intensity: Intensity,
    supervisor: &'a Arc<Desk>,
}

impl Hiring<'_> {
    pub(super) fn member<A>(
        &self,
        seat: &Seat<A>,
        make: impl Fn(Post) -> A + Send + Sync + 'static,
    ) -> Box<dyn Staff>
    where
        A: Actor<Context = actix::Context<A>> + actix::Handler<Halt> + actix::Handler<AskStatus>,
    {
        Member::new(seat, self.arbiter, self.mailbox, self.intensity, self.supervisor, make)
    }
}
