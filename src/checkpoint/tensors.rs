//! Reading tensors: one safetensors file, or many with an index.
//!
//! The header is checked in full before a byte of data is used, so that a hostile file ends in an
//! error: its length, its names, every shape, type and offset (no hole, no overlap, nothing beyond
//! the end). Files are mapped and data is read at its place, one tensor at a time, so that loading
//! holds one copy of the model. Numbers come out as f32, whatever 16, 32 or 64 bit float they were
//! stored as. Fused experts are seen under the names of single ones (`fused_experts`).

use super::disk::is_plain_name;
use super::fused_experts;
use super::manifest::{MANIFEST_FILE, Manifest};
use super::mapped::MappedFile;
use super::shards::{Index, SAVE_KEY, is_shard_of, read_index};
pub use super::tensor_writer::{Fetch, TensorEntry, write_shard, write_tensors};
use crate::config::Fault;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;

/// Name of the index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of an unsharded model.
pub const MODEL_FILE: &str = "model.safetensors";
/// Name of the optimizer's moments in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// A header beyond this is an attack or a mistake.
const HEADER_LIMIT: u64 = 16 << 20;
const RANK_LIMIT: usize = 8;

/// The tensors of a model's folder, or of one file.
#[derive(Debug)]
pub struct TensorFolder {
    files: Vec<MappedFile>,
    /// The save that each file is a shard of, if it says so.
    saves: Vec<Option<String>>,
    places: HashMap<String, Place>,
    order: Vec<String>,
    /// The file of each tensor under the name that the file has for it.
    stored: HashMap<String, usize>,
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
        TensorFolder::check_share(folder, 0, 1)?;
        TensorFolder::open_checked(folder)
    }

    /// Compares this rank's share of a model's folder with its manifest, if it has one. Of so many ranks each takes a
    /// share, so that together they read every byte once.
    pub fn check_share(folder: &Path, rank: usize, ranks: usize) -> Result<()> {
        if !folder.is_dir() {
            return Err(Fault::user(format!(
                "{}: not a folder; name a checkpoint or a model's folder",
                folder.display()
            )));
        }
        match folder.join(MANIFEST_FILE).exists() {
            true => Manifest::verify_share(folder, rank, ranks).map(drop),
            false => Ok(()),
        }
    }

    /// Opens a folder that was compared with its manifest.
    pub fn open_checked(folder: &Path) -> Result<TensorFolder> {
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
                let is_moments = name == OPTIMIZER_FILE || is_shard_of(OPTIMIZER_FILE, &name);
                if name.ends_with(".safetensors") && !is_moments {
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
        let place = self.place(name)?;
        self.read_place(name, place, 0..place.elements())
    }

    /// Some of them; no other byte of the file is touched.
    pub fn read_f32_range(&self, name: &str, elements: Range<usize>) -> Result<Vec<f32>> {
        let place = self.place(name)?;
        assert!(elements.end <= place.elements(), "{elements:?} of tensor {name}");
        self.read_place(name, place, elements)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).ok_or_else(|| {
            let file = self.files.first().map(|file| file.path().display().to_string());
            let (file, more) = (file.unwrap_or_default(), self.files.len().max(1) - 1);
            let others = if more > 0 { format!(" and {more} more files") } else { String::new() };
            Fault::user(format!("{file}{others}: has no tensor {name}"))
        })
    }

    fn read_place(&self, name: &str, place: &Place, elements: Range<usize>) -> Result<Vec<f32>> {
        let file = &self.files[place.file];
        let read = || -> Result<Vec<f32>> {
            let Some(size) = float_bytes(place.dtype) else {
                return Err(Fault::user(format!(
                    "stored as {:?}, which is no float of 16, 32 or 64 bits; convert the model to \
                     bf16 or f32 first",
                    place.dtype
                )));
            };
            let (start, count) =
                (place.start + (elements.start * size) as u64, elements.len() * size);
            let numbers = floats(place.dtype, file.bytes(start, count)?)?;
            file.forget(start, count);
            Ok(numbers)
        };
        read().with_context(|| format!("{}: tensor {name}", file.path().display()))
    }

    fn empty() -> TensorFolder {
        TensorFolder {
            files: Vec::new(),
            saves: Vec::new(),
            places: HashMap::new(),
            order: Vec::new(),
            stored: HashMap::new(),
        }
    }

    fn of_files(folder: &Path, names: &[String]) -> Result<TensorFolder> {
        let mut tensors = TensorFolder::empty();
        for name in names {
            tensors.add(&folder.join(name))?;
        }
        Ok(tensors)
    }

    /// Opens the files that an index names.
    pub(super) fn open_sharded(folder: &Path, index: &Path) -> Result<TensorFolder> {
        let at = index.display();
        let Index { files, save } = read_index(index)?;
        let names: BTreeSet<&String> = files.values().collect();
        let names: Vec<String> = names.into_iter().cloned().collect();
        let tensors = TensorFolder::of_files(folder, &names)
            .with_context(|| format!("{at}: names files that cannot be used"))?;
        for (tensor, file) in &files {
            let found = tensors
                .stored
                .get(tensor)
                .map(|place| tensors.files[*place].path().ends_with(file));
            if found != Some(true) {
                return Err(Fault::user(format!(
                    "{at}: says that {tensor} is in {file}, and it is not there"
                )));
            }
        }
        let told = |save: &Option<String>| save.clone().unwrap_or_else(|| "no save".to_string());
        let other = tensors.saves.iter().position(|other| *other != save);
        if let Some(other) = other.filter(|_| save.is_some()) {
            return Err(Fault::user(format!(
                "{}: is of {}, its index of {}; copy all files from one checkpoint",
                tensors.files[other].path().display(),
                told(&tensors.saves[other]),
                told(&save)
            )));
        }
        Ok(tensors)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let at = path.display();
        let file = MappedFile::open(path)?;
        let damaged = |reason: String| {
            Fault::user(format!("{at}: {reason}; the file is damaged or no safetensors file"))
        };
        let (data_start, tensors, save) = read_header(&file).map_err(damaged)?;
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
        let index = self.files.len();
        self.files.push(file);
        self.saves.push(save);
        for (name, info) in tensors {
            let start = data_start + info.data_offsets.0 as u64;
            match fused_experts::parts(&name, &info.shape).map_err(damaged)? {
                None => {
                    let place = Place { file: index, dtype: info.dtype, shape: info.shape, start };
                    self.insert(name.clone(), place)?;
                }
                Some(parts) => {
                    let size = float_bytes(info.dtype).unwrap_or(1);
                    for part in parts {
                        let start = start + (part.first * size) as u64;
                        let place =
                            Place { file: index, dtype: info.dtype, shape: part.shape, start };
                        self.insert(part.name, place)?;
                    }
                }
            }
            self.stored.insert(name, index);
        }
        Ok(())
    }

    fn insert(&mut self, name: String, place: Place) -> Result<()> {
        let file = place.file;
        if let Some(other) = self.places.insert(name.clone(), place) {
            return Err(Fault::user(format!(
                "{}: tensor {name} is also in {}",
                self.files[file].path().display(),
                self.files[other.file].path().display()
            )));
        }
        self.order.push(name);
        Ok(())
    }
}

