//! Director: the loop. The stages of a run, one after the other, as plain awaits.
//!
//! For each stage that has no artefact yet: open its data, ready the device (and bring a commit
//! back), then steps, evals and commits, then the gate and the artefact. A step is walked in
//! `alignment`, an eval in `evals`, and what a stage starts from is decided in `stage_plan`. Holds
//! no tensor and no reward arithmetic.
//!
//! Invariants:
//!   * a step stands in the journal before a commit that contains it
//!   * a stage has an artefact only after its gate was passed
//!   * starting again (after a kill, a lost device or a rollback) is the same walk from the newest
//!     commit

use super::director_ports::DirectorPorts;
use super::evals::Moment;
use super::handing_over::Sampler;
use super::journal_lines::{run_event, step_event};
use super::messages::*;
use super::port::{Desk, Port};
use super::post::{Hazard, Post, answers_for_itself};
use super::rollout_watch::RolloutWatch;
use super::stage_plan::{
    Folders, INITIAL, artefact_name, prepare_stage, require_artefacts, source,
};
use crate::checkpoint::Commit;
use crate::config::failpoint::failpoint;
use crate::config::fault::signal_name;
use crate::config::stage::StageKind;
use crate::config::{Dtype, RunConfig, idle_samplers};
use crate::console::Event;
use crate::engine::phase::StepReport;
use crate::engine::phase::{ModelSource, Phase, PhaseReport};
use crate::engine::utilisation::{Machines, useful_share};
use actix::fut::ActorFutureExt;
use actix::{AsyncContext, Handler};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

/// Steps in a row without a finite loss or gradient before the run goes back to its last commit.
const NOT_FINITE_LIMIT: u64 = 3;

/// See the module.
pub struct Director {
    post: Post,
    direction: Rc<Direction>,
}

/// A signal that asked the run to stop; 0 for none.
pub type StopSignal = Arc<AtomicI32>;

/// Where a run is made.
#[derive(Clone, Debug, Default)]
pub struct Site {
    /// What its machines do in a second.
    pub machines: Machines,
    /// Which processes make it, over what; `None` for one by itself.
    pub processes: Option<String>,
}

/// What the Director works with: shared by its loop, the alignment step and the evals.
pub struct Direction {
    pub(super) config: Arc<RunConfig>,
    pub(super) folders: Folders,
    pub(super) ports: DirectorPorts,
    site: Site,
    stop: StopSignal,
    /// Where the phase is shown.
    desk: Arc<Desk>,
    hazard: Hazard,
    /// Which Director in turn this is: work of the ones before it is stale.
    generation: u64,
    /// Number of the last request.
    numbers: Cell<u64>,
    /// Steps computed so far, those that the journal had already included.
    computed_steps: Cell<u64>,
    /// What was sampled for the step after the one that is taken.
    pub(super) ahead: RefCell<Option<SampledBatch>>,
    /// What the ranks that only sample are ready to sample from.
    pub(super) sampler: RefCell<Sampler>,
    /// Phase of the device, what it was to sample from, and what it held when it got there.
    phase: RefCell<Option<(Phase, Dtype, PhaseReport)>>,
}

impl Director {
    /// A director of the run in `folders`.
    pub fn new(
        post: Post,
        config: Arc<RunConfig>,
        folders: Folders,
        ports: DirectorPorts,
        site: Site,
        stop: StopSignal,
    ) -> Director {
        let direction = Direction {
            config,
            folders,
            ports,
            site,
            stop,
            desk: Arc::clone(post.desk()),
            hazard: post.hazard().clone(),
            generation: post.generation(),
            numbers: Cell::default(),
            computed_steps: Cell::new(0),
            ahead: RefCell::default(),
            sampler: RefCell::default(),
            phase: RefCell::default(),
        };
        Director { post, direction: Rc::new(direction) }
    }
}

answers_for_itself!(Director);

impl Handler<BeginRun> for Director {
    type Result = Result<(), Failure>;

