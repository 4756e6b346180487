//! Norm, rotation, gate, movement, optimizer. Tolerance: a few roundings, or a sum over a row.

use super::Entry;
use crate::bench::{Bench, Output, below};
use rehearsal_kernels::{AdamW, Pairing, RopeTable, Store};

pub const PROBLEMS: &[Entry] = &[
    ("rms_norm", 1e-5, rms_norm),
    ("rope", 1e-6, rope),
    ("swiglu", 2e-6, swiglu),
    ("movement", 1e-6, movement),
    ("squared_sum", 1e-6, squared_sum),
    ("adamw", 1e-6, adamw),
];

const T: usize = 133;
const D: usize = 83;

fn rms_norm(bench: &Bench<'_>) -> Vec<Output> {
    let (x, weight, dy) = (bench.random(1, T, D), bench.random(2, 1, D), bench.random(3, T, D));
    let (mut y, mut inverse_rms) = (bench.unset(T, D), bench.unset(T, 1));
    let (mut dx, mut added, mut dw) =
        (bench.unset(T, D), bench.random(4, T, D), bench.random(5, 1, D));
    let k = bench.kernels;
    k.rms_norm(&x, &weight, 1e-6, &mut y, &mut inverse_rms);
    k.rms_norm_backward_input(&dy, &x, &weight, &inverse_rms, &mut dx, Store::Set);
    k.rms_norm_backward_input(&dy, &x, &weight, &inverse_rms, &mut added, Store::Add);
    k.rms_norm_backward_weight(&dy, &x, &inverse_rms, &mut dw);
    vec![
        ("y", bench.read(&y)),
        ("inverse_rms", bench.read(&inverse_rms)),
        ("dx", bench.read(&dx)),
        ("dx added", bench.read(&added)),
        ("dw", bench.read(&dw)),
    ]
}

fn rope(bench: &Bench<'_>) -> Vec<Output> {
    // Three heads of 10 + 12 columns; the last 12 of each are rotated.
    let table =
        |pairing| RopeTable { pairing, cos: bench.random(1, 50, 6), sin: bench.random(2, 50, 6) };
    let positions = bench.indices(T, 1, &below(3, T, 50));
    let turn = |pairing, inverse| {
        let mut x = bench.random(4, T, 66);
        bench.kernels.rope(&mut x, &positions, &table(pairing), 3, 10, 22, inverse);
        bench.read(&x)
    };
    vec![
        ("pairs there", turn(Pairing::Interleaved, false)),
        ("pairs back", turn(Pairing::Interleaved, true)),
        ("halves there", turn(Pairing::Halves, false)),
        ("halves back", turn(Pairing::Halves, true)),
    ]
}

fn swiglu(bench: &Bench<'_>) -> Vec<Output> {
    // Times 8, so that the gate's flat ends are reached.
    let far: Vec<f64> = bench.read(&bench.random(1, T, 2 * D)).iter().map(|x| 8.0 * x).collect();
    let (gate_up, dy) = (bench.floats(T, 2 * D, &far), bench.random(2, T, D));
    let (mut y, mut d_gate_up) = (bench.unset(T, D), bench.unset(T, 2 * D));
    bench.kernels.swiglu(&gate_up, &mut y);
    bench.kernels.swiglu_backward(&dy, &gate_up, &mut d_gate_up);
    vec![("y", bench.read(&y)), ("d_gate_up", bench.read(&d_gate_up))]
}

fn movement(bench: &Bench<'_>) -> Vec<Output> {
    let (k, src) = (bench.kernels, bench.random(1, T, D));
    let mut copied = bench.unset(T, D + 3);
    k.fill(&mut copied, 0.25);
    k.copy(&src, &mut copied.cols_of_mut(2..D + 2));
    let mut added = bench.random(2, T, D);
    k.add(&src, &mut added);
    let mut scaled = bench.unset(T, D + 3);
    k.fill(&mut scaled, 0.25);
    k.scale(&src, -1.7, &mut scaled.cols_of_mut(2..D + 2));
    let index = below(3, 2 * T, T as u64);
    let mut gathered = bench.unset(2 * T, D);
    k.gather_rows(&src, &bench.indices(2 * T, 1, &index), &mut gathered);
    let mut summed = bench.random(4, T, D);
    k.scatter_add_rows(&gathered, &bench.indices(2 * T, 1, &index), &mut summed);
    let distinct: Vec<u32> = (0..T as u32).map(|i| (i * 5 + 3) % T as u32 * 2).collect();
    let mut scattered = bench.filled(2 * T, D, 0.5);
    k.scatter_rows(&src, &bench.indices(T, 1, &distinct), &mut scattered);
    let mut numbers = bench.unset_indices(2 * T, 1);
    k.copy(&bench.indices(2 * T, 1, &index), &mut numbers);
    vec![
        ("copied", bench.read(&copied)),
        ("added", bench.read(&added)),
        ("scaled", bench.read(&scaled)),
        ("gathered", bench.read(&gathered)),
        ("summed", bench.read(&summed)),
        ("scattered", bench.read(&scattered)),
        ("numbers", bench.read_indices(&numbers)),
        ("narrow", k.download(&src).into_iter().map(f64::from).collect()),
    ]
}

fn squared_sum(bench: &Bench<'_>) -> Vec<Output> {
    let x = bench.random(1, T, D);
    let columns = bench.kernels.squared_sum(&x.cols_of(3..40));
    vec![("whole", vec![bench.kernels.squared_sum(&x)]), ("columns", vec![columns])]
}

fn adamw(bench: &Bench<'_>) -> Vec<Output> {
    let (g, mut w) = (bench.random(1, 1, T * D), bench.random(2, 1, T * D));
    let [mut m, mut v] = [0, 1].map(|_| bench.filled(1, T * D, 0.0));
    for step in 1..4 {
        let update = AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 1.0 / step as f64,
            step,
        };
        bench.kernels.adamw(&update, &g, &mut w, &mut m, &mut v);
    }
    vec![("w", bench.read(&w)), ("m", bench.read(&m)), ("v", bench.read(&v))]
}
