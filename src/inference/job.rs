//! What a generation is asked for and what it hands out.

use crate::rl::rollout::Rollout;
use serde::{Deserialize, Serialize};

/// A prompt to sample from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Caller's number, returned with the group.
    pub slot: u32,
    /// Prompt tokens.
    pub tokens: Vec<u32>,
    /// The prompt's counter for random numbers (its line index).
    pub prompt: u64,
    /// Rollouts of this prompt.
    pub samples: u32,
}

/// Prompts to sample from, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateJob {
    /// The prompts.
    pub requests: Vec<GenerateRequest>,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus; 1 keeps all.
    pub top_p: f64,
    /// Most likely tokens kept; 0 keeps all.
    pub top_k: usize,
    /// Tokens that end a reply.
    pub stop_tokens: Vec<u32>,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Step counter of the random numbers.
    pub step: u64,
    /// The policy version that must have been packed.
    pub policy_version: u64,
}

impl GenerateJob {
    /// What one of several ranks, or groups of ranks that share sequences, samples: whole groups, the dearest first to who has least. A prompt's tokens cost as much as
    /// new ones, of which nobody knows how many there will be. Who samples a rollout changes none of its tokens.
    pub fn share(&self, ranks: usize, rank: usize) -> GenerateJob {
        let cost = |request: &GenerateRequest| {
            request.tokens.len() + request.samples as usize * self.max_new_tokens
        };
        let mut order: Vec<usize> = (0..self.requests.len()).collect();
        order.sort_by_key(|place| std::cmp::Reverse(cost(&self.requests[*place])));
        let (mut loads, mut own) = (vec![0; ranks], Vec::new());
        for place in order {
            let least = (0..ranks).min_by_key(|rank| loads[*rank]).expect("there is a rank");
            loads[least] += cost(&self.requests[place]);
            own.extend((least == rank).then_some(place));
        }
        own.sort_unstable();
        let requests = own.into_iter().map(|place| self.requests[place].clone()).collect();
        GenerateJob { requests, ..self.clone() }
    }
}

/// The finished rollouts of one request (their `text` is still empty).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenGroup {
    /// The request's slot.
    pub slot: u32,
    /// In order of `sample`.
    pub rollouts: Vec<Rollout>,
    /// Policy version that sampled them.
    pub policy_version: u64,
}

/// What a generation took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerateReport {
    /// Prompt tokens that went through the model (once per group).
    pub prompt_tokens: u64,
    /// Sampled tokens.
    pub new_tokens: u64,
    /// Seconds of the passes that took prompts in.
    pub prefill_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
    /// The passes that decoded, by their number of rows, fewest first.
    pub decode: Vec<DecodePasses>,
    /// FLOPs of one forward pass with attention expanded: each prompt once, each sampled token once.
    pub useful_flops: f64,
    /// Bytes that the passes that decoded had to read at least: weights that their rows touch, and each cached token that
    /// some row sees, a shared prompt's once.
    pub least_bytes: f64,
    /// Bytes of the weights and of the cached tokens that a pass sees at most, which decide what memory they are read from.
    pub working_bytes: f64,
    /// Most cache pages in use at once.
    pub pages_high_water: usize,
}

/// Passes that decoded equally many rows, one token each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DecodePasses {
    /// Rows of a pass.
    pub rows: u64,
    /// Passes.
    pub passes: u64,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Cached tokens that each pass saw, added up: a prompt's whole pages once for all rollouts that share them.
    pub cached_tokens: u64,
}

impl GenerateReport {
    /// Counts one pass that decoded.
    pub fn count(&mut self, rows: u64, seconds: f64, cached_tokens: u64) {
        let place = match self.decode.binary_search_by_key(&rows, |passes| passes.rows) {
            Ok(place) => place,
            Err(place) => {
                self.decode.insert(place, DecodePasses { rows, ..DecodePasses::default() });
                place
            }
        };
        let passes = &mut self.decode[place];
        passes.passes += 1;
        passes.seconds += seconds;
        passes.cached_tokens += cached_tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_groups_of_a_job_evenly_and_each_is_somebody_s() {
        let request = |slot: u32| GenerateRequest {
            slot,
            tokens: vec![1; (slot as usize * 7) % 30 + 1],
            prompt: u64::from(slot),
            samples: 1 + slot % 4,
        };
        let job = GenerateJob {
            requests: (0..23).map(request).collect(),
            max_new_tokens: 16,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            stop_tokens: Vec::new(),
            seed: 1,
            step: 0,
            policy_version: 0,
        };
        assert_eq!(job.share(1, 0), job);
        let shares: Vec<GenerateJob> = (0..4).map(|rank| job.share(4, rank)).collect();
        let mut slots: Vec<u32> = shares.iter().flat_map(|s| &s.requests).map(|r| r.slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, (0..23).collect::<Vec<u32>>());
        let load = |job: &GenerateJob| -> usize {
            job.requests.iter().map(|r| r.tokens.len() + 16 * r.samples as usize).sum()
        };
        let loads: Vec<usize> = shares.iter().map(load).collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert!(most - least <= 94, "within the dearest group: {loads:?}");
    }
}
