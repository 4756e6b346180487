//! The whole TOML of a run: reading, `--set`, and what identifies a run.
//!
//! 1. The document is parsed into a tree in which every key has a place.
//! 2. `--set` is laid over it.
//! 3. `[model] config = "file.json"` is read and the keys beside it are laid over that file's.
//! 4. Table by table it becomes typed structs.
//! 5. The rules across tables are checked.
//!
//! Every fault of 1 to 5 is a [`ConfigError`] that prints `file:line:column: message`.
//!
//! Invariant: a loaded config passed every rule that needs no data file.

pub use super::document::{ConfigError, Place};

use super::document::{Entry, Node, Source, Value, parse_toml};
use super::json::parse_json;
use super::nearest::hint;
use super::published::unify_rope;
use super::reader::{read, refuse_unknown};
use super::stage::{EvalConfig, Gate};
use super::{
    CheckpointConfig, ClusterConfig, ConsoleConfig, DataConfig, EngineConfig, ModelConfig, Stage,
    StageKind, TokenizerConfig,
};
use super::{overrides, validate, validate_model, validate_routing};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Everything that a run is, with all defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunConfig {
    /// Seed of every random number.
    pub seed: u64,
    /// The model at the run's start.
    pub model: ModelConfig,
    /// The tokenizer.
    pub tokenizer: TokenizerConfig,
    /// The data sets.
    pub data: DataConfig,
    /// Devices and memory.
    pub engine: EngineConfig,
    /// How the run is spread over processes.
    pub cluster: ClusterConfig,
    /// When to commit.
    pub checkpoint: CheckpointConfig,
    /// How progress is shown.
    pub console: ConsoleConfig,
    /// The stages, in order.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// A config and where it was read from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The config.
    pub config: RunConfig,
    /// The TOML.
    pub file: PathBuf,
    /// The TOML's folder, absolute: relative paths in the config start here.
    pub folder: PathBuf,
    /// The text with `--set` and the model's file laid into it, for the places of later faults.
    document: Node,
}

/// The tables and keys of a run's top level.
const TABLES: [&str; 9] =
    ["seed", "model", "tokenizer", "data", "engine", "cluster", "checkpoint", "console", "stage"];

/// The kinds of stages.
const KINDS: [&str; 5] = ["pretrain", "long-context", "sft", "reward-model", "grpo"];

/// Keys that stages of every kind have.
const STAGE_KEYS: [&str; 5] = ["name", "kind", "start_from", "eval", "gate"];

impl RunConfig {
    /// Reads a TOML, lays `--set` assignments ("table.key=value") over it and checks all rules that need no data file.
    pub fn load(path: &Path, assignments: &[String]) -> Result<Loaded, ConfigError> {
        let source = Source::read(path)?;
        let folder =
            path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
        let (config, document) = RunConfig::parse(&source, &folder, assignments)?;
        Ok(Loaded { config, file: path.to_path_buf(), folder, document })
    }

    /// `load` of a text that was read from `source`.
    fn parse(
        source: &Source,
        folder: &Path,
        assignments: &[String],
    ) -> Result<(RunConfig, Node), ConfigError> {
        let mut document = parse_toml(source)?;
        for assignment in assignments {
            overrides::apply(&mut document, assignment)?;
        }
        refuse_unknown(&document, "", &TABLES)?;
        resolve_model(&mut document, folder)?;
        let top: Top = read(&document, "", &TABLES)?;
        let model: ModelConfig = table(&document, "model", &["config"])?
            .expect("`resolve_model` refuses a run without it");
        validate_model::model(&model, &document, &["model"])?;
        let config = RunConfig {
            seed: top.seed,
            model: model.completed(),
            tokenizer: table(&document, "tokenizer", &[])?.unwrap_or_default(),
            data: table(&document, "data", &[])?.unwrap_or_default(),
            engine: table(&document, "engine", &[])?.unwrap_or_default(),
            cluster: table(&document, "cluster", &[])?.unwrap_or_default(),
            checkpoint: table(&document, "checkpoint", &[])?.unwrap_or_default(),
            console: table(&document, "console", &[])?.unwrap_or_default(),
            stages: stages(&document)?,
        };
        validate::run(&config, &document, folder)?;
        Ok((config, document))
    }

    /// The config as TOML, with every default written out; paths stay as they were written.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config holds only what TOML can hold")
    }

    /// Identifies the run: a hash of everything but threads, processes, console, gates and the place of the files. A gate decides
    /// whether a run goes on, not what it computes: after a missed one it may go on with another.
    pub fn identity(&self) -> String {
        let mut same = self.clone();
        same.engine.threads = 0;
        same.cluster = ClusterConfig::default();
        same.stages.iter_mut().for_each(|stage| stage.gate = None);
        same.console = ConsoleConfig::default();
        let text = serde_json::to_vec(&same).expect("a config is plain data");
        blake3::hash(&text).to_hex().to_string()
    }
}

impl Loaded {
    /// A fault of the value at `path`, with its place: for what only reading a file can find out.
    pub fn fault(&self, path: &[&str], message: String) -> ConfigError {
        ConfigError { place: self.document.place_of(path), message }
    }

