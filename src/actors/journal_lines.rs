//! What the Director writes of a run and of a step: the keys that every line of a kind has.

use crate::config::stage::{Stage, StageKind};
use crate::console::Event;
use crate::engine::phase::PhaseReport;
use crate::engine::phase::StepReport;

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
        .with("expert_load", &report.expert_load)
}

/// A stage, as the run's first line lists it.
pub(super) fn describe(stage: &Stage) -> serde_json::Value {
    let steps = match &stage.kind {
        StageKind::Pretrain(s) => Some(s.steps),
        StageKind::LongContext(s) => Some(s.steps),
        StageKind::Grpo(s) => Some(s.steps),
        StageKind::Sft(_) | StageKind::RewardModel(_) => None,
    };
    serde_json::json!({"name": stage.name, "kind": stage.kind.name(), "steps": steps})
}
