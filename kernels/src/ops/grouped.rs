//! Expert layers: one product per expert on the slots that the routes gave it.
//!
//! Rows are in slot order, so an expert's rows are neighbours and nothing is gathered here. An expert
//! without tokens does nothing. Otherwise as `linear`.

use super::linear::outer;
use super::tile::{Left, Out};
use super::work::{Term, products};
use super::{Cx, pack};
use crate::buffer::Buffer;
use crate::kernels::{Packed, Store};
use crate::routing::Routes;
use std::ops::Range;

/// See [`Kernels::linear_experts`](crate::Kernels::linear_experts).
pub(crate) fn linear_experts(
    cx: &Cx,
    x: &Buffer,
    weight: &Packed,
    routes: &Routes,
    y: &mut Buffer,
) {
    assert_eq!(weight.groups, routes.experts, "one group of rows per expert");
    assert_eq!((x.cols(), y.cols()), (weight.inputs, weight.outputs), "widths of an expert layer");
    assert_eq!(x.rows(), y.rows(), "slots of an expert layer");
    let slots = x.rows();
    let (x, y) = (x.host::<f32>(), y.host_mut::<f32>());
    let terms = spans(routes, slots).map(|(expert, span)| Term {
        shape: [span.len(), weight.outputs, weight.inputs],
        left: Left { at: x.pointer().wrapping_add(span.start * x.stride), row: x.stride, col: 1 },
        right: pack::panels(weight, expert),
        out: Out { at: y.pointer().wrapping_add(span.start * y.stride), row: y.stride },
    });
    // SAFETY: the spans are disjoint rows of x and y.
    unsafe { products(cx, terms, Store::Set) };
}

/// See [`Kernels::linear_experts_backward_weight`](crate::Kernels::linear_experts_backward_weight).
pub(crate) fn linear_experts_backward_weight(
    cx: &Cx,
    dy: &Buffer,
    x: &Buffer,
    routes: &Routes,
    dw: &mut Buffer,
) {
    let expected = (routes.experts * dy.cols(), x.cols());
    assert_eq!((dw.rows(), dw.cols()), expected, "shape of an expert layer's gradient");
    assert_eq!(dy.rows(), x.rows(), "slots of an expert layer");
    let slots = x.rows();
    let (dy, x, dw) = (dy.host::<f32>(), x.host::<f32>(), dw.host_mut::<f32>());
    let terms = spans(routes, slots)
        .map(|(expert, span)| outer(&dy, 0..dy.cols, &x, 0..x.cols, span, &dw, expert * dy.cols));
    // SAFETY: the spans are rows of dy and x, the experts' blocks disjoint rows of dw.
    unsafe { products(cx, terms, Store::Add) };
}

/// Experts that have slots, with their slots.
fn spans(routes: &Routes, slots: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let offsets = routes.offsets.host::<u32>();
    assert_eq!(offsets.rows, routes.experts + 1, "an offset per expert and the total");
    assert_eq!(offsets.row(routes.experts)[0] as usize, slots, "the total is the number of slots");
    (0..routes.experts).filter_map(move |expert| {
        let span = offsets.row(expert)[0] as usize..offsets.row(expert + 1)[0] as usize;
        assert!(span.start <= span.end && span.end <= slots, "offsets ascend");
        (!span.is_empty()).then_some((expert, span))
    })
}
