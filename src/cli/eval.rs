//! `rehearsal eval`: a verifier on a model's replies, or perplexity of texts.

use super::command::Threads;
use super::extension::Extension;
use super::formats::FormatArgs;
use super::generate::{at_least_one, at_least_zero, seed};
use super::needle::{self, NeedleArgs};
use super::open_model::{Ask, FILE, OpenModel};
use super::output::{say, say_json};
use super::perplexity;
use crate::config::Fault;
use crate::config::data::Schema;
use crate::config::stage::VerifierKind;
use crate::rl::rollout::Stop;
use crate::rl::verifiers::{check_answer, verify};
use anyhow::Result;
use clap::{ArgGroup, Args, ValueEnum};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Measures a model.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Measure a model. With --verifier it answers the prompts of FILE ({\"prompt\", \"answer\"} per line) and \
                  a program checks the replies: exact (the whole reply), answer-line (what follows `Answer:` in the \
                  last line), number (the final number) or regex (the answer is a pattern). Greedy with --samples 1, \
                  else the mean over K samples. With --verifier needle the model looks for one fact in haystacks that \
                  are made for it, and the share that it finds is shown by length and depth. With --metric perplexity \
                  FILE holds texts: {\"text\"} per line, or plain text (.txt, .txt.gz), which is cut into windows of \
                  the model's context. --dtype and --cache-dtype judge the model in fewer bits; a --cache-dtype sends \
                  texts token by token through the sampler.",
    after_help = "Example:\n  \
                  rehearsal eval runs/quickstart/export --data questions.jsonl --verifier answer-line\n  \
                  rehearsal eval runs/quickstart/export --data texts.jsonl --metric perplexity --json\n  \
                  rehearsal eval runs/quickstart/export --data a.txt --metric perplexity --dtype fp8 --against-f32\n  \
                  rehearsal eval runs/needle/export --verifier needle --lengths 64,256 --picture grid.svg\n  \
                  rehearsal eval runs/needle/stages/01-base --verifier needle --extend-to 256 --no-yarn",
    group = ArgGroup::new("measure").required(true).args(["verifier", "metric"])
)]
pub struct EvalArgs {
    /// One of our checkpoint folders, or a Hugging Face folder of a DeepSeek-V2 model or a Llama
    pub checkpoint: PathBuf,
    /// Prompts with answers, or texts; plain or gzip. Not for --verifier needle
    #[arg(long, value_name = "FILE.jsonl", required_if_eq_any = NEED_DATA)]
    pub data: Option<PathBuf>,
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
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = at_least_zero)]
    pub temperature: f64,
    /// Most new tokens of a reply
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    pub max_tokens: usize,
    /// Wrap prompts that are plain texts in the chat template
    #[arg(long)]
    pub chat: bool,
    /// Seed of the random numbers
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = seed)]
    pub seed: u64,
    /// Perplexity: judge the model in f32 too, and tell the difference and the KL divergence
    #[arg(long, conflicts_with = "verifier")]
    pub against_f32: bool,
    /// Types of weights and cache
    #[command(flatten)]
    pub formats: FormatArgs,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Positions
    #[command(flatten)]
    pub extension: Extension,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
    /// The grid
    #[command(flatten)]
    pub needle: NeedleArgs,
}

/// Measures of what a file holds.
const NEED_DATA: [(&str, &str); 5] = [
    ("verifier", "exact"),
    ("verifier", "answer-line"),
    ("verifier", "number"),
    ("verifier", "regex"),
    ("metric", "perplexity"),
];

impl EvalArgs {
    pub(super) fn data(&self) -> &Path {
        self.data.as_deref().expect("the command line asks for it with every measure of a file")
    }
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
    /// The reply begins with what a fact in a haystack says
    Needle,
}

