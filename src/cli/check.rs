//! `rehearsal check`: resolves and validates a run or a model without training, and tells what it will cost.

use super::check_report::{CheckReport, timeline};
use super::command::{Threads, cores, warned};
use super::machine::{FreeMemory, measured_products};
use super::output::{say, say_json};
use crate::actors::check_stage_data;
use crate::checkpoint::{TensorFolder, read_model_config};
use crate::config::{ConfigError, Fault, Loaded, ModelConfig, RunConfig, load_model};
use crate::data::audit::{audit, repeats};
use crate::data::{ChatTemplate, Loader, Sources, Tokenizer, check_set};
use crate::engine::check_weights;
use crate::model::Layout;
use anyhow::Result;
use clap::Args;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Checks a run or a model.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Check a run's TOML or a model's config.json without training anything: unknown keys (with the nearest \
                  known one), wrong types, rules across tables, and every data file line by line. Then tell what it \
                  will cost: parameters, tensors, memory by phase, tokens, disk and time. Of a run whose [cluster] has \
                  several ranks it tells what each of them holds and sends, without starting any. A fault ends with \
                  exit code 2 and its place as file:line:column.",
    after_help = "Example:\n  rehearsal check configs/quickstart.toml\n  \
                  rehearsal check configs/quickstart.toml --set stage.solve.steps=100 --plan-only\n  \
                  rehearsal check configs/smoke.toml --set cluster.data=2 --set cluster.pipeline=2\n  \
                  rehearsal check configs/model/deepseek-v2.json --against configs/model/deepseek-67b.json"
)]
pub struct CheckArgs {
    /// A run's TOML, or a model's config.json
    #[arg(value_name = "RUN.toml|MODEL.json")]
    pub file: PathBuf,
    /// Set a key of the TOML; stage.NAME.key addresses a stage. May be given more than once
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Compare with another model: ratios beside those of DeepSeek-V2 to DeepSeek 67B
    #[arg(long, value_name = "MODEL.json")]
    pub against: Option<PathBuf>,
    /// GPU hours that a trillion tokens took: tell tokens a second and the share of the peak
    #[arg(long, value_name = "HOURS", value_parser = hours)]
    pub gpu_hours: Option<f64>,
    /// Draw the timeline of a step of the first stage that trains on text, an SVG: what each stage of the pipeline does when
    #[arg(long, value_name = "FILE.svg")]
    pub timeline: Option<PathBuf>,
    /// Read no data file; so it is, and is said, where [cluster.hardware] describes other machines and a file is not on this one
    #[arg(long)]
    pub plan_only: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Threads that the estimated time is for
    #[command(flatten)]
    pub threads: Threads,
}

fn hours(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(hours) if hours > 0.0 && hours.is_finite() => Ok(hours),
        _ => Err("give the GPU hours of a trillion tokens, above 0".to_string()),
    }
}

/// Checks and reports.
pub fn run(args: CheckArgs) -> Result<()> {
    let report = report(&args)?.on_machine(FreeMemory::here());
    if args.json {
        return say_json(&report);
    }
    if let Some(refusal) = report.over_budget() {
        return Err(Fault::resources(refusal));
    }
    say(report.to_string().trim_end())?;
    // It may run elsewhere: what this machine lacks is no fault of the config, and machines of [cluster.hardware] are elsewhere.
    let is_elsewhere = report.cluster.is_some() && report.devices.is_empty();
    if let Some(refusal) = report.over_memory().filter(|_| !is_elsewhere) {
        say(&format!("note      {}", refusal.lines().next().unwrap_or_default()))?;
    }
    match report.cluster {
        Some(_) => Ok(()),
        None => say(&format!("devices: {}", devices(args.threads.count()))),
    }
}

/// What this build finds to compute on.
fn devices(threads: usize) -> String {
    #[cfg(feature = "cuda")]
    let cuda = match rehearsal_kernels::cuda::devices() {
        Ok(count) => {
            let nccl = rehearsal_kernels::cuda::nccl_version();
            let nccl = nccl.map_or_else(|why| why, |version| format!("NCCL {version}"));
            format!("cuda {count} (only the seam's three kernels are built); {nccl}")
        }
        Err(reason) => reason,
    };
    #[cfg(not(feature = "cuda"))]
    let cuda = "no cuda in this build";
    format!("cpu with {threads} threads; {cuda}")
}

fn report(args: &CheckArgs) -> Result<CheckReport> {
    let (report, model) = report_alone(args)?;
    let report = match args.gpu_hours {
        Some(hours) => report.trained_in(hours),
        None => report,
    };
    Ok(match &args.against {
        Some(file) => report.against(&model, file, &load_model(file)?),
        None => report,
    })
}

