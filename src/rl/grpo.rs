//! GRPO's loss of one rollout and its slope per token (deepseek_v2.md 4.3).
//!
//! loss = -scale * w * (policy term - β * KL term); scale = 1 / (groups * G), w from `length_norm`:
//!   * ratio per token (DeepSeekMath): Σ_t min(ρ_t A, clip(ρ_t) A) and Σ_t k3(d_t), with
//!     ρ_t = exp(new_t - old_t)
//!   * ratio per sequence (DeepSeek-V2 as printed, with `length_norm = "none"`): one k3(Σ d) and one
//!     ρ = exp(Σ (new - old)) for the whole output
//!
//! Rollouts of a sampler that is not the trainer (`importance_limit` C) are weighted: the policy term of a token, or of the
//! whole output at the level of sequences, is multiplied by w = min(exp(new - old), C), a constant of the loss. Its ratio ρ
//! is then to the trainer's own log-probabilities before the update, which are `new` itself: there is one update a batch.
//! The KL term, which is of the trainer and the reference, has no weight.
//!
//! k3(d) = e^d - d - 1 with d = reference - new, clamped to ±20 against overflow. Deviation from
//! the plain derivative: beyond the clamp the slope keeps its value at the boundary, so that the
//! pull towards the reference does not vanish where it is needed most.
//!
//! Invariants:
//!   * an advantage of zero contributes the KL term only
//!   * a weight is within 0 and its limit, and has no slope
//!   * where the clip is the smaller term the policy's slope is exactly zero
//!   * a log-probability that is not a number makes loss and slope NaN: nothing here hides it

use crate::config::stage::{LengthNorm, RatioLevel};
use serde::{Deserialize, Serialize};

/// Largest |reference - new| log-probability that the KL term sees.
const KL_CLAMP: f64 = 20.0;

/// Settings of the GRPO loss (deepseek_v2.md 4.3).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GrpoSettings {
    /// Ratio clip ε.
    pub clip: f64,
    /// KL weight β.
    pub kl_weight: f64,
    /// Temperature of sampler and trainer.
    pub temperature: f64,
    /// Ratio per token or per sequence.
    pub ratio_level: RatioLevel,
    /// Averaging over a rollout's tokens.
    pub length_norm: LengthNorm,
    /// Used by `LengthNorm::Constant`.
    pub max_new_tokens: usize,
    /// Limit C of importance weights; `None` where sampler and trainer compute with the same numbers.
    pub importance_limit: Option<f64>,
}

/// One rollout's part of the loss.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLoss {
    /// The loss, scale and KL term included.
    pub loss: f64,
    /// d(loss) / d(log-probability) of each new token.
    pub coefficients: Vec<f64>,
    /// Σ over tokens of k3, unweighted, at either ratio level; 0 without a reference.
    pub kl_sum: f64,
    /// Tokens whose policy slope the clip removed.
    pub clipped: u64,
    /// Importance weight of each token; 1 without a limit.
    pub weights: Vec<f64>,
    /// Tokens whose weight is the limit.
    pub truncated: u64,
}

/// The loss of one rollout. `new` are the trainer's log-probabilities of its tokens, `old` the
/// sampler's, `reference` the reference model's (needed if the KL weight is not 0); `scale` is 1 /
/// (groups * G).
pub fn rollout_loss(
    settings: &GrpoSettings,
    advantage: f64,
    scale: f64,
    new: &[f64],
    old: &[f32],
    reference: Option<&[f32]>,
) -> TokenLoss {
    assert_eq!(new.len(), old.len(), "trainer and sampler speak of the same tokens");
    assert!(
        reference.is_none_or(|r| r.len() == new.len()),
        "the reference speaks of the same tokens"
    );
    assert!(reference.is_some() || settings.kl_weight == 0.0, "a KL weight needs a reference");
    let gaps: Vec<f64> = match reference {
        Some(reference) => new.iter().zip(reference).map(|(new, r)| f64::from(*r) - new).collect(),
        None => Vec::new(),
    };
    let apart: Vec<f64> = new.iter().zip(old).map(|(new, old)| new - f64::from(*old)).collect();
    let weights = match (settings.importance_limit, settings.ratio_level) {
        (None, _) => vec![1.0; new.len()],
        (Some(limit), RatioLevel::Token) => apart.iter().map(|d| weight(*d, limit)).collect(),
        (Some(limit), RatioLevel::Sequence) => vec![weight(apart.iter().sum(), limit); new.len()],
    };
    let log_ratios = match settings.importance_limit {
        None => apart,
        // One update a batch: the policy before it is the trainer that speaks. What is no number stays none.
        Some(_) => new.iter().map(|new| 0.0 * new).collect(),
    };
    let parts = Parts { log_ratios, weights, gaps };
    let factor = scale * length_weight(settings, new.len());
    let mut total = match settings.ratio_level {
        RatioLevel::Token => per_token(settings, advantage, factor, &parts),
        RatioLevel::Sequence => per_sequence(settings, advantage, factor, &parts),
    };
    total.kl_sum = parts.gaps.iter().map(|gap| k3(*gap).value).sum();
    let is_cut = |weight: &&f64| settings.importance_limit.is_some_and(|limit| **weight >= limit);
    total.truncated = parts.weights.iter().filter(is_cut).count() as u64;
    total.weights = parts.weights;
    total
}

