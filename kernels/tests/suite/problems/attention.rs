//! Attention in its three forms, and the cached path. Tolerance: softmax over up to 70 tokens.

use super::Entry;
use crate::bench::{Bench, Output, below, starts, stems};
use rehearsal_kernels::{AttentionShape, Buffer, CacheFormat, CacheLayout, CacheSpec, DecodeBatch};

pub const PROBLEMS: &[Entry] = &[
    ("mla_train expanded", 2e-5, |bench| alone(bench, &EXPANDED)),
    ("mla_train absorbed", 2e-5, |bench| alone(bench, &ABSORBED)),
    ("mla_train grouped", 2e-5, |bench| alone(bench, &GROUPED)),
    ("mla_train expanded, shared stem", 2e-5, |bench| shared(bench, &EXPANDED)),
    ("mla_train absorbed, shared stem", 2e-5, |bench| shared(bench, &ABSORBED)),
    ("mla_train grouped, shared stem", 2e-5, |bench| shared(bench, &GROUPED)),
    ("mla_decode absorbed", 2e-5, |bench| decoded(bench, &ABSORBED)),
    ("mla_decode grouped", 2e-5, |bench| decoded(bench, &GROUPED)),
    ("mla_decode expanded", 2e-5, |bench| decoded(bench, &EXPANDED)),
];

/// MLA with keys and values of their own per head.
pub const EXPANDED: AttentionShape = AttentionShape {
    heads: 3,
    sharing: 1,
    key_width: 6,
    rope_width: 4,
    value_width: 5,
    head_stride: 11,
    value_offset: 6,
    scale: 0.4,
};

/// MLA whose heads share the latent as key and as value.
pub const ABSORBED: AttentionShape = AttentionShape {
    heads: 3,
    sharing: 3,
    key_width: 9,
    rope_width: 4,
    value_width: 9,
    head_stride: 0,
    value_offset: 0,
    scale: 0.35,
};

/// Grouped queries: two heads to a key, and no rope part.
pub const GROUPED: AttentionShape = AttentionShape {
    heads: 4,
    sharing: 2,
    key_width: 6,
    rope_width: 0,
    value_width: 6,
    head_stride: 12,
    value_offset: 6,
    scale: 0.4,
};

const LENGTHS: [usize; 5] = [41, 1, 70, 16, 5];
const T: usize = 133;

fn alone(bench: &Bench<'_>, shape: &AttentionShape) -> Vec<Output> {
    train(bench, shape, bench.indices(T, 1, &starts(&LENGTHS)))
}

/// The first segment is the stem of all others.
fn shared(bench: &Bench<'_>, shape: &AttentionShape) -> Vec<Output> {
    train(bench, shape, bench.indices(T, 2, &stems(&LENGTHS)))
}

fn train(bench: &Bench<'_>, shape: &AttentionShape, start: Buffer) -> Vec<Output> {
    let (query_cols, out_cols) =
        (shape.heads * shape.query_width(), shape.heads * shape.value_width);
    let (q, kv) = (bench.random(1, T, query_cols), bench.random(2, T, shape.kv_width()));
    let (k_rope, d_o) = (bench.random(3, T, shape.rope_width), bench.random(4, T, out_cols));
    let (mut o, mut lse) = (bench.unset(T, out_cols), bench.unset(T, shape.heads));
    let k = bench.kernels;
    k.mla_train(shape, &q, &kv, &k_rope, &start, &mut o, &mut lse).unwrap();
    let [mut dq, mut dkv, mut dk_rope] = [&q, &kv, &k_rope].map(|x| bench.unset(T, x.cols()));
    k.mla_train_backward_input(
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
    vec![
        ("o", bench.read(&o)),
        ("lse", bench.read(&lse)),
        ("dq", bench.read(&dq)),
        ("dkv", bench.read(&dkv)),
        ("dk_rope", bench.read(&dk_rope)),
    ]
}

/// One row of a decoding batch: its sequence, the tokens it sees, and the key of its random query.
#[derive(Clone, Copy)]
pub struct DecodeRow {
    pub sequence: u32,
    pub length: u32,
    pub query: u64,
}

/// Rows of all sequences in no order, some of them prompt rows of one sequence.
pub fn mixed_rows() -> Vec<DecodeRow> {
    let row = |i: u64| {
        let sequence = below(i, 1, 4)[0];
        DecodeRow { sequence, length: 1 + below(i + 100, 1, 69)[0], query: i }
    };
    (0..60).map(row).collect()
}

fn decoded(bench: &Bench<'_>, shape: &AttentionShape) -> Vec<Output> {
    let of = |format| bench.read(&decode(bench, shape, format, &mixed_rows()));
    let [f32, bf16, fp8, six_bit] = CacheFormat::ALL.map(of);
    vec![("o", f32), ("o from bf16", bf16), ("o from fp8", fp8), ("o from 6 bits", six_bit)]
}

/// Attends from `rows` into a cache in a format, of 4 sequences whose 10 pages each, of 7 tokens, are scattered.
pub fn decode(
    bench: &Bench<'_>,
    shape: &AttentionShape,
    format: CacheFormat,
    rows: &[DecodeRow],
) -> Buffer {
    let (pages, page_tokens, sequences) = (10, 7, 4);
    let numbers: Vec<u32> = (0..sequences * pages).map(|i| (i * 17 + 5) % 40).collect();
    let column = |number: fn(&DecodeRow) -> u32| {
        bench.indices(rows.len(), 1, &rows.iter().map(number).collect::<Vec<_>>())
    };
    let layout = CacheLayout { format, latent: shape.kv_width(), rope: shape.rope_width };
    let (latent, rope) = (bench.random(90, 280, layout.latent), bench.random(91, 280, layout.rope));
    let channels = bench.random(92, 1, layout.latent);
    let spec = CacheSpec { layout, channels: Some(&channels) };
    let slots = bench.indices(280, 1, &(0..280).collect::<Vec<_>>());
    let mut cache = bench.cache(&layout, 280);
    bench.kernels.write_cache(&spec, &latent, &rope, &slots, &mut cache);
    let width = shape.heads * shape.query_width();
    let mut q = bench.unset(rows.len(), width);
    for (i, row) in rows.iter().enumerate() {
        bench.kernels.copy(&bench.random(1000 + row.query, 1, width), &mut q.rows_of_mut(i..i + 1));
    }
    let batch = DecodeBatch {
        tables: &bench.indices(sequences as usize, pages as usize, &numbers),
        sequence: &column(|row| row.sequence),
        length: &column(|row| row.length),
        page_tokens,
    };
    let mut o = bench.unset(rows.len(), shape.heads * shape.value_width);
    bench.kernels.mla_decode(shape, &q, &spec, &cache, &batch, &mut o).unwrap();
    o
}