    fn handle(&mut self, message: BeginRun, context: &mut Self::Context) -> Self::Result {
        let direction = Rc::clone(&self.direction);
        let run = self.post.work(BeginRun::NAME, async move {
            let outcome = match message.bench {
                None => direction.run().await,
                Some(bench) => direction.bench(bench).await,
            };
            direction.ask(&direction.ports.end, EndRun { outcome }).await
        });
        // The run outlives the reply; a failed farewell means that the supervisor is gone, and with
        // it the run.
        context.spawn(run.map(|_, _, _| ()));
        Ok(())
    }
}

/// How a stage goes on after a step.
enum Next {
    Finished,
    Stopped(i32),
}

impl Direction {
    /// The whole run, including what is tried again.
    async fn run(&self) -> Outcome {
        let (mut rollbacks, mut lost_devices) = (0, 0);
        let outcome = loop {
            let failure = match self.pass().await {
                Ok(Next::Finished) => break Outcome::Done,
                Ok(Next::Stopped(signal)) => break Outcome::Stopped(signal),
                Err(failure) => failure,
            };
            let again = match failure.kind {
                FailureKind::NotFinite if rollbacks == 0 => Event::new("rollback"),
                FailureKind::Device if lost_devices < self.config.engine.restarts => {
                    Event::new("restart").with("actor", "worker")
                }
                FailureKind::NotFinite => break Outcome::Failed(not_finite_again(&failure)),
                _ => break Outcome::Failed(failure),
            };
            rollbacks += usize::from(failure.kind == FailureKind::NotFinite);
            lost_devices += usize::from(failure.kind == FailureKind::Device);
            let again = again.with("reason", &failure.text).with("count", rollbacks + lost_devices);
            if let Err(failure) = self.record(again).await {
                break Outcome::Failed(failure);
            }
        };
        self.desk.say("");
        let (state, reason) = match &outcome {
            Outcome::Done | Outcome::Timed(_) => ("finished", None),
            Outcome::Stopped(signal) => ("stopped", Some(signal_name(*signal))),
            Outcome::Failed(failure) => ("failed", Some(failure.text.clone())),
        };
        let export = matches!(outcome, Outcome::Done).then(|| self.folders.run.join("export"));
        let end =
            Event::new("end").with("state", state).with("reason", reason).with("export", export);
        // More than the new steps in the journal: what a resume had to compute again.
        let end = end.with("computed_steps", self.computed_steps.get());
        match (self.record(end).await, outcome) {
            // The journal's failure is news only if there is no earlier one.
            (Err(failure), Outcome::Done | Outcome::Timed(_) | Outcome::Stopped(_)) => {
                Outcome::Failed(failure)
            }
            (_, outcome) => outcome,
        }
    }

    /// All stages that are not done, from the newest commit.
    async fn pass(&self) -> Result<Next, Failure> {
        self.phase.replace(None);
        let commit = self.ask(&self.ports.find_commit, FindCommit {}).await?;
        let is_done = |index: usize| self.folders.artefact(&self.config, index).exists();
        if let Some(commit) = &commit {
            require_artefacts(&self.config, commit.manifest.stage_index, is_done)?;
        }
        let resumed = commit.is_some() || (0..self.config.stages.len()).any(is_done);
        self.record(run_event(&self.config, &self.site, resumed)).await?;
        let data = self.ask(&self.ports.prepare_data, PrepareData {}).await?;
        for text in data.notes.into_iter().chain(idle_samplers(&self.config)) {
            self.record(Event::new("note").with("text", text)).await?;
        }
        let mut last_policy = None;
        for (index, stage) in self.config.stages.iter().enumerate() {
            if stage.kind.makes_policy() {
                last_policy = Some(index);
            }
            if is_done(index) {
                // A kill may have come between the artefact and its line.
                let end = Event::new("stage-end").of_stage(&stage.name, stage.kind.name());
                self.record(end).await?;
                continue;
            }
            // What is finished has been kept: between two stages there is nothing to commit.
            let signal = self.stop.load(Ordering::SeqCst);
            if signal != 0 {
                return Ok(Next::Stopped(signal));
            }
            let commit = commit.as_ref().filter(|commit| commit.manifest.stage_index == index);
            if let Next::Stopped(signal) = self.stage(index, commit).await? {
                return Ok(Next::Stopped(signal));
            }
            failpoint("between-stages");
        }
        if let Some(index) = last_policy
            && !self.folders.run.join("export").exists()
        {
            let from = self.folders.artefact(&self.config, index);
            self.ask(&self.ports.export, ExportModel { from }).await?;
        }
        Ok(Next::Finished)
    }

