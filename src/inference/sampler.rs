//! How the next token of a rollout is drawn, and when a rollout ends.
//!
//! A random number depends on (seed, step, prompt, sample, position in the reply) and on nothing
//! else, so that batch mix, order and threads change no rollout.

use super::job::GenerateJob;
use crate::rl::rollout::Stop;
use rehearsal_kernels::SampleRow;
use rehearsal_kernels::random::{self, Stream};

/// How the token at `position` of a reply is drawn.
pub fn draw(job: &GenerateJob, prompt: u64, sample: u32, position: usize) -> SampleRow {
    let counters = [job.step, prompt, u64::from(sample), position as u64];
    SampleRow {
        temperature: job.temperature,
        top_p: job.top_p,
        top_k: job.top_k,
        uniform: random::uniform(job.seed, Stream::Sample, counters),
    }
}

/// Most new tokens after a prompt of `prompt_tokens`: the job's limit, or what the context has
/// left.
pub fn new_tokens_limit(job: &GenerateJob, context: usize, prompt_tokens: usize) -> usize {
    job.max_new_tokens.min(context.saturating_sub(prompt_tokens))
}

/// Why a reply of `count` tokens with this last one ends here, if it does. The end token counts
/// even as the last token that the limit allows.
pub fn ending(job: &GenerateJob, limit: usize, last: u32, count: usize) -> Option<Stop> {
    if job.stop_tokens.contains(&last) {
        Some(Stop::Eos)
    } else {
        (count >= limit).then_some(Stop::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> GenerateJob {
        GenerateJob {
            requests: Vec::new(),
            max_new_tokens: 4,
            temperature: 0.7,
            top_p: 0.9,
            top_k: 5,
            stop_tokens: vec![2, 9],
            seed: 11,
            step: 3,
            policy_version: 0,
        }
    }

    #[test]
    fn a_draw_is_a_function_of_seed_step_prompt_sample_and_position() {
        let base = draw(&job(), 5, 6, 7);
        assert_eq!(base.uniform, random::uniform(11, Stream::Sample, [3, 5, 6, 7]));
        assert_eq!((base.temperature, base.top_p, base.top_k), (0.7, 0.9, 5));
        let others = [
            draw(&GenerateJob { seed: 12, ..job() }, 5, 6, 7),
            draw(&GenerateJob { step: 4, ..job() }, 5, 6, 7),
            draw(&job(), 6, 6, 7),
            draw(&job(), 5, 7, 7),
            draw(&job(), 5, 6, 8),
            draw(&job(), 6, 5, 7),
        ];
        assert!(others.iter().all(|other| other.uniform != base.uniform));
    }

    #[test]
    fn a_reply_ends_at_a_stop_token_the_limit_or_the_end_of_the_context() {
        assert_eq!(ending(&job(), 4, 9, 1), Some(Stop::Eos));
        assert_eq!(ending(&job(), 4, 9, 4), Some(Stop::Eos));
        assert_eq!(ending(&job(), 4, 8, 3), None);
        assert_eq!(ending(&job(), 4, 8, 4), Some(Stop::Length));
        assert_eq!(new_tokens_limit(&job(), 100, 10), 4);
        assert_eq!(new_tokens_limit(&job(), 12, 10), 2);
        assert_eq!(new_tokens_limit(&job(), 12, 13), 0);
    }
}
