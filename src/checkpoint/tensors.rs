//! Reading tensors: one safetensors file, or many with an index.
//!
//! The header is checked in full before a byte of data is used, so that a hostile file ends in an
//! error: its length, its names, every shape, type and offset (no hole, no overlap, nothing beyond
//! the end). Data is read at its place in the file, one tensor at a time; nothing is mapped, for
//! mapping is `unsafe` and a truncation would be a signal. Numbers come out as f32, whatever 16, 32
//! or 64 bit float they were stored as.

use super::disk::{is_plain_name, read_limited};
use super::manifest::{MANIFEST_FILE, Manifest};
pub use super::tensor_writer::{Fetch, TensorEntry, write_tensors};
use crate::config::Fault;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Name of the index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of an unsharded model.
pub const MODEL_FILE: &str = "model.safetensors";
/// Name of the optimizer's moments in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// A header or an index beyond this is an attack or a mistake; DeepSeek-V2's own index has 2.5 MB.
const HEADER_LIMIT: u64 = 16 << 20;
const RANK_LIMIT: usize = 8;
/// Floats of one read.
const CHUNK: usize = 1 << 16;

/// The tensors of a model's folder, or of one file.
#[derive(Debug)]
pub struct TensorFolder {
    files: Vec<(PathBuf, File)>,
    places: HashMap<String, Place>,
    order: Vec<String>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
}

impl TensorFolder {
    /// Opens a model's folder: the files of its index, or `model.safetensors`, or all its
    /// safetensors files but the optimizer's. A folder with a manifest is compared with it first.
    pub fn open(folder: &Path) -> Result<TensorFolder> {
        if !folder.is_dir() {
            return Err(Fault::user(format!(
                "{}: not a folder; name a checkpoint or a model's folder",
                folder.display()
            )));
        }
        if folder.join(MANIFEST_FILE).exists() {
            Manifest::verify(folder)?;
        }
        let index = folder.join(INDEX_FILE);
        if index.exists() {
            return TensorFolder::open_sharded(folder, &index);
        }
        let mut names = Vec::new();
        if folder.join(MODEL_FILE).exists() {
            names.push(MODEL_FILE.to_string());
        } else {
            for entry in std::fs::read_dir(folder)
                .with_context(|| format!("failed to list {}", folder.display()))?
            {
                let name = entry?.file_name().to_string_lossy().into_owned();
                if name.ends_with(".safetensors") && name != OPTIMIZER_FILE {
                    names.push(name);
                }
            }
            names.sort();
        }
        if names.is_empty() {
            return Err(Fault::user(format!(
                "{}: holds no .safetensors file, so it is no checkpoint; name a folder with \
                 config.json and model.safetensors",
                folder.display()
            )));
        }
        TensorFolder::of_files(folder, &names)
    }

    /// Opens one file.
    pub fn open_file(path: &Path) -> Result<TensorFolder> {
        let mut tensors = TensorFolder::empty();
        tensors.add(path)?;
        Ok(tensors)
    }

    /// Names in the order in which the data lies.
    pub fn names(&self) -> &[String] {
        &self.order
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|place| place.shape.as_slice())
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.places.values().map(Place::elements).map(|n| n as u64).sum()
    }

    /// The tensor's numbers, row by row.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let Some(place) = self.places.get(name) else {
            let place =
                self.files.first().map(|(path, _)| path.display().to_string()).unwrap_or_default();
            return Err(Fault::user(format!("{place}: has no tensor {name}")));
        };
        let (path, file) = &self.files[place.file];
        let read = || match place.dtype {
            Dtype::F32 => read_floats(file, place.start, place.elements()),
            Dtype::BF16 => read_converted(file, place, DType::BF16),
            Dtype::F16 => read_converted(file, place, DType::F16),
            Dtype::F64 => read_converted(file, place, DType::F64),
            other => Err(Fault::user(format!(
                "stored as {other:?}, which is no float of 16, 32 or 64 bits; convert the model \
                 to bf16 or f32 first"
            ))),
        };
        read().with_context(|| format!("{}: tensor {name}", path.display()))
    }

    fn empty() -> TensorFolder {
        TensorFolder { files: Vec::new(), places: HashMap::new(), order: Vec::new() }
    }

    fn of_files(folder: &Path, names: &[String]) -> Result<TensorFolder> {
        let mut tensors = TensorFolder::empty();
        for name in names {
            tensors.add(&folder.join(name))?;
        }
        Ok(tensors)
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<TensorFolder> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let at = index.display();
        let parsed: Index = serde_json::from_slice(&read_limited(index, HEADER_LIMIT)?)
            .map_err(|e| Fault::user(format!("{at}:{}:{}: {e}", e.line(), e.column())))?;
        for (tensor, file) in &parsed.weight_map {
            if !is_plain_name(file) || !file.ends_with(".safetensors") {
                return Err(Fault::user(format!(
                    "{at}: weight_map.{tensor} = {file:?} is no name of a .safetensors file in \
                     the same folder"
                )));
            }
        }
        let names: BTreeSet<&String> = parsed.weight_map.values().collect();
        let names: Vec<String> = names.into_iter().cloned().collect();
        let tensors = TensorFolder::of_files(folder, &names)?;
        for (tensor, file) in &parsed.weight_map {
            let found =
                tensors.places.get(tensor).map(|place| tensors.files[place.file].0.ends_with(file));
            if found != Some(true) {
                return Err(Fault::user(format!(
                    "{at}: says that {tensor} is in {file}, and it is not there"
                )));
            }
        }
        Ok(tensors)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let at = path.display();
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Fault::user(format!("{at}: no such file")),
            _ => anyhow::Error::new(e).context(format!("failed to open {at}")),
        })?;
        let (data_start, tensors) = read_header(&file).map_err(|e| match e {
            HeaderError::Io(e) => anyhow::Error::new(e).context(format!("failed to read {at}")),
            HeaderError::Bad(reason) => {
                Fault::user(format!("{at}: {reason}; the file is damaged or no safetensors file"))
            }
        })?;
        let lossy: Vec<&str> = tensors
            .iter()
            .filter(|(_, info)| matches!(info.dtype, Dtype::F16 | Dtype::F64))
            .map(|(name, _)| name.as_str())
            .collect();
        if let Some(first) = lossy.first() {
            tracing::warn!(
                "{at}: {} tensors (first: {first}) are f16 or f64 and are read as f32",
                lossy.len()
            );
        }
        self.files.push((path.to_path_buf(), file));
        for (name, info) in tensors {
            let start = data_start + info.data_offsets.0 as u64;
            let place =
                Place { file: self.files.len() - 1, dtype: info.dtype, shape: info.shape, start };
            if let Some(other) = self.places.insert(name.clone(), place) {
                return Err(Fault::user(format!(
                    "{at}: tensor {name} is also in {}",
                    self.files[other.file].0.display()
                )));
            }
            self.order.push(name);
        }
        Ok(())
    }
}

