//! The run's committed checkpoints and finished stages: written aside, synced, renamed; found again
//! after a crash.
//!
//! The order of a commit: (1) a folder `tmp-*` of its own is filled by the caller, or by all ranks, who
//! sync and hash what they write; (2) all other files are synced and hashed; (3) the manifest is written and synced, then the folder; (4) the folder gets its
//! final name `checkpoints/NNNNNN-<stage>-<step>`, and its parent is synced; (5) older ones beyond
//! `keep` are removed, each renamed first, so that no half-removed folder looks like a checkpoint.
//!
//! Invariants:
//!   * a folder under a final name is whole, whenever the process was killed
//!   * the newest whole checkpoint is never removed, and a failed commit removes none
//!   * the caller holds the run's lock: nobody else writes here

use super::disk::{disk_fault, is_plain_name, rename_synced, sync_file, sync_folder, write_synced};
use super::manifest::{MANIFEST_FILE, Manifest, list_files};
use super::shards::take_written;
use crate::config::Fault;
use crate::config::failpoint::failpoint;
use crate::config::fault::START_AGAIN;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const ASIDE: &str = "tmp-";

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// Its folder.
    pub folder: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
}

/// A checkpoint that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Its folder.
    pub folder: PathBuf,
    /// File and fault.
    pub reason: String,
}

/// What a run can resume from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latest {
    /// The newest checkpoint that is whole.
    pub commit: Option<Commit>,
    /// Newer ones that are not: to be reported.
    pub rejected: Vec<Rejected>,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Store {
    checkpoints: PathBuf,
    stages: PathBuf,
    keep: usize,
    rejected: BTreeSet<PathBuf>,
}

/// A folder that is being filled. Dropped without a commit, it is removed.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    target: PathBuf,
}

impl Staging {
    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a commit the folder has another name; what cannot be removed now is removed at the
        // next start.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Store {
    /// Opens a run's folder, which keeps `keep` checkpoints (at least one), and removes what an
    /// interrupted commit left.
    pub fn open(run: &Path, keep: usize) -> Result<Store> {
        let store = Store {
            checkpoints: run.join("checkpoints"),
            stages: run.join("stages"),
            keep: keep.max(1),
            rejected: BTreeSet::new(),
        };
        for folder in [&store.checkpoints, &store.stages] {
            std::fs::create_dir_all(folder).map_err(|e| disk_fault("create", folder, e))?;
            for name in list_files(folder)?.iter().filter(|name| name.starts_with(ASIDE)) {
                let stale = folder.join(name);
                std::fs::remove_dir_all(&stale).map_err(|e| disk_fault("remove", &stale, e))?;
            }
        }
        sync_folder(run)?;
        Ok(store)
    }

    /// Makes a folder to write a checkpoint into; `name` is `<stage>-<step>`, the store adds the
    /// running number.
    pub fn begin(&self, name: &str) -> Result<Staging> {
        let newest = self.numbered()?.first().map_or(0, |(number, _)| *number);
        let number = newest.checked_add(1).ok_or_else(|| {
            Fault::user(format!(
                "{}: no number is left; remove {newest}-*",
                self.checkpoints.display()
            ))
        })?;
        self.stage_aside(&self.checkpoints, &format!("{number:06}-{name}"))
    }

    /// Makes a folder to write a finished stage's model into; it becomes `stages/<name>`.
    pub fn begin_artefact(&self, name: &str) -> Result<Staging> {
        self.stage_aside(&self.stages, name)
    }

    /// Makes the folder a checkpoint and drops old ones.
    pub fn commit(&mut self, staging: Staging, manifest: Manifest) -> Result<Commit> {
        let manifest =
            seal(staging.path(), manifest).context("the checkpoint before this one is kept")?;
        failpoint("checkpoint-before-rename");
        assert!(!staging.target.exists(), "{} has a number of its own", staging.target.display());
        rename_synced(&staging.path, &staging.target)?;
        failpoint("checkpoint-after-rename");
        self.prune()?;
        Ok(Commit { folder: staging.target.clone(), manifest })
    }

