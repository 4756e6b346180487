//! Causal attention of packed rows: MLA expanded, MLA absorbed and GQA in one form.
//!
//! Knows no weights and no positions (queries and keys come rotated), and never holds a T x T
//! matrix: a block of [`ROWS`] queries meets the keys of its own segment, up to the block's end.
//!
//! Forward, per block and head: (1) scores by `product` on transposed panels of [`BLOCK`] keys, (2)
//! softmax row by row, (3) output by `product` with the value rows, (4) times 1 / the row's sum.
//! The backward pass is in `backward`.
//!
//! A segment may continue another one, as the replies to one prompt do: its rows see that stem's rows
//! first, then their own (`segments`).
//!
//! Invariants:
//!   * a row's result depends on the rows of its sequence up to itself alone: a score is one chain
//!     over the key part, then the rope part; exponentials are summed in blocks of keys counted
//!     from the sequence's start; the output is one chain over keys ascending. So a stem that is
//!     shared gives the bits of one that is repeated
//!   * `mla_decode` does the same operations, so that sampler and trainer agree to the bit

mod backward;
mod panels;
mod segments;
mod softmax;
#[cfg(test)]
mod tests;

pub(crate) use backward::mla_train_backward_input;
pub(crate) use panels::Panels;
pub(crate) use segments::Segment;
pub(crate) use softmax::{divide, softmax, softmax_row};

use self::panels::against_panels;
use super::tile::product;
use super::work;
use super::{Cx, Isa};
use crate::arena::OutOfMemory;
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::kernels::{AttentionShape, Result, Store};
use std::ops::Range;
use std::sync::Mutex;

/// Keys of a panel, and of one step of the softmax's sum.
pub(crate) const BLOCK: usize = 32;

/// Queries of a block: as many as a panel's keys waste least of the causal half.
pub(crate) const ROWS: usize = 32;

/// See [`Kernels::mla_train`](crate::Kernels::mla_train).
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_train(
    cx: &Cx,
    shape: &AttentionShape,
    q: &Buffer,
    kv: &Buffer,
    k_rope: &Buffer,
    start: &Buffer,
    o: &mut Buffer,
    lse: &mut Buffer,
) -> Result<()> {
    let inputs = Inputs::new(cx.isa, shape, q, kv, k_rope);
    inputs.check_output(o, lse);
    let segments = segments::read(start, q.rows(), kv.rows());
    let keys = Panels::of_keys(cx, &inputs, &segments)?;
    let blocks = blocks(&segments);
    let (o, lse) = (o.host_mut::<f32>(), lse.host_mut::<f32>());
    let cost = inputs.cost(&segments) / (blocks.len() * shape.heads).max(1);
    attempt(cx, blocks.len() * shape.heads, cost, &|piece| {
        // By rows, as the operations around it: a thread finds what it wrote in its own cache.
        let (index, rows) = blocks[piece / shape.heads].clone();
        let (head, segment) = (piece % shape.heads, &segments[index]);
        let seen = segment.seen(rows.end - 1);
        let mut scratch =
            cx.arena.buffer(cx.scratch, DType::F32, rows.len(), seen.next_multiple_of(BLOCK))?;
        let mut scores = scratch.host_mut::<f32>();
        inputs.scores(&keys, (index, head), &rows, &mut scores);
        let mut sums = [0.0; ROWS];
        for (i, row) in rows.clone().enumerate() {
            let softmax = softmax(cx.isa, scores.row_mut(i), segment.seen(row), shape.scale);
            sums[i] = softmax.sum;
            // SAFETY: one piece writes a head's columns of a row.
            unsafe { lse.pointer().add(row * lse.stride + head).write(softmax.lse()) };
        }
        let width = shape.value_width;
        // SAFETY: values lie in kv's rows up to the block's end, and the outputs are this piece's
        // own.
        unsafe {
            let out = o.pointer().add(rows.start * o.stride + head * width);
            for (key, values) in segment.stretches(seen) {
                let (value, stride) = inputs.value(head, values.start);
                let weights = scores.pointer().add(key);
                let (m, k, score) = (rows.len(), values.len(), scores.stride);
                let store = if key == 0 { Store::Set } else { Store::Add };
                product(
                    cx.isa, m, width, k, weights, score, 1, value, stride, out, o.stride, store,
                );
            }
            for (i, sum) in sums[..rows.len()].iter().enumerate() {
                divide(std::slice::from_raw_parts_mut(out.add(i * o.stride), width), *sum);
            }
        }
        Ok(())
    })
}

