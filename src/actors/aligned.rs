//! What a step of alignment tells of itself: the journal's line, and a bench's times.
//!
//! A step whose batch was sampled ahead, and in which the next one is, tells what was done in its own time: `window` and
//! `intervals`, `new_tokens` and shares of the machine. `sampled` says where its own batch comes from, whose rewards and
//! lengths it tells. All moments are seconds since 1970, as the journal's `time`.
//!
//! Invariants:
//!   * each of `intervals` lies in `window`
//!   * each batch is counted in one step, the one in which it was sampled

use super::crew::samplings;
use super::journal_lines::{offload, step_event};
use super::messages::*;
use crate::config::{Dtype, Stage};
use crate::console::Event;
use crate::engine::phase::{GenerateReport, GrpoReport, PhaseReport, StepReport};
use crate::engine::timeline::{Timeline, common};
use crate::engine::utilisation::{
    Chores, Machines, Switched, padding_share, rollout_bandwidth, tail_factor, useful_share,
};
use serde_json::{Map, Value, json};

/// What one step of alignment did.
pub(super) struct Aligned {
    pub(super) scored: ScoredGroups,
    pub(super) report: StepReport,
    pub(super) updates: u64,
    pub(super) skipped_updates: u64,
    pub(super) seconds: f64,
    /// Its start and end, in seconds since 1970 as all that follow.
    pub(super) window: [f64; 2],
    /// The version that it changed.
    pub(super) version: u64,
    /// The batch that it was for, and whether it was sampled in this step.
    pub(super) own: Origin,
    pub(super) is_own_here: bool,
    /// The batch that was sampled for the next step.
    pub(super) next: Option<Origin>,
    /// The policy's way to those that only sample.
    pub(super) handed_over: Option<[f64; 2]>,
    /// Start and end of scoring by models and of the update.
    pub(super) spans: [[f64; 2]; 2],
    pub(super) score_seconds: f64,
    pub(super) entered: PhaseReport,
    pub(super) enter_seconds: f64,
    /// What moved beside what was computed.
    pub(super) timeline: Timeline,
    /// Of the change to sampling, of the one to Score and sampling before it, of scoring, of the change to Train, and of the update.
    pub(super) chores: [Chores; 5],
}

/// Where a batch comes from.
pub(super) struct Origin {
    /// The step in which it was sampled, from 0.
    step: u64,
    /// What the sampler's weights were, and of which version.
    sampled_as: Dtype,
    version: u64,
    report: GenerateReport,
    generate: [f64; 2],
    judge: [f64; 2],
    compared: Option<Compared>,
}

impl Origin {
    /// Of a batch that was sampled in this step.
    pub(super) fn of(batch: &SampledBatch, step: u64) -> Origin {
        let SampledBatch { policy_version, sampled_as, generated, compared, .. } = batch;
        Origin {
            step,
            sampled_as: *sampled_as,
            version: *policy_version,
            report: generated.report.clone(),
            generate: generated.generate,
            judge: generated.judge,
            compared: *compared,
        }
    }
}

/// Changes of phase: their seconds, and what of them went into what.
#[derive(Clone, Copy, Default)]
pub(super) struct Entered {
    pub(super) seconds: f64,
    pub(super) chores: Chores,
}

impl Entered {
    pub(super) fn of(report: &PhaseReport) -> Entered {
        Entered { seconds: report.seconds, chores: report.chores }
    }

    /// The same, with what the jobs before it did beside their work.
    pub(super) fn after_jobs(report: &PhaseReport) -> Entered {
        Entered::of(report).and(Entered { seconds: 0.0, chores: report.left })
    }

    pub(super) fn and(self, other: Entered) -> Entered {
        let Chores { pack_seconds, offload_seconds, reference_seconds, switched } = other.chores;
        let mut chores = self.chores;
        chores.pack_seconds += pack_seconds;
        chores.offload_seconds += offload_seconds;
        chores.reference_seconds += reference_seconds;
        chores.switched(switched);
        Entered { seconds: self.seconds + other.seconds, chores }
    }
}

