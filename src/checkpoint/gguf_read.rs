//! Reading GGUF files, of which nothing is believed: `candle` decodes what was checked here first.
//!
//! Invariants:
//!   * every declared size is compared with the bytes that are left before anything is made of it
//!   * every tensor has one to four dimensions, none of which is 0, whole blocks, a name of its own,
//!     and all of its data inside the file

use crate::config::Fault;
use anyhow::{Context, Result};
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
const MOST_ALIGNMENT: u64 = 1 << 16;
const MOST_DIMENSIONS: u32 = 4;
/// Names of keys and tensors; llama.cpp takes 64 bytes of the latter.
const MOST_NAME: u64 = 1 << 16;

/// Types of values, as the format numbers them.
const U32: u32 = 4;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// An open GGUF file.
pub struct GgufFile {
    path: PathBuf,
    file: File,
    content: Content,
}

impl GgufFile {
    /// Opens a file and checks everything but the numbers.
    pub fn open(path: &Path) -> Result<GgufFile> {
        let at = path.display();
        let mut file = File::open(path).with_context(|| format!("failed to open {at}"))?;
        let length = file.metadata().with_context(|| format!("failed to look at {at}"))?.len();
        let bad = |reason: String| {
            Fault::user(format!("{at}: {reason}; the file is damaged or no GGUF file"))
        };
        let mut scan = Scan { input: BufReader::new(&file), at: 0, length };
        scan.file().map_err(bad)?;
        file.rewind().with_context(|| format!("failed to read {at}"))?;
        let content =
            Content::read(&mut BufReader::new(&file)).map_err(|error| bad(error.to_string()))?;
        Ok(GgufFile { path: path.to_path_buf(), file, content })
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.content.tensor_infos.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A tensor's dimensions, the slowest first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.content.tensor_infos.get(name).map(|info| info.shape.dims())
    }

    /// A tensor's numbers, row by row, whatever they are stored as.
    pub fn read_f32(&mut self, name: &str) -> Result<Vec<f32>> {
        let at = format!("{}: tensor {name}", self.path.display());
        let numbers = |error: candle_core::Error| Fault::user(format!("{at}: {error}"));
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).map_err(numbers)?;
        let plain = tensor.dequantize(&Device::Cpu).and_then(|tensor| tensor.flatten_all());
        plain.and_then(|tensor| tensor.to_vec1()).map_err(numbers)
    }
}

/// Reads through a file, counting what is left.
struct Scan<'a> {
    input: BufReader<&'a File>,
    at: u64,
    length: u64,
}