    /// One stage, from its start or from a commit.
    async fn stage(&self, index: usize, commit: Option<&Commit>) -> Result<Next, Failure> {
        let stage = &self.config.stages[index];
        let began = Instant::now();
        let open = match stage.kind {
            StageKind::Pretrain(_) | StageKind::LongContext(_) => &self.ports.pretrainer.open,
            StageKind::Sft(_) | StageKind::RewardModel(_) => &self.ports.fine_tuner.open,
            StageKind::Grpo(_) => &self.ports.open_prompts,
        };
        let steps = self.ask(open, OpenStage { stage: index }).await?.steps;
        self.record(
            Event::new("stage-start").of_stage(&stage.name, stage.kind.name()).with("steps", steps),
        )
        .await?;
        self.ready_device(index, steps, commit).await?;
        self.ahead.replace(None);
        if let Some(Commit { folder, .. }) = commit {
            let ahead = FindAhead { folder: folder.clone() };
            self.ahead.replace(self.ask(&self.ports.find_ahead, ahead).await?.map(|b| *b));
        }
        let mut at = Position { index, step: 0, steps, version: 0 };
        match commit {
            Some(commit) => {
                (at.step, at.version) = (commit.manifest.step, commit.manifest.policy_version)
            }
            None => {
                self.measure(&at, Moment::Before).await?;
            }
        }
        if let Next::Stopped(signal) = self.steps(&mut at).await? {
            return Ok(Next::Stopped(signal));
        }
        let results = self.measure(&at, Moment::End).await?;
        self.check_gate(stage, &results)?;
        if let StageKind::RewardModel(_) = stage.kind {
            self.calibrate(index).await?;
        }
        let name = artefact_name(&self.config, index);
        self.ask(&self.ports.keep, KeepArtefact { id: self.id(), name, place: self.place(&at) })
            .await?;
        let end = Event::new("stage-end").of_stage(&stage.name, stage.kind.name());
        self.record(end.with("steps", steps).with("seconds", began.elapsed().as_secs_f64()))
            .await?;
        Ok(Next::Finished)
    }

    /// Loads the stage's models, or those and a commit.
    async fn ready_device(
        &self,
        index: usize,
        steps: u64,
        commit: Option<&Commit>,
    ) -> Result<(), Failure> {
        let model = self.config.stage_model(&self.folders.config, index);
        let model = model.map_err(|fault| Failure::from(anyhow::Error::from(fault)))?;
        let plan = prepare_stage(&self.config, &self.folders, index, steps, &model);
        let initial = self.folders.initial();
        let needs_initial = plan.policy == ModelSource::Folder(initial.clone());
        if needs_initial
            && source(&self.config, &self.folders, index) == ModelSource::Fresh
            && !initial.exists()
        {
            // The reference needs a folder of its own, which a resumed run finds again.
            let mut fresh = plan.clone();
            (fresh.policy, fresh.reference, fresh.optimizer) = (ModelSource::Fresh, None, None);
            fresh.rewards.clear();
            self.ask(&self.ports.prepare_device, PrepareDevice { id: self.id(), stage: fresh })
                .await?;
            let place = Place { stage: index, name: INITIAL.to_string(), step: 0, finished: true };
            self.ask(
                &self.ports.keep,
                KeepArtefact { id: self.id(), name: INITIAL.to_string(), place },
            )
            .await?;
        }
        self.load(&self.config.stages[index], plan, commit).await?;
        self.phase.replace(None);
        Ok(())
    }

