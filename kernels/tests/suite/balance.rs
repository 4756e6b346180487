//! Balance losses: goldens worked out by hand from DeepSeek-V2, eq. 23-31, on the reference and on the CPU.

use crate::bench::{Bench, check_close};
use rehearsal_kernels::{Arena, BalanceSpec, CpuKernels, ReferenceKernels};

/// The paper's weights.
const ALPHAS: [f64; 3] = [0.003, 0.05, 0.02];

/// Runs `test` on both devices with the tolerance of each.
fn on_each(test: impl Fn(&Bench<'_>, f64)) {
    test(&Bench::new(&ReferenceKernels::new(Arena::new(None))), 1e-12);
    test(&Bench::new(&CpuKernels::new(2, Arena::new(None))), 1e-6);
}

/// Experts, devices and choices of a token, and M.
#[derive(Clone, Copy)]
struct Shape {
    experts: usize,
    groups: usize,
    top_groups: usize,
    top_k: usize,
}

/// Eight experts on four devices, of which a token may use two.
const SMALL: Shape = Shape { experts: 8, groups: 4, top_groups: 2, top_k: 2 };
/// DeepSeek-V2.
const V2: Shape = Shape { experts: 160, groups: 8, top_groups: 3, top_k: 6 };

/// Each sequence's loss, and the gradient of the mean over two sequences by the scores.
fn run(
    bench: &Bench<'_>,
    shape: Shape,
    [expert, device, communication]: [f64; 3],
    scores: &[f64],
    chosen: &[u32],
    segment: &[u32],
) -> (Vec<f64>, Vec<f64>) {
    let Shape { groups, top_groups, .. } = shape;
    let spec = BalanceSpec { groups, top_groups, expert, device, communication, sequences: 2 };
    let rows = segment.len();
    let (scores, chosen) =
        (bench.floats(rows, shape.experts, scores), bench.indices(rows, shape.top_k, chosen));
    let segment = bench.indices(rows, 1, segment);
    let mut d_scores = bench.filled(rows, shape.experts, 0.0);
    let losses = bench.kernels.balance_loss(&spec, &scores, &chosen, &segment, &mut d_scores);
    (losses, bench.read(&d_scores))
}

/// The three losses apart.
fn each(
    bench: &Bench<'_>,
    shape: Shape,
    scores: &[f64],
    chosen: &[u32],
    segment: &[u32],
) -> [Vec<f64>; 3] {
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        .map(|only| run(bench, shape, only, scores, chosen, segment).0)
}

#[test]
fn perfect_balance_costs_alpha_1_alpha_2_and_alpha_3() {
    on_each(|bench, tolerance| {
        // Every expert twice, every token on two devices.
        let chosen = [0, 2, 4, 6, 1, 3, 5, 7, 0, 4, 2, 6, 1, 5, 3, 7];
        let uniform = vec![1.0 / 8.0; 8 * 8];
        for weight in 0..3 {
            let mut only = [0.0; 3];
            only[weight] = ALPHAS[weight];
            let (losses, _) = run(bench, SMALL, only, &uniform, &chosen, &[0; 8]);
            check_close("loss", &losses, &[ALPHAS[weight]], tolerance);
        }
        let (losses, _) = run(bench, SMALL, ALPHAS, &uniform, &chosen, &[0; 8]);
        check_close("sum", &losses, &[0.003 + 0.05 + 0.02], tolerance);
        // Tokens that stay on one device each: half of what may be sent is sent.
        let home = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7];
        let [_, _, communication] = each(bench, SMALL, &uniform, &home, &[0; 8]);
        check_close("one device of two", &communication, &[0.5], tolerance);
    });
}