impl Aligned {
    /// Where the step's time went; `memory` are page faults and allocations.
    pub(super) fn times(&self, [page_faults, heap_allocations]: [u64; 2]) -> BenchStep {
        let (grpo, sampled) = (self.report.grpo.clone().unwrap_or_default(), self.sampled_here());
        BenchStep {
            seconds: self.seconds,
            generate_seconds: sampled.seconds,
            score_seconds: self.score_seconds,
            train_seconds: self.report.seconds,
            new_tokens: sampled.new_tokens,
            trained_tokens: self.report.tokens,
            trained_share: grpo.trained_share,
            logprob_gap_max: grpo.logprob_gap_max,
            useful_flops: sampled.useful_flops + self.report.useful_flops,
            rollout_dtype: self.own.sampled_as,
            sampler_kl: grpo.sampler_kl,
            importance: grpo.importance,
            page_faults,
            heap_allocations,
        }
    }

    /// The distance between a sampler and a trainer that should have none, and whether it is the next step's batch that
    /// has it.
    pub(super) fn disagreement(&self) -> Option<(f64, bool)> {
        let trained = self.report.grpo.as_ref().map_or(0.0, |grpo| grpo.logprob_gap_max);
        // A step without finite numbers changed no weight and is counted as such. Rollouts of an older policy were compared
        // when they were sampled.
        let is_undefined = self.report.skipped && trained.is_nan();
        let own = (!is_undefined && !self.is_stale()).then_some((trained, false));
        let compared = self.next.as_ref().and_then(|next| next.compared);
        let ahead = compared.map(|compared| (compared.gap_max, true));
        own.into_iter().chain(ahead).find(|(gap, _)| *gap != 0.0)
    }

    /// Whether the policy has changed since its batch was sampled.
    fn is_stale(&self) -> bool {
        self.own.version != self.version
    }

    /// The batches that were sampled in this step.
    fn here(&self) -> impl Iterator<Item = &Origin> {
        self.is_own_here.then_some(&self.own).into_iter().chain(&self.next)
    }

    /// What sampling did in this step, of one batch after the other.
    fn sampled_here(&self) -> GenerateReport {
        let after = |first: GenerateReport, then: GenerateReport| {
            let seconds = first.seconds + then.seconds;
            let prefill_seconds = first.prefill_seconds + then.prefill_seconds;
            GenerateReport { seconds, prefill_seconds, ..samplings(first, then) }
        };
        self.here().map(|batch| batch.report.clone()).reduce(after).unwrap_or_default()
    }

    /// Seconds of an interval outside the time from the start of scoring to the end of the update.
    fn alone(&self, at: [f64; 2]) -> f64 {
        let [[start, _], [_, end]] = self.spans;
        (at[1] - at[0]).max(0.0) - common(at, [start, end])
    }

    /// The share of the update's seconds beside which rollouts were sampled; absent where no batch is sampled ahead.
    fn sampling_overlap(&self) -> Option<f64> {
        let (next, [_, train]) = (self.next.as_ref()?, self.spans);
        (train[1] > train[0]).then(|| common(next.generate, train) / (train[1] - train[0]))
    }

    /// Seconds of the step in which the device did nothing but what each name says. Rewards are judged while others are
    /// sampled: what is exposed of them begins when sampling has ended.
    fn exposed(&self) -> Value {
        let sum = |figure: fn(&Chores) -> f64| self.chores.iter().map(figure).sum::<f64>();
        let judged = |batch: &Origin| self.alone([batch.generate[1], batch.judge[1]]);
        let [_, _, scoring, ..] = &self.chores;
        let beside = scoring.pack_seconds + scoring.offload_seconds + scoring.reference_seconds;
        let mut exposed = json!({
            "reward": self.here().map(judged).sum::<f64>() + (self.score_seconds - beside).max(0.0),
            "reference": sum(|chores| chores.reference_seconds),
            "sync": sum(|chores| chores.pack_seconds),
            "offload": sum(|chores| chores.offload_seconds),
        });
        if let Some(compared) = self.next.as_ref().and_then(|next| next.compared) {
            exposed["compare"] = json!(self.alone(compared.at));
        }
        exposed
    }

    /// What changes of the layout of ranks moved, beside the least that any would; absent where nothing moved.
    fn switch(&self) -> Option<Value> {
        let mut sum = Chores::default();
        self.chores.iter().for_each(|chores| sum.switched(chores.switched));
        let switched = sum.switched;
        let Switched { moved_bytes, least_bytes, seconds, cpu_seconds, .. } = switched;
        let told = json!({
            "moved_bytes": moved_bytes,
            "least_bytes": least_bytes,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "cpu_seconds_per_byte": switched.cpu_seconds_per_byte(),
        });
        (moved_bytes > 0).then_some(told)
    }