impl Place {
    /// The header's check has multiplied the shape without overflow.
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

enum HeaderError {
    Io(std::io::Error),
    Bad(String),
}

/// Checks the header against the file's length; gives the tensors in order of their data.
fn read_header(file: &File) -> Result<(u64, Vec<(String, TensorInfo)>), HeaderError> {
    let bad = |reason: String| Err(HeaderError::Bad(reason));
    let length = file.metadata().map_err(HeaderError::Io)?.len();
    if length < 8 {
        return bad(format!("{length} bytes are too few for a header"));
    }
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).map_err(HeaderError::Io)?;
    let header_length = u64::from_le_bytes(word);
    if header_length > HEADER_LIMIT {
        return bad(format!(
            "a header of {header_length} bytes is over the limit of {HEADER_LIMIT}"
        ));
    }
    if header_length > length - 8 {
        return bad(format!("truncated: the header has {header_length} bytes, the file {length}"));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact_at(&mut header, 8).map_err(HeaderError::Io)?;
    let Header(mut tensors) = match serde_json::from_slice(&header) {
        Ok(header) => header,
        Err(e) => return bad(format!("bad header: {e}")),
    };
    let mut seen = BTreeSet::new();
    for (name, info) in &tensors {
        if !is_plain_name(name) {
            return bad(format!("{name:?} is no name of a tensor"));
        }
        if info.shape.len() > RANK_LIMIT {
            return bad(format!("tensor {name} has {} dimensions", info.shape.len()));
        }
        if !seen.insert(name) {
            return bad(format!("tensor {name} stands in the header twice"));
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data = match Metadata::new(None, tensors.clone()) {
        Ok(metadata) => metadata.data_len() as u64,
        Err(e) => return bad(format!("bad header: {e}")),
    };
    let expected = 8 + header_length + data;
    if expected != length {
        return bad(format!("the header describes {expected} bytes, the file has {length}"));
    }
    Ok((8 + header_length, tensors))
}

/// The header as written, duplicates included: a map type would drop them silently.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value::<TensorInfo>()?));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads little-endian f32 in pieces, so that no second copy of the tensor is held.
fn read_floats(file: &File, start: u64, count: usize) -> Result<Vec<f32>> {
    let mut floats = Vec::with_capacity(count);
    let mut bytes = vec![0; CHUNK.min(count) * 4];
    let mut at = start;
    while floats.len() < count {
        let piece = &mut bytes[..(count - floats.len()).min(CHUNK) * 4];
        file.read_exact_at(piece, at)?;
        let words = piece.chunks_exact(4);
        floats
            .extend(words.map(|w| f32::from_le_bytes(w.try_into().expect("chunks of four bytes"))));
        at += piece.len() as u64;
    }
    Ok(floats)
}

fn read_converted(file: &File, place: &Place, dtype: DType) -> Result<Vec<f32>> {
    let mut bytes = vec![0; place.elements() * dtype.size_in_bytes()];
    file.read_exact_at(&mut bytes, place.start)?;
    let stored = Tensor::from_raw_buffer(&bytes, dtype, &[place.elements()], &Device::Cpu)?;
    Ok(stored.to_dtype(DType::F32)?.to_vec1()?)
}

#[cfg(test)]
mod tests;