impl Verifier {
    /// The verifier of that name in a run; needle has none, for it makes its own prompts.
    fn kind(self) -> Option<VerifierKind> {
        match self {
            Verifier::Exact => Some(VerifierKind::Exact),
            Verifier::AnswerLine => Some(VerifierKind::AnswerLine),
            Verifier::Number => Some(VerifierKind::Number),
            Verifier::Regex => Some(VerifierKind::Regex),
            Verifier::Needle => None,
        }
    }
}

/// `--metric`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EvalMetric {
    /// exp of the mean negative log-probability of a token
    Perplexity,
}

/// Stable keys of `--json` for a verifier.
#[derive(Serialize)]
struct Passes {
    pass_at_1: f64,
    pass_at_k: f64,
    samples: usize,
    prompts: usize,
    mean_tokens: f64,
}

/// Measures.
pub fn run(args: EvalArgs) -> Result<()> {
    if args.verifier == Some(Verifier::Needle) {
        return needle::run(&args);
    }
    if let Some(option) = args.needle.given() {
        return Err(Fault::user(format!("{option} is for --verifier needle; leave it out")));
    }
    let mut model =
        OpenModel::open_extended(&args.checkpoint, args.threads.count(), args.extension)?;
    args.formats.apply(&mut model.engine)?;
    match args.verifier.and_then(Verifier::kind) {
        Some(verifier) => {
            let passes = passes(&mut model, &args, verifier)?;
            if args.json {
                return say_json(&passes);
            }
            let Passes { pass_at_1, pass_at_k, samples, prompts, mean_tokens } = passes;
            say(&format!(
                "{prompts} prompts, {samples} samples each, {mean_tokens:.1} tokens a reply"
            ))?;
            let any = match samples {
                1 => String::new(),
                _ => format!(", pass@{samples} {:.1} %", 100.0 * pass_at_k),
            };
            say(&format!("pass@1 {:.1} %{any}", 100.0 * pass_at_1))
        }
        None => perplexity::run(model, &args),
    }
}

fn passes(model: &mut OpenModel, args: &EvalArgs, verifier: VerifierKind) -> Result<Passes> {
    let data = args.data();
    let loader = model.loader(data, Schema::Prompts, args.chat);
    let prompts = loader.prompts(FILE, 0)?;
    let mut answers = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let place = format!("{}:{}", data.display(), prompt.index + 1);
        let Some(answer) = &prompt.answer else {
            return Err(Fault::user(format!("{place}: there is no answer to compare with")));
        };
        check_answer(verifier, answer)
            .map_err(|reason| Fault::user(format!("{place}: {reason}")))?;
        answers.push(answer);
    }
    let temperature = if args.samples == 1 { 0.0 } else { args.temperature };
    let ask = Ask { max_tokens: args.max_tokens, temperature, top_p: 1.0, seed: args.seed };
    let tokens: Vec<Vec<u32>> = prompts.iter().map(|p| p.tokens.clone()).collect();
    let (groups, report) = model.answer(&tokens, args.samples as u32, &ask)?;
    let (mut passed, mut any) = (0, 0);
    for (group, answer) in groups.iter().zip(answers) {
        let passes = |r: &&crate::rl::rollout::Rollout| {
            verify(verifier, 0.0, &r.text, r.stop == Stop::Eos, answer).passed
        };
        let count = group.rollouts.iter().filter(passes).count();
        passed += count;
        any += usize::from(count > 0);
    }
    let replies = (prompts.len() * args.samples) as f64;
    Ok(Passes {
        pass_at_1: passed as f64 / replies,
        pass_at_k: any as f64 / prompts.len() as f64,
        samples: args.samples,
        prompts: prompts.len(),
        mean_tokens: report.new_tokens as f64 / replies,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifiers_have_the_same_names_here_and_in_a_run() {
        for verifier in Verifier::value_variants() {
            let name = verifier.to_possible_value().unwrap().get_name().to_string();
            let kind = verifier.kind().map_or("needle", VerifierKind::name);
            assert_eq!(kind, name);
        }
    }
}
