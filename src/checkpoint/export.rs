//! Export: a folder in Hugging Face layout that transformers loads, from one of ours or from
//! another of its kind.
//!
//! The model is gathered into `<out>.tmp`, read back, and renamed: `<out>` is whole or not there.
//! Weights are f32 or bf16 in shards with an index, under the published names with one tensor an
//! expert. A reward model's head has no place in that layout and is left out with a note. The same
//! source gives the same bytes.

use super::disk::{disk_fault, rename_synced, sync_folder, write_synced};
use super::manifest::list_files;
use super::model_json::{CONFIG_FILE, copy_model_config, read_model_config};
use super::stored::StoredType;
use super::tensor_writer::write_file;
use super::tensors::{INDEX_FILE, TensorEntry, TensorFolder};
use super::tokenizer_json::{
    GENERATION_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, copy_tokenizer,
};
use crate::config::failpoint::failpoint;
use crate::config::{Fault, LatentScaling, ModelConfig};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Bytes of a shard at most, unless one tensor is larger.
const SHARD_BYTES: u64 = 4 << 30;
pub(super) const SCORE_HEAD: &str = "score.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// What was exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// The folder, or the one file.
    pub out: PathBuf,
    /// Tensors and their elements.
    pub tensors: usize,
    /// See `tensors`.
    pub parameters: u64,
    /// Files of weights.
    pub shards: usize,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Exports a model's folder as one in Hugging Face layout.
pub fn export_hf(source: &Path, out: &Path, stored: StoredType) -> Result<ExportReport> {
    export_in_shards(source, out, stored, SHARD_BYTES)
}

fn export_in_shards(
    source: &Path,
    out: &Path,
    stored: StoredType,
    shard_bytes: u64,
) -> Result<ExportReport> {
    let dtype = stored.torch_name()?;
    refuse_foreign(source, out)?;
    let config = read_model_config(source)?;
    let tensors = TensorFolder::open(source)?;
    let mut notes = Vec::new();
    let mut entries = Vec::new();
    for name in tensors.names() {
        if name == SCORE_HEAD {
            notes.push(format!(
                "{SCORE_HEAD} (a reward model's head) has no place in this layout and is left out"
            ));
            continue;
        }
        let shape = tensors.shape(name).expect("a listed tensor has a shape").to_vec();
        entries.push(TensorEntry { name: name.clone(), shape });
    }
    if tensors.shape(HEAD).is_none() && !config.tie_word_embeddings {
        return Err(Fault::user(format!(
            "{}: has no {HEAD}, so it is no language model",
            source.display()
        )));
    }

    let folded = ModelConfig { latent_scaling: LatentScaling::Off, ..config.clone() };
    let aside = beside(out, "tmp");
    if aside.exists() {
        std::fs::remove_dir_all(&aside).map_err(|e| disk_fault("remove", &aside, e))?;
    }
    std::fs::create_dir_all(&aside).map_err(|e| disk_fault("create", &aside, e))?;
    let read = |name: &str| Ok(fold(&config, name, tensors.read_f32(name)?));
    let written = fill(&read, &aside, &entries, stored, shard_bytes)
        .and_then(|shards| copy_model_config(source, &aside, &folded, dtype).map(|()| shards))
        .and_then(|shards| copy_tokenizer(source, &aside, &config).map(|()| shards))
        .and_then(|shards| read_back(&aside, &entries).map(|()| shards))
        .and_then(|shards| publish(&aside, out).map(|()| shards));
    let shards = written.inspect_err(|_| {
        // A failed export leaves nothing behind; what cannot be removed now is removed by the next
        // one.
        let _ = std::fs::remove_dir_all(&aside);
    })?;
    let parameters = entries.iter().map(|e| e.elements() as u64).sum();
    Ok(ExportReport { out: out.to_path_buf(), tensors: entries.len(), parameters, shards, notes })
}

