//! Gradients of causal attention, by recomputing the probabilities from the log-sum-exp.
//!
//! Per segment and head, block of rows by block: (1) probabilities again and (2) the gradient of their
//! scores, (3) dq, (4) the head's own part of dk and dv. Then (5) the parts are summed over the heads
//! that share a key, which is all of them for the rope part.
//!
//! Invariants:
//!   * a head's part is one chain over rows ascending, then the heads are added in ascending order, so
//!     that no thread count changes a bit
//!   * the parts are as large as dq and the output together, whatever the segments' lengths

use super::super::Cx;
use super::super::tile::product;
use super::super::work::split;
use super::panels::{Panels, against_panels};
use super::softmax::RowGradient;
use super::{BLOCK, Inputs, ROWS, attempt, segments};
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::kernels::{AttentionShape, Result, Store};
use std::ops::Range;

/// See [`Kernels::mla_train_backward_input`](crate::Kernels::mla_train_backward_input).
#[allow(clippy::too_many_arguments)]
pub(crate) fn mla_train_backward_input(
    cx: &Cx,
    shape: &AttentionShape,
    q: &Buffer,
    kv: &Buffer,
    k_rope: &Buffer,
    start: &Buffer,
    o: &Buffer,
    lse: &Buffer,
    d_o: &Buffer,
    dq: &mut Buffer,
    dkv: &mut Buffer,
    dk_rope: &mut Buffer,
) -> Result<()> {
    let inputs = Inputs::new(cx.isa, shape, q, kv, k_rope);
    inputs.check_output(o, lse);
    inputs.check_output(d_o, lse);
    for (gradient, of) in [(&*dq, q), (&*dkv, kv), (&*dk_rope, k_rope)] {
        assert_eq!((gradient.rows(), gradient.cols()), (of.rows(), of.cols()), "attention: shape of a gradient");
    }
    let (heads, rows) = (shape.heads, q.rows());
    let segments = segments(start, rows);
    let keys = Panels::of_keys(cx, &inputs, &segments)?;
    let values = if shape.value_offset == 0 && shape.value_width <= shape.key_width {
        None
    } else {
        Some(Panels::of_values(cx, &inputs, &segments)?)
    };
    let mut dk = cx.arena.buffer(cx.scratch, DType::F32, heads * rows, shape.query_width())?;
    let mut dv = cx.arena.buffer(cx.scratch, DType::F32, heads * rows, shape.value_width)?;
    let job = Backward {
        inputs: &inputs,
        keys: &keys,
        values: values.as_ref().unwrap_or(&keys),
        o: o.host(),
        lse: lse.host(),
        d_o: d_o.host(),
        dq: dq.host_mut(),
        dk: dk.host_mut(),
        dv: dv.host_mut(),
    };
    let cost = 3 * inputs.cost(&segments) / (segments.len() * heads).max(1);
    attempt(cx, segments.len() * heads, cost, &|piece| {
        job.segment(cx, piece / heads, piece % heads, &segments[piece / heads])
    })?;
    let (dk, dv) = (job.dk, job.dv);
    let (dkv, dk_rope) = (dkv.host_mut::<f32>(), dk_rope.host_mut::<f32>());
    split(cx, rows, 1, heads * (dk.cols + dv.cols), &|range| {
        for row in range {
            // SAFETY: a row belongs to one piece.
            let (dkv, dk_rope) = unsafe { (dkv.shared_row_mut(row), dk_rope.shared_row_mut(row)) };
            dkv.fill(0.0);
            dk_rope.fill(0.0);
            for head in 0..heads {
                let (key, rope) = dk.row(head * rows + row).split_at(shape.key_width);
                let first = head / shape.sharing * shape.head_stride;
                add(&mut dkv[first..], key);
                add(&mut dkv[first + shape.value_offset..], dv.row(head * rows + row));
                add(dk_rope, rope);
            }
        }
    });
    Ok(())
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// What the backward pass of all segments and heads reads and writes.
struct Backward<'a> {
    inputs: &'a Inputs<'a>,
    keys: &'a Panels,
    values: &'a Panels,
    o: Mat<'a, f32>,
    lse: Mat<'a, f32>,
    d_o: Mat<'a, f32>,
    dq: MatMut<'a, f32>,
    /// Each head's gradient of its keys: row `head * T + t`.
    dk: MatMut<'a, f32>,
    /// Each head's gradient of its values.
    dv: MatMut<'a, f32>,
}

