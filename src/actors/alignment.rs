//! One step of alignment, as the Director walks it: sample, score, update.
//!
//! 1. `EnterPhase(Generate)`, then `GenerateGroups`: groups are sampled and, as each ends, judged.
//! 2. `EnterPhase(Score)`, then `ScoreGroups`: reward models, the reference, rewards and
//!    advantages.
//! 3. `EnterPhase(Train)`, then `UpdatePolicy`.
//!
//! Where a stage's `max_staleness` is 1, the next step's groups are sampled before 2, or beside 2 and 3 by ranks that only
//! sample. Training will not see them by the version that sampled them, so that who sampled them scores them by it
//! (`comparing`).
//!
//! Where `engine.exact` is on, a step whose sampler and trainer disagree in one bit ends the run before anything of it is
//! kept (docs/adr/011).
//!
//! Knows nothing of how a reward is made; what a step tells is in `aligned`.

use super::aligned::{Aligned, Entered, Origin};
use super::director::{Direction, Position};
use super::messages::*;
use super::post::seconds_now;
use crate::config::stage::GrpoStage;
use crate::config::{Dtype, Stage};
use crate::console::Event;
use crate::data::example::Prompt;
use crate::engine::phase::{Phase, PhaseReport};
use crate::engine::timeline::Timeline;
use crate::engine::utilisation::Chores;
use crate::rl::rollout::JudgedGroup;
use std::time::Instant;

impl Direction {
    /// One step of a stage; `prompts` stand in for the stage's own.
    pub(super) async fn align(
        &self,
        at: &Position,
        settings: &GrpoStage,
        prompts: Option<Vec<Prompt>>,
    ) -> Result<Aligned, Failure> {
        let (clock, began) = (Instant::now(), seconds_now());
        let known = self.ahead.take().filter(|batch| batch.step == at.step);
        let (mut entered, mut handed_over, mut next) = (Entered::default(), None, None);
        let (mut batch, sampled_in) = match known {
            // It was sampled beside the step before.
            Some(batch) => (batch, at.step.saturating_sub(1)),
            None => {
                let ready = self.ready_to_sample(at.version, settings.rollout_dtype).await?;
                (entered, handed_over) = (Entered::of(&ready.report), ready.handed_over);
                (self.sample(at, at.step, settings, prompts, &ready.report).await?, at.step)
            }
        };
        let own = Origin::of(&batch, sampled_in);
        let groups = std::mem::take(&mut batch.generated.groups);
        // The next batch is sampled before the policy changes.
        let is_ahead = settings.max_staleness > 0 && at.step + 1 < at.steps;
        let updated = match is_ahead {
            false => self.update(settings, groups).await?,
            true => {
                let ready = self.ready_to_sample(at.version, settings.rollout_dtype).await?;
                entered = entered.and(Entered::of(&ready.report));
                handed_over = handed_over.or(ready.handed_over);
                let ahead = self.sample_ahead(at, settings, &ready.report);
                let update = self.update(settings, groups);
                let ((ahead, compared), updated) = match self.ports.sampler {
                    Some(_) => tokio::try_join!(ahead, update)?,
                    None => (ahead.await?, update.await?),
                };
                entered = entered.and(compared);
                next = Some(Origin::of(&ahead, at.step));
                self.ahead.replace(Some(ahead));
                updated
            }
        };
        let Updated { scored, update, timeline, entered: last, spans, .. } = updated;
        let Updated { score_seconds, scoring, training, trained, .. } = updated;
        Ok(Aligned {
            scored,
            report: update.report,
            updates: update.updates,
            skipped_updates: update.skipped_updates,
            seconds: clock.elapsed().as_secs_f64(),
            window: [began, seconds_now()],
            version: at.version,
            own,
            is_own_here: sampled_in == at.step,
            next,
            handed_over,
            spans,
            score_seconds,
            enter_seconds: entered.seconds + scoring.seconds + training.seconds,
            // What scoring did beside rewards is told when its phase is left.
            chores: [entered.chores, scoring.chores, last.left, training.chores, trained],
            entered: last,
            timeline,
        })
    }

