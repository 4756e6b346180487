//! The most tokens a second that a machine's measured rates allow: what speeds are to be seen beside.
//!
//! A pass takes as long as its products at the measured rate or as reading what it must read at the measured bandwidth,
//! whichever is longer, and nothing else: no norms, no softmax, no optimizer, no waiting. Training is counted by its
//! products alone. Prompts go through once, in expanded form; decoded tokens are absorbed.

use crate::config::{Dtype, EngineConfig, ModelConfig};
use crate::engine::{Machine, weight_format};
use crate::model::cost::{decode_flops, forward_flops, weights_read};
use crate::model::flops_per_token;

/// Sequences to be sampled, all of one length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Prompts.
    pub prompts: usize,
    /// Sequences of each.
    pub samples: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// New tokens of a sequence, at least 1.
    pub new_tokens: usize,
    /// Sequences that decode together at most.
    pub decode_batch: usize,
    /// Bytes of a weight.
    pub weight_bytes: f64,
    /// Bytes of a cached token over all layers.
    pub cache_bytes: f64,
    /// Whether products are of 8-bit integers.
    pub integers: bool,
}

impl Sampling {
    /// Prompts, samples of each, tokens of a prompt and new tokens, from weights of `dtype` with a cache of so many bytes a
    /// token, as many at once as decode where nobody says how many.
    pub fn new(
        [prompts, samples, prompt_tokens, new_tokens]: [usize; 4],
        dtype: Dtype,
        cache_bytes: f64,
    ) -> Sampling {
        Sampling {
            prompts,
            samples,
            prompt_tokens,
            new_tokens,
            decode_batch: EngineConfig::default().decode_batch,
            weight_bytes: weight_format(dtype).code_bytes() as f64,
            cache_bytes,
            integers: dtype == Dtype::Int8,
        }
    }

    /// Tokens that are drawn.
    pub fn new_tokens(&self) -> f64 {
        (self.prompts * self.samples * self.new_tokens) as f64
    }

    /// Fewest seconds.
    pub fn seconds(&self, model: &ModelConfig, machine: &Machine) -> f64 {
        let rates = &machine.all_threads;
        let products =
            if self.integers { rates.int8_ops_per_second } else { rates.f32_flops_per_second };
        let sequences = self.prompts * self.samples;
        let rows = sequences.min(self.decode_batch).max(1);
        let longest = |flops: f64, bytes: f64, working: f64| {
            (flops / products).max(bytes / machine.bandwidth(working))
        };
        let prompt_rows = self.prompts * self.prompt_tokens;
        let weights = self.weight_bytes * weights_read(model, prompt_rows);
        let prompts = self.prompts as f64 * forward_flops(model, 0, self.prompt_tokens);
        let prefill = longest(prompts, weights, weights);
        let weights = self.weight_bytes * weights_read(model, rows);
        // The first token is drawn where the prompt ends; number t goes through beside the prompt and t others.
        let pass = |t: usize| {
            let flops = rows as f64 * decode_flops(model, (self.prompt_tokens + t) as f64);
            let shared = rows as f64 / self.samples as f64 * self.prompt_tokens as f64;
            let bytes = weights + self.cache_bytes * (shared + (rows * t) as f64);
            longest(flops, bytes, bytes)
        };
        let decode: f64 = (1..self.new_tokens).map(pass).sum();
        prefill + decode * sequences as f64 / rows as f64
    }
}

/// Most tokens a second in training on sequences of so many tokens.
pub fn training(model: &ModelConfig, sequence: usize, machine: &Machine) -> f64 {
    machine.all_threads.f32_flops_per_second / flops_per_token(model, sequence)
}

/// Fewest seconds of a GRPO step that samples so, trains on that share of the groups once, and scores all rollouts with
/// `references` other models.
pub fn alignment(
    model: &ModelConfig,
    sampling: &Sampling,
    trained_share: f64,
    references: usize,
    machine: &Machine,
) -> f64 {
    let Sampling { prompts, samples, prompt_tokens, new_tokens, .. } = *sampling;
    let group = forward_flops(model, 0, prompt_tokens)
        + samples as f64 * forward_flops(model, prompt_tokens, new_tokens);
    let passes = prompts as f64 * (3.0 * trained_share + references as f64);
    sampling.seconds(model, machine) + passes * group / machine.all_threads.f32_flops_per_second
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Rates;
    use crate::model::parameters::tests::preset;

    fn machine(flops: f64, bytes: f64) -> Machine {
        let all_threads = Rates {
            threads: 1,
            f32_flops_per_second: flops,
            int8_ops_per_second: 4.0 * flops,
            l2_bytes_per_second: bytes,
            l3_bytes_per_second: bytes,
            ..Rates::default()
        };
        Machine { all_threads, ..Machine::default() }
    }

    const SAMPLING: Sampling = Sampling {
        prompts: 2,
        samples: 4,
        prompt_tokens: 16,
        new_tokens: 3,
        decode_batch: 64,
        weight_bytes: 4.0,
        cache_bytes: 768.0,
        integers: false,
    };

    #[test]
    fn a_slow_processor_is_bound_by_its_products_and_integers_are_four_times_as_fast() {
        let (model, slow) = (preset("quickstart.json"), machine(1e6, 1e30));
        let by_hand = (2.0 * forward_flops(&model, 0, 16)
            + 8.0 * (decode_flops(&model, 17.0) + decode_flops(&model, 18.0)))
            / 1e6;
        let close = |found: f64, wanted: f64| {
            assert!((found / wanted - 1.0).abs() < 1e-12, "{found} {wanted}")
        };
        close(SAMPLING.seconds(&model, &slow), by_hand);
        close(Sampling { integers: true, ..SAMPLING }.seconds(&model, &slow), by_hand / 4.0);
        // Four at a time are twice as many passes of half the rows: the same products.
        close(Sampling { decode_batch: 4, ..SAMPLING }.seconds(&model, &slow), by_hand);
        let group = forward_flops(&model, 0, 16) + 4.0 * forward_flops(&model, 16, 3);
        close(alignment(&model, &SAMPLING, 1.0, 0, &slow), by_hand + 6.0 * group / 1e6);
        close(alignment(&model, &SAMPLING, 0.5, 1, &slow), by_hand + 5.0 * group / 1e6);
        close(training(&model, 64, &slow), 1e6 / flops_per_token(&model, 64));
    }

    #[test]
    fn a_slow_memory_is_bound_by_weights_and_a_prompt_that_is_read_once_for_its_group() {
        let (model, slow) = (preset("quickstart.json"), machine(1e30, 1e6));
        let decoded = |t: f64| 4.0 * weights_read(&model, 8) + 768.0 * (2.0 * 16.0 + 8.0 * t);
        let by_hand = (4.0 * weights_read(&model, 32) + decoded(1.0) + decoded(2.0)) / 1e6;
        let found = SAMPLING.seconds(&model, &slow);
        assert!((found / by_hand - 1.0).abs() < 1e-12, "{found} {by_hand}");
    }
}
