//! The rollouts of a GRPO step: which are trained on, how they are packed, and their loss.
//!
//! Knows no reward and no optimizer. The step's atom is a part: one prompt with all replies of its group, which then
//! goes through the model once for all of them; or, where prompts are not shared, with one reply.
//!
//! What needs no computing is left out. Without a KL term a group whose advantages are all zero adds exact zeros to the
//! gradient; so does the last token of a reply, which predicts nothing. A balance loss applies to both and is a mean over
//! documents that are whole rollouts: under one, every rollout is a part with all its tokens.
//!
//! Invariants:
//!   * means are taken over all rollouts of the step, so that what is left out changes no bit of the gradient
//!   * the split into micro-batches is one into parts: nothing but `share_prompts` moves the gradient's last bits

use super::objective::{Micro, Tally};
use crate::config::ModelConfig;
use crate::config::routing::Balance;
use crate::model::cost::forward_flops;
use crate::model::{Family, places};
use crate::rl::grpo::{GrpoSettings, rollout_loss};
use crate::rl::rollout::{Rollout, ScoredGroup};
use rehearsal_kernels::OutOfMemory;
use std::ops::Range;

/// The rollouts of a step.
pub struct Rollouts<'a> {
    settings: &'a GrpoSettings,
    parts: Vec<Part<'a>>,
    /// The groups that the parts are of.
    taught: Vec<&'a ScoredGroup>,
    /// Whether the last tokens of replies go through the model too.
    is_balanced: bool,
    /// Rollouts of the step, those that are left out among them.
    all: usize,
}

/// A prompt and the replies that share it.
struct Part<'a> {
    prompt: &'a [u32],
    replies: Vec<Reply<'a>>,
}

/// A rollout with what its loss needs.
struct Reply<'a> {
    rollout: &'a Rollout,
    /// The tokens that go through the model.
    tokens: &'a [u32],
    advantage: f64,
    reference: Option<&'a [f32]>,
}

