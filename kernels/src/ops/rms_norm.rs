//! RMSNorm: y = w * (x / rms(x)), with its input and weight gradients.
//!
//! With r = 1 / rms and s = Σ dy w x: dx = r dy w - x r³ s / d, and dw = Σ_t dy x r. Sums over a row are
//! sixteen partial sums (element j into sum j mod 16) added in a fixed tree.

use super::lanes::{LANES, add_lanes, dot};
use super::{Cx, Lanes, OnLanes, work};
use crate::buffer::{Buffer, Mat};
use crate::kernels::Store;
use std::ops::Range;

/// Operations per element, roughly: what decides about threads.
const COST: usize = 48;

/// See [`Kernels::rms_norm`](crate::Kernels::rms_norm).
pub(crate) fn rms_norm(
    cx: &Cx,
    x: &Buffer,
    weight: &Buffer,
    epsilon: f64,
    y: &mut Buffer,
    inverse_rms: &mut Buffer,
) {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shape of a norm");
    assert_eq!((weight.len(), inverse_rms.rows()), (x.cols(), x.rows()), "shape of a norm");
    let (x, weight) = (x.host::<f32>(), weight.host::<f32>());
    let (y, inverse_rms) = (y.host_mut::<f32>(), inverse_rms.host_mut::<f32>());
    work::split(cx, x.rows, 1, COST * x.cols, &|range| {
        for row in range {
            // SAFETY: a row belongs to one piece.
            let (y, inverse) = unsafe { (y.shared_row_mut(row), inverse_rms.shared_row_mut(row)) };
            let (x, weight) = (x.row(row), weight.row(0));
            // SAFETY: `isa` was detected.
            inverse[0] = unsafe { cx.isa.run(Forward { x, weight, epsilon, y }) };
        }
    });
}

struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f64,
    y: &'a mut [f32],
}

impl OnLanes for Forward<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        // SAFETY: we are inside `L::call`.
        let squares = unsafe { dot::<L>(self.x, self.x) };
        let mean = squares / self.x.len() as f32;
        let inverse = 1.0 / (mean + self.epsilon as f32).sqrt();
        for ((y, x), w) in self.y.iter_mut().zip(self.x).zip(self.weight) {
            *y = w * (x * inverse);
        }
        inverse
    }
}

/// See [`Kernels::rms_norm_backward_input`](crate::Kernels::rms_norm_backward_input).
pub(crate) fn rms_norm_backward_input(
    cx: &Cx,
    dy: &Buffer,
    x: &Buffer,
    weight: &Buffer,
    inverse_rms: &Buffer,
    dx: &mut Buffer,
    store: Store,
) {
    assert_eq!((x.rows(), x.cols()), (dy.rows(), dy.cols()), "shape of a norm's gradient");
    assert_eq!((x.rows(), x.cols()), (dx.rows(), dx.cols()), "shape of a norm's gradient");
    assert_eq!((weight.len(), inverse_rms.rows()), (x.cols(), x.rows()), "shape of a norm");
    let (dy, x, weight) = (dy.host::<f32>(), x.host::<f32>(), weight.host::<f32>());
    let (inverse_rms, dx) = (inverse_rms.host::<f32>(), dx.host_mut::<f32>());
    work::split(cx, x.rows, 1, 2 * COST * x.cols, &|range| {
        for row in range {
            let job = BackwardInput {
                dy: dy.row(row),
                x: x.row(row),
                weight: weight.row(0),
                inverse: inverse_rms.row(row)[0],
                // SAFETY: a row belongs to one piece.
                dx: unsafe { dx.shared_row_mut(row) },
                store,
            };
            // SAFETY: `isa` was detected.
            unsafe { cx.isa.run(job) };
        }
    });
}

struct BackwardInput<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    weight: &'a [f32],
    inverse: f32,
    dx: &'a mut [f32],
    store: Store,
}

