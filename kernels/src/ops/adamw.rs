//! AdamW: one fused pass over weight, gradient and both moments; and the gradient's squared sum.
//!
//! Deviation from the usual text: none. Order of work: scale the gradient, moments, bias correction,
//! decay (decoupled), step. Constants are computed in f64 and rounded once.

use super::{Cx, Lanes, OnLanes, work};
use crate::buffer::{Buffer, View, ViewMut};
use crate::kernels::AdamW;
use std::sync::atomic::{AtomicU64, Ordering};

/// Operations per element, roughly: what decides about threads.
const COST: usize = 16;
/// Elements of one partial sum: fixed, so that the sum's order is.
const BLOCK: usize = 4096;

/// See [`Kernels::adamw`](crate::Kernels::adamw).
pub(crate) fn adamw(
    cx: &Cx,
    update: &AdamW,
    g: &Buffer,
    w: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
) {
    for other in [&*w, &*m, &*v] {
        assert_eq!((g.rows(), g.cols()), (other.rows(), other.cols()), "shape of an update");
    }
    let flat = [g, &*w, &*m, &*v].iter().all(|b| b.is_contiguous());
    let (g, mut w, mut m, mut v) =
        (rows(g, flat), rows_mut(w, flat), rows_mut(m, flat), rows_mut(v, flat));
    let g = g.host::<f32>();
    let (w, m, v) = (w.host_mut::<f32>(), m.host_mut::<f32>(), v.host_mut::<f32>());
    let constants = Constants::new(update);
    work::segments(cx, g.rows, g.cols, COST, &|row, range| {
        // SAFETY: segments are disjoint; `isa` was detected.
        unsafe {
            cx.isa.run(Update {
                g: &g.row(row)[range.clone()],
                w: work::part_mut(&w, row, range.clone()),
                m: work::part_mut(&m, row, range.clone()),
                v: work::part_mut(&v, row, range),
                constants,
            });
        }
    });
}

/// All elements as one row if `flat`, else as they are.
fn rows(buffer: &Buffer, flat: bool) -> View<'_> {
    if flat { buffer.reshaped(1, buffer.len()) } else { buffer.rows_of(0..buffer.rows()) }
}

fn rows_mut(buffer: &mut Buffer, flat: bool) -> ViewMut<'_> {
    if flat { buffer.reshaped_mut(1, buffer.len()) } else { buffer.rows_of_mut(0..buffer.rows()) }
}

/// An update's numbers as the loop wants them.
#[derive(Clone, Copy)]
struct Constants {
    gradient_scale: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    /// Learning rate over the first moment's bias correction.
    step: f32,
    /// One over the root of the second moment's bias correction.
    root: f32,
    epsilon: f32,
    /// 1 - learning rate * weight decay.
    keep: f32,
}

impl Constants {
    fn new(update: &AdamW) -> Constants {
        let steps = update.step as f64;
        let bias1 = 1.0 - update.beta1.powf(steps);
        let bias2 = 1.0 - update.beta2.powf(steps);
        Constants {
            gradient_scale: update.gradient_scale as f32,
            beta1: update.beta1 as f32,
            rest1: (1.0 - update.beta1) as f32,
            beta2: update.beta2 as f32,
            rest2: (1.0 - update.beta2) as f32,
            step: (update.learning_rate / bias1) as f32,
            root: (1.0 / bias2.sqrt()) as f32,
            epsilon: update.epsilon as f32,
            keep: (1.0 - update.learning_rate * update.weight_decay) as f32,
        }
    }
}

struct Update<'a> {
    g: &'a [f32],
    w: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    constants: Constants,
}

impl OnLanes for Update<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let c = self.constants;
        for (((g, w), m), v) in self.g.iter().zip(self.w).zip(self.m).zip(self.v) {
            let g = g * c.gradient_scale;
            *m = c.beta1.mul_add(*m, c.rest1 * g);
            *v = c.beta2.mul_add(*v, c.rest2 * g * g);
            let change = *m / v.sqrt().mul_add(c.root, c.epsilon);
            *w = change.mul_add(-c.step, *w * c.keep);
        }
    }
}

/// See [`Kernels::squared_sum`](crate::Kernels::squared_sum).
pub(crate) fn squared_sum(cx: &Cx, x: &Buffer) -> f64 {
    if x.is_empty() {
        return 0.0;
    }
    let x = rows(x, x.is_contiguous());
    let x = x.host::<f32>();
    let per_row = x.cols.div_ceil(BLOCK);
    let sums: Vec<AtomicU64> = (0..x.rows * per_row).map(|_| AtomicU64::new(0)).collect();
    work::split(cx, sums.len(), 1, 4 * BLOCK, &|range| {
        for block in range {
            let first = block % per_row * BLOCK;
            let part = &x.row(block / per_row)[first..x.cols.min(first + BLOCK)];
            // SAFETY: `isa` was detected.
            let sum = unsafe { cx.isa.run(SquaredSum(part)) };
            sums[block].store(sum.to_bits(), Ordering::Relaxed);
        }
    });
    sums.into_iter().map(|sum| f64::from_bits(sum.into_inner())).sum()
}

struct SquaredSum<'a>(&'a [f32]);

impl OnLanes for SquaredSum<'_> {
    type Out = f64;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f64 {
        let mut sums = [0.0_f64; 16];
        for part in self.0.chunks(16) {
            for (sum, x) in sums.iter_mut().zip(part) {
                let x = f64::from(*x);
                *sum = x.mul_add(x, *sum);
            }
        }
        sums.iter().sum()
    }
}
