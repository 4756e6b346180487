//! The program: parse, dispatch, and turn an error into text and exit code.

use clap::Parser;
use rehearsal::cli::failure::{exit_code, is_closed_output, is_said};
use rehearsal::cli::{Cli, Launched};
use rehearsal::console::text::visible;
use rehearsal_kernels::heap::CountingAllocator;
use std::io::Write;
use std::process::ExitCode;

/// Counts allocations, which `bench` tells.
#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    // Warnings of any floor, on the stream that is nobody's result.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
    match Cli::parse().execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_output(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be there to read it any more; and files and models have a say in the text.
            if !is_said(&error) {
                let _ = writeln!(std::io::stderr(), "error: {}", visible(&format!("{error:#}")));
            }
            let code = exit_code(&error);
            // A launcher that was asked to stop waits for nobody.
            if let Some(launched) = Launched::from_environment().filter(|_| code < 128) {
                launched.linger();
            }
            ExitCode::from(code)
        }
    }
}
