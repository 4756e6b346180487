//! Linear layers: products of activation rows with a packed weight, and the weight's gradient.
//!
//! Forward and input gradient are the same loop on two packings. The weight gradient is Σ over rows of
//! dyᵀ x, added to what is there, rows ascending; threads split the weight, never the rows.

use super::tile::{Left, Next, Out, PANEL, Right};
use super::work::{Side, Term, products};
use super::{Cx, pack};
use crate::buffer::{Buffer, Mat, MatMut};
use crate::kernels::{HeadColumns, Pack, Packed, Product, Store};
use std::iter::once;
use std::ops::Range;

/// See [`Kernels::linear`](crate::Kernels::linear).
pub(crate) fn linear(cx: &Cx, x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store) {
    assert_eq!((x.cols(), y.cols()), (weight.inputs, weight.outputs), "widths of a linear layer");
    assert_eq!(x.rows(), y.rows(), "rows of a linear layer");
    let (x, y) = (x.host::<f32>(), y.host_mut::<f32>());
    let term = forward(&x, 0, weight, 0, &y, 0);
    // SAFETY: the shapes fit; y is borrowed exclusively, so it overlaps nothing.
    unsafe { products(cx, once(term), store) };
}

/// See [`Kernels::linear_heads`](crate::Kernels::linear_heads).
pub(crate) fn linear_heads(
    cx: &Cx,
    x: &Buffer,
    weight: &Packed,
    columns: HeadColumns,
    y: &mut Buffer,
    store: Store,
) {
    let heads = weight.groups;
    check_heads(&columns, heads, (x.cols(), weight.inputs), (y.cols(), weight.outputs));
    assert!(heads == 1 || columns.output_stride >= weight.outputs, "heads write disjoint columns");
    assert_eq!(x.rows(), y.rows(), "rows of a linear layer");
    let (x, y) = (x.host::<f32>(), y.host_mut::<f32>());
    let terms = (0..heads).map(|h| {
        let input = columns.input_first + h * columns.input_stride;
        let output = columns.output_first + h * columns.output_stride;
        forward(&x, input, weight, h, &y, output)
    });
    // SAFETY: the column blocks lie inside x and y, those of y are disjoint.
    unsafe { products(cx, terms, store) };
}

/// Rows of x from column `input` on, times one group of `weight`, into y from column `output` on.
fn forward(
    x: &Mat<'_, f32>,
    input: usize,
    weight: &Packed,
    group: usize,
    y: &MatMut<'_, f32>,
    output: usize,
) -> Term {
    Term {
        shape: [x.rows, weight.outputs, weight.inputs],
        left: Left { at: x.pointer().wrapping_add(input), row: x.stride, col: 1 },
        right: pack::panels(weight, group),
        out: Out { at: y.pointer().wrapping_add(output), row: y.stride },
    }
}

fn check_heads(
    columns: &HeadColumns,
    heads: usize,
    (x_cols, inputs): (usize, usize),
    (y_cols, outputs): (usize, usize),
) {
    let input = columns.input_first + (heads - 1) * columns.input_stride + inputs;
    let output = columns.output_first + (heads - 1) * columns.output_stride + outputs;
    assert!(input <= x_cols, "input columns up to {input} of {x_cols}");
    assert!(output <= y_cols, "output columns up to {output} of {y_cols}");
}

/// See [`Kernels::linear_backward_weight`](crate::Kernels::linear_backward_weight).
pub(crate) fn linear_backward_weight(cx: &Cx, dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
    assert_eq!((dw.rows(), dw.cols()), (dy.cols(), x.cols()), "shape of a weight gradient");
    assert_eq!(dy.rows(), x.rows(), "rows of a weight gradient");
    let (dy, x, dw) = (dy.host::<f32>(), x.host::<f32>(), dw.host_mut::<f32>());
    let term = outer(&dy, 0..dy.cols, &x, 0..x.cols, 0..dy.rows, &dw, 0);
    // SAFETY: the shapes fit; dw is borrowed exclusively.
    unsafe { products(cx, once(term), Store::Add) };
}

/// See [`Kernels::linear_heads_backward_weight`](crate::Kernels::linear_heads_backward_weight).
pub(crate) fn linear_heads_backward_weight(
    cx: &Cx,
    dy: &Buffer,
    x: &Buffer,
    columns: HeadColumns,
    pack: Pack,
    dw: &mut Buffer,
) {
    let Pack { product, groups, group_stride, first_row, rows } = pack;
    let (inputs, outputs) = match product {
        Product::Transposed => (dw.cols(), rows),
        Product::Plain => (rows, dw.cols()),
    };
    check_heads(&columns, groups, (x.cols(), inputs), (dy.cols(), outputs));
    assert!(groups == 1 || group_stride >= rows, "groups are disjoint rows");
    assert!(
        first_row + (groups - 1) * group_stride + rows <= dw.rows(),
        "rows of a weight gradient"
    );
    assert_eq!(dy.rows(), x.rows(), "rows of a weight gradient");
    let (dy, x, dw) = (dy.host::<f32>(), x.host::<f32>(), dw.host_mut::<f32>());
    let terms = (0..groups).map(|h| {
        let input = columns.input_first + h * columns.input_stride;
        let output = columns.output_first + h * columns.output_stride;
        let (input, output) = (input..input + inputs, output..output + outputs);
        let row = first_row + h * group_stride;
        match product {
            Product::Transposed => outer(&dy, output, &x, input, 0..dy.rows, &dw, row),
            Product::Plain => outer(&x, input, &dy, output, 0..dy.rows, &dw, row),
        }
    });
    // SAFETY: the column blocks lie inside dy and x, the row blocks inside dw; they are disjoint.
    unsafe { products(cx, terms, Store::Add) };
}

/// dw[row + i][j] gets Σ over `rows` of left[t][left_cols[i]] right[t][right_cols[j]].
pub(crate) fn outer(
    left: &Mat<'_, f32>,
    left_cols: Range<usize>,
    right: &Mat<'_, f32>,
    right_cols: Range<usize>,
    rows: Range<usize>,
    dw: &MatMut<'_, f32>,
    row: usize,
) -> Term {
    let first_left = left.pointer().wrapping_add(rows.start * left.stride + left_cols.start);
    let first_right = right.pointer().wrapping_add(rows.start * right.stride + right_cols.start);
    Term {
        shape: [left_cols.len(), right_cols.len(), rows.len()],
        left: Left { at: first_left, row: 1, col: left.stride },
        right: Side::Floats(Right {
            at: first_right,
            row: right.stride,
            panel: PANEL,
            next: Next::Nothing,
        }),
        out: Out { at: dw.pointer().wrapping_add(row * dw.stride), row: dw.stride },
    }
}
