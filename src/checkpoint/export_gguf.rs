//! Export: one GGUF file that llama.cpp loads, with its tokenizer, from a folder of ours or a Hugging Face folder.
//!
//! The file is written as `<out>.tmp`, read back by another reader, and renamed: `<out>` is whole or not there. No more
//! than one expert or matrix is held. The same source gives the same bytes.

use super::disk::{disk_fault, rename_synced};
use super::export::{ExportReport, HEAD, SCORE_HEAD, beside, fold};
use super::gguf::{GgufTensor, write_gguf};
use super::gguf_keys::model_keys;
use super::gguf_read::GgufFile;
use super::gguf_tensors::{Planned, plan};
use super::gguf_tokenizer::{GgufTokenizer, tokenizer_keys};
use super::model_json::read_model_config;
use super::stored::StoredType;
use super::tensors::TensorFolder;
use crate::config::Fault;
use crate::config::failpoint::failpoint;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Exports a model's folder as one GGUF file.
pub fn export_gguf(
    source: &Path,
    tokenizer: &GgufTokenizer,
    out: &Path,
    stored: StoredType,
) -> Result<ExportReport> {
    let aside = beside(out, "tmp");
    refuse_foreign(out)?;
    refuse_foreign(&aside)?;
    let config = read_model_config(source)?;
    let name = out.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut keys = model_keys(&config, &name, stored)?;
    keys.extend(tokenizer_keys(tokenizer, config.vocab_size)?);
    let tensors = TensorFolder::open(source)?;
    let mut notes = Vec::new();
    if tensors.shape(SCORE_HEAD).is_some() {
        notes.push(format!(
            "{SCORE_HEAD} (a reward model's head) has no place in this format and is left out"
        ));
    }
    if tensors.shape(HEAD).is_none() && !config.tie_word_embeddings {
        return Err(Fault::user(format!(
            "{}: has no {HEAD}, so it is no language model",
            source.display()
        )));
    }
    let planned = plan(&config, stored);
    let own: Vec<GgufTensor> = planned.iter().map(|plan| plan.tensor.clone()).collect();
    if let Some(folder) = std::path::absolute(out).ok().as_deref().and_then(Path::parent) {
        std::fs::create_dir_all(folder).map_err(|e| disk_fault("create", folder, e))?;
    }
    let read = |name: &str| Ok(fold(&config, name, tensors.read_f32(name)?));
    let mut fetch = |index: usize, part: usize| planned[index].gather.part(&read, part);
    let written = write_gguf(&aside, &keys, &own, &mut fetch)
        .and_then(|()| read_back(&aside, &planned))
        .and_then(|()| publish(&aside, out));
    written.inspect_err(|_| {
        // A failed export leaves nothing behind; what cannot be removed now is overwritten by the next one.
        let _ = std::fs::remove_file(&aside);
    })?;
    let parameters = own.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    Ok(ExportReport { out: out.to_path_buf(), tensors: own.len(), parameters, shards: 1, notes })
}

/// Refuses an output that is anything but an earlier export.
fn refuse_foreign(out: &Path) -> Result<()> {
    let at = out.display();
    let Ok(found) = std::fs::symlink_metadata(out) else { return Ok(()) };
    if found.is_dir() {
        return Err(Fault::user(format!(
            "{at}: is a folder, and a GGUF is one file; name it, such as --out {}",
            out.join("model.gguf").display()
        )));
    }
    let mut magic = Vec::new();
    let read = File::open(out).and_then(|file| file.take(4).read_to_end(&mut magic));
    if !found.is_file() || read.is_err() || !b"GGUF".starts_with(&magic) {
        return Err(Fault::user(format!(
            "{at}: is no GGUF file and is not overwritten; name another --out"
        )));
    }
    Ok(())
}

/// Opens what was written as a file of another program.
fn read_back(aside: &Path, planned: &[Planned]) -> Result<()> {
    let file = GgufFile::open(aside).context("the export does not read back")?;
    assert_eq!(file.names().len(), planned.len(), "tensors of an export read back");
    for Planned { tensor, .. } in planned {
        let found = file.shape(&tensor.name);
        assert_eq!(found, Some(tensor.shape.as_slice()), "{} read back", tensor.name);
    }
    Ok(())
}

fn publish(aside: &Path, out: &Path) -> Result<()> {
    failpoint("export-before-rename");
    let full = std::path::absolute(out).map_err(|e| disk_fault("find", out, e))?;
    rename_synced(aside, &full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_gguf_file_is_not_overwritten() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let told = refuse_foreign(folder.path()).expect_err("a folder").to_string();
        assert!(told.contains("model.gguf"), "{told}");
        let picture = folder.path().join("holiday.jpg");
        std::fs::write(&picture, "xyz").expect("a picture");
        let told = refuse_foreign(&picture).expect_err("a picture").to_string();
        assert!(told.contains("not overwritten"), "{told}");
        let half = folder.path().join("half.gguf.tmp");
        std::fs::write(&half, "GG").expect("a torn export");
        refuse_foreign(&half).expect("what a killed export left is overwritten");
        refuse_foreign(&folder.path().join("new.gguf")).expect("nothing is there");
    }
}