    /// What was done in this step, by name.
    fn intervals(&self) -> Value {
        let [score, train] = self.spans;
        let mut named = Map::new();
        let mut add = |name: &str, at: Option<[f64; 2]>| {
            named.extend(at.map(|at| (name.to_string(), json!(at))));
        };
        let own = self.is_own_here.then_some(&self.own);
        add("generate", own.map(|own| own.generate));
        add("judge", own.map(|own| own.judge));
        add("hand_over", self.handed_over);
        add("ahead", self.next.as_ref().map(|next| next.generate));
        add("judge_ahead", self.next.as_ref().map(|next| next.judge));
        let compared = self.next.as_ref().and_then(|next| next.compared);
        add("compare", compared.map(|compared| compared.at));
        add("score", Some(score));
        add("train", Some(train));
        named.into()
    }

    /// Where the batch comes from that was trained on.
    fn sampled(&self) -> Value {
        let Origin { step, version, generate, judge, .. } = &self.own;
        json!({"step": step + 1, "version": version, "generate": generate, "judge": judge})
    }
}

impl Aligned {
    /// The step's line for the journal.
    pub(super) fn event(&self, stage: &Stage, step: u64, machines: &Machines) -> Event {
        let statistics = &self.scored.statistics;
        let rewards: Map<_, _> = statistics
            .components
            .iter()
            .map(|(name, component)| (name.clone(), json!(component.mean)))
            .collect();
        let grpo = self.report.grpo.clone().unwrap_or_default();
        let (here, moves) = (self.sampled_here(), &self.timeline);
        let moves = (!moves.moved.is_empty()).then_some(moves);
        let useful_flops = here.useful_flops + self.report.useful_flops;
        let event = step_event(stage, step, &self.report, self.seconds, &self.entered)
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
            .with("rollout_dtype", self.own.sampled_as)
            .with("sampler_kl", grpo.sampler_kl)
            .with("importance_weight_mean", grpo.importance.map(|weights| weights.weight_mean))
            .with("truncated_share", grpo.importance.map(|weights| weights.truncated_share))
            .with("new_tokens", here.new_tokens)
            .with("rfu", useful_share(useful_flops, self.seconds, machines))
            .with("rollout_bandwidth", rollout_bandwidth(&here, machines))
            .with("tail_factor", tail_factor(&here))
            .with("padding_share", padding_share(&self.report))
            .with("exposed_seconds", self.exposed())
            .with("offload_exposed_share", moves.map(Timeline::exposed_share))
            .with("offload", moves.map(offload))
            .with("switch", self.switch())
            .with("policy_version", self.report.policy_version)
            .with("sampled_version", self.own.version)
            .with("sampled", self.sampled())
            .with("window", self.window)
            .with("intervals", self.intervals())
            .with("sampling_overlap", self.sampling_overlap())
            .with("phase_seconds", self.phase_seconds(here.seconds));
        let [gap, drift] = self.gaps(&grpo);
        event
            .with("logprob_gap_max", gap.map(|[max, _]| max))
            .with("logprob_gap_mean", gap.map(|[_, mean]| mean))
            .with("stale_gap_max", drift.map(|[max, _]| max))
            .with("stale_gap_mean", drift.map(|[_, mean]| mean))
    }

    fn phase_seconds(&self, generate: f64) -> Value {
        json!({
            "generate": generate,
            "score": self.score_seconds,
            "train": self.report.seconds,
            "enter": self.enter_seconds,
        })
    }

    /// Largest and mean distance of the batch's log-probabilities: between sampler and trainer of one version, and, if the
    /// policy has changed since, between the sampler and what is trained now.
    fn gaps(&self, grpo: &GrpoReport) -> [Option<[f64; 2]>; 2] {
        let trained = [grpo.logprob_gap_max, grpo.logprob_gap_mean];
        match self.is_stale() {
            false => [Some(trained), None],
            true => [self.own.compared.map(|own| [own.gap_max, own.gap_mean]), Some(trained)],
        }
    }
}
