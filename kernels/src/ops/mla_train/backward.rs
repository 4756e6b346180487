//! Gradients of causal attention, by recomputing the probabilities from the log-sum-exp.
//!
//! Per family of segments that share a stem and head, block of rows by block: (1) probabilities again and (2) the gradient of
//! their scores, (3) dq, (4) the head's own part of dk and dv. Then (5) the parts are summed over
//! the heads that share a key, which is all of them for the rope part.
//!
//! Invariants:
//!   * a head's part is one chain over rows ascending, a stem's own and then those that continue it, then
//!     the heads are added in ascending order, so that no thread count changes a bit
//!   * the parts are as large as dq and the output together, whatever the segments' lengths

use super::super::Cx;
use super::super::lanes::{self, Lanes, OnLanes};
use super::super::tile::{Left, Next, Out, PANEL, Right, multiply};
use super::super::work::split;
use super::panels::{Panels, against_panels};
use super::segments::{self, Segment};
use super::softmax::RowGradient;
use super::{BLOCK, Inputs, ROWS, attempt};
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
        assert_eq!(
            (gradient.rows(), gradient.cols()),
            (of.rows(), of.cols()),
            "attention: shape of a gradient"
        );
    }
    let (heads, rows) = (shape.heads, q.rows());
    let segments = segments::read(start, rows, kv.rows());
    let families = segments::families(&segments);
    let keys = Panels::of_keys(cx, &inputs, &segments)?;
    let values = if shape.value_offset == 0 && shape.value_width <= shape.key_width {
        None
    } else {
        Some(Panels::of_values(cx, &inputs, &segments)?)
    };
    let mut dk = cx.arena.buffer(cx.scratch, DType::F32, heads * rows, shape.query_width())?;
    let mut dv = cx.arena.buffer(cx.scratch, DType::F32, heads * rows, shape.value_width)?;
    let means = means(cx, shape, o, d_o)?;
    let job = Backward {
        inputs: &inputs,
        segments: &segments,
        keys: &keys,
        values: values.as_ref().unwrap_or(&keys),
        means: means.host(),
        lse: lse.host(),
        d_o: d_o.host(),
        dq: dq.host_mut(),
        dk: dk.host_mut(),
        dv: dv.host_mut(),
    };
    let cost = 3 * inputs.cost(&segments) / (families.len() * heads).max(1);
    attempt(cx, families.len() * heads, cost, &|piece| {
        families[piece / heads].iter().try_for_each(|index| job.segment(cx, *index, piece % heads))
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

/// Each row's and head's output times its gradient, `[T, H]`: both are read here in one stream.
fn means(cx: &Cx, shape: &AttentionShape, o: &Buffer, d_o: &Buffer) -> Result<Buffer> {
    let mut means = cx.arena.buffer(cx.scratch, DType::F32, o.rows(), shape.heads)?;
    let (o, d_o, to) = (o.host::<f32>(), d_o.host::<f32>(), means.host_mut::<f32>());
    split(cx, o.rows, 1, 2 * o.cols, &|range| {
        for row in range {
            // SAFETY: a row belongs to one piece; `isa` was detected.
            unsafe {
                let (o, d_o, means) = (o.row(row), d_o.row(row), to.shared_row_mut(row));
                cx.isa.run(Means { o, d_o, means });
            }
        }
    });
    Ok(means)
}

struct Means<'a> {
    o: &'a [f32],
    d_o: &'a [f32],
    means: &'a mut [f32],
}

impl OnLanes for Means<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.o.len() / self.means.len();
        let heads = self.o.chunks_exact(width).zip(self.d_o.chunks_exact(width));
        for (mean, (o, d_o)) in self.means.iter_mut().zip(heads) {
            // SAFETY: we are inside `L::call`.
            *mean = unsafe { lanes::dot::<L>(o, d_o) };
        }
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// What the backward pass of all segments and heads reads and writes.
struct Backward<'a> {
    inputs: &'a Inputs<'a>,
    segments: &'a [Segment],
    keys: &'a Panels,
    values: &'a Panels,
    means: Mat<'a, f32>,
    lse: Mat<'a, f32>,
    d_o: Mat<'a, f32>,
    dq: MatMut<'a, f32>,
    /// Each head's gradient of its keys: row `head * T + t`.
    dk: MatMut<'a, f32>,
    /// Each head's gradient of its values.
    dv: MatMut<'a, f32>,
}

