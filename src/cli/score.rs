//! `rehearsal score`: log-probability of every token of given texts.

use super::command::Threads;
use clap::Args;
use std::path::PathBuf;

/// Scores texts.
#[derive(Debug, Args)]
#[command(
    long_about = "Log-probability of every token of given texts or token ids, through the training forward pass; with \
                  --decode token by token through the sampler's cached path, which must agree. Input lines are \
                  {\"text\": \"...\"} or {\"tokens\": [...]}; output lines are {\"tokens\": [...], \"logprobs\": [null, ...]}, \
                  ids verbatim. A text gets a beginning-of-sequence token only if the tokenizer adds one.",
    after_help = "Example:\n  rehearsal score runs/quickstart/export --input texts.jsonl --json\n  \
                  rehearsal score runs/quickstart/export --input texts.jsonl --json --decode"
)]
pub struct ScoreArgs {
    /// One of our checkpoint folders, or a Hugging Face folder of a DeepSeek-V2 model
    pub checkpoint: PathBuf,
    /// Texts or token ids, one JSON object a line
    #[arg(long, value_name = "FILE.jsonl")]
    pub input: PathBuf,
    /// Through the sampler's cached path, one token at a time
    #[arg(long)]
    pub decode: bool,
    /// One line of JSON a text; without it, the mean per text and over all
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// Scores.
pub fn run(_args: ScoreArgs) -> anyhow::Result<()> {
    anyhow::bail!("score waits for the lead")
}