/// The report without a comparison, and the model that it is about.
fn report_alone(args: &CheckArgs) -> Result<(CheckReport, ModelConfig)> {
    if is_model(&args.file) {
        if let Some(assignment) = args.set.first() {
            return Err(Fault::user(format!(
                "--set {assignment}: a model's config.json takes no --set; edit the file"
            )));
        }
        if args.timeline.is_some() {
            let text = "--timeline draws a run's step, and this is a model; name a run's TOML";
            return Err(Fault::user(text.to_string()));
        }
        let model = load_model(&args.file)?;
        return Ok((CheckReport::of_model(&args.file, &model), model));
    }
    let loaded = RunConfig::load(&args.file, &args.set)?;
    if let Some(file) = &args.timeline {
        draw(&loaded, file)?;
    }
    let unread = elsewhere(&loaded).filter(|_| !args.plan_only);
    let lines = match args.plan_only || unread.is_some() {
        true => BTreeMap::new(),
        false => check_files(&loaded)?,
    };
    let configured = Some(loaded.config.engine.threads).filter(|threads| *threads > 0);
    let threads = warned(args.threads.given().or(configured).unwrap_or_else(cores));
    let products = measured_products(threads);
    let mut report = CheckReport::of_run(&loaded, lines, threads, products)?;
    report.unread = unread;
    Ok((report, loaded.config.model))
}

fn draw(loaded: &Loaded, file: &Path) -> Result<()> {
    let Some(picture) = timeline(loaded)? else {
        let text =
            "--timeline draws a step of a pretrain or long-context stage, and the run has none";
        return Err(Fault::user(text.to_string()));
    };
    std::fs::write(file, picture).map_err(|error| {
        Fault::user(format!("--timeline {}: cannot be written: {error}", file.display()))
    })
}

/// Where a run is planned for other machines, the first of its data files that is not on this one.
fn elsewhere(loaded: &Loaded) -> Option<String> {
    let Loaded { config, .. } = loaded;
    let given = config.data.sets.iter().filter(|(name, _)| config.data.is_given(name));
    let mut absent = given.filter(|(_, set)| !loaded.resolve(&set.file).exists());
    let (name, _) = absent.next().filter(|_| config.cluster.hardware.is_some())?;
    Some(format!("data.sets.{name} is not here: no data were read"))
}

/// True for JSON: by its extension, or by its first character if it has another.
fn is_model(file: &Path) -> bool {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => true,
        Some("toml") => false,
        _ => std::fs::read_to_string(file).is_ok_and(|text| text.trim_start().starts_with('{')),
    }
}

/// Reads every file that a run names, in its schema and for what it must not hold; returns the examples of each data
/// set. What the run generates is looked at once it is there.
pub fn check_files(loaded: &Loaded) -> Result<BTreeMap<String, u64>> {
    let tokenizer = tokenizer(loaded)?;
    check_starts(loaded, tokenizer.as_ref())?;
    let data = &loaded.config.data;
    if let Some(machine) = &data.word_machine {
        must_be_file(
            loaded,
            &["data", "word_machine", "words"],
            "data.word_machine.words",
            &machine.words,
        )?;
    }
    let mut lines = BTreeMap::new();
    for (name, set) in data.sets.iter().filter(|(name, _)| data.is_given(name)) {
        let path = ["data", "sets", name, "file"];
        must_be_file(loaded, &path, &format!("data.sets.{name}.file"), &set.file)?;
        lines.insert(name.clone(), check_set(&loaded.resolve(&set.file), set)?);
    }
    let sources =
        Sources { data: data.clone(), base: loaded.folder.clone(), generated: PathBuf::new() };
    check_audits(loaded, &sources)?;
    if let Some(tokenizer) = tokenizer {
        check_lengths(loaded, sources, tokenizer)?;
    }
    Ok(lines)
}

/// Searches the given files that are trained on for what they must not hold.
fn check_audits(loaded: &Loaded, sources: &Sources) -> Result<()> {
    let data = &loaded.config.data;
    let trained = loaded.config.trained_sets().given(data);
    let held_out: Vec<String> =
        data.held_out.iter().filter(|name| data.is_given(name)).cloned().collect();
    audit(sources, &held_out, &trained.all())?.require_clean()?;
    match data.pretrain_on_sft {
        true => Ok(()),
        false => repeats(sources, &trained.tuned, &trained.pretrained)?.require_clean(),
    }
}

