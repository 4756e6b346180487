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
    let owner = kernels.arena().owner("rope", rehearsal_kernels::Kind::Weights);
    let frequencies = frequencies(config);
    let column = || kernels.arena().buffer(owner, kernels.float(), positions, frequencies.len());
    // The arena is asked first: a config's positions times its width may be more than any memory.
    let (mut cos, mut sin) = (column()?, column()?);
    let attention = config.attention();
    let factor = config.rope_scaling.as_ref().map_or(1.0, |yarn| table_multiplier(yarn, attention));
    for (function, column) in [(f64::cos as fn(f64) -> f64, &mut cos), (f64::sin, &mut sin)] {
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let values: Vec<f64> = angles.map(|angle| function(angle) * factor).collect();
        kernels.upload_f64(&values, column);
    }
    let pairing = match attention {
        Attention::Mla => Pairing::Interleaved,
        Attention::Gqa { .. } => Pairing::Halves,
    };
    Ok(RopeTable { pairing, cos, sin })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;
    use rehearsal_kernels::{Arena, ReferenceKernels};

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
        // Worked out outside this program from deepseek_v2.md 1.4, which prints seven of them.
        let golden = [
            1.000000000e+00,
            7.498942093e-01,
            5.623413252e-01,
            4.216965034e-01,
            3.162277660e-01,
            2.371373706e-01,
            1.778279410e-01,
            1.333521432e-01,
            1.000000000e-01,
            7.498942093e-02,
            5.623413252e-02,
            3.900692657e-02,
            2.687936011e-02,
            1.837814622e-02,
            1.244795587e-02,
            8.334508951e-03,
            5.500000000e-03,
            3.561997494e-03,
            2.249365301e-03,
            1.370513636e-03,
            7.905694150e-04,
            4.149903985e-04,
            1.778279410e-04,
            3.333803580e-05,
            2.500000000e-05,
            1.874735523e-05,
            1.405853313e-05,
            1.054241259e-05,
            7.905694150e-06,
            5.928434264e-06,
            4.445698525e-06,
            3.333803580e-06,
        ];
        assert_eq!(theta.len(), golden.len());
        for (k, want) in golden.into_iter().enumerate() {
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
        let ratio = 1.3688879454 / 1.2608037774;
        assert!((table_multiplier(&yarn, Attention::Mla) - ratio).abs() < 1e-9);
        // The ratio is on every cosine and sine; the softmax scale takes mscale_all_dim and knows no ratio.
        let mut config = published();
        config.rope_scaling = Some(yarn);
        assert!((softmax_scale(&config) - 0.1147213868).abs() < 1e-9);
        let kernels = ReferenceKernels::new(Arena::new(None));
        let table = table(&kernels, &config, 3).unwrap();
        let theta = frequencies(&config);
        let (cos, sin) = (kernels.download_f64(&table.cos), kernels.download_f64(&table.sin));
        for (i, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
            let angle = (i / 32) as f64 * theta[i % 32];
            assert!((cos - ratio * angle.cos()).abs() < 1e-9, "{i}: {cos}");
            assert!((sin - ratio * angle.sin()).abs() < 1e-9, "{i}: {sin}");
        }
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
