//! Slab: the tensors of one model and kind in one region of the arena, and the file that a slab rests in.
//!
//! Knows no names of tensors: they are numbered. Invariants:
//!   * tensors lie one after another without gaps, so neighbours of one width form one matrix
//!   * a slab comes back from its file bit for bit, or with an error

use crate::arena::{Arena, Hold, OutOfMemory, Owner};
use crate::buffer::{Buffer, DType, View, ViewMut};
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The tensors of one model and kind in one region, one after another.
pub struct Slab {
    region: Hold,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
    starts: Vec<usize>,
}

impl Slab {
    /// Zeroed tensors over `region`, which no buffer shares yet.
    pub(crate) fn new(region: Hold, dtype: DType, shapes: &[(usize, usize)]) -> Slab {
        let mut starts = vec![0];
        for (rows, cols) in shapes {
            starts.push(starts[starts.len() - 1] + rows * cols);
        }
        Slab { region, dtype, shapes: shapes.to_vec(), starts }
    }

    /// Number of tensors.
    pub fn count(&self) -> usize {
        self.shapes.len()
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.starts[self.shapes.len()]
    }

    /// Rows and columns of tensor `index`.
    pub fn shape(&self, index: usize) -> (usize, usize) {
        self.shapes[index]
    }

    /// Tensor `index`.
    pub fn tensor(&self, index: usize) -> View<'_> {
        self.span(index..index + 1)
    }

    /// Tensor `index`, to write to.
    pub fn tensor_mut(&mut self, index: usize) -> ViewMut<'_> {
        self.span_mut(index..index + 1)
    }

    /// Neighbouring tensors of one width as one matrix (gate over up, all experts of a layer).
    pub fn span(&self, range: Range<usize>) -> View<'_> {
        self.joined(range).into_view()
    }

    /// Neighbouring tensors of one width as one matrix, to write to.
    pub fn span_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        self.joined(range).into_view_mut()
    }

    /// Some elements of tensor `index`, in row order, as one row.
    pub fn run(&self, index: usize, elements: Range<usize>) -> View<'_> {
        self.part(index, elements).into_view()
    }

    /// Some elements of tensor `index` as one row, to write to.
    pub fn run_mut(&mut self, index: usize, elements: Range<usize>) -> ViewMut<'_> {
        self.part(index, elements).into_view_mut()
    }

    /// All elements as one row.
    pub fn whole(&self) -> View<'_> {
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view()
    }

    /// All elements as one row, to write to.
    pub fn whole_mut(&mut self) -> ViewMut<'_> {
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view_mut()
    }

    /// Writes the slab to a file; dropping the slab then gives its memory back.
    pub fn spill(&self, path: &Path) -> std::io::Result<Spilled> {
        let mut file = File::create(path)?;
        file.write_all(self.bytes())?;
        Ok(Spilled { path: path.to_path_buf(), dtype: self.dtype, shapes: self.shapes.clone() })
    }

    fn part(&self, index: usize, elements: Range<usize>) -> Buffer {
        let first = self.starts[index] + elements.start;
        assert!(first + elements.len() <= self.starts[index + 1], "elements of a tensor");
        let offset = first * self.dtype.size();
        Buffer::new(self.region.clone(), offset, self.dtype, 1, elements.len())
    }

    fn joined(&self, range: Range<usize>) -> Buffer {
        let cols = self.shapes[range.start].1;
        assert!(
            self.shapes[range.clone()].iter().all(|s| s.1 == cols),
            "a span joins tensors of one width"
        );
        let rows = self.shapes[range.clone()].iter().map(|s| s.0).sum();
        Buffer::new(
            self.region.clone(),
            self.starts[range.start] * self.dtype.size(),
            self.dtype,
            rows,
            cols,
        )
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the slab's elements lie in its region, and `&self` keeps writers away.
        unsafe {
            std::slice::from_raw_parts(
                self.region.address() as *const u8,
                self.elements() * self.dtype.size(),
            )
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.elements() * self.dtype.size();
        // SAFETY: as for `bytes`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.region.address() as *mut u8, length) }
    }
}

/// A slab that lives in a file while its model is idle. Dropping it removes the file.
pub struct Spilled {
    path: PathBuf,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
}

impl Spilled {
    /// Brings the slab back into `arena`, bit for bit.
    pub fn restore(&self, arena: &Arena, owner: Owner) -> Result<Slab, RestoreError> {
        let mut slab = arena.slab(owner, self.dtype, &self.shapes)?;
        File::open(&self.path)?.read_exact(slab.bytes_mut())?;
        Ok(slab)
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.shapes.iter().map(|(rows, cols)| (rows * cols * self.dtype.size()) as u64).sum()
    }
}

impl Drop for Spilled {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Why a spilled slab could not come back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No room in the arena.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The spill file could not be read.
    #[error("spilled weights: {0}")]
    File(#[from] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Kind;

    #[test]
    fn a_spilled_slab_comes_back_bit_for_bit() {
        let arena = Arena::new(None);
        let owner = arena.owner("reference", Kind::Weights);
        let mut slab = arena.slab(owner, DType::F32, &[(3, 5), (1, 7), (2, 7)]).unwrap();
        for (i, byte) in slab.bytes_mut().iter_mut().enumerate() {
            *byte = (i * 31 % 251) as u8;
        }
        let before = slab.bytes().to_vec();
        assert_eq!((slab.span(1..3).rows(), slab.span(1..3).cols()), (3, 7));
        let first = (15 + 7 + 3) * 4;
        assert_eq!(slab.run(2, 3..11).row_bytes(0), &before[first..first + 8 * 4]);
        let path = std::env::temp_dir().join(format!("rehearsal-spill-{}", std::process::id()));
        let spilled = slab.spill(&path).unwrap();
        drop(slab);
        assert_eq!(arena.held(), 0);
        let back = spilled.restore(&arena, owner).unwrap();
        assert_eq!(back.bytes(), before);
        drop(spilled);
        assert!(!path.exists());
    }
}