/// Encodes the given files as each stage will, with a tokenizer that is there before the run.
fn check_lengths(loaded: &Loaded, sources: Sources, tokenizer: Tokenizer) -> Result<()> {
    let config = &loaded.config;
    let beside = config.tokenizer.file.as_ref().map(|file| loaded.resolve(file));
    let chat = match beside.as_deref().and_then(Path::parent) {
        Some(folder) => ChatTemplate::from_folder(folder)?.unwrap_or_else(ChatTemplate::own),
        None => ChatTemplate::own(),
    };
    let mut loader = Loader {
        sources,
        tokenizer: Arc::new(tokenizer),
        chat: Arc::new(chat),
        seed: config.seed,
        context: 0,
    };
    for (index, stage) in config.stages.iter().enumerate() {
        loader.context = config.stage_model(&loaded.folder, index)?.max_position_embeddings;
        check_stage_data(&loader, stage, &|set| config.data.is_given(set))?;
    }
    Ok(())
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

/// The tokenizer that is there before the run.
fn tokenizer(loaded: &Loaded) -> Result<Option<Tokenizer>> {
    let Some(file) = &loaded.config.tokenizer.file else { return Ok(None) };
    let path = ["tokenizer", "file"];
    must_be_file(loaded, &path, "tokenizer.file", file)?;
    let tokenizer = Tokenizer::load(&loaded.resolve(file))?;
    let (size, rows) = (tokenizer.vocab_size(), loaded.config.model.vocab_size);
    if size > rows {
        let text = format!(
            "tokenizer.file = {file:?} has {size} tokens, model.vocab_size = {rows} is smaller; raise it"
        );
        return Err(loaded.fault(&path, text).into());
    }
    Ok(Some(tokenizer))
}

/// Folders that stages start from hold a whole model, or are of a run that exported one. That it computes what the run's
/// model computes was checked when the config was read.
fn check_starts(loaded: &Loaded, tokenizer: Option<&Tokenizer>) -> Result<()> {
    for (index, stage) in loaded.config.stages.iter().enumerate() {
        let Some(folder) = loaded.config.start_folder(&loaded.folder, index) else { continue };
        let start = stage.start_from.as_deref().unwrap_or_default();
        let at = index.to_string();
        let fault = |reason: String| {
            let text = format!("stage {} starts from {start:?}, {reason}", stage.name);
            loaded.fault(&["stage", &at, "start_from"], text)
        };
        if !folder.join("config.json").is_file() {
            let reason = "a folder without config.json and no finished run; name a checkpoint";
            return Err(fault(reason.to_string()).into());
        }
        let whole = || {
            let layout = Layout::new(&read_model_config(&folder)?, false);
            check_weights(&layout, &TensorFolder::open(&folder)?, &folder)
        };
        whole().map_err(|error| fault(format!("which cannot be used: {error:#}")))?;
        let difference =
            tokenizer.map(|tokenizer| tokenizer.difference_from(&folder)).transpose()?;
        if let Some(difference) = difference.flatten() {
            return Err(fault(difference).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::failure::exit_code;
    use super::*;

    const RUN: &str = "[model]\nconfig = \"CONFIGS/model/smoke.json\"\n[tokenizer]\nvocab_size = 288\ntrain_on = [\"text\"]\n\
                       [data.sets.text]\nfile = \"text.jsonl\"\nschema = \"text\"\n\
                       [[stage]]\nname = \"base\"\nkind = \"pretrain\"\ndata = [{ set = \"text\" }]\nsteps = 1\nbatch = 1\nsequence = 8\n";

    /// A check of `file` and nothing else.
    fn args(file: PathBuf) -> CheckArgs {
        CheckArgs {
            file,
            set: Vec::new(),
            against: None,
            gpu_hours: None,
            timeline: None,
            plan_only: false,
            json: false,
            threads: Threads::default(),
        }
    }

    fn check(text: &str, data: Option<&str>, plan_only: bool) -> Result<CheckReport> {
        let folder = tempfile::tempdir().unwrap();
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let file = folder.path().join("run.toml");
        std::fs::write(&file, text.replace("CONFIGS", &configs.display().to_string())).unwrap();
        if let Some(data) = data {
            std::fs::write(folder.path().join("text.jsonl"), data).unwrap();
        }
        report(&CheckArgs { plan_only, ..args(file) })
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

    const TALK: &str = "[data.sets.talk]\nfile = \"talk.jsonl\"\nschema = \"prompts\"\n[data.sets.held]\nfile = \"held.jsonl\"\nschema = \"prompts\"\n\
                        [[stage]]\nname = \"sft\"\nkind = \"sft\"\ndata = \"talk\"\nbatch = 1\n";

    /// A run of text and conversations; the first line of each file is given.
    fn check_talk(text: &str, talk: &str, held: &str) -> Result<CheckReport> {
        let folder = tempfile::tempdir().unwrap();
        let line = |prompt: &str| format!("{{\"prompt\": {prompt:?}, \"answer\": \"yes\"}}\n");
        std::fs::write(folder.path().join("text.jsonl"), format!("{{\"text\": {text:?}}}\n"))
            .unwrap();
        std::fs::write(folder.path().join("talk.jsonl"), line("first") + &line(talk)).unwrap();
        std::fs::write(folder.path().join("held.jsonl"), line(held)).unwrap();
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let run = RUN
            .replace("CONFIGS", &configs.display().to_string())
            .replace("[data.sets.text]", "[data]\nheld_out = [\"held\"]\n[data.sets.text]");
        let file = folder.path().join("run.toml");
        std::fs::write(&file, run + TALK).unwrap();
        report(&args(file))
    }

    #[test]
    fn held_out_examples_and_lessons_that_are_trained_on_are_found_beforehand() {
        check_talk("some text", "a question", "another").unwrap();
        let leaked = check_talk("some text", "a question", "a question").unwrap_err();
        assert!(leaked.to_string().contains("1 of 1 held-out examples are trained on"), "{leaked}");
        assert_eq!(exit_code(&leaked), 2);
        let repeated = check_talk("a question yes", "a question", "another").unwrap_err();
        assert!(
            repeated.to_string().contains("conversations of SFT are pretrained on"),
            "{repeated}"
        );
    }

    #[test]
    fn lines_are_encoded_with_a_tokenizer_that_is_there_before_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let text = crate::config::TokenizerConfig { vocab_size: Some(280), ..Default::default() };
        let tokenizer = Tokenizer::train(&text, &["a cat sat".repeat(9)]).unwrap();
        tokenizer.save(&folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("text.jsonl"), "{\"text\": \"a\"}\n").unwrap();
        std::fs::write(folder.path().join("held.jsonl"), "{\"prompt\": \"q\"}\n").unwrap();
        let long = "x".repeat(200);
        let lines = format!(
            "{{\"prompt\": \"q\", \"answer\": \"a\"}}\n{{\"prompt\": {long:?}, \"answer\": \"a\"}}\n"
        );
        std::fs::write(folder.path().join("talk.jsonl"), lines).unwrap();
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let run = RUN
            .replace("CONFIGS", &configs.display().to_string())
            .replace("vocab_size = 288\ntrain_on = [\"text\"]", "file = \"tokenizer.json\"");
        let file = folder.path().join("run.toml");
        std::fs::write(&file, run + TALK).unwrap();
        let fault = report(&args(file)).unwrap_err();
        assert!(fault.to_string().contains("talk.jsonl:2: the conversation has 2"), "{fault}");
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
    fn a_vocabulary_below_the_tokenizers_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let text = crate::config::TokenizerConfig { vocab_size: Some(300), ..Default::default() };
        let tokenizer = Tokenizer::train(&text, &["a cat sat on a mat".repeat(9)]).unwrap();
        tokenizer.save(&folder.path().join("tokenizer.json")).unwrap();
        let size = tokenizer.vocab_size();
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").display().to_string();
        let below = format!("json\"\nvocab_size = {}", size - 1);
        let run = RUN
            .replace("CONFIGS", &configs)
            .replacen("json\"", &below, 1)
            .replace("vocab_size = 288\ntrain_on = [\"text\"]", "file = \"tokenizer.json\"");
        let file = folder.path().join("run.toml");
        std::fs::write(&file, run).unwrap();
        let fault = report(&args(file)).unwrap_err();
        let told = format!(
            "run.toml:5:1: tokenizer.file = \"tokenizer.json\" has {size} tokens, model.vocab_size = {} is smaller; raise it",
            size - 1
        );
        assert!(fault.to_string().ends_with(&told), "{fault}");
        assert_eq!(exit_code(&fault), 2);
    }

    #[test]
    fn every_config_of_the_repository_is_right() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        for name in ["quickstart.toml", "smoke.toml", "small/gsm8k.toml"] {
            let args = CheckArgs { plan_only: true, ..args(configs.join(name)) };
            let report = report(&args).unwrap_or_else(|fault| panic!("{fault}"));
            assert!(report.to_string().contains("parameters"), "{report}");
        }
        for file in std::fs::read_dir(configs.join("model")).unwrap() {
            report(&args(file.unwrap().path())).unwrap_or_else(|fault| panic!("{fault}"));
        }
    }
}
