//! The switch from the layout of training to that of sampling, from the real plan of what moves.
//!
//! Weights travel in the type that they are computed with; the sampler makes its own type of them as they come. Ranks keep
//! what they train, so that the way back moves nothing.

use super::bytes::Layouts;
use crate::cluster::layout::Slice;
use crate::cluster::reshard::{Missing, Plan, least};
use serde::Serialize;
use std::collections::BTreeMap;

/// Elements that a rank sends and receives at once.
pub const BUCKET: usize = 64 << 20;

/// What a change of layout moves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SwitchPlan {
    /// Bytes that go from rank to rank.
    pub bytes: f64,
    /// Bytes that any plan has to send.
    pub least_bytes: f64,
    /// Bytes between nodes, where nodes are known.
    pub between_nodes: Option<f64>,
    /// Bytes that the rank that receives most does.
    pub most_received: f64,
    /// Most bytes that a rank sends, or receives, at once.
    pub widest: f64,
    /// Rounds.
    pub rounds: usize,
    /// Elements of each round's messages: from, to, how many.
    #[serde(skip)]
    pub messages: Vec<Vec<(usize, usize, usize)>>,
}

impl SwitchPlan {
    /// Of layouts, for numbers of so many bytes and nodes of so many ranks.
    pub fn new(layouts: &Layouts, number: f64, node: Option<usize>) -> Result<SwitchPlan, Missing> {
        let ranks = layouts.training.mesh().ranks();
        let tensors = &layouts.tensors;
        let held: Vec<Vec<Slice>> =
            (0..ranks).map(|rank| layouts.training.weights(rank, tensors)).collect();
        let wanted: Vec<Vec<Slice>> =
            (0..ranks).map(|rank| layouts.sampling.weights(rank, tensors)).collect();
        let plan = Plan::new(tensors, &held, &wanted, BUCKET)?;
        let mut received = vec![0; ranks];
        let mut outside = 0;
        let mut messages = Vec::with_capacity(plan.rounds.len());
        for round in &plan.rounds {
            let mut sums: BTreeMap<(usize, usize), usize> = BTreeMap::new();
            for moved in round {
                *sums.entry((moved.from, moved.to)).or_default() += moved.part.elements();
            }
            for ((from, to), elements) in &sums {
                received[*to] += elements;
                let crosses = node.is_some_and(|node| from / node != to / node);
                outside += if crosses { *elements } else { 0 };
            }
            messages.push(sums.into_iter().map(|((from, to), count)| (from, to, count)).collect());
        }
        let bytes = |elements: usize| elements as f64 * number;
        Ok(SwitchPlan {
            bytes: bytes(plan.sent()),
            least_bytes: bytes(least(&held, &wanted)),
            between_nodes: node.map(|_| bytes(outside)),
            most_received: bytes(received.into_iter().max().unwrap_or(0)),
            widest: bytes(plan.widest()),
            rounds: plan.rounds.len(),
            messages,
        })
    }
}