    /// A path of the config, seen from the TOML's folder.
    pub fn resolve(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    /// The resolved config for the run folder: all defaults written and paths absolute, so that it runs from anywhere.
    pub fn resolved_toml(&self) -> String {
        let mut config = self.config.clone();
        let absolute = |path: &mut String| *path = self.folder.join(&*path).display().to_string();
        if let Some(file) = &mut config.tokenizer.file {
            absolute(file);
        }
        if let Some(machine) = &mut config.data.word_machine {
            absolute(&mut machine.words);
        }
        for set in config.data.sets.values_mut().filter(|set| !set.file.starts_with("run:")) {
            absolute(&mut set.file);
        }
        let names: Vec<String> = config.stages.iter().map(|stage| stage.name.clone()).collect();
        for start in config.stages.iter_mut().filter_map(|stage| stage.start_from.as_mut()) {
            if !names.contains(start) {
                absolute(start);
            }
        }
        config.to_toml()
    }
}

/// Reads a model's config.json and checks it.
pub fn load_model(path: &Path) -> Result<ModelConfig, ConfigError> {
    let mut node = parse_json(&Source::read(path)?)?;
    unify_rope(&mut node)?;
    let model: ModelConfig = read(&node, "model", &[])?;
    validate_model::model(&model, &node, &[])?;
    Ok(model.completed())
}

/// The keys of the top level that are no tables.
#[derive(Deserialize)]
struct Top {
    #[serde(default = "one")]
    seed: u64,
}

fn one() -> u64 {
    1
}

fn table<T: DeserializeOwned>(
    document: &Node,
    name: &'static str,
    elsewhere: &[&'static str],
) -> Result<Option<T>, ConfigError> {
    document.get(name).map(|node| read(node, name, elsewhere)).transpose()
}

/// Puts the file that `model.config` names under the keys of `[model]`.
fn resolve_model(document: &mut Node, folder: &Path) -> Result<(), ConfigError> {
    let Some(Entry { key, place, node: mut written }) = document.take("model") else {
        let message = "the run has no [model]; add one with config = \"model/quickstart.json\" or the published keys";
        return Err(ConfigError { place: document.place.clone(), message: message.to_string() });
    };
    let mut node = written.clone();
    if let Some(config) = written.take("config") {
        let Some(name) = config.node.text() else {
            let message = format!(
                "model.config = {} is {}; expected a path",
                config.node.shown(),
                config.node.kind()
            );
            return Err(ConfigError { place: config.node.place, message });
        };
        let source = Source::read(&folder.join(name)).map_err(|fault| ConfigError {
            place: config.node.place.clone(),
            message: format!("model.config = {name:?} ({}) {}", fault.place, fault.message),
        })?;
        node = parse_json(&source)?;
        if !matches!(node.value, Value::Table(_)) {
            let message =
                format!("a model's config.json is an object, and this is {}", node.kind());
            return Err(ConfigError { place: node.place, message });
        }
        unify_rope(&mut node)?;
        lay_over(&mut node, written);
    }
    unify_rope(&mut node)?;
    document.put(Entry { key, place, node });
    Ok(())
}

/// Lays the keys of one table over those of another; tables inside are joined in the same way.
fn lay_over(base: &mut Node, over: Node) {
    let Value::Table(entries) = over.value else { return };
    for mut entry in entries {
        if let (Some(old), Value::Table(_)) = (base.get(&entry.key), &entry.node.value)
            && matches!(old.value, Value::Table(_))
        {
            let mut joined = old.clone();
            lay_over(&mut joined, entry.node);
            entry.node = joined;
        }
        base.put(entry);
    }
}

/// The keys that every stage has.
#[derive(Deserialize)]
struct StageHead {
    name: String,
    #[serde(default)]
    start_from: Option<String>,
    #[serde(default)]
    eval: Vec<EvalConfig>,
    #[serde(default)]
    gate: Option<Gate>,
}

fn stages(document: &Node) -> Result<Vec<Stage>, ConfigError> {
    let Some(node) = document.get("stage") else { return Ok(Vec::new()) };
    let Value::List(items) = &node.value else {
        let message = format!("`stage` is {}; write each stage under [[stage]]", node.kind());
        return Err(ConfigError { place: node.place.clone(), message });
    };
    items.iter().enumerate().map(|(index, item)| stage(item, index)).collect()
}

fn stage(node: &Node, index: usize) -> Result<Stage, ConfigError> {
    let name = node.get("name").and_then(Node::text);
    let path = format!("stage.{}", name.map_or_else(|| index.to_string(), str::to_string));
    if !matches!(node.value, Value::Table(_)) {
        let message = format!("{path} is {}; write each stage under [[stage]]", node.kind());
        return Err(ConfigError { place: node.place.clone(), message });
    }
    let Some(kind) = node.get("kind") else {
        let message =
            format!("`{path}` has no `kind`; it is one of {}", super::nearest::listed(&KINDS));
        return Err(ConfigError { place: node.place.clone(), message });
    };
    validate_routing::refuse_elsewhere(node, &path, kind.text().unwrap_or_default())?;
    let kind = match kind.text() {
        Some("pretrain") => StageKind::Pretrain(read(node, &path, &STAGE_KEYS)?),
        Some("long-context") => StageKind::LongContext(read(node, &path, &STAGE_KEYS)?),
        Some("sft") => StageKind::Sft(read(node, &path, &STAGE_KEYS)?),
        Some("reward-model") => StageKind::RewardModel(read(node, &path, &STAGE_KEYS)?),
        Some("grpo") => StageKind::Grpo(read(node, &path, &STAGE_KEYS)?),
        word => {
            let hint = hint(word.unwrap_or_default(), &KINDS);
            let message = format!("{path}.kind = {} is no kind of stage{hint}", kind.shown());
            return Err(ConfigError { place: kind.place.clone(), message });
        }
    };
    // The keys of the kind were checked above; here only the common ones are left.
    let mut head = node.clone();
    if let Value::Table(entries) = &mut head.value {
        entries.retain(|entry| STAGE_KEYS.contains(&entry.key.as_str()));
    }
    let head: StageHead = read(&head, &path, &["kind"])?;
    Ok(Stage {
        name: head.name,
        start_from: head.start_from,
        eval: head.eval,
        gate: head.gate,
        kind,
    })
}

#[cfg(test)]
mod tests;