impl Scan<'_> {
    fn file(&mut self) -> Result<(), String> {
        if self.bytes(4)? != b"GGUF" {
            return Err("it does not begin with GGUF".to_string());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("version {version} of the format; 2 and 3 are read"));
        }
        let (tensors, keys) = (self.u64()?, self.u64()?);
        self.require(tensors, 24, "tensors")?;
        self.require(keys, 13, "keys")?;
        let mut alignment = DEFAULT_ALIGNMENT;
        let mut names = HashSet::new();
        for _ in 0..keys {
            let key = self.name()?;
            let kind = self.u32()?;
            if key == ALIGNMENT_KEY {
                if kind != U32 {
                    return Err(format!("{key} has the type {kind} and not {U32}"));
                }
                alignment = u64::from(self.u32()?);
                if !alignment.is_power_of_two() || alignment > MOST_ALIGNMENT {
                    return Err(format!("{key} = {alignment} is no alignment"));
                }
            } else {
                self.value(kind).map_err(|reason| format!("key {key}: {reason}"))?;
            }
            if !names.insert(key.clone()) {
                return Err(format!("key {key} stands in it twice"));
            }
        }
        names.clear();
        let mut ends = Vec::new();
        for _ in 0..tensors {
            let name = self.name()?;
            ends.push(self.tensor(alignment).map_err(|reason| format!("tensor {name}: {reason}"))?);
            if !names.insert(name.clone()) {
                return Err(format!("tensor {name} stands in it twice"));
            }
        }
        let data = self.at.next_multiple_of(alignment);
        match ends.into_iter().max().map(|end| data.checked_add(end)) {
            Some(end) if end.is_none_or(|end| end > self.length) => {
                Err(format!("truncated: its tensors end beyond its {} bytes", self.length))
            }
            _ => Ok(()),
        }
    }

    fn value(&mut self, kind: u32) -> Result<(), String> {
        match kind {
            BOOL => self.flag(),
            TEXT => {
                let length = self.u64()?;
                self.skip(length)
            }
            LIST => {
                let (kind, count) = (self.u32()?, self.u64()?);
                match kind {
                    LIST => Err("a list of lists is not read".to_string()),
                    TEXT => {
                        self.require(count, 8, "texts")?;
                        (0..count).try_for_each(|_| self.value(TEXT))
                    }
                    BOOL => {
                        self.require(count, 1, "flags")?;
                        (0..count).try_for_each(|_| self.flag())
                    }
                    _ => {
                        let bytes = width(kind)?;
                        self.require(count, bytes, "numbers")?;
                        self.skip(count * bytes)
                    }
                }
            }
            _ => self.skip(width(kind)?),
        }
    }

    /// The end of a tensor's data, from the beginning of all data.
    fn tensor(&mut self, alignment: u64) -> Result<u64, String> {
        let rank = self.u32()?;
        if !(1..=MOST_DIMENSIONS).contains(&rank) {
            return Err(format!("{rank} dimensions; 1 to {MOST_DIMENSIONS} are read"));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            shape.push(self.u64()?);
        }
        let (kind, offset) = (self.u32()?, self.u64()?);
        let (block, bytes) = block(kind)?;
        // The fastest dimension comes first, and its rows hold whole blocks.
        if shape.contains(&0) || !shape[0].is_multiple_of(block) {
            return Err(format!(
                "{shape:?} numbers of type {kind} have a dimension of 0 or part of a block"
            ));
        }
        let elements = shape.iter().try_fold(1_u64, |product, size| product.checked_mul(*size));
        let size = elements.and_then(|elements| (elements / block).checked_mul(bytes));
        let end = size.and_then(|size| offset.checked_add(size)).filter(|end| *end <= self.length);
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "its data begins at {offset}, which is not aligned to {alignment}"
            ));
        }
        end.ok_or_else(|| format!("{shape:?} numbers at {offset} are more than the file has"))
    }

    /// `count` things of at least `bytes` each must fit into what is left.
    fn require(&self, count: u64, bytes: u64, what: &str) -> Result<(), String> {
        let left = self.length - self.at;
        match count.checked_mul(bytes).is_some_and(|needed| needed <= left) {
            true => Ok(()),
            false => Err(format!("{count} {what} are declared where {left} bytes are left")),
        }
    }

    fn name(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        if length == 0 || length > MOST_NAME {
            return Err(format!("a name of {length} bytes"));
        }
        let name = String::from_utf8(self.bytes(length)?).map_err(|_| "a name is no text")?;
        match name.contains('\0') {
            true => Err(format!("the name {name:?} holds a zero")),
            false => Ok(name),
        }
    }

    fn flag(&mut self) -> Result<(), String> {
        match self.bytes(1)?[0] {
            0 | 1 => Ok(()),
            other => Err(format!("{other} is neither true nor false")),
        }
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("four bytes")))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().expect("eight bytes")))
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>, String> {
        self.require(count, 1, "bytes")?;
        let mut bytes = vec![0; count as usize];
        self.input.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.at += count;
        Ok(bytes)
    }

    fn skip(&mut self, count: u64) -> Result<(), String> {
        self.require(count, 1, "bytes")?;
        let count_of = i64::try_from(count).map_err(|error| error.to_string())?;
        self.input.seek_relative(count_of).map_err(|error| error.to_string())?;
        self.at += count;
        Ok(())
    }
}

/// Bytes of a number of a type.
fn width(kind: u32) -> Result<u64, String> {
    match kind {
        0 | 1 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(format!("the type {kind} of a value is unknown")),
    }
}

/// Numbers and bytes of a block of a tensor's type.
fn block(kind: u32) -> Result<(u64, u64), String> {
    match kind {
        0 => Ok((1, 4)),
        1 | 30 => Ok((1, 2)),
        2 => Ok((32, 18)),
        3 => Ok((32, 20)),
        6 => Ok((32, 22)),
        7 => Ok((32, 24)),
        8 => Ok((32, 34)),
        10 => Ok((256, 84)),
        11 => Ok((256, 110)),
        12 => Ok((256, 144)),
        13 => Ok((256, 176)),
        14 => Ok((256, 210)),
        _ => Err(format!("the type {kind} of numbers is not read")),
    }
}

#[cfg(test)]
mod tests;