impl Backward<'_> {
    /// Gradients of one segment and head, added to those of its stem's keys.
    fn segment(&self, cx: &Cx, index: usize, head: usize) -> Result<()> {
        let segment = &self.segments[index];
        let width = segment.seen(segment.rows.end - 1).next_multiple_of(BLOCK);
        let mut p = cx.arena.buffer(cx.scratch, DType::F32, ROWS, width)?;
        let mut ds = cx.arena.buffer(cx.scratch, DType::F32, ROWS, width)?;
        for row in segment.rows.clone() {
            // SAFETY: one piece writes a segment's and head's rows of dk and dv.
            unsafe {
                self.dk.shared_row_mut(head * self.lse.rows + row).fill(0.0);
                self.dv.shared_row_mut(head * self.lse.rows + row).fill(0.0);
            }
        }
        for first in segment.rows.clone().step_by(ROWS) {
            let rows = first..segment.rows.end.min(first + ROWS);
            let columns = 0..segment.seen(rows.end - 1).next_multiple_of(BLOCK);
            let (mut p, mut ds) = (p.rows_of_mut(0..rows.len()), ds.rows_of_mut(0..rows.len()));
            let (mut p, mut ds) = (p.cols_of_mut(columns.clone()), ds.cols_of_mut(columns));
            let (mut p, mut ds) = (p.host_mut(), ds.host_mut());
            self.probabilities((index, head), &rows, &mut p, &mut ds);
            // SAFETY: one piece writes a family's and head's parts of dq, dk and dv.
            unsafe { self.add_block(head, segment, &rows, &p, &ds) };
        }
        Ok(())
    }

    /// The block's probabilities, and the gradient of its unscaled scores.
    fn probabilities(
        &self,
        (index, head): (usize, usize),
        rows: &Range<usize>,
        p: &mut MatMut<'_, f32>,
        ds: &mut MatMut<'_, f32>,
    ) {
        let shape = self.inputs.shape;
        self.inputs.scores(self.keys, (index, head), rows, p);
        let d_o = self.d_o.row(rows.start)[head * shape.value_width..].as_ptr();
        // SAFETY: a head's columns lie in d_o.
        unsafe {
            let x = (d_o, self.d_o.stride, shape.value_width);
            against_panels(self.inputs.isa, self.values, (index, head), x, ds);
        }
        for (i, row) in rows.clone().enumerate() {
            let job = RowGradient {
                p: p.row_mut(i),
                ds: ds.row_mut(i),
                seen: self.segments[index].seen(row),
                scale: shape.scale as f32,
                lse: self.lse.row(row)[head],
                mean: self.means.row(row)[head],
            };
            // SAFETY: `isa` was detected.
            unsafe { self.inputs.isa.run(job) };
        }
    }

    /// Sets the block's dq and adds the block to the head's dk and dv.
    ///
    /// # Safety
    /// No other thread works on this head of this segment's family.
    unsafe fn add_block(
        &self,
        head: usize,
        segment: &Segment,
        rows: &Range<usize>,
        p: &MatMut<'_, f32>,
        ds: &MatMut<'_, f32>,
    ) {
        let Inputs { isa, shape, q, kv, k_rope } = self.inputs;
        let (isa, width, count) = (*isa, shape.query_width(), rows.len());
        let first = head / shape.sharing * shape.head_stride;
        let (query, value) = (head * width, head * shape.value_width);
        // From the column of a key on.
        let across = |m: &MatMut<'_, f32>, key: usize| Left {
            at: m.pointer().wrapping_add(key),
            row: m.stride,
            col: 1,
        };
        let down = |m: &MatMut<'_, f32>, key: usize| Left {
            at: m.pointer().wrapping_add(key),
            row: 1,
            col: m.stride,
        };
        let rows_of = |m: &Mat<'_, f32>, row: usize, col: usize| Right {
            at: m.row(row)[col..].as_ptr(),
            row: m.stride,
            panel: PANEL,
            next: Next::Nothing,
        };
        let out = |m: &MatMut<'_, f32>, row: usize, col: usize| Out {
            at: m.pointer().wrapping_add(row * m.stride + col),
            row: m.stride,
        };
        for (key, seen) in segment.stretches(segment.seen(rows.end - 1)) {
            let (start, seen) = (seen.start, seen.len());
            let (part, store) =
                (head * self.lse.rows + start, if key == 0 { Store::Set } else { Store::Add });
            // SAFETY: all blocks lie inside their matrices; the outputs are this piece's own.
            unsafe {
                let keys = [count, shape.key_width, seen];
                let to = out(&self.dq, rows.start, query);
                multiply(isa, keys, across(ds, key), rows_of(kv, start, first), to, store);
                let ropes = [count, shape.rope_width, seen];
                let to = out(&self.dq, rows.start, query + shape.key_width);
                multiply(isa, ropes, across(ds, key), rows_of(k_rope, start, 0), to, store);
                let (queries, to) = (rows_of(q, rows.start, query), out(&self.dk, part, 0));
                multiply(isa, [seen, width, count], down(ds, key), queries, to, Store::Add);
                let (d_o, to) = (rows_of(&self.d_o, rows.start, value), out(&self.dv, part, 0));
                multiply(isa, [seen, shape.value_width, count], down(p, key), d_o, to, Store::Add);
            }
        }
    }
}
