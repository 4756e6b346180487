//! Rotary positions: frequencies with YaRN, the table of cosines and sines, and the softmax scale.
//!
//! Published orders: interleaved pairs (2k, 2k + 1) in DeepSeek-V2 (deepseek_v2.md 1.3, 1.4), halves (k, k + width / 2) in
//! a Llama. YaRN's temperature of attention is in the softmax scale of the former, in cos and sin of the latter. Angles in
//! f64, tables in the kernels' float.

use crate::config::{Attention, ModelConfig, RopeScaling};
use rehearsal_kernels::{Kernels, OutOfMemory, Pairing, RopeTable};

/// The frequencies θ_k, k < d_R / 2, YaRN applied if the config has it.
pub fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let width = config.rope_width() as f64;
    let plain = |k: usize| config.rope_theta.powf(-2.0 * k as f64 / width);
    let half = config.rope_width() / 2;
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

/// What YaRN multiplies cos and sin with: mscale(s, mscale) / mscale(s, mscale_all_dim). In a Llama that ratio counts only
/// if neither is 0, behind `attention_factor` and before mscale(s, 1).
pub fn table_multiplier(yarn: &RopeScaling, attention: Attention) -> f64 {
    let mscale = |weight| RopeScaling::mscale(yarn.factor, weight);
    let ratio = mscale(yarn.mscale) / mscale(yarn.mscale_all_dim);
    match attention {
        Attention::Mla => ratio,
        Attention::Gqa { .. } => yarn.attention_factor.unwrap_or_else(|| {
            if yarn.mscale * yarn.mscale_all_dim == 0.0 { mscale(1.0) } else { ratio }
        }),
    }
}

/// Softmax scale: (width of a query)^(-1/2), times m² with YaRN in MLA (1.2, item 6).
pub fn softmax_scale(config: &ModelConfig) -> f64 {
    let base = (config.query_width() as f64).powf(-0.5);
    let m = match (&config.rope_scaling, config.attention()) {
        (Some(yarn), Attention::Mla) if yarn.mscale_all_dim != 0.0 => {
            RopeScaling::mscale(yarn.factor, yarn.mscale_all_dim)
        }
        _ => 1.0,
    };
    base * m * m
}

/// cos and sin of positions `0 .. positions`.
pub fn table(
    kernels: &dyn Kernels,
    config: &ModelConfig,
    positions: usize,
) -> Result<RopeTable, OutOfMemory> {
    let frequencies = frequencies(config);
    let attention = config.attention();
    let factor = config.rope_scaling.as_ref().map_or(1.0, |yarn| table_multiplier(yarn, attention));
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
    let pairing = match attention {
        Attention::Mla => Pairing::Interleaved,
        Attention::Gqa { .. } => Pairing::Halves,
    };
    Ok(RopeTable { pairing, cos: column(f64::cos)?, sin: column(f64::sin)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;

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
        assert_eq!(table_multiplier(&yarn, Attention::Mla), 1.0);
        yarn.mscale = 1.0;
        let multiplier = table_multiplier(&yarn, Attention::Mla);
        assert!((multiplier - 1.3688879454 / 1.2608037774).abs() < 1e-9);
    }

    #[test]
    fn a_llama_has_yarns_temperature_in_its_table_and_not_in_the_softmax() {
        let mut yarn = published().rope_scaling.unwrap();
        let gqa = Attention::Gqa { kv_heads: 8, head_dim: 128 };
        assert_eq!(table_multiplier(&yarn, gqa), 1.0, "two mscales that are equal");
        yarn.mscale_all_dim = 0.0;
        assert!((table_multiplier(&yarn, gqa) - 1.3688879454).abs() < 1e-9);
        yarn.attention_factor = Some(1.25);
        assert_eq!(table_multiplier(&yarn, gqa), 1.25);
        let mut llama = published();
        (llama.model_type, llama.head_dim) = (ModelType::Llama, Some(64));
        assert_eq!(softmax_scale(&llama), 0.125);
    }
}
