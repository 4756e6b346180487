//! The head and the sampler. Tolerance: softmax over 700 tokens of dot products in f32.

use super::Entry;
use crate::bench::{Bench, Output, below};
use rehearsal_kernels::random::{Stream, uniform};
use rehearsal_kernels::{Product, SampleRow};

pub const PROBLEMS: &[Entry] = &[
    ("head_logprob", 5e-5, head_logprob),
    ("logits_logprob", 1e-5, logits_logprob),
    ("sample", 1e-5, sample),
];

const R: usize = 43;
const D: usize = 37;
const V: usize = 701;

fn head_logprob(bench: &Bench<'_>) -> Vec<Output> {
    let (x, weight) = (bench.random(1, R, D), bench.random(2, V, D));
    let head = bench.pack(Product::Transposed, &weight, 1);
    let plain = bench.pack(Product::Plain, &weight, 1);
    let targets = bench.indices(R, 1, &below(3, R, V as u64));
    let [mut logprob, mut entropy] = [0, 1].map(|_| bench.unset(R, 1));
    let (k, temperature, c) = (bench.kernels, 1.5, bench.random(4, R, 1));
    let mut kept = bench.unset(R, V);
    let mut outputs = Vec::new();
    for (kept, names) in [(Some(&mut kept), ["dx", "dw"]), (None, ["dx again", "dw again"])] {
        let mut kept = kept;
        let also = kept.as_deref_mut();
        k.head_logprob(&x, &head, &targets, temperature, &mut logprob, &mut entropy, also).unwrap();
        let (mut dx, mut dw) = (bench.unset(R, D), bench.random(5, V, D));
        k.head_logprob_backward(
            &x,
            &head,
            &plain,
            &targets,
            temperature,
            &c,
            kept,
            &mut dx,
            &mut dw,
        )
        .unwrap();
        outputs.extend([(names[0], bench.read(&dx)), (names[1], bench.read(&dw))]);
    }
    outputs.extend([("logprob", bench.read(&logprob)), ("entropy", bench.read(&entropy))]);
    outputs
}

fn logits_logprob(bench: &Bench<'_>) -> Vec<Output> {
    let (mut logits, mut logprob) = (bench.random(1, R, V), bench.unset(R, 1));
    let targets = bench.indices(R, 1, &below(3, R, V as u64));
    bench.kernels.logits_logprob(&mut logits, &targets, 0.8, &mut logprob);
    vec![("logprob", bench.read(&logprob))]
}

/// Every way to sample, with numbers that do not fall where an f32 sum may round across a token.
fn sample(bench: &Bench<'_>) -> Vec<Output> {
    let rules = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 20), (0.9, 0.6, 50)];
    let row = |r: usize| {
        let (temperature, top_p, top_k) = rules[r % rules.len()];
        let uniform = uniform(1, Stream::Sample, [r as u64, 0, 0, 0]);
        SampleRow { temperature, top_p, top_k, uniform }
    };
    let rows: Vec<SampleRow> = (0..R).map(row).collect();
    let sampled = bench.kernels.sample(&bench.random(1, R, V), &rows);
    vec![
        ("tokens", sampled.iter().map(|s| f64::from(s.token)).collect()),
        ("logprobs", sampled.iter().map(|s| s.logprob).collect()),
    ]
}
