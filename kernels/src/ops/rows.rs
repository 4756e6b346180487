//! Movement: numbers in and out, filling, copying, adding, scaling, and rows by index.
//!
//! Host numbers of another width are converted here and nowhere else. Where several rows are added to
//! one (`scatter_add_rows`), threads split the columns, so that the rows come in ascending order.

use super::{Cx, Isa, Lanes, OnLanes, work};
use crate::buffer::{Buffer, DType, Element, Mat};

/// Operations that one moved element counts as: memory sets the pace.
const MOVE: usize = 12;

/// See [`Kernels::upload`](crate::Kernels::upload), `upload_f64` and `upload_indices`.
pub(crate) fn upload<S: Copy + Sync, T: Element>(
    cx: &Cx,
    src: &[S],
    dst: &mut Buffer,
    convert: fn(S) -> T,
) {
    assert_eq!(src.len(), dst.len(), "numbers for a buffer");
    let (cols, dst) = (dst.cols(), dst.host_mut::<T>());
    work::segments(cx, dst.rows, cols, MOVE, &|row, range| {
        let from = &src[row * cols + range.start..row * cols + range.end];
        // SAFETY: segments are disjoint.
        let to = unsafe { work::part_mut(&dst, row, range) };
        for (to, from) in to.iter_mut().zip(from) {
            *to = convert(*from);
        }
    });
}

/// See [`Kernels::download`](crate::Kernels::download), `download_f64` and `download_indices`.
pub(crate) fn download<T: Element, D>(src: &Buffer, convert: fn(T) -> D) -> Vec<D> {
    let src = src.host::<T>();
    let mut out = Vec::with_capacity(src.rows * src.cols);
    for row in 0..src.rows {
        out.extend(src.row(row).iter().map(|x| convert(*x)));
    }
    out
}

/// See [`Kernels::append_bytes`](crate::Kernels::append_bytes).
pub(crate) fn append_bytes(src: &Buffer, to: &mut Vec<u8>) {
    to.reserve(src.len() * src.dtype().size());
    (0..src.rows()).for_each(|row| to.extend_from_slice(src.row_bytes(row)));
}

/// See [`Kernels::upload_bytes`](crate::Kernels::upload_bytes).
pub(crate) fn upload_bytes(src: &[u8], dst: &mut Buffer) {
    let width = dst.cols() * dst.dtype().size();
    assert_eq!(src.len(), dst.rows() * width, "bytes for a buffer");
    for row in 0..dst.rows() {
        dst.row_bytes_mut(row).copy_from_slice(&src[row * width..][..width]);
    }
}

/// See [`Kernels::fill`](crate::Kernels::fill).
pub(crate) fn fill(cx: &Cx, dst: &mut Buffer, value: f64) {
    match dst.dtype() {
        DType::U32 => fill_with(cx, dst, value as u32),
        _ => fill_with(cx, dst, value as f32),
    }
}

fn fill_with<T: Element>(cx: &Cx, dst: &mut Buffer, value: T) {
    let dst = dst.host_mut::<T>();
    work::segments(cx, dst.rows, dst.cols, MOVE, &|row, range| {
        // SAFETY: segments are disjoint.
        unsafe { work::part_mut(&dst, row, range) }.fill(value);
    });
}

/// See [`Kernels::copy`](crate::Kernels::copy).
pub(crate) fn copy(cx: &Cx, src: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (dst.rows(), dst.cols()), "shape of a copy");
    match src.dtype() {
        DType::U32 => copy_rows::<u32>(cx, src.rows(), src, dst, |row| row, |row| row),
        DType::U8 => copy_rows::<u8>(cx, src.rows(), src, dst, |row| row, |row| row),
        _ => copy_rows::<f32>(cx, src.rows(), src, dst, |row| row, |row| row),
    }
}

/// See [`Kernels::gather_rows`](crate::Kernels::gather_rows).
pub(crate) fn gather_rows(cx: &Cx, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    assert_eq!((index.rows(), src.cols()), (dst.rows(), dst.cols()), "shape of a gather");
    let index = index.host::<u32>();
    let from = |row: usize| index.row(row)[0] as usize;
    copy_rows::<f32>(cx, index.rows, src, dst, from, |row| row);
}

/// See [`Kernels::scatter_rows`](crate::Kernels::scatter_rows).
pub(crate) fn scatter_rows(cx: &Cx, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (index.rows(), dst.cols()), "shape of a scatter");
    let index = index.host::<u32>();
    let to = |row: usize| index.row(row)[0] as usize;
    copy_rows::<f32>(cx, index.rows, src, dst, |row| row, to);
}

/// dst[to(i)] = src[from(i)] for i < count.
fn copy_rows<T: Element>(
    cx: &Cx,
    count: usize,
    src: &Buffer,
    dst: &mut Buffer,
    from: impl Fn(usize) -> usize + Sync,
    to: impl Fn(usize) -> usize + Sync,
) {
    let (src, dst) = (src.host::<T>(), dst.host_mut::<T>());
    work::segments(cx, count, src.cols, MOVE, &|row, range| {
        // SAFETY: segments are disjoint, and so are the rows that `to` names.
        let part = unsafe { work::part_mut(&dst, to(row), range.clone()) };
        part.copy_from_slice(&src.row(from(row))[range]);
    });
}

/// See [`Kernels::add`](crate::Kernels::add).
pub(crate) fn add(cx: &Cx, src: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (dst.rows(), dst.cols()), "shape of a sum");
    let (src, dst) = (src.host::<f32>(), dst.host_mut::<f32>());
    work::segments(cx, src.rows, src.cols, MOVE, &|row, range| {
        // SAFETY: segments are disjoint.
        let to = unsafe { work::part_mut(&dst, row, range.clone()) };
        add_slice(cx.isa, &src.row(row)[range], to);
    });
}

/// See [`Kernels::scale`](crate::Kernels::scale).
pub(crate) fn scale(cx: &Cx, src: &Buffer, factor: f64, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (dst.rows(), dst.cols()), "shape of a scaled copy");
    let (src, dst, factor) = (src.host::<f32>(), dst.host_mut::<f32>(), factor as f32);
    work::segments(cx, src.rows, src.cols, MOVE, &|row, range| {
        // SAFETY: segments are disjoint.
        let to = unsafe { work::part_mut(&dst, row, range.clone()) };
        for (to, from) in to.iter_mut().zip(&src.row(row)[range]) {
            *to = factor * from;
        }
    });
}

/// See [`Kernels::scatter_add_rows`](crate::Kernels::scatter_add_rows).
pub(crate) fn scatter_add_rows(cx: &Cx, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (index.rows(), dst.cols()), "shape of a scatter");
    let (src, index): (Mat<'_, f32>, Mat<'_, u32>) = (src.host(), index.host());
    let dst = dst.host_mut::<f32>();
    work::split(cx, src.cols, 16, MOVE * src.rows, &|range| {
        for row in 0..src.rows {
            // SAFETY: a column belongs to one piece.
            let to = unsafe { work::part_mut(&dst, index.row(row)[0] as usize, range.clone()) };
            add_slice(cx.isa, &src.row(row)[range.clone()], to);
        }
    });
}

fn add_slice(isa: Isa, from: &[f32], to: &mut [f32]) {
    // SAFETY: `isa` was detected; the loop is safe code.
    unsafe { isa.run(AddSlice { from, to }) }
}

struct AddSlice<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl OnLanes for AddSlice<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to += from;
        }
    }
}
