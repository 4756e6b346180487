//! The loss against a plain reading of its formula, its slopes against finite differences, and its edges.

use super::*;

fn settings() -> GrpoSettings {
    GrpoSettings {
        clip: 0.2,
        kl_weight: 0.0,
        temperature: 1.0,
        ratio_level: RatioLevel::Token,
        length_norm: LengthNorm::PerOutput,
        max_new_tokens: 20,
        importance_limit: None,
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

/// What the importance weights of a rollout are taken from, and their limit.
struct Held<'a> {
    trainer: &'a [f64],
    sampler: &'a [f32],
    limit: f64,
}

impl Held<'_> {
    /// min(π_trainer / π_sampler, C) of some tokens together.
    fn weight(&self, tokens: std::ops::Range<usize>) -> f64 {
        let mut odds = 1.0;
        for t in tokens {
            odds *= self.trainer[t].exp() / f64::from(self.sampler[t]).exp();
        }
        if odds < self.limit { odds } else { self.limit }
    }
}

/// The loss as a plain reading of 4.3, sharing no code with the product. With weights, which are held constant, the ratio
/// is to the trainer's own log-probabilities.
fn naive(
    settings: &GrpoSettings,
    advantage: f64,
    scale: f64,
    new: &[f64],
    old: &[f32],
    reference: &[f32],
    held: Option<&Held<'_>>,
) -> f64 {
    let weight = match settings.length_norm {
        LengthNorm::PerOutput => 1.0 / new.len() as f64,
        LengthNorm::None => 1.0,
        LengthNorm::Constant => 1.0 / settings.max_new_tokens as f64,
    };
    let objective = |importance: f64, log_policy: f64, log_old: f64, log_reference: f64| {
        let ratio = (log_policy - log_old).exp();
        let held = if ratio > 1.0 + settings.clip {
            1.0 + settings.clip
        } else if ratio < 1.0 - settings.clip {
            1.0 - settings.clip
        } else {
            ratio
        };
        let (plain, bounded) = (ratio * advantage, held * advantage);
        let odds = (log_reference - log_policy).exp();
        let kl = odds - odds.ln() - 1.0;
        importance * (if plain < bounded { plain } else { bounded }) - settings.kl_weight * kl
    };
    let old: Vec<f64> = match held {
        Some(held) => held.trainer.to_vec(),
        None => old.iter().map(|old| f64::from(*old)).collect(),
    };
    let importance = |tokens| held.map_or(1.0, |held| held.weight(tokens));
    let mut sum = 0.0;
    match settings.ratio_level {
        RatioLevel::Token => {
            for t in 0..new.len() {
                sum += objective(importance(t..t + 1), new[t], old[t], f64::from(reference[t]));
            }
        }
        RatioLevel::Sequence => {
            let reference = reference.iter().map(|v| f64::from(*v)).sum();
            let whole = importance(0..new.len());
            sum = objective(whole, new.iter().sum(), old.iter().sum(), reference);
        }
    }
    -scale * weight * sum
}

#[test]
fn loss_and_slopes_agree_with_the_formula_and_its_finite_differences() {
    let mut state = 5u64;
    let mut uniform = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    for case in 0..400 {
        let count = 1 + (6.0 * uniform()) as usize;
        let mut column =
            |spread: f64| -> Vec<f64> { (0..count).map(|_| -2.0 + spread * uniform()).collect() };
        let (new, old, reference) = (column(0.6), narrow(&column(0.6)), narrow(&column(1.5)));
        let settings = GrpoSettings {
            kl_weight: 0.3,
            ratio_level: if case % 2 == 0 { RatioLevel::Token } else { RatioLevel::Sequence },
            length_norm: [LengthNorm::PerOutput, LengthNorm::None, LengthNorm::Constant][case % 3],
            // Gaps reach 0.6: the limit cuts some of the weights and leaves others.
            importance_limit: (case % 4 >= 2).then_some(1.2),
            ..settings()
        };
        let advantage = if case % 5 == 0 { 0.0 } else { 3.0 * uniform() - 1.5 };
        let got = rollout_loss(&settings, advantage, 0.125, &new, &old, Some(&reference));
        let held =
            settings.importance_limit.map(|limit| Held { trainer: &new, sampler: &old, limit });
        let at =
            |new: &[f64]| naive(&settings, advantage, 0.125, new, &old, &reference, held.as_ref());
        assert!(
            (got.loss - at(&new)).abs() < 1e-12,
            "case {case}: {} is not {}",
            got.loss,
            at(&new)
        );
        let near_a_kink =
            |log_ratio: f64| [0.8, 1.2].iter().any(|edge| (log_ratio.exp() - edge).abs() < 1e-4);
        let gaps = new.iter().zip(&old).map(|(new, old)| new - f64::from(*old));
        if gaps.clone().any(near_a_kink) || near_a_kink(gaps.sum()) {
            continue;
        }
        for token in 0..count {
            let (mut up, mut down) = (new.clone(), new.clone());
            up[token] += 1e-6;
            down[token] -= 1e-6;
            let numeric = (at(&up) - at(&down)) / 2e-6;
            let slope = got.coefficients[token];
            assert!(
                (slope - numeric).abs() < 1e-8,
                "case {case}, token {token}: {slope} is not {numeric}"
            );
        }
    }
}

