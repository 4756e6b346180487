//! `rehearsal status`: how a run stands, from what its Monitor wrote.

use super::command::Threads;
use super::output::{say, say_json};
use crate::console::Board;
use clap::Args;
use std::path::PathBuf;

/// Shows state, phase, memory, curves and every actor of a run, whether it is running, stopped or done.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Show how a run stands: stage and step, phase, memory by owner, curves, and of every actor its \
                  state, mailbox, last message and restarts; of a run of several processes also each rank's worker. Reads \
                  files only, so it may be asked at any time.",
    after_help = "Example:\n  rehearsal status runs/quickstart\n  rehearsal status runs/quickstart --json"
)]
pub struct StatusArgs {
    /// The run's folder
    pub run: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Taken by every subcommand; nothing is computed here
    #[command(flatten)]
    pub threads: Threads,
}

/// Prints the board.
pub fn run(args: StatusArgs) -> anyhow::Result<()> {
    let board = Board::read(&args.run)?;
    if args.json { say_json(&board) } else { say(board.to_string().trim_end()) }
}
