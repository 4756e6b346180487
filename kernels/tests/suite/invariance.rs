//! Invariance: what must leave every bit of a result alone.
//!
//! Threads, the other rows of a batch, batches in pieces, and the cached path against the training
//! path. On the CPU kernels, whose tiles and threads could break it, and on the reference.

use crate::bench::{Bench, check_close, check_same_bits};
use crate::problems;
use crate::problems::attention::{ABSORBED, DecodeRow, EXPANDED, GROUPED, decode, mixed_rows};
use rehearsal_kernels::{
    Arena, AttentionShape, Buffer, CacheFormat, CacheLayout, CacheSpec, CpuKernels, DecodeBatch,
    Kernels, Product, ReferenceKernels, Store,
};

/// Runs `test` on both devices.
fn on_each(test: impl Fn(&Bench<'_>)) {
    let cpu = CpuKernels::new(2, Arena::new(None));
    let reference = ReferenceKernels::new(Arena::new(None));
    for kernels in [&cpu as &dyn Kernels, &reference] {
        test(&Bench::new(kernels));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let one = CpuKernels::new(1, Arena::new(None));
    for threads in [2, 3] {
        let many = CpuKernels::new(threads, Arena::new(None));
        for problem in problems::all() {
            let (want, got) = ((problem.run)(&Bench::new(&one)), (problem.run)(&Bench::new(&many)));
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let label = format!("{}, {name}, with {threads} threads", problem.name);
                check_same_bits(&label, got, want);
            }
        }
    }
}

const T: usize = 70;

#[test]
fn a_product_s_row_does_not_depend_on_the_other_rows() {
    on_each(|bench| {
        for product in [Product::Transposed, Product::Plain] {
            let weight = bench.pack(product, &bench.random(2, 45, 50), 1);
            let x = bench.random(1, T, weight.inputs);
            let (mut whole, mut pieces) =
                (bench.unset(T, weight.outputs), bench.unset(T, weight.outputs));
            bench.kernels.linear(&x, &weight, &mut whole, Store::Set);
            for rows in [0..1, 1..2, 2..13, 13..64, 64..T] {
                let mut y = pieces.rows_of_mut(rows.clone());
                bench.kernels.linear(&x.rows_of(rows), &weight, &mut y, Store::Set);
            }
            check_same_bits("linear in pieces", &bench.read(&pieces), &bench.read(&whole));
        }
    });
}

/// Adds to a gradient from some rows.
type AddRows<'a> = &'a dyn Fn(&Bench<'_>, std::ops::Range<usize>, &mut Buffer);

#[test]
fn a_weight_gradient_in_pieces_has_the_bits_of_one_piece() {
    on_each(|bench| {
        let (dy, x, r) = (bench.random(1, T, 45), bench.random(2, T, 50), bench.random(3, T, 1));
        let linear: AddRows<'_> = &|bench, rows, dw| {
            bench.kernels.linear_backward_weight(&dy.rows_of(rows.clone()), &x.rows_of(rows), dw);
        };
        let norm: AddRows<'_> = &|bench, rows, dw| {
            let (dy, x) = (dy.cols_of(0..40), x.cols_of(0..40));
            let (dy, x, r) = (dy.rows_of(rows.clone()), x.rows_of(rows.clone()), r.rows_of(rows));
            bench.kernels.rms_norm_backward_weight(&dy, &x, &r, dw);
        };
        for (label, add, rows, cols) in [("linear", linear, 45, 50), ("rms_norm", norm, 1, 40)] {
            let (mut whole, mut pieces) =
                (bench.random(4, rows, cols), bench.random(4, rows, cols));
            add(bench, 0..T, &mut whole);
            for rows in [0..1, 1..13, 13..64, 64..T] {
                add(bench, rows, &mut pieces);
            }
            check_same_bits(label, &bench.read(&pieces), &bench.read(&whole));
        }
    });
}

#[test]
fn a_decoding_row_does_not_depend_on_the_rest_of_its_batch() {
    on_each(|bench| {
        let rows = mixed_rows();
        for shape in [&ABSORBED, &GROUPED, &EXPANDED] {
            let of =
                |rows: &[DecodeRow]| bench.read(&decode(bench, shape, CacheFormat::SixBit, rows));
            let together = of(&rows);
            let alone: Vec<f64> = rows.iter().flat_map(|row| of(&[*row])).collect();
            check_same_bits("decode alone", &alone, &together);
        }
    });
}

