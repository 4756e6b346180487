//! `rehearsal generate`: replies to prompts, or a chat.

use super::command::Threads;
use super::formats::FormatArgs;
use super::open_model::{Ask, FILE, OpenModel};
use super::output::{say, say_json, say_reply};
use crate::config::Fault;
use crate::config::data::Schema;
use crate::data::chat::{Message, Role};
use crate::data::jsonl::PromptText;
use crate::rl::rollout::Rollout;
use anyhow::Result;
use clap::Args;
use serde::Serialize;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

/// Lets a model answer.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Let a model answer one prompt, a file of prompts, or, without either on a terminal, chat. A prompt \
                  is taken as it is, special tokens included; --chat wraps it in the chat template, and then its \
                  content can forge no special token. With --json each prompt gets one line, in order: text, tokens \
                  and logprobs of the new tokens, and stop (eos or length). Random numbers depend on the seed and \
                  the line's index alone, so a prompt gets the same reply in any batch.",
    after_help = "Example:\n  \
                  rehearsal generate runs/quickstart/export --chat --prompt \"swap, rotate, reverse: p u n k\"\n  \
                  rehearsal generate runs/quickstart/export --prompts some.jsonl --temperature 1 --json\n  \
                  rehearsal generate runs/quickstart/export"
)]
pub struct GenerateArgs {
    /// One of our checkpoint folders, or a Hugging Face folder of a DeepSeek-V2 model or a Llama
    pub checkpoint: PathBuf,
    /// The prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A file of prompts, one JSON object a line: {"prompt": "..."} or {"prompt": [{"role", "content"}]}
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<PathBuf>,
    /// Wrap each prompt in the chat template as the user's message
    #[arg(long)]
    pub chat: bool,
    /// Most new tokens of a reply
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token each time; log-probabilities are then those at temperature 1
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = at_least_zero)]
    pub temperature: f64,
    /// Sample among the likeliest tokens that hold this share of the probability; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    pub top_p: f64,
    /// Seed of the random numbers
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = seed)]
    pub seed: u64,
    /// One line of JSON a prompt
    #[arg(long)]
    pub json: bool,
    /// Types of weights and cache
    #[command(flatten)]
    pub formats: FormatArgs,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// A whole number of at least 1.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".to_string()),
        Ok(number) => Ok(number),
    }
}

/// A whole number of at least 2.
pub fn at_least_two(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 2);
    number.ok_or_else(|| "expected a whole number of at least 2".to_string())
}

/// A seed.
pub fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
}

/// A temperature (0 is greedy), or a weight.
pub fn at_least_zero(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_string())
}

fn share(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "expected a number above 0 and at most 1".to_string())
}

/// One line of `--json`.
#[derive(Serialize)]
struct Reply<'a> {
    text: &'a str,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    stop: crate::rl::rollout::Stop,
}

/// Generates.
pub fn run(args: GenerateArgs) -> Result<()> {
    let is_chat = args.prompt.is_none() && args.prompts.is_none();
    if is_chat && !std::io::stdin().is_terminal() {
        return Err(Fault::user(
            "no prompt: give --prompt TEXT or --prompts FILE.jsonl, or start a chat on a terminal",
        ));
    }
    let mut model = OpenModel::open(&args.checkpoint, args.threads.count())?;
    args.formats.apply(&mut model.engine)?;
    let ask = Ask {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    if is_chat {
        return chat(&mut model, ask);
    }
    let prompts = prompts(&model, &args)?;
    let (groups, _) = model.answer(&prompts, 1, &ask)?;
    for rollout in groups.iter().flat_map(|group| &group.rollouts) {
        print(rollout, args.json)?;
    }
    Ok(())
}

fn prompts(model: &OpenModel, args: &GenerateArgs) -> Result<Vec<Vec<u32>>> {
    let file = args.prompts.clone().unwrap_or_default();
    let loader = model.loader(&file, Schema::Prompts, args.chat);
    if let Some(text) = &args.prompt {
        let prompt = match args.chat {
            true => PromptText::Chat(vec![Message::new(Role::User, text)]),
            false => PromptText::Raw(text.clone()),
        };
        return Ok(vec![loader.prompt(0, &prompt, None)?.tokens]);
    }
    Ok(loader.prompts(FILE, 0)?.into_iter().map(|prompt| prompt.tokens).collect())
}

fn print(rollout: &Rollout, json: bool) -> Result<()> {
    let Rollout { text, tokens, logprobs, stop, .. } = rollout;
    if json { say_json(&Reply { text, tokens, logprobs, stop: *stop }) } else { say_reply(text) }
}

/// A conversation on the terminal, until its end (Ctrl-D) or an empty line.
fn chat(model: &mut OpenModel, ask: Ask) -> Result<()> {
    say("a line is a message; an empty line or Ctrl-D ends the chat")?;
    let mut messages = Vec::new();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        print!("> ");
        std::io::stdout().flush()?;
        let Some(line) = lines.next().transpose()?.filter(|line| !line.trim().is_empty()) else {
            return Ok(());
        };
        messages.push(Message::new(Role::User, line));
        let tokens = model.chat.encode_prompt(&model.tokenizer, &messages)?;
        // The turn is the prompt's counter, so that asking again gets another sample.
        let seed = ask.seed.wrapping_add(messages.len() as u64 / 2);
        let (groups, _) = model.answer(&[tokens], 1, &Ask { seed, ..ask })?;
        let text = groups[0].rollouts[0].text.clone();
        say_reply(&text)?;
        messages.push(Message::new(Role::Assistant, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert_eq!(at_least_one("3"), Ok(3));
        assert!(at_least_one("0").is_err() && at_least_one("-1").is_err());
        assert_eq!(at_least_zero("0"), Ok(0.0));
        assert!(
            at_least_zero("-0.1").is_err()
                && at_least_zero("nan").is_err()
                && at_least_zero("inf").is_err()
        );
        assert!(
            share("1").is_ok()
                && share("0").is_err()
                && share("1.01").is_err()
                && share("nan").is_err()
        );
    }
}
