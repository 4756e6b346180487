//! What `rehearsal bench` takes: one struct for each hot path, with its defaults.

use super::super::bench_cache::BenchCacheArgs;
use super::super::bench_machine::BenchMachineArgs;
use super::super::command::Threads;
use super::super::formats::FormatArgs;
use super::super::generate::{at_least_one, at_least_two, at_least_zero};
use crate::config::Dtype;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Times a hot path.
#[derive(Debug, Args)]
#[command(
    long_about = "Time training, generation or alignment steps on random tokens, or count a cache's bytes. --model is a \
                  checkpoint folder, or a config.json for random weights. With --json: tokens_per_second, prefill_tokens_per_second, \
                  decode_tokens_per_second (new tokens but each sequence's first, which the prefill draws), \
                  page_faults_per_step and heap_allocations_per_step (of all threads; of grpo, those of the step in the middle; \
                  --profile adds its own), \
                  limit_tokens_per_second (the most that the machine's measured rates allow), of grpo the rfu that a run's \
                  journal has, seconds_per_step, wall_seconds, cpu_seconds, peak_rss_bytes, what was run, and what the machine does \
                  in a second (`bench machine` alone tells that), measured after the work.",
    after_help = EXAMPLES
)]
pub struct BenchArgs {
    /// What to time
    #[command(subcommand)]
    pub what: BenchWhat,
}

const EXAMPLES: &str = "Example:\n  \
    rehearsal bench train --model config.json --batch 8 --sequence 64 --steps 20\n  \
    rehearsal bench generate --model config.json --batch 32 --prompt-tokens 16 --new-tokens 64 --json\n  \
    rehearsal bench machine --json\n  \
    rehearsal bench cache --json\n  \
    rehearsal bench grpo --model config.json --prompts 16 --group 8 --new-tokens 32 --steps 3";

/// What to time.
#[derive(Debug, Subcommand)]
pub enum BenchWhat {
    /// Optimizer steps: forward, backward, update
    #[command(after_help = EXAMPLES, allow_negative_numbers = true)]
    Train(BenchTrainArgs),
    /// Sampling with a paged latent cache
    #[command(after_help = EXAMPLES, allow_negative_numbers = true)]
    Generate(BenchGenerateArgs),
    /// What this machine does in a second: products, memory, the barrier
    #[command(after_help = EXAMPLES)]
    Machine(BenchMachineArgs),
    /// Bytes of the cache in every format, of two models; error and speed
    #[command(after_help = EXAMPLES)]
    Cache(BenchCacheArgs),
    /// Alignment steps through the actors: generate, score, update
    #[command(after_help = EXAMPLES, allow_negative_numbers = true)]
    Grpo(BenchGrpoArgs),
}

/// `bench train`.
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// A checkpoint folder, or a config.json for random weights
    #[arg(long, value_name = "M")]
    pub model: PathBuf,
    /// Sequences of a step
    #[arg(long, value_name = "B", default_value_t = 8, value_parser = at_least_one)]
    pub batch: usize,
    /// Tokens of a sequence, at least 2
    #[arg(long, value_name = "S", default_value_t = 64, value_parser = at_least_two)]
    pub sequence: usize,
    /// Timed steps; one more is made before them
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    pub steps: usize,
    /// On how many threads, and what is told
    #[command(flatten)]
    pub timing: Timing,
}

/// What timing any work asks for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Timing {
    /// A table of where the time went: operations, FLOPs, bytes, share of what the machine can do
    #[arg(long)]
    pub profile: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// `bench generate`.
#[derive(Debug, Args)]
pub struct BenchGenerateArgs {
    /// A checkpoint folder, or a config.json for random weights
    #[arg(long, value_name = "M")]
    pub model: PathBuf,
    /// Sequences in all
    #[arg(long, value_name = "B", default_value_t = 8, value_parser = at_least_one)]
    pub batch: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "P", default_value_t = 16, value_parser = at_least_one)]
    pub prompt_tokens: usize,
    /// New tokens of each sequence
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub new_tokens: usize,
    /// Sequences that share a prompt; it divides the batch
    #[arg(long, value_name = "G", default_value_t = 1, value_parser = at_least_one)]
    pub samples_per_prompt: usize,
    /// Types of weights and cache
    #[command(flatten)]
    pub formats: FormatArgs,
    /// On how many threads, and what is told
    #[command(flatten)]
    pub timing: Timing,
}

/// `bench grpo`.
#[derive(Debug, Args)]
pub struct BenchGrpoArgs {
    /// A checkpoint folder, or a config.json for random weights
    #[arg(long, value_name = "M")]
    pub model: PathBuf,
    /// Prompts of a step
    #[arg(long, value_name = "Q", default_value_t = 4, value_parser = at_least_one)]
    pub prompts: usize,
    /// Rollouts of a prompt, at least 2
    #[arg(long, value_name = "G", default_value_t = 8, value_parser = at_least_two)]
    pub group: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "P", default_value_t = 16, value_parser = at_least_one)]
    pub prompt_tokens: usize,
    /// Most new tokens of a rollout
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    pub new_tokens: usize,
    /// Timed steps
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = at_least_one)]
    pub steps: usize,
    /// Weight of the KL term; 0 has no reference model
    #[arg(long, value_name = "W", default_value_t = 0.01, value_parser = at_least_zero)]
    pub kl_weight: f64,
    /// Groups whose rewards are made equal, so that their advantages are zero
    #[arg(long, value_name = "Z", default_value_t = 0)]
    pub equal_rewards: usize,
    /// Whether rollouts share their prompt in training
    #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set)]
    pub share_prompts: bool,
    /// Whether the sampler's log-probabilities are the trainer's to the bit
    #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set)]
    pub exact: bool,
    /// Type of the policy's weights while rollouts are sampled; other than f32 they have importance weights
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub rollout_dtype: Dtype,
    /// On how many threads, and what is told
    #[command(flatten)]
    pub timing: Timing,
}
