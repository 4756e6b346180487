//! The softmax of one attention row, and its gradient.
//!
//! Invariants:
//!   * a row is as long as whole blocks; what lies behind the keys that it sees becomes zero, and
//!     zeros change no partial sum, so that the length does not matter

use super::super::Isa;
use super::super::exp::exp;
use super::super::lanes::{self, LANES, Lanes, OnLanes};
use super::BLOCK;

/// Maximum and sum of a row of exponentials.
pub(crate) struct Softmax {
    max: f32,
    /// Sum of exp(scaled score - max).
    pub sum: f32,
}

impl Softmax {
    /// Log of the sum of the exponentials of the scaled scores.
    pub fn lse(&self) -> f32 {
        (f64::from(self.max) + f64::from(self.sum).ln()) as f32
    }
}

/// Turns the first `seen` scores into exp(scale * score - max) and all others into zero. The row
/// has whole blocks; zeros change no partial sum, so that its length does not matter.
pub(crate) fn softmax(isa: Isa, row: &mut [f32], seen: usize, scale: f64) -> Softmax {
    assert!(row.len().is_multiple_of(BLOCK) && seen <= row.len());
    // SAFETY: `isa` was detected; the job is safe code.
    unsafe { isa.run(SoftmaxRow { row, seen, scale: scale as f32 }) }
}

struct SoftmaxRow<'a> {
    row: &'a mut [f32],
    seen: usize,
    scale: f32,
}

impl OnLanes for SoftmaxRow<'_> {
    type Out = Softmax;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> Softmax {
        softmax_row(self.row, self.seen, self.scale)
    }
}

/// [`softmax`] inside a loop that [`Isa::run`] compiles.
#[inline(always)]
pub(crate) fn softmax_row(row: &mut [f32], seen: usize, scale: f32) -> Softmax {
    let mut tops = [f32::NEG_INFINITY; LANES];
    row[..seen].iter_mut().for_each(|x| *x *= scale);
    row[seen..].fill(f32::NEG_INFINITY);
    for chunk in row.chunks_exact(LANES) {
        for (top, &x) in tops.iter_mut().zip(chunk) {
            *top = if x > *top { x } else { *top };
        }
    }
    let max = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; LANES];
    for chunk in row.chunks_exact_mut(LANES) {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    Softmax { max, sum: lanes::add_lanes(sums) }
}

/// Divides an output row by its softmax's sum. The zero that is added makes -0 a plain 0, so that
/// keys of weight zero behind a row's own leave no trace even in a sign.
#[inline(always)]
pub(crate) fn divide(row: &mut [f32], sum: f32) {
    let inverse = 1.0 / sum;
    row.iter_mut().for_each(|x| *x = *x * inverse + 0.0);
}

/// Scores to probabilities in `p`, and value products to the scores' gradient in `ds`, for one row.
pub(super) struct RowGradient<'a> {
    pub p: &'a mut [f32],
    pub ds: &'a mut [f32],
    pub seen: usize,
    pub scale: f32,
    pub lse: f32,
    /// Mean of the value products under the probabilities, which is the output times its gradient.
    pub mean: f32,
}

impl OnLanes for RowGradient<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (p, ds) in self.p.iter_mut().zip(self.ds.iter_mut()) {
            *p = exp(p.mul_add(self.scale, -self.lse));
            *ds = *p * (*ds - self.mean) * self.scale;
        }
        self.p[self.seen..].fill(0.0);
        self.ds[self.seen..].fill(0.0);
    }
}
