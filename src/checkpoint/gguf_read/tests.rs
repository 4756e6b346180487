//! Tests of reading GGUF: what is written comes back, and the shapes of known attacks are refused.

use super::*;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::{Value, write};
use candle_core::quantized::{GgmlDType, QTensor};

fn opened(bytes: &[u8]) -> Result<GgufFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path)
}

fn refused(bytes: &[u8]) -> String {
    let error = opened(bytes).err().expect("a hostile file is refused");
    let text = format!("{error:#}");
    assert!(
        matches!(error.downcast_ref(), Some(Fault::User(_))) && text.contains("x.gguf: "),
        "{text}"
    );
    text
}

/// A file with every kind of value and two tensors.
fn valid() -> Vec<u8> {
    let tensor = |kind, count: usize| {
        let numbers: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let tensor = Tensor::from_vec(numbers, (count / 32, 32), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, kind).unwrap()
    };
    let (plain, blocks) = (tensor(GgmlDType::F32, 64), tensor(GgmlDType::Q8_0, 32));
    let texts = Value::Array(vec![Value::String("a".into()), Value::String("é".into())]);
    let keys = [
        ("a.number", Value::U32(7)),
        ("a.real", Value::F64(0.5)),
        ("a.flag", Value::Bool(true)),
        ("a.text", Value::String("x".into())),
        ("a.texts", texts),
        ("a.flags", Value::Array(vec![Value::Bool(false)])),
        ("a.numbers", Value::Array(vec![Value::I16(-1), Value::I16(2)])),
    ];
    let keys: Vec<(&str, &Value)> = keys.iter().map(|(key, value)| (*key, value)).collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    write(&mut bytes, &keys, &[("plain", &plain), ("blocks", &blocks)]).unwrap();
    bytes.into_inner()
}

/// A file with one key and one tensor, made by hand.
struct Made {
    tensors: u64,
    key: (&'static str, u32, Vec<u8>),
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
    data: usize,
}

impl Default for Made {
    fn default() -> Made {
        let key = (ALIGNMENT_KEY, U32, 32_u32.to_le_bytes().to_vec());
        Made { tensors: 1, key, shape: vec![2, 2], kind: 0, offset: 0, data: 16 }
    }
}

impl Made {
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(1_u64.to_le_bytes());
        out.extend((self.key.0.len() as u64).to_le_bytes());
        out.extend(self.key.0.as_bytes());
        out.extend(self.key.1.to_le_bytes());
        out.extend(&self.key.2);
        out.extend(1_u64.to_le_bytes());
        out.push(b't');
        out.extend((self.shape.len() as u32).to_le_bytes());
        self.shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(self.kind.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }
}

#[test]
fn what_another_program_wrote_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, valid()).unwrap();
    let mut file = GgufFile::open(&path).unwrap();
    assert_eq!(file.names(), ["blocks", "plain"]);
    assert_eq!(file.shape("plain"), Some(&[2, 32][..]));
    let numbers: Vec<f32> = (0..64).map(|i| i as f32).collect();
    assert_eq!(file.read_f32("plain").unwrap(), numbers);
    assert!(
        file.read_f32("blocks").unwrap().iter().zip(&numbers).all(|(a, b)| (a - b).abs() < 0.2)
    );
    let told = file.read_f32("none").unwrap_err().to_string();
    assert!(told.contains("x.gguf: tensor none"), "{told}");
    assert!(opened(&Made::default().bytes()).is_ok());
}

/// CVE-2026-7482 of Ollama: a tensor that is larger than the file was read from the heap behind it.
#[test]
fn a_tensor_larger_than_the_file_is_refused() {
    let told = refused(&Made { shape: vec![1 << 20, 4], ..Made::default() }.bytes());
    assert!(told.contains("more than the file has"), "{told}");
    let told = refused(&Made { data: 15, ..Made::default() }.bytes());
    assert!(told.contains("truncated"), "{told}");
    let told = refused(&Made { offset: 1 << 63, ..Made::default() }.bytes());
    assert!(told.contains("more than the file has"), "{told}");
}