/// Refuses an output that holds anything but an earlier export.
fn refuse_foreign(source: &Path, out: &Path) -> Result<()> {
    let same = |a: &Path, b: &Path| {
        std::fs::canonicalize(a)
            .ok()
            .zip(std::fs::canonicalize(b).ok())
            .is_some_and(|(a, b)| a == b)
    };
    if same(source, out) {
        return Err(Fault::user(format!(
            "{}: is the model that is exported; name another --out",
            out.display()
        )));
    }
    for folder in [out.to_path_buf(), beside(out, "tmp"), beside(out, "old")] {
        let at = folder.display();
        match std::fs::symlink_metadata(&folder) {
            Err(_) => continue,
            Ok(found) if !found.is_dir() => {
                return Err(Fault::user(format!("{at}: is no folder; name another --out")));
            }
            Ok(_) => {}
        }
        if let Some(other) = list_files(&folder)?.into_iter().find(|name| !is_export_file(name)) {
            return Err(Fault::user(format!(
                "{at}: holds {other}, so it is no export and is not overwritten; name another --out"
            )));
        }
    }
    Ok(())
}

fn is_export_file(name: &str) -> bool {
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    [CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE, INDEX_FILE]
        .contains(&name)
        || shard.is_some_and(|numbers| numbers.contains("-of-"))
}

/// `<out>.tmp` and the like: in the same folder, so that a rename moves no data.
pub(super) fn beside(out: &Path, ending: &str) -> PathBuf {
    // A trailing `/` or `.` would put it inside.
    let mut name = out.components().as_path().as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

/// A tensor as the layout wants it: the norms of scaled latents take the factor, rounded as the model rounds it.
pub(super) fn fold(config: &ModelConfig, name: &str, mut values: Vec<f32>) -> Vec<f32> {
    let (query, latent) = config.latent_factors();
    for (norm, factor) in [("q_a_layernorm", query), ("kv_a_layernorm", latent)] {
        if factor != 1.0 && name.ends_with(&format!(".{norm}.weight")) {
            values.iter_mut().for_each(|value| *value *= factor as f32);
        }
    }
    values
}

/// Writes the shards and their index.
fn fill(
    read: &dyn Fn(&str) -> Result<Vec<f32>>,
    aside: &Path,
    entries: &[TensorEntry],
    stored: StoredType,
    shard_bytes: u64,
) -> Result<usize> {
    let bytes = |entry: &TensorEntry| stored.bytes(entry.elements());
    let shards = plan_shards(entries, &bytes, shard_bytes);
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        weight_map.extend(shard.iter().map(|entry| (entry.name.clone(), json!(file))));
        let mut fetch = |i: usize| read(&shard[i].name);
        write_file(&aside.join(file), shard, stored, &mut fetch, "export-write")?;
    }
    assert!(!entries.is_empty(), "a language model has a head or an embedding");
    let total: u64 = entries.iter().map(bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
    let mut bytes = serde_json::to_vec_pretty(&index).expect("JSON values can be written");
    bytes.push(b'\n');
    write_synced(&aside.join(INDEX_FILE), &bytes)?;
    Ok(shards.len())
}

/// Cuts the list so that no shard exceeds `shard_bytes`, unless by a single tensor.
fn plan_shards<'a>(
    entries: &'a [TensorEntry],
    bytes: &dyn Fn(&TensorEntry) -> u64,
    shard_bytes: u64,
) -> Vec<&'a [TensorEntry]> {
    let mut shards = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (index, entry) in entries.iter().enumerate() {
        if index > start && filled + bytes(entry) > shard_bytes {
            shards.push(&entries[start..index]);
            (start, filled) = (index, 0);
        }
        filled += bytes(entry);
    }
    shards.push(&entries[start..]);
    shards
}

/// Opens what was written as any reader would.
fn read_back(aside: &Path, entries: &[TensorEntry]) -> Result<()> {
    let written = TensorFolder::open(aside)?;
    assert_eq!(written.names().len(), entries.len(), "tensors of an export read back");
    for entry in entries {
        assert_eq!(
            written.shape(&entry.name),
            Some(entry.shape.as_slice()),
            "{} read back",
            entry.name
        );
    }
    Ok(())
}

fn publish(aside: &Path, out: &Path) -> Result<()> {
    sync_folder(aside)?;
    failpoint("export-before-rename");
    let old = beside(out, "old");
    if out.exists() {
        if old.exists() {
            std::fs::remove_dir_all(&old).map_err(|e| disk_fault("remove", &old, e))?;
        }
        std::fs::rename(out, &old).map_err(|e| disk_fault("rename", out, e))?;
    }
    failpoint("export-mid-rename");
    // A relative path of one name lies in the current folder.
    let full = std::path::absolute(out).map_err(|e| disk_fault("find", out, e))?;
    rename_synced(aside, &full)?;
    if old.exists() {
        std::fs::remove_dir_all(&old).map_err(|e| disk_fault("remove", &old, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
