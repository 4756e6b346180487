//! SwiGLU: y = silu(gate) * up, gate and up side by side in one buffer, with its gradient.
//!
//! silu(g) = g s with s = 1 / (1 + exp(-g)); its slope is s (1 + g (1 - s)).

use super::exp::exp;
use super::{Cx, Lanes, OnLanes, work};
use crate::buffer::Buffer;

/// Operations per element, roughly: what decides about threads.
const COST: usize = 40;

/// See [`Kernels::swiglu`](crate::Kernels::swiglu).
pub(crate) fn swiglu(cx: &Cx, gate_up: &Buffer, y: &mut Buffer) {
    assert_eq!((gate_up.rows(), gate_up.cols()), (y.rows(), 2 * y.cols()), "shape of a gate");
    let (gate_up, y) = (gate_up.host::<f32>(), y.host_mut::<f32>());
    work::split(cx, y.rows, 1, COST * y.cols, &|range| {
        for row in range {
            let (gate, up) = gate_up.row(row).split_at(y.cols);
            // SAFETY: a row belongs to one piece; `isa` was detected.
            unsafe { cx.isa.run(Forward { gate, up, y: y.shared_row_mut(row) }) };
        }
    });
}

struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl OnLanes for Forward<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for ((y, gate), up) in self.y.iter_mut().zip(self.gate).zip(self.up) {
            *y = gate * sigmoid(*gate) * up;
        }
    }
}

/// See [`Kernels::swiglu_backward`](crate::Kernels::swiglu_backward).
pub(crate) fn swiglu_backward(cx: &Cx, dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer) {
    assert_eq!((gate_up.rows(), gate_up.cols()), (dy.rows(), 2 * dy.cols()), "shape of a gate");
    assert_eq!(
        (gate_up.rows(), gate_up.cols()),
        (d_gate_up.rows(), d_gate_up.cols()),
        "shape of a gate"
    );
    let (dy, gate_up, d_gate_up) =
        (dy.host::<f32>(), gate_up.host::<f32>(), d_gate_up.host_mut::<f32>());
    work::split(cx, dy.rows, 1, 2 * COST * dy.cols, &|range| {
        for row in range {
            let (gate, up) = gate_up.row(row).split_at(dy.cols);
            // SAFETY: a row belongs to one piece.
            let (d_gate, d_up) = unsafe { d_gate_up.shared_row_mut(row) }.split_at_mut(dy.cols);
            // SAFETY: `isa` was detected.
            unsafe { cx.isa.run(Backward { dy: dy.row(row), gate, up, d_gate, d_up }) };
        }
    });
}

struct Backward<'a> {
    dy: &'a [f32],
    gate: &'a [f32],
    up: &'a [f32],
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
}

impl OnLanes for Backward<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let inputs = self.dy.iter().zip(self.gate).zip(self.up);
        let outputs = self.d_gate.iter_mut().zip(self.d_up);
        for ((d_gate, d_up), ((dy, gate), up)) in outputs.zip(inputs) {
            let s = sigmoid(*gate);
            *d_gate = dy * up * s * gate.mul_add(1.0 - s, 1.0);
            *d_up = dy * gate * s;
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
