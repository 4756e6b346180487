//! `rehearsal eval`: a verifier on a model's replies, or perplexity of texts.

use super::command::Threads;
use super::generate::{at_least_one, temperature};
use crate::config::stage::VerifierKind;
use clap::{ArgGroup, Args, ValueEnum};
use std::path::PathBuf;

/// Measures a model.
#[derive(Debug, Args)]
#[command(
    long_about = "Measure a model. With --verifier it answers the prompts of FILE ({\"prompt\", \"answer\"} per line) and \
                  a program checks the replies: exact (the whole reply), answer-line (what follows `Answer:` in the \
                  last line), number (the final number) or regex (the answer is a pattern). Greedy with --samples 1, \
                  else the mean over K samples. With --metric perplexity FILE holds texts ({\"text\"} per line).",
    after_help = "Example:\n  \
                  rehearsal eval runs/quickstart/export --data questions.jsonl --verifier answer-line\n  \
                  rehearsal eval runs/quickstart/export --data texts.jsonl --metric perplexity --json",
    group = ArgGroup::new("measure").required(true).args(["verifier", "metric"])
)]
pub struct EvalArgs {
    /// One of our checkpoint folders, or a Hugging Face folder of a DeepSeek-V2 model
    pub checkpoint: PathBuf,
    /// Prompts with answers, or texts; plain or gzip
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: PathBuf,
    /// Program that checks the replies
    #[arg(long, value_enum)]
    pub verifier: Option<Verifier>,
    /// Measure of texts
    #[arg(long, value_enum)]
    pub metric: Option<EvalMetric>,
    /// Replies to each prompt; 1 is greedy
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = at_least_one)]
    pub samples: usize,
    /// Temperature of more than one reply
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = temperature)]
    pub temperature: f64,
    /// Most new tokens of a reply
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    pub max_tokens: usize,
    /// Wrap prompts that are plain texts in the chat template
    #[arg(long)]
    pub chat: bool,
    /// Seed of the random numbers
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// `--verifier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verifier {
    /// The whole reply equals the answer
    Exact,
    /// What follows `Answer:` in the last line equals the answer
    AnswerLine,
    /// The final number equals the answer's
    Number,
    /// The reply matches the answer as a regular expression
    Regex,
}

impl From<Verifier> for VerifierKind {
    fn from(verifier: Verifier) -> VerifierKind {
        match verifier {
            Verifier::Exact => VerifierKind::Exact,
            Verifier::AnswerLine => VerifierKind::AnswerLine,
            Verifier::Number => VerifierKind::Number,
            Verifier::Regex => VerifierKind::Regex,
        }
    }
}

/// `--metric`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EvalMetric {
    /// exp of the mean negative log-probability of a token
    Perplexity,
}

/// Measures.
pub fn run(_args: EvalArgs) -> anyhow::Result<()> {
    anyhow::bail!("eval waits for the lead")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifiers_have_the_same_names_here_and_in_a_run() {
        for verifier in Verifier::value_variants() {
            let name = verifier.to_possible_value().unwrap().get_name().to_string();
            assert_eq!(VerifierKind::from(*verifier).name(), name);
        }
    }
}