#[test]
fn k3_matches_its_goldens_and_is_never_negative() {
    let goldens =
        [(1.0, 0.718_282), (-1.0, 0.367_879), (0.1, 0.005_170_918), (-0.1, 0.004_837_418)];
    for (gap, golden) in goldens {
        assert!((k3(gap).value - golden).abs() < 5e-7, "{gap}: {}", k3(gap).value);
    }
    assert_eq!(k3(0.0).value, 0.0);
    for step in -4000..=4000 {
        let term = k3(f64::from(step) * 0.01);
        assert!(term.value >= 0.0 && term.value.is_finite() && term.slope.is_finite());
    }
    // Past the clamp the pull stays: the slope of the boundary.
    assert_eq!(k3(90.0).slope, k3(20.0).slope);
    assert!(k3(90.0).slope < 0.0 && k3(-90.0).slope > 0.0);
}

#[test]
fn with_ratio_one_the_slope_is_the_advantage_over_group_size_and_length() {
    let new = [-0.5, -1.25, -2.0, -0.75];
    let old = narrow(&new);
    let (group_size, advantage) = (8.0, 1.5);
    let got = rollout_loss(&settings(), advantage, 1.0 / group_size, &new, &old, None);
    assert!(got.coefficients.iter().all(|c| (c + advantage / (group_size * 4.0)).abs() < 1e-15));
    // DeepSeek-V2 as printed: no division by the length.
    let printed = GrpoSettings {
        ratio_level: RatioLevel::Sequence,
        length_norm: LengthNorm::None,
        ..settings()
    };
    let got = rollout_loss(&printed, advantage, 1.0 / group_size, &new, &old, None);
    assert!(got.coefficients.iter().all(|c| (c + advantage / group_size).abs() < 1e-15));
    // With a reference, each token adds β (π_ref / π - 1).
    let with_kl = GrpoSettings { kl_weight: 0.04, ..settings() };
    let reference = narrow(&[-0.25, -1.5, -2.0, -0.5]);
    let got = rollout_loss(&with_kl, advantage, 1.0 / group_size, &new, &old, Some(&reference));
    for t in 0..4 {
        let odds = (f64::from(reference[t]) - new[t]).exp();
        let expected = -(advantage + 0.04 * (odds - 1.0)) / (group_size * 4.0);
        assert!((got.coefficients[t] - expected).abs() < 1e-15);
    }
}

#[test]
fn the_gradient_through_a_softmax_policy_is_the_policy_gradient() {
    // log π(a) = z_a - ln Σ e^z; at ratio one d(loss)/dz = -A / (G |o|) Σ_t (1[a_t] - π).
    let logits = [0.3, -0.8, 1.1];
    let log_policy = |z: &[f64], a: usize| z[a] - z.iter().map(|z| z.exp()).sum::<f64>().ln();
    let actions = [2, 0, 2, 1, 2];
    let log_all = |z: &[f64]| -> Vec<f64> { actions.iter().map(|a| log_policy(z, *a)).collect() };
    let old = narrow(&log_all(&logits));
    let loss = |z: &[f64]| rollout_loss(&settings(), -0.7, 0.25, &log_all(z), &old, None).loss;
    for (k, (logit, share)) in logits.iter().zip([1.0, 1.0, 3.0]).enumerate() {
        let (mut up, mut down) = (logits, logits);
        up[k] = logit + 1e-5;
        down[k] = logit - 1e-5;
        let numeric = (loss(&up) - loss(&down)) / 2e-5;
        let expected = 0.7 * 0.25 / 5.0 * (share - 5.0 * log_policy(&logits, k).exp());
        assert!((numeric - expected).abs() < 1e-7, "{numeric} is not {expected}");
    }
}

