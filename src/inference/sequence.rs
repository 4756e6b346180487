//! One rollout in the making, and the prompt that it shares with its group.
//!
//! Knows its tokens and its pages; when it runs is the scheduler's business.
//!
//! Invariants:
//!   * `tokens` are `cached` minus the prompt's tokens, plus one: the last token is not in the
//!     cache yet
//!   * a sequence writes only to its own pages; the `shared` ones hold nothing but whole pages of
//!     the prompt

use crate::rl::rollout::{Rollout, Stop};
use rehearsal_kernels::Sampled;

/// A prompt in the cache, held for those of its rollouts that have not started.
#[derive(Debug)]
pub struct PromptGroup {
    /// Pages of the prompt; empty once the last rollout has started.
    pub pages: Vec<u32>,
    /// Prompt tokens that are in the cache.
    pub prefilled: usize,
    /// Rollouts that have neither started nor ended.
    pub unstarted: usize,
    /// Most pages that one of them takes beyond the prompt's.
    pub growth: usize,
    /// Finished rollouts by sample.
    pub rollouts: Vec<Option<Rollout>>,
}

impl PromptGroup {
    /// All rollouts in order, once the last one has ended.
    pub fn complete(&mut self) -> Option<Vec<Rollout>> {
        let is_complete = self.rollouts.iter().all(Option::is_some);
        is_complete.then(|| self.rollouts.drain(..).flatten().collect())
    }
}

/// A rollout whose first token is drawn.
#[derive(Debug)]
pub struct Sequence {
    /// Index of its request in the job.
    pub request: usize,
    /// Index in its group.
    pub sample: u32,
    /// New tokens.
    pub tokens: Vec<u32>,
    /// Their log-probabilities.
    pub logprobs: Vec<f32>,
    /// Most new tokens.
    pub limit: usize,
    /// Pages in order of position; empty until it starts.
    pub pages: Vec<u32>,
    /// Tokens in the cache.
    pub cached: usize,
    /// Leading pages that hold whole pages of the prompt.
    pub shared: usize,
    /// Pages after those that nobody else holds.
    pub own: usize,
    /// Pages of the longest reply, the shared ones included.
    pub most_pages: usize,
}

impl Sequence {
    /// Pages that it may still take; a page that it holds with others counts, for it may have to
    /// copy it.
    pub fn need(&self) -> usize {
        self.most_pages - self.shared - self.own
    }

    /// Adds a drawn token.
    pub fn push(&mut self, sampled: &Sampled) {
        self.tokens.push(sampled.token);
        self.logprobs.push(sampled.logprob as f32);
    }

    /// The token that goes through the model next.
    pub fn last(&self) -> u32 {
        *self.tokens.last().expect("a sequence begins with its first token")
    }

    /// The finished rollout.
    pub fn finish(self, stop: Stop) -> Rollout {
        let Sequence { sample, tokens, logprobs, .. } = self;
        Rollout { sample, tokens, logprobs, stop, text: String::new() }
    }
}
