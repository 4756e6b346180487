//! Self-test: the three kernels on small random inputs, against the f64 reference.
//!
//! It is what a binary on a machine with a GPU can run to prove the seam: driver found, code
//! loaded, numbers there, kernels launched, numbers back.

use super::{CudaDevice, DeviceMatrix};
use crate::arena::{Arena, Kind};
use crate::buffer::{Buffer, DType};
use crate::kernels::{AdamW, Kernels};
use crate::random::{self, Stream};
use crate::reference::ReferenceKernels;

/// Share of 1 + |value| by which an f32 result may miss the reference.
const TOLERANCE: f64 = 1e-5;
/// Rows and columns that fill no block and no warp.
const ROWS: usize = 37;
const COLS: usize = 1027;

/// Runs the kernels on GPU 0. `Ok` names the GPU and each kernel's largest error; `Err` says why
/// there was no GPU, or which result is wrong and by how much.
pub fn self_test() -> Result<String, String> {
    let device = CudaDevice::open(0)?;
    let reference = ReferenceKernels::new(Arena::new(None));
    let test = SelfTest { device: &device, reference: &reference };
    let errors =
        [("rms_norm", test.rms_norm()?), ("swiglu", test.swiglu()?), ("adamw", test.adamw()?)];
    let report: Vec<String> =
        errors.iter().map(|(name, error)| format!("{name} {error:.1e}")).collect();
    let report =
        format!("{}: largest errors against the reference: {}", device.name(), report.join(", "));
    // A comparison that NaN fails too.
    let all_close = errors.iter().all(|(_, error)| *error <= TOLERANCE);
    if all_close { Ok(report) } else { Err(format!("{report}; allowed are {TOLERANCE:.1e}")) }
}

/// The same numbers on the device and in the reference.
struct Pair {
    there: DeviceMatrix,
    here: Buffer,
}

struct SelfTest<'a> {
    device: &'a CudaDevice,
    reference: &'a ReferenceKernels,
}

impl SelfTest<'_> {
    fn rms_norm(&self) -> Result<f64, String> {
        let (x, weight) = (self.random(1, ROWS, COLS)?, self.random(2, 1, COLS)?);
        let (mut y, mut inverse) = (self.zeros(ROWS, COLS)?, self.zeros(ROWS, 1)?);
        let epsilon = 1e-6;
        self.device.rms_norm(&x.there, &weight.there, epsilon, &mut y.there, &mut inverse.there)?;
        self.reference.rms_norm(&x.here, &weight.here, epsilon, &mut y.here, &mut inverse.here);
        Ok(self.error(&y)?.max(self.error(&inverse)?))
    }

    fn swiglu(&self) -> Result<f64, String> {
        let (gate_up, mut y) = (self.random(3, ROWS, 2 * COLS)?, self.zeros(ROWS, COLS)?);
        self.device.swiglu(&gate_up.there, &mut y.there)?;
        self.reference.swiglu(&gate_up.here, &mut y.here);
        self.error(&y)
    }

    fn adamw(&self) -> Result<f64, String> {
        let (g, mut w) = (self.random(4, ROWS, COLS)?, self.random(5, ROWS, COLS)?);
        let (mut m, mut v) = (self.zeros(ROWS, COLS)?, self.zeros(ROWS, COLS)?);
        for step in 1..4 {
            let update = AdamW {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.1,
                gradient_scale: 1.0 / step as f64,
                step,
            };
            let (w, m, v) = (&mut w, &mut m, &mut v);
            self.device.adamw(&update, &g.there, &mut w.there, &mut m.there, &mut v.there)?;
            self.reference.adamw(&update, &g.here, &mut w.here, &mut m.here, &mut v.here);
        }
        Ok(self.error(&w)?.max(self.error(&m)?).max(self.error(&v)?))
    }

    fn random(&self, key: u64, rows: usize, cols: usize) -> Result<Pair, String> {
        let number = |i| random::normal(1, Stream::Data, [key, i, 0, 0]) as f32;
        let numbers: Vec<f32> = (0..(rows * cols) as u64).map(number).collect();
        let mut here = self.buffer(rows, cols)?;
        self.reference.upload(&numbers, &mut here);
        Ok(Pair { there: self.device.upload(&numbers, rows, cols)?, here })
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<Pair, String> {
        let mut here = self.buffer(rows, cols)?;
        self.reference.fill(&mut here, 0.0);
        Ok(Pair { there: self.device.zeros(rows, cols)?, here })
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<Buffer, String> {
        let arena = self.reference.arena();
        let owner = arena.owner("cuda self-test", Kind::Activations);
        arena.buffer(owner, DType::F64, rows, cols).map_err(|e| e.to_string())
    }

    /// The largest error of a result; NaN if there is one.
    fn error(&self, result: &Pair) -> Result<f64, String> {
        let (got, want) =
            (self.device.download(&result.there)?, self.reference.download_f64(&result.here));
        let errors =
            got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).abs() / (1.0 + w.abs()));
        // `f64::max` would drop a NaN.
        Ok(errors
            .fold(0.0, |worst, error| if error > worst || error.is_nan() { error } else { worst }))
    }
}