impl<'a> Rollouts<'a> {
    /// The rollouts of scored groups, for a step with these balance losses.
    pub fn new(
        groups: &'a [ScoredGroup],
        settings: &'a GrpoSettings,
        share_prompts: bool,
        balance: &Balance,
    ) -> Rollouts<'a> {
        let is_balanced = *balance != Balance::NONE;
        let teaches = |scored: &&ScoredGroup| {
            is_balanced
                || settings.kl_weight != 0.0
                || scored.advantages.iter().any(|advantage| *advantage != 0.0)
        };
        let part = |scored: &'a ScoredGroup| {
            let reply = |(i, rollout): (usize, &'a Rollout)| Reply {
                rollout,
                tokens: match is_balanced {
                    true => &rollout.tokens,
                    false => &rollout.tokens[..rollout.tokens.len().saturating_sub(1)],
                },
                advantage: scored.advantages[i],
                reference: scored.reference.get(i).map(Vec::as_slice),
            };
            let replies = scored.group.rollouts.iter().enumerate().map(reply);
            Part { prompt: &scored.group.prompt.tokens, replies: replies.collect() }
        };
        let split = |part: Part<'a>| -> Vec<Part<'a>> {
            if share_prompts && !is_balanced {
                return vec![part];
            }
            let alone = |reply| Part { prompt: part.prompt, replies: vec![reply] };
            part.replies.into_iter().map(alone).collect()
        };
        Rollouts {
            settings,
            parts: groups.iter().filter(teaches).map(part).flat_map(split).collect(),
            taught: groups.iter().filter(teaches).collect(),
            is_balanced,
            all: groups.iter().map(|scored| scored.group.rollouts.len()).sum(),
        }
    }

    /// Number of parts.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// True if nothing is trained on.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Rollouts that are trained on.
    pub fn trained(&self) -> usize {
        self.parts.iter().map(|part| part.replies.len()).sum()
    }

    /// Most rollouts of a part; at least 1.
    pub fn largest(&self) -> usize {
        self.parts.iter().map(|part| part.replies.len()).max().unwrap_or(0).max(1)
    }

    /// The share of the step's rollouts that are trained on.
    pub fn trained_share(&self) -> f64 {
        self.trained() as f64 / self.all.max(1) as f64
    }

    /// True if their tokens have importance weights.
    pub fn are_weighted(&self) -> bool {
        self.settings.importance_limit.is_some()
    }

    /// Tokens of the rollouts that are trained on, each with its prompt.
    pub fn tokens(&self) -> usize {
        let whole = |part: &Part<'_>| -> usize {
            part.replies.iter().map(|reply| part.prompt.len() + reply.rollout.tokens.len()).sum()
        };
        self.parts.iter().map(whole).sum()
    }

    /// Rows that cannot be done without: of each group that is trained on its prompt once, and of each reply all tokens
    /// but the last, which predicts nothing (a balance loss looks at it all the same).
    pub fn unique_rows(&self) -> usize {
        let own = |rollout: &Rollout| match self.is_balanced {
            true => rollout.tokens.len(),
            false => rollout.tokens.len().saturating_sub(1),
        };
        let of_group = |scored: &&ScoredGroup| {
            let group = &scored.group;
            group.prompt.tokens.len() + group.rollouts.iter().map(own).sum::<usize>()
        };
        self.taught.iter().map(of_group).sum()
    }

    /// FLOPs of a forward pass over the groups that are trained on: each prompt once, each reply behind it.
    pub fn forward_flops(&self, model: &ModelConfig) -> f64 {
        let of_group = |scored: &&ScoredGroup| {
            let prompt = scored.group.prompt.tokens.len();
            let reply = |rollout: &Rollout| forward_flops(model, prompt, rollout.tokens.len());
            forward_flops(model, 0, prompt) + scored.group.rollouts.iter().map(reply).sum::<f64>()
        };
        self.taught.iter().map(of_group).sum()
    }

    /// Some parts, in the order in which they are packed.
    pub fn families(&self, range: Range<usize>) -> Vec<Family<'a>> {
        let family = |part: &Part<'a>| Family {
            stem: part.prompt,
            branches: part.replies.iter().map(|reply| reply.tokens).collect(),
        };
        self.parts[range].iter().map(family).collect()
    }

    /// Adds the loss and the gradients of some parts.
    pub fn evaluate(
        &self,
        range: Range<usize>,
        micro: &mut Micro<'_>,
        tally: &mut Tally,
    ) -> Result<(), OutOfMemory> {
        let (rows, targets) = self.wanted(range.clone());
        let output = micro.logprobs(&rows, &targets, self.settings.temperature)?;
        let scale = 1.0 / self.all as f64;
        let (mut coefficients, mut next) = (Vec::with_capacity(rows.len()), 0);
        for reply in self.parts[range].iter().flat_map(|part| &part.replies) {
            let own = next..next + reply.rollout.tokens.len();
            next = own.end;
            let new = &output.logprobs[own.clone()];
            let token_loss = rollout_loss(
                self.settings,
                reply.advantage,
                scale,
                new,
                &reply.rollout.logprobs,
                reply.reference,
            );
            tally.add(&token_loss, new, &output.entropies[own], &reply.rollout.logprobs);
            coefficients.extend(token_loss.coefficients);
        }
        micro.backward_logprobs(output, &coefficients)
    }

    /// Hidden rows and the tokens that follow them: a reply's first token follows the prompt's last row.
    fn wanted(&self, range: Range<usize>) -> (Vec<u32>, Vec<u32>) {
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        let replies = self.parts[range.clone()].iter().flat_map(|part| &part.replies);
        for (reply, place) in replies.zip(places(&self.families(range))) {
            let new = &reply.rollout.tokens;
            rows.extend((0..new.len()).map(|index| place.before(index)));
            targets.extend_from_slice(new);
        }
        (rows, targets)
    }
}
