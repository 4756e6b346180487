//! Writing tensors as safetensors, one at a time: the header first, then the data in the order
//! given.
//!
//! The bytes are a function of names, shapes, numbers and their type alone, in a shard also of the save's name. No more
//! than one tensor is held, so that a model can be written that fits in memory only once.

use super::disk::disk_fault;
use super::manifest::FileRecord;
use super::shards::SAVE_KEY;
use super::stored::StoredType;
use crate::cluster::{Work, made};
use crate::config::failpoint::failpoint;
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
}

impl TensorEntry {
    /// Its numbers.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Gives the numbers of a tensor by its index in the list.
pub type Fetch<'a> = dyn FnMut(usize) -> Result<Vec<f32>> + 'a;

/// Writes a file of f32 tensors in the order given and forces it to the disk.
pub fn write_tensors(path: &Path, tensors: &[TensorEntry], fetch: &mut Fetch) -> Result<()> {
    write_file(path, tensors, StoredType::F32, fetch, "checkpoint-write")
}

/// The same for one of several files of a save, which carries the save's name; gives its length and hash, found while it
/// was written.
pub fn write_shard(
    path: &Path,
    tensors: &[TensorEntry],
    save: &str,
    fetch: &mut Fetch,
) -> Result<FileRecord> {
    let mut out = Hashed { out: create(path)?, hasher: blake3::Hasher::new() };
    let header = header(tensors, StoredType::F32, Some(save));
    write_data(&mut out, path, &header, tensors, StoredType::F32, fetch, "checkpoint-write")?;
    finish(out.out, path)?;
    let blake3 = out.hasher.finalize().to_hex().to_string();
    Ok(FileRecord { bytes: out.hasher.count(), blake3 })
}

/// Writes one file; `point` is the failpoint passed after each tensor.
pub(super) fn write_file(
    path: &Path,
    tensors: &[TensorEntry],
    stored: StoredType,
    fetch: &mut Fetch,
    point: &str,
) -> Result<()> {
    let mut out = create(path)?;
    write_data(&mut out, path, &header(tensors, stored, None), tensors, stored, fetch, point)?;
    finish(out, path)
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    let file = File::create(path).map_err(|e| disk_fault("write", path, e))?;
    Ok(BufWriter::with_capacity(1 << 18, file))
}

fn finish(out: BufWriter<File>, path: &Path) -> Result<()> {
    let synced = out.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all());
    synced.map_err(|e| disk_fault("write", path, e))
}

fn write_data(
    out: &mut dyn Write,
    path: &Path,
    header: &[u8],
    tensors: &[TensorEntry],
    stored: StoredType,
    fetch: &mut Fetch,
    point: &str,
) -> Result<()> {
    let fault = |e| disk_fault("write", path, e);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(header))
        .map_err(fault)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let numbers = fetch(index).with_context(|| format!("failed to gather {}", tensor.name))?;
        assert_eq!(
            numbers.len(),
            tensor.elements(),
            "{}: numbers against shape {:?}",
            tensor.name,
            tensor.shape
        );
        let mut bytes = Vec::with_capacity(4 << 14);
        for piece in numbers.chunks(1 << 14) {
            bytes.clear();
            stored.encode(piece, &mut bytes)?;
            out.write_all(&bytes).map_err(fault)?;
        }
        made(Work::Write);
        failpoint(point);
    }
    Ok(())
}

/// A file that is hashed while it is written.
struct Hashed {
    out: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// The JSON header, padded so that the data is aligned to eight bytes.
fn header(tensors: &[TensorEntry], stored: StoredType, save: Option<&str>) -> Vec<u8> {
    let dtype = match stored {
        StoredType::F32 => "F32",
        StoredType::Bf16 => "BF16",
        StoredType::Q8_0 => unreachable!("safetensors has no blocks; asked for before"),
    };
    let mut entries = Map::new();
    // transformers refuses a file that does not say which framework's layout it has.
    let mut metadata = json!({"format": "pt"});
    if let Some(save) = save {
        metadata[SAVE_KEY] = json!(save);
    }
    entries.insert("__metadata__".to_string(), metadata);
    let mut at = 0;
    for tensor in tensors {
        let end = at + stored.bytes(tensor.elements());
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end]});
        let previous = entries.insert(tensor.name.clone(), entry);
        assert!(previous.is_none(), "{} is written twice", tensor.name);
        at = end;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Fault;

    fn shapes() -> Vec<TensorEntry> {
        vec![
            TensorEntry { name: "z".into(), shape: vec![3] },
            TensorEntry { name: "a".into(), shape: vec![2, 2] },
        ]
    }

    #[test]
    fn the_same_tensors_give_the_same_bytes_aligned_to_eight() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let written: Vec<Vec<u8>> = ["one", "two"]
            .iter()
            .map(|name| {
                let path = folder.path().join(name);
                let mut fetch = |index: usize| Ok(vec![1.0; 3 + index]);
                write_tensors(&path, &shapes(), &mut fetch).expect("a file");
                std::fs::read(&path).expect("the file")
            })
            .collect();
        assert_eq!(written[0], written[1]);
        assert_eq!(u64::from_le_bytes(written[0][..8].try_into().expect("eight bytes")) % 8, 0);
    }

    #[test]
    fn a_shard_s_record_is_that_of_the_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("shard");
        let mut fetch = |index: usize| Ok(vec![2.0; 3 + index]);
        let record = write_shard(&path, &shapes(), "step 7", &mut fetch).expect("a file");
        assert_eq!(record, FileRecord::of(&path).expect("the file"));
    }

    #[test]
    #[should_panic(expected = "numbers against shape")]
    fn numbers_that_do_not_fill_the_shape_are_our_mistake() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let _ = write_tensors(&folder.path().join("x"), &shapes(), &mut |_| Ok(vec![0.0]));
    }

    #[test]
    fn a_full_disk_is_a_lack_of_resources() {
        let big = [TensorEntry { name: "a".into(), shape: vec![1 << 18] }];
        let error = write_tensors(Path::new("/dev/full"), &big, &mut |_| Ok(vec![0.0; 1 << 18]))
            .expect_err("no room");
        assert!(matches!(error.downcast_ref(), Some(Fault::Resources(_))), "{error:#}");
    }
}
