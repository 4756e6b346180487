//! The layout of sampling and scoring: which ranks share the tokens of a sequence, and which the experts of a layer.
//!
//! Both divide the ranks, and the larger one the smaller, so that groups of neighbours lie within each other.

use super::super::mesh::{Mesh, MeshError, cut};
use super::{Home, Slice, Split, Tensor};
use crate::config::cluster::RolloutLayout;
use crate::config::nearest::joined;
use crate::config::{Attention, ClusterConfig, ModelConfig};
use std::ops::Range;

/// The layout of sampling: every rank goes through all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Ranks, N.
    pub ranks: usize,
    /// Ranks that share the tokens of a sequence, T: each has the whole latent cache of it.
    pub tensor: usize,
    /// Ranks that share a layer's experts, E'.
    pub expert: usize,
}

impl Sampling {
    /// The layout that a config asks for, over so many ranks.
    pub fn new(
        rollout: RolloutLayout,
        ranks: usize,
        model: &ModelConfig,
    ) -> Result<Sampling, MeshError> {
        let RolloutLayout { tensor, expert } = rollout;
        let (experts, heads) = (model.n_routed_experts.max(1), model.num_attention_heads);
        let key_heads = match model.attention() {
            Attention::Mla => heads,
            Attention::Gqa { kv_heads, .. } => kv_heads,
        };
        let divides = |size: usize, number: usize| size > 0 && number.is_multiple_of(size);
        let rules = [
            ("tensor", tensor, "the number of ranks", ranks),
            ("tensor", tensor, "num_attention_heads", heads),
            ("tensor", tensor, "num_key_value_heads", key_heads),
            ("expert", expert, "the number of ranks", ranks),
            ("expert", expert, "n_routed_experts", experts),
        ];
        for (key, size, of, number) in rules {
            if !divides(size, number) {
                let fits =
                    |size: &usize| rules.iter().all(|(k, _, _, n)| *k != key || divides(*size, *n));
                let all = (1..=ranks).filter(fits).map(|size| size.to_string());
                let divisors = joined(&all.collect::<Vec<_>>(), "or");
                return Err(MeshError::Rollout { key, size, of, number, divisors });
            }
        }
        if !tensor.max(expert).is_multiple_of(tensor.min(expert)) {
            return Err(MeshError::TensorAndExpert { tensor, expert });
        }
        Ok(Sampling { ranks, tensor, expert })
    }

    /// How those that train sample and score, and how those do that only sample. Where there are any, `rollout` is theirs, and who
    /// trains scores with its experts where they are.
    pub fn of_run(
        cluster: &ClusterConfig,
        mesh: Mesh,
        model: &ModelConfig,
    ) -> Result<[Sampling; 2], MeshError> {
        let (ranks, expert) = (mesh.ranks(), mesh.expert());
        let all = |ranks| Sampling::new(cluster.rollout, ranks, model);
        Ok(match cluster.samplers {
            0 => [all(ranks)?, Sampling { ranks: 0, tensor: 1, expert: 1 }],
            samplers => [Sampling { ranks, tensor: 1, expert }, all(samplers)?],
        })
    }

    /// A rank's share of what its tensor group cuts.
    pub fn share(&self, rank: usize) -> Share {
        Share { of: self.tensor, place: rank % self.tensor }
    }

    /// What a rank holds of all tensors, in order.
    pub fn weights(&self, rank: usize, tensors: &[Tensor]) -> Vec<Slice> {
        let of = |(index, tensor): (usize, &Tensor)| self.slice(rank, index, tensor);
        tensors.iter().enumerate().map(of).filter(|slice| !slice.is_empty()).collect()
    }

    fn slice(&self, rank: usize, index: usize, tensor: &Tensor) -> Slice {
        let whole = Slice::whole(index, tensor);
        if let Home::Expert { expert, of, .. } = tensor.home {
            return match cut(of, self.expert, rank % self.expert).contains(&expert) {
                true => whole,
                false => Slice { rows: 0..0, ..whole },
            };
        }
        Slice { rows: self.share(rank).rows(tensor.split, tensor.rows), ..whole }
    }
}

/// One rank's share of what ranks of a tensor group cut between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Ranks, T.
    pub of: usize,
    /// This one's place among them.
    pub place: usize,
}

impl Share {
    /// That of a rank without others.
    pub const ALL: Share = Share { of: 1, place: 0 };

    /// Its rows of a tensor that has so many.
    pub fn rows(&self, split: Split, rows: usize) -> Range<usize> {
        match split {
            Split::Whole => 0..rows,
            Split::Rows(unit) => {
                let units = cut(rows / unit, self.of, self.place);
                units.start * unit..units.end * unit
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{counts, model};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(120) })]
        #[test]
        fn weights_in_sampling_tile_each_tensor_over_the_ranks_that_share_it(
            tensor in 1usize..5, expert_power in 0usize..3, groups in 1usize..4, layers in 1usize..4,
        ) {
            let expert = 1 << expert_power;
            let layout = Sampling { ranks: tensor * expert * groups, tensor, expert };
            let tensors = model(layers, 4, false);
            let all = (0..layout.ranks).flat_map(|rank| layout.weights(rank, &tensors));
            for (tensor, counts) in tensors.iter().zip(counts(&tensors, all)) {
                let copies = match (tensor.home, tensor.split) {
                    (Home::Expert { .. }, _) => layout.ranks / layout.expert,
                    (_, Split::Whole) => layout.ranks,
                    _ => layout.ranks / layout.tensor,
                };
                prop_assert!(counts.iter().all(|count| *count == copies), "{tensor:?} {counts:?}");
            }
        }
    }

    #[test]
    fn a_layout_of_sampling_that_does_not_divide_is_refused_with_those_that_do() {
        let model = |text: &str| -> ModelConfig { serde_json::from_str(text).unwrap() };
        let latent = model(
            r#"{"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8, "n_routed_experts": 12,
            "num_attention_heads": 8, "max_position_embeddings": 64}"#,
        );
        let grouped = model(
            r#"{"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}"#,
        );
        let of = |model: &ModelConfig, tensor, expert| {
            Sampling::new(RolloutLayout { tensor, expert }, 12, model)
        };
        assert_eq!(of(&latent, 4, 2).unwrap(), Sampling { ranks: 12, tensor: 4, expert: 2 });
        assert_eq!(of(&grouped, 2, 1).unwrap().share(5), Share { of: 2, place: 1 });
        for (told, refused) in [
            (
                "tensor = 8 does not divide the number of ranks = 12; use 1, 2 or 4",
                of(&latent, 8, 1),
            ),
            (
                "tensor = 3 does not divide num_attention_heads = 8; use 1, 2 or 4",
                of(&latent, 3, 1),
            ),
            ("tensor = 4 does not divide num_key_value_heads = 2; use 1 or 2", of(&grouped, 4, 1)),
            ("tensor = 0 does not divide the number of ranks = 12; use 1, 2", of(&latent, 0, 1)),
            ("expert = 8 does not divide the number of ranks = 12; use 1, 2", of(&latent, 1, 8)),
            ("expert = 2 does not divide n_routed_experts = 1; use 1", of(&grouped, 1, 2)),
            ("tensor = 4 and cluster.rollout.expert = 6: one has to divide", of(&latent, 4, 6)),
        ] {
            let refused = refused.unwrap_err();
            let text = refused.to_string();
            assert!(text.starts_with(&format!("cluster.rollout.{told}")), "{text}");
            let key = told.split(' ').next().unwrap();
            assert_eq!(refused.path(), ["rollout", key]);
        }
    }
}
