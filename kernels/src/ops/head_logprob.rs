//! Log-probability of given tokens under the output head, and its gradient, without all logits at
//! once.
//!
//! Knows no loss: the caller gives d(loss)/d(logprob) per row. Rows are taken in tiles of [`ROWS`];
//! a tile of logits is made by `linear`, the forward pass reduces it, and the backward pass makes
//! it again and turns it into the logits' gradient in place.
//!
//! Invariants:
//!   * memory is ROWS x vocabulary, whatever the number of rows
//!   * a row's numbers depend on its own logits alone, and the sampler takes them from the same
//!     [`Distribution`]
//!   * dw is one chain over rows ascending, across tiles and calls

use super::exp::exp;
use super::lanes::{self, LANES, Lanes, OnLanes};
use super::linear::{linear, linear_backward_weight};
use super::work::split;
use super::{Cx, Isa};
use crate::buffer::{Buffer, DType};
use crate::kernels::{Packed, Product, Result, Store};

/// Rows of a tile.
const ROWS: usize = 64;

/// Operations per logit of a reduction.
const COST: usize = 20;

/// Elements that are summed in f32 before the sum goes on in f64.
const SPAN: usize = 512;

/// See [`Kernels::head_logprob`](crate::Kernels::head_logprob).
#[allow(clippy::too_many_arguments)]
pub(crate) fn head_logprob(
    cx: &Cx,
    x: &Buffer,
    head: &Packed,
    targets: &Buffer,
    temperature: f64,
    logprob: &mut Buffer,
    lse: &mut Buffer,
    entropy: &mut Buffer,
) -> Result<()> {
    check(x, head, &[targets, logprob, lse, entropy]);
    let vocabulary = head.outputs;
    let targets = targets.host::<u32>();
    let (logprob, lse, entropy) =
        (logprob.host_mut::<f32>(), lse.host_mut::<f32>(), entropy.host_mut::<f32>());
    let mut tile = cx.arena.buffer(cx.scratch, DType::F32, x.rows().min(ROWS), vocabulary)?;
    for first in (0..x.rows()).step_by(ROWS) {
        let count = ROWS.min(x.rows() - first);
        let mut logits = tile.rows_of_mut(0..count);
        linear(cx, &x.rows_of(first..first + count), head, &mut logits, Store::Set);
        let logits = logits.host_mut::<f32>();
        split(cx, count, 1, COST * vocabulary, &|range| {
            for row in range {
                // SAFETY: a row belongs to one piece.
                unsafe {
                    let logits = logits.shared_row_mut(row);
                    let target = logits[targets.row(first + row)[0] as usize];
                    let distribution = Distribution::of(cx.isa, logits, temperature);
                    logprob.shared_row_mut(first + row)[0] = distribution.logprob(target);
                    lse.shared_row_mut(first + row)[0] = distribution.lse();
                    entropy.shared_row_mut(first + row)[0] = distribution.entropy();
                }
            }
        });
    }
    Ok(())
}

/// See [`Kernels::head_logprob_backward`](crate::Kernels::head_logprob_backward).
#[allow(clippy::too_many_arguments)]
pub(crate) fn head_logprob_backward(
    cx: &Cx,
    x: &Buffer,
    head: &Packed,
    plain: &Packed,
    targets: &Buffer,
    temperature: f64,
    lse: &Buffer,
    c: &Buffer,
    dx: &mut Buffer,
    dw: &mut Buffer,
) -> Result<()> {
    check(x, head, &[targets, lse, c]);
    let vocabulary = head.outputs;
    assert_eq!(plain.product, Product::Plain, "head: a pack for the input gradient");
    assert_eq!(
        (plain.inputs, plain.outputs),
        (vocabulary, x.cols()),
        "head: shape of the plain pack"
    );
    assert_eq!(plain.version, head.version, "head: both packs of one policy version");
    assert_eq!((dx.rows(), dx.cols()), (x.rows(), x.cols()), "head: shape of dx");
    assert_eq!((dw.rows(), dw.cols()), (vocabulary, x.cols()), "head: shape of dw");
    let (targets, lse, c) = (targets.host::<u32>(), lse.host::<f32>(), c.host::<f32>());
    let mut tile = cx.arena.buffer(cx.scratch, DType::F32, x.rows().min(ROWS), vocabulary)?;
    for first in (0..x.rows()).step_by(ROWS) {
        let rows = first..x.rows().min(first + ROWS);
        let x = x.rows_of(rows.clone());
        let mut logits = tile.rows_of_mut(0..rows.len());
        linear(cx, &x, head, &mut logits, Store::Set);
        let gradients = logits.host_mut::<f32>();
        split(cx, rows.len(), 1, COST * vocabulary, &|range| {
            for row in range {
                let job = Gradient {
                    // SAFETY: a row belongs to one piece.
                    logits: unsafe { gradients.shared_row_mut(row) },
                    target: targets.row(first + row)[0] as usize,
                    inverse: inverse(temperature),
                    lse: lse.row(first + row)[0],
                    c: c.row(first + row)[0],
                };
                // SAFETY: `isa` was detected.
                unsafe { cx.isa.run(job) };
            }
        });
        linear(cx, &logits, plain, &mut dx.rows_of_mut(rows), Store::Set);
        linear_backward_weight(cx, &logits, &x, dw);
    }
    Ok(())
}

