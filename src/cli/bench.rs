//! `rehearsal bench`: our own hot paths, timed on random tokens.

use super::command::Threads;
use super::generate::at_least_one;
use crate::config::Fault;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Times a hot path.
#[derive(Debug, Args)]
#[command(
    long_about = "Time training, generation or alignment steps on random tokens. --model is a checkpoint folder, or a \
                  config.json for random weights. With --json: tokens_per_second, prefill_tokens_per_second, \
                  seconds_per_step, wall_seconds, cpu_seconds, peak_rss_bytes, and what was run.",
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
    rehearsal bench grpo --model config.json --prompts 16 --group 8 --new-tokens 32 --steps 3";

/// What to time.
#[derive(Debug, Subcommand)]
pub enum BenchWhat {
    /// Optimizer steps: forward, backward, update
    #[command(after_help = EXAMPLES)]
    Train(BenchTrainArgs),
    /// Sampling with a paged latent cache
    #[command(after_help = EXAMPLES)]
    Generate(BenchGenerateArgs),
    /// Alignment steps through the actors: generate, score, update
    #[command(after_help = EXAMPLES)]
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
    /// Tokens of a sequence
    #[arg(long, value_name = "S", default_value_t = 64, value_parser = at_least_one)]
    pub sequence: usize,
    /// Timed steps; one more is made before them
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    pub steps: usize,
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
    /// Type of the weights and the cache
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
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
    #[arg(long, value_name = "G", default_value_t = 8, value_parser = at_least_one)]
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
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// 32-bit floats
    F32,
    /// 16-bit brain floats
    Bf16,
    /// 8-bit integers with scales
    Int8,
}

impl Dtype {
    /// Refuses a type that no kernel is built for.
    fn require_built(self) -> anyhow::Result<()> {
        match self {
            Dtype::F32 => Ok(()),
            Dtype::Bf16 | Dtype::Int8 => {
                let name = self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
                Err(Fault::user(format!("--dtype {name} is not built yet; use f32")))
            }
        }
    }
}

/// Times what was asked.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    if let BenchWhat::Generate(generate) = &args.what {
        generate.dtype.require_built()?;
        let (batch, samples) = (generate.batch, generate.samples_per_prompt);
        if !batch.is_multiple_of(samples) {
            return Err(Fault::user(format!(
                "--samples-per-prompt {samples} does not divide --batch {batch}; every prompt has the same number of samples"
            )));
        }
    }
    anyhow::bail!("bench waits for the lead")
}

#[cfg(test)]
mod tests {
    use super::super::failure::exit_code;
    use super::*;

    #[test]
    fn a_type_that_is_not_built_is_refused_as_the_users_fault() {
        assert!(Dtype::F32.require_built().is_ok());
        let refused = Dtype::Int8.require_built().unwrap_err();
        assert_eq!(refused.to_string(), "--dtype int8 is not built yet; use f32");
        assert_eq!(exit_code(&refused), 2);
    }
}