    /// The steps that are left, with their evals and commits.
    async fn steps(&self, at: &mut Position) -> Result<Next, Failure> {
        let (every, seconds) =
            (self.config.checkpoint.every_steps, self.config.checkpoint.every_seconds);
        let mut committed = Instant::now();
        let (mut not_finite, mut is_due) = (0, false);
        let mut watch = RolloutWatch::new(&self.config.stages[at.index]);
        while at.step < at.steps {
            let (report, event) = self.step(at).await?;
            self.computed_steps.set(self.computed_steps.get() + 1);
            at.step += 1;
            at.version = report.policy_version;
            let remarks = watch.remarks(&event);
            self.record(event).await?;
            for remark in remarks {
                self.record(remark).await?;
            }
            not_finite = if report.skipped { not_finite + 1 } else { 0 };
            if report.skipped {
                self.note_skipped(at, not_finite).await?;
            }
            if at.step < at.steps {
                self.measure(at, Moment::Between).await?;
            }
            let signal = self.stop.load(Ordering::SeqCst);
            is_due |= every > 0 && at.step.is_multiple_of(every);
            is_due |= seconds > 0 && committed.elapsed() >= Duration::from_secs(seconds);
            // A commit that a rollback would come back to is made after a finite step only.
            if is_due && not_finite == 0 || at.step == at.steps || signal != 0 {
                self.commit(at).await?;
                (committed, is_due) = (Instant::now(), false);
            }
            if signal != 0 {
                return Ok(Next::Stopped(signal));
            }
        }
        Ok(Next::Finished)
    }

    /// One step of the stage's kind, and its line for the journal.
    async fn step(&self, at: &Position) -> Result<(StepReport, Event), Failure> {
        let stage = &self.config.stages[at.index];
        if let StageKind::Grpo(settings) = &stage.kind {
            let aligned = self.align(at, settings, None).await?;
            self.require_exact(stage, at.step + 1, &aligned).await?;
            let event = aligned.event(stage, at.step + 1, &self.site.machines);
            let groups = aligned.scored.groups;
            let rollouts = RecordRollouts { stage: stage.name.clone(), step: at.step + 1, groups };
            self.ask(&self.ports.record_rollouts, rollouts).await?;
            return Ok((aligned.report, event));
        }
        let began = Instant::now();
        let trainer = match stage.kind {
            StageKind::Pretrain(_) | StageKind::LongContext(_) => &self.ports.pretrainer.step,
            _ => &self.ports.fine_tuner.step,
        };
        let entered = self.enter(Phase::Train).await?;
        let report =
            self.ask(trainer, TrainStep { id: self.id(), stage: at.index, step: at.step }).await?;
        let seconds = began.elapsed().as_secs_f64();
        let event = step_event(stage, at.step + 1, &report, seconds, &entered)
            .with("useful_share", useful_share(report.useful_flops, seconds, &self.site.machines))
            .with("phase_seconds", serde_json::json!({"train": report.seconds}));
        Ok((report, event))
    }

    /// Counts a step without a finite loss or gradient; the third in a row ends the pass.
    async fn note_skipped(&self, at: &Position, in_a_row: u64) -> Result<(), Failure> {
        let stage = &self.config.stages[at.index];
        let event =
            Event::new("skipped").of_stage(&stage.name, stage.kind.name()).with("step", at.step);
        self.record(event.with("in_a_row", in_a_row)).await?;
        if in_a_row < NOT_FINITE_LIMIT {
            return Ok(());
        }
        let text = format!(
            "stage {:?}: steps {} to {} had no finite loss or gradient",
            stage.name,
            at.step + 1 - NOT_FINITE_LIMIT,
            at.step
        );
        Err(Failure::new(FailureKind::NotFinite, text))
    }

