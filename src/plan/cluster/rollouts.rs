//! Rollouts of unequal lengths over the ranks, and what a pass that decodes takes.
//!
//! Lengths are spread evenly from 1 to `max_new_tokens`, in a fixed order that looks like chance; their mean is the half that
//! `estimate` takes. Ranks take neighbouring rollouts, so that those of a prompt share it where they can.

use super::load::{Load, Part};
use crate::cluster::layout::Sampling;
use crate::cluster::mesh::cut;
use crate::config::HardwareConfig;
use crate::config::stage::GrpoStage;
use crate::model::cost::{decode_flops, tensor_elements_sent};
use crate::plan::simulation::Links;
use std::ops::Range;

/// Rows of a pass, and the cached tokens that they see.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodePass {
    /// Rows.
    pub rows: usize,
    /// Tokens that all of them see together.
    pub seen: usize,
}

/// New tokens of each of `count` rollouts.
pub fn lengths(count: usize, most: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> =
        (0..count).map(|i| ((2 * i + 1) * most).div_ceil(2 * count).max(1)).collect();
    // Fisher and Yates with the numbers of a linear congruence.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for last in (1..count).rev() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        lengths.swap(last, (state >> 33) as usize % (last + 1));
    }
    lengths
}

/// The sum of [`lengths`], whatever their number.
pub fn new_tokens(count: usize, most: usize) -> usize {
    // Of a length and its mirror image one is rounded up by as much as the other lacks, unless both are whole: those are odd
    // multiples of `step` among the 2 count parts.
    let (mut divisor, mut rest) = (2 * count, most);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    let step = 2 * count / divisor.max(1);
    let whole = if step % 2 == 1 { divisor / 2 } else { 0 };
    (count * (most + 1) - whole) / 2
}

/// The passes of one rank that decodes `lengths` behind prompts of `prompt` tokens, `slots` of them at once.
pub fn decode_passes(lengths: &[usize], prompt: usize, slots: usize) -> Vec<DecodePass> {
    let mut waiting = lengths.iter();
    let mut running: Vec<[usize; 2]> = waiting.by_ref().take(slots).map(|l| [*l, 0]).collect();
    let mut passes = Vec::new();
    while !running.is_empty() {
        running.iter_mut().for_each(|[_, done]| *done += 1);
        let seen = running.iter().map(|[_, done]| prompt + done).sum();
        passes.push(DecodePass { rows: running.len(), seen });
        running.retain(|[length, done]| done < length);
        let room = slots - running.len();
        running.extend(waiting.by_ref().take(room).map(|length| [*length, 0]));
    }
    passes
}

/// The rollouts of a rank; ranks of a tensor group have the same.
pub fn rollouts_of(rank: usize, sampling: &Sampling, rollouts: usize) -> Range<usize> {
    cut(rollouts, sampling.ranks / sampling.tensor, rank / sampling.tensor)
}

/// Prompts of some neighbouring rollouts.
pub fn prompts_of(rollouts: &Range<usize>, grpo: &GrpoStage) -> usize {
    match rollouts.is_empty() {
        true => 0,
        false => (rollouts.end - 1) / grpo.group_size - rollouts.start / grpo.group_size + 1,
    }
}

/// What sampling runs on.
pub struct Sampler<'a> {
    /// Model and machine; `expert` is that of sampling.
    pub load: Load<'a>,
    /// The machine.
    pub hardware: &'a HardwareConfig,
    /// Links between ranks.
    pub links: Links,
    /// Layout.
    pub sampling: Sampling,
    /// Bytes of the sampler's copy on a rank without routed experts, and those of experts.
    pub weights: [f64; 2],
    /// Bytes of a cached token on a rank.
    pub cache: f64,
}

