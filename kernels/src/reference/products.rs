//! Products with weights: plain, per head on column blocks, per expert on row blocks.
//!
//! A packed weight is a copy of its groups' rows, one group after another: `[groups * n, k]`.
//! `Transposed` is y = x Wᵀ (input k, output n), `Plain` is y = x W (input n, output k).

use super::{chain, formats, movement};
use crate::arena::{Arena, Owner};
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::format::WeightFormat;
use crate::kernels::{HeadColumns, Pack, Packed, Product, Result, Store};
use crate::routing::Routes;
use std::ops::Range;

pub fn pack(
    arena: &Arena,
    owner: Owner,
    weight: &Buffer,
    pack: Pack,
    format: WeightFormat,
    version: u64,
) -> Result<Packed> {
    let width = weight.cols();
    let mut data = arena.buffer(owner, DType::F64, pack.groups * pack.rows, width)?;
    let kept = formats::kept(weight, format);
    let mut rows = data.host_mut::<f64>();
    for group in 0..pack.groups {
        let first = pack.first_row + group * pack.group_stride;
        for row in 0..pack.rows {
            rows.row_mut(group * pack.rows + row).copy_from_slice(&kept[first + row]);
        }
    }
    let (product, groups) = (pack.product, pack.groups);
    let (inputs, outputs) = match product {
        Product::Transposed => (width, pack.rows),
        Product::Plain => (pack.rows, width),
    };
    let rows = (pack.first_row, pack.group_stride);
    Ok(Packed { product, groups, inputs, outputs, format, version, data, scales: None, rows })
}

/// Whether the rows of activations become integers too, and products are exact sums of integers.
fn has_integer_products(format: WeightFormat, product: Product) -> bool {
    format == WeightFormat::Int8 && product == Product::Transposed
}

/// Rows and columns of x and y that one group's product touches.
struct Block {
    rows: Range<usize>,
    x_first: usize,
    y_first: usize,
}

/// The product of one group on one block of rows and columns.
fn product(
    x: Mat<'_, f64>,
    weight: &Packed,
    group: usize,
    block: Block,
    y: &mut MatMut<'_, f64>,
    store: Store,
) {
    let weights = weight.data.host::<f64>();
    let first = group * weights.rows / weight.groups;
    for t in block.rows {
        let mut input = x.row(t)[block.x_first..][..weight.inputs].to_vec();
        if has_integer_products(weight.format, weight.product) {
            input = formats::row_of_integers(&input);
        }
        for out in 0..weight.outputs {
            let y = &mut y.row_mut(t)[block.y_first + out];
            let start = if store == Store::Add { *y } else { 0.0 };
            *y = match weight.product {
                Product::Transposed => chain(start, input.iter().zip(weights.row(first + out))),
                Product::Plain => {
                    let column = (0..weight.inputs).map(|i| &weights.row(first + i)[out]);
                    chain(start, input.iter().zip(column))
                }
            };
        }
    }
}

pub fn linear(x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store) {
    assert_eq!((x.cols(), y.cols()), (weight.inputs, weight.outputs), "widths of a product");
    assert_eq!(x.rows(), y.rows(), "rows of a product");
    let block = Block { rows: 0..x.rows(), x_first: 0, y_first: 0 };
    product(x.host(), weight, 0, block, &mut y.host_mut(), store);
}

pub fn linear_heads(
    x: &Buffer,
    weight: &Packed,
    columns: HeadColumns,
    y: &mut Buffer,
    store: Store,
) {
    assert_eq!(x.rows(), y.rows(), "rows of a product");
    for head in 0..weight.groups {
        let block = Block {
            rows: 0..x.rows(),
            x_first: columns.input_first + head * columns.input_stride,
            y_first: columns.output_first + head * columns.output_stride,
        };
        product(x.host(), weight, head, block, &mut y.host_mut(), store);
    }
}

pub fn linear_experts(x: &Buffer, weight: &Packed, routes: &Routes, y: &mut Buffer) {
    assert_eq!((x.cols(), y.cols()), (weight.inputs, weight.outputs), "widths of a product");
    assert_eq!(weight.groups, routes.experts, "one group an expert");
    for (expert, rows) in slots(routes).into_iter().enumerate() {
        let block = Block { rows, x_first: 0, y_first: 0 };
        product(x.host(), weight, expert, block, &mut y.host_mut(), Store::Set);
    }
}

/// The slots of each expert.
fn slots(routes: &Routes) -> Vec<Range<usize>> {
    let offsets = movement::read::<u32>(&routes.offsets);
    offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize).collect()
}

pub fn linear_backward_weight(dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
    assert_eq!((dy.cols(), x.cols()), (dw.rows(), dw.cols()), "shape of a weight gradient");
    assert_eq!(dy.rows(), x.rows(), "rows of a product");
    outer_sum(dy, x, dw);
}

pub fn linear_heads_backward_weight(
    dy: &Buffer,
    x: &Buffer,
    columns: HeadColumns,
    pack: Pack,
    dw: &mut Buffer,
) {
    let (inputs, outputs) = match pack.product {
        Product::Transposed => (dw.cols(), pack.rows),
        Product::Plain => (pack.rows, dw.cols()),
    };
    for head in 0..pack.groups {
        let input = columns.input_first + head * columns.input_stride;
        let output = columns.output_first + head * columns.output_stride;
        let x = x.cols_of(input..input + inputs);
        let dy = dy.cols_of(output..output + outputs);
        let first = pack.first_row + head * pack.group_stride;
        let mut dw = dw.rows_of_mut(first..first + pack.rows);
        match pack.product {
            Product::Transposed => outer_sum(&dy, &x, &mut dw),
            Product::Plain => outer_sum(&x, &dy, &mut dw),
        }
    }
}

pub fn linear_experts_backward_weight(dy: &Buffer, x: &Buffer, routes: &Routes, dw: &mut Buffer) {
    let rows = dw.rows() / routes.experts;
    for (expert, slots) in slots(routes).into_iter().enumerate() {
        let mut dw = dw.rows_of_mut(expert * rows..(expert + 1) * rows);
        outer_sum(&dy.rows_of(slots.clone()), &x.rows_of(slots), &mut dw);
    }
}

/// `dw += leftᵀ right`, rows ascending.
fn outer_sum(left: &Buffer, right: &Buffer, dw: &mut Buffer) {
    let (left, right, mut dw) = (left.host::<f64>(), right.host::<f64>(), dw.host_mut::<f64>());
    for t in 0..left.rows {
        for (n, factor) in left.row(t).iter().enumerate() {
            super::add_scaled(*factor, right.row(t), dw.row_mut(n));
        }
    }
}