    async fn commit(&self, at: &Position) -> Result<(), Failure> {
        let stage = &self.config.stages[at.index];
        self.ask(&self.ports.sync_journal, SyncJournal {}).await?;
        let ahead = self.ahead.borrow().clone().map(Box::new);
        let request = CommitCheckpoint { id: self.id(), place: self.place(at), ahead };
        let commit = self.ask(&self.ports.commit, request).await?;
        let event =
            Event::new("commit").of_stage(&stage.name, stage.kind.name()).with("step", at.step);
        self.record(event.with("folder", commit.folder)).await
    }

    /// Fits and keeps the scale of a reward model's scores.
    async fn calibrate(&self, index: usize) -> Result<(), Failure> {
        self.enter(Phase::Score).await?;
        let scale =
            self.ask(&self.ports.fit_scale, FitScale { id: self.id(), stage: index }).await?;
        self.ask(&self.ports.calibrate, Calibrate { id: self.id(), scale }).await
    }

    /// Has the device change its phase, unless it is there.
    pub(super) async fn enter(&self, phase: Phase) -> Result<PhaseReport, Failure> {
        self.enter_as(phase, Dtype::F32).await
    }

    /// The same; in Generate the policy is packed as `sample_as`.
    pub(super) async fn enter_as(
        &self,
        phase: Phase,
        sample_as: Dtype,
    ) -> Result<PhaseReport, Failure> {
        if let Some((current, kept, report)) = &*self.phase.borrow()
            && (*current, *kept) == (phase, sample_as)
        {
            let PhaseReport { held, high_water, sampled_as, .. } = report.clone();
            return Ok(PhaseReport { held, high_water, sampled_as, ..PhaseReport::default() });
        }
        self.desk.say(&format!("{phase:?}").to_lowercase());
        let request = EnterPhase { id: self.id(), phase, sample_as };
        let report = self.ask(&self.ports.enter_phase, request).await?;
        self.phase.replace(Some((phase, sample_as, report.clone())));
        Ok(report)
    }

    /// The id of the next request.
    pub(super) fn id(&self) -> WorkId {
        self.numbers.set(self.numbers.get() + 1);
        WorkId { director: self.generation, number: self.numbers.get(), part: 0 }
    }

    /// Sends a request and waits for the reply.
    pub(super) async fn ask<M, R>(&self, port: &Port<M>, message: M) -> Result<R, Failure>
    where
        M: actix::Message<Result = Result<R, Failure>> + Named + Clone + Send + 'static,
        R: Send + 'static,
    {
        let mut asked = Box::pin(port.ask(message));
        if self.hazard.is_due(M::NAME) {
            // The request is on its way; whom it is for takes it while the journal is written.
            let send = poll_fn(|context| {
                let _reply = asked.as_mut().poll(context);
                Poll::Ready(())
            });
            send.await;
            self.hazard.strike(M::NAME).await?;
        }
        asked.await
    }

    pub(super) async fn record(&self, event: Event) -> Result<(), Failure> {
        self.ask(&self.ports.record, Record { event }).await
    }

    fn place(&self, at: &Position) -> Place {
        let name = self.config.stages[at.index].name.clone();
        Place { stage: at.index, name, step: at.step, finished: at.step == at.steps }
    }
}

/// Where a stage stands.
pub(super) struct Position {
    pub(super) index: usize,
    pub(super) step: u64,
    pub(super) steps: u64,
    pub(super) version: u64,
}

fn not_finite_again(failure: &Failure) -> Failure {
    let text = format!(
        "{}, also after going back to the last commit; lower the stage's optimizer.learning_rate, raise warmup_steps \
         or lower clip, and look for broken examples in its data",
        failure.text
    );
    Failure::new(FailureKind::NotFinite, text)
}
