//! The container GGUF, version 3: keys, then tensors, each aligned to 32 bytes.
//!
//! Written tensor by tensor and part by part, so that a model can be written that fits in memory only once; the writer
//! of `candle` wants every tensor in memory (docs/adr/007-gguf-container.md). The bytes are a function of keys, names,
//! shapes and numbers alone. Knows no model.

use super::disk::disk_fault;
use super::stored::StoredType;
use crate::config::failpoint::failpoint;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;
/// Numbers that are encoded at once: whole blocks.
const PIECE: usize = 1 << 14;

/// A value of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum GgufValue {
    /// A whole number of at least 0.
    U32(u32),
    /// A number.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// Text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Several whole numbers.
    Ints(Vec<i32>),
}

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct GgufTensor {
    /// Name.
    pub(super) name: String,
    /// Dimensions, the slowest first.
    pub(super) shape: Vec<usize>,
    /// Type of its numbers.
    pub(super) stored: StoredType,
}

impl GgufTensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn padded(&self) -> u64 {
        self.stored.bytes(self.elements()).next_multiple_of(ALIGNMENT)
    }
}

/// Gives a part of a tensor by the tensor's index and its own, whole rows at a time; `None` behind the last.
pub(super) type FetchPart<'a> = dyn FnMut(usize, usize) -> Result<Option<Vec<f32>>> + 'a;

/// Writes a file and forces it to the disk.
pub(super) fn write_gguf(
    path: &Path,
    keys: &[(String, GgufValue)],
    tensors: &[GgufTensor],
    fetch: &mut FetchPart,
) -> Result<()> {
    let fault = |e| disk_fault("write", path, e);
    let mut out = BufWriter::with_capacity(1 << 18, File::create(path).map_err(fault)?);
    out.write_all(&header(keys, tensors)).map_err(fault)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut written = 0;
        let mut bytes = Vec::new();
        let mut part = 0;
        while let Some(numbers) =
            fetch(index, part).with_context(|| format!("failed to gather {}", tensor.name))?
        {
            for piece in numbers.chunks(PIECE) {
                bytes.clear();
                tensor.stored.encode(piece, &mut bytes)?;
                out.write_all(&bytes).map_err(fault)?;
            }
            written += numbers.len();
            part += 1;
        }
        assert_eq!(written, tensor.elements(), "{}: numbers against its shape", tensor.name);
        let filled = tensor.stored.bytes(written);
        let gap = (tensor.padded() - filled) as usize;
        out.write_all(&[0; ALIGNMENT as usize][..gap]).map_err(fault)?;
        failpoint("export-write");
    }
    let file = out.into_inner().map_err(|e| fault(e.into_error()))?;
    file.sync_all().map_err(fault)
}

