//! The seam to CUDA: finding a GPU, loading our machine code, launching three kernels.
//!
//! What is here: RMSNorm forward, the SwiGLU gate forward and AdamW, in f32, with the semantics of
//! the same methods of [`Kernels`](crate::Kernels), on a device's own buffers, and a self-test that
//! holds them against the f64 reference. **The rest of CUDA is not built**: there is no `CudaKernels`, so
//! nothing trains or samples on a GPU yet. The kernels are compiled for sm_80 and sm_90a on every
//! build with the feature `cuda`; this project's machines have no GPU, so they have **never run on
//! one here**. `self_test` is what proves them on yours.
//!
//! Invariants:
//!   * no call into the driver before its library was found: a binary built with the feature starts
//!     where there is no GPU, and says that it found none
//!   * every fault is an `Err` that says what was tried; no silent fallback to the CPU

mod communicator;
mod device;
mod nccl;
mod pinned;
mod self_test;

pub use communicator::{NcclCommunicator, NcclDevice};
pub use device::{CudaDevice, DeviceMatrix};
pub use nccl::version as nccl_version;
pub use pinned::PinnedMemory;
pub use self_test::self_test;

use cudarc::driver::{CudaContext, sys};
use std::sync::Arc;

/// GPU `index`, opened; `Err` says what is missing.
fn context(index: usize) -> Result<Arc<CudaContext>, String> {
    let count = devices()?;
    if index >= count {
        return Err(format!("cuda device {index} does not exist; there are {count}, from 0"));
    }
    CudaContext::new(index).map_err(|fault| format!("cuda device {index} does not open: {fault}"))
}

/// Number of GPUs, at least 1; `Err` says why none was found.
pub fn devices() -> Result<usize, String> {
    // SAFETY: this only tries to open the driver's library.
    if !unsafe { sys::is_culib_present() } {
        return Err("no cuda device: the driver's library libcuda.so.1 is not there".to_string());
    }
    match CudaContext::device_count() {
        Ok(count) if count > 0 => Ok(count as usize),
        Ok(_) => Err("no cuda device: the driver is there, but lists none".to_string()),
        Err(fault) => Err(format!("no cuda device: the driver did not start: {fault}")),
    }
}
