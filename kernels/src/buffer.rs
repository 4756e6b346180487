//! Buffer: a two-dimensional piece of arena memory, and borrowed views of one.
//!
//! A buffer is `rows x cols` elements of one dtype with a row stride, like a matrix in BLAS; what the
//! columns mean (heads, experts) is the caller's business. Only an [`Arena`](crate::Arena) makes one,
//! and it has no public host slice: numbers go in and out through [`Kernels`](crate::Kernels).
//!
//! Invariants:
//!   * offset + ((rows - 1) * stride + cols) * size <= bytes of the region
//!   * cols <= stride; two live mutable views never overlap (the borrow checker keeps it)

use crate::arena::Hold;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

/// Element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum DType {
    /// 32-bit float: what CPU and CUDA kernels compute in.
    F32,
    /// 64-bit float: what the reference kernels compute in.
    F64,
    /// 32-bit index: token ids, positions, expert and page numbers.
    U32,
    /// Byte: codes of numbers that are kept in fewer bits.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F64 => 8,
            DType::U8 => 1,
        }
    }
}

/// `rows x cols` elements in an arena. Dropping the last handle gives the memory back.
pub struct Buffer {
    region: Hold,
    offset_bytes: usize,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
}

/// A shared view of a [`Buffer`]; use it wherever a `&Buffer` is wanted.
pub struct View<'a>(Buffer, PhantomData<&'a Buffer>);

/// An exclusive view of a [`Buffer`]; use it wherever a `&mut Buffer` is wanted.
pub struct ViewMut<'a>(Buffer, PhantomData<&'a mut Buffer>);

impl Deref for View<'_> {
    type Target = Buffer;
    fn deref(&self) -> &Buffer {
        &self.0
    }
}

impl Deref for ViewMut<'_> {
    type Target = Buffer;
    fn deref(&self) -> &Buffer {
        &self.0
    }
}

impl DerefMut for ViewMut<'_> {
    fn deref_mut(&mut self) -> &mut Buffer {
        &mut self.0
    }
}

impl Buffer {
    pub(crate) fn new(
        region: Hold,
        offset_bytes: usize,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Buffer {
        assert!(offset_bytes + rows * cols * dtype.size() <= region.bytes());
        Buffer { region, offset_bytes, dtype, rows, cols, stride: cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row's start to the next one's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if the rows follow each other without a gap.
    pub fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// The rows of `range`.
    pub fn rows_of(&self, range: Range<usize>) -> View<'_> {
        View(self.piece(range, 0..self.cols), PhantomData)
    }

    /// The rows of `range`, to write to.
    pub fn rows_of_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        ViewMut(self.piece(range, 0..self.cols), PhantomData)
    }

    /// The columns of `range`, all rows.
    pub fn cols_of(&self, range: Range<usize>) -> View<'_> {
        View(self.piece(0..self.rows, range), PhantomData)
    }

