//! `manifest.json`: what a committed folder holds, and the proof that it still holds it.
//!
//! The manifest is written last. It lists every file with length and blake3 digest, and carries a
//! digest of itself; its bytes are canonical (reading and writing gives the same bytes), so that a
//! flipped byte anywhere in the folder, the manifest's own blanks included, is found before a
//! tensor is used.
//!
//! Knows no tensors: a file is bytes with a name.

use super::disk::{disk_fault, is_plain_name, read_limited};
use super::shards::spread;
use crate::cluster::{Work, made};
use crate::config::Fault;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Version of the folder's layout that this program writes and reads.
pub const FORMAT: u32 = 1;
const MANIFEST_LIMIT: u64 = 16 << 20;

/// Where a run stood, and the files that say so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of the folder; set when it is committed.
    pub format: u32,
    /// Name of the stage.
    pub stage: String,
    /// Its index in the run.
    pub stage_index: usize,
    /// Steps of the stage that are done. This is the cursor of its data too: batches, prompts and
    /// draws are functions of (seed, stage, step), and the next step takes the next ones.
    pub step: u64,
    /// True if the stage is done.
    pub finished_stage: bool,
    /// Version of the policy's weights.
    pub policy_version: u64,
    /// Optimizer steps taken in the stage.
    pub optimizer_step: u64,
    /// The run's seed: with the counters above it is the whole state of the random numbers.
    pub seed: u64,
    /// Hash of the run's configuration, threads, console, gates and place apart.
    pub config_identity: String,
    /// The files, by name; filled when the folder is committed.
    pub files: BTreeMap<String, FileRecord>,
}

/// One file's length and content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length.
    pub bytes: u64,
    /// Digest of the content, in hexadecimal.
    pub blake3: String,
}

/// The file: the manifest under its own digest.
#[derive(Serialize, Deserialize)]
struct Sealed {
    blake3: String,
    manifest: Manifest,
}

impl Manifest {
    /// Compares a folder with its manifest, byte for byte; the error names the file and what is
    /// wrong with it.
    pub fn verify(folder: &Path) -> Result<Manifest> {
        Manifest::verify_share(folder, 0, 1)
    }

    /// The same, but of the files' content only this rank's share of so many: as many bytes as the others'.
    pub fn verify_share(folder: &Path, rank: usize, ranks: usize) -> Result<Manifest> {
        let manifest = Manifest::read(folder)?;
        let all: Vec<usize> = (0..ranks).collect();
        let work: Vec<_> = manifest.files.values().map(|file| (file.bytes, all.clone())).collect();
        let readers = spread(&work, ranks);
        for ((name, record), reader) in manifest.files.iter().zip(readers) {
            let path = folder.join(name);
            let fault = |what: String| {
                Err(Fault::user(format!(
                    "{}: {what}; this checkpoint is damaged, use another one",
                    path.display()
                )))
            };
            if !is_plain_name(name) {
                return fault(format!("the manifest lists {name:?}, which is no name of a file"));
            }
            match std::fs::metadata(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    return fault("is missing".to_string());
                }
                Err(e) => {
                    return Err(e).with_context(|| format!("failed to look at {}", path.display()));
                }
                Ok(found) if found.len() != record.bytes => {
                    return fault(format!(
                        "has {} bytes, the manifest says {}",
                        found.len(),
                        record.bytes
                    ));
                }
                Ok(_) => {}
            }
            if reader == rank && FileRecord::of(&path)? != *record {
                return fault("its content is not what was written".to_string());
            }
        }
        // A stray index or config would change what is loaded.
        for name in list_files(folder)? {
            let matters = name.ends_with(".safetensors") || name.ends_with(".json");
            if matters && name != MANIFEST_FILE && !manifest.files.contains_key(&name) {
                return Err(Fault::user(format!(
                    "{}: is not part of the checkpoint (its manifest does not list it); remove it",
                    folder.join(name).display()
                )));
            }
        }
        Ok(manifest)
    }

    /// Reads a manifest and checks it against its own digest; the files are not looked at.
    pub fn read(folder: &Path) -> Result<Manifest> {
        let path = folder.join(MANIFEST_FILE);
        let at = path.display();
        let bytes = read_limited(&path, MANIFEST_LIMIT)?;
        let sealed: Sealed = serde_json::from_slice(&bytes)
            .map_err(|e| Fault::user(format!("{at}:{}:{}: damaged: {e}", e.line(), e.column())))?;
        if sealed.manifest.render() != bytes {
            return Err(Fault::user(format!("{at}: damaged: it does not match its own digest")));
        }
        if sealed.manifest.format != FORMAT {
            return Err(Fault::user(format!(
                "{at}: format {} of a checkpoint, this program reads {FORMAT}; use the program \
                 that wrote it",
                sealed.manifest.format
            )));
        }
        Ok(sealed.manifest)
    }

    /// Lists the files of a folder that is being committed. Those that ranks have written are recorded as they wrote
    /// them, the others are hashed.
    pub(super) fn record_files(
        &mut self,
        folder: &Path,
        mut written: BTreeMap<String, FileRecord>,
    ) -> Result<()> {
        self.format = FORMAT;
        self.files.clear();
        let is_shared = !written.is_empty();
        for name in list_files(folder)?.into_iter().filter(|name| name != MANIFEST_FILE) {
            assert!(is_plain_name(&name), "{name:?} in a folder that is committed");
            let path = folder.join(&name);
            let record = match written.remove(&name) {
                Some(record) => {
                    let found =
                        std::fs::metadata(&path).map_err(|e| disk_fault("find", &path, e))?;
                    if found.len() != record.bytes {
                        return Err(Fault::user(format!(
                            "{}: has {} bytes, and its rank wrote {}; all ranks must see the run's \
                             folder as it is",
                            path.display(),
                            found.len(),
                            record.bytes
                        )));
                    }
                    record
                }
                None if is_shared && name.ends_with(".safetensors") => {
                    return Err(Fault::user(format!(
                        "{}: no rank wrote it in this commit; end what else writes there, and run \
                         again with --resume",
                        path.display()
                    )));
                }
                None => FileRecord::of(&path)?,
            };
            self.files.insert(name, record);
        }
        match written.keys().next() {
            None => Ok(()),
            Some(name) => Err(Fault::user(format!(
                "{}: a rank wrote it, and it is not there; put the run's folder (--out) on a disk \
                 that all ranks share",
                folder.join(name).display()
            ))),
        }
    }

    /// The file's bytes.
    pub(super) fn render(&self) -> Vec<u8> {
        let compact =
            serde_json::to_vec(self).expect("a manifest has string keys and plain values");
        let sealed =
            Sealed { blake3: blake3::hash(&compact).to_hex().to_string(), manifest: self.clone() };
        let mut bytes = serde_json::to_vec_pretty(&sealed)
            .expect("a manifest has string keys and plain values");
        bytes.push(b'\n');
        bytes
    }
}

impl FileRecord {
    /// Reads a file and records it.
    pub fn of(path: &Path) -> Result<FileRecord> {
        let mut hasher = blake3::Hasher::new();
        let file = File::open(path).map_err(|e| disk_fault("open", path, e))?;
        let before = hasher.count();
        hasher.update_reader(Counted(file)).map_err(|e| disk_fault("read", path, e))?;
        let bytes = hasher.count() - before;
        Ok(FileRecord { bytes, blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// A file whose reading is counted.
struct Counted(File);

impl Read for Counted {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        made(Work::Hash);
        self.0.read(to)
    }
}

/// Names in a folder, sorted.
pub(super) fn list_files(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder).map_err(|e| disk_fault("list", folder, e))?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}