impl Backward<'_> {
    /// Gradients of one segment and head.
    fn segment(&self, cx: &Cx, index: usize, head: usize, segment: &Range<usize>) -> Result<()> {
        let width = segment.len().next_multiple_of(BLOCK);
        let mut p = cx.arena.buffer(cx.scratch, DType::F32, ROWS, width)?;
        let mut ds = cx.arena.buffer(cx.scratch, DType::F32, ROWS, width)?;
        for row in segment.clone() {
            // SAFETY: one piece writes a segment's and head's rows of dk and dv.
            unsafe {
                self.dk.shared_row_mut(head * self.o.rows + row).fill(0.0);
                self.dv.shared_row_mut(head * self.o.rows + row).fill(0.0);
            }
        }
        for first in segment.clone().step_by(ROWS) {
            let rows = first..segment.end.min(first + ROWS);
            let columns = 0..(rows.end - segment.start).next_multiple_of(BLOCK);
            let (mut p, mut ds) = (p.rows_of_mut(0..rows.len()), ds.rows_of_mut(0..rows.len()));
            let (mut p, mut ds) = (p.cols_of_mut(columns.clone()), ds.cols_of_mut(columns));
            let (mut p, mut ds) = (p.host_mut(), ds.host_mut());
            self.probabilities((index, head), segment.start, &rows, &mut p, &mut ds);
            // SAFETY: one piece writes a segment's and head's parts of dq, dk and dv.
            unsafe { self.add_block(head, segment.start, &rows, &p, &ds) };
        }
        Ok(())
    }

    /// The block's probabilities, and the gradient of its unscaled scores.
    fn probabilities(
        &self,
        (index, head): (usize, usize),
        start: usize,
        rows: &Range<usize>,
        p: &mut MatMut<'_, f32>,
        ds: &mut MatMut<'_, f32>,
    ) {
        let shape = self.inputs.shape;
        let columns = head * shape.value_width..(head + 1) * shape.value_width;
        self.inputs.scores(self.keys, (index, head), rows, p);
        let d_o = self.d_o.row(rows.start)[columns.start..].as_ptr();
        // SAFETY: a head's columns lie in d_o.
        unsafe {
            let x = (d_o, self.d_o.stride, shape.value_width);
            against_panels(self.inputs.isa, self.values, (index, head), x, ds);
        }
        for (i, row) in rows.clone().enumerate() {
            let job = RowGradient {
                p: p.row_mut(i),
                ds: ds.row_mut(i),
                seen: row + 1 - start,
                scale: shape.scale as f32,
                lse: self.lse.row(row)[head],
                o: &self.o.row(row)[columns.clone()],
                d_o: &self.d_o.row(row)[columns.clone()],
            };
            // SAFETY: `isa` was detected.
            unsafe { self.inputs.isa.run(job) };
        }
    }

    /// Sets the block's dq and adds the block to the head's dk and dv.
    ///
    /// # Safety
    /// No other thread works on this head of this segment.
    unsafe fn add_block(
        &self,
        head: usize,
        start: usize,
        rows: &Range<usize>,
        p: &MatMut<'_, f32>,
        ds: &MatMut<'_, f32>,
    ) {
        let Inputs { isa, shape, q, kv, k_rope } = self.inputs;
        let (isa, width, count, seen) = (*isa, shape.query_width(), rows.len(), rows.end - start);
        let (p, p_row, ds, ds_row) = (p.pointer().cast_const(), p.stride, ds.pointer().cast_const(), ds.stride);
        let key = kv.row(start)[head / shape.sharing * shape.head_stride..].as_ptr();
        let (query, value) = (head * width, head * shape.value_width);
        // SAFETY: all blocks lie inside their matrices; the outputs are this piece's own.
        unsafe {
            let (n, dq) = (shape.key_width, self.dq.pointer().add(rows.start * self.dq.stride + query));
            product(isa, count, n, seen, ds, ds_row, 1, key, kv.stride, dq, self.dq.stride, Store::Set);
            if shape.rope_width > 0 {
                let (rope, dq) = (k_rope.row(start).as_ptr(), dq.add(n));
                let n = shape.rope_width;
                product(isa, count, n, seen, ds, ds_row, 1, rope, k_rope.stride, dq, self.dq.stride, Store::Set);
            }
            let (q_rows, dk) = (q.row(rows.start)[query..].as_ptr(), self.dk.pointer());
            let dk = dk.add((head * self.o.rows + start) * width);
            product(isa, seen, width, count, ds, 1, ds_row, q_rows, q.stride, dk, width, Store::Add);
            let (n, d_o) = (shape.value_width, self.d_o.row(rows.start)[value..].as_ptr());
            let dv = self.dv.pointer().add((head * self.o.rows + start) * n);
            product(isa, seen, n, count, p, 1, p_row, d_o, self.d_o.stride, dv, n, Store::Add);
        }
    }
}
