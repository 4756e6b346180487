//! Cost of one token: FLOPs and cache bytes.

use super::parameters::parameters;
use crate::config::ModelConfig;
use serde::Serialize;

/// Data type of the latent cache.
pub const CACHE_DTYPE: &str = "f32";

/// Elements of the cache that one token takes over all layers.
pub fn cache_elements_per_token(model: &ModelConfig) -> u64 {
    (model.num_hidden_layers * model.cache_width()) as u64
}

/// Bytes of the cache that one token takes over all layers.
pub fn cache_bytes_per_token(model: &ModelConfig) -> u64 {
    cache_elements_per_token(model) * size_of::<f32>() as u64
}

/// FLOPs of a token's forward pass in the middle of a causal sequence: 2 for each active parameter that it passes,
/// and 2 for each element of query, key and value over the half of the sequence that it sees on average.
pub fn forward_flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    let weights = 2.0 * parameters(model).active_without_input_embedding as f64;
    let widths = model.num_attention_heads * (model.query_width() + model.value_width());
    let seen = (sequence as f64 + 1.0) / 2.0;
    weights + model.num_hidden_layers as f64 * 2.0 * widths as f64 * seen
}

/// FLOPs of a token in training: one forward pass, and two as long for the gradients of inputs and weights.
pub fn flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    3.0 * forward_flops_per_token(model, sequence)
}

/// What a training run made of its GPUs, from the hours that a trillion tokens took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Utilisation {
    /// GPU hours of a trillion tokens.
    pub gpu_hours: f64,
    /// Tokens that one GPU trained on in a second.
    pub tokens_per_second: f64,
    /// Share of [`PEAK_FLOPS`] that these tokens' FLOPs are.
    pub share_of_peak: f64,
}

/// FLOPs a second of an H100 or H800 in bf16, dense.
pub const PEAK_FLOPS: f64 = 989.4e12;

/// The utilisation of a model that takes so many FLOPs a token.
pub fn utilisation(flops_per_token: f64, gpu_hours: f64) -> Utilisation {
    let tokens_per_second = 1e12 / (gpu_hours * 3600.0);
    let share_of_peak = tokens_per_second * flops_per_token / PEAK_FLOPS;
    Utilisation { gpu_hours, tokens_per_second, share_of_peak }
}

#[cfg(test)]
mod tests {
    use super::super::parameters::tests::preset;
    use super::*;

    #[test]
    fn v2_trains_at_155_gigaflops_a_token_and_67b_at_419() {
        for (name, gigaflops) in [("deepseek-v2.json", "155.3"), ("deepseek-67b.json", "418.6")] {
            let found = flops_per_token(&preset(name), 4096) / 1e9;
            assert_eq!(format!("{found:.1}"), gigaflops, "{name}");
        }
    }

    #[test]
    fn the_papers_gpu_hours_are_25_and_39_percent_of_the_peak() {
        for (name, gpu_hours, told) in [
            ("deepseek-v2.json", 172.8e3, "1607.5 25.2 %"),
            ("deepseek-67b.json", 300.6e3, "924.1 39.1 %"),
        ] {
            let found = utilisation(flops_per_token(&preset(name), 4096), gpu_hours);
            let (tokens, percent) = (found.tokens_per_second, 100.0 * found.share_of_peak);
            assert_eq!(format!("{tokens:.1} {percent:.1} %"), told, "{name}");
        }
    }

    #[test]
    fn the_cache_holds_576_elements_a_layer_and_2048_of_67b() {
        for (name, elements) in [
            ("deepseek-v2.json", 34_560),
            ("deepseek-v2-lite.json", 15_552),
            ("deepseek-67b.json", 194_560),
        ] {
            assert_eq!(cache_elements_per_token(&preset(name)), elements, "{name}");
            assert_eq!(cache_bytes_per_token(&preset(name)), 4 * elements, "{name}");
        }
    }

    #[test]
    fn the_quickstart_trains_at_the_megaflops_of_its_recipe() {
        let megaflops = flops_per_token(&preset("quickstart.json"), 64) / 1e6;
        assert!((megaflops - 3.39).abs() < 0.05, "{megaflops}");
    }
}
