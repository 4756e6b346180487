//! The learning rate of a step: linear warm-up, then a shape (deepseek_v2.md section 3).

use crate::config::stage::{OptimizerConfig, Schedule};

/// Learning rate of step `step` (from 0) of `steps`, before which the share `share` of the stage's tokens was trained on.
/// Warm-up reaches the peak with step `warmup_steps`; the step-decay falls at shares of tokens, the others run over steps.
pub fn learning_rate(config: &OptimizerConfig, step: u64, steps: u64, share: f64) -> f64 {
    let peak = config.learning_rate;
    if step < config.warmup_steps {
        return peak * (step + 1) as f64 / config.warmup_steps as f64;
    }
    let after = (steps.saturating_sub(config.warmup_steps)).max(1) as f64;
    let progress = ((step - config.warmup_steps) as f64 / after).min(1.0);
    match config.schedule {
        Schedule::Constant => peak,
        Schedule::Linear => peak * (1.0 - (1.0 - config.final_share) * progress),
        Schedule::Cosine => {
            let wave = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            peak * (config.final_share + (1.0 - config.final_share) * wave)
        }
        Schedule::StepDecay => {
            let passed = config.decay_at.iter().filter(|at| share >= **at).count();
            peak * config.decay_factor.powi(passed as i32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(schedule: Schedule) -> OptimizerConfig {
        OptimizerConfig {
            learning_rate: 2.4e-4,
            warmup_steps: 2000,
            schedule,
            ..OptimizerConfig::default()
        }
    }

    #[test]
    fn the_papers_schedule_has_its_golden_values() {
        let steps = 200_000;
        let share = |step| step as f64 / steps as f64;
        let at = |step| learning_rate(&config(Schedule::StepDecay), step, steps, share(step));
        assert!((at(999) - 1.2e-4).abs() < 1e-12);
        assert!((at(2000) - 2.4e-4).abs() < 1e-12);
        assert!((at(119_999) - 2.4e-4).abs() < 1e-12);
        assert!((at(120_000) - 7.584e-5).abs() < 1e-12);
        assert!((at(180_000) - 2.396544e-5).abs() < 1e-12);
    }

    #[test]
    fn lites_thresholds_are_eighty_and_ninety_percent() {
        let config = OptimizerConfig {
            learning_rate: 4.2e-4,
            decay_at: vec![0.8, 0.9],
            schedule: Schedule::StepDecay,
            ..OptimizerConfig::default()
        };
        let shares: Vec<f64> = [0.799, 0.8, 0.9]
            .map(|share| learning_rate(&config, 500, 1000, share) / 4.2e-4)
            .to_vec();
        assert!((shares[0] - 1.0).abs() < 1e-12 && (shares[1] - 0.316).abs() < 1e-12);
        assert!((shares[2] - 0.316 * 0.316).abs() < 1e-12);
    }

    #[test]
    fn cosine_and_linear_end_at_their_share() {
        for schedule in [Schedule::Cosine, Schedule::Linear] {
            let config = config(schedule);
            assert!((learning_rate(&config, 10_000, 10_000, 1.0) - 2.4e-5).abs() < 1e-12);
            assert!((learning_rate(&config, 6_000, 10_000, 0.6) - 0.55 * 2.4e-4).abs() < 1e-9);
        }
        assert_eq!(learning_rate(&config(Schedule::Constant), 9_999, 10_000, 0.9), 2.4e-4);
    }
}
