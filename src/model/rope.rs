//! Rotary positions: frequencies with YaRN, the table of cosines and sines, and the softmax scale.
//!
//! Published order: interleaved pairs (2k, 2k + 1) (deepseek_v2.md 1.3, 1.4). Angles in f64, tables in the kernels' float.

use crate::config::{ModelConfig, RopeScaling};
use rehearsal_kernels::{Kernels, OutOfMemory, RopeTable};

/// The frequencies θ_k, k < d_R / 2, YaRN applied if the config has it.
pub fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let width = config.qk_rope_head_dim as f64;
    let plain = |k: usize| config.rope_theta.powf(-2.0 * k as f64 / width);
    let half = config.qk_rope_head_dim / 2;
    let Some(yarn) = &config.rope_scaling else {
        return (0..half).map(plain).collect();
    };
    let turns = |rotations: f64| {
        width
            * (yarn.original_max_position_embeddings as f64 / (rotations * std::f64::consts::TAU))
                .ln()
            / (2.0 * config.rope_theta.ln())
    };
    let low = turns(yarn.beta_fast).floor().max(0.0);
    let high = turns(yarn.beta_slow).ceil().min(width - 1.0);
    let span = if high == low { 0.001 } else { high - low };
    let stretched = |k: usize| {
        let ramp = ((k as f64 - low) / span).clamp(0.0, 1.0);
        plain(k) * (1.0 - ramp) + plain(k) / yarn.factor * ramp
    };
    (0..half).map(stretched).collect()
}

/// mscale(s, a) = 0.1 a ln s + 1, or 1 if s <= 1.
fn mscale(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// What cos and sin are multiplied with: mscale(s, mscale) / mscale(s, mscale_all_dim).
pub fn table_multiplier(yarn: &RopeScaling) -> f64 {
    mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
}

/// Softmax scale: (d_nope + d_R)^(-1/2), times m² with YaRN (1.2, item 6).
pub fn softmax_scale(config: &ModelConfig) -> f64 {
    let base = (config.query_width() as f64).powf(-0.5);
    let m = config.rope_scaling.as_ref().map_or(1.0, |yarn| {
        if yarn.mscale_all_dim == 0.0 { 1.0 } else { mscale(yarn.factor, yarn.mscale_all_dim) }
    });
    base * m * m
}

/// cos and sin of positions `0 .. positions`.
pub fn table(
    kernels: &dyn Kernels,
    config: &ModelConfig,
    positions: usize,
) -> Result<RopeTable, OutOfMemory> {
    let frequencies = frequencies(config);
    let factor = config.rope_scaling.as_ref().map_or(1.0, table_multiplier);
    let owner = kernels.arena().owner("rope", rehearsal_kernels::Kind::Weights);
    let angles: Vec<f64> =
        (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f)).collect();
    let column = |function: fn(f64) -> f64| {
        let mut buffer =
            kernels.arena().buffer(owner, kernels.float(), positions, frequencies.len())?;
        let values: Vec<f64> = angles.iter().map(|angle| function(*angle) * factor).collect();
        kernels.upload_f64(&values, &mut buffer);
        Ok(buffer)
    };
    Ok(RopeTable { cos: column(f64::cos)?, sin: column(f64::sin)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> ModelConfig {
        let text = r#"{"vocab_size":102400,"hidden_size":5120,"num_hidden_layers":60,"first_k_dense_replace":1,
            "intermediate_size":12288,"moe_intermediate_size":1536,"n_routed_experts":160,"n_shared_experts":2,
            "num_experts_per_tok":6,"num_attention_heads":128,"q_lora_rank":1536,"kv_lora_rank":512,
            "qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"max_position_embeddings":163840,
            "rope_scaling":{"type":"yarn","factor":40,"original_max_position_embeddings":4096,"beta_fast":32,
            "beta_slow":1,"mscale":0.707,"mscale_all_dim":0.707}}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn yarn_frequencies_match_the_golden_values() {
        let theta = frequencies(&published());
        let golden = [
            (0, 1.0),
            (10, 5.623413252e-2),
            (11, 3.900692657e-2),
            (16, 5.5e-3),
            (22, 1.778279410e-4),
            (23, 3.333803580e-5),
            (31, 3.333803580e-6),
        ];
        for (k, want) in golden {
            assert!(
                (theta[k] / want - 1.0).abs() < 1e-7,
                "theta[{k}] = {:e}, want {want:e}",
                theta[k]
            );
        }
    }

    #[test]
    fn softmax_scales_match_the_golden_values() {
        let mut config = published();
        assert!((softmax_scale(&config) - 0.1147213868).abs() < 1e-9);
        let yarn = config.rope_scaling.as_mut().unwrap();
        (yarn.mscale, yarn.mscale_all_dim) = (1.0, 1.0);
        assert!((softmax_scale(&config) - 0.1352337789).abs() < 1e-9);
        config.rope_scaling = None;
        assert!((softmax_scale(&config) - 0.0721687836).abs() < 1e-9);
    }

    #[test]
    fn the_table_multiplier_is_a_ratio_of_the_two_mscales() {
        let mut yarn = published().rope_scaling.unwrap();
        assert_eq!(table_multiplier(&yarn), 1.0);
        yarn.mscale = 1.0;
        assert!((table_multiplier(&yarn) - 1.3688879454 / 1.2608037774).abs() < 1e-9);
    }
}
