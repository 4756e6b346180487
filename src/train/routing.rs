//! What the routers of a step did, by MoE layer.
//!
//! Invariant: no figure depends on the split into micro-batches. Counts are summed before they are divided, and losses in
//! the order of the step's documents.

use crate::model::moe::Routing;
use serde::{Deserialize, Serialize};

/// The router of one MoE layer in one step. What was dropped counts as chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerRouting {
    /// The share of all pairs of token and expert that each expert has.
    pub expert_load: Vec<f32>,
    /// Deviation of the experts' loads over their mean: 0 if all are alike.
    pub expert_cv: f64,
    /// The same for devices, in a model whose routing is limited to some.
    pub devices: Option<DeviceLoad>,
    /// What full devices dropped, in a stage that limits them.
    pub drops: Option<DropShares>,
}

/// How tokens spread over the devices of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceLoad {
    /// Pairs of the busiest device over the mean.
    pub max_over_mean: f64,
    /// Devices that a token is sent to, on average.
    pub per_token: f64,
}

/// What became of pairs beyond a device's budget, as shares of all pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DropShares {
    /// Dropped.
    pub dropped: f64,
    /// Kept, because their document is protected.
    pub protected: f64,
}

/// Balance losses of a step, summed over layers and each a mean over documents.
pub fn balance_loss(routings: &[Vec<Routing>]) -> f64 {
    by_layer(routings)
        .map(|parts| {
            let documents: usize = parts.clone().map(|part| part.balance.len()).sum();
            parts.flat_map(|part| &part.balance).sum::<f64>() / documents.max(1) as f64
        })
        // A sum of nothing is -0.0, which is no figure for a journal.
        .fold(0.0, |sum, layer| sum + layer)
}

/// What each layer's router did; `routings` are those of the micro-batches.
pub fn layer_routing(routings: &[Vec<Routing>]) -> Vec<LayerRouting> {
    by_layer(routings).map(|parts| whole(&parts.collect::<Vec<_>>())).collect()
}

/// For each layer, what it did in every micro-batch.
fn by_layer(
    routings: &[Vec<Routing>],
) -> impl Iterator<Item = impl Iterator<Item = &Routing> + Clone> {
    let layers = routings.first().map_or(0, Vec::len);
    (0..layers).map(move |layer| routings.iter().map(move |routing| &routing[layer]))
}

fn whole(parts: &[&Routing]) -> LayerRouting {
    let sum = |count: &dyn Fn(&Routing) -> u64| parts.iter().map(|part| count(part)).sum::<u64>();
    let experts: Vec<u64> = (0..parts[0].experts.len())
        .map(|expert| sum(&|part| u64::from(part.experts[expert])))
        .collect();
    let pairs = experts.iter().sum::<u64>().max(1) as f64;
    let groups = parts[0].groups;
    let devices = (groups > 1).then(|| {
        let loads = experts.chunks(experts.len() / groups).map(|group| group.iter().sum::<u64>());
        DeviceLoad {
            max_over_mean: loads.max().unwrap_or(0) as f64 * groups as f64 / pairs,
            per_token: sum(&|part| part.devices) as f64
                / sum(&|part| part.tokens as u64).max(1) as f64,
        }
    });
    let drops = parts[0].drops.is_some().then(|| {
        let drops = |part: &Routing| part.drops.unwrap_or_default();
        DropShares {
            dropped: sum(&|part| drops(part).dropped) as f64 / pairs,
            protected: sum(&|part| drops(part).overflow) as f64 / pairs,
        }
    });
    LayerRouting {
        expert_load: experts.iter().map(|count| (*count as f64 / pairs) as f32).collect(),
        expert_cv: variation(&experts),
        devices,
        drops,
    }
}

/// Population deviation over mean; 0 if there is nothing.
fn variation(counts: &[u64]) -> f64 {
    let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
    let square: f64 = counts.iter().map(|count| (*count as f64 - mean).powi(2)).sum();
    if mean == 0.0 { 0.0 } else { (square / counts.len() as f64).sqrt() / mean }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::DropCounts;

    /// Six pairs of three tokens at most on four experts of two devices.
    fn routing(experts: [u32; 4], devices: u64, dropped: u64, balance: &[f64]) -> Vec<Routing> {
        let tokens = experts.iter().sum::<u32>() as usize / 2;
        let drops = Some(DropCounts { dropped, overflow: 2 * dropped });
        vec![Routing {
            experts: experts.to_vec(),
            tokens,
            groups: 2,
            devices,
            drops,
            balance: balance.to_vec(),
        }]
    }

    #[test]
    fn what_routers_did_does_not_depend_on_the_micro_batch() {
        let whole = [routing([5, 3, 0, 2], 7, 3, &[0.1, 0.7, 0.2])];
        // Micro-batches of unequal lengths.
        let parts = [
            routing([2, 0, 0, 0], 1, 1, &[0.1]),
            routing([3, 3, 0, 0], 4, 2, &[0.7]),
            routing([0, 0, 0, 2], 2, 0, &[0.2]),
        ];
        let layers = layer_routing(&whole);
        assert_eq!(layer_routing(&parts), layers);
        assert_eq!(balance_loss(&parts).to_bits(), balance_loss(&whole).to_bits());
        assert!((balance_loss(&whole) - 1.0 / 3.0).abs() < 1e-15);
        let [layer] = layers.as_slice() else { panic!("{layers:?}") };
        assert_eq!(layer.expert_load, [0.5, 0.3, 0.0, 0.2]);
        assert_eq!(layer.devices, Some(DeviceLoad { max_over_mean: 1.6, per_token: 1.4 }));
        assert_eq!(layer.drops, Some(DropShares { dropped: 0.3, protected: 0.6 }));
        // Loads 5, 3, 0, 2: mean 2.5, squares 6.25, 0.25, 6.25, 0.25.
        assert!((layer.expert_cv - 3.25f64.sqrt() / 2.5).abs() < 1e-15, "{}", layer.expert_cv);
    }

    #[test]
    fn a_model_without_devices_or_routers_tells_nothing_of_them() {
        assert!(layer_routing(&[]).is_empty());
        let mut greedy = routing([1, 1, 1, 1], 2, 0, &[]);
        (greedy[0].groups, greedy[0].drops) = (1, None);
        let layers = layer_routing(&[greedy.clone()]);
        assert_eq!((layers[0].expert_cv, layers[0].devices, layers[0].drops), (0.0, None, None));
        for nothing in [balance_loss(&[]), balance_loss(&[greedy])] {
            assert_eq!(nothing.to_bits(), 0.0f64.to_bits());
        }
    }
}
