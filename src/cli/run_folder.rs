//! The folder of a run: whose it is, who may write in it, and what a new start does with an old one.
//!
//! `run.json` says which run a folder belongs to; it is written first and atomically, so a folder with
//! anything else in it and no `run.json` is no run and is never touched. `lock` is held (flock) for as
//! long as a process works in the folder.
//!
//! | folder                    | plain       | --resume          | --fresh          |
//! |---------------------------|-------------|-------------------|------------------|
//! | none, or empty            | starts      | starts            | starts           |
//! | same config, unfinished   | resumes     | resumes           | moved, starts    |
//! | same config, finished     | refused     | ends at once      | moved, starts    |
//! | another config            | refused     | refused           | moved, starts    |
//! | no run                    | refused     | refused           | refused          |
//!
//! Threads, console and gates make no other config; a resumed run's config.toml is written anew if one of them changed.

use crate::checkpoint::disk_fault;
use crate::config::limited::{Unread, read_limited_text};
use crate::config::{Fault, Loaded};
use crate::console::TypedCommand;
use crate::console::next_steps::RECORD_FILE as RECORD;
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const RECORD_LIMIT: u64 = 1 << 20;
/// The record of whose folder it is.
const RECORD_BESIDE: &str = "run.json.tmp";
const LOCK: &str = "lock";
const CONFIG: &str = "config.toml";
const CONFIG_BESIDE: &str = "config.toml.tmp";

/// What the user asked to do with an existing folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing was said.
    Plain,
    /// `--resume`.
    Resume,
    /// `--fresh`.
    Fresh,
}

/// `run.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Hash of the config without threads, console, gates and place.
    pub identity: String,
    /// Seed of the run.
    pub seed: u64,
    /// True once every stage is done and the model is exported.
    pub finished: bool,
    /// Version of the program that began the run.
    pub version: String,
    /// The command that goes on with it.
    #[serde(default)]
    pub resume: Option<TypedCommand>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Opened {
    /// Run in this folder, from its newest commit if it has one.
    Ready(RunFolder),
    /// The run is finished already.
    Finished,
}

/// A folder that this process alone may write in.
#[derive(Debug)]
pub struct RunFolder {
    /// The folder.
    pub path: PathBuf,
    /// True if the folder held this run before.
    pub resumed: bool,
    /// Where a run that stood in the way was moved.
    pub moved: Option<PathBuf>,
    record: RunRecord,
    // Dropping it releases the lock.
    _lock: File,
}

/// True if the folder's run is finished and only asked for again; refuses what [`open`] would refuse. Writes nothing.
pub fn is_finished(path: &Path, loaded: &Loaded, wish: Wish) -> Result<bool> {
    Ok(matches!(decide(path, loaded, wish)?, Decision::Finished))
}

/// True if the folder holds a run that will go on. Writes nothing.
pub fn is_resumed(path: &Path, loaded: &Loaded, wish: Wish) -> Result<bool> {
    Ok(matches!(decide(path, loaded, wish)?, Decision::Resume))
}

/// Opens a run's folder, or refuses; nothing is written before everything is decided. `resume` is kept as the command
/// that goes on with the run.
pub fn open(path: &Path, loaded: &Loaded, wish: Wish, resume: TypedCommand) -> Result<Opened> {
    let record = new_record(loaded, resume);
    if let Decision::Finished = decide(path, loaded, wish)? {
        return Ok(Opened::Finished);
    }
    create_folder(path)?;
    let mut held = lock(path)?;
    // Another process may have begun or ended between the look and the lock: look again.
    let decision = decide(path, loaded, wish)?;
    let moved = match decision {
        Decision::Finished => return Ok(Opened::Finished),
        Decision::Move => {
            let aside = move_aside(path)?;
            create_folder(path)?;
            held = lock(path)?;
            Some(aside)
        }
        Decision::Start | Decision::Resume => None,
    };
    let resumed = matches!(decision, Decision::Resume);
    let config = loaded.resolved_toml();
    if std::fs::read_to_string(path.join(CONFIG)).ok().as_ref() != Some(&config) {
        write_beside(path, CONFIG_BESIDE, CONFIG, config.as_bytes())?;
    }
    write_record(path, &record)?;
    Ok(Opened::Ready(RunFolder { path: path.to_path_buf(), resumed, moved, record, _lock: held }))
}

impl RunFolder {
    /// Records that the run is finished.
    pub fn finish(&mut self) -> Result<()> {
        self.record.finished = true;
        write_record(&self.path, &self.record)
    }
}

fn new_record(loaded: &Loaded, resume: TypedCommand) -> RunRecord {
    let config = &loaded.config;
    let version = env!("CARGO_PKG_VERSION").to_string();
    let (identity, resume) = (config.identity(), Some(resume));
    RunRecord { identity, seed: config.seed, finished: false, version, resume }
}

#[derive(Debug)]
enum Decision {
    Start,
    Resume,
    Move,
    Finished,
}

fn decide(path: &Path, loaded: &Loaded, wish: Wish) -> Result<Decision> {
    if !path.exists() {
        return Ok(Decision::Start);
    }
    let shown = path.display();
    let Some(old) = read_record(path)? else {
        return match is_empty(path)? {
            true => Ok(Decision::Start),
            false => Err(Fault::user(format!(
                "{shown} is no run folder (it has no {RECORD}) and is not empty; choose another --out"
            ))),
        };
    };
    let same = old.identity == loaded.config.identity();
    match wish {
        Wish::Fresh => Ok(Decision::Move),
        _ if !same => Err(Fault::user(format!(
            "{shown} holds a run of another config{}; use --fresh to move it aside and start anew, or choose another --out",
            differences(path, loaded)
        ))),
        Wish::Resume if old.finished => Ok(Decision::Finished),
        Wish::Plain if old.finished => Err(Fault::user(format!(
            "{shown} holds this run, finished; use --fresh to move it aside and start anew, or choose another --out"
        ))),
        _ => Ok(Decision::Resume),
    }
}

