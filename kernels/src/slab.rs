//! Slab: the tensors of one model and kind in one region of the arena.
//!
//! Knows no names of tensors: they are numbered. Invariants:
//!   * tensors lie one after another without gaps, so neighbours of one width form one matrix
//!   * while a reader of a slab lives, on whatever thread, nobody writes to the slab

use crate::arena::Hold;
use crate::buffer::{Buffer, DType, View, ViewMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The tensors of one model and kind in one region, one after another.
pub struct Slab {
    region: Hold,
    dtype: DType,
    shapes: Vec<(usize, usize)>,
    starts: Vec<usize>,
    /// Held by every reader.
    readers: Arc<()>,
}

impl Slab {
    /// Zeroed tensors over `region`, which no buffer shares yet.
    pub(crate) fn new(region: Hold, dtype: DType, shapes: &[(usize, usize)]) -> Slab {
        let mut starts = vec![0];
        for (rows, cols) in shapes {
            starts.push(starts[starts.len() - 1] + rows * cols);
        }
        Slab { region, dtype, shapes: shapes.to_vec(), starts, readers: Arc::new(()) }
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
        self.require_no_readers();
        self.joined(range).into_view_mut()
    }

    /// Some elements of tensor `index`, in row order, as one row.
    pub fn run(&self, index: usize, elements: Range<usize>) -> View<'_> {
        self.part(index, elements).into_view()
    }

    /// Some elements of tensor `index` as one row, to write to.
    pub fn run_mut(&mut self, index: usize, elements: Range<usize>) -> ViewMut<'_> {
        self.require_no_readers();
        self.part(index, elements).into_view_mut()
    }

    /// All elements as one row.
    pub fn whole(&self) -> View<'_> {
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view()
    }

    /// All elements as one row, to write to.
    pub fn whole_mut(&mut self) -> ViewMut<'_> {
        self.require_no_readers();
        Buffer::new(self.region.clone(), 0, self.dtype, 1, self.elements()).into_view_mut()
    }

    /// A view of the slab's bytes that may go to another thread. Writing to the slab while it lives is the caller's mistake
    /// and ends in a panic.
    pub fn reader(&self) -> SlabReader {
        let length = self.elements() * self.dtype.size();
        SlabReader { region: self.region.clone(), length, _held: self.readers.clone() }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows and columns of all tensors.
    pub fn shapes(&self) -> &[(usize, usize)] {
        &self.shapes
    }

    fn require_no_readers(&self) {
        let is_alone = Arc::strong_count(&self.readers) == 1;
        assert!(is_alone, "a slab is written to while it is copied");
        // What another thread read through a reader, it read before the reader was dropped.
        fence(Ordering::Acquire);
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

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.require_no_readers();
        let length = self.elements() * self.dtype.size();
        // SAFETY: the slab's elements lie in its region; `&mut self` keeps others of this thread away, and no reader lives.
        unsafe { std::slice::from_raw_parts_mut(self.region.address() as *mut u8, length) }
    }
}

/// See [`Slab::reader`].
pub struct SlabReader {
    region: Hold,
    length: usize,
    _held: Arc<()>,
}

impl SlabReader {
    /// The slab's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the elements lie in the region, which lives as long as this; a slab with a reader is not written to.
        unsafe { std::slice::from_raw_parts(self.region.address() as *const u8, self.length) }
    }
}
