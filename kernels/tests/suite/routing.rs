//! Properties of routing over a hundred thousand tokens of DeepSeek-V2's shape: what is chosen, and what full devices drop.

use crate::bench::{Bench, below, check_close, check_same_bits, normals};
use rehearsal_kernels::{
    Arena, Buffer, CpuKernels, DROPPED, DropCounts, DropSpec, Product, RouterSpec, Routes,
};

const TOKENS: usize = 100_000;
const CHUNK: usize = 10_000;
const E: usize = 160;
const K: usize = 6;
const D: usize = 8;
const M: usize = 3;
const V2: RouterSpec =
    RouterSpec { groups: D, top_groups: M, top_k: K, scale: 16.0, normalize: false };

/// Logits of four kinds in turn: usual ones; few values, so that many are equal; values so far apart that most scores
/// underflow to zero; and both.
fn logits(bench: &Bench<'_>, chunk: usize) -> Buffer {
    let mut values = normals(chunk as u64, CHUNK * E);
    for (row, values) in values.chunks_mut(E).enumerate() {
        let (stretch, few) = (if row % 4 < 2 { 1.0 } else { 60.0 }, row % 2 == 1);
        values.iter_mut().for_each(|x| *x = stretch * if few { x.round() } else { *x });
    }
    bench.floats(CHUNK, E, &values)
}

/// Scores, experts and weights.
fn route(bench: &Bench<'_>, spec: &RouterSpec, logits: &Buffer) -> [Vec<f64>; 3] {
    let (mut scores, mut experts, mut weights) =
        (bench.unset(CHUNK, E), bench.unset_indices(CHUNK, K), bench.unset(CHUNK, K));
    bench.kernels.router(spec, logits, &mut scores, &mut experts, &mut weights);
    [bench.read(&scores), bench.read_indices(&experts), bench.read(&weights)]
}

/// The first `count` of `items` by falling value; equal ones keep their order.
fn best(mut items: Vec<usize>, count: usize, value: impl Fn(usize) -> f64) -> Vec<usize> {
    items.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
    items.truncate(count);
    items
}

/// The groups that `worth` ranks first, then the experts in them.
fn naive(scores: &[f64], worth: impl Fn(&[f64]) -> f64, spec: &RouterSpec) -> Vec<usize> {
    let width = scores.len() / spec.groups;
    let group = |g: usize| &scores[g * width..][..width];
    let kept = best((0..spec.groups).collect(), spec.top_groups, |g| worth(group(g)));
    let open = (0..scores.len()).filter(|e| kept.contains(&(e / width))).collect();
    best(open, spec.top_k, |e| scores[e])
}

