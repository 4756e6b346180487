//! Cost of one token beside its FLOPs (`model::cost`): cache bytes, and what a training run made of its GPUs.

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
    use super::*;
    use crate::model::flops_per_token;
    use crate::model::parameters::tests::preset;

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
}
