//! Gradients of what works row by row: norm, rotation, gate, gather, head.

use super::on_reference;
use crate::bench::{Bench, below, check_close, check_gradients, inner, normals};
use rehearsal_kernels::{Buffer, Pairing, Product, RopeTable, Store};

const T: usize = 5;
const D: usize = 7;

/// A norm with an epsilon large enough to be seen.
fn norm(bench: &Bench<'_>, x: &Buffer, weight: &Buffer) -> (Buffer, Buffer) {
    let (mut y, mut inverse_rms) = (bench.unset(T, D), bench.unset(T, 1));
    bench.kernels.rms_norm(x, weight, 0.1, &mut y, &mut inverse_rms);
    (y, inverse_rms)
}

#[test]
fn rms_norm_backward_is_the_derivative_by_input_and_weight() {
    on_reference(|bench| {
        let (inputs, r) = ([normals(1, T * D), normals(2, D)], normals(3, T * D));
        let loss = |inputs: &[Vec<f64>]| {
            let (x, weight) = (bench.floats(T, D, &inputs[0]), bench.floats(1, D, &inputs[1]));
            inner(&r, &bench.read(&norm(bench, &x, &weight).0))
        };
        let (x, weight) = (bench.floats(T, D, &inputs[0]), bench.floats(1, D, &inputs[1]));
        let (_, inverse_rms) = norm(bench, &x, &weight);
        let (dy, mut dx, mut dw) =
            (bench.floats(T, D, &r), bench.unset(T, D), bench.filled(1, D, 0.0));
        let k = bench.kernels;
        k.rms_norm_backward_input(&dy, &x, &weight, &inverse_rms, &mut dx, Store::Set);
        k.rms_norm_backward_weight(&dy, &x, &inverse_rms, &mut dw);
        check_gradients("rms_norm", &inputs, &[bench.read(&dx), bench.read(&dw)], loss);

        let once = bench.read(&dx);
        k.rms_norm_backward_input(&dy, &x, &weight, &inverse_rms, &mut dx, Store::Add);
        let twice: Vec<f64> = once.iter().map(|d| 2.0 * d).collect();
        check_close("rms_norm, added", &bench.read(&dx), &twice, 1e-14);
    });
}

#[test]
fn rotating_back_is_the_derivative_of_rotating() {
    on_reference(|bench| {
        // Two heads of 3 + 4 columns, the last 4 rotated; cos and sin need not be on a circle.
        let (positions, width) = (bench.indices(T, 1, &[3, 0, 5, 1, 5]), 2 * (3 + 4));
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            let table =
                RopeTable { pairing, cos: bench.random(1, 6, 2), sin: bench.random(2, 6, 2) };
            let turned = |values: &[f64], inverse| {
                let mut x = bench.floats(T, width, values);
                bench.kernels.rope(&mut x, &positions, &table, 2, 3, 7, inverse);
                bench.read(&x)
            };
            let (inputs, r) = ([normals(3, T * width)], normals(4, T * width));
            let loss = |x: &[Vec<f64>]| inner(&r, &turned(&x[0], false));
            check_gradients("rope", &inputs, &[turned(&r, true)], loss);
        }
    });
}

#[test]
fn swiglu_backward_is_the_derivative_by_gate_and_up() {
    on_reference(|bench| {
        let (inputs, r) = ([normals(1, T * 2 * D)], normals(2, T * D));
        let loss = |inputs: &[Vec<f64>]| {
            let mut y = bench.unset(T, D);
            bench.kernels.swiglu(&bench.floats(T, 2 * D, &inputs[0]), &mut y);
            inner(&r, &bench.read(&y))
        };
        let (dy, gate_up) = (bench.floats(T, D, &r), bench.floats(T, 2 * D, &inputs[0]));
        let mut d_gate_up = bench.unset(T, 2 * D);
        bench.kernels.swiglu_backward(&dy, &gate_up, &mut d_gate_up);
        check_gradients("swiglu", &inputs, &[bench.read(&d_gate_up)], loss);
    });
}

#[test]
fn scatter_add_is_the_derivative_of_gather() {
    on_reference(|bench| {
        let (index, inputs, r) = (below(1, 9, T as u64), [normals(1, T * D)], normals(2, 9 * D));
        let index = bench.indices(9, 1, &index);
        let loss = |inputs: &[Vec<f64>]| {
            let mut y = bench.unset(9, D);
            bench.kernels.gather_rows(&bench.floats(T, D, &inputs[0]), &index, &mut y);
            inner(&r, &bench.read(&y))
        };
        let mut dx = bench.filled(T, D, 0.0);
        bench.kernels.scatter_add_rows(&bench.floats(9, D, &r), &index, &mut dx);
        check_gradients("gather_rows", &inputs, &[bench.read(&dx)], loss);
    });
}

#[test]
fn head_logprob_backward_is_the_derivative_by_rows_and_head() {
    on_reference(|bench| {
        let (vocabulary, temperature) = (11, 0.7);
        let (inputs, r) = ([normals(1, T * D), normals(2, vocabulary * D)], normals(3, T));
        let targets = bench.indices(T, 1, &[10, 0, 4, 4, 7]);
        let k = bench.kernels;
        let forward = |inputs: &[Vec<f64>]| {
            let x = bench.floats(T, D, &inputs[0]);
            let head = bench.pack(Product::Transposed, &bench.floats(vocabulary, D, &inputs[1]), 1);
            let [mut logprob, mut entropy] = [0, 1].map(|_| bench.unset(T, 1));
            k.head_logprob(&x, &head, &targets, temperature, &mut logprob, &mut entropy, None)
                .unwrap();
            (x, head, logprob)
        };
        let loss = |inputs: &[Vec<f64>]| inner(&r, &bench.read(&forward(inputs).2));
        let (x, head, _) = forward(&inputs);
        let plain = bench.pack(Product::Plain, &bench.floats(vocabulary, D, &inputs[1]), 1);
        let c = bench.floats(T, 1, &r);
        let (mut dx, mut dw) = (bench.unset(T, D), bench.filled(vocabulary, D, 0.0));
        k.head_logprob_backward(
            &x,
            &head,
            &plain,
            &targets,
            temperature,
            &c,
            None,
            &mut dx,
            &mut dw,
        )
        .unwrap();
        check_gradients("head_logprob", &inputs, &[bench.read(&dx), bench.read(&dw)], loss);
    });
}
