//! `rehearsal export`: a checkpoint as a Hugging Face folder, or as one GGUF file.

use super::command::Threads;
use super::output::{grouped, say};
use crate::checkpoint::{
    ExportReport, GgufTokenizer, StoredType, export_gguf, export_hf, read_model_config,
};
use crate::config::{EndTokens, Fault};
use crate::data::chat::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use anyhow::Result;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Writes a model so that other programs load it.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Write a model so that other programs load it. --format hf: a folder with config.json, sharded \
                  safetensors with an index, tokenizer.json, tokenizer_config.json with the chat template, and \
                  generation_config.json; transformers.AutoModelForCausalLM.from_pretrained(OUT) loads it. --format \
                  gguf: one file with the tokenizer in it; llama.cpp loads it. A model that llama.cpp would compute \
                  otherwise than we do, such as one with group-limited routing, is refused with the reason. What \
                  stands at OUT and is no earlier export is not touched.",
    after_help = "Example:\n  \
                  rehearsal export runs/quickstart/stages/06-align --format hf --out my-model\n  \
                  rehearsal export runs/quickstart/export --format hf --dtype bf16 --out half-the-size\n  \
                  rehearsal export runs/quickstart/export --format gguf --dtype q8_0 --out my-model.gguf"
)]
pub struct ExportArgs {
    /// One of our checkpoint folders, or a Hugging Face folder
    pub checkpoint: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value = "hf")]
    pub format: Format,
    /// Type of the weights: f32, bf16, or q8_0 (gguf alone)
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = StoredType::parse)]
    pub dtype: StoredType,
    /// The folder to write (hf), or the file (gguf)
    #[arg(long, value_name = "OUT")]
    pub out: PathBuf,
    /// Taken by every subcommand; nothing is computed here
    #[command(flatten)]
    pub threads: Threads,
}

/// `--format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    /// Hugging Face: published names, safetensors
    Hf,
    /// One file for llama.cpp
    Gguf,
}

/// Exports.
pub fn run(args: ExportArgs) -> Result<()> {
    let report = match args.format {
        Format::Hf => export_hf(&args.checkpoint, &args.out, args.dtype)?,
        Format::Gguf => gguf(&args)?,
    };
    for note in &report.notes {
        say(&format!("note: {note}"))?;
    }
    say(&format!(
        "{}: {} parameters in {} tensors, {} file(s) of weights",
        report.out.display(),
        grouped(report.parameters),
        report.tensors,
        report.shards
    ))
}

fn gguf(args: &ExportArgs) -> Result<ExportReport> {
    let config = read_model_config(&args.checkpoint)?;
    let path = args.checkpoint.join("tokenizer.json");
    let tokenizer = Tokenizer::load(&path)?;
    let Some(split) = tokenizer.split() else {
        return Err(Fault::user(format!(
            "{}: llama.cpp has no name for its pre-tokenizer that we know, so that it would cut texts otherwise; use \
             --format hf",
            path.display()
        )));
    };
    let template = ChatTemplate::from_folder(&args.checkpoint)?;
    let facts = GgufTokenizer {
        json: tokenizer.json(),
        split,
        bos: config.bos_token_id.or(tokenizer.bos()),
        end: config.eos_token_id.as_ref().map_or_else(|| tokenizer.end(), EndTokens::first),
        pad: config.pad_token_id.unwrap_or_else(|| tokenizer.pad()),
        adds_bos: tokenizer.added_bos().is_some(),
        template: template.as_ref().map(ChatTemplate::source),
    };
    export_gguf(&args.checkpoint, &facts, &args.out, args.dtype)
}