impl OnLanes for BackwardInput<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let BackwardInput { dy, x, weight, inverse, dx, store } = self;
        let slope = {
            let mut sums = [0.0_f32; LANES];
            let rows = dy.chunks(LANES).zip(weight.chunks(LANES)).zip(x.chunks(LANES));
            for ((dy, w), x) in rows {
                for (((sum, dy), w), x) in sums.iter_mut().zip(dy).zip(w).zip(x) {
                    *sum = (dy * w).mul_add(*x, *sum);
                }
            }
            add_lanes(sums) * inverse * inverse * inverse / x.len() as f32
        };
        let rows = dx.iter_mut().zip(dy).zip(weight).zip(x);
        match store {
            Store::Set => rows.for_each(|(((dx, dy), w), x)| {
                *dx = (dy * w).mul_add(inverse, -(x * slope));
            }),
            Store::Add => rows.for_each(|(((dx, dy), w), x)| {
                *dx += (dy * w).mul_add(inverse, -(x * slope));
            }),
        }
    }
}

/// See [`Kernels::rms_norm_backward_weight`](crate::Kernels::rms_norm_backward_weight).
pub(crate) fn rms_norm_backward_weight(
    cx: &Cx,
    dy: &Buffer,
    x: &Buffer,
    inverse_rms: &Buffer,
    dw: &mut Buffer,
) {
    assert_eq!((x.rows(), x.cols()), (dy.rows(), dy.cols()), "shape of a norm's gradient");
    assert_eq!((dw.rows(), dw.cols()), (1, x.cols()), "shape of a norm's weight");
    assert_eq!(inverse_rms.rows(), x.rows(), "rows of a norm");
    let (dy, x) = (dy.host::<f32>(), x.host::<f32>());
    let (inverse_rms, dw) = (inverse_rms.host::<f32>(), dw.host_mut::<f32>());
    work::split(cx, x.cols, COLUMNS, COST * x.rows, &|columns| {
        // SAFETY: a column belongs to one piece.
        let dw = unsafe { work::part_mut(&dw, 0, columns.clone()) };
        let job = BackwardWeight { dy: &dy, x: &x, inverse_rms: &inverse_rms, columns, dw };
        // SAFETY: `isa` was detected.
        unsafe { cx.isa.run(job) };
    });
}

/// Columns of a weight's gradient that a piece takes at least: whole lines of each row, and several.
const COLUMNS: usize = 64;

struct BackwardWeight<'a> {
    dy: &'a Mat<'a, f32>,
    x: &'a Mat<'a, f32>,
    inverse_rms: &'a Mat<'a, f32>,
    columns: Range<usize>,
    dw: &'a mut [f32],
}

impl OnLanes for BackwardWeight<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let BackwardWeight { dy, x, inverse_rms, columns, dw } = self;
        for (first, dw) in columns.step_by(COLUMNS).zip(dw.chunks_mut(COLUMNS)) {
            match <&mut [f32; COLUMNS]>::try_from(&mut *dw) {
                // Sums of a number that is known stay in registers.
                Ok(dw) => {
                    let mut sums = *dw;
                    add_rows(dy, x, inverse_rms, first, &mut sums);
                    *dw = sums;
                }
                Err(_) => add_rows(dy, x, inverse_rms, first, dw),
            }
        }
    }
}

/// Adds all rows' gradients of the weights from column `first` on, inside `L::call`.
#[inline(always)]
fn add_rows(
    dy: &Mat<'_, f32>,
    x: &Mat<'_, f32>,
    inverse_rms: &Mat<'_, f32>,
    first: usize,
    sums: &mut [f32],
) {
    for row in 0..x.rows {
        let inverse = inverse_rms.row(row)[0];
        let (dy, x) = (&dy.row(row)[first..][..sums.len()], &x.row(row)[first..][..sums.len()]);
        for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
            *sum = dy.mul_add(x * inverse, *sum);
        }
    }
}
