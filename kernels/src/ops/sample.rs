//! Sampler of tokens: temperature, top-k, nucleus, then the inverse of the distribution at one
//! number.
//!
//! Knows no random stream: each row brings its own number. The log-probability is the one of
//! `head_logprob`, by the same function, so that sampler and trainer agree to the bit for equal
//! logits.
//!
//! Invariants:
//!   * a row's token depends on its logits and its [`SampleRow`] alone
//!   * tokens are walked in the order of their ids; equal logits: the lowest id counts as the
//!     larger
//!   * top-k is taken first, then the nucleus among what is left; the log-probability knows neither

use super::head_logprob::Distribution;
use super::lanes::{LANES, Lanes, OnLanes};
use super::work::split;
use super::{Cx, Isa};
use crate::buffer::{Buffer, MatMut};
use crate::kernels::{SampleRow, Sampled};
use std::cell::Cell;
use std::cmp::Ordering;

/// Operations per logit without truncation.
const COST: usize = 40;

/// Masses of one sum on the way to a token.
const SPAN: usize = 512;

/// See [`Kernels::sample`](crate::Kernels::sample).
pub(crate) fn sample(cx: &Cx, logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled> {
    assert_eq!(logits.rows(), rows.len(), "sample: one way to sample for each row");
    assert!(logits.cols() > 0, "sample: no tokens");
    let logits = logits.host::<f32>();
    let mut sampled = vec![Sampled::default(); rows.len()];
    let to = MatMut::of(&mut sampled, 1);
    split(cx, rows.len(), 1, COST * logits.cols, &|range| {
        let mut scratch = SCRATCH.take();
        for row in range {
            let drawn = draw(cx, logits.row(row), &rows[row], &mut scratch);
            // SAFETY: a row belongs to one piece.
            unsafe { to.shared_row_mut(row)[0] = drawn };
        }
        SCRATCH.set(scratch);
    });
    sampled
}

/// What a thread needs to draw a token; it keeps its memory.
#[derive(Default)]
struct Scratch {
    /// A mass for each token.
    masses: Vec<f32>,
    /// Sums of SPAN masses.
    spans: Vec<f64>,
    /// Tokens by falling logit.
    order: Vec<usize>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> =
        const { Cell::new(Scratch { masses: Vec::new(), spans: Vec::new(), order: Vec::new() }) };
}

fn draw(cx: &Cx, logits: &[f32], row: &SampleRow, scratch: &mut Scratch) -> Sampled {
    let Scratch { masses, spans, order } = scratch;
    masses.clear();
    masses.extend_from_slice(logits);
    let distribution = Distribution::of(cx.isa, masses, row.temperature);
    let token = if row.temperature == 0.0 {
        first_largest(logits)
    } else {
        truncate(logits, row, masses, order);
        invert(cx.isa, masses, spans, row.uniform)
    };
    Sampled { token: token as u32, logprob: f64::from(distribution.logprob(logits[token])) }
}

fn first_largest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best
}

/// Clears the masses of all tokens outside top-k and nucleus.
fn truncate(logits: &[f32], row: &SampleRow, masses: &mut [f32], order: &mut Vec<usize>) {
    let count = if row.top_k == 0 { logits.len() } else { row.top_k.min(logits.len()) };
    if count == logits.len() && row.top_p >= 1.0 {
        return;
    }
    // Adding zero makes -0 equal to 0; a total order keeps the sort well defined for any logits.
    let falling = |a: &usize, b: &usize| -> Ordering {
        (logits[*b] + 0.0).total_cmp(&(logits[*a] + 0.0)).then(a.cmp(b))
    };
    order.clear();
    order.extend(0..logits.len());
    if count < order.len() {
        order.select_nth_unstable_by(count, falling);
        order.drain(count..).for_each(|token| masses[token] = 0.0);
    }
    if row.top_p < 1.0 {
        order.sort_unstable_by(falling);
        let total: f64 = order.iter().map(|&token| f64::from(masses[token])).sum();
        let mut reached = 0.0;
        for (rank, &token) in order.iter().enumerate() {
            if rank > 0 && reached >= row.top_p * total {
                masses[token] = 0.0;
            } else {
                reached += f64::from(masses[token]);
            }
        }
    }
}

/// The first token at which the running sum of masses passes `uniform` of their total. Sums of whole spans lead
/// to the span, its masses one by one to the token.
fn invert(isa: Isa, masses: &[f32], spans: &mut Vec<f64>, uniform: f64) -> usize {
    spans.clear();
    // SAFETY: `isa` was detected; the job is safe code.
    spans.extend(masses.chunks(SPAN).map(|masses| unsafe { isa.run(Sum { masses }) }));
    let goal = uniform * spans.iter().sum::<f64>();
    let (mut before, mut last) = (0.0, 0);
    for (span, (masses, total)) in masses.chunks(SPAN).zip(spans.iter()).enumerate() {
        let mut sum = before;
        before += total;
        if *total > 0.0 {
            last = span;
        }
        if before <= goal {
            continue;
        }
        for (i, &mass) in masses.iter().enumerate() {
            sum += f64::from(mass);
            if mass > 0.0 && sum > goal {
                return span * SPAN + i;
            }
        }
    }
    // Rounding can leave the goal at the total itself: the last token that has any mass.
    let first = last * SPAN;
    let span = &masses[first..masses.len().min(first + SPAN)];
    first + span.iter().rposition(|mass| *mass > 0.0).unwrap_or(0)
}

/// The sum of a span of masses: sixteen partial sums, then these in order.
struct Sum<'a> {
    masses: &'a [f32],
}

