//! A step's timeline as a picture: a row for each stage, a colour for each kind of pass. SVG, written by hand; the same plan
//! gives the same bytes.

use super::step::Step;
use crate::plan::simulation::engine::{Span, What};
use crate::train::pipeline::{Kind, Pass, Schedule};
use std::collections::BTreeMap;
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 40.0;
const ROW: f64 = 18.0;
/// Between rows.
const GAP: f64 = 3.0;

/// Colours that are told apart without colour vision, with what they stand for.
const COLOURS: [(&str, &str); 5] = [
    ("#0b5394", "forward"),
    ("#c55a11", "input gradients"),
    ("#8fbc5a", "weight gradients"),
    ("#741b47", "exchange"),
    ("#7f7f7f", "sums and optimizer"),
];

fn colour(what: What) -> &'static str {
    let place = match what {
        What::Forward(_) => 0,
        What::BackwardInput(_) => 1,
        What::BackwardWeight(_) => 2,
        What::Exchange => 3,
        _ => 4,
    };
    COLOURS[place].0
}

impl Step<'_> {
    /// The timeline of a short step of this run: twice as many micro-batches as stages, or as many as its schedule needs. With
    /// machines in their seconds, messages included; without them in units of FLOPs.
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
        let unit = if self.load.hardware.is_some() { " s" } else { "" };
        svg(&format!("{title}: {micro_batches} micro-batches through {stages} stages"), &rows, unit)
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

/// Draws rows of spans.
fn svg(title: &str, rows: &[Vec<Span>], unit: &str) -> String {
    let height = TOP + BOTTOM + rows.len() as f64 * (ROW + GAP);
    let end = rows.iter().flatten().map(|span| span.end).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let x = |seconds: f64| LEFT + seconds / end * (WIDTH - LEFT - RIGHT);
    let mut out = String::new();
    let mut put = |text: String| out.push_str(&text);
    put(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"#222222\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}</text>\n"
    ));
    for (place, (colour, name)) in COLOURS.iter().enumerate() {
        let left = LEFT + 140.0 * place as f64;
        put(format!(
            "<rect x=\"{left}\" y=\"32\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"42\">{name}</text>\n",
            left + 18.0
        ));
    }
    for (stage, spans) in rows.iter().enumerate() {
        let top = TOP + stage as f64 * (ROW + GAP);
        put(format!("<text x=\"8\" y=\"{}\">stage {stage}</text>\n", top + 13.0));
        let mut paths: BTreeMap<&str, String> = BTreeMap::new();
        for span in spans {
            let (left, right) = (x(span.start), x(span.end));
            // A gap that can be seen between neighbours of a colour.
            let width = (right - left - 0.3).max(0.1);
            let path = paths.entry(colour(span.what)).or_default();
            let _ = write!(path, "M{left:.1} {top:.0}h{width:.1}v{ROW}h-{width:.1}z");
        }
        for (colour, path) in paths {
            put(format!("<path fill=\"{colour}\" d=\"{path}\"/>\n"));
        }
    }
    put(format!(
        "<text x=\"{LEFT}\" y=\"{y}\">0</text><text x=\"{right}\" y=\"{y}\" text-anchor=\"end\">{end:.3}{unit}</text>\n</svg>\n",
        y = height - 16.0,
        right = WIDTH - RIGHT
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_its_stage_and_a_path_for_each_colour() {
        let span = |what, start: f64, end: f64| Span { what, start, end };
        let rows = [
            vec![span(What::Forward(0), 0.0, 1.0), span(What::BackwardInput(0), 3.0, 4.0)],
            vec![span(What::Forward(0), 1.0, 2.0)],
        ];
        let text = svg("two", &rows, " s");
        assert_eq!(text.matches("<path").count(), 3, "{text}");
        assert!(text.contains(">stage 1<") && text.contains(">4.000 s<"), "{text}");
        // A quarter of the width from a quarter of it on.
        assert!(text.contains("M284.0 77h219.7v18"), "{text}");
    }
}