impl Place {
    /// The header's check has multiplied the shape without overflow.
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Where the data begins, the tensors in order of their data, and the save that the file says it is of.
type Checked = (u64, Vec<(String, TensorInfo)>, Option<String>);

/// Checks the header against the file's length.
fn read_header(file: &MappedFile) -> Result<Checked, String> {
    let bad = |reason: String| Err(reason);
    let length = file.length();
    if length < 8 {
        return bad(format!("{length} bytes are too few for a header"));
    }
    let bytes = |start, count| file.bytes(start, count).map_err(|e| format!("{e:#}"));
    let header_length =
        u64::from_le_bytes(bytes(0, 8)?.try_into().expect("eight bytes were asked for"));
    if header_length > HEADER_LIMIT {
        return bad(format!(
            "a header of {header_length} bytes is over the limit of {HEADER_LIMIT}"
        ));
    }
    if header_length > length - 8 {
        return bad(format!("truncated: the header has {header_length} bytes, the file {length}"));
    }
    let Header { mut tensors, save } =
        match serde_json::from_slice(bytes(8, header_length as usize)?) {
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
    if length - 8 - header_length != data {
        return bad(format!(
            "the header describes {data} bytes of data, the file has {}",
            length - 8 - header_length
        ));
    }
    Ok((8 + header_length, tensors, save))
}

/// The header as written, duplicates included: a map type would drop them silently.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
    save: Option<String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut save) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        let metadata: Value = map.next_value()?;
                        save = metadata[SAVE_KEY].as_str().map(str::to_string);
                    } else {
                        tensors.push((name, map.next_value::<TensorInfo>()?));
                    }
                }
                Ok(Header { tensors, save })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Bytes of a float; `None` for what is none of those that are read.
fn float_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        Dtype::F64 => Some(8),
        _ => None,
    }
}

/// Little-endian numbers as f32: of f64 the nearest, of the others the same.
fn floats(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    const WHOLE: &str = "chunks of whole numbers";
    let wide = |half: &[u8]| {
        f32::from_bits(u32::from(u16::from_le_bytes(half.try_into().expect(WHOLE))) << 16)
    };
    let single = |word: &[u8]| f32::from_le_bytes(word.try_into().expect(WHOLE));
    let narrow = |word: &[u8]| f64::from_le_bytes(word.try_into().expect(WHOLE)) as f32;
    Ok(match dtype {
        Dtype::BF16 => bytes.chunks_exact(2).map(wide).collect(),
        Dtype::F32 => bytes.chunks_exact(4).map(single).collect(),
        Dtype::F64 => bytes.chunks_exact(8).map(narrow).collect(),
        _ => {
            let count = bytes.len() / 2;
            let stored = Tensor::from_raw_buffer(bytes, DType::F16, &[count], &Device::Cpu)?;
            stored.to_dtype(DType::F32)?.to_vec1()?
        }
    })
}

#[cfg(test)]
mod tests;
