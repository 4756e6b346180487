//! What all layers of one forward and backward pass share: device, scratch memory, packed documents.

use super::documents::Documents;
use crate::cluster::Broken;
use crate::config::engine::AttentionForm;
use crate::config::routing::Balance;
use rehearsal_kernels::{Buffer, DType, Kernels, OutOfMemory, Owner, RopeTable};

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The device has no more room.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// Ranks no longer work together.
    #[error(transparent)]
    Ranks(#[from] Broken),
}

/// Indices as a column on the device.
pub fn indices(kernels: &dyn Kernels, values: &[u32]) -> Result<Buffer, OutOfMemory> {
    let mut buffer = kernels.arena().buffer(kernels.scratch(), DType::U32, values.len(), 1)?;
    kernels.upload_indices(values, &mut buffer);
    Ok(buffer)
}

/// What a device may process of each document of a pass.
pub struct Capacity {
    /// Pairs of token and expert, as a multiple of an even share.
    pub factor: f64,
    /// 1 for each document that keeps all its pairs: `U32 [documents, 1]`.
    pub protected: Buffer,
}

/// Device and settings of a pass over documents.
pub struct Pass<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// The rows.
    pub documents: &'a Documents,
    /// cos and sin of every position.
    pub rope: &'a RopeTable,
    /// Form of attention.
    pub form: AttentionForm,
    /// Weights of the balance losses.
    pub balance: Balance,
    /// Documents of the whole step, of which this pass has some: the balance losses are means over all of them.
    pub sequences: usize,
    /// Limit of the devices; `None` drops nothing, as outside of training.
    pub capacity: Option<Capacity>,
    /// Layers of each piece, from the lowest, whose activations the backward pass computes again. Changes no bit.
    pub recompute: usize,
}

impl Pass<'_> {
    /// Rows T.
    pub fn rows(&self) -> usize {
        self.documents.tokens.rows()
    }

    /// Scratch floats; contents are not defined.
    pub fn floats(&self, rows: usize, cols: usize) -> Result<Buffer, OutOfMemory> {
        floats(self.kernels, rows, cols)
    }

    /// Owner of scratch memory.
    pub fn scratch(&self) -> Owner {
        self.kernels.scratch()
    }

    /// A copy of `x` in scratch memory.
    pub fn copy(&self, x: &Buffer) -> Result<Buffer, OutOfMemory> {
        let mut y = self.floats(x.rows(), x.cols())?;
        self.kernels.copy(x, &mut y);
        Ok(y)
    }
}

/// Scratch floats; contents are not defined.
pub fn floats(kernels: &dyn Kernels, rows: usize, cols: usize) -> Result<Buffer, OutOfMemory> {
    kernels.arena().buffer(kernels.scratch(), kernels.float(), rows, cols)
}

/// Scratch indices; contents are not defined.
pub fn index_buffer(
    kernels: &dyn Kernels,
    rows: usize,
    cols: usize,
) -> Result<Buffer, OutOfMemory> {
    kernels.arena().buffer(kernels.scratch(), DType::U32, rows, cols)
}
