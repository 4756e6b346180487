//! Router, balance loss, routes and combination. Tolerance: softmax of 24 numbers in f32.

use super::Entry;
use crate::bench::{Bench, Output, below};
use rehearsal_kernels::{BalanceSpec, DROPPED, DropSpec, RouterSpec};

pub const PROBLEMS: &[Entry] = &[
    ("router", 1e-5, |bench| router(bench, GREEDY)),
    ("router in groups", 1e-5, |bench| router(bench, GROUPED)),
    ("balance_loss", 1e-6, balance_loss),
    ("count_routes", 0.0, count_routes),
    ("drop_overflow", 0.0, drop_overflow),
    ("routes", 0.0, routes),
    ("combine", 1e-5, combine),
];

const T: usize = 133;
const E: usize = 24;
const K: usize = 4;
const GREEDY: RouterSpec =
    RouterSpec { groups: 1, top_groups: 1, top_k: K, scale: 2.5, normalize: false };
const GROUPED: RouterSpec =
    RouterSpec { groups: 6, top_groups: 2, top_k: K, scale: 2.5, normalize: true };

fn router(bench: &Bench<'_>, spec: RouterSpec) -> Vec<Output> {
    let logits = bench.random(1, T, E);
    let (mut scores, mut experts, mut weights) =
        (bench.unset(T, E), bench.unset_indices(T, K), bench.unset(T, K));
    bench.kernels.router(&spec, &logits, &mut scores, &mut experts, &mut weights);
    let (d_weights, d_scores) = (bench.random(2, T, K), bench.random(3, T, E));
    let (k, mut d_logits) = (bench.kernels, bench.unset(T, E));
    k.router_backward(&spec, &scores, &experts, &d_weights, &d_scores, &mut d_logits);
    vec![
        ("scores", bench.read(&scores)),
        ("experts", bench.read_indices(&experts)),
        ("weights", bench.read(&weights)),
        ("d_logits", bench.read(&d_logits)),
    ]
}

/// K distinct experts for each token; those of every other token are neighbours and share devices.
fn chosen() -> Vec<u32> {
    let apart = |t: usize| if t.is_multiple_of(2) { 5 } else { 1 };
    let first = below(7, T, E as u64).into_iter().enumerate();
    first.flat_map(|(t, e)| (0..K).map(move |k| (e + (apart(t) * k) as u32) % E as u32)).collect()
}

fn balance_loss(bench: &Bench<'_>) -> Vec<Output> {
    let (scores, experts) = (bench.random(1, T, E), bench.indices(T, K, &chosen()));
    let (segment, mut d_scores) = (bench.indices(T, 1, &segment()), bench.random(2, T, E));
    let spec = BalanceSpec {
        groups: 6,
        top_groups: 4,
        expert: 0.3,
        device: 0.2,
        communication: 0.7,
        sequences: 6,
    };
    let losses = bench.kernels.balance_loss(&spec, &scores, &experts, &segment, &mut d_scores);
    vec![("losses", losses), ("d_scores", bench.read(&d_scores))]
}

/// Three sequences, the second of one token.
fn segment() -> Vec<u32> {
    (0..T).map(|t| u32::from(t >= 50) + u32::from(t >= 51)).collect()
}

fn count_routes(bench: &Bench<'_>) -> Vec<Output> {
    let counts = bench.kernels.count_routes(&bench.indices(T, K, &chosen()), E, 6);
    let experts = counts.experts.into_iter().map(f64::from).collect();
    vec![("experts", experts), ("devices", vec![counts.devices as f64])]
}

fn drop_overflow(bench: &Bench<'_>) -> Vec<Output> {
    let mut outputs = Vec::new();
    for (factor, protected) in [(1.0, [0, 0, 0]), (0.4, [0, 1, 0]), (0.7, [0, 0, 1])] {
        let spec = DropSpec { groups: 6, capacity_factor: factor };
        let (scores, experts) = (bench.random(1, T, E), bench.indices(T, K, &chosen()));
        let (segment, protected) =
            (bench.indices(T, 1, &segment()), bench.indices(3, 1, &protected));
        let mut kept = bench.unset_indices(T, K);
        let k = bench.kernels;
        let counts = k.drop_overflow(&spec, &scores, &experts, &segment, &protected, &mut kept);
        outputs.push(("kept", bench.read_indices(&kept)));
        outputs.push(("counts", vec![counts.dropped as f64, counts.overflow as f64]));
    }
    outputs
}

/// `chosen`, but every fifth pair was dropped.
fn kept() -> Vec<u32> {
    let mut kept = chosen();
    kept.iter_mut().step_by(5).for_each(|expert| *expert = DROPPED);
    kept
}

fn routes(bench: &Bench<'_>) -> Vec<Output> {
    let routes = bench.kernels.routes(&bench.indices(T, K, &kept()), E + 2).unwrap();
    vec![
        ("offsets", bench.read_indices(&routes.offsets)),
        ("token", bench.read_indices(&routes.token)),
        ("slot", bench.read_indices(&routes.slot)),
    ]
}

fn combine(bench: &Bench<'_>) -> Vec<Output> {
    let d = 45;
    let routes = bench.kernels.routes(&bench.indices(T, K, &kept()), E).unwrap();
    let slots = routes.slots();
    let (x, weights) = (bench.random(1, slots, d), bench.random(2, T, K));
    let (dy, mut y, mut summed) =
        (bench.random(3, T, d), bench.random(4, T, d), bench.random(5, T, d));
    let (mut dx, mut d_weights) = (bench.unset(slots, d), bench.unset(T, K));
    bench.kernels.combine(&x, &routes, &weights, &mut y);
    bench.kernels.combine_backward(&dy, &x, &routes, &weights, &mut dx, &mut d_weights);
    bench.kernels.sum_slots(&x, &routes, &mut summed);
    vec![
        ("y", bench.read(&y)),
        ("dx", bench.read(&dx)),
        ("d_weights", bench.read(&d_weights)),
        ("summed", bench.read(&summed)),
    ]
}