/// Everything before the data, padded to its beginning.
fn header(keys: &[(String, GgufValue)], tensors: &[GgufTensor]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut at = 0_u64;
    for tensor in tensors {
        put_text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        // The fastest dimension comes first.
        for size in tensor.shape.iter().rev() {
            bytes.extend((*size as u64).to_le_bytes());
        }
        bytes.extend(type_code(tensor.stored).to_le_bytes());
        bytes.extend(at.to_le_bytes());
        at += tensor.padded();
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
    bytes
}

fn type_code(stored: StoredType) -> u32 {
    match stored {
        StoredType::F32 => 0,
        StoredType::Q8_0 => 8,
        StoredType::Bf16 => 30,
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue) {
    const INT: u32 = 5;
    const TEXT: u32 = 8;
    const LIST: u32 = 9;
    let kind: u32 = match value {
        GgufValue::U32(_) => 4,
        GgufValue::F32(_) => 6,
        GgufValue::Bool(_) => 7,
        GgufValue::Text(_) => TEXT,
        GgufValue::Texts(_) | GgufValue::Ints(_) => LIST,
    };
    bytes.extend(kind.to_le_bytes());
    let mut list = |of: u32, length: usize| {
        bytes.extend(of.to_le_bytes());
        bytes.extend((length as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(number) => bytes.extend(number.to_le_bytes()),
        GgufValue::F32(number) => bytes.extend(number.to_le_bytes()),
        GgufValue::Bool(yes) => bytes.push(u8::from(*yes)),
        GgufValue::Text(text) => put_text(bytes, text),
        GgufValue::Texts(texts) => {
            list(TEXT, texts.len());
            texts.iter().for_each(|text| put_text(bytes, text));
        }
        GgufValue::Ints(numbers) => {
            list(INT, numbers.len());
            numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::gguf_file::{Content, Value};

    /// An independent reader finds what was written: every kind of value, every type of number, parts and padding.
    #[test]
    fn candle_reads_what_was_written() {
        let keys = [
            ("a.number".to_string(), GgufValue::U32(7)),
            ("a.real".to_string(), GgufValue::F32(0.25)),
            ("a.flag".to_string(), GgufValue::Bool(true)),
            ("a.text".to_string(), GgufValue::Text("ø".to_string())),
            ("a.texts".to_string(), GgufValue::Texts(vec!["x".to_string(), String::new()])),
            ("a.ints".to_string(), GgufValue::Ints(vec![-1, 3])),
        ];
        let tensor = |name: &str, shape: &[usize], stored| GgufTensor {
            name: name.to_string(),
            shape: shape.to_vec(),
            stored,
        };
        let tensors = [
            tensor("norm", &[3], StoredType::F32),
            tensor("half", &[2, 5], StoredType::Bf16),
            tensor("blocks", &[2, 3, 32], StoredType::Q8_0),
        ];
        let number = |tensor: usize, at: usize| (tensor * 100 + at) as f32 - 50.0;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x.gguf");
        // Two parts each, but for the first.
        let mut fetch = |index: usize, part: usize| {
            let all = tensors[index].elements();
            let parts = if index == 0 { 1 } else { 2 };
            let each = all / parts;
            Ok((part < parts)
                .then(|| (part * each..(part + 1) * each).map(|at| number(index, at)).collect()))
        };
        write_gguf(&path, &keys, &tensors, &mut fetch).expect("a file");

        let mut file = File::open(&path).expect("the file");
        let content = Content::read(&mut file).expect("a GGUF file");
        assert!(matches!(content.metadata["a.number"], Value::U32(7)));
        assert!(matches!(content.metadata["a.real"], Value::F32(x) if x == 0.25));
        assert!(matches!(content.metadata["a.flag"], Value::Bool(true)));
        assert_eq!(content.metadata["a.text"].to_string().unwrap(), "ø");
        assert_eq!(content.metadata["a.texts"].to_vec().unwrap().len(), 2);
        assert!(matches!(content.metadata["a.ints"].to_vec().unwrap()[0], Value::I32(-1)));
        assert_eq!(content.tensor_data_offset % ALIGNMENT, 0);
        for (index, wanted) in tensors.iter().enumerate() {
            let found = content.tensor(&mut file, &wanted.name, &Device::Cpu).expect("a tensor");
            assert_eq!(found.shape().dims(), wanted.shape);
            let read =
                found.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
            for (at, x) in read.expect("numbers").into_iter().enumerate() {
                // Small whole numbers are exact in bf16; a block's step is 1/127 of its largest, stored as f16.
                let slack = if index == 2 { 342.0 / 254.0 + 342.0 / 2048.0 } else { 0.0 };
                let error = (x - number(index, at)).abs();
                assert!(error <= slack, "{} [{at}] = {x}, off by {error}", wanted.name);
            }
        }
    }

    #[test]
    #[should_panic(expected = "numbers against its shape")]
    fn parts_that_do_not_fill_the_shape_are_our_mistake() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let tensors = [GgufTensor { name: "x".into(), shape: vec![2, 2], stored: StoredType::F32 }];
        let mut fetch = |_: usize, part: usize| Ok((part == 0).then(|| vec![0.0; 3]));
        let _ = write_gguf(&folder.path().join("x"), &[], &tensors, &mut fetch);
    }
}