/// What the terms of a rollout are made of, a number per token.
struct Parts {
    log_ratios: Vec<f64>,
    weights: Vec<f64>,
    /// reference - new; empty without a reference.
    gaps: Vec<f64>,
}

/// min(e^apart, limit), and NaN of NaN.
fn weight(apart: f64, limit: f64) -> f64 {
    let ratio = apart.exp();
    if ratio > limit { limit } else { ratio }
}

fn per_token(settings: &GrpoSettings, advantage: f64, factor: f64, parts: &Parts) -> TokenLoss {
    let coefficients = Vec::with_capacity(parts.log_ratios.len());
    let mut total = TokenLoss { coefficients, ..TokenLoss::default() };
    for (index, (log_ratio, weight)) in parts.log_ratios.iter().zip(&parts.weights).enumerate() {
        let policy = surrogate(advantage, *log_ratio, settings.clip).times(*weight);
        let kl = parts.gaps.get(index).map_or(Term::default(), |gap| k3(*gap));
        total.loss -= factor * (policy.value - settings.kl_weight * kl.value);
        total.coefficients.push(-factor * (policy.slope - settings.kl_weight * kl.slope));
        total.clipped += u64::from(policy.clipped);
    }
    total
}

fn per_sequence(settings: &GrpoSettings, advantage: f64, factor: f64, parts: &Parts) -> TokenLoss {
    let tokens = parts.log_ratios.len();
    let weight = parts.weights.first().copied().unwrap_or(1.0);
    let policy = surrogate(advantage, parts.log_ratios.iter().sum(), settings.clip).times(weight);
    let kl = k3(parts.gaps.iter().sum());
    // Each token's log-probability is one summand of the sequence's: they share one slope.
    let coefficient = -factor * (policy.slope - settings.kl_weight * kl.slope);
    TokenLoss {
        loss: -factor * (policy.value - settings.kl_weight * kl.value),
        coefficients: vec![coefficient; tokens],
        clipped: if policy.clipped { tokens as u64 } else { 0 },
        ..TokenLoss::default()
    }
}

fn length_weight(settings: &GrpoSettings, tokens: usize) -> f64 {
    match settings.length_norm {
        LengthNorm::PerOutput => 1.0 / tokens.max(1) as f64,
        LengthNorm::None => 1.0,
        LengthNorm::Constant => 1.0 / settings.max_new_tokens.max(1) as f64,
    }
}

/// A term of the objective and its derivative with respect to the new log-probability.
#[derive(Clone, Copy, Debug, Default)]
struct Term {
    value: f64,
    slope: f64,
    clipped: bool,
}

impl Term {
    /// The term with a constant factor.
    fn times(self, factor: f64) -> Term {
        Term { value: factor * self.value, slope: factor * self.slope, ..self }
    }
}

/// min(ρ A, clip(ρ, 1 - ε, 1 + ε) A).
fn surrogate(advantage: f64, log_ratio: f64, clip: f64) -> Term {
    let ratio = log_ratio.exp();
    // Not left to the product below: an overflowing ratio times zero would be NaN.
    if advantage == 0.0 && !ratio.is_nan() {
        return Term::default();
    }
    let clipped =
        (advantage > 0.0 && ratio > 1.0 + clip) || (advantage < 0.0 && ratio < 1.0 - clip);
    if clipped {
        let bound = if advantage > 0.0 { 1.0 + clip } else { 1.0 - clip };
        return Term { value: bound * advantage, slope: 0.0, clipped: true };
    }
    Term { value: ratio * advantage, slope: ratio * advantage, clipped: false }
}

/// e^d - d - 1, the k3 estimate of how far two policies are apart on a token of the first: d is the second's
/// log-probability less the first's.
pub fn k3_value(gap: f64) -> f64 {
    k3(gap).value
}

/// e^d - d - 1 with d = reference - new; its slope with respect to `new` is 1 - e^d.
fn k3(gap: f64) -> Term {
    let d = gap.clamp(-KL_CLAMP, KL_CLAMP);
    let grown = d.exp_m1();
    Term { value: grown - d, slope: -grown, clipped: false }
}

#[cfg(test)]
mod tests;
