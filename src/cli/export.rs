//! `rehearsal export`: a checkpoint as a Hugging Face folder.

use super::command::Threads;
use super::output::{grouped, say};
use crate::checkpoint::export_hf;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Writes a model as a folder that other programs load.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Write a model as a Hugging Face folder: config.json, sharded safetensors with an index, \
                  tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json. \
                  transformers.AutoModelForCausalLM.from_pretrained(DIR) loads it. An existing folder that \
                  holds something else is not touched.",
    after_help = "Example:\n  rehearsal export runs/quickstart/stages/06-align --format hf --out my-model"
)]
pub struct ExportArgs {
    /// One of our checkpoint folders, or a Hugging Face folder
    pub checkpoint: PathBuf,
    /// Layout of the folder
    #[arg(long, value_enum, default_value = "hf")]
    pub format: Format,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
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
}

/// Exports.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    let Format::Hf = args.format;
    let report = export_hf(&args.checkpoint, &args.out)?;
    for note in &report.notes {
        say(&format!("note: {note}"))?;
    }
    say(&format!(
        "{}: {} parameters in {} tensors, {} file(s) of weights",
        report.folder.display(),
        grouped(report.parameters),
        report.tensors,
        report.shards
    ))
}
