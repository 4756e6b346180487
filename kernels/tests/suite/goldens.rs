//! Goldens: numbers worked out by hand from the papers, on the reference and on the CPU.

use crate::bench::{Bench, check_close};
use rehearsal_kernels::{
    AdamW, Arena, AttentionShape, CpuKernels, DType, HeadColumns, Pack, Pairing, Product,
    ReferenceKernels, RopeTable, RouterSpec, SampleRow, Store,
};

/// Runs `test` on both devices with the tolerance of each.
fn on_each(test: impl Fn(&Bench<'_>, f64)) {
    test(&Bench::new(&ReferenceKernels::new(Arena::new(None))), 1e-12);
    test(&Bench::new(&CpuKernels::new(2, Arena::new(None))), 1e-5);
}

/// DeepSeek-V2's rule (a group counts by its maximum) takes {0, 6, 7}; a top-2 sum {2, 3, 7}.
#[test]
fn the_router_keeps_the_groups_with_the_largest_maximum() {
    on_each(|bench, _| {
        let logits = bench.floats(1, 8, &[2.0, 0.5, 1.9, 1.8, 0.0, -1.0, 1.0, 1.95]);
        let spec = RouterSpec { groups: 4, top_groups: 2, top_k: 3, scale: 16.0, normalize: false };
        let (mut scores, mut experts, mut weights) =
            (bench.unset(1, 8), bench.unset_indices(1, 3), bench.unset(1, 3));
        bench.kernels.router(&spec, &logits, &mut scores, &mut experts, &mut weights);
        let golden =
            [0.224672, 0.050131, 0.203292, 0.183946, 0.030406, 0.011186, 0.082652, 0.213715];
        check_close("scores", &bench.read(&scores), &golden, 1e-6);
        assert_eq!(bench.read_indices(&experts), [0.0, 7.0, 6.0]);
        let scaled = [golden[0], golden[7], golden[6]].map(|s| 16.0 * s);
        check_close("weights", &bench.read(&weights), &scaled, 1e-5);
    });
}

#[test]
fn equal_scores_go_to_the_lowest_index_and_underflow_leaves_the_kept_groups() {
    on_each(|bench, _| {
        // Row 0: all equal. Row 1: group 0 holds the one large logit, all else underflows to zero.
        let mut logits = vec![0.0; 8];
        logits.extend([900.0, -900.0, -900.0, -900.0, -901.0, -902.0, -903.0, -904.0]);
        let spec = RouterSpec { groups: 4, top_groups: 1, top_k: 2, scale: 1.0, normalize: true };
        let (mut scores, mut experts, mut weights) =
            (bench.unset(2, 8), bench.unset_indices(2, 2), bench.unset(2, 2));
        let logits = bench.floats(2, 8, &logits);
        bench.kernels.router(&spec, &logits, &mut scores, &mut experts, &mut weights);
        assert_eq!(bench.read_indices(&experts), [0.0, 1.0, 0.0, 1.0]);
        check_close("weights", &bench.read(&weights), &[0.5, 0.5, 1.0, 0.0], 1e-6);
    });
}

#[test]
fn rotation_turns_the_pairs_of_its_table_and_position_zero_stays() {
    on_each(|bench, tolerance| {
        let angles = [0.0f64, 0.0, 0.5, 0.1];
        let (a, b) = (0.5f64, 0.1f64);
        let turn = |pairing, row: [f64; 4]| {
            let table = RopeTable {
                pairing,
                cos: bench.floats(2, 2, &angles.map(f64::cos)),
                sin: bench.floats(2, 2, &angles.map(f64::sin)),
            };
            let mut x =
                bench.floats(2, 5, &[[9.0, 1.0, 2.0, 3.0, 4.0, 9.0].as_slice(), &row].concat());
            bench.kernels.rope(&mut x, &bench.indices(2, 1, &[0, 1]), &table, 1, 1, 0, false);
            bench.read(&x)
        };
        let want = |row: [f64; 4]| [[9.0, 1.0, 2.0, 3.0, 4.0, 9.0].as_slice(), &row].concat();
        let interleaved = want([a.cos(), a.sin(), -2.0 * b.sin(), 2.0 * b.cos()]);
        let got = turn(Pairing::Interleaved, [1.0, 0.0, 0.0, 2.0]);
        check_close("rope, interleaved", &got, &interleaved, tolerance);
        let halves = want([a.cos(), -2.0 * b.sin(), a.sin(), 2.0 * b.cos()]);
        let got = turn(Pairing::Halves, [1.0, 0.0, 0.0, 2.0]);
        check_close("rope, halves", &got, &halves, tolerance);
    });
}

/// q' = W_UKᵀ q, attention over the latent, o = W_UV z: the same as expanding keys and values.
#[test]
fn absorbed_attention_equals_expanded_attention() {
    on_each(|bench, tolerance| {
        let (t, h, latent, nope, rope, value) = (12, 3, 8, 5, 4, 6);
        let (k, kv_b) = (bench.kernels, bench.random(1, h * (nope + value), latent));
        let (c, k_rope) = (bench.random(2, t, latent), bench.random(3, t, rope));
        let (q, start) = (bench.random(4, t, h * (nope + rope)), bench.indices(t, 1, &vec![0; t]));
        let mut kv = bench.unset(t, h * (nope + value));
        k.linear(&c, &bench.pack(Product::Transposed, &kv_b, 1), &mut kv, Store::Set);
        let expanded = AttentionShape {
            heads: h,
            sharing: 1,
            key_width: nope,
            rope_width: rope,
            value_width: value,
            head_stride: nope + value,
            value_offset: nope,
            scale: 0.3,
        };
        let (mut o, mut lse) = (bench.unset(t, h * value), bench.unset(t, h));
        k.mla_train(&expanded, &q, &kv, &k_rope, &start, &mut o, &mut lse).unwrap();

        let blocks = |product, first_row, rows| {
            let pack = Pack { product, groups: h, group_stride: nope + value, first_row, rows };
            bench.packed(&kv_b, pack)
        };
        let wide = latent + rope;
        let mut absorbed_q = bench.unset(t, h * wide);
        for head in 0..h {
            let from = q.cols_of(head * (nope + rope) + nope..(head + 1) * (nope + rope));
            k.copy(&from, &mut absorbed_q.cols_of_mut(head * wide + latent..(head + 1) * wide));
        }
        let columns = |input_stride, output_stride| HeadColumns {
            input_first: 0,
            input_stride,
            output_first: 0,
            output_stride,
        };
        let keys = blocks(Product::Plain, 0, nope);
        k.linear_heads(&q, &keys, columns(nope + rope, wide), &mut absorbed_q, Store::Set);
        let absorbed = AttentionShape {
            sharing: h,
            key_width: latent,
            value_width: latent,
            head_stride: 0,
            value_offset: 0,
            ..expanded
        };
        let (mut z, mut absorbed_o) = (bench.unset(t, h * latent), bench.unset(t, h * value));
        k.mla_train(&absorbed, &absorbed_q, &c, &k_rope, &start, &mut z, &mut lse).unwrap();
        let values = blocks(Product::Transposed, nope, value);
        k.linear_heads(&z, &values, columns(latent, value), &mut absorbed_o, Store::Set);
        check_close("absorbed", &bench.read(&absorbed_o), &bench.read(&o), tolerance);
    });
}

#[test]
fn one_adamw_step_has_its_golden_numbers() {
    on_each(|bench, _| {
        let update = AdamW {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 0.5,
            step: 2,
        };
        let (g, mut w) = (bench.floats(1, 2, &[2.0, -4.0]), bench.floats(1, 2, &[1.0, -1.0]));
        let (mut m, mut v) = (bench.floats(1, 2, &[0.5, 0.0]), bench.floats(1, 2, &[0.25, 0.0]));
        bench.kernels.adamw(&update, &g, &mut w, &mut m, &mut v);
        check_close("m", &bench.read(&m), &[0.55, -0.2], 1e-6);
        check_close("v", &bench.read(&v), &[0.2875, 0.2], 1e-6);
        // m / 0.19 over sqrt(v / 0.0975), times 0.1, and a decay of 0.01.
        let want = [0.99 - 0.168575, -0.99 + 0.073496];
        check_close("w", &bench.read(&w), &want, 2e-6);
    });
}

#[test]
fn sampling_walks_the_ids_of_the_kept_tokens() {
    on_each(|bench, tolerance| {
        // Probabilities 0.1, 0.4, 0.1, 0.4 at temperature 1.
        let logits: Vec<f64> = [0.1f64, 0.4, 0.1, 0.4].map(f64::ln).to_vec();
        let rule =
            |temperature, top_p, top_k, uniform| SampleRow { temperature, top_p, top_k, uniform };
        let (rows, want): (Vec<SampleRow>, Vec<u32>) = [
            (rule(0.0, 1.0, 0, 0.9), 1),
            (rule(1.0, 1.0, 0, 0.05), 0),
            (rule(1.0, 1.0, 0, 0.2), 1),
            (rule(1.0, 1.0, 0, 0.55), 2),
            (rule(1.0, 1.0, 0, 0.99), 3),
            (rule(1.0, 1.0, 1, 0.99), 1),
            (rule(1.0, 0.7, 0, 0.01), 1),
            (rule(1.0, 0.7, 0, 0.51), 3),
            (rule(1.0, 0.85, 0, 0.01), 0),
            (rule(1.0, 0.85, 3, 0.01), 1),
            (rule(1.0, 0.85, 2, 0.01), 1),
        ]
        .into_iter()
        .unzip();
        let logits = bench.floats(rows.len(), 4, &logits.repeat(rows.len()));
        let sampled = bench.kernels.sample(&logits, &rows);
        assert_eq!(sampled.iter().map(|s| s.token).collect::<Vec<_>>(), want);
        let logprobs: Vec<f64> = sampled.iter().map(|s| s.logprob).collect();
        let of = |token: &u32| [0.1f64, 0.4, 0.1, 0.4][*token as usize].ln();
        check_close("logprobs", &logprobs, &want.iter().map(of).collect::<Vec<_>>(), tolerance);
    });
}

/// y = w * (x / rms), deepseek_v2.md 1.1: against plain f64 loops at the published widths, and rounded to the
/// device's float between the two products.
#[test]
fn a_row_is_divided_by_its_root_mean_square_before_the_weight() {
    on_each(|bench, tolerance| {
        for cols in [512, 1536, 2048, 5120] {
            let (x, w) = (bench.random(1, 3, cols), bench.random(2, 1, cols));
            let (mut y, mut inverse) = (bench.unset(3, cols), bench.unset(3, 1));
            bench.kernels.rms_norm(&x, &w, 1e-6, &mut y, &mut inverse);
            let (x, w, y) = (bench.read(&x), bench.read(&w), bench.read(&y));
            let inverse = bench.read(&inverse);
            for (row, x) in x.chunks(cols).enumerate() {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                let rms = (mean + 1e-6).sqrt();
                for (i, (x, w)) in x.iter().zip(&w).enumerate() {
                    let (got, want) = (y[row * cols + i], w * (x / rms));
                    let error = (got - want).abs() / (1e-3 + want.abs());
                    assert!(error < tolerance.min(1e-6), "{cols}, {row}, {i}: {got} {want}");
                    if bench.kernels.float() == DType::F32 {
                        let scaled = *x as f32 * inverse[row] as f32;
                        assert_eq!(got, f64::from(*w as f32 * scaled), "{cols}, {row}, {i}");
                    }
                }
            }
        }
    });
}
