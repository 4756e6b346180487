//! The command line as a whole: subcommands and what they share.

use super::{bench, check, eval, export, generate, run, score, status};
use crate::config::{Fault, MOST_THREADS};
use clap::{Args, Parser, Subcommand};
use rehearsal_kernels::CpuKernels;
use std::sync::Once;

/// Pretrains, aligns and exports DeepSeek-V2 models, from one TOML.
#[derive(Debug, Parser)]
#[command(
    name = "rehearsal",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_help = "Example: from raw text to an aligned, exported model in one to five minutes on a CPU\n  \
                  rehearsal run configs/quickstart.toml\n\n\
                  Exit codes: 0 done, 2 wrong input or config, 4 too little memory or disk,\n\
                  130 or 143 stopped by a signal after a commit, 1 anything else."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a run: train, align and export a model through the stages of a TOML
    Run(run::RunArgs),
    /// Check a run's TOML or a model's config.json, and tell what it will cost
    Check(check::CheckArgs),
    /// Let a model answer prompts, or chat with it
    Generate(generate::GenerateArgs),
    /// Log-probability of every token of given texts
    Score(score::ScoreArgs),
    /// Measure a model: a verifier on its replies, or perplexity
    Eval(eval::EvalArgs),
    /// Write a model as a Hugging Face folder, or as a GGUF file for llama.cpp
    Export(export::ExportArgs),
    /// Time training, generation or alignment steps
    Bench(bench::BenchArgs),
    /// Show how a run stands
    Status(status::StatusArgs),
}

impl Cli {
    /// Does what was asked.
    pub fn execute(self) -> anyhow::Result<()> {
        CpuKernels::check_instruction_set().map_err(Fault::user)?;
        match self.command {
            Command::Run(args) => run::run(args),
            Command::Check(args) => check::run(args),
            Command::Generate(args) => generate::run(args),
            Command::Score(args) => score::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Export(args) => export::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Status(args) => status::run(args),
        }
    }
}

/// `--threads`, which every subcommand takes.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Threads {
    /// Threads of the CPU device; all cores if absent. Changes no result, only the time it takes
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
}

impl Threads {
    /// The number given on the command line.
    pub fn given(self) -> Option<usize> {
        self.threads
    }

    /// The number given, else all cores.
    pub fn count(self) -> usize {
        warned(self.given().unwrap_or_else(cores))
    }
}

/// `threads`, with one warning if they are more than the cores: they wait for each other, which changes no result.
pub fn warned(threads: usize) -> usize {
    static ONCE: Once = Once::new();
    let cores = cores();
    if threads > cores {
        ONCE.call_once(|| {
            tracing::warn!("{threads} threads on {cores} cores wait for each other; no more than {cores} make it faster");
        });
    }
    threads
}

/// `--threads`: as many as a config may have.
fn threads(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST_THREADS).contains(number));
    number.ok_or_else(|| format!("expected a whole number from 1 to {MOST_THREADS}"))
}

/// Cores that the process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_teaches_with_an_example_that_parses() {
        let command = Cli::command();
        check_examples(&command);
        for name in ["run", "check", "generate", "score", "eval", "export", "bench", "status"] {
            check_examples(command.find_subcommand(name).unwrap());
        }
    }

    /// Every line of the examples must be a command line that is taken, and short enough not to be wrapped.
    fn check_examples(command: &clap::Command) {
        let help = command
            .get_after_help()
            .unwrap_or_else(|| panic!("{} has no example", command.get_name()))
            .to_string();
        assert!(help.contains("Example:"), "{help}");
        let lines: Vec<&str> =
            help.lines().filter(|line| line.trim().starts_with("rehearsal ")).collect();
        assert!(!lines.is_empty(), "{help}");
        for line in lines {
            assert!(line.len() <= 100, "{line}");
            // No example holds a quoted quote: splitting at quotes is enough.
            let mut words: Vec<String> = Vec::new();
            for (index, part) in line.split('"').enumerate() {
                match index % 2 {
                    0 => words.extend(part.split_whitespace().map(str::to_string)),
                    _ => words.push(part.to_string()),
                }
            }
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{line}\n{error}");
            }
        }
    }

    #[test]
    fn every_subcommand_takes_threads() {
        let lines = [
            "run a.toml",
            "check a.toml",
            "generate m --prompt x",
            "score m --input f",
            "eval m --data f --metric perplexity",
            "eval m --verifier needle",
            "export m --out d",
            "bench train --model m",
            "bench generate --model m",
            "bench grpo --model m",
            "bench cache",
            "bench machine",
            "status r",
        ];
        for line in lines {
            let line = format!("rehearsal {line} --threads 3");
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        let none =
            Cli::try_parse_from(["rehearsal", "check", "a.toml", "--threads", "0"]).unwrap_err();
        assert_eq!(none.exit_code(), 2);
        let many = Cli::try_parse_from(["rehearsal", "check", "a.toml", "--threads", "65535"]);
        assert!(many.unwrap_err().to_string().contains("from 1 to 1024"));
    }

    #[test]
    fn a_negative_number_is_told_its_range_and_not_taken_for_a_flag() {
        for (line, range) in [
            ("generate m --prompt x --temperature -1", "at least 0"),
            ("generate m --prompt x --seed -1", "from 0 to 18446744073709551615"),
            ("generate m --prompt x --max-tokens -1", "at least 1"),
            ("run a.toml --seed -1", "from 0 to 18446744073709551615"),
            ("eval m --data f --verifier exact --samples -1", "at least 1"),
            ("bench train --model m --sequence -1", "at least 2"),
            ("bench train --model m --sequence 1", "at least 2"),
            ("status r --threads -1", "from 1 to 1024"),
        ] {
            let line = format!("rehearsal {line}");
            let told = Cli::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(told.contains(range) && told.contains("invalid value '"), "{line}: {told}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for line in [
            "run a.toml --resume --fresh",
            "generate m --prompt x --prompts f",
            "eval m --data f",
            "eval m --data f --verifier exact --metric perplexity",
            "eval m --verifier exact",
            "eval m --metric perplexity",
            "eval m --verifier needle --no-yarn",
            "eval m --verifier needle --depths 0,101",
            "eval m --verifier needle --lengths 64,",
            "bench generate --model m --dtype int3",
            "export m --format onnx --out d",
            "export m --format hf --dtype f16 --out d",
            "export m --format gguf --dtype q4_0 --out d",
            "eval m --data f --verifier exact --against-f32",
            "generate m --prompt x --cache-dtype 5bit",
        ] {
            let error =
                Cli::try_parse_from(format!("rehearsal {line}").split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