#[test]
fn cached_attention_has_the_bits_of_training_attention_of_the_same_shape() {
    on_each(|bench| {
        for shape in [&ABSORBED, &GROUPED, &EXPANDED] {
            check_cached(bench, shape);
        }
    });
}

fn check_cached(bench: &Bench<'_>, shape: &AttentionShape) {
    let (page_tokens, tokens) = (5, 23);
    let wide = shape.kv_width();
    let q = bench.random(1, tokens, shape.heads * shape.query_width());
    let (kv, k_rope) = (bench.random(2, tokens, wide), bench.random(3, tokens, shape.rope_width));
    let (mut o, mut lse) =
        (bench.unset(tokens, shape.heads * shape.value_width), bench.unset(tokens, shape.heads));
    let start = bench.indices(tokens, 1, &vec![0; tokens]);
    let k = bench.kernels;
    k.mla_train(shape, &q, &kv, &k_rope, &start, &mut o, &mut lse).unwrap();

    let pages = [4, 0, 3, 1, 2];
    let slots: Vec<u32> = (0..tokens)
        .map(|j| pages[j / page_tokens] * page_tokens as u32 + (j % page_tokens) as u32)
        .collect();
    let slots = bench.indices(tokens, 1, &slots);
    let layout = CacheLayout { format: CacheFormat::F32, latent: wide, rope: shape.rope_width };
    let spec = CacheSpec { layout, channels: None };
    let mut cache = bench.cache(&layout, 25);
    k.write_cache(&spec, &kv, &k_rope, &slots, &mut cache);
    let batch = DecodeBatch {
        tables: &bench.indices(1, 5, &pages),
        sequence: &bench.indices(tokens, 1, &vec![0; tokens]),
        length: &bench.indices(tokens, 1, &(1..=tokens as u32).collect::<Vec<_>>()),
        page_tokens,
    };
    let mut cached = bench.unset(tokens, o.cols());
    k.mla_decode(shape, &q, &spec, &cache, &batch, &mut cached).unwrap();
    check_same_bits("cached", &bench.read(&cached), &bench.read(&o));
}

/// Output and log-sum-exp of a prompt of T tokens whose keys come in ranges that end at `cuts`.
fn by_ranges(bench: &Bench<'_>, cuts: &[usize]) -> [Vec<f64>; 2] {
    let shape = &EXPANDED;
    let q = bench.random(1, T, shape.heads * shape.query_width());
    let (kv, k_rope) = (bench.random(2, T, shape.kv_width()), bench.random(3, T, shape.rope_width));
    let length = bench.indices(T, 1, &(1..=T as u32).collect::<Vec<_>>());
    let (mut o, mut lse) =
        (bench.unset(T, shape.heads * shape.value_width), bench.unset(T, shape.heads));
    let mut first = 0;
    for &end in cuts {
        let (kv, k_rope) = (kv.rows_of(first..end), k_rope.rows_of(first..end));
        let store = if first == 0 { Store::Set } else { Store::Add };
        let k = bench.kernels;
        k.mla_prefill(shape, &q, &kv, &k_rope, first, &length, &mut o, &mut lse, store).unwrap();
        first = end;
    }
    [bench.read(&o), bench.read(&lse)]
}

#[test]
fn a_prompt_in_ranges_merged_by_log_sum_exp_equals_the_whole() {
    on_each(|bench| {
        let shape = &EXPANDED;
        let q = bench.random(1, T, shape.heads * shape.query_width());
        let (kv, k_rope) =
            (bench.random(2, T, shape.kv_width()), bench.random(3, T, shape.rope_width));
        let start = bench.indices(T, 1, &[0; T]);
        let (mut o, mut lse) =
            (bench.unset(T, shape.heads * shape.value_width), bench.unset(T, shape.heads));
        bench.kernels.mla_train(shape, &q, &kv, &k_rope, &start, &mut o, &mut lse).unwrap();
        let whole = [bench.read(&o), bench.read(&lse)];
        let one = by_ranges(bench, &[T]);
        check_same_bits("output of one range", &one[0], &whole[0]);
        check_same_bits("log-sum-exp of one range", &one[1], &whole[1]);
        let tolerance = if bench.kernels.name() == "reference" { 1e-13 } else { 1e-6 };
        for cuts in [&[1, T][..], &[32, 64, T], &[7, 8, 33, 69, T]] {
            let parts = by_ranges(bench, cuts);
            check_close(&format!("output, {cuts:?}"), &parts[0], &whole[0], tolerance);
            check_close(&format!("log-sum-exp, {cuts:?}"), &parts[1], &whole[1], tolerance);
        }
    });
}
