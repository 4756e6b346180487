//! Bytes that ranks send each other in a step of training.

use super::batch::Batch;
use super::bytes::Held;
use super::load::Load;
use crate::cluster::mesh::Mesh;
use serde::Serialize;

/// Bytes of a step, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Traffic {
    /// Tokens to their experts and back, in forward and backward passes, where a token goes once to each rank that has some of
    /// its experts (the paper's M): at most; own ranks are left out. Seconds are predicted with these.
    pub all_to_all: f64,
    /// The same where a row goes to each expert, as this program sends them: what even routing makes.
    pub all_to_all_by_expert: f64,
    /// The same of a token, in all layers.
    pub all_to_all_per_token: f64,
    /// Activations and their gradients between stages.
    pub stages: f64,
    /// Gradients to who sums them (reduce-scatter over the data ranks that hold the same).
    pub gradients: f64,
    /// Weights from who updated them (all-gather).
    pub weights: f64,
}

impl Traffic {
    /// Of a step. `held` is of each stage, `chunks` the pieces that a stage has.
    pub fn new(load: &Load, mesh: &Mesh, held: &[Held], batch: &Batch, chunks: usize) -> Traffic {
        let layers = (0..load.model.num_hidden_layers).filter(|layer| load.model.is_moe(*layer));
        let moe_layers = layers.count() as f64;
        let all_to_all_per_token = 4.0 * moe_layers * load.exchange_bytes();
        // The V turns back on its last stage.
        let hops = mesh.pipeline() - 1;
        let boundary = load.model.hidden_size as f64 * load.number_bytes();
        let gradient = load.hardware.map_or(4, |hardware| hardware.gradient_dtype.bytes()) as f64;
        let summed: f64 = held.iter().map(|held| sums(mesh, held) * mesh.data() as f64).sum();
        Traffic {
            all_to_all: all_to_all_per_token * batch.step_tokens,
            all_to_all_by_expert: 4.0 * moe_layers * load.expert_bytes() * batch.step_tokens,
            all_to_all_per_token,
            stages: 2.0 * (hops * chunks) as f64 * boundary * batch.step_tokens,
            gradients: summed * gradient,
            weights: summed * load.number_bytes(),
        }
    }
}

/// Elements that a rank sends to those that hold the same: all but its own share.
fn sums(mesh: &Mesh, held: &Held) -> f64 {
    let others = |replicas: usize| (replicas - 1) as f64 / replicas as f64;
    let shared = (held.weights - held.experts) as f64;
    let experts = held.experts as f64;
    shared * others(mesh.data()) + experts * others(mesh.data() / mesh.expert())
}

/// Elements that a rank sends to other ranks of its stage, and those to ranks that hold the same experts.
pub fn summed(mesh: &Mesh, held: &Held) -> [f64; 2] {
    let experts = Held { weights: held.experts, ..*held };
    let shared = Held { experts: 0, weights: held.weights - held.experts, ..*held };
    [sums(mesh, &shared), sums(mesh, &experts)]
}
