//! RoPE: rotates pairs of columns by the angle of the row's position, and back.
//!
//! (a, b) becomes (a cos - b sin, a sin + b cos); `inverse` takes -sin, which is the gradient. Which columns
//! are a pair, angles and YaRN are the table's business.

use super::{Cx, Lanes, OnLanes, work};
use crate::buffer::Buffer;
use crate::kernels::{Pairing, RopeTable};

/// Operations per element, roughly: what decides about threads.
const COST: usize = 64;

/// See [`Kernels::rope`](crate::Kernels::rope).
#[allow(clippy::too_many_arguments)]
pub(crate) fn rope(
    cx: &Cx,
    x: &mut Buffer,
    positions: &Buffer,
    table: &RopeTable,
    heads: usize,
    first: usize,
    stride: usize,
    inverse: bool,
) {
    let width = 2 * table.cos.cols();
    assert_eq!(table.cos.cols(), table.sin.cols(), "shape of a rope table");
    assert_eq!(positions.rows(), x.rows(), "one position per row");
    assert!(heads > 0 && first + (heads - 1) * stride + width <= x.cols(), "columns of a rotation");
    assert!(heads == 1 || stride >= width, "heads are disjoint columns");
    let (x, positions) = (x.host_mut::<f32>(), positions.host::<u32>());
    let (cos, sin) = (table.cos.host::<f32>(), table.sin.host::<f32>());
    let sign = if inverse { -1.0 } else { 1.0 };
    work::split(cx, x.rows, 1, COST * heads * width, &|range| {
        for row in range {
            let position = positions.row(row)[0] as usize;
            let (cos, sin) = (cos.row(position), sin.row(position));
            // SAFETY: a row belongs to one piece.
            let x = unsafe { x.shared_row_mut(row) };
            for head in 0..heads {
                let x = &mut x[first + head * stride..][..width];
                // SAFETY: `isa` was detected.
                unsafe { cx.isa.run(Rotate { x, pairing: table.pairing, cos, sin, sign }) };
            }
        }
    });
}

struct Rotate<'a> {
    x: &'a mut [f32],
    pairing: Pairing,
    cos: &'a [f32],
    sin: &'a [f32],
    sign: f32,
}

impl OnLanes for Rotate<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let angles = self.cos.iter().zip(self.sin.iter().map(|sin| sin * self.sign));
        match self.pairing {
            Pairing::Interleaved => {
                let (pairs, _) = self.x.as_chunks_mut::<2>();
                pairs.iter_mut().zip(angles).for_each(|([a, b], angle)| turn(a, b, angle));
            }
            Pairing::Halves => {
                let (left, right) = self.x.split_at_mut(self.cos.len());
                let pairs = left.iter_mut().zip(right);
                pairs.zip(angles).for_each(|((a, b), angle)| turn(a, b, angle));
            }
        }
    }
}

#[inline(always)]
fn turn(a: &mut f32, b: &mut f32, (cos, sin): (&f32, f32)) {
    (*a, *b) = (a.mul_add(*cos, -(*b * sin)), a.mul_add(sin, *b * cos));
}