    /// Makes the folder a stage's artefact, in place of an earlier one; gives its path.
    pub fn finish_artefact(&self, staging: Staging, manifest: Manifest) -> Result<PathBuf> {
        seal(staging.path(), manifest)?;
        failpoint("artefact-before-rename");
        if staging.target.exists() {
            // A resumed run finishes the stage again, with the same bytes.
            self.remove_aside(&staging.target)?;
        }
        rename_synced(&staging.path, &staging.target)?;
        Ok(staging.target.clone())
    }

    /// The newest checkpoint that is whole. Checkpoints of which none is whole are an error, for
    /// starting over would lose what may still be saved; no checkpoint at all is none.
    pub fn latest(&mut self) -> Result<Latest> {
        let mut latest = Latest::default();
        for (_, folder) in self.numbered()? {
            match Manifest::verify(&folder) {
                Ok(manifest) => {
                    latest.commit = Some(Commit { folder, manifest });
                    return Ok(latest);
                }
                Err(error) => {
                    self.rejected.insert(folder.clone());
                    latest.rejected.push(Rejected { folder, reason: format!("{error:#}") });
                }
            }
        }
        if latest.rejected.is_empty() {
            return Ok(latest);
        }
        let reasons: Vec<&str> = latest.rejected.iter().map(|r| r.reason.as_str()).collect();
        Err(Fault::user(format!(
            "no checkpoint in {} can be used: {}; restore one from a copy, or {START_AGAIN}",
            self.checkpoints.display(),
            reasons.join("; ")
        )))
    }

    /// Folders with a number, the newest first.
    fn numbered(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut found: Vec<(u64, PathBuf)> = list_files(&self.checkpoints)?
            .into_iter()
            .filter_map(|name| {
                Some((name.split_once('-')?.0.parse().ok()?, self.checkpoints.join(&name)))
            })
            .collect();
        found.sort();
        found.reverse();
        Ok(found)
    }

    fn stage_aside(&self, parent: &Path, name: &str) -> Result<Staging> {
        if !is_plain_name(name) {
            return Err(Fault::user(format!(
                "stage {name:?} cannot be the name of a folder; use letters, digits, `-`, `_` \
                 and `.`"
            )));
        }
        // No two have one name: a rank that is late with its part of an aborted commit finds nothing to write into.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let path = parent.join(format!("{ASIDE}{now:x}-{name}"));
        let staging = Staging { path, target: parent.join(name) };
        std::fs::create_dir(&staging.path).map_err(|e| disk_fault("create", &staging.path, e))?;
        failpoint("checkpoint-begin");
        Ok(staging)
    }

    /// Keeps the newest `keep` that were not found damaged; a damaged one goes once a newer whole
    /// one exists.
    fn prune(&mut self) -> Result<()> {
        let mut kept = 0;
        for (_, folder) in self.numbered()? {
            if kept < self.keep && !self.rejected.contains(&folder) {
                kept += 1;
                continue;
            }
            self.remove_aside(&folder)?;
            self.rejected.remove(&folder);
        }
        Ok(())
    }

    fn remove_aside(&self, folder: &Path) -> Result<()> {
        let name = folder.file_name().expect("a folder of the store has a name").to_string_lossy();
        let aside = folder.with_file_name(format!("{ASIDE}old-{name}"));
        rename_synced(folder, &aside)?;
        failpoint("checkpoint-mid-prune");
        std::fs::remove_dir_all(&aside).map_err(|e| disk_fault("remove", &aside, e))
    }
}

/// Syncs and hashes the files and writes the manifest: steps (2) and (3).
fn seal(folder: &Path, mut manifest: Manifest) -> Result<Manifest> {
    let path = folder.join(MANIFEST_FILE);
    let written = take_written(folder)?;
    for name in list_files(folder)?.iter().filter(|name| !written.contains_key(*name)) {
        sync_file(&folder.join(name))?;
    }
    manifest.record_files(folder, written)?;
    failpoint("checkpoint-before-manifest");
    write_synced(&path, &manifest.render())?;
    sync_folder(folder)?;
    Ok(manifest)
}

#[cfg(test)]
mod tests;
