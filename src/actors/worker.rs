//! Worker: one device. An asynchronous shell answers while the device is busy; one thread owns the
//! device.
//!
//! A job is a `Work` under its id: the shell hands it to the thread over a bounded channel and
//! follows it until its outcome. A second request with the same id, from a restarted asker or
//! through a restarted shell, follows the same work, so nothing runs twice; groups that are already
//! finished are handed out again. Of a run with several processes, rank 0's worker has every job done
//! on all ranks. Knows no loss and no reward.
//!
//! Invariants:
//!   * only the thread touches the device, and it runs one job at a time, in order of arrival
//!   * once a Director's work has come, that of an earlier Director is refused: its device was made
//!     ready anew
//!   * a panic in a job becomes a failure of kind `Device`; the device is then made anew before the
//!     next stage

use super::crew::{Job, Yield, together};
use super::mail::Mail;
use super::messages::*;
use super::port::{Limits, Port};
use super::post::{Post, answers_for_itself, panic_text, seconds_now};
use crate::cluster::Broken;
use crate::config::Dtype;
use crate::config::failpoint::failpoint;
use crate::console::Event;
use crate::engine::hybrid::{HybridEngine, SavedState};
use crate::engine::phase::{GenerateJob, GenerateReport, TokenGroup};
use crate::engine::phase::{Phase, PhaseReport, PrepareStage, ScoreJob, SequenceScore};
use crate::engine::phase::{StepReport, TrainJob};
use crate::engine::utilisation::Switched;
use actix::{Handler, ResponseActFuture};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Stack of the device's thread.
const STACK_BYTES: usize = 16 << 20;

/// What a worker's thread owns: the engine, or a stand-in for it in tests.
pub trait Device {
    /// Loads the models of a stage.
    fn prepare(&mut self, stage: &PrepareStage) -> anyhow::Result<()>;
    /// Changes what is resident.
    fn enter_phase(&mut self, phase: Phase, sample_as: Dtype) -> anyhow::Result<PhaseReport>;
    /// Samples; each group is handed out when its last rollout ends.
    fn generate(
        &mut self,
        job: &GenerateJob,
        on_group: &mut dyn FnMut(TokenGroup),
    ) -> anyhow::Result<GenerateReport>;
    /// Forward passes.
    fn score(&mut self, job: &ScoreJob) -> anyhow::Result<Vec<SequenceScore>>;
    /// One optimizer step.
    fn train(&mut self, job: &TrainJob) -> anyhow::Result<StepReport>;
    /// Writes the policy into a folder.
    fn save(&mut self, folder: &Path, with_optimizer: bool) -> anyhow::Result<SavedState>;
    /// Brings policy and optimizer back.
    fn restore(&mut self, folder: &Path, state: &SavedState) -> anyhow::Result<()>;
    /// Keeps a reward model's scale.
    fn calibrate(&mut self, mean: f64, deviation: f64);
    /// Gives the policy of this version to who only samples, or takes it.
    fn hand_over(&mut self, version: u64) -> anyhow::Result<Switched>;
    /// Tells the devices that work with this one that it is lost: nobody is to wait for it.
    fn cut_off(&self, _why: &str) {}
    /// Whether one that this device works with is lost, so that it has to be made anew with that one.
    fn is_cut_off(&self) -> bool {
        false
    }
}

impl Device for HybridEngine {
    fn prepare(&mut self, stage: &PrepareStage) -> anyhow::Result<()> {
        HybridEngine::prepare(self, stage)
    }
    fn enter_phase(&mut self, phase: Phase, sample_as: Dtype) -> anyhow::Result<PhaseReport> {
        match phase {
            Phase::Generate => self.enter_generate(sample_as),
            _ => HybridEngine::enter_phase(self, phase),
        }
    }
    fn generate(
        &mut self,
        job: &GenerateJob,
        on_group: &mut dyn FnMut(TokenGroup),
    ) -> anyhow::Result<GenerateReport> {
        HybridEngine::generate(self, job, on_group)
    }
    fn score(&mut self, job: &ScoreJob) -> anyhow::Result<Vec<SequenceScore>> {
        HybridEngine::score(self, job)
    }
    fn train(&mut self, job: &TrainJob) -> anyhow::Result<StepReport> {
        HybridEngine::train(self, job)
    }
    fn save(&mut self, folder: &Path, with_optimizer: bool) -> anyhow::Result<SavedState> {
        HybridEngine::save(self, folder, with_optimizer)
    }
    fn restore(&mut self, folder: &Path, state: &SavedState) -> anyhow::Result<()> {
        HybridEngine::restore(self, folder, state)
    }
    fn calibrate(&mut self, mean: f64, deviation: f64) {
        HybridEngine::calibrate(self, mean, deviation);
    }
    fn hand_over(&mut self, version: u64) -> anyhow::Result<Switched> {
        HybridEngine::hand_over(self, version)
    }
    fn cut_off(&self, why: &str) {
        HybridEngine::cut_off(self, why);
    }
    fn is_cut_off(&self) -> bool {
        HybridEngine::is_cut_off(self)
    }
}

