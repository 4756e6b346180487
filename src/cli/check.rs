//! `rehearsal check`: resolves and validates a run or a model without training, and tells what it will cost.

use super::check_report::CheckReport;
use super::command::{Threads, cores};
use super::output::{say, say_json};
use crate::checkpoint::TensorFolder;
use crate::config::{ConfigError, Fault, Loaded, RunConfig, load_model};
use crate::data::{Tokenizer, check_set};
use crate::engine::resident::check_weights;
use crate::model::Layout;
use anyhow::Result;
use clap::Args;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Checks a run or a model.
#[derive(Debug, Args)]
#[command(
    long_about = "Check a run's TOML or a model's config.json without training anything: unknown keys (with the nearest \
                  known one), wrong types, rules across tables, and every data file line by line. Then tell what it \
                  will cost: parameters, tensors, memory by phase, tokens, disk and time. A fault ends with exit code \
                  2 and its place as file:line:column.",
    after_help = "Example:\n  rehearsal check configs/quickstart.toml\n  \
                  rehearsal check configs/quickstart.toml --set stage.solve.steps=100 --plan-only\n  \
                  rehearsal check configs/model/deepseek-v2.json --json"
)]
pub struct CheckArgs {
    /// A run's TOML, or a model's config.json
    #[arg(value_name = "RUN.toml|MODEL.json")]
    pub file: PathBuf,
    /// Set a key of the TOML; stage.NAME.key addresses a stage. May be given more than once
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Read no data file
    #[arg(long)]
    pub plan_only: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Threads that the estimated time is for
    #[command(flatten)]
    pub threads: Threads,
}

/// Checks and reports.
pub fn run(args: CheckArgs) -> Result<()> {
    let report = report(&args)?;
    if args.json {
        return say_json(&report);
    }
    say(report.to_string().trim_end())?;
    say(&format!("devices: {}", devices(args.threads.count())))
}

/// What this build finds to compute on.
fn devices(threads: usize) -> String {
    #[cfg(feature = "cuda")]
    let cuda = match rehearsal_kernels::cuda::devices() {
        Ok(count) => format!("cuda {count} (only the seam's three kernels are built)"),
        Err(reason) => reason,
    };
    #[cfg(not(feature = "cuda"))]
    let cuda = "no cuda in this build";
    format!("cpu with {threads} threads; {cuda}")
}

fn report(args: &CheckArgs) -> Result<CheckReport> {
    if is_model(&args.file) {
        if let Some(assignment) = args.set.first() {
            return Err(Fault::user(format!(
                "--set {assignment}: a model's config.json takes no --set; edit the file"
            )));
        }
        return Ok(CheckReport::of_model(&args.file, &load_model(&args.file)?));
    }
    let loaded = RunConfig::load(&args.file, &args.set)?;
    let lines = if args.plan_only { BTreeMap::new() } else { check_files(&loaded)? };
    let configured = Some(loaded.config.engine.threads).filter(|threads| *threads > 0);
    let threads = args.threads.given().or(configured).unwrap_or_else(cores);
    Ok(CheckReport::of_run(&loaded, lines, threads)?)
}

/// True for JSON: by its extension, or by its first character if it has another.
fn is_model(file: &Path) -> bool {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => true,
        Some("toml") => false,
        _ => std::fs::read_to_string(file).is_ok_and(|text| text.trim_start().starts_with('{')),
    }
}

/// Reads every file that a run names, in its schema; returns the examples of each data set.
pub fn check_files(loaded: &Loaded) -> Result<BTreeMap<String, u64>> {
    check_tokenizer(loaded)?;
    check_starts(loaded)?;
    if let Some(machine) = &loaded.config.data.word_machine {
        must_be_file(
            loaded,
            &["data", "word_machine", "words"],
            "data.word_machine.words",
            &machine.words,
        )?;
    }
    let mut lines = BTreeMap::new();
    for (name, set) in
        loaded.config.data.sets.iter().filter(|(_, set)| !set.file.starts_with("run:"))
    {
        must_be_file(
            loaded,
            &["data", "sets", name, "file"],
            &format!("data.sets.{name}.file"),
            &set.file,
        )?;
        lines.insert(name.clone(), check_set(&loaded.resolve(&set.file), set)?);
    }
    Ok(lines)
}

fn must_be_file(loaded: &Loaded, path: &[&str], key: &str, file: &str) -> Result<(), ConfigError> {
    let resolved = loaded.resolve(file);
    let fault = |reason: &str| {
        let text = format!(
            "{key} = {file:?} ({}) {reason}; paths start at the TOML's folder",
            resolved.display()
        );
        Err(loaded.fault(path, text))
    };
    match std::fs::File::open(&resolved).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_dir() => fault("is a folder and no file"),
        Ok(_) => Ok(()),
        Err(error) => fault(&format!("cannot be read: {error}")),
    }
}

fn check_tokenizer(loaded: &Loaded) -> Result<()> {
    let Some(file) = &loaded.config.tokenizer.file else { return Ok(()) };
    let path = ["tokenizer", "file"];
    must_be_file(loaded, &path, "tokenizer.file", file)?;
    let (size, rows) =
        (Tokenizer::load(&loaded.resolve(file))?.vocab_size(), loaded.config.model.vocab_size);
    if size > rows {
        let text = format!(
            "tokenizer.file = {file:?} has {size} tokens, model.vocab_size = {rows} is smaller; raise it"
        );
        return Err(loaded.fault(&path, text).into());
    }
    Ok(())
}

