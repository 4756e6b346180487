//! One step of alignment, as the Director walks it: sample, score, update.
//!
//! 1. `EnterPhase(Generate)`, then `GenerateGroups`: groups are sampled and, as each ends, judged.
//! 2. `EnterPhase(Score)`, then `ScoreGroups`: reward models, the reference, rewards and
//!    advantages.
//! 3. `EnterPhase(Train)`, then `UpdatePolicy`.
//!
//! Where a stage's `max_staleness` is 1, the next step's groups are sampled before 2, or beside 2 and 3 by ranks that only
//! sample.
//!
//! Where `engine.exact` is on, a step whose sampler and trainer disagree in one bit ends the run before anything of it is
//! kept (docs/adr/011).
//!
//! Knows what a step reports and nothing of how a reward is made.

use super::director::{Direction, Position};
use super::journal_lines::{offload, step_event};
use super::messages::*;
use super::post::seconds_now;
use crate::config::stage::GrpoStage;
use crate::config::{Dtype, Stage};
use crate::console::Event;
use crate::data::example::Prompt;
use crate::engine::Machine;
use crate::engine::phase::GenerateReport;
use crate::engine::phase::StepReport;
use crate::engine::phase::{Phase, PhaseReport};
use crate::engine::timeline::Timeline;
use crate::engine::utilisation::{
    Chores, Switched, padding_share, rollout_bandwidth, tail_factor, useful_share,
};
use crate::rl::rollout::JudgedGroup;
use serde_json::json;
use std::time::Instant;

/// What one step of alignment did.
pub(super) struct Aligned {
    pub(super) scored: ScoredGroups,
    pub(super) report: StepReport,
    updates: u64,
    skipped_updates: u64,
    pub(super) seconds: f64,
    /// What the sampler's weights were, and of which version; the version that the step changed.
    sampled_as: Dtype,
    sampled_version: u64,
    version: u64,
    sampled: GenerateReport,
    /// Start and end of sampling and judging, in seconds since the step began.
    intervals: [[f64; 2]; 2],
    /// Of scoring by models and of the update, likewise, and of sampling for the next step.
    spans: [[f64; 2]; 2],
    ahead: Option<[f64; 2]>,
    score_seconds: f64,
    entered: PhaseReport,
    enter_seconds: f64,
    /// What moved beside what was computed.
    timeline: Timeline,
    /// Of the changes of phase, and of scoring.
    chores: [Chores; 4],
}