/// Makes the device, on the thread that will own it.
pub type DeviceMaker = Arc<dyn Fn() -> anyhow::Result<Box<dyn Device>> + Send + Sync>;

/// A job under its id, and how far it is.
struct Work {
    id: WorkId,
    job: Job,
    progress: Mutex<Progress>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Progress {
    groups: Vec<TokenGroup>,
    outcome: Option<Result<Yield, Failure>>,
}

impl Work {
    fn new(id: WorkId, job: Job) -> Arc<Work> {
        Arc::new(Work { id, job, progress: Mutex::default(), changed: watch::channel(0).0 })
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().expect("progress is only read and written"));
        self.changed.send_modify(|count| *count += 1);
    }

    /// Finished groups from number `from` on, and the outcome if there is one.
    fn since(&self, from: usize) -> (Vec<TokenGroup>, Option<Result<Yield, Failure>>) {
        let progress = self.progress.lock().expect("progress is only read and written");
        (progress.groups[from..].to_vec(), progress.outcome.clone())
    }
}

/// The way to a device's thread. It outlives the worker's shell: a new shell finds the device as it
/// was.
#[derive(Clone)]
pub struct DeviceLink {
    queue: Sender<Arc<Work>>,
    taken: Arc<Mutex<Taken>>,
}

/// What has been taken on.
#[derive(Default)]
struct Taken {
    /// The newest Director whose work has come.
    director: u64,
    recent: VecDeque<Arc<Work>>,
}

impl DeviceLink {
    /// Starts the thread. It ends, and drops the device, when the last clone of the link is
    /// dropped.
    pub fn start(make: DeviceMaker, limits: Limits) -> anyhow::Result<(DeviceLink, Farewell)> {
        let (queue, jobs) = bounded(limits.mailbox.max(1));
        let (alive, ended) = bounded(1);
        std::thread::Builder::new().name("device".to_string()).stack_size(STACK_BYTES).spawn(
            move || {
                let _alive: Sender<()> = alive;
                own_device(&make, &jobs);
            },
        )?;
        Ok((DeviceLink { queue, taken: Arc::default() }, Farewell(ended)))
    }

    /// The work under this id: the one that is known, or a new one on its way to the device.
    fn submit(&self, id: WorkId, job: Job) -> Result<Arc<Work>, Failure> {
        let mut taken = self.taken.lock().expect("the list is only read and changed");
        if id.director < taken.director {
            let text = format!(
                "{} of director {} came after work of director {}, which has taken its place",
                job.name(),
                id.director,
                taken.director
            );
            return Err(Failure::new(FailureKind::Stale, text));
        }
        taken.director = id.director;
        if let Some(known) = taken.recent.iter().find(|work| work.id == id) {
            return Ok(Arc::clone(known));
        }
        let work = Work::new(id, job);
        self.queue.try_send(Arc::clone(&work)).map_err(|error| match error {
            TrySendError::Full(_) => Failure::new(
                FailureKind::Actor,
                format!(
                    "the device's queue is full; raise engine.mailbox ({} jobs wait)",
                    self.queue.len()
                ),
            ),
            TrySendError::Disconnected(_) => {
                Failure::new(FailureKind::Device, "the device's thread is gone")
            }
        })?;
        // Only the request at hand and the one before it can be asked for again.
        taken.recent.retain(|old| old.id.director == id.director && old.id.number + 1 >= id.number);
        taken.recent.push_back(Arc::clone(&work));
        Ok(work)
    }
}

/// Waits for the end of a device's thread.
pub struct Farewell(Receiver<()>);

impl Farewell {
    /// Waits until the device is put away, for so long at most; says whether it is.
    pub fn wait(&self, longest: Duration) -> bool {
        matches!(self.0.recv_timeout(longest), Err(RecvTimeoutError::Disconnected))
    }
}

