//! Evals and gates, as the Director walks them: who measures what, when, and whether the run goes
//! on.
//!
//! Knows no example: the RolloutGenerator measures replies, the Pretrainer texts, the FineTuner
//! pairs.

use super::director::{Direction, Position};
use super::messages::*;
use super::reader::{Measured, measured};
use crate::config::stage::{EvalConfig, Gate};
use crate::config::{Dtype, Stage};
use crate::console::Event;
use crate::engine::phase::Phase;

/// When evals are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// Before the stage's first step.
    Before,
    /// After a step that is not the last.
    Between,
    /// After the last step.
    End,
}

/// An eval's name and figure.
pub(super) type Figure = (String, f64);

impl Direction {
    /// Measures what is due and writes it to the journal.
    pub(super) async fn measure(
        &self,
        at: &Position,
        moment: Moment,
    ) -> Result<Vec<Figure>, Failure> {
        let stage = &self.config.stages[at.index];
        let mut figures = Vec::new();
        for (number, eval) in
            stage.eval.iter().enumerate().filter(|(_, eval)| is_due(eval, moment, at.step))
        {
            let (phase, port) = match measured(eval)? {
                Measured::Replies => (Phase::Generate, &self.ports.measure_replies),
                Measured::Texts => (Phase::Score, &self.ports.pretrainer.measure),
                Measured::Pairs => (Phase::Score, &self.ports.fine_tuner.measure),
            };
            match phase {
                Phase::Generate => self.ready_to_sample(at.version, Dtype::F32).await?.report,
                phase => self.enter(phase).await?,
            };
            let request = Measure {
                id: self.id(),
                stage: at.index,
                eval: number,
                policy_version: at.version,
            };
            let result = self.ask(port, request).await?;
            self.record(eval_event(stage, eval, at.step, &result)?).await?;
            figures.push((eval.name.clone(), result.value));
        }
        Ok(figures)
    }

    /// Stops the run if the stage fell short of its gate.
    pub(super) fn check_gate(&self, stage: &Stage, figures: &[Figure]) -> Result<(), Failure> {
        let Some(gate) = &stage.gate else { return Ok(()) };
        match shortfall(gate, figures) {
            None => Ok(()),
            Some(what) => {
                let text = format!(
                    "stage {:?} did not reach its gate: {what}; change [stage.gate] and go on with --resume, or train the \
                     stage for longer and start anew with --fresh",
                    stage.name
                );
                Err(Failure::new(FailureKind::Other, text))
            }
        }
    }
}

fn is_due(eval: &EvalConfig, moment: Moment, step: u64) -> bool {
    match moment {
        Moment::Before => eval.before,
        Moment::Between => eval.every > 0 && step.is_multiple_of(eval.every),
        Moment::End => true,
    }
}

/// How the figures miss the gate, if they do.
fn shortfall(gate: &Gate, figures: &[Figure]) -> Option<String> {
    let Some((name, value)) = figures.iter().find(|(name, _)| *name == gate.eval) else {
        return Some(format!("eval {:?} was not measured", gate.eval));
    };
    // A figure that is not a number passes neither comparison, and so no gate.
    if let Some(minimum) = gate.minimum.filter(|minimum| !value.ge(minimum)) {
        return Some(format!("{name} = {value:.4}, at least {minimum} is needed"));
    }
    let maximum = gate.maximum.filter(|maximum| !value.le(maximum))?;
    Some(format!("{name} = {value:.4}, at most {maximum} is allowed"))
}

fn eval_event(
    stage: &Stage,
    eval: &EvalConfig,
    step: u64,
    result: &Measurement,
) -> Result<Event, Failure> {
    let metric = match measured(eval)? {
        Measured::Replies if eval.as_rate => "rate",
        Measured::Replies => "pass_at_1",
        Measured::Texts => "perplexity",
        Measured::Pairs => "accuracy",
    };
    let kind = stage.kind.name();
    let mut event =
        Event::eval(&stage.name, kind, step, &eval.name, metric, result.value, result.samples);
    if let Some(mean_tokens) = result.mean_tokens {
        event = event.with("mean_tokens", mean_tokens);
    }
    if !result.shown.is_empty() {
        event = event.with("replies", &result.shown);
    }
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_names_the_figure_that_falls_short_and_lets_no_nan_through() {
        let gate = Gate { eval: "held-out".to_string(), minimum: Some(0.5), maximum: None };
        assert_eq!(shortfall(&gate, &[("held-out".to_string(), 0.5)]), None);
        let low = shortfall(&gate, &[("held-out".to_string(), 0.25)]).unwrap();
        assert_eq!(low, "held-out = 0.2500, at least 0.5 is needed");
        assert!(shortfall(&gate, &[("held-out".to_string(), f64::NAN)]).is_some());
        assert!(shortfall(&gate, &[]).unwrap().contains("was not measured"));
    }
}
