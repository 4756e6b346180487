//! Page-locked memory of the host, which a GPU reads and writes by itself, without a copy by the driver in between.

use crate::below::{HostMemory, HostRoom};
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::ffi::c_void;
use std::io::{Error, ErrorKind};
use std::path::Path;
use std::sync::Arc;

/// Host memory for copies of slabs, page-locked for all GPUs of the process.
pub struct PinnedMemory {
    context: Arc<CudaContext>,
}

impl PinnedMemory {
    /// That of GPU `index`; `Err` says what is missing.
    pub fn open(index: usize) -> Result<PinnedMemory, String> {
        Ok(PinnedMemory { context: super::context(index)? })
    }

    pub(super) fn of(context: Arc<CudaContext>) -> PinnedMemory {
        PinnedMemory { context }
    }
}

impl HostMemory for PinnedMemory {
    fn room(&self, bytes: usize, _path: &Path) -> std::io::Result<Box<dyn HostRoom>> {
        let refused = |fault: DriverError| {
            let why = format!("the driver locks no {bytes} bytes of the host's memory: {fault}");
            Error::new(ErrorKind::OutOfMemory, why)
        };
        Ok(Box::new(Pinned::new(&self.context, bytes).map_err(refused)?))
    }
}

/// A piece of it. Dropping it gives it back.
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    address: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory that only this value knows, and that no thread has to give back itself.
unsafe impl Send for Pinned {}

impl Pinned {
    /// So many bytes, whose contents are zero.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Pinned, DriverError> {
        context.bind_to_thread()?;
        let size = bytes.max(1);
        // SAFETY: a context is bound; the fresh memory aliases nothing and has `size` bytes.
        let address = unsafe {
            let address = result::malloc_host(size, sys::CU_MEMHOSTALLOC_PORTABLE)?;
            std::ptr::write_bytes(address.cast::<u8>(), 0, size);
            address
        };
        Ok(Pinned { context: context.clone(), address, bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `bytes` initialised bytes that live as long as this; whoever has a GPU write there waits for it first.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A driver that fails here is going away, and takes the memory along.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was given once and is given back once; the driver waits for copies that still use it.
            let _ = unsafe { result::free_host(self.address) };
        }
    }
}

impl HostRoom for Pinned {
    fn put(&mut self, start: usize, piece: &[u8]) -> std::io::Result<()> {
        self.bytes_mut()[start..start + piece.len()].copy_from_slice(piece);
        Ok(())
    }

    fn get(&self, start: usize, piece: &mut [u8]) -> std::io::Result<()> {
        piece.copy_from_slice(&self.bytes()[start..start + piece.len()]);
        Ok(())
    }
}