    /// Samples and judges the batch of a step with the policy as it is.
    async fn sample(
        &self,
        at: &Position,
        step: u64,
        settings: &GrpoStage,
        prompts: Option<Vec<Prompt>>,
        ready: &PhaseReport,
    ) -> Result<SampledBatch, Failure> {
        let request = GenerateGroups {
            id: self.id(),
            stage: at.index,
            step,
            settings: settings.clone(),
            prompts,
            policy_version: at.version,
        };
        let generated = self.ask(&self.ports.generate, request).await?;
        let (policy_version, sampled_as) = (at.version, ready.sampled_as.unwrap_or_default());
        Ok(SampledBatch { step, policy_version, sampled_as, generated, compared: None })
    }

    /// The batch of the next step, and how far from the trainer's numbers it was sampled.
    async fn sample_ahead(
        &self,
        at: &Position,
        settings: &GrpoStage,
        ready: &PhaseReport,
    ) -> Result<(SampledBatch, Entered), Failure> {
        let mut batch = self.sample(at, at.step + 1, settings, None, ready).await?;
        let groups = &batch.generated.groups;
        let (compared, entered) = self.compare(groups, settings.temperature).await?;
        batch.compared = Some(compared);
        Ok((batch, entered))
    }

    /// Scores a batch with models, and updates the policy by it.
    async fn update(
        &self,
        settings: &GrpoStage,
        groups: Vec<JudgedGroup>,
    ) -> Result<Updated, Failure> {
        let start = seconds_now();
        let entered = self.enter(Phase::Score).await?;
        let (scoring, began) = (Entered::after_jobs(&entered), Instant::now());
        let settings = settings.clone();
        let request = ScoreGroups { id: self.id(), groups, settings: settings.clone() };
        let scored = self.ask(&self.ports.score, request).await?;
        let score_seconds = began.elapsed().as_secs_f64();

        let entered = self.enter(Phase::Train).await?;
        let (training, began) = (Entered::of(&entered), seconds_now());
        let score = [start, began];
        let request = UpdatePolicy { id: self.id(), groups: scored.groups.clone(), settings };
        let update = self.ask(&self.ports.update, request).await?;
        let train = [began, seconds_now()];
        let PhaseReport { timeline, left: trained, .. } = self.stay(Phase::Train).await?;
        let spans = [score, train];
        Ok(Updated {
            scored,
            update,
            timeline,
            entered,
            spans,
            score_seconds,
            scoring,
            training,
            trained,
        })
    }

    /// Has the device tell how it stands in the phase that it is in.
    pub(super) async fn stay(&self, phase: Phase) -> Result<PhaseReport, Failure> {
        let request = EnterPhase { id: self.id(), phase, sample_as: Dtype::F32 };
        self.ask(&self.ports.enter_phase, request).await
    }
}

/// What scoring and the update of a batch did.
struct Updated {
    scored: ScoredGroups,
    update: PolicyUpdate,
    /// What moved since the step began.
    timeline: Timeline,
    /// The change to Train.
    entered: PhaseReport,
    /// Start and end of scoring by models, changes of phase included, and of the update, in seconds since 1970.
    spans: [[f64; 2]; 2],
    score_seconds: f64,
    /// The change to Score, with what sampling did beside its work.
    scoring: Entered,
    training: Entered,
    /// What the update did beside its work.
    trained: Chores,
}

impl Direction {
    /// Ends the run at a step in which a sampler and a trainer disagree, if `engine.exact` promises that they do not.
    pub(super) async fn require_exact(
        &self,
        stage: &Stage,
        step: u64,
        aligned: &Aligned,
    ) -> Result<(), Failure> {
        let found = aligned.disagreement().filter(|_| self.config.engine.exact);
        let Some((gap, ahead)) = found else { return Ok(()) };
        let alarm = format!(
            "stage {:?}, step {step}: the log-probability of a token{} differs by {gap:e} between sampler and trainer, and \
             engine.exact promises 0",
            stage.name,
            if ahead { " that was sampled for the next step" } else { "" }
        );
        let event = Event::new("alarm").of_stage(&stage.name, stage.kind.name()).with("step", step);
        self.record(event.with("logprob_gap_max", gap).with("reason", &alarm)).await?;
        let text = format!(
            "{alarm}; nothing of the step is kept. Go on from the last commit: if the step passes then, memory or processor \
             erred; if not, it is a fault of this program, and engine.exact = false, in a new folder, does without the promise"
        );
        Err(Failure::new(FailureKind::Inexact, text))
    }
}