/// Folders that stages start from hold a model, or a run that exported one.
/// Refuses a start folder without a model, or with one that is not the run's.
fn check_starts(loaded: &Loaded) -> Result<()> {
    let stages = &loaded.config.stages;
    for (index, stage) in stages.iter().enumerate() {
        let Some(start) = stage
            .start_from
            .as_ref()
            .filter(|start| stages.iter().all(|stage| stage.name != **start))
        else {
            continue;
        };
        let fault = |text: String| {
            let text = format!("stage {} starts from {start:?}, {text}", stage.name);
            loaded.fault(&["stage", &index.to_string(), "start_from"], text)
        };
        let folder = loaded.resolve(start);
        let holds = |folder: &Path| folder.join("config.json").is_file();
        let candidates = [folder.clone(), folder.join("export")];
        let Some(folder) = candidates.iter().find(|folder| holds(folder)) else {
            let text = "a folder without config.json and no finished run; name a checkpoint";
            return Err(fault(text.to_string()).into());
        };
        let layout = Layout::new(&loaded.config.model, false);
        TensorFolder::open(folder)
            .and_then(|tensors| check_weights(&layout, &tensors, folder))
            .map_err(|error| fault(format!("which does not fit: {error:#}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::failure::exit_code;
    use super::*;
    use std::path::Path;

    const RUN: &str = "[model]\nconfig = \"CONFIGS/model/smoke.json\"\n[tokenizer]\nvocab_size = 288\ntrain_on = [\"text\"]\n\
                       [data.sets.text]\nfile = \"text.jsonl\"\nschema = \"text\"\n\
                       [[stage]]\nname = \"base\"\nkind = \"pretrain\"\ndata = [{ set = \"text\" }]\nsteps = 1\nbatch = 1\nsequence = 8\n";

    fn check(text: &str, data: Option<&str>, plan_only: bool) -> Result<CheckReport> {
        let folder = tempfile::tempdir().unwrap();
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let file = folder.path().join("run.toml");
        std::fs::write(&file, text.replace("CONFIGS", &configs.display().to_string())).unwrap();
        if let Some(data) = data {
            std::fs::write(folder.path().join("text.jsonl"), data).unwrap();
        }
        report(&CheckArgs {
            file,
            set: Vec::new(),
            plan_only,
            json: false,
            threads: Threads::default(),
        })
    }

    #[test]
    fn data_files_are_read_line_by_line_unless_only_the_plan_is_asked_for() {
        let report = check(RUN, Some("{\"text\": \"a\"}\n{\"text\": \"b\"}\n"), false).unwrap();
        assert_eq!(report.lines["text"], 2);
        assert!(check(RUN, None, true).unwrap().lines.is_empty());
    }

    #[test]
    fn a_missing_file_is_told_at_the_key_that_names_it() {
        let fault = check(RUN, None, false).unwrap_err();
        let text = fault.to_string();
        assert!(text.contains("run.toml:7:1: data.sets.text.file = \"text.jsonl\" ("), "{text}");
        assert!(text.ends_with("cannot be read: No such file or directory (os error 2); paths start at the TOML's folder"), "{text}");
        assert_eq!(exit_code(&fault), 2);
    }

    #[test]
    fn a_bad_line_is_told_with_its_number() {
        let fault = check(RUN, Some("{\"text\": \"a\"}\n{\"txt\": \"b\"}\n"), false).unwrap_err();
        assert!(fault.to_string().contains("text.jsonl:2"), "{fault:#}");
        assert_eq!(exit_code(&fault), 2);
    }

    #[test]
    fn a_start_folder_without_a_model_is_refused() {
        let text = RUN.replace("kind = \"pretrain\"", "kind = \"pretrain\"\nstart_from = \".\"");
        let fault = check(&text, Some("{\"text\": \"a\"}\n"), false).unwrap_err().to_string();
        assert!(fault.ends_with("run.toml:12:1: stage base starts from \".\", a folder without config.json and no finished run; name a checkpoint"), "{fault}");
    }

    #[test]
    fn a_model_is_told_from_a_run_by_extension_or_content() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        assert!(is_model(Path::new("x/config.json")));
        assert!(!is_model(Path::new("x/run.toml")));
        assert!(is_model(&file("a", "  {\"vocab_size\": 1}")));
        assert!(!is_model(&file("b", "seed = 1")));
    }

    #[test]
    fn every_config_of_the_repository_is_right() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        for name in ["quickstart.toml", "smoke.toml", "small/gsm8k.toml"] {
            let args = CheckArgs {
                file: configs.join(name),
                set: Vec::new(),
                plan_only: true,
                json: false,
                threads: Threads::default(),
            };
            let report = report(&args).unwrap_or_else(|fault| panic!("{fault}"));
            assert!(report.to_string().contains("parameters"), "{report}");
        }
        for name in [
            "deepseek-v2.json",
            "deepseek-v2-lite.json",
            "quickstart.json",
            "small.json",
            "smoke.json",
        ] {
            let args = CheckArgs {
                file: configs.join("model").join(name),
                set: Vec::new(),
                plan_only: false,
                json: false,
                threads: Threads::default(),
            };
            report(&args).unwrap_or_else(|fault| panic!("{fault}"));
        }
    }
}