/// llama.cpp 25596: a dimension of 0 in 65 bytes divided by zero, as an alignment of 0 does.
#[test]
fn a_dimension_or_an_alignment_of_zero_is_refused() {
    let told = refused(&Made { shape: vec![0, 2], ..Made::default() }.bytes());
    assert!(told.contains("a dimension of 0"), "{told}");
    assert!(refused(&Made { shape: vec![], ..Made::default() }.bytes()).contains("0 dimensions"));
    for alignment in [0_u32, 3, 1 << 20] {
        let key = (ALIGNMENT_KEY, U32, alignment.to_le_bytes().to_vec());
        let told = refused(&Made { key, ..Made::default() }.bytes());
        assert!(told.contains("is no alignment"), "{told}");
    }
}

/// llama.cpp 24884: 37 bytes whose counts are beyond the file ended the program.
#[test]
fn a_count_beyond_the_file_is_refused_before_anything_is_made_of_it() {
    let mut short = b"GGUF".to_vec();
    short.extend(3_u32.to_le_bytes());
    short.extend(u64::MAX.to_le_bytes());
    short.extend(0_u64.to_le_bytes());
    short.resize(37, 0);
    assert!(refused(&short).contains("18446744073709551615 tensors are declared"));
    short[8..16].fill(0);
    short[16..24].fill(0xff);
    assert!(refused(&short).contains("18446744073709551615 keys are declared"));
    let list = |kind: u32, count: u64| {
        let value = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
        Made { key: ("k", LIST, value), ..Made::default() }.bytes()
    };
    for kind in [0, 7, 8, 12] {
        assert!(refused(&list(kind, 1 << 61)).contains("are declared where"), "{kind}");
    }
    let text = Made { key: ("k", TEXT, u64::MAX.to_le_bytes().to_vec()), ..Made::default() };
    assert!(refused(&text.bytes()).contains("18446744073709551615 bytes are declared"));
}

/// llama.cpp 26690: a value of another type than its key has was read as the expected one.
#[test]
fn a_value_of_the_wrong_type_is_refused() {
    let told = refused(&Made { key: (ALIGNMENT_KEY, TEXT, vec![0; 8]), ..Made::default() }.bytes());
    assert!(told.contains("has the type 8 and not 4"), "{told}");
    for (kind, value, wanted) in [
        (13, vec![], "type 13 of a value is unknown"),
        (BOOL, vec![2], "neither true nor false"),
        (LIST, [&LIST.to_le_bytes()[..], &[0; 8]].concat(), "a list of lists"),
    ] {
        let told = refused(&Made { key: ("k", kind, value), ..Made::default() }.bytes());
        assert!(told.contains(wanted), "{told}");
    }
    assert!(refused(&Made { kind: 9, ..Made::default() }.bytes()).contains("type 9 of numbers"));
}

/// llama.cpp 18674: a product of dimensions that wraps around gave a small tensor with large dimensions.
#[test]
fn dimensions_whose_product_wraps_around_are_refused() {
    for shape in [vec![1 << 32, 1 << 32], vec![1 << 62, 4], vec![1 << 63, 2, 1, 1]] {
        let told = refused(&Made { shape, ..Made::default() }.bytes());
        assert!(told.contains("more than the file has"), "{told}");
    }
    assert!(
        refused(&Made { shape: vec![1; 5], ..Made::default() }.bytes()).contains("5 dimensions")
    );
    assert!(
        refused(&Made { shape: vec![33], kind: 8, data: 64, ..Made::default() }.bytes())
            .contains("part of a block")
    );
    assert!(
        refused(&Made { offset: 4, data: 64, ..Made::default() }.bytes()).contains("not aligned")
    );
}

#[test]
fn a_cut_file_or_one_that_says_a_thing_twice_is_refused() {
    let whole = valid();
    for length in 0..whole.len() - 32 {
        refused(&whole[..length]);
    }
    let twice = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        refused(&bytes)
    };
    assert!(twice("a.text", "a.real").contains("key a.real stands in it twice"));
    assert!(twice("a.text", "a.\0ext").contains("holds a zero"));
    assert!(refused(b"GGML").contains("does not begin with GGUF"));
    let mut old = whole.clone();
    old[4] = 1;
    assert!(refused(&old).contains("version 1"));
}
