//! A model beside the one it is compared with: the ratios behind the paper's headline figures (deepseek_v2.md 1.7 and 6).
//!
//! Arithmetic on two configs, so that it says what an architecture saves and nothing about how fast it runs.

use super::cost::cache_elements_per_token;
use crate::config::{Attention, ModelConfig};
use crate::model::{flops_per_token, parameters};
use serde::Serialize;

/// Ratios of a model to another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Active parameters without the input embedding.
    pub active: f64,
    /// All parameters.
    pub total: f64,
    /// Cached elements a token.
    pub cache_elements: f64,
    /// Share of the other's cached elements that is saved.
    pub cache_saved: f64,
    /// The same in bytes, 6 bits an element against 16; only of a latent cache.
    pub cache_saved_at_6_bits: Option<f64>,
    /// FLOPs of a token in training.
    pub flops: f64,
}

/// DeepSeek-V2 against DeepSeek 67B: what a small pair should keep. The FLOPs are of 4096 tokens.
pub const PAPER: Comparison = Comparison {
    active: 0.313,
    total: 3.50,
    cache_elements: 0.1776,
    cache_saved: 0.8224,
    cache_saved_at_6_bits: Some(0.9334),
    flops: 0.371,
};

/// Compares two models; FLOPs are those of sequences of `sequence` tokens.
pub fn compare(model: &ModelConfig, other: &ModelConfig, sequence: usize) -> Comparison {
    let ratio = |of: &dyn Fn(&ModelConfig) -> f64| of(model) / of(other);
    let cache_elements = ratio(&|model| cache_elements_per_token(model) as f64);
    Comparison {
        active: ratio(&|model| parameters(model).active_without_input_embedding as f64),
        total: ratio(&|model| parameters(model).total as f64),
        cache_elements,
        cache_saved: 1.0 - cache_elements,
        cache_saved_at_6_bits: (model.attention() == Attention::Mla)
            .then_some(1.0 - cache_elements * 6.0 / 16.0),
        flops: ratio(&|model| flops_per_token(model, sequence)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::parameters::tests::preset;

    fn pair(name: &str, other: &str, sequence: usize) -> Comparison {
        compare(&preset(name), &preset(other), sequence)
    }

    #[test]
    fn v2_against_67b_has_the_papers_ratios_and_saves_82_and_93_percent_of_the_cache() {
        let found = pair("deepseek-v2.json", "deepseek-67b.json", 4096);
        assert_eq!(format!("{:.3} {:.2}", found.active, found.total), "0.313 3.50");
        assert_eq!(format!("{:.4} {:.3}", found.cache_elements, found.flops), "0.1776 0.371");
        assert_eq!(format!("{:.2}", 100.0 * found.cache_saved), "82.24");
        assert_eq!(format!("{:.2}", 100.0 * found.cache_saved_at_6_bits.unwrap()), "93.34");
    }

    #[test]
    fn the_small_pairs_keep_the_papers_ratios() {
        for (name, other, active, total, cache) in [
            ("cpu-nano-moe.json", "cpu-nano-dense.json", "0.331", "2.96", "0.169"),
            ("h200-mini-moe.json", "h200-mini-dense.json", "0.318", "3.65", "0.176"),
            ("quarter-depth-v2.json", "quarter-depth-67b.json", "0.321", "3.12", "0.176"),
        ] {
            let found = pair(name, other, 4096);
            let told = [
                format!("{:.3}", found.active),
                format!("{:.2}", found.total),
                format!("{:.3}", found.cache_elements),
            ];
            assert_eq!(told, [active, total, cache], "{name}");
            let bytes = 100.0 * found.cache_saved_at_6_bits.unwrap();
            assert!((bytes - 93.4).abs() < 0.3, "{name}: {bytes}");
        }
    }

    #[test]
    fn a_dense_model_has_no_6_bit_latent() {
        let same = pair("deepseek-67b.json", "deepseek-67b.json", 4096);
        assert_eq!((same.active, same.flops, same.cache_saved), (1.0, 1.0, 0.0));
        assert_eq!(same.cache_saved_at_6_bits, None);
    }
}
