//! Transposed keys and values: what turns a row of dot products into a product along lanes.
//!
//! Invariants:
//!   * a panel is `[width, BLOCK]` and belongs to one segment, key-value head and block of keys
//!     counted from the segment's start
//!   * columns behind a segment's end are zero

use super::super::tile::{Left, Out, PANEL, Right, multiply};
use super::super::work::split;
use super::super::{Cx, Isa};
use super::{BLOCK, Inputs};
use crate::buffer::{Buffer, DType, MatMut};
use crate::kernels::{Result, Store};
use std::ops::Range;

// A panel is what `multiply` takes for one.
const _: () = assert!(BLOCK == PANEL);

/// A panel for each key-value head and each BLOCK rows of a segment.
pub(crate) struct Panels {
    data: Buffer,
    /// First panel of each segment.
    first: Vec<usize>,
    per_head: usize,
    sharing: usize,
}

/// Writes the panel of a key-value head and of up to BLOCK rows.
type Write<'a> = dyn Fn(usize, Range<usize>, &mut [f32]) + Sync + 'a;

impl Panels {
    /// Keys: the key part, then the rope part.
    pub fn of_keys(cx: &Cx, inputs: &Inputs<'_>, segments: &[Range<usize>]) -> Result<Panels> {
        let width = inputs.shape.key_width;
        Panels::new(cx, inputs, segments, inputs.shape.query_width(), &|head, rows, panel| {
            let (key, rope) = panel.split_at_mut(width * BLOCK);
            let first = head * inputs.shape.head_stride;
            transpose_rows(rows.clone(), |row| &inputs.kv.row(row)[first..first + width], key);
            transpose_rows(rows, |row| inputs.k_rope.row(row), rope);
        })
    }

    /// Values.
    pub fn of_values(cx: &Cx, inputs: &Inputs<'_>, segments: &[Range<usize>]) -> Result<Panels> {
        let width = inputs.shape.value_width;
        Panels::new(cx, inputs, segments, width, &|head, rows, panel| {
            let first = head * inputs.shape.head_stride + inputs.shape.value_offset;
            transpose_rows(rows, |row| &inputs.kv.row(row)[first..first + width], panel);
        })
    }

    fn new(
        cx: &Cx,
        inputs: &Inputs<'_>,
        segments: &[Range<usize>],
        width: usize,
        write: &Write<'_>,
    ) -> Result<Panels> {
        let mut first = Vec::with_capacity(segments.len());
        let mut rows = Vec::new();
        for segment in segments {
            first.push(rows.len());
            rows.extend(
                segment.clone().step_by(BLOCK).map(|row| row..segment.end.min(row + BLOCK)),
            );
        }
        let sharing = inputs.shape.sharing;
        let count = inputs.shape.heads / sharing * rows.len();
        let mut data = cx.arena.buffer(cx.scratch, DType::F32, count, width * BLOCK)?;
        let panels = data.host_mut::<f32>();
        split(cx, count, 1, width * BLOCK, &|range| {
            for index in range {
                // SAFETY: a panel belongs to one piece.
                let panel = unsafe { panels.shared_row_mut(index) };
                write(index / rows.len(), rows[index % rows.len()].clone(), panel);
            }
        });
        Ok(Panels { data, first, per_head: rows.len(), sharing })
    }

    /// A query head's panels in one segment.
    fn right(&self, segment: usize, head: usize) -> Right {
        let panels = self.data.host::<f32>();
        let first = head / self.sharing * self.per_head + self.first[segment];
        Right { at: panels.row(first).as_ptr(), row: BLOCK, panel: panels.stride }
    }
}

/// `out[i, j] = x[i] . column j` of a segment's panels; out has whole panels of columns.
///
/// # Safety
/// x's address, stride and width are good for as many rows as `out` has.
pub(super) unsafe fn against_panels(
    isa: Isa,
    panels: &Panels,
    (segment, head): (usize, usize),
    (x, stride, width): (*const f32, usize, usize),
    out: &mut MatMut<'_, f32>,
) {
    let right = panels.right(segment, head);
    let left = Left { at: x, row: stride, col: 1 };
    let to = Out { at: out.pointer(), row: out.stride };
    // SAFETY: the caller's promise; the segment's panels hold at least `width` rows and all of
    // out's columns.
    unsafe { multiply(isa, [out.rows, out.cols, width], left, right, to, Store::Set) }
}

/// Writes up to BLOCK rows as the columns of a panel; missing columns become zero.
pub(crate) fn transpose(rows: &[&[f32]], panel: &mut [f32]) {
    let width = panel.len() / BLOCK;
    let whole = width / 4 * 4;
    for first in (0..BLOCK).step_by(4) {
        let Some([a, b, c, d]) = rows.get(first..first + 4) else {
            for column in 0..width {
                for i in first..first + 4 {
                    panel[column * BLOCK + i] = rows.get(i).map_or(0.0, |row| row[column]);
                }
            }
            continue;
        };
        for column in (0..whole).step_by(4) {
            let quad = |row: &[f32]| -> [f32; 4] {
                row[column..column + 4].try_into().expect("four of four")
            };
            let (a, b, c, d) = (quad(a), quad(b), quad(c), quad(d));
            for i in 0..4 {
                let to = (column + i) * BLOCK + first;
                panel[to..to + 4].copy_from_slice(&[a[i], b[i], c[i], d[i]]);
            }
        }
        for column in whole..width {
            let to = column * BLOCK + first;
            panel[to..to + 4].copy_from_slice(&[a[column], b[column], c[column], d[column]]);
        }
    }
}

fn transpose_rows<'a>(rows: Range<usize>, row: impl Fn(usize) -> &'a [f32], panel: &mut [f32]) {
    let empty: [&[f32]; BLOCK] = [&[]; BLOCK];
    let mut slices = empty;
    slices.iter_mut().zip(rows.clone()).for_each(|(slice, index)| *slice = row(index));
    transpose(&slices[..rows.len()], panel);
}