/// The device's thread.
fn own_device(make: &DeviceMaker, jobs: &Receiver<Arc<Work>>) {
    let mut device: Option<Box<dyn Device>> = None;
    for work in jobs {
        if matches!(work.job, Job::Prepare(_)) && device.as_ref().is_some_and(|d| d.is_cut_off()) {
            device = None;
        }
        let ready = match (&work.job, &device) {
            (_, Some(_)) => Ok(()),
            // A stage begins with nothing loaded, so a lost device can be made anew here and
            // nowhere else.
            (Job::Prepare(_), None) => make().map(|made| device = Some(made)),
            (_, None) => {
                Err(anyhow::Error::new(Failure::new(FailureKind::Device, "the device is lost")))
            }
        };
        let outcome = match (ready, &mut device) {
            (Ok(()), Some(ready)) => {
                match catch_unwind(AssertUnwindSafe(|| run(ready.as_mut(), &work))) {
                    Ok(result) => result.map_err(|error| match error.is::<Broken>() {
                        // It lost one that it works with, and is made anew with it.
                        true => Failure::new(FailureKind::Device, format!("{error:#}")),
                        false => Failure::from(error),
                    }),
                    Err(panic) => {
                        let text = panic_text(panic.as_ref());
                        let text = format!("the device panicked in {}: {text}", work.job.name());
                        // What a panic leaves behind is not to be trusted; dropping it may panic
                        // again.
                        let lost = device.take();
                        let _ = catch_unwind(AssertUnwindSafe(|| {
                            lost.iter().for_each(|lost| lost.cut_off(&text));
                            drop(lost);
                        }));
                        Err(Failure::new(FailureKind::Device, text))
                    }
                }
            }
            (Err(error), _) => Err(Failure::from(error)),
            (Ok(()), None) => unreachable!("a ready device is there"),
        };
        work.change(|progress| progress.outcome = Some(outcome));
    }
}

fn run(device: &mut dyn Device, work: &Work) -> anyhow::Result<Yield> {
    failpoint(work.job.name());
    Ok(match &work.job {
        Job::Prepare(stage) => {
            device.prepare(stage)?;
            Yield::Nothing
        }
        Job::EnterPhase(phase, sample_as) => Yield::Phase(device.enter_phase(*phase, *sample_as)?),
        Job::Generate(job) => {
            let began = seconds_now();
            let report = device
                .generate(job, &mut |group| work.change(|progress| progress.groups.push(group)))?;
            Yield::Generated(Generated { report, span: [began, seconds_now()] })
        }
        Job::Score(job) => Yield::Scores(device.score(job)?),
        Job::Train(job) => Yield::Stepped(device.train(job)?),
        Job::Save { folder, with_optimizer } => Yield::Saved(device.save(folder, *with_optimizer)?),
        Job::Restore { folder, state } => {
            device.restore(folder, state)?;
            Yield::Nothing
        }
        Job::Calibrate(scale) => {
            device.calibrate(scale.mean, scale.deviation);
            Yield::Nothing
        }
        Job::HandOver(version) => Yield::Switched(device.hand_over(*version)?),
    })
}

/// The other ranks' devices; none in a run of one process, and none that another rank than 0 asks.
#[derive(Clone, Default)]
pub struct Crew {
    /// The ways to them, in order of rank.
    pub others: Vec<Port<Carry>>,
    /// Tells all ranks where one cannot do its part.
    pub mail: Option<Arc<Mail>>,
}

/// The shell.
pub struct Worker {
    post: Post,
    /// This process's device; `None` where all of the crew are in others.
    link: Option<DeviceLink>,
    groups: Port<AcceptGroup>,
    crew: Crew,
}

impl Worker {
    /// A shell for the device behind `link`; finished groups go to `groups`.
    pub fn new(
        post: Post,
        link: Option<DeviceLink>,
        groups: Port<AcceptGroup>,
        crew: Crew,
    ) -> Worker {
        Worker { post, link, groups, crew }
    }

