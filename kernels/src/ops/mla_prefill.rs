//! Attention of a prompt's rows to one range of their sequence, merged with the ranges before it.
//!
//! Knows no cache and no weights: keys and values come expanded, for tokens `first ..` of the sequence.
//! A prompt of any length so needs the expanded keys of one range at a time.
//!
//! Per block of rows and head: (1) scores by `product` on the range's panels, (2) softmax row by row, (3)
//! output by `product`, all as in `mla_train`; (4) with Σ = exp(lse_a) + exp(lse_b), the merged output is
//! exp(lse_a) / Σ o_a + exp(lse_b) / Σ o_b, and lse = ln Σ.
//!
//! Invariants:
//!   * a row's result depends on its own query and on the ranges in the order they come, not on the rows
//!     beside it
//!   * one range from token 0 gives the bits of `mla_train`

use super::Cx;
use super::mla_train::{BLOCK, Inputs, Panels, ROWS, Segment, attempt, divide, softmax};
use super::tile::product;
use crate::buffer::{Buffer, DType, MatMut};
use crate::kernels::{AttentionShape, Result, Store};
use std::ops::Range;

/// See [`Kernels::mla_prefill`](crate::Kernels::mla_prefill).
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_prefill(
    cx: &Cx,
    shape: &AttentionShape,
    q: &Buffer,
    kv: &Buffer,
    k_rope: &Buffer,
    first: usize,
    length: &Buffer,
    o: &mut Buffer,
    lse: &mut Buffer,
    store: Store,
) -> Result<()> {
    let inputs = Inputs::new(cx.isa, shape, q, kv, k_rope);
    inputs.check_output(o, lse);
    assert_eq!((length.rows(), length.cols()), (q.rows(), 1), "prefill: one length per row");
    assert!(kv.rows() > 0, "prefill: a range has tokens");
    let keys = Panels::of_keys(cx, &inputs, &[Segment::alone(0..kv.rows())])?;
    let (tokens, length) = (kv.rows(), length.host::<u32>());
    let seen = |row: usize| (length.row(row)[0] as usize).saturating_sub(first).min(tokens);
    let job = Prefill {
        inputs: &inputs,
        keys: &keys,
        seen: &seen,
        o: o.host_mut(),
        lse: lse.host_mut(),
        store,
    };
    let pairs: usize = (0..q.rows()).map(seen).sum();
    let blocks = q.rows().div_ceil(ROWS);
    let cost = 2 * pairs * (shape.query_width() + shape.value_width) / blocks.max(1);
    attempt(cx, blocks * shape.heads, cost, &|piece| {
        let start = piece / shape.heads * ROWS;
        job.block(cx, start..q.rows().min(start + ROWS), piece % shape.heads)
    })
}

struct Prefill<'a> {
    inputs: &'a Inputs<'a>,
    keys: &'a Panels,
    /// Tokens of the range that a row sees.
    seen: &'a (dyn Fn(usize) -> usize + Sync),
    o: MatMut<'a, f32>,
    lse: MatMut<'a, f32>,
    store: Store,
}

impl Prefill<'_> {
    /// One head of a block of rows.
    fn block(&self, cx: &Cx, rows: Range<usize>, head: usize) -> Result<()> {
        let shape = self.inputs.shape;
        let most = rows.clone().map(self.seen).max().unwrap_or(0);
        let buffer = |cols| cx.arena.buffer(cx.scratch, DType::F32, rows.len(), cols);
        let (mut scores, mut part) =
            (buffer(most.next_multiple_of(BLOCK))?, buffer(shape.value_width)?);
        let (mut scores, mut part) = (scores.host_mut::<f32>(), part.host_mut::<f32>());
        self.inputs.scores(self.keys, (0, head), &rows, &mut scores);
        let mut softmaxes = [const { None }; ROWS];
        for (i, row) in rows.clone().enumerate() {
            let row_scores = scores.row_mut(i);
            softmaxes[i] = match (self.seen)(row) {
                0 => {
                    row_scores.fill(0.0);
                    None
                }
                seen => Some(softmax(cx.isa, row_scores, seen, shape.scale)),
            };
        }
        let (value, stride) = self.inputs.value(head, 0);
        // SAFETY: the range has `most` values, and the outputs are this block's own.
        unsafe {
            let (weights, out) = (scores.pointer(), part.pointer());
            let (width, score) = (shape.value_width, scores.stride);
            let (m, k, to) = (rows.len(), most, part.stride);
            product(cx.isa, m, width, k, weights, score, 1, value, stride, out, to, Store::Set);
        }
        for (i, (row, softmax)) in rows.zip(softmaxes).enumerate() {
            let new = part.row_mut(i);
            let lse = softmax.map_or(f32::NEG_INFINITY, |softmax| {
                divide(new, softmax.sum);
                softmax.lse()
            });
            self.merge(row, head, new, lse);
        }
        Ok(())
    }

    /// Replaces a row's output of one head, or merges a new part into it.
    fn merge(&self, row: usize, head: usize, new: &[f32], new_lse: f32) {
        let width = new.len();
        // SAFETY: one block writes a head's columns of a row.
        let (o, lse) = unsafe {
            let o = self.o.pointer().add(row * self.o.stride + head * width);
            let lse = self.lse.pointer().add(row * self.lse.stride + head);
            (std::slice::from_raw_parts_mut(o, width), &mut *lse)
        };
        if self.store == Store::Set {
            o.copy_from_slice(new);
            *lse = new_lse;
            return;
        }
        if new_lse == f32::NEG_INFINITY {
            return;
        }
        let [a, b] = [*lse, new_lse].map(f64::from);
        let top = a.max(b);
        let [a, b] = [a, b].map(|x| (x - top).exp());
        let [old_share, new_share] = [a, b].map(|x| (x / (a + b)) as f32);
        o.iter_mut().zip(new).for_each(|(o, new)| *o = *o * old_share + new * new_share);
        *lse = (top + (a + b).ln()) as f32;
    }
}

#[cfg(test)]
mod tests;
