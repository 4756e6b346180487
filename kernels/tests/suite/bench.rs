//! Bench: makes buffers on one device, reads them back, and compares numbers.
//!
//! It uses only the public trait, so that one test body runs on every implementation of it.
//!
//! Invariant: random inputs are numbers of f32, so that an f32 device and the f64 reference are
//! given exactly the same problem.

use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{
    Buffer, CacheLayout, DType, Kernels, Kind, Owner, Pack, Packed, Product, WeightFormat,
};

/// One device under test.
pub struct Bench<'k> {
    pub kernels: &'k dyn Kernels,
    pub owner: Owner,
}

/// A named result of a problem.
pub type Output = (&'static str, Vec<f64>);

impl<'k> Bench<'k> {
    pub fn new(kernels: &'k dyn Kernels) -> Bench<'k> {
        Bench { kernels, owner: kernels.arena().owner("test", Kind::Weights) }
    }

    /// A float buffer whose elements are NaN: who must set all of it is caught if it does not.
    pub fn unset(&self, rows: usize, cols: usize) -> Buffer {
        self.filled(rows, cols, f64::NAN)
    }

    pub fn filled(&self, rows: usize, cols: usize, value: f64) -> Buffer {
        let float = self.kernels.float();
        let mut buffer = self.kernels.arena().buffer(self.owner, float, rows, cols).unwrap();
        self.kernels.fill(&mut buffer, value);
        buffer
    }

    pub fn floats(&self, rows: usize, cols: usize, values: &[f64]) -> Buffer {
        let float = self.kernels.float();
        let mut buffer = self.kernels.arena().buffer(self.owner, float, rows, cols).unwrap();
        self.kernels.upload_f64(values, &mut buffer);
        buffer
    }

    /// Normal numbers that depend on `key` alone.
    pub fn random(&self, key: u64, rows: usize, cols: usize) -> Buffer {
        self.floats(rows, cols, &normals(key, rows * cols))
    }

    /// A cache of which nothing is written yet.
    pub fn cache(&self, layout: &CacheLayout, slots: usize) -> Buffer {
        let (dtype, cols) = self.kernels.cache_shape(layout);
        self.kernels.arena().buffer(self.owner, dtype, slots, cols).unwrap()
    }

    pub fn indices(&self, rows: usize, cols: usize, values: &[u32]) -> Buffer {
        let mut buffer = self.kernels.arena().buffer(self.owner, DType::U32, rows, cols).unwrap();
        self.kernels.upload_indices(values, &mut buffer);
        buffer
    }

    pub fn unset_indices(&self, rows: usize, cols: usize) -> Buffer {
        self.indices(rows, cols, &vec![u32::MAX; rows * cols])
    }

    pub fn read(&self, buffer: &Buffer) -> Vec<f64> {
        self.kernels.download_f64(buffer)
    }

    pub fn read_indices(&self, buffer: &Buffer) -> Vec<f64> {
        self.kernels.download_indices(buffer).into_iter().map(f64::from).collect()
    }

    pub fn pack(&self, product: Product, weight: &Buffer, groups: usize) -> Packed {
        self.packed(weight, Pack::blocks(product, weight, groups))
    }

    pub fn packed(&self, weight: &Buffer, pack: Pack) -> Packed {
        self.kept(weight, pack, WeightFormat::F32)
    }

    /// A weight packed in a format.
    pub fn kept(&self, weight: &Buffer, pack: Pack, format: WeightFormat) -> Packed {
        self.kernels.pack(self.owner, weight, pack, format, 7).unwrap()
    }
}

/// Normal numbers of f32 that depend on `key` alone.
pub fn normals(key: u64, count: usize) -> Vec<f64> {
    let number = |i| random::normal(11, Stream::Data, [key, i, 0, 0]);
    (0..count as u64).map(|i| f64::from(number(i) as f32)).collect()
}

/// `count` random indices below `bound`.
pub fn below(key: u64, count: usize, bound: u64) -> Vec<u32> {
    (0..count as u64)
        .map(|i| random::below(11, Stream::Data, [key, i, 1, 0], bound) as u32)
        .collect()
}

/// First row of each row's segment, for segments of these lengths.
pub fn starts(lengths: &[usize]) -> Vec<u32> {
    let mut starts = Vec::new();
    for length in lengths {
        starts.extend(vec![starts.len() as u32; *length]);
    }
    starts
}

/// The same with a second column: the first segment is the stem of all others.
pub fn stems(lengths: &[usize]) -> Vec<u32> {
    starts(lengths).into_iter().flat_map(|start| [start, 0]).collect()
}

/// `Σ a b`: the scalar whose gradient by b is a.
pub fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Asserts |got - want| <= tolerance * (1 + |want|) everywhere; says which element is worst.
pub fn check_close(label: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{label}: number of elements");
    let error = |i: usize| {
        let error = (got[i] - want[i]).abs() / (1.0 + want[i].abs());
        if error.is_nan() { f64::INFINITY } else { error }
    };
    let worst = (0..got.len()).max_by(|a, b| error(*a).total_cmp(&error(*b)));
    if let Some(worst) = worst {
        assert!(
            error(worst) <= tolerance,
            "{label}: worst element {worst} of {} is {}, should be {}: error {:e} > {tolerance:e}",
            got.len(),
            got[worst],
            want[worst],
            error(worst),
        );
    }
}

/// Asserts that two results are the same bits; says where they first differ.
pub fn check_same_bits(label: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{label}: number of elements");
    let differs = (0..got.len()).find(|i| got[*i].to_bits() != want[*i].to_bits());
    if let Some(i) = differs {
        panic!("{label}: element {i} of {} is {}, was {}", got.len(), got[i], want[i]);
    }
}

/// Asserts that `gradients` are the central differences of `loss` at `inputs`, every element.
pub fn check_gradients(
    label: &str,
    inputs: &[Vec<f64>],
    gradients: &[Vec<f64>],
    loss: impl Fn(&[Vec<f64>]) -> f64,
) {
    assert_eq!(inputs.len(), gradients.len(), "{label}: one gradient an input");
    let width = 1e-5;
    let mut moved = inputs.to_vec();
    for (input, gradient) in gradients.iter().enumerate() {
        let mut differences = Vec::new();
        for element in 0..inputs[input].len() {
            let middle = inputs[input][element];
            let mut at = |value| {
                moved[input][element] = value;
                loss(&moved)
            };
            differences.push((at(middle + width) - at(middle - width)) / (2.0 * width));
            at(middle);
        }
        check_close(&format!("{label}, gradient of input {input}"), gradient, &differences, 1e-7);
    }
}
