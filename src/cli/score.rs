//! `rehearsal score`: log-probability of every token of given texts.

use super::command::Threads;
use super::formats::{CacheDtype, FormatArgs};
use super::open_model::OpenModel;
use super::output::{say, say_json};
use crate::config::{Fault, ModelConfig};
use crate::data::lines::Lines;
use crate::data::tokenizer::Tokenizer;
use crate::engine::phase::{Phase, Role, ScoreJob, SequenceScore};
use anyhow::Result;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Scores texts.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Log-probability of every token of given texts or token ids, through the training forward pass; with \
                  --decode token by token through the sampler's cached path, which must agree. Input lines are \
                  {\"text\": \"...\"} or {\"tokens\": [...]}; output lines are {\"tokens\": [...], \"logprobs\": [null, ...]}, \
                  ids verbatim. A text gets a beginning-of-sequence token only if the tokenizer adds one.",
    after_help = "Example:\n  rehearsal score runs/quickstart/export --input texts.jsonl --json\n  \
                  rehearsal score runs/quickstart/export --input texts.jsonl --json --decode"
)]
pub struct ScoreArgs {
    /// One of our checkpoint folders, or a Hugging Face folder of a DeepSeek-V2 model or a Llama
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
    /// Types of weights and cache
    #[command(flatten)]
    pub formats: FormatArgs,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// One line of the input.
#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    Tokens { tokens: Vec<u32> },
    Text { text: String },
}

/// One line of `--json`.
#[derive(Serialize)]
struct Scored<'a> {
    tokens: &'a [u32],
    /// `None` for the first token: nothing stands before it.
    logprobs: Vec<Option<f32>>,
}

/// Scores.
pub fn run(args: ScoreArgs) -> Result<()> {
    let cache = args.formats.cache_dtype;
    if cache != CacheDtype::F32 && !args.decode {
        let name = cache.name();
        return Err(Fault::user(format!(
            "--cache-dtype {name} needs --decode: without it the texts go through no cache"
        )));
    }
    let mut model = OpenModel::open(&args.checkpoint, args.threads.count())?;
    args.formats.apply(&mut model.engine)?;
    let sequences = read(&args.input, &model.tokenizer, &model.config)?;
    let logprobs = if args.decode {
        decode(&mut model, &sequences)?
    } else {
        forward(&mut model, &sequences)?
    };
    let (mut total, mut count) = (0.0, 0);
    for (tokens, own) in sequences.iter().zip(&logprobs) {
        let sum: f64 = own.iter().map(|l| f64::from(*l)).sum();
        total += sum;
        count += own.len();
        if args.json {
            let logprobs = std::iter::once(None).chain(own.iter().copied().map(Some)).collect();
            say_json(&Scored { tokens, logprobs })?;
        } else {
            say(&format!(
                "{} tokens, mean log-probability {:.4}",
                tokens.len(),
                sum / own.len().max(1) as f64
            ))?;
        }
    }
    match args.json {
        true => Ok(()),
        false => say(&format!("mean over {count} tokens: {:.4}", total / count.max(1) as f64)),
    }
}

fn read(path: &Path, tokenizer: &Tokenizer, model: &ModelConfig) -> Result<Vec<Vec<u32>>> {
    let mut lines = Lines::open(path)?;
    let mut sequences = Vec::new();
    while let Some(line) = lines.next().transpose()? {
        let wanted = "expected {\"text\": \"...\"} or {\"tokens\": [...]}";
        let input: Input =
            serde_json::from_str(&line.text).map_err(|_| lines.fault(line.index, wanted))?;
        let tokens = match input {
            Input::Tokens { tokens } => tokens,
            Input::Text { text } => {
                tokenizer.added_bos().into_iter().chain(tokenizer.encode_text(&text)).collect()
            }
        };
        check(&tokens, model).map_err(|reason| lines.fault(line.index, &reason))?;
        sequences.push(tokens);
    }
    Ok(sequences)
}

/// Says why a model cannot score a sequence.
fn check(tokens: &[u32], model: &ModelConfig) -> Result<(), String> {
    let (count, context, rows) = (tokens.len(), model.max_position_embeddings, model.vocab_size);
    if tokens.is_empty() {
        return Err("there is no token to score".to_string());
    }
    if count > context {
        return Err(format!(
            "{count} tokens are more than the model's context of {context}; shorten the line"
        ));
    }
    match tokens.iter().find(|token| **token as usize >= rows) {
        Some(token) => {
            Err(format!("token id {token} is beyond the vocabulary, whose last is {}", rows - 1))
        }
        None => Ok(()),
    }
}

fn forward(model: &mut OpenModel, sequences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    model.engine.enter_phase(Phase::Score)?;
    let first = vec![1; sequences.len()];
    let job =
        ScoreJob { role: Role::Policy, sequences: sequences.to_vec(), temperature: 1.0, first };
    let logprobs = |score| match score {
        SequenceScore::Logprobs(logprobs) => logprobs,
        SequenceScore::Reward(_) => unreachable!("a policy gives log-probabilities"),
    };
    Ok(model.engine.score(&job)?.into_iter().map(logprobs).collect())
}

fn decode(model: &mut OpenModel, sequences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    model.engine.enter_phase(Phase::Generate)?;
    model.engine.score_decoded(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_model;

    #[test]
    fn what_a_model_cannot_score_is_told() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/smoke.json");
        let model = load_model(&path).unwrap();
        assert_eq!(check(&[0, 287], &model), Ok(()));
        assert!(check(&[], &model).unwrap_err().contains("no token"));
        assert!(
            check(&[1; 129], &model)
                .unwrap_err()
                .contains("129 tokens are more than the model's context of 128")
        );
        assert!(check(&[288], &model).unwrap_err().contains("token id 288 is beyond"));
    }
}