fn largest(group: &[f64]) -> f64 {
    group.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

#[test]
fn a_hundred_thousand_tokens_go_to_the_best_experts_of_at_most_m_devices() {
    let (one, three) = (CpuKernels::new(1, Arena::new(None)), CpuKernels::new(3, Arena::new(None)));
    let (one, three) = (Bench::new(&one), Bench::new(&three));
    let (mut underflown, mut tied) = (0, 0);
    for chunk in 0..TOKENS / CHUNK {
        let logits = logits(&one, chunk);
        let found = route(&one, &V2, &logits);
        for (found, on_three) in found.iter().zip(&route(&three, &V2, &logits)) {
            check_same_bits("three threads", on_three, found);
        }
        let [scores, experts, weights] = &found;
        for row in 0..CHUNK {
            let (scores, label) = (&scores[row * E..][..E], format!("row {row} of chunk {chunk}"));
            let chosen: Vec<usize> = experts[row * K..][..K].iter().map(|e| *e as usize).collect();
            // An expert outside the kept groups would be in no list of `naive`, whatever its score.
            assert_eq!(chosen, naive(scores, largest, &V2), "{label}");
            let mut devices: Vec<usize> = chosen.iter().map(|e| e / (E / D)).collect();
            devices.sort_unstable();
            devices.dedup();
            assert!(devices.len() <= M, "{label}: devices {devices:?}");
            assert!((scores.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{label}: sum of scores");
            for (weight, expert) in weights[row * K..][..K].iter().zip(&chosen) {
                assert_eq!(*weight, 16.0 * scores[*expert], "{label}: weight");
            }
            underflown += usize::from(chosen.iter().any(|e| scores[*e] == 0.0));
            tied += usize::from(chosen.windows(2).any(|pair| scores[pair[0]] == scores[pair[1]]));
        }
    }
    assert!(underflown > 1000 && tied > 10_000, "the tokens are hard: {underflown}, {tied}");
}

#[test]
fn as_many_devices_as_there_are_is_plain_top_k() {
    let kernels = CpuKernels::new(2, Arena::new(None));
    let bench = Bench::new(&kernels);
    let all = RouterSpec { top_groups: D, ..V2 };
    let plain = RouterSpec { groups: 1, top_groups: 1, ..V2 };
    for chunk in 0..TOKENS / CHUNK {
        let logits = logits(&bench, chunk);
        for (limited, plain) in
            route(&bench, &all, &logits).iter().zip(&route(&bench, &plain, &logits))
        {
            check_same_bits("M = D", limited, plain);
        }
    }
}

/// The golden logits tell the rules apart: V2's maximum, V3's sum of the best two, and no groups at all.
#[test]
fn a_group_counts_by_its_maximum_and_not_by_the_sum_of_its_best_two() {
    let golden: [f64; 8] = [2.0, 0.5, 1.9, 1.8, 0.0, -1.0, 1.0, 1.95];
    let sum: f64 = golden.iter().map(|l| l.exp()).sum();
    let scores = golden.map(|l| l.exp() / sum);
    let spec = RouterSpec { groups: 4, top_groups: 2, top_k: 3, ..V2 };
    let sorted = |mut experts: Vec<usize>| {
        experts.sort_unstable();
        experts
    };
    let top_two = |group: &[f64]| group.iter().sum::<f64>();
    assert_eq!(sorted(naive(&scores, largest, &spec)), [0, 6, 7]);
    assert_eq!(sorted(naive(&scores, top_two, &spec)), [2, 3, 7]);
    assert_eq!(sorted(naive(&scores, largest, &RouterSpec { top_groups: 4, ..spec })), [0, 2, 7]);
    let kernels = CpuKernels::new(1, Arena::new(None));
    let bench = Bench::new(&kernels);
    let (mut s, mut experts, mut weights) =
        (bench.unset(1, 8), bench.unset_indices(1, 3), bench.unset(1, 3));
    bench.kernels.router(&spec, &bench.floats(1, 8, &golden), &mut s, &mut experts, &mut weights);
    assert_eq!(bench.read_indices(&experts), [0.0, 7.0, 6.0]);
}

/// Sequences of 1 to 700 tokens, up to a chunk.
fn lengths(chunk: usize) -> Vec<usize> {
    let (mut lengths, mut left) = (Vec::new(), CHUNK);
    for drawn in below(900 + chunk as u64, CHUNK, 700) {
        let length = (drawn as usize + 1).min(left);
        lengths.push(length);
        left -= length;
        if left == 0 {
            break;
        }
    }
    lengths
}

/// What is kept of a hundred thousand tokens, with every fourth sequence protected.
#[test]
fn a_full_device_drops_exactly_the_lowest_affinities_and_nothing_that_is_protected() {
    let kernels = CpuKernels::new(2, Arena::new(None));
    let bench = Bench::new(&kernels);
    let (mut dropped, mut overflow) = (0, 0);
    for chunk in 0..TOKENS / CHUNK {
        let logits = logits(&bench, chunk);
        let (mut scores, mut experts, mut weights) =
            (bench.unset(CHUNK, E), bench.unset_indices(CHUNK, K), bench.unset(CHUNK, K));
        bench.kernels.router(&V2, &logits, &mut scores, &mut experts, &mut weights);
        let lengths = lengths(chunk);
        let number = |(i, length): (usize, &usize)| vec![i as u32; *length];
        let segment: Vec<u32> = lengths.iter().enumerate().flat_map(number).collect();
        let protected: Vec<u32> = (0..lengths.len()).map(|i| u32::from(i % 4 == 1)).collect();
        let (segment, flags) =
            (bench.indices(CHUNK, 1, &segment), bench.indices(lengths.len(), 1, &protected));
        let spec = DropSpec { groups: D, capacity_factor: 1.0 };
        let mut kept = bench.unset_indices(CHUNK, K);
        let counts =
            bench.kernels.drop_overflow(&spec, &scores, &experts, &segment, &flags, &mut kept);
        let (scores, experts) = (bench.read(&scores), bench.read_indices(&experts));
        let kept = bench.read_indices(&kept);
        let (mut first, mut found) = (0, DropCounts::default());
        for (i, length) in lengths.iter().enumerate() {
            let pairs = first * K..(first + length) * K;
            check_sequence(&scores, &experts, &kept, pairs, protected[i] == 1, &mut found);
            first += length;
        }
        assert_eq!(counts, found, "chunk {chunk}");
        dropped += counts.dropped;
        overflow += counts.overflow;
    }
    assert!(dropped > 10_000 && overflow > 1000, "{dropped} dropped, {overflow} protected");
}

/// One sequence's pairs, device by device.
fn check_sequence(
    scores: &[f64],
    experts: &[f64],
    kept: &[f64],
    pairs: std::ops::Range<usize>,
    protected: bool,
    counts: &mut DropCounts,
) {
    let budget = (K * pairs.len() / K).div_ceil(D);
    let score = |pair: usize| scores[pair / K * E + experts[pair] as usize];
    for device in 0..D {
        let own: Vec<usize> =
            pairs.clone().filter(|p| experts[*p] as usize / (E / D) == device).collect();
        let beyond = own.len().saturating_sub(budget);
        let gone: Vec<usize> =
            own.iter().copied().filter(|p| kept[*p] == f64::from(DROPPED)).collect();
        if protected {
            counts.overflow += beyond as u64;
            assert!(gone.is_empty(), "a protected pair was dropped");
            continue;
        }
        counts.dropped += beyond as u64;
        assert_eq!(own.len() - gone.len(), own.len().min(budget), "pairs that are left");
        let mut wanted = best(own.clone(), own.len(), score).split_off(own.len() - beyond);
        wanted.sort_unstable();
        assert_eq!(gone, wanted, "device {device}: what was dropped");
        for pair in own.iter().filter(|pair| !gone.contains(pair)) {
            assert_eq!(kept[*pair], experts[*pair], "what stays is what was chosen");
        }
    }
}

/// The products of the slots of `routes`, combined: an expert layer without its gate.
fn experts_of(bench: &Bench<'_>, routes: &Routes, weights: &Buffer, u: &Buffer, y: &mut Buffer) {
    let (kernels, width, m) = (bench.kernels, u.cols(), 10);
    let up = bench.pack(Product::Transposed, &bench.random(21, 16 * 2 * m, width), 16);
    let down = bench.pack(Product::Transposed, &bench.random(22, 16 * width, m), 16);
    let slots = routes.slots();
    let (mut x, mut hidden) = (bench.unset(slots, width), bench.unset(slots, 2 * m));
    kernels.gather_rows(u, &routes.token, &mut x);
    kernels.linear_experts(&x, &up, routes, &mut hidden);
    let (mut activated, mut output) = (bench.unset(slots, m), bench.unset(slots, width));
    kernels.swiglu(&hidden, &mut activated);
    kernels.linear_experts(&activated, &down, routes, &mut output);
    kernels.combine(&output, routes, weights, y);
}

/// Each of four devices works on its own pairs alone; the sum of what they send back is what one worker computes.
#[test]
fn the_sum_over_devices_equals_one_worker() {
    let kernels = CpuKernels::new(2, Arena::new(None));
    let bench = Bench::new(&kernels);
    let (tokens, width, devices) = (200, 24, 4);
    let spec =
        RouterSpec { groups: devices, top_groups: 3, top_k: 4, scale: 1.5, normalize: false };
    let (mut scores, mut experts, mut weights) =
        (bench.unset(tokens, 16), bench.unset_indices(tokens, 4), bench.unset(tokens, 4));
    let logits = bench.random(20, tokens, 16);
    bench.kernels.router(&spec, &logits, &mut scores, &mut experts, &mut weights);
    let u = bench.random(23, tokens, width);
    let (mut whole, mut summed) =
        (bench.filled(tokens, width, 0.0), bench.filled(tokens, width, 0.0));
    experts_of(&bench, &bench.kernels.routes(&experts, 16).unwrap(), &weights, &u, &mut whole);
    let chosen = bench.kernels.download_indices(&experts);
    for device in 0..devices as u32 {
        let own = chosen.iter().map(|e| if e / 4 == device { *e } else { DROPPED });
        let own = bench.indices(tokens, 4, &own.collect::<Vec<u32>>());
        let mut part = bench.filled(tokens, width, 0.0);
        experts_of(&bench, &bench.kernels.routes(&own, 16).unwrap(), &weights, &u, &mut part);
        bench.kernels.add(&part, &mut summed);
    }
    check_close("sum over devices", &bench.read(&summed), &bench.read(&whole), 1e-5);
}

#[test]
fn a_device_without_a_token_computes_nothing() {
    let kernels = CpuKernels::new(1, Arena::new(None));
    let bench = Bench::new(&kernels);
    let routes = bench.kernels.routes(&bench.indices(3, 2, &[DROPPED; 6]), 16).unwrap();
    assert_eq!(routes.slots(), 0);
    let (u, weights) = (bench.random(1, 3, 24), bench.random(2, 3, 2));
    let mut y = bench.filled(3, 24, 0.5);
    experts_of(&bench, &routes, &weights, &u, &mut y);
    assert_eq!(bench.read(&y), vec![0.5; 72]);
}
