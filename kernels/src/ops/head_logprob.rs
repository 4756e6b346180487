//! Log-probability of given tokens under the output head, and its gradient.
//!
//! Knows no loss: the caller gives d(loss)/d(logprob) per row. Logits are made by `linear`, tile by tile of [`ROWS`]
//! rows, and reduced while they are near. A caller that will want the gradient gives memory for the probabilities;
//! without it the backward pass makes them again, to the same bits. They become the logits' gradient in place.
//!
//! Invariants:
//!   * memory is ROWS x vocabulary, whatever the number of rows, where no probabilities are kept
//!   * a row's numbers depend on its own logits alone, and the sampler takes them from the same
//!     [`Distribution`]
//!   * dw is one chain over rows ascending, across tiles and calls

use super::exp::exp;
use super::lanes::{self, LANES, Lanes, OnLanes};
use super::linear::{linear, linear_backward_weight};
use super::work::split;
use super::{Cx, Isa};
use crate::buffer::{Buffer, DType, Mat};
use crate::kernels::{Packed, Product, ROW_GAP, Result, Store};
use std::ops::Range;

/// Rows of a tile.
pub(crate) const ROWS: usize = 64;

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
    entropy: &mut Buffer,
    kept: Option<&mut Buffer>,
) -> Result<()> {
    check(x, head, &[targets, logprob, entropy], kept.as_deref());
    let targets = targets.host::<u32>();
    let (logprob, entropy) = (logprob.host_mut::<f32>(), entropy.host_mut::<f32>());
    let result = |row: usize, logit: f32, _: &mut [f32], distribution: &Distribution| {
        // SAFETY: a row belongs to one piece.
        unsafe {
            logprob.shared_row_mut(row)[0] = distribution.logprob(logit);
            entropy.shared_row_mut(row)[0] = distribution.entropy();
        }
    };
    let softmax = Softmax { cx, head, targets, temperature };
    match kept {
        Some(kept) => {
            for rows in tiles(x.rows()) {
                let x = x.rows_of(rows.clone());
                softmax.probabilities(&x, rows.start, &mut kept.rows_of_mut(rows), &result);
            }
        }
        None => {
            let mut tile = tile(cx, x.rows(), head.outputs)?;
            for rows in tiles(x.rows()) {
                let (x, mut logits) = (x.rows_of(rows.clone()), tile.rows_of_mut(0..rows.len()));
                softmax.reduce(&x, rows.start, &mut logits.cols_of_mut(0..head.outputs), &result);
            }
        }
    }
    Ok(())
}

/// See [`Kernels::logits_logprob`](crate::Kernels::logits_logprob).
pub(crate) fn logits_logprob(
    cx: &Cx,
    logits: &mut Buffer,
    targets: &Buffer,
    temperature: f64,
    logprob: &mut Buffer,
) {
    for column in [targets, &*logprob] {
        assert_eq!((column.rows(), column.cols()), (logits.rows(), 1), "head: one number per row");
    }
    let logprob = logprob.host_mut::<f32>();
    reduce(cx, logits, 0, &targets.host(), temperature, &|row, logit, _, distribution| {
        // SAFETY: a row belongs to one piece.
        unsafe { logprob.shared_row_mut(row)[0] = distribution.logprob(logit) };
    });
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
    c: &Buffer,
    kept: Option<&mut Buffer>,
    dx: &mut Buffer,
    dw: &mut Buffer,
) -> Result<()> {
    check(x, head, &[targets, c], kept.as_deref());
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
    let softmax = Softmax { cx, head, targets: targets.host(), temperature };
    let c = c.host::<f32>();
    let mut descend = |rows: Range<usize>, probabilities: &mut Buffer| {
        softmax.differentiate(rows.start, &c, probabilities);
        linear(cx, probabilities, plain, &mut dx.rows_of_mut(rows.clone()), Store::Set);
        linear_backward_weight(cx, probabilities, &x.rows_of(rows), dw);
    };
    match kept {
        Some(kept) => descend(0..x.rows(), kept),
        None => {
            let mut tile = tile(cx, x.rows(), vocabulary)?;
            for rows in tiles(x.rows()) {
                let mut tile = tile.rows_of_mut(0..rows.len());
                let mut tile = tile.cols_of_mut(0..vocabulary);
                let x = x.rows_of(rows.clone());
                softmax.probabilities(&x, rows.start, &mut tile, &|_, _, _, _| ());
                descend(rows, &mut tile);
            }
        }
    }
    Ok(())
}

