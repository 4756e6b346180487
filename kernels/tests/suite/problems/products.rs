//! Products with weights. Tolerance: chains of up to 150 terms of order 1 in f32.

use super::Entry;
use crate::bench::{Bench, Output, below};
use rehearsal_kernels::{HeadColumns, Pack, Product, Store};

pub const PROBLEMS: &[Entry] = &[
    ("linear", 2e-5, linear),
    ("linear plain", 2e-5, linear_plain),
    ("linear of one row", 2e-5, linear_of_one_row),
    ("linear into columns", 2e-5, linear_into_columns),
    ("linear_backward_weight", 2e-5, linear_backward_weight),
    ("linear_heads", 2e-5, linear_heads),
    ("linear_heads plain", 2e-5, linear_heads_plain),
    ("linear_experts", 2e-5, linear_experts),
];

const T: usize = 133;
const N: usize = 77;
const K: usize = 150;

fn linear(bench: &Bench<'_>) -> Vec<Output> {
    let weight = bench.pack(Product::Transposed, &bench.random(2, N, K), 1);
    assert_eq!((weight.inputs, weight.outputs, weight.groups, weight.version), (K, N, 1, 7));
    let (x, mut set, mut added) = (bench.random(1, T, K), bench.unset(T, N), bench.random(3, T, N));
    bench.kernels.linear(&x, &weight, &mut set, Store::Set);
    bench.kernels.linear(&x, &weight, &mut added, Store::Add);
    vec![("set", bench.read(&set)), ("added", bench.read(&added))]
}

fn linear_plain(bench: &Bench<'_>) -> Vec<Output> {
    let weight = bench.pack(Product::Plain, &bench.random(2, N, K), 1);
    assert_eq!((weight.inputs, weight.outputs), (N, K));
    let (x, mut set, mut added) = (bench.random(1, T, N), bench.unset(T, K), bench.random(3, T, K));
    bench.kernels.linear(&x, &weight, &mut set, Store::Set);
    bench.kernels.linear(&x, &weight, &mut added, Store::Add);
    vec![("set", bench.read(&set)), ("added", bench.read(&added))]
}

fn linear_of_one_row(bench: &Bench<'_>) -> Vec<Output> {
    let weight = bench.pack(Product::Transposed, &bench.random(2, N, K), 1);
    let (x, mut y) = (bench.random(1, 1, K), bench.unset(1, N));
    bench.kernels.linear(&x, &weight, &mut y, Store::Set);
    vec![("y", bench.read(&y))]
}

/// Input and output are columns of wider buffers, and the weight is some rows of a larger one.
fn linear_into_columns(bench: &Bench<'_>) -> Vec<Output> {
    let (wide, weights) = (bench.random(1, T, K + 5), bench.random(2, N + 4, K));
    let weight = bench.pack(Product::Transposed, &weights.rows_of(3..N + 3), 1);
    let mut y = bench.filled(T, N + 9, 0.5);
    let (x, mut part) = (wide.cols_of(2..K + 2), y.cols_of_mut(7..N + 7));
    bench.kernels.linear(&x, &weight, &mut part, Store::Set);
    vec![("y", bench.read(&y))]
}

fn linear_backward_weight(bench: &Bench<'_>) -> Vec<Output> {
    let (dy, x, mut dw) = (bench.random(1, T, N), bench.random(2, T, K), bench.random(3, N, K));
    bench.kernels.linear_backward_weight(&dy, &x, &mut dw);
    vec![("dw", bench.read(&dw))]
}

const HEADS: usize = 5;

fn heads(bench: &Bench<'_>, product: Product, inputs: usize, outputs: usize) -> Vec<Output> {
    // Heads of 9 + 18 rows whose last 18 are used; blocks of x and y lie apart.
    let pack = Pack { product, groups: HEADS, group_stride: 27, first_row: 9, rows: 18 };
    let columns = HeadColumns {
        input_first: 3,
        input_stride: inputs + 2,
        output_first: 1,
        output_stride: outputs + 6,
    };
    let (x_cols, y_cols) = (3 + HEADS * (inputs + 2), 1 + HEADS * (outputs + 6));
    let weight = bench.random(2, HEADS * 27, 40);
    let packed = bench.packed(&weight, pack);
    assert_eq!((packed.inputs, packed.outputs, packed.groups), (inputs, outputs, HEADS));
    let (x, mut set, mut added) =
        (bench.random(1, T, x_cols), bench.filled(T, y_cols, 0.5), bench.random(3, T, y_cols));
    let k = bench.kernels;
    k.linear_heads(&x, &packed, columns, &mut set, Store::Set);
    k.linear_heads(&x, &packed, columns, &mut added, Store::Add);
    let (dy, mut dw) = (bench.random(4, T, y_cols), bench.random(5, HEADS * 27, 40));
    k.linear_heads_backward_weight(&dy, &x, columns, pack, &mut dw);
    vec![("set", bench.read(&set)), ("added", bench.read(&added)), ("dw", bench.read(&dw))]
}

fn linear_heads(bench: &Bench<'_>) -> Vec<Output> {
    heads(bench, Product::Transposed, 40, 18)
}

fn linear_heads_plain(bench: &Bench<'_>) -> Vec<Output> {
    heads(bench, Product::Plain, 18, 40)
}

/// Seven experts, one of them without a token, one with a single one.
fn linear_experts(bench: &Bench<'_>) -> Vec<Output> {
    let (experts, n, k) = (7, 33, 50);
    let mut chosen: Vec<u32> = below(9, 2 * T, 5);
    chosen[40] = 6;
    let routes = bench.kernels.routes(&bench.indices(T, 2, &chosen), experts).unwrap();
    let weight = bench.random(2, experts * n, k);
    let (x, mut y, mut dx) =
        (bench.random(1, 2 * T, k), bench.unset(2 * T, n), bench.unset(2 * T, k));
    let forward = bench.pack(Product::Transposed, &weight, experts);
    bench.kernels.linear_experts(&x, &forward, &routes, &mut y);
    let (dy, mut dw) = (bench.random(4, 2 * T, n), bench.random(5, experts * n, k));
    let back = bench.pack(Product::Plain, &weight, experts);
    bench.kernels.linear_experts(&dy, &back, &routes, &mut dx);
    bench.kernels.linear_experts_backward_weight(&dy, &x, &routes, &mut dw);
    vec![("y", bench.read(&y)), ("dx", bench.read(&dx)), ("dw", bench.read(&dw))]
}
