//! A step's timeline as a picture: a lane for each stage, a colour for each kind of pass. The same plan gives the same bytes.

use super::step::Step;
use crate::console::lanes::{Lane, passes_timeline};
use crate::plan::simulation::engine::{Span, What};
use crate::train::pipeline::{Kind, Pass, Schedule};

/// Its name in pictures of passes, planned or measured.
fn name(what: What) -> &'static str {
    match what {
        What::Forward(_) => "forward",
        What::BackwardInput(_) => "input gradients",
        What::BackwardWeight(_) => "weight gradients",
        What::Exchange => "exchange",
        What::Reduce => "sum",
        _ => "update",
    }
}

impl Step<'_> {
    /// The timeline of a short step of this run: twice as many micro-batches as stages, or as many as its schedule needs. With
    /// machines in their seconds, messages included; without them as shares of its FLOPs.
    pub fn picture(&self, title: &str) -> String {
        let mesh = *self.layouts.training.mesh();
        let stages = mesh.pipeline();
        let micro_batches = (2 * stages).max(self.kind.least_micro_batches(stages));
        let rows: Vec<Vec<Span>> = match self.load.hardware {
            Some(hardware) => {
                let outcome = self.outcome(hardware, self.kind, micro_batches);
                let spans = outcome.map(|outcome| outcome.spans).unwrap_or_default();
                spans.into_iter().step_by(mesh.data()).collect()
            }
            None => self.without_messages(self.kind, micro_batches),
        };
        let title = format!("{title}: {micro_batches} micro-batches through {stages} stages");
        match self.load.hardware {
            Some(_) => drawn(&title, &rows, 1.0, "seconds"),
            None => {
                let end = rows.iter().flatten().map(|span| span.end).fold(0.0, f64::max);
                drawn(&title, &rows, end.max(f64::MIN_POSITIVE), "of the step")
            }
        }
    }

    fn without_messages(&self, kind: Kind, micro_batches: usize) -> Vec<Vec<Span>> {
        let passes = self.passes(kind);
        let times =
            |stage: usize, chunk: usize| passes[stage][chunk].times(self.batch.tokens, 1.0, 0.0).0;
        let schedule = Schedule::new(kind, passes.len(), micro_batches).ok();
        let timeline = schedule.and_then(|schedule| schedule.simulate_uneven(times));
        let span = |ran: &crate::train::pipeline::Ran| {
            let what = match ran.entry.pass {
                Pass::Forward => What::Forward(ran.entry.micro_batch),
                Pass::BackwardInput => What::BackwardInput(ran.entry.micro_batch),
                Pass::BackwardWeight => What::BackwardWeight(ran.entry.micro_batch),
            };
            Span { what, start: ran.start, end: ran.end }
        };
        let stages = timeline.map(|timeline| timeline.stages).unwrap_or_default();
        stages.iter().map(|stage| stage.iter().map(span).collect()).collect()
    }
}

fn drawn(title: &str, rows: &[Vec<Span>], end: f64, unit: &str) -> String {
    let bar = |span: &Span| (name(span.what), [span.start / end, span.end / end]);
    let lane = |(stage, spans): (usize, &Vec<Span>)| -> Lane<'static> {
        (format!("stage {stage}"), spans.iter().map(bar).collect())
    };
    let lanes: Vec<Lane<'_>> = rows.iter().enumerate().map(lane).collect();
    passes_timeline(title, &lanes, unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_has_a_lane_and_each_pass_its_place_and_colour() {
        let span = |what, start: f64, end: f64| Span { what, start, end };
        let rows = [
            vec![span(What::Forward(0), 0.0, 1.0), span(What::BackwardInput(0), 3.0, 4.0)],
            vec![span(What::Forward(0), 1.0, 2.0)],
        ];
        let text = drawn("two", &rows, 1.0, "seconds");
        assert!(text.contains(">stage 1<") && text.contains(">4.000<"), "{text}");
        // Two forward passes and one of the legend; no exchange occurs and none is in the legend.
        assert_eq!(text.matches("#0b5394").count(), 3, "{text}");
        assert!(text.contains(">input gradients<") && !text.contains("exchange"), "{text}");
        // A quarter of the width from a quarter of it on, in the second lane.
        assert!(text.contains("<rect x=\"228.0\" y=\"86.0\""), "{text}");
        let shares = drawn("two", &rows, 4.0, "of the step");
        assert!(shares.contains(">1.000<") && shares.contains(">of the step<"), "{shares}");
    }
}
