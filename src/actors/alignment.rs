//! One step of alignment, as the Director walks it: sample, score, update.
//!
//! 1. `EnterPhase(Generate)`, then `GenerateGroups`: groups are sampled and, as each ends, judged.
//! 2. `EnterPhase(Score)`, then `ScoreGroups`: reward models, the reference, rewards and
//!    advantages.
//! 3. `EnterPhase(Train)`, then `UpdatePolicy`.
//!
//! Where `engine.exact` is on, a step whose sampler and trainer disagree in one bit ends the run before anything of it is
//! kept (docs/adr/011).
//!
//! Knows what a step reports and nothing of how a reward is made.

use super::director::Direction;
use super::journal_lines::step_event;
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
use crate::engine::utilisation::{
    Chores, padding_share, rollout_bandwidth, tail_factor, useful_share,
};
use serde_json::json;
use std::time::Instant;

/// What one step of alignment did.
pub(super) struct Aligned {
    pub(super) scored: ScoredGroups,
    pub(super) report: StepReport,
    updates: u64,
    skipped_updates: u64,
    pub(super) seconds: f64,
    /// What the sampler's weights were.
    sampled_as: Dtype,
    sampled: GenerateReport,
    /// Start and end of sampling and judging, in seconds since the step began.
    intervals: [[f64; 2]; 2],
    score_seconds: f64,
    entered: PhaseReport,
    enter_seconds: f64,
    /// Of the changes of phase, and of scoring.
    chores: [Chores; 4],
}

impl Direction {
    /// One step of stage number `stage`; `prompts` stand in for the stage's own.
    pub(super) async fn align(
        &self,
        stage: usize,
        step: u64,
        settings: &GrpoStage,
        policy_version: u64,
        prompts: Option<Vec<Prompt>>,
    ) -> Result<Aligned, Failure> {
        let (began, began_at) = (Instant::now(), seconds_now());
        let ports = &self.ports;

        let entered = self.enter_as(Phase::Generate, settings.rollout_dtype).await?;
        let sampled_as = entered.sampled_as.unwrap_or_default();
        let (mut enter_seconds, for_sampling) = (entered.seconds, entered.chores);
        let settings = settings.clone();
        let request = GenerateGroups {
            id: self.id(),
            stage,
            step,
            settings: settings.clone(),
            prompts,
            policy_version,
        };
        let generated = self.ask(&ports.generate, request).await?;

        let entered = self.enter(Phase::Score).await?;
        enter_seconds += entered.seconds;
        let for_scoring = entered.chores;
        let scoring = Instant::now();
        let request =
            ScoreGroups { id: self.id(), groups: generated.groups, settings: settings.clone() };
        let scored = self.ask(&ports.score, request).await?;
        let score_seconds = scoring.elapsed().as_secs_f64();

        let entered = self.enter(Phase::Train).await?;
        enter_seconds += entered.seconds;
        let request = UpdatePolicy { id: self.id(), groups: scored.groups.clone(), settings };
        let update = self.ask(&ports.update, request).await?;

        let since = |[start, end]: [f64; 2]| [start - began_at, end - began_at];
        Ok(Aligned {
            scored,
            report: update.report,
            updates: update.updates,
            skipped_updates: update.skipped_updates,
            seconds: began.elapsed().as_secs_f64(),
            sampled_as,
            sampled: generated.report,
            intervals: [since(generated.generate), since(generated.judge)],
            score_seconds,
            // What scoring did beside rewards is told when its phase is left.
            chores: [for_sampling, for_scoring, entered.left, entered.chores],
            entered,
            enter_seconds,
        })
    }
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
        if !self.config.engine.exact || gap == 0.0 || is_undefined {
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
            .with("intervals", json!({"generate": generate, "judge": judge}))
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