fn check(x: &Buffer, head: &Packed, columns: &[&Buffer]) {
    assert_eq!(head.product, Product::Transposed, "head: a pack for the forward pass");
    assert_eq!(head.inputs, x.cols(), "head: width of x");
    for column in columns {
        assert_eq!((column.rows(), column.cols()), (x.rows(), 1), "head: one number per row");
    }
}

/// 1 / T; greedy rows (T = 0) are judged at T = 1.
fn inverse(temperature: f64) -> f32 {
    if temperature == 0.0 { 1.0 } else { (1.0 / temperature) as f32 }
}

/// Softmax of logits / T, reduced to what log-probabilities need.
pub(crate) struct Distribution {
    inverse: f32,
    max: f32,
    /// Σ exp(logit / T - max).
    sum: f64,
    /// Σ exp(logit / T - max) (logit / T - max).
    moment: f64,
}

impl Distribution {
    /// Reduces a row of logits and leaves exp(logit / T - max) in their place.
    pub fn of(isa: Isa, logits: &mut [f32], temperature: f64) -> Distribution {
        // SAFETY: `isa` was detected; the job is safe code.
        unsafe { isa.run(Reduce { logits, inverse: inverse(temperature) }) }
    }

    /// log-softmax at a token whose logit this is.
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit * self.inverse - self.max) - self.sum.ln()) as f32
    }

    /// log Σ exp(logit / T).
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + self.sum.ln()) as f32
    }

    /// - Σ p log p.
    pub fn entropy(&self) -> f32 {
        (self.sum.ln() - self.moment / self.sum) as f32
    }
}

struct Reduce<'a> {
    logits: &'a mut [f32],
    inverse: f32,
}

impl OnLanes for Reduce<'_> {
    type Out = Distribution;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Distribution {
        let Reduce { logits, inverse } = self;
        let mut tops = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = logits.as_chunks_mut::<LANES>();
        for chunk in whole {
            scale_and_top(chunk, inverse, &mut tops);
        }
        scale_and_top(rest, inverse, &mut tops);
        let max = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let (mut sum, mut moment) = (0.0, 0.0);
        for span in logits.chunks_mut(SPAN) {
            let (mut sums, mut moments) = ([0.0; LANES], [0.0; LANES]);
            // Chunks of a known length become vectors; the last one need not be whole.
            let (whole, rest) = span.as_chunks_mut::<LANES>();
            for chunk in whole {
                exp_and_sum(chunk, max, &mut sums, &mut moments);
            }
            exp_and_sum(rest, max, &mut sums, &mut moments);
            sum += f64::from(lanes::add_lanes(sums));
            moment += f64::from(lanes::add_lanes(moments));
        }
        Distribution { inverse, max, sum, moment }
    }
}

/// Scales up to LANES logits and keeps each lane's largest.
#[inline(always)]
fn scale_and_top(logits: &mut [f32], inverse: f32, tops: &mut [f32; LANES]) {
    for (top, x) in tops.iter_mut().zip(logits) {
        *x *= inverse;
        *top = if *x > *top { *x } else { *top };
    }
}

/// Replaces up to LANES logits by their masses and adds these and their moments lane by lane.
#[inline(always)]
fn exp_and_sum(logits: &mut [f32], max: f32, sums: &mut [f32; LANES], moments: &mut [f32; LANES]) {
    for ((sum, moment), x) in sums.iter_mut().zip(moments).zip(logits) {
        let below = *x - max;
        *x = exp(below);
        *sum += *x;
        *moment = x.mul_add(below, *moment);
    }
}

/// Replaces a row of logits by c (onehot - p) / T.
struct Gradient<'a> {
    logits: &'a mut [f32],
    target: usize,
    inverse: f32,
    lse: f32,
    c: f32,
}

impl OnLanes for Gradient<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let factor = self.c * self.inverse;
        let target = exp(self.logits[self.target] * self.inverse - self.lse);
        for x in self.logits.iter_mut() {
            *x = -factor * exp(*x * self.inverse - self.lse);
        }
        self.logits[self.target] = factor * (1.0 - target);
    }
}

#[cfg(test)]
mod tests;