    /// Follows a job to its end, handing out each group as soon as it is finished.
    fn follow<R: 'static>(
        &self,
        id: WorkId,
        job: Job,
        expect: fn(Yield) -> Option<R>,
    ) -> ResponseActFuture<Self, Result<R, Failure>> {
        let (link, groups, crew) = (self.link.clone(), self.groups.clone(), self.crew.clone());
        let (name, journal) = (job.name(), self.post.journal());
        self.post.work(name, async move {
            let others = crew.others.iter().map(|port| (port.clone(), job.clone()));
            let others: Vec<_> = others.collect();
            let work = match (link.map(|link| link.submit(id, job)).transpose(), journal) {
                (Err(stale), Some(journal)) if stale.kind == FailureKind::Stale => {
                    // Who brings it has nobody left to tell.
                    let event = Event::new("refused").with("actor", "worker");
                    let event = event.with("message", name).with("reason", &stale.text);
                    journal.ask(Record { event }).await?;
                    return Err(stale);
                }
                (submitted, _) => submitted?,
            };
            let carry = |(port, job): (Port<Carry>, Job)| {
                actix::spawn(async move { port.ask(Carry { id, job }).await })
            };
            let others: Vec<_> = others.into_iter().map(carry).collect();
            let mut parts = Vec::new();
            // Of several processes no device is made anew.
            let for_good = |failure: Failure| match (failure.kind, &crew.mail) {
                (FailureKind::Device, Some(_)) => Failure::new(FailureKind::Other, failure.text),
                _ => failure,
            };
            if let Some(work) = work {
                let own = outcome_of(&work, &groups).await;
                if let (Err(failure), Some(mail)) = (&own, &crew.mail) {
                    // The others' devices may wait for this one.
                    mail.fail(mail.rank(), failure);
                }
                parts.push(own.map_err(for_good)?);
            }
            for other in others {
                let lost = |_| Failure::new(FailureKind::Actor, "the actors' thread ends");
                parts.push(other.await.map_err(lost)?.map_err(for_good)?);
            }
            let mismatch = || Failure::new(FailureKind::Other, format!("work {id:?} is no {name}"));
            expect(together(name, parts)?).ok_or_else(mismatch)
        })
    }
}

/// Follows a work on this process's device to its end.
async fn outcome_of(work: &Work, groups: &Port<AcceptGroup>) -> Result<Yield, Failure> {
    let mut changed = work.changed.subscribe();
    let mut handed_out = 0;
    loop {
        changed.borrow_and_update();
        let (finished, outcome) = work.since(handed_out);
        handed_out += finished.len();
        for group in finished {
            groups.ask(AcceptGroup { id: work.id, group }).await?;
        }
        if let Some(outcome) = outcome {
            return outcome;
        }
        if changed.changed().await.is_err() {
            return Err(Failure::new(FailureKind::Device, "the device's thread is gone"));
        }
    }
}

answers_for_itself!(Worker);

impl Handler<Carry> for Worker {
    type Result = ResponseActFuture<Self, Result<Yield, Failure>>;

    fn handle(&mut self, message: Carry, _: &mut Self::Context) -> Self::Result {
        self.follow(message.id, message.job, Some)
    }
}

macro_rules! follows {
    ($($message:ident { $($field:ident),* } -> $reply:ty: $job:expr, $pattern:pat => $value:expr;)*) => {
        $(
            impl Handler<$message> for Worker {
                type Result = ResponseActFuture<Self, Result<$reply, Failure>>;

                fn handle(&mut self, message: $message, _: &mut Self::Context) -> Self::Result {
                    let $message { id, $($field),* } = message;
                    self.follow(id, $job, |yielded| match yielded { $pattern => Some($value), _ => None })
                }
            }
        )*
    };
}

follows! {
    PrepareDevice { stage } -> (): Job::Prepare(Box::new(stage)), Yield::Nothing => ();
    EnterPhase { phase, sample_as } -> PhaseReport:
        Job::EnterPhase(phase, sample_as), Yield::Phase(report) => report;
    Generate { job } -> Generated: Job::Generate(job), Yield::Generated(generated) => generated;
    Score { job } -> Vec<SequenceScore>: Job::Score(job), Yield::Scores(scores) => scores;
    Train { job } -> StepReport: Job::Train(job), Yield::Stepped(report) => report;
    Save { folder, with_optimizer } -> SavedState:
        Job::Save { folder, with_optimizer }, Yield::Saved(state) => state;
    Restore { folder, state } -> (): Job::Restore { folder, state }, Yield::Nothing => ();
    Calibrate { scale } -> (): Job::Calibrate(scale), Yield::Nothing => ();
    HandOver { version } -> Switched: Job::HandOver(version), Yield::Switched(switched) => switched;
}
