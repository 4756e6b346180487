//! Movement of numbers: in, out, between buffers, and by row index.
//!
//! Knows nothing of what rows mean. Row indices are `U32 [n, 1]`.

use crate::buffer::{Buffer, DType, Element};

pub fn write<T: Element>(src: &[T], dst: &mut Buffer) {
    assert_eq!(src.len(), dst.len(), "an upload fills its buffer");
    let cols = dst.cols();
    let mut dst = dst.host_mut::<T>();
    for i in 0..dst.rows {
        dst.row_mut(i).copy_from_slice(&src[i * cols..][..cols]);
    }
}

pub fn read<T: Element>(src: &Buffer) -> Vec<T> {
    let src = src.host::<T>();
    (0..src.rows).flat_map(|i| src.row(i).iter().copied()).collect()
}

pub fn append_bytes(src: &Buffer, to: &mut Vec<u8>) {
    match src.dtype() {
        DType::F64 => to.extend(read::<f64>(src).into_iter().flat_map(f64::to_le_bytes)),
        DType::F32 => to.extend(read::<f32>(src).into_iter().flat_map(f32::to_le_bytes)),
        DType::U32 => to.extend(read::<u32>(src).into_iter().flat_map(u32::to_le_bytes)),
        DType::U8 => to.extend(read::<u8>(src)),
    }
}

pub fn upload_bytes(src: &[u8], dst: &mut Buffer) {
    fn numbers<const N: usize, T>(src: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
        src.chunks_exact(N).map(|bytes| from(bytes.try_into().expect("N bytes"))).collect()
    }
    match dst.dtype() {
        DType::F64 => write(&numbers(src, f64::from_le_bytes), dst),
        DType::F32 => write(&numbers(src, f32::from_le_bytes), dst),
        DType::U32 => write(&numbers(src, u32::from_le_bytes), dst),
        DType::U8 => write(src, dst),
    }
}

pub fn fill(dst: &mut Buffer, value: f64) {
    match dst.dtype() {
        DType::U32 => write(&vec![value as u32; dst.len()], dst),
        _ => write(&vec![value; dst.len()], dst),
    }
}

pub fn copy(src: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (dst.rows(), dst.cols()), "a copy keeps its shape");
    match src.dtype() {
        DType::U32 => write(&read::<u32>(src), dst),
        _ => write(&read::<f64>(src), dst),
    }
}

pub fn add(src: &Buffer, dst: &mut Buffer) {
    assert_eq!((src.rows(), src.cols()), (dst.rows(), dst.cols()), "a sum keeps its shape");
    let (src, mut dst) = (src.host::<f64>(), dst.host_mut::<f64>());
    for i in 0..src.rows {
        super::add_scaled(1.0, src.row(i), dst.row_mut(i));
    }
}

pub fn scale(src: &Buffer, factor: f64, dst: &mut Buffer) {
    let scaled: Vec<f64> = read::<f64>(src).into_iter().map(|x| factor * x).collect();
    write(&scaled, dst);
}

pub fn gather_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    let index = read::<u32>(index);
    assert_eq!(index.len(), dst.rows(), "one index a gathered row");
    let (src, mut dst) = (src.host::<f64>(), dst.host_mut::<f64>());
    for (i, from) in index.into_iter().enumerate() {
        dst.row_mut(i).copy_from_slice(src.row(from as usize));
    }
}

pub fn scatter_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    let index = read::<u32>(index);
    assert_eq!(index.len(), src.rows(), "one index a scattered row");
    let (src, mut dst) = (src.host::<f64>(), dst.host_mut::<f64>());
    for (i, to) in index.into_iter().enumerate() {
        dst.row_mut(to as usize).copy_from_slice(src.row(i));
    }
}

pub fn scatter_add_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) {
    let index = read::<u32>(index);
    assert_eq!(index.len(), src.rows(), "one index a scattered row");
    let (src, mut dst) = (src.host::<f64>(), dst.host_mut::<f64>());
    for (i, to) in index.into_iter().enumerate() {
        super::add_scaled(1.0, src.row(i), dst.row_mut(to as usize));
    }
}
