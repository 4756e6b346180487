//! Transposed keys and values: what turns a row of dot products into a product along lanes.
//!
//! Invariants:
//!   * a panel is `[width, BLOCK]` and belongs to one segment, key-value head and block of keys
//!     counted from the sequence's start; whole panels of a stem are its own segment's
//!   * columns behind a segment's end are zero

use super::super::tile::{Left, Next, Out, PANEL, Right, multiply};
use super::super::transpose::transpose;
use super::super::work::split;
use super::super::{Cx, Isa};
use super::{BLOCK, Inputs, Segment};
use crate::buffer::{Buffer, DType, MatMut};
use crate::kernels::{Result, Store};
use std::ops::Range;

// A panel is what `multiply` takes for one.
const _: () = assert!(BLOCK == PANEL);

/// Operations of an element, roughly: it comes from and goes to a far cache.
const COST: usize = 64;

/// A panel for each key-value head and each BLOCK rows of a segment.
pub(crate) struct Panels {
    data: Buffer,
    /// Where each segment's panels lie.
    places: Vec<Place>,
    /// Key-value heads, whose panels of the same rows are neighbours: made by the thread that made the rows.
    heads: usize,
    sharing: usize,
}

/// Panels of a segment.
#[derive(Clone, Copy)]
struct Place {
    /// First panel of the stem, and how many of its panels are whole.
    stem: usize,
    shared: usize,
    /// First panel after those.
    own: usize,
}

/// Writes the panel of a key-value head and of up to BLOCK rows.
type Write<'a> = dyn Fn(usize, &[usize], &mut [f32]) + Sync + 'a;

impl Panels {
    /// Keys: the key part, then the rope part.
    pub fn of_keys(cx: &Cx, inputs: &Inputs<'_>, segments: &[Segment]) -> Result<Panels> {
        let width = inputs.shape.key_width;
        Panels::new(cx, inputs, segments, inputs.shape.query_width(), &|head, rows, panel| {
            let (key, rope) = panel.split_at_mut(width * BLOCK);
            let first = head * inputs.shape.head_stride;
            transpose_rows(cx.isa, rows, |row| &inputs.kv.row(row)[first..first + width], key);
            transpose_rows(cx.isa, rows, |row| inputs.k_rope.row(row), rope);
        })
    }

    /// Values.
    pub fn of_values(cx: &Cx, inputs: &Inputs<'_>, segments: &[Segment]) -> Result<Panels> {
        let width = inputs.shape.value_width;
        Panels::new(cx, inputs, segments, width, &|head, rows, panel| {
            let first = head * inputs.shape.head_stride + inputs.shape.value_offset;
            transpose_rows(cx.isa, rows, |row| &inputs.kv.row(row)[first..first + width], panel);
        })
    }

    fn new(
        cx: &Cx,
        inputs: &Inputs<'_>,
        segments: &[Segment],
        width: usize,
        write: &Write<'_>,
    ) -> Result<Panels> {
        let mut places: Vec<Place> = Vec::with_capacity(segments.len());
        // The rows of all panels, and the part of them that each panel has.
        let most = segments.iter().map(|segment| segment.stem.len() + segment.rows.len()).sum();
        let mut rows: Vec<usize> = Vec::with_capacity(most);
        let mut parts: Vec<Range<usize>> = Vec::with_capacity(most / BLOCK + segments.len());
        for segment in segments {
            let (own, shared) = (parts.len(), segment.stem.len() / BLOCK);
            let stem = segment.stem_index.map_or(own, |index| places[index].own);
            places.push(Place { stem, shared, own });
            let first = rows.len();
            rows.extend(segment.keys().skip(shared * BLOCK));
            let end = rows.len();
            parts.extend((first..end).step_by(BLOCK).map(|row| row..end.min(row + BLOCK)));
        }
        let sharing = inputs.shape.sharing;
        let heads = inputs.shape.heads / sharing;
        let count = heads * parts.len();
        let mut data = cx.arena.buffer(cx.scratch, DType::F32, count, width * BLOCK)?;
        let panels = data.host_mut::<f32>();
        split(cx, count, heads, COST * width * BLOCK, &|range| {
            for index in range {
                // SAFETY: a panel belongs to one piece.
                let panel = unsafe { panels.shared_row_mut(index) };
                write(index % heads, &rows[parts[index / heads].clone()], panel);
            }
        });
        Ok(Panels { data, places, heads, sharing })
    }

    /// A query head's panels in one segment: those of the stem, how many they are, and its own.
    fn right(&self, segment: usize, head: usize) -> (Right, usize, Right) {
        let panels = self.data.host::<f32>();
        let at = |panel: usize| {
            let row = panels.row(panel * self.heads + head / self.sharing);
            let panel = self.heads * panels.stride;
            Right { at: row.as_ptr(), row: BLOCK, panel, next: Next::Nothing }
        };
        let Place { stem, shared, own } = self.places[segment];
        (at(stem), shared, at(own))
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
    let (stem, shared, own) = panels.right(segment, head);
    let left = Left { at: x, row: stride, col: 1 };
    let to = Out { at: out.pointer(), row: out.stride };
    let columns = shared * BLOCK;
    // SAFETY: the caller's promise; the segment's panels hold at least `width` rows and all of
    // out's columns, of which every row sees at least the stem's.
    unsafe {
        multiply(isa, [out.rows, columns, width], left, stem, to, Store::Set);
        let rest = [out.rows, out.cols - columns, width];
        multiply(isa, rest, left, own, to.from(0, columns), Store::Set);
    }
}

fn transpose_rows<'a>(
    isa: Isa,
    rows: &[usize],
    row: impl Fn(usize) -> &'a [f32],
    panel: &mut [f32],
) {
    let empty: [&[f32]; BLOCK] = [&[]; BLOCK];
    let mut slices = empty;
    slices.iter_mut().zip(rows).for_each(|(slice, index)| *slice = row(*index));
    transpose(isa, &slices[..rows.len()], panel);
}
