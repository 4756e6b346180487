//! What the Director writes of a run and of a step: the keys that every line of a kind has.

use super::director::Site;
use crate::cluster::{Doing, Span};
use crate::config::RunConfig;
use crate::config::stage::{Stage, StageKind};
use crate::console::Event;
use crate::engine::offload_plan::Tier;
use crate::engine::phase::{LayerRouting, PhaseReport, StepReport};
use crate::engine::timeline::Timeline;

/// The keys that every step's line has.
pub(super) fn step_event(
    stage: &Stage,
    step: u64,
    report: &StepReport,
    seconds: f64,
    entered: &PhaseReport,
) -> Event {
    Event::step(&stage.name, stage.kind.name(), step)
        .with("loss", report.loss)
        .with("balance_loss", report.balance_loss)
        .with("accuracy", report.accuracy)
        .with("learning_rate", report.learning_rate)
        .with("gradient_norm", report.gradient_norm)
        .with("skipped", report.skipped)
        .with("micro_batch", report.micro_batch)
        .with("tokens", report.tokens)
        .with("tokens_per_second", report.tokens as f64 / seconds.max(1e-9))
        .with("seconds", seconds)
        .with("memory", &entered.held)
        .with("memory_high_water", entered.high_water.max(report.memory_high_water))
        .with("expert_load", report.routing.iter().map(|r| &r.expert_load).collect::<Vec<_>>())
        .with("routing", report.routing.iter().map(routing).collect::<Vec<_>>())
        .with("dropped", dropped(report))
        .with("ranks", (!report.ran.is_empty()).then(|| passes(report)))
        .with("all_to_all", exchanges(report.exchanged))
}

/// What each rank did when: its number, the pass, start and end in seconds since the first of them began, to the microsecond,
/// and, where it is one of a pipeline's, micro-batch and piece of the stage.
fn passes(report: &StepReport) -> Vec<serde_json::Value> {
    let all = || report.ran.iter().flat_map(|(rank, spans)| spans.iter().map(move |s| (rank, s)));
    let began = all().map(|(_, span)| span.start).fold(f64::INFINITY, f64::min);
    let since = |at: f64| ((at - began) * 1e6).round() / 1e6;
    let told = |(rank, span): (&u32, &Span)| {
        let name = span.doing.name()?;
        let (micro_batch, piece) = match span.doing {
            Doing::Forward(m, p) | Doing::BackwardInput(m, p) | Doing::BackwardWeight(m, p) => {
                (Some(m), Some(p))
            }
            _ => (None, None),
        };
        let (start, end) = (since(span.start), since(span.end));
        Some(serde_json::json!([rank, name, start, end, micro_batch, piece]))
    };
    all().filter_map(told).collect()
}

/// Seconds under way of all-to-all exchanges, and the share of them that shared experts' computation was beside.
fn exchanges([seconds, covered]: [f64; 2]) -> Option<serde_json::Value> {
    let told = || serde_json::json!({ "seconds": seconds, "covered": covered / seconds });
    (seconds > 0.0).then(told)
}

/// A layer's routing in figures; the loads of its experts stand in a list of their own.
fn routing(layer: &LayerRouting) -> serde_json::Value {
    serde_json::json!({
        "expert_cv": layer.expert_cv,
        "device_load_max": layer.devices.map(|d| d.max_over_mean),
        "devices_per_token": layer.devices.map(|d| d.per_token),
        "dropped": layer.drops.map(|d| d.dropped),
        "protected_overflow": layer.drops.map(|d| d.protected),
    })
}

/// The share of all pairs of token and expert that were dropped; all layers have equally many.
fn dropped(report: &StepReport) -> Option<f64> {
    let shares: Option<Vec<f64>> =
        report.routing.iter().map(|layer| layer.drops.map(|drops| drops.dropped)).collect();
    let shares = shares.filter(|shares| !shares.is_empty())?;
    Some(shares.iter().sum::<f64>() / shares.len() as f64)
}

/// What a step moved, and when, beside what was computed; seconds since the step began, to the microsecond.
pub(super) fn offload(timeline: &Timeline) -> serde_json::Value {
    let micro = |seconds: f64| (seconds * 1e6).round() / 1e6;
    let [bytes_in, bytes_out] = timeline.bytes();
    let computed = timeline.computed.iter().map(|span| {
        let [start, end] = span.at.map(micro);
        serde_json::json!([span.phase, start, end])
    });
    let moved = timeline.moved.iter().map(|moved| {
        let ([start, end], is_read) = (moved.at.map(micro), moved.to == Tier::Device);
        let way = if is_read { "read" } else { "write" };
        serde_json::json!([moved.item, way, moved.copy, start, end, moved.bytes])
    });
    serde_json::json!({
        "seconds": micro(timeline.seconds),
        "exposed_seconds": micro(timeline.exposed_seconds()),
        "overlap_share": timeline.overlap_share(),
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "computed": computed.collect::<Vec<_>>(),
        "waited": timeline.waited.iter().map(|at| at.map(micro)).collect::<Vec<_>>(),
        "moved": moved.collect::<Vec<_>>(),
    })
}

/// The first line of a run, or of what goes on with it.
pub(super) fn run_event(config: &RunConfig, site: &Site, resumed: bool) -> Event {
    Event::new("run")
        .with("resumed", resumed)
        .with("seed", config.seed)
        .with("machine", &site.machines.each)
        .with("ranks", site.machines.count)
        .with("sampling_ranks", site.machines.sampling)
        .with("processes", &site.processes)
        .with("stages", config.stages.iter().map(describe).collect::<Vec<_>>())
}

/// A stage, as the run's first line lists it.
fn describe(stage: &Stage) -> serde_json::Value {
    let steps = match &stage.kind {
        StageKind::Pretrain(s) => Some(s.steps),
        StageKind::LongContext(s) => Some(s.steps),
        StageKind::Grpo(s) => Some(s.steps),
        StageKind::Sft(_) | StageKind::RewardModel(_) => None,
    };
    serde_json::json!({"name": stage.name, "kind": stage.kind.name(), "steps": steps})
}