#[test]
fn the_clip_removes_the_slope_exactly_where_it_is_the_smaller_term() {
    let ratio = |r: f64, advantage: f64| {
        let got = rollout_loss(&settings(), advantage, 1.0, &[r.ln() - 1.0], &[-1.0], None);
        (got.loss, got.coefficients[0], got.clipped)
    };
    let (loss, slope, clipped) = ratio(1.3, 2.0);
    assert!((loss + 2.4).abs() < 1e-12 && slope == 0.0 && clipped == 1);
    let (loss, slope, clipped) = ratio(0.7, -2.0);
    assert!((loss - 1.6).abs() < 1e-12 && slope == 0.0 && clipped == 1);
    for (r, advantage) in [(0.7, 2.0), (1.3, -2.0), (1.1, 2.0), (0.9, -2.0)] {
        let (_, slope, clipped) = ratio(r, advantage);
        assert!(
            (slope + r * advantage).abs() < 1e-12 && clipped == 0,
            "ratio {r}, advantage {advantage}"
        );
    }
    let whole = GrpoSettings { ratio_level: RatioLevel::Sequence, ..settings() };
    let got = rollout_loss(&whole, 1.0, 1.0, &[-0.9, -0.85, -1.0], &[-1.0; 3], None);
    assert_eq!((got.clipped, got.coefficients), (3, vec![0.0; 3]));
}

#[test]
fn an_advantage_of_zero_contributes_the_kl_term_only() {
    let (new, reference) = ([-1.0, -3.0, -0.2], narrow(&[-1.5, -2.5, -0.2]));
    for ratio_level in [RatioLevel::Token, RatioLevel::Sequence] {
        let with_kl = GrpoSettings { kl_weight: 0.1, ratio_level, ..settings() };
        // The sampler's log-probabilities play no part, not even where the ratio overflows.
        let near = rollout_loss(&with_kl, 0.0, 0.5, &new, &narrow(&new), Some(&reference));
        let far = rollout_loss(&with_kl, 0.0, 0.5, &new, &[-2000.0; 3], Some(&reference));
        assert_eq!(near, far);
        assert!(near.loss.is_finite() && near.kl_sum > 0.0 && near.clipped == 0);
        assert!(near.coefficients.iter().all(|c| c.is_finite()));
        let without = GrpoSettings { kl_weight: 0.0, ..with_kl };
        let nothing = rollout_loss(&without, 0.0, 0.5, &new, &[-2000.0; 3], None);
        assert!(nothing.loss == 0.0 && nothing.coefficients.iter().all(|c| *c == 0.0));
    }
}

#[test]
fn length_norm_sets_how_much_a_token_of_a_long_reply_counts() {
    let slope = |length_norm, count: usize| {
        let settings = GrpoSettings { length_norm, ..settings() };
        rollout_loss(&settings, 1.0, 1.0, &vec![-1.0; count], &vec![-1.0; count], None).coefficients
            [0]
    };
    assert!(
        (slope(LengthNorm::PerOutput, 1) / slope(LengthNorm::PerOutput, 10) - 10.0).abs() < 1e-12
    );
    assert_eq!((slope(LengthNorm::None, 1), slope(LengthNorm::None, 10)), (-1.0, -1.0));
    assert_eq!((slope(LengthNorm::Constant, 1), slope(LengthNorm::Constant, 10)), (-0.05, -0.05));
}

#[test]
#[should_panic(expected = "trainer and sampler speak of the same tokens")]
fn a_token_after_the_end_token_cannot_enter_the_loss() {
    // The rollout's own log-probabilities end with its end token; anything longer is refused.
    rollout_loss(&settings(), 1.0, 1.0, &[-1.0, -1.0, -0.1], &[-1.0, -1.0], None);
}

#[test]
fn what_is_not_a_number_is_not_hidden() {
    for importance_limit in [None, Some(2.0)] {
        let with_kl = GrpoSettings { kl_weight: 0.1, importance_limit, ..settings() };
        let nan = |advantage: f64, new: f64, old: f32| {
            let got = rollout_loss(&with_kl, advantage, 1.0, &[new], &[old], Some(&[-1.0]));
            got.loss.is_nan() && got.coefficients[0].is_nan()
        };
        assert!(nan(f64::NAN, -1.0, -1.0) && nan(1.0, f64::NAN, -1.0) && nan(0.0, f64::NAN, -1.0));
        assert!(nan(1.0, -1.0, f32::NAN) && !nan(1.0, -1.0, -1.0));
    }
}

#[test]
fn an_empty_rollout_costs_nothing() {
    let got = rollout_loss(&settings(), 1.0, 1.0, &[], &[], None);
    assert!(got.loss == 0.0 && got.coefficients.is_empty());
}
