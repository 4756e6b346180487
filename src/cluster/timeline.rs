//! Timeline: when a rank did what, as intervals of one clock.
//!
//! What overlaps and what was waited for is computed from these intervals and from nothing else.

use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What a rank spends time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Doing {
    /// Tokens of experts are under way between ranks.
    AllToAll,
    /// Parts of activations go round the ranks that share heads and inner widths.
    TensorGather,
    /// The shared experts' products.
    SharedExperts,
    /// The forward pass of a micro-batch through a piece of the stage.
    Forward(u32, u32),
    /// Its input gradients.
    BackwardInput(u32, u32),
    /// Its weight gradients.
    BackwardWeight(u32, u32),
    /// Gradients are summed over the ranks that share weights.
    Reduce,
    /// The optimizer's update.
    Update,
    /// Changed weights go to the ranks that share them.
    Gather,
}

impl Doing {
    /// Its name in a journal; `None` of what goes on within a pass.
    pub fn name(&self) -> Option<&'static str> {
        Some(match self {
            Doing::AllToAll | Doing::TensorGather | Doing::SharedExperts => return None,
            Doing::Forward(..) => "forward",
            Doing::BackwardInput(..) => "input gradients",
            Doing::BackwardWeight(..) => "weight gradients",
            Doing::Reduce => "sum",
            Doing::Update => "update",
            Doing::Gather => "gather",
        })
    }
}

/// An interval, in seconds from the timeline's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What went on.
    pub doing: Doing,
    /// From.
    pub start: f64,
    /// To.
    pub end: f64,
}

/// The intervals of one rank.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    spans: Mutex<Vec<Span>>,
}

impl Timeline {
    /// An empty one, whose clock began at `began`.
    pub fn since(began: Instant) -> Timeline {
        Timeline { began, spans: Mutex::default() }
    }

    /// Seconds from its beginning.
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Adds what went on from `start` until now.
    pub fn add(&self, doing: Doing, start: f64) {
        let span = Span { doing, start, end: self.now() };
        self.spans.lock().unwrap_or_else(|e| e.into_inner()).push(span);
    }

    /// The intervals of passes, sums and updates, in seconds since 1970, so that ranks can be laid side by side.
    pub fn passes(&self) -> Vec<Span> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began = since_1970.as_secs_f64() - self.now();
        let spans = self.spans.lock().unwrap_or_else(|e| e.into_inner());
        let passes = spans.iter().filter(|span| span.doing.name().is_some());
        let at = |span: &Span| Span {
            doing: span.doing,
            start: began + span.start,
            end: began + span.end,
        };
        passes.map(at).collect()
    }

    /// Seconds under way of all-to-all exchanges, and of them those beside the computation of shared experts.
    pub fn exchanged(&self) -> [f64; 2] {
        let spans = self.spans.lock().unwrap_or_else(|e| e.into_inner());
        beside(&spans, Doing::AllToAll, Doing::SharedExperts)
    }

    /// Takes all intervals out, in the order of their ends.
    pub fn take(&self) -> Vec<Span> {
        std::mem::take(&mut *self.spans.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// The share of the seconds of `hidden` that lies within intervals of `by`; `None` if there are none. Intervals of `by`
/// do not overlap each other, as one thread makes them.
pub fn overlap(spans: &[Span], hidden: Doing, by: Doing) -> Option<f64> {
    let [all, covered] = beside(spans, hidden, by);
    (all > 0.0).then(|| covered / all)
}

/// The seconds of `hidden`, and of them those within intervals of `by`.
fn beside(spans: &[Span], hidden: Doing, by: Doing) -> [f64; 2] {
    let of = |doing| spans.iter().filter(move |span: &&Span| span.doing == doing);
    let all: f64 = of(hidden).map(|span| span.end - span.start).sum();
    let both = |a: &Span, b: &Span| (a.end.min(b.end) - a.start.max(b.start)).max(0.0);
    let covered: f64 = of(hidden).map(|a| of(by).map(|b| both(a, b)).sum::<f64>()).sum();
    [all, covered]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_what_lies_in_both() {
        let span = |doing, start, end| Span { doing, start, end };
        let spans = [
            span(Doing::AllToAll, 0.0, 4.0),
            span(Doing::SharedExperts, 1.0, 2.0),
            span(Doing::SharedExperts, 3.0, 6.0),
            span(Doing::AllToAll, 6.0, 8.0),
        ];
        assert_eq!(overlap(&spans, Doing::AllToAll, Doing::SharedExperts), Some(2.0 / 6.0));
        assert_eq!(overlap(&spans[1..3], Doing::AllToAll, Doing::SharedExperts), None);
        assert_eq!(overlap(&spans[..1], Doing::AllToAll, Doing::SharedExperts), Some(0.0));
    }
}
