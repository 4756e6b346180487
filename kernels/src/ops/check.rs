//! Test fixture: contexts, filled buffers, and comparisons.
use super::{Cx, Isa};
use crate::arena::{Arena, Kind};
use crate::buffer::{Buffer, DType};
use crate::pool::Pool;
use crate::random::{self, Stream};

pub(crate) fn cx(threads: usize) -> Cx {
    with(threads, Isa::detect())
}
pub(crate) fn with(threads: usize, isa: Isa) -> Cx {
    let arena = Arena::new(None);
    let scratch = arena.owner("scratch", Kind::Activations);
    Cx { pool: Pool::new(threads), isa, arena, scratch }
}
pub(crate) fn floats(cx: &Cx, rows: usize, cols: usize, values: &[f32]) -> Buffer {
    assert_eq!(values.len(), rows * cols);
    let mut b = cx.arena.buffer(cx.scratch, DType::F32, rows, cols).unwrap();
    let mut m = b.host_mut::<f32>();
    for i in 0..rows {
        m.row_mut(i).copy_from_slice(&values[i * cols..][..cols]);
    }
    b
}
pub(crate) fn indices(cx: &Cx, rows: usize, cols: usize, values: &[u32]) -> Buffer {
    let mut b = cx.arena.buffer(cx.scratch, DType::U32, rows, cols).unwrap();
    let mut m = b.host_mut::<u32>();
    for i in 0..rows {
        m.row_mut(i).copy_from_slice(&values[i * cols..][..cols]);
    }
    b
}
pub(crate) fn normal(cx: &Cx, rows: usize, cols: usize, seed: u64) -> Buffer {
    let v: Vec<f32> = (0..rows * cols)
        .map(|i| random::normal(seed, Stream::Data, [i as u64, 0, 0, 0]) as f32)
        .collect();
    floats(cx, rows, cols, &v)
}
pub(crate) fn read(b: &Buffer) -> Vec<f32> {
    let m = b.host::<f32>();
    (0..m.rows).flat_map(|i| m.row(i).to_vec()).collect()
}
