//! A slab that is on the device in some phases and in a file in the others.
//!
//! Invariants:
//!   * the slab is resident, or in its file, or both with equal bytes
//!   * after `release` the device holds none of it; after `bring` it is there bit for bit

use crate::config::fault::Fault;
use anyhow::{Context, Result};
use rehearsal_kernels::{Arena, Owner, Slab, Spilled};
use std::path::PathBuf;

/// A slab with a place to go.
pub struct Parked {
    owner: Owner,
    path: PathBuf,
    resident: Option<Slab>,
    file: Option<Spilled>,
}

impl Parked {
    /// A resident slab; `path` is its file when it is released.
    pub fn new(owner: Owner, path: PathBuf, slab: Slab) -> Parked {
        Parked { owner, path, resident: Some(slab), file: None }
    }

    /// Takes the slab out, bringing it back from its file if it is there. Returns the bytes read.
    pub fn take(&mut self, arena: &Arena) -> Result<(Slab, u64)> {
        if let Some(slab) = self.resident.take() {
            return Ok((slab, 0));
        }
        let file = self.file.as_ref().expect("a parked slab is resident or in its file");
        let slab = file.restore(arena, self.owner).map_err(|e| Fault::Resources(e.to_string()))?;
        Ok((slab, file.bytes()))
    }

    /// Puts a slab back that was changed: its file, if any, is out of date.
    pub fn put_changed(&mut self, slab: Slab) {
        self.file = None;
        self.resident = Some(slab);
    }

    /// Puts a slab back that was only read.
    pub fn put(&mut self, slab: Slab) {
        self.resident = Some(slab);
    }

    /// Makes the slab leave the device. Returns the bytes that it gives back. A slab that could not be written stays.
    pub fn release(&mut self) -> Result<u64> {
        let Some(slab) = &self.resident else { return Ok(0) };
        let bytes = slab.whole().len() as u64 * slab.whole().dtype().size() as u64;
        if self.file.is_none() {
            let spilled = slab
                .spill(&self.path)
                .with_context(|| format!("failed to offload to {}", self.path.display()));
            self.file = Some(spilled.map_err(|e| Fault::Resources(format!("{e:#}")))?);
        }
        self.resident = None;
        Ok(bytes)
    }

    /// True if the device holds it.
    pub fn is_resident(&self) -> bool {
        self.resident.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::{CpuKernels, DType, Kernels, Kind};

    #[test]
    fn a_released_slab_leaves_no_byte_and_comes_back_equal() {
        let arena = Arena::new(None);
        let kernels = CpuKernels::new(1, arena.clone());
        let owner = arena.owner("reference", Kind::Weights);
        let mut slab = arena.slab(owner, DType::F32, &[(7, 33)]).unwrap();
        let values: Vec<f32> = (0..231).map(|i| (i as f32).sin()).collect();
        kernels.upload(&values, &mut slab.tensor_mut(0));
        let folder = tempfile::tempdir().unwrap();
        let mut parked = Parked::new(owner, folder.path().join("reference"), slab);
        for _ in 0..2 {
            assert_eq!(parked.release().unwrap(), 231 * 4);
            assert_eq!((parked.is_resident(), arena.held_by(Kind::Weights)), (false, 0));
            let (slab, bytes) = parked.take(&arena).unwrap();
            assert_eq!((kernels.download(&slab.tensor(0)), bytes), (values.clone(), 231 * 4));
            parked.put(slab);
        }
    }

    #[test]
    fn a_slab_that_cannot_be_written_stays() {
        let arena = Arena::new(None);
        let owner = arena.owner("reference", Kind::Weights);
        let slab = arena.slab(owner, DType::F32, &[(7, 33)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut parked = Parked::new(owner, folder.path().join("no such folder/reference"), slab);
        assert!(parked.release().is_err());
        assert!(parked.is_resident() && parked.take(&arena).is_ok());
    }
}
