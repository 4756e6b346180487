//! Tests of reading tensors: hostile files, every float, an independent reader.

use super::*;
use std::collections::HashMap;

fn file_of(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(std::iter::repeat_n(7, data));
    bytes
}

fn open(bytes: &[u8]) -> Result<TensorFolder> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).expect("a written file");
    TensorFolder::open(folder.path())
}

fn refusal(bytes: &[u8]) -> String {
    let error = open(bytes).expect_err("a hostile file must be refused");
    assert!(matches!(error.downcast_ref(), Some(Fault::User(_))), "{error:#}");
    format!("{error:#}")
}

#[test]
fn hostile_headers_are_refused_with_a_reason() {
    let one = |name: &str, shape: &str, offsets: &str| {
        format!(r#"{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, at: &str, second: &str, then: &str| {
        let (a, b) = (one(first, "[1]", at), one(second, "[1]", then));
        format!("{},{}", &a[..a.len() - 1], &b[1..])
    };
    let cases = [
        (file_of(&one("../../x", "[1]", "[0,4]"), 4), "no name of a tensor"),
        (file_of(&one("a", "[2]", "[0,4]"), 4), "bad header"),
        (file_of(&one("a", "[1]", "[4,8]"), 8), "bad header"),
        (file_of(&one("a", "[1]", "[0,4]"), 3), "describes"),
        (file_of(&one("a", "[1]", "[0,4]"), 5), "describes"),
        (file_of(&one("a", "[18446744073709551615,2]", "[0,4]"), 4), "bad header"),
        (file_of(&one("a", "[4611686018427387904]", "[0,4]"), 4), "bad header"),
        (file_of(&one("a", "[1]", "[4,0]"), 4), "bad header"),
        (file_of(&one("a", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4), "dimensions"),
        (file_of(r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4), "bad header"),
        (file_of(&two("a", "[0,4]", "a", "[4,8]"), 8), "twice"),
        (file_of(&two("a", "[0,4]", "b", "[2,6]"), 6), "bad header"),
        (file_of(&"[".repeat(100_000), 0), "bad header"),
        (u64::MAX.to_le_bytes().to_vec(), "over the limit"),
        ((1u64 << 20).to_le_bytes().to_vec(), "truncated"),
        (vec![1, 2, 3], "too few"),
        (Vec::new(), "too few"),
    ];
    for (bytes, reason) in cases {
        let message = refusal(&bytes);
        assert!(message.contains(reason), "expected {reason:?} in {message:?}");
    }
}

#[test]
fn no_truncation_and_no_flipped_byte_of_a_header_panics() {
    let header = r#"{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
    let whole = file_of(header, 8);
    for length in 0..whole.len() {
        refusal(&whole[..length]);
    }
    let read = |bytes: &[u8]| open(bytes).and_then(|t| t.read_f32(&t.names()[0].clone()));
    for at in 0..whole.len() - 8 {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            // Some flips give another name or type: an answer or an error, never a panic.
            let _ = read(&bytes);
        }
    }
}

#[test]
fn halves_and_doubles_become_f32() {
    for (dtype, bytes) in [
        ("BF16", vec![0x80, 0x3f, 0x20, 0xc0]),
        ("F16", vec![0x00, 0x3c, 0x00, 0xc1]),
        ("F64", [1f64.to_le_bytes(), (-2.5f64).to_le_bytes()].concat()),
    ] {
        let header = format!(
            r#"{{"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,{}]}}}}"#,
            bytes.len()
        );
        let mut file = file_of(&header, 0);
        file.extend_from_slice(&bytes);
        assert_eq!(
            open(&file).expect("a good file").read_f32("a").expect("numbers"),
            [1.0, -2.5],
            "{dtype}"
        );
    }
    let file = file_of(r#"{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#, 4);
    let error =
        open(&file).expect("a good file").read_f32("a").expect_err("integers are no weights");
    assert!(format!("{error:#}").contains("I32"), "{error:#}");
}

#[test]
fn an_index_that_leaves_its_folder_or_lies_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shapes = [TensorEntry { name: "a".into(), shape: vec![2] }];
    write_tensors(&folder.path().join("s.safetensors"), &shapes, &mut |_| Ok(vec![1.0, 2.0]))
        .expect("a file");
    let cases = [
        (r#"{"weight_map":{"a":"../s.safetensors"}}"#, "same folder"),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "same folder"),
        (r#"{"weight_map":{"a":"other.safetensors"}}"#, "no such file"),
        (r#"{"weight_map":{"a":"s.safetensors","b":"s.safetensors"}}"#, "not there"),
        (r#"{"weight_map":["a"]}"#, "index.json:1:"),
    ];
    for (index, reason) in cases {
        std::fs::write(folder.path().join(INDEX_FILE), index).expect("an index");
        let error = TensorFolder::open(folder.path()).expect_err("a lying index must be refused");
        assert!(format!("{error:#}").contains(reason), "{error:#}");
    }
    std::fs::write(folder.path().join(INDEX_FILE), r#"{"weight_map":{"a":"s.safetensors"}}"#)
        .expect("an index");
    let tensors = TensorFolder::open(folder.path()).expect("an honest index");
    assert_eq!(tensors.read_f32("a").expect("numbers"), [1.0, 2.0]);
}

#[test]
fn candle_reads_what_we_write() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("x.safetensors");
    let shapes = [
        TensorEntry { name: "b".into(), shape: vec![2, 3] },
        TensorEntry { name: "a".into(), shape: vec![4] },
        TensorEntry { name: "empty".into(), shape: vec![0] },
    ];
    let numbers: HashMap<&str, Vec<f32>> = [
        ("b", vec![1.5, -0.0, f32::MIN_POSITIVE, 3.0, 4.0, 5.0]),
        ("a", vec![9.0; 4]),
        ("empty", vec![]),
    ]
    .into();
    write_tensors(&path, &shapes, &mut |i| Ok(numbers[shapes[i].name.as_str()].clone()))
        .expect("a file");
    let oracle =
        candle_core::safetensors::load(&path, &Device::Cpu).expect("candle reads the file");
    let ours = TensorFolder::open_file(&path).expect("we read the file");
    assert_eq!(ours.names(), ["b", "a", "empty"]);
    for TensorEntry { name, shape } in &shapes {
        assert_eq!(oracle[name].dims(), shape.as_slice());
        let theirs: Vec<f32> =
            oracle[name].flatten_all().and_then(|t| t.to_vec1()).expect("floats");
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&theirs), bits(&numbers[name.as_str()]));
        assert_eq!(bits(&ours.read_f32(name).expect("floats")), bits(&theirs));
    }
}