fn read_record(path: &Path) -> Result<Option<RunRecord>> {
    let file = path.join(RECORD);
    let fault =
        |reason: String| Fault::user(format!("{}: {reason}; choose another --out", file.display()));
    match read_limited_text(&file, RECORD_LIMIT) {
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| fault(format!("no record of a run: {error}"))),
        Err(Unread::Io(error))
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(unread) => Err(fault(unread.to_string())),
    }
}

/// True if nothing is in the folder but what a start leaves that was killed before its record was written.
fn is_empty(path: &Path) -> Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    for entry in
        std::fs::read_dir(path).with_context(|| format!("failed to read {}", path.display()))?
    {
        let name = entry?.file_name();
        if ![LOCK, RECORD_BESIDE, CONFIG, CONFIG_BESIDE].iter().any(|own| name == *own) {
            return Ok(false);
        }
    }
    // A lone config.toml may be a person's; a start always locks before it writes one.
    Ok(path.join(LOCK).exists() || !path.join(CONFIG).exists())
}

fn lock(path: &Path) -> Result<File> {
    let file = path.join(LOCK);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&file);
    let mut held = open.map_err(|error| disk_fault("open", &file, error))?;
    if flock(&held, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut owner = String::new();
        // The number only makes the message more useful; the lock itself decides.
        let _ = held.read_to_string(&mut owner);
        let owner =
            if owner.is_empty() { String::new() } else { format!(" (process {})", owner.trim()) };
        return Err(Fault::user(format!(
            "another run works in {}{owner}; wait for it, stop it, or choose another --out",
            path.display()
        )));
    }
    // The folder may have been moved aside between opening and locking: then this is the lock of the old one.
    let now = std::fs::metadata(&file).map(|metadata| metadata.ino()).ok();
    if now != Some(held.metadata()?.ino()) {
        return Err(Fault::user(format!(
            "another run has just moved {} aside; try again",
            path.display()
        )));
    }
    held.set_len(0)?;
    held.rewind()?;
    write!(held, "{}", std::process::id())?;
    Ok(held)
}

/// Renames the folder to the first free `NAME.old-N`.
fn move_aside(path: &Path) -> Result<PathBuf> {
    let name =
        path.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy().into_owned());
    let aside =
        (1..).map(|n| path.with_file_name(format!("{name}.old-{n}"))).find(|aside| !aside.exists());
    let aside = aside.expect("some number is free");
    std::fs::rename(path, &aside)
        .with_context(|| format!("failed to move {} to {}", path.display(), aside.display()))?;
    Ok(aside)
}

fn write_record(path: &Path, record: &RunRecord) -> Result<()> {
    let text = serde_json::to_string_pretty(record).expect("a record is plain data");
    write_beside(path, RECORD_BESIDE, RECORD, text.as_bytes())
}

/// Makes the folder and those above it.
fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| disk_fault("create", path, error))
}

/// Writes a file under the name `beside`, then renames it: it is there whole or as it was.
fn write_beside(path: &Path, beside: &str, name: &str, bytes: &[u8]) -> Result<()> {
    write_synced(&path.join(beside), bytes)?;
    std::fs::rename(path.join(beside), path.join(name))
        .with_context(|| format!("failed to write {name} in {}", path.display()))?;
    File::open(path)?.sync_all().with_context(|| format!("failed to sync {}", path.display()))
}

fn write_synced(file: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut out = File::create(file)?;
        out.write_all(bytes)?;
        out.sync_all()
    };
    write().map_err(|error| disk_fault("write", file, error))
}

/// Up to three keys in which the folder's config differs, for the refusal.
fn differences(path: &Path, loaded: &Loaded) -> String {
    let parse = |text: &str| text.parse::<toml::Table>().ok();
    let old = std::fs::read_to_string(path.join(CONFIG)).ok().and_then(|text| parse(&text));
    let (Some(old), Some(new)) = (old, parse(&loaded.resolved_toml())) else {
        return String::new();
    };
    let mut keys = Vec::new();
    compare(&toml::Value::Table(old), &toml::Value::Table(new), "", &mut keys);
    keys.retain(|key| {
        key != "engine.threads"
            && !key.starts_with("console")
            && !key.split('.').any(|k| k == "gate")
    });
    match keys.len() {
        0 => String::new(),
        1..=3 => format!(" ({} differs)", keys.join(", ")),
        more => format!(" ({} and {} more differ)", keys[..3].join(", "), more - 3),
    }
}

fn compare(old: &toml::Value, new: &toml::Value, path: &str, keys: &mut Vec<String>) {
    use toml::Value::{Array, Table};
    let at = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (old, new) {
        (Table(old), Table(new)) => {
            for (key, value) in new {
                match old.get(key) {
                    Some(old) => compare(old, value, &at(key), keys),
                    None => keys.push(at(key)),
                }
            }
            keys.extend(old.keys().filter(|key| !new.contains_key(*key)).map(|key| at(key)));
        }
        (Array(old), Array(new)) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                let name = new
                    .get("name")
                    .and_then(toml::Value::as_str)
                    .map_or_else(|| index.to_string(), str::to_string);
                compare(old, new, &at(&name), keys);
            }
        }
        _ if old != new => keys.push(path.to_string()),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
