//! Packing: a weight copied into panels of 32 output columns, so that a product reads it in one stream.
//!
//! `[groups][outputs / 32][inputs][32]`, zero padded: of Wᵀ for `Product::Transposed`, of W for
//! `Product::Plain`. Knows nothing of products but this layout.

use super::tile::{PANEL, Right};
use super::{Cx, work};
use crate::arena::Owner;
use crate::buffer::{Buffer, DType, Mat};
use crate::kernels::{Pack, Packed, Product, Result};
use std::ops::Range;

/// Rows of W, and columns, that are turned at a time: both sides stay in the first cache.
const TURN: usize = 64;

/// See [`Kernels::pack`](crate::Kernels::pack).
pub(crate) fn pack(
    cx: &Cx,
    owner: Owner,
    weight: &Buffer,
    pack: Pack,
    version: u64,
) -> Result<Packed> {
    let Pack { product, groups, group_stride, first_row, rows } = pack;
    assert!(groups > 0 && rows > 0 && weight.cols() > 0, "an empty weight is not packed");
    let last = first_row + (groups - 1) * group_stride + rows;
    assert!(last <= weight.rows(), "rows up to {last} of {}", weight.rows());
    let (inputs, outputs) = match product {
        Product::Transposed => (weight.cols(), rows),
        Product::Plain => (rows, weight.cols()),
    };
    let panels = outputs.div_ceil(PANEL);
    let mut data = cx.arena.buffer(owner, DType::F32, groups * panels * inputs, PANEL)?;
    let (from, to) = (weight.host::<f32>(), data.host_mut::<f32>());
    work::split(cx, groups * panels, 1, 4 * inputs * PANEL, &|range| {
        for piece in range {
            let first = first_row + piece / panels * group_stride;
            let columns = piece % panels * PANEL..outputs.min((piece % panels + 1) * PANEL);
            // SAFETY: panel `piece` is written by this piece alone.
            let panel = unsafe { panel_mut(to.pointer(), piece, inputs) };
            match product {
                Product::Transposed => turn(&from, first, columns, panel),
                Product::Plain => copy(&from, first, columns, panel),
            }
        }
    });
    Ok(Packed { product, groups, inputs, outputs, version, data })
}

/// The panels of one group as the right side of a product.
pub(crate) fn panels(weight: &Packed, group: usize) -> Right {
    assert!(group < weight.groups);
    let panel = weight.inputs * PANEL;
    let first = group * weight.outputs.div_ceil(PANEL) * panel;
    Right { at: weight.data.host::<f32>().pointer().wrapping_add(first), row: PANEL, panel }
}

unsafe fn panel_mut<'a>(data: *mut f32, panel: usize, inputs: usize) -> &'a mut [[f32; PANEL]] {
    // SAFETY: the buffer holds `inputs` rows for each panel; the caller owns this one.
    unsafe {
        std::slice::from_raw_parts_mut(data.cast::<[f32; PANEL]>().add(panel * inputs), inputs)
    }
}

/// panel[p][j] = W[first + columns[j]][p].
fn turn(from: &Mat<'_, f32>, first: usize, columns: Range<usize>, panel: &mut [[f32; PANEL]]) {
    for start in (0..panel.len()).step_by(TURN) {
        let end = panel.len().min(start + TURN);
        for (j, column) in columns.clone().enumerate() {
            let row = &from.row(first + column)[start..end];
            for (to, x) in panel[start..end].iter_mut().zip(row) {
                to[j] = *x;
            }
        }
        for to in &mut panel[start..end] {
            to[columns.len()..].fill(0.0);
        }
    }
}

/// panel[p][j] = W[first + p][columns[j]].
fn copy(from: &Mat<'_, f32>, first: usize, columns: Range<usize>, panel: &mut [[f32; PANEL]]) {
    for (p, to) in panel.iter_mut().enumerate() {
        to[..columns.len()].copy_from_slice(&from.row(first + p)[columns.clone()]);
        to[columns.len()..].fill(0.0);
    }
}