    /// Some columns of some rows.
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>) -> View<'_> {
        View(self.piece(rows, cols), PhantomData)
    }

    /// Some columns of some rows, to write to.
    pub fn block_mut(&mut self, rows: Range<usize>, cols: Range<usize>) -> ViewMut<'_> {
        ViewMut(self.piece(rows, cols), PhantomData)
    }

    /// The columns of `range`, all rows, to write to.
    pub fn cols_of_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        ViewMut(self.piece(0..self.rows, range), PhantomData)
    }

    /// The same elements as `rows x cols`; the buffer must be contiguous.
    pub fn reshaped(&self, rows: usize, cols: usize) -> View<'_> {
        View(self.reshape(rows, cols), PhantomData)
    }

    /// The same elements as `rows x cols`, to write to; the buffer must be contiguous.
    pub fn reshaped_mut(&mut self, rows: usize, cols: usize) -> ViewMut<'_> {
        ViewMut(self.reshape(rows, cols), PhantomData)
    }

    pub(crate) fn into_view<'a>(self) -> View<'a> {
        View(self, PhantomData)
    }

    pub(crate) fn into_view_mut<'a>(self) -> ViewMut<'a> {
        ViewMut(self, PhantomData)
    }

    /// Address of the first element on the buffer's device.
    pub(crate) fn address(&self) -> usize {
        self.region.address() + self.offset_bytes
    }

    /// The elements as a host matrix. `T` must match the dtype.
    pub(crate) fn host<T: Element>(&self) -> Mat<'_, T> {
        assert_eq!(self.dtype, T::DTYPE, "dtype of a kernel argument");
        Mat {
            pointer: self.address() as *const T,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            life: PhantomData,
        }
    }

    /// The elements as a host matrix to write to.
    pub(crate) fn host_mut<T: Element>(&mut self) -> MatMut<'_, T> {
        assert_eq!(self.dtype, T::DTYPE, "dtype of a kernel argument");
        MatMut {
            pointer: self.address() as *mut T,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            life: PhantomData,
        }
    }

    /// The bytes of a row of memory on the host.
    pub(crate) fn row_bytes(&self, row: usize) -> &[u8] {
        let length = self.cols * self.dtype.size();
        assert!(row < self.rows);
        // SAFETY: the row lies in the region, which is plain numbers, and `&self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.row_address(row) as *const u8, length) }
    }

    /// The bytes of a row of memory on the host, to write to.
    pub(crate) fn row_bytes_mut(&mut self, row: usize) -> &mut [u8] {
        let length = self.cols * self.dtype.size();
        assert!(row < self.rows);
        // SAFETY: as for `row_bytes`; `&mut self` makes the access exclusive, and any bytes are numbers.
        unsafe { std::slice::from_raw_parts_mut(self.row_address(row) as *mut u8, length) }
    }

    fn row_address(&self, row: usize) -> usize {
        self.address() + row * self.stride * self.dtype.size()
    }

    fn piece(&self, rows: Range<usize>, cols: Range<usize>) -> Buffer {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "cols {cols:?} of {}", self.cols);
        Buffer {
            region: self.region.clone(),
            offset_bytes: self.offset_bytes
                + (rows.start * self.stride + cols.start) * self.dtype.size(),
            dtype: self.dtype,
            rows: rows.len(),
            cols: cols.len(),
            stride: self.stride,
        }
    }

    fn reshape(&self, rows: usize, cols: usize) -> Buffer {
        assert!(self.is_contiguous(), "only a contiguous buffer can be reshaped");
        assert_eq!(rows * cols, self.len(), "a reshape keeps the number of elements");
        Buffer {
            region: self.region.clone(),
            offset_bytes: self.offset_bytes,
            dtype: self.dtype,
            rows,
            cols,
            stride: cols,
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer {:?} {}x{} stride {}", self.dtype, self.rows, self.cols, self.stride)
    }
}

/// A Rust type that a buffer can hold.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
impl Element for u8 {
    const DTYPE: DType = DType::U8;
}

/// A host matrix to read from.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    pointer: *const T,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    life: PhantomData<&'a T>,
}

/// A host matrix to write to.
pub(crate) struct MatMut<'a, T> {
    pointer: *mut T,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    life: PhantomData<&'a mut T>,
}

// SAFETY: a Mat is a shared borrow of plain numbers, a MatMut an exclusive one.
unsafe impl<T: Send + Sync> Send for Mat<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Mat<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Send for MatMut<'_, T> {}
// SAFETY: shared use of a MatMut across threads goes through `shared_row_mut`, whose contract is disjoint rows.
unsafe impl<T: Send + Sync> Sync for MatMut<'_, T> {}

impl<'a, T> Mat<'a, T> {
    /// Rows of `cols` numbers, one after another.
    pub fn of(numbers: &'a [T], cols: usize) -> Mat<'a, T> {
        let (pointer, rows) = (numbers.as_ptr(), numbers.len() / cols);
        Mat { pointer, rows, cols, stride: cols, life: PhantomData }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &'a [T] {
        assert!(i < self.rows);
        // SAFETY: the buffer's invariant keeps row i inside its region, and 'a borrows the buffer.
        unsafe { std::slice::from_raw_parts(self.pointer.add(i * self.stride), self.cols) }
    }

    /// Address of the first element.
    pub fn pointer(&self) -> *const T {
        self.pointer
    }
}

impl<'a, T> MatMut<'a, T> {
    /// Rows of `cols` numbers, one after another.
    pub fn of(numbers: &'a mut [T], cols: usize) -> MatMut<'a, T> {
        let rows = numbers.len() / cols;
        MatMut { pointer: numbers.as_mut_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[T] {
        assert!(i < self.rows);
        // SAFETY: as for `Mat::row`.
        unsafe { std::slice::from_raw_parts(self.pointer.add(i * self.stride), self.cols) }
    }

    /// Row `i`, to write to.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        // SAFETY: `&mut self` makes the access exclusive.
        unsafe { self.shared_row_mut(i) }
    }

    /// Row `i`, to write to, from one of several threads.
    ///
    /// # Safety
    /// No two threads may touch the same row at the same time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn shared_row_mut(&self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: in bounds by the buffer's invariant; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(i * self.stride), self.cols) }
    }

    /// Address of the first element.
    pub fn pointer(&self) -> *mut T {
        self.pointer
    }
}