impl Sampler<'_> {
    fn moe_layers(&self) -> usize {
        let model = self.load.model;
        (0..model.num_hidden_layers).filter(|layer| model.is_moe(*layer)).count()
    }

    /// Ranks that go through passes together.
    pub fn group(&self) -> usize {
        self.sampling.expert.max(self.sampling.tensor)
    }

    /// Seconds of messages in a pass of so many rows, of which some have their logits wanted: tokens to experts and back,
    /// and what ranks of a tensor group gather.
    fn travel(&self, rows: f64, wanted: f64) -> f64 {
        let over = |ranks: usize, bytes: f64, times: usize| {
            let (rate, latency) = self.links.spread(&(0..ranks).collect::<Vec<_>>());
            if ranks > 1 { times as f64 * latency + bytes / rate } else { 0.0 }
        };
        let model = self.load.model;
        let tensor = self.sampling.tensor;
        let [layers, logits] = tensor_elements_sent(model, tensor);
        let gathered = (layers * rows + logits * wanted) * self.load.number_bytes();
        let (moe, gathers) = (self.moe_layers(), if model.n_shared_experts > 0 { 5 } else { 3 });
        let gathers = 4 * (model.num_hidden_layers - moe) + gathers * moe + 1;
        // Of rows that ranks share each sends its own to their experts.
        let exchanged = rows / tensor as f64 * self.load.exchange_bytes() * (2 * moe) as f64;
        over(self.sampling.expert, exchanged, 2 * moe) + over(tensor, gathered, gathers)
    }

    /// Seconds of a pass of one rank beside the others of its group, which has `group_rows` rows.
    pub fn decode(&self, pass: DecodePass, group_rows: usize) -> f64 {
        let (model, hardware) = (self.load.model, self.hardware);
        let tensor = self.sampling.tensor as f64;
        let rows = pass.rows as f64 / tensor;
        // 1. Products with weights, each kind of layer at its rate, and those with the cache.
        let moe = self.moe_layers();
        let linear = |part| self.load.flops(part, 1).linear;
        let dense_share = hardware.dense_efficiency * hardware.peak_flops;
        let dense =
            (model.num_hidden_layers - moe) as f64 * linear(Part::Dense) + linear(Part::Head);
        let own = linear(Part::Moe) - self.routed();
        let routed = self.routed() * group_rows as f64 / self.group() as f64;
        let moe_seconds =
            moe as f64 * (rows * own + routed) / (hardware.moe_efficiency * hardware.peak_flops);
        let cached =
            (decode_flops(model, 1.0) - decode_flops(model, 0.0)) * pass.seen as f64 / tensor;
        let products = (rows * dense + cached) / dense_share + moe_seconds;
        // 2. What is read: weights, of experts those that some row goes to, and the cache.
        let touched = match model.n_routed_experts {
            0 => 0.0,
            experts => {
                let share = model.num_experts_per_tok as f64 / experts as f64;
                1.0 - (1.0 - share).powi(group_rows as i32)
            }
        };
        let [others, experts] = self.weights;
        let read = others + touched * experts + self.cache * pass.seen as f64;
        products.max(read / hardware.memory_bytes_per_second)
            + self.travel(pass.rows as f64, pass.rows as f64)
    }

    /// FLOPs of a token in the routed experts of a layer.
    fn routed(&self) -> f64 {
        let model = self.load.model;
        let expert = 3 * model.hidden_size * model.moe_intermediate_size;
        2.0 * (model.num_experts_per_tok * expert) as f64
    }

    /// Seconds in which a rank takes prompts through the model.
    pub fn prefill(&self, prompts: usize, tokens: usize) -> f64 {
        let model = self.load.model;
        let of = |part| self.load.seconds(part, tokens).1;
        let layer = |layer| of(if model.is_moe(layer) { Part::Moe } else { Part::Dense });
        let token: f64 = (0..model.num_hidden_layers).map(layer).sum();
        let all = (prompts * tokens) as f64;
        let head = prompts as f64 * of(Part::Head);
        (all * token + head) / self.sampling.tensor as f64 + self.travel(all, prompts as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_spread_evenly_and_never_in_order() {
        let lengths = lengths(1024, 1024);
        let mean = lengths.iter().sum::<usize>() as f64 / 1024.0;
        assert!((mean - 512.5).abs() < 1.0, "{mean}");
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&1), Some(&1024)));
        assert!(!lengths.is_sorted() && lengths == super::lengths(1024, 1024));
        for count in [1, 2, 3, 6, 50, 128, 1000] {
            for most in [1, 2, 3, 7, 40, 64, 100, 1024] {
                let sum: usize = super::lengths(count, most).iter().sum();
                assert_eq!(new_tokens(count, most), sum, "{count} {most}");
            }
        }
        // Neighbours are unlike each other: no rank gets the long ones alone.
        let eighths: Vec<usize> = lengths.chunks(128).map(|part| part.iter().sum()).collect();
        assert!(eighths.iter().all(|sum| sum.abs_diff(65_600) < 10_000), "{eighths:?}");
    }

    #[test]
    fn every_new_token_is_decoded_once_and_slots_are_filled_again() {
        let lengths = lengths(50, 40);
        for slots in [1, 7, 50, 100] {
            let passes = decode_passes(&lengths, 10, slots);
            let rows: usize = passes.iter().map(|pass| pass.rows).sum();
            assert_eq!(rows, lengths.iter().sum::<usize>(), "{slots}");
            assert!(
                passes[0].rows == slots.min(50) && passes.is_sorted_by(|a, b| a.rows >= b.rows)
            );
            let seen: usize = passes.iter().map(|pass| pass.seen).sum();
            let each = |length: &usize| 10 * length + length * (length + 1) / 2;
            assert_eq!(seen, lengths.iter().map(each).sum::<usize>());
        }
        assert_eq!(decode_passes(&lengths, 10, 1).len(), lengths.iter().sum::<usize>());
        assert_eq!(decode_passes(&lengths, 10, 50).len(), 40);
        assert!(decode_passes(&[], 10, 4).is_empty());
    }
}