/// Ranges of up to ROWS rows.
fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(ROWS).map(move |first| first..rows.min(first + ROWS))
}

/// Memory of a tile's logits, in rows of [`ROW_GAP`] columns more.
fn tile(cx: &Cx, rows: usize, vocabulary: usize) -> Result<Buffer> {
    cx.arena.buffer(cx.scratch, DType::F32, rows.min(ROWS), vocabulary + ROW_GAP)
}

/// What the passes over rows of logits share. Rows and targets are counted from the call's first.
struct Softmax<'a> {
    cx: &'a Cx,
    head: &'a Packed,
    targets: Mat<'a, u32>,
    temperature: f64,
}

/// What becomes of a row: its number, its target's logit, its masses, its distribution.
type OnRow<'a> = &'a (dyn Fn(usize, f32, &mut [f32], &Distribution) + Sync);

impl Softmax<'_> {
    /// Leaves the probabilities of x's logits in `logits`.
    fn probabilities(&self, x: &Buffer, first: usize, logits: &mut Buffer, on_row: OnRow<'_>) {
        self.reduce(x, first, logits, &|row, logit, masses, distribution| {
            let factor = (1.0 / distribution.sum) as f32;
            // SAFETY: `isa` was detected.
            unsafe { self.cx.isa.run(Scale { row: masses, factor }) };
            on_row(row, logit, masses, distribution);
        });
    }

    /// Leaves the unscaled masses of x's logits in `logits`.
    fn reduce(&self, x: &Buffer, first: usize, logits: &mut Buffer, on_row: OnRow<'_>) {
        linear(self.cx, x, self.head, logits, Store::Set);
        reduce(self.cx, logits, first, &self.targets, self.temperature, on_row);
    }

    /// Replaces probabilities by c (onehot - p) / T.
    fn differentiate(&self, first: usize, c: &Mat<'_, f32>, probabilities: &mut Buffer) {
        let gradients = probabilities.host_mut::<f32>();
        let inverse = inverse(self.temperature);
        split(self.cx, gradients.rows, 1, gradients.cols, &|range| {
            for row in range {
                let factor = c.row(first + row)[0] * inverse;
                // SAFETY: a row belongs to one piece.
                let gradient = unsafe { gradients.shared_row_mut(row) };
                let target = self.targets.row(first + row)[0] as usize;
                let hit = factor * (1.0 - gradient[target]);
                // SAFETY: `isa` was detected.
                unsafe { self.cx.isa.run(Scale { row: gradient, factor: -factor }) };
                gradient[target] = hit;
            }
        });
    }
}

/// Replaces rows of logits, whose first has number `first`, by their unscaled masses.
fn reduce(
    cx: &Cx,
    logits: &mut Buffer,
    first: usize,
    targets: &Mat<'_, u32>,
    temperature: f64,
    on_row: OnRow<'_>,
) {
    let logits = logits.host_mut::<f32>();
    split(cx, logits.rows, 1, COST * logits.cols, &|range| {
        for row in range {
            // SAFETY: a row belongs to one piece.
            let masses = unsafe { logits.shared_row_mut(row) };
            let logit = masses[targets.row(first + row)[0] as usize];
            let distribution = Distribution::of(cx.isa, masses, temperature);
            on_row(first + row, logit, masses, &distribution);
        }
    });
}

fn check(x: &Buffer, head: &Packed, columns: &[&Buffer], kept: Option<&Buffer>) {
    assert_eq!(head.product, Product::Transposed, "head: a pack for the forward pass");
    assert_eq!(head.inputs, x.cols(), "head: width of x");
    for column in columns {
        assert_eq!((column.rows(), column.cols()), (x.rows(), 1), "head: one number per row");
    }
    let shape = kept.map(|kept| (kept.rows(), kept.cols()));
    assert!(shape.is_none_or(|s| s == (x.rows(), head.outputs)), "head: shape of what is kept");
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

/// Multiplies a row.
struct Scale<'a> {
    row: &'a mut [f32],
    factor: f32,
}

impl OnLanes for Scale<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        self.row.iter_mut().for_each(|x| *x *= self.factor);
    }
}

#[cfg(test)]
mod tests;
