//! What the unit tests of the operations share: contexts, and buffers with given or random contents.

use super::{Cx, Isa};
use crate::arena::{Arena, Kind};
use crate::buffer::{Buffer, DType};
use crate::pool::Pool;
use crate::random::{self, Stream};

/// A context on the best instruction set found.
pub(crate) fn cx(threads: usize) -> Cx {
    with(threads, Isa::detect())
}

/// A context on a given instruction set.
pub(crate) fn with(threads: usize, isa: Isa) -> Cx {
    let arena = Arena::new(None);
    let scratch = arena.owner("scratch", Kind::Activations);
    Cx { pool: Pool::new(threads), isa, arena, scratch }
}

/// A matrix of given values, in row order.
pub(crate) fn floats(cx: &Cx, rows: usize, cols: usize, values: &[f32]) -> Buffer {
    assert_eq!(values.len(), rows * cols);
    let mut buffer = cx.arena.buffer(cx.scratch, DType::F32, rows, cols).unwrap();
    let mut rows_out = buffer.host_mut::<f32>();
    for i in 0..rows {
        rows_out.row_mut(i).copy_from_slice(&values[i * cols..][..cols]);
    }
    buffer
}

/// A matrix of given indices, in row order.
pub(crate) fn indices(cx: &Cx, rows: usize, cols: usize, values: &[u32]) -> Buffer {
    let mut buffer = cx.arena.buffer(cx.scratch, DType::U32, rows, cols).unwrap();
    let mut rows_out = buffer.host_mut::<u32>();
    for i in 0..rows {
        rows_out.row_mut(i).copy_from_slice(&values[i * cols..][..cols]);
    }
    buffer
}

/// A matrix of values from N(0, 1).
pub(crate) fn normal(cx: &Cx, rows: usize, cols: usize, seed: u64) -> Buffer {
    let values: Vec<f32> = (0..rows * cols)
        .map(|i| random::normal(seed, Stream::Data, [i as u64, 0, 0, 0]) as f32)
        .collect();
    floats(cx, rows, cols, &values)
}

/// All values, in row order.
pub(crate) fn read(buffer: &Buffer) -> Vec<f32> {
    let matrix = buffer.host::<f32>();
    (0..matrix.rows).flat_map(|i| matrix.row(i).to_vec()).collect()
}
