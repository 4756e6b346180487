//! What a person says: the command line, one file for each subcommand.
//!
//! A subcommand parses, calls the floors below, and prints. How an error becomes text and exit code is
//! in [`failure`] alone.

pub mod command;
pub mod failure;
mod output;

// Before a run, and a run.
mod backend;
pub mod check;
mod check_report;
mod launch;
mod machine;
#[cfg(any(test, feature = "mpi"))]
mod presence;
mod ranks;
pub mod run;
pub mod run_folder;
pub mod status;

// A checkpoint in use.
mod extension;
mod open_model;

pub mod eval;
pub mod export;
pub mod formats;
pub mod generate;
mod needle;
mod perplexity;
pub mod score;

// Speed.
pub mod bench;
pub mod bench_cache;
pub mod bench_machine;
mod profile;
mod stopwatch;

pub use command::Cli;
pub use launch::Launched;

/// `configs/smoke.toml` with what `--set` says, for tests.
#[cfg(test)]
fn loaded(set: &[&str]) -> crate::config::Loaded {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml");
    let set: Vec<String> = set.iter().map(|assignment| assignment.to_string()).collect();
    crate::config::RunConfig::load(&path, &set).unwrap()
}