#[test]
fn a_collapse_to_k_experts_gives_f_n_over_k_on_these() {
    on_each(|bench, tolerance| {
        // V2 with all tokens on experts 0 to 5, which lie on device 0 alone.
        let (tokens, chosen) = (10, (0..6).collect::<Vec<u32>>().repeat(10));
        let scores = vec![1.0 / 160.0; tokens * 160];
        let by_score = |weights| {
            let (_, d_scores) = run(bench, V2, weights, &scores, &chosen, &vec![0; tokens]);
            // d / d s = f / (T * sequences).
            d_scores[..160].iter().map(|d| d * tokens as f64 * 2.0).collect::<Vec<f64>>()
        };
        let on = |value: f64, count: usize| [vec![value; count], vec![0.0; 160 - count]].concat();
        // f = N_r / K_r = 26.667, f' = D = 8 and f'' = D / M = 2.667 on the whole device.
        check_close("f", &by_score([1.0, 0.0, 0.0]), &on(160.0 / 6.0, 6), 10.0 * tolerance);
        check_close("f'", &by_score([0.0, 1.0, 0.0]), &on(8.0, 20), 10.0 * tolerance);
        check_close("f''", &by_score([0.0, 0.0, 1.0]), &on(8.0 / 3.0, 20), 10.0 * tolerance);
        // With all affinity there too: 6 * 26.667 / 6, 8 and 2.667.
        let there = [vec![1.0 / 6.0; 6], vec![0.0; 154]].concat().repeat(tokens);
        let losses = each(bench, V2, &there, &chosen, &vec![0; tokens]).concat();
        check_close("losses", &losses, &[160.0 / 6.0, 8.0, 8.0 / 3.0], 10.0 * tolerance);
    });
}

#[test]
fn a_token_with_two_experts_on_a_device_counts_there_once() {
    on_each(|bench, tolerance| {
        // Token 0 uses two experts of device 0, token 1 one of device 0 and one of device 1.
        let chosen = [0, 1, 0, 2];
        let scores = [0.5, 0.1, 0.2, 0.0, 0.1, 0.1, 0.0, 0.0].repeat(2);
        let [_, device, communication] = each(bench, SMALL, &scores, &chosen, &[0, 0]);
        // f'' = D / (M T) * visits = 1 * [2, 1, 0, 0]; by hits it would be [3, 1, 0, 0].
        check_close("communication", &communication, &[2.0 * 0.6 + 0.2], tolerance);
        // f' = mean of f = N_r / (K_r T) * hits / 2 = [3, 1, 0, 0].
        check_close("device", &device, &[3.0 * 0.6 + 0.2], tolerance);
    });
}

#[test]
fn every_loss_is_of_a_sequence_and_not_of_the_pooled_batch() {
    on_each(|bench, tolerance| {
        // Sequence 0 uses devices 0 and 1 alone, sequence 1 devices 2 and 3: pooled all would be even.
        let chosen = [0, 2, 1, 3, 4, 6, 5, 7];
        let first = [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0];
        let second = [0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25];
        let scores = [first, first, second, second].concat();
        let by_sequence = each(bench, SMALL, &scores, &chosen, &[0, 0, 1, 1]);
        let pooled = each(bench, SMALL, &scores, &chosen, &[0; 4]);
        for (losses, pooled) in by_sequence.iter().zip(&pooled) {
            check_close("by sequence", losses, &[2.0, 2.0], tolerance);
            check_close("pooled", pooled, &[1.0], tolerance);
        }
    });
}

#[test]
fn sequences_of_unlike_lengths_weigh_the_same() {
    on_each(|bench, tolerance| {
        // Three tokens and one: each gives half of the mean, a token of the first a sixth.
        let (chosen, scores) = ([0, 1].repeat(4), vec![0.125; 4 * 8]);
        let (losses, d_scores) =
            run(bench, SMALL, [1.0, 0.0, 0.0], &scores, &chosen, &[0, 0, 0, 1]);
        check_close("losses", &losses, &[1.0, 1.0], tolerance);
        // f = N_r / K_r = 4 on experts 0 and 1.
        let row = |share: f64| [vec![4.0 * share; 2], vec![0.0; 6]].concat();
        let wanted = [row(1.0 / 6.0), row(1.0 / 6.0), row(1.0 / 6.0), row(0.5)].concat();
        check_close("d_scores", &d_scores, &wanted, tolerance);
    });
}
