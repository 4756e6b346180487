//! Gradients of the router, the balance loss and the combination of experts.

use super::on_reference;
use crate::bench::{Bench, check_gradients, inner, normals};
use rehearsal_kernels::{BalanceSpec, Buffer, DROPPED, RouterSpec};

const T: usize = 6;
const E: usize = 8;
const K: usize = 3;

fn route(bench: &Bench<'_>, spec: &RouterSpec, logits: &[f64]) -> (Buffer, Buffer, Buffer) {
    let logits = bench.floats(T, E, logits);
    let (mut scores, mut experts, mut weights) =
        (bench.unset(T, E), bench.unset_indices(T, K), bench.unset(T, K));
    bench.kernels.router(spec, &logits, &mut scores, &mut experts, &mut weights);
    (scores, experts, weights)
}

#[test]
fn router_backward_is_the_derivative_by_the_logits() {
    on_reference(|bench| {
        for normalize in [false, true] {
            let spec = RouterSpec { groups: 4, top_groups: 2, top_k: K, scale: 16.0, normalize };
            let (inputs, r, q) = ([normals(1, T * E)], normals(2, T * K), normals(3, T * E));
            let (scores, experts, _) = route(bench, &spec, &inputs[0]);
            let (d_weights, d_scores) = (bench.floats(T, K, &r), bench.floats(T, E, &q));
            let mut d_logits = bench.unset(T, E);
            let k = bench.kernels;
            k.router_backward(&spec, &scores, &experts, &d_weights, &d_scores, &mut d_logits);
            check_gradients("router", &inputs, &[bench.read(&d_logits)], |inputs| {
                let (scores, _, weights) = route(bench, &spec, &inputs[0]);
                inner(&r, &bench.read(&weights)) + inner(&q, &bench.read(&scores))
            });
        }
    });
}

#[test]
fn balance_loss_hands_its_derivative_by_the_scores_to_what_is_there() {
    on_reference(|bench| {
        let experts = [0, 1, 5, 0, 2, 7, 0, 1, 3, 4, 1, 0, 6, 0, 1, 2, 3, 0];
        let (experts, segment) =
            (bench.indices(T, K, &experts), bench.indices(T, 1, &[0, 0, 0, 0, 1, 1]));
        let (inputs, there) = ([normals(1, T * E)], normals(2, T * E));
        // Three sequences in the step, of which these are two.
        let spec = BalanceSpec {
            groups: 4,
            top_groups: 3,
            expert: 0.7,
            device: 0.4,
            communication: 0.9,
            sequences: 3,
        };
        let loss_of = |scores: &[f64], d_scores: &mut Buffer| {
            let scores = bench.floats(T, E, scores);
            bench.kernels.balance_loss(&spec, &scores, &experts, &segment, d_scores)
        };
        let mut d_scores = bench.floats(T, E, &there);
        loss_of(&inputs[0], &mut d_scores);
        check_gradients("balance_loss", &inputs, &[bench.read(&d_scores)], |inputs| {
            let losses = loss_of(&inputs[0], &mut bench.filled(T, E, 0.0));
            losses.iter().sum::<f64>() / 3.0 + inner(&there, &inputs[0])
        });
    });
}

/// Two choices of four experts a token; three pairs were dropped, both of token 4.
const CHOSEN: [u32; 2 * T] = [0, 3, 1, 0, DROPPED, 1, 0, 1, DROPPED, DROPPED, 1, 3];
const SLOTS: usize = 2 * T - 3;

#[test]
fn combine_backward_is_the_derivative_by_slots_and_weights() {
    on_reference(|bench| {
        let (k, d) = (2, 5);
        let routes = bench.kernels.routes(&bench.indices(T, k, &CHOSEN), 4).unwrap();
        let (inputs, r) = ([normals(1, SLOTS * d), normals(2, T * k)], normals(3, T * d));
        let (x, weights) = (bench.floats(SLOTS, d, &inputs[0]), bench.floats(T, k, &inputs[1]));
        let (dy, mut dx, mut d_weights) =
            (bench.floats(T, d, &r), bench.unset(SLOTS, d), bench.unset(T, k));
        bench.kernels.combine_backward(&dy, &x, &routes, &weights, &mut dx, &mut d_weights);
        let gradients = [bench.read(&dx), bench.read(&d_weights)];
        check_gradients("combine", &inputs, &gradients, |inputs| {
            let (x, weights) = (bench.floats(SLOTS, d, &inputs[0]), bench.floats(T, k, &inputs[1]));
            let mut y = bench.filled(T, d, 0.25);
            bench.kernels.combine(&x, &routes, &weights, &mut y);
            inner(&r, &bench.read(&y))
        });
    });
}

#[test]
fn sum_slots_is_the_derivative_of_the_gather_into_slots() {
    on_reference(|bench| {
        let (k, d) = (2, 5);
        let routes = bench.kernels.routes(&bench.indices(T, k, &CHOSEN), 4).unwrap();
        let (inputs, r) = ([normals(1, T * d)], normals(2, SLOTS * d));
        let mut dx = bench.filled(T, d, 0.0);
        bench.kernels.sum_slots(&bench.floats(SLOTS, d, &r), &routes, &mut dx);
        check_gradients("gather into slots", &inputs, &[bench.read(&dx)], |inputs| {
            let mut slots = bench.unset(SLOTS, d);
            bench.kernels.gather_rows(&bench.floats(T, d, &inputs[0]), &routes.token, &mut slots);
            inner(&r, &bench.read(&slots))
        });
    });
}