impl Direction {
    /// One step of a stage; `prompts` stand in for the stage's own.
    pub(super) async fn align(
        &self,
        at: &Position,
        settings: &GrpoStage,
        prompts: Option<Vec<Prompt>>,
    ) -> Result<Aligned, Failure> {
        let (began, began_at) = (Instant::now(), seconds_now());
        let known = self.ahead.take().filter(|batch| batch.step == at.step);
        let (batch, mut entered) = match known {
            Some(batch) => (batch, Entered::default()),
            None => {
                let entered = self.ready_to_sample(at.version, settings.rollout_dtype).await?;
                (
                    self.sample(at, at.step, settings, prompts, &entered).await?,
                    Entered::of(&entered),
                )
            }
        };
        // The next batch is sampled before the policy changes.
        let is_ahead = settings.max_staleness > 0 && at.step + 1 < at.steps;
        let (next, updated) = match is_ahead {
            false => (None, self.update(settings, batch.generated.groups).await?),
            true => {
                let ready = self.ready_to_sample(at.version, settings.rollout_dtype).await?;
                entered = entered.and(Entered::of(&ready));
                let next = self.sample(at, at.step + 1, settings, None, &ready);
                let update = self.update(settings, batch.generated.groups);
                let (next, updated) = match self.ports.sampler {
                    Some(_) => tokio::try_join!(next, update)?,
                    None => (next.await?, update.await?),
                };
                (Some(next), updated)
            }
        };
        let since = |[start, end]: [f64; 2]| [start - began_at, end - began_at];
        let ahead = next.as_ref().map(|next| since(next.generated.generate));
        self.ahead.replace(next);
        let Updated { scored, update, timeline, entered: last, spans, .. } = updated;
        let Updated { score_seconds, scoring, training, .. } = updated;
        Ok(Aligned {
            scored,
            report: update.report,
            updates: update.updates,
            skipped_updates: update.skipped_updates,
            seconds: began.elapsed().as_secs_f64(),
            sampled_as: batch.sampled_as,
            sampled_version: batch.policy_version,
            version: at.version,
            sampled: batch.generated.report,
            intervals: [since(batch.generated.generate), since(batch.generated.judge)],
            spans: spans.map(since),
            ahead,
            score_seconds,
            enter_seconds: entered.seconds + scoring.seconds + training.seconds,
            // What scoring did beside rewards is told when its phase is left.
            chores: [entered.chores, scoring.chores, last.left, training.chores],
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
        Ok(SampledBatch { step, policy_version, sampled_as, generated })
    }

    /// Scores a batch with models, and updates the policy by it.
    async fn update(
        &self,
        settings: &GrpoStage,
        groups: Vec<JudgedGroup>,
    ) -> Result<Updated, Failure> {
        let start = seconds_now();
        let entered = self.enter(Phase::Score).await?;
        let (scoring, began) = (Entered::of(&entered), Instant::now());
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
        let timeline = self.stay(Phase::Train).await?.timeline;
        let spans = [score, train];
        Ok(Updated { scored, update, timeline, entered, spans, score_seconds, scoring, training })
    }

    /// Has the device tell how it stands in the phase that it is in.
    async fn stay(&self, phase: Phase) -> Result<PhaseReport, Failure> {
        let request = EnterPhase { id: self.id(), phase, sample_as: Dtype::F32 };
        self.ask(&self.ports.enter_phase, request).await
    }
}

/// Changes of phase: their seconds, and what of them went into what.
#[derive(Clone, Copy, Default)]
struct Entered {
    seconds: f64,
    chores: Chores,
}

impl Entered {
    fn of(report: &PhaseReport) -> Entered {
        Entered { seconds: report.seconds, chores: report.chores }
    }

    fn and(self, other: Entered) -> Entered {
        let Chores { pack_seconds, offload_seconds, reference_seconds, switched } = other.chores;
        let mut chores = self.chores;
        chores.pack_seconds += pack_seconds;
        chores.offload_seconds += offload_seconds;
        chores.reference_seconds += reference_seconds;
        chores.switched(switched);
        Entered { seconds: self.seconds + other.seconds, chores }
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
    scoring: Entered,
    training: Entered,
}

impl Direction {
    /// Ends the run at a step whose sampler and trainer disagree, if `engine.exact` promises that they do not.
    pub(super) async fn require_exact(
        &self,
        stage: &Stage,
        step: u64,
        aligned: &Aligned,
    ) -> Result<(), Failure> {
        let gap = aligned.report.grpo.as_ref().map_or(0.0, |grpo| grpo.logprob_gap_max);
        // A step without finite numbers changed no weight and is counted as such.
        let is_undefined = aligned.report.skipped && gap.is_nan();
        // Rollouts of an older policy have its log-probabilities.
        let is_stale = aligned.sampled_version != aligned.version;
        if !self.config.engine.exact || gap == 0.0 || is_undefined || is_stale {
            return Ok(());
        }
        let alarm = format!(
            "stage {:?}, step {step}: the log-probability of a token differs by {gap:e} between sampler and trainer, and \
             engine.exact promises 0",
            stage.name
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

impl Aligned {
    /// Where the step's time went; `memory` are page faults and allocations.
    pub(super) fn times(&self, [page_faults, heap_allocations]: [u64; 2]) -> BenchStep {
        let grpo = self.report.grpo.clone().unwrap_or_default();
        BenchStep {
            seconds: self.seconds,
            generate_seconds: self.sampled.seconds,
            score_seconds: self.score_seconds,
            train_seconds: self.report.seconds,
            new_tokens: self.sampled.new_tokens,
            trained_tokens: self.report.tokens,
            trained_share: grpo.trained_share,
            logprob_gap_max: grpo.logprob_gap_max,
            useful_flops: self.useful_flops(),
            rollout_dtype: self.sampled_as,
            sampler_kl: grpo.sampler_kl,
            importance: grpo.importance,
            page_faults,
            heap_allocations,
        }
    }

    /// FLOPs that the step was for: prompts and replies once in sampling, and thrice where they are trained on.
    fn useful_flops(&self) -> f64 {
        self.sampled.useful_flops + self.report.useful_flops
    }

    /// Seconds of the step in which the device did nothing but what each name says. Rewards are judged while others are
    /// sampled: what is exposed of them begins when sampling has ended.
    fn exposed(&self) -> serde_json::Value {
        let sum = |figure: fn(&Chores) -> f64| self.chores.iter().map(figure).sum::<f64>();
        let [[_, sampled], [_, judged]] = self.intervals;
        let [_, _, scoring, _] = &self.chores;
        let beside = scoring.pack_seconds + scoring.offload_seconds + scoring.reference_seconds;
        json!({
            "reward": (judged - sampled).max(0.0) + (self.score_seconds - beside).max(0.0),
            "reference": sum(|chores| chores.reference_seconds),
            "sync": sum(|chores| chores.pack_seconds) + self.report.pack_seconds,
            "offload": sum(|chores| chores.offload_seconds),
        })
    }

    /// What changes of the layout of ranks moved, beside the least that any would; absent where nothing moved.
    fn switch(&self) -> Option<serde_json::Value> {
        let mut sum = Chores::default();
        self.chores.iter().for_each(|chores| sum.switched(chores.switched));
        let Switched { moved_bytes, least_bytes, seconds, .. } = sum.switched;
        (moved_bytes > 0).then(
            || json!({"moved_bytes": moved_bytes, "least_bytes": least_bytes, "seconds": seconds}),
        )
    }

    fn intervals_by_name(&self, generate: [f64; 2], judge: [f64; 2]) -> serde_json::Value {
        let [score, train] = self.spans;
        let mut named =
            json!({"generate": generate, "judge": judge, "score": score, "train": train});
        if let Some(ahead) = self.ahead {
            named["ahead"] = json!(ahead);
        }
        named
    }

    /// The step's line for the journal.
    pub(super) fn event(&self, stage: &Stage, step: u64, machine: &Machine) -> Event {
        let statistics = &self.scored.statistics;
        let rewards: serde_json::Map<_, _> = statistics
            .components
            .iter()
            .map(|(name, component)| (name.clone(), json!(component.mean)))
            .collect();
        let grpo = self.report.grpo.clone().unwrap_or_default();
        let [generate, judge] = self.intervals;
        let moves = (!self.timeline.moved.is_empty()).then_some(&self.timeline);
        step_event(stage, step, &self.report, self.seconds, &self.entered)
            .with("updates", self.updates)
            .with("skipped_updates", self.skipped_updates)
            .with("reward_mean", statistics.reward_mean)
            .with("reward_deviation", statistics.reward_deviation)
            .with("rewards", rewards)
            .with("kl", grpo.kl)
            .with("entropy", (grpo.trained_share > 0.0).then_some(grpo.entropy))
            .with("clip_share", grpo.clip_share)
            .with("length_mean", statistics.length_mean)
            .with("stopped_by_length", statistics.stopped_by_length)
            .with("zero_variance_groups", statistics.zero_variance_groups)
            .with("trained_share", grpo.trained_share)
            .with("trained_rows", self.report.rows)
            .with("logprob_gap_max", grpo.logprob_gap_max)
            .with("logprob_gap_mean", grpo.logprob_gap_mean)
            .with("rollout_dtype", self.sampled_as)
            .with("sampler_kl", grpo.sampler_kl)
            .with("importance_weight_mean", grpo.importance.map(|weights| weights.weight_mean))
            .with("truncated_share", grpo.importance.map(|weights| weights.truncated_share))
            .with("new_tokens", self.sampled.new_tokens)
            .with("rfu", useful_share(self.useful_flops(), self.seconds, machine))
            .with("rollout_bandwidth", rollout_bandwidth(&self.sampled, machine))
            .with("tail_factor", tail_factor(&self.sampled))
            .with("padding_share", padding_share(&self.report))
            .with("exposed_seconds", self.exposed())
            .with("offload_exposed_share", moves.map(Timeline::exposed_share))
            .with("offload", moves.map(offload))
            .with("switch", self.switch())
            .with("policy_version", self.report.policy_version)
            .with("sampled_version", self.sampled_version)
            .with("intervals", self.intervals_by_name(generate, judge))
            .with(
                "phase_seconds",
                json!({
                    "generate": self.sampled.seconds,
                    "score": self.score_seconds,
                    "train": self.report.seconds,
                    "enter": self.enter_seconds,
                }),
            )
    }
}
