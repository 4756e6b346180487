//! Gradients of attention in its three forms, over rows of several packed segments.

use super::on_reference;
use crate::bench::{Bench, check_gradients, inner, normals, starts, stems};
use crate::problems::attention::{ABSORBED, EXPANDED, GROUPED};
use rehearsal_kernels::{AttentionShape, Buffer};

const LENGTHS: [usize; 3] = [3, 1, 4];
const T: usize = 8;

struct Inputs {
    q: Buffer,
    kv: Buffer,
    k_rope: Buffer,
    start: Buffer,
}

/// Whether the first segment is the stem of the others.
#[derive(Clone, Copy)]
enum Segments {
    Alone,
    Continuing,
}

fn forward(
    bench: &Bench<'_>,
    segments: Segments,
    shape: &AttentionShape,
    inputs: &[Vec<f64>],
) -> (Inputs, Buffer, Buffer) {
    let inputs = Inputs {
        q: bench.floats(T, shape.heads * shape.query_width(), &inputs[0]),
        kv: bench.floats(T, shape.kv_width(), &inputs[1]),
        k_rope: bench.floats(T, shape.rope_width, &inputs[2]),
        start: match segments {
            Segments::Alone => bench.indices(T, 1, &starts(&LENGTHS)),
            Segments::Continuing => bench.indices(T, 2, &stems(&LENGTHS)),
        },
    };
    let (mut o, mut lse) =
        (bench.unset(T, shape.heads * shape.value_width), bench.unset(T, shape.heads));
    let Inputs { q, kv, k_rope, start } = &inputs;
    bench.kernels.mla_train(shape, q, kv, k_rope, start, &mut o, &mut lse).unwrap();
    (inputs, o, lse)
}

fn check_shape(bench: &Bench<'_>, label: &str, shape: &AttentionShape) {
    check_segments(bench, label, Segments::Alone, shape);
    check_segments(bench, &format!("{label}, shared stem"), Segments::Continuing, shape);
}

fn check_segments(bench: &Bench<'_>, label: &str, segments: Segments, shape: &AttentionShape) {
    let values = [
        normals(1, T * shape.heads * shape.query_width()),
        normals(2, T * shape.kv_width()),
        normals(3, T * shape.rope_width),
    ];
    let r = normals(4, T * shape.heads * shape.value_width);
    let (Inputs { q, kv, k_rope, start }, o, lse) = forward(bench, segments, shape, &values);
    let d_o = bench.floats(T, o.cols(), &r);
    let [mut dq, mut dkv, mut dk_rope] = [&q, &kv, &k_rope].map(|x| bench.unset(T, x.cols()));
    bench
        .kernels
        .mla_train_backward_input(
            shape,
            &q,
            &kv,
            &k_rope,
            &start,
            &o,
            &lse,
            &d_o,
            &mut dq,
            &mut dkv,
            &mut dk_rope,
        )
        .unwrap();
    let gradients = [&dq, &dkv, &dk_rope].map(|d| bench.read(d));
    check_gradients(label, &values, &gradients, |values| {
        inner(&r, &bench.read(&forward(bench, segments, shape, values).1))
    });
}

#[test]
fn expanded_attention_backward_is_the_derivative() {
    on_reference(|bench| check_shape(bench, "expanded", &EXPANDED));
}

#[test]
fn absorbed_attention_backward_adds_key_and_value_gradients_in_the_latent() {
    on_reference(|bench| check_shape(bench, "absorbed", &ABSORBED));
}

#[test]
fn grouped_query_attention_backward_is_the_derivative() {
    on_reference(|bench| check_shape(bench, "grouped", &GROUPED));
}