/// Queries, keys and values, with their shapes checked.
pub(crate) struct Inputs<'a> {
    isa: Isa,
    pub shape: &'a AttentionShape,
    q: Mat<'a, f32>,
    kv: Mat<'a, f32>,
    k_rope: Mat<'a, f32>,
}

impl<'a> Inputs<'a> {
    pub fn new(
        isa: Isa,
        shape: &'a AttentionShape,
        q: &'a Buffer,
        kv: &'a Buffer,
        k_rope: &'a Buffer,
    ) -> Inputs<'a> {
        assert!(shape.heads.is_multiple_of(shape.sharing), "attention: heads in equal groups");
        assert!(shape.kv_width() <= kv.cols(), "attention: keys and values inside kv");
        assert_eq!(q.cols(), shape.heads * shape.query_width(), "attention: columns of q");
        assert_eq!(k_rope.cols(), shape.rope_width, "attention: columns of k_rope");
        assert_eq!(k_rope.rows(), kv.rows(), "attention: rows of keys and values");
        Inputs { isa, shape, q: q.host(), kv: kv.host(), k_rope: k_rope.host() }
    }

    pub fn check_output(&self, o: &Buffer, lse: &Buffer) {
        assert_eq!(
            (o.rows(), o.cols()),
            (self.q.rows, self.shape.heads * self.shape.value_width),
            "attention: o"
        );
        assert_eq!((lse.rows(), lse.cols()), (self.q.rows, self.shape.heads), "attention: lse");
    }

    /// Operations of a forward pass, about.
    fn cost(&self, segments: &[Segment]) -> usize {
        let pairs = |s: &Segment| s.rows.len() * (2 * s.stem.len() + s.rows.len() + ROWS) / 2;
        let pairs: usize = segments.iter().map(pairs).sum();
        2 * pairs * self.shape.heads * (self.shape.query_width() + self.shape.value_width)
    }

    /// Address of a head's value in row `first`, and elements to the next row's.
    pub fn value(&self, head: usize, first: usize) -> (*const f32, usize) {
        let column = head / self.shape.sharing * self.shape.head_stride + self.shape.value_offset;
        (self.kv.row(first)[column..].as_ptr(), self.kv.stride)
    }

    /// Unscaled scores of a block of rows with all panels up to its end.
    pub fn scores(
        &self,
        keys: &Panels,
        (segment, head): (usize, usize),
        rows: &Range<usize>,
        scores: &mut MatMut<'_, f32>,
    ) {
        let query = self.q.row(rows.start)[head * self.shape.query_width()..].as_ptr();
        // SAFETY: the query columns lie in q, and `against_panels` fills the scratch it is given.
        unsafe {
            against_panels(
                self.isa,
                keys,
                (segment, head),
                (query, self.q.stride, self.shape.query_width()),
                scores,
            )
        }
    }
}

/// Blocks of up to ROWS rows: (segment, rows).
fn blocks(segments: &[Segment]) -> Vec<(usize, Range<usize>)> {
    let count = segments.iter().map(|segment| segment.rows.len().div_ceil(ROWS)).sum();
    let mut blocks = Vec::with_capacity(count);
    for (index, segment) in segments.iter().enumerate() {
        let end = segment.rows.end;
        let rows = segment.rows.clone().step_by(ROWS);
        blocks.extend(rows.map(|row| (index, row..end.min(row + ROWS))));
    }
    blocks
}

/// Runs fallible pieces of `cost` operations each on the pool and returns their first error.
pub(crate) fn attempt(
    cx: &Cx,
    pieces: usize,
    cost: usize,
    call: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<()> {
    let failure: Mutex<Option<OutOfMemory>> = Mutex::new(None);
    work::each(cx, pieces, cost, &|piece| {
        if let Err(error) = call(piece) {
            failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
}