impl OnLanes for Sum<'_> {
    type Out = f64;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f64 {
        let (whole, rest) = self.masses.as_chunks::<LANES>();
        let mut sums = [0.0; LANES];
        for chunk in whole {
            for (sum, mass) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(*mass);
            }
        }
        sums.iter().sum::<f64>() + rest.iter().copied().map(f64::from).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{cx, floats, normal};

    const PLAIN: SampleRow = SampleRow { temperature: 1.0, top_p: 1.0, top_k: 0, uniform: 0.0 };

    /// Log of the probabilities 0.1, 0.4, 0.2, 0.3, but for a constant.
    fn logits() -> [f32; 4] {
        [1.0_f32, 4.0, 2.0, 3.0].map(|p| p.ln() + 3.0)
    }

    /// Shares of the tokens over an even grid of uniforms.
    fn shares(logits: &[f32], row: SampleRow) -> Vec<f64> {
        let (cx, count) = (cx(2), 2000);
        let rows: Vec<SampleRow> = (0..count)
            .map(|i| SampleRow { uniform: (i as f64 + 0.5) / count as f64, ..row })
            .collect();
        let buffer = floats(&cx, count, logits.len(), &logits.repeat(count));
        let mut shares = vec![0.0; logits.len()];
        for drawn in sample(&cx, &buffer, &rows) {
            shares[drawn.token as usize] += 1.0 / count as f64;
        }
        shares
    }

    fn check_shares(row: SampleRow, wanted: [f64; 4]) {
        let found = shares(&logits(), row);
        let close = found.iter().zip(wanted).all(|(f, w)| (f - w).abs() < 1e-3);
        assert!(close, "{row:?}: {found:?} for {wanted:?}");
    }

    #[test]
    fn tokens_come_with_their_probability_after_each_truncation() {
        check_shares(PLAIN, [0.1, 0.4, 0.2, 0.3]);
        let squares = 1.0 + 16.0 + 4.0 + 9.0;
        check_shares(
            SampleRow { temperature: 0.5, ..PLAIN },
            [1.0 / squares, 16.0 / squares, 4.0 / squares, 9.0 / squares],
        );
        check_shares(SampleRow { top_k: 2, ..PLAIN }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        check_shares(SampleRow { top_k: 1, ..PLAIN }, [0.0, 1.0, 0.0, 0.0]);
        // 0.4 + 0.3 does not reach 0.75, so the nucleus takes the third token too.
        check_shares(SampleRow { top_p: 0.75, ..PLAIN }, [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        check_shares(SampleRow { top_p: 0.65, ..PLAIN }, [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        check_shares(SampleRow { top_p: 0.0, ..PLAIN }, [0.0, 1.0, 0.0, 0.0]);
        // Among the best three, 0.4 / 0.9 + 0.3 / 0.9 reaches 0.75.
        check_shares(
            SampleRow { top_k: 3, top_p: 0.75, ..PLAIN },
            [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
    }

    #[test]
    fn the_lowest_id_wins_ties_of_greedy_and_of_truncation() {
        let cx = cx(1);
        let buffer = floats(&cx, 1, 4, &[-1.0, 2.0, 2.0, 2.0]);
        let greedy = SampleRow { temperature: 0.0, uniform: 0.999, ..PLAIN };
        assert_eq!(sample(&cx, &buffer, &[greedy])[0].token, 1);
        assert_eq!(
            shares(&[2.0, 1.0, 2.0, 2.0], SampleRow { top_k: 2, ..PLAIN }),
            shares(&[0.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], PLAIN)
        );
    }

    #[test]
    fn logprobs_are_those_of_the_whole_distribution_and_greedy_uses_temperature_one() {
        let (cx, logits) = (cx(1), logits());
        let buffer = floats(&cx, 1, 4, &logits);
        for (temperature, judged) in [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)] {
            let row = SampleRow { temperature, top_k: 1, ..PLAIN };
            let drawn = sample(&cx, &buffer, &[row])[0];
            let z: Vec<f64> = logits.iter().map(|&x| f64::from(x) / judged).collect();
            let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
            assert_eq!(drawn.token, 1);
            assert!((drawn.logprob - (z[1] - lse)).abs() < 1e-6, "{drawn:?}");
        }
    }

    #[test]
    fn a_row_is_drawn_alike_in_any_batch_and_on_any_threads() {
        let one = cx(1);
        let logits = normal(&one, 300, 1000, 9);
        let rows: Vec<SampleRow> = (0..300)
            .map(|i| SampleRow {
                uniform: i as f64 / 300.0,
                top_k: i % 3 * 40,
                top_p: 0.9,
                temperature: 0.8,
            })
            .collect();
        let wanted = sample(&one, &logits, &rows);
        assert_eq!(sample(&cx(3), &logits, &rows), wanted);
        for row in [0, 7, 299] {
            assert_eq!(
                sample(&one, &logits.rows_of(row..row + 1), &rows[row..row + 1]),
                wanted[row..row + 1]
            );
        }
    }

    #[test]
    fn numbers_at_the_edges_and_logits_that_are_no_numbers_give_a_token() {
        let last = SampleRow { uniform: 1.0 - f64::EPSILON / 2.0, ..PLAIN };
        let cx = cx(1);
        let buffer = floats(&cx, 1, 4, &[0.0, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
        assert_eq!(sample(&cx, &buffer, &[last])[0].token, 1);
        assert_eq!(sample(&cx, &buffer, &[PLAIN])[0].token, 0);
        let broken = floats(&cx, 1, 4, &[f32::NAN; 4]);
        let row = SampleRow { top_p: 0.5, top_k: 2, ..PLAIN };
        assert!((sample(&cx, &broken, &[row])[0].token as usize) < 4);
    }
}
