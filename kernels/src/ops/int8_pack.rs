//! Packing a weight for products of integers.

use super::int8::{ABOVE, Integers, QUAD, QUAD_BYTES, panel_bytes};
use super::quantize::{larger, quotient, to_int8};
use super::tile::PANEL;
use super::{Cx, work};
use crate::arena::Owner;
use crate::buffer::{Buffer, DType, Mat};
use crate::format::WeightFormat;
use crate::kernels::{Pack, Packed, Product, Result};

/// The largest magnitude of a code: the weights are those of the other packings.
const LARGEST: f32 = 127.0;

/// Whether a weight in this format is multiplied as integers. W_UK's absorption, a `Plain` product, is not: its outputs are
/// the weight's columns, and its scales those of its rows.
pub(super) fn is_integer(format: WeightFormat, product: Product) -> bool {
    format == WeightFormat::Int8 && product == Product::Transposed
}

/// Bytes of a panel of so many inputs, its scales among them.
pub(super) fn bytes_of_panel(inputs: usize) -> usize {
    panel_bytes(inputs.div_ceil(QUAD))
}

/// See [`Kernels::pack`](crate::Kernels::pack); the pack's rows lie inside the weight.
pub(super) fn pack(
    cx: &Cx,
    owner: Owner,
    weight: &Buffer,
    pack: Pack,
    version: u64,
) -> Result<Packed> {
    let Pack { product, groups, group_stride, first_row, rows: outputs } = pack;
    let (inputs, panels) = (weight.cols(), outputs.div_ceil(PANEL));
    let quads = inputs.div_ceil(QUAD);
    let mut data = cx.arena.buffer(owner, DType::U8, groups * panels, panel_bytes(quads))?;
    let (from, to) = (weight.host::<f32>(), data.host_mut::<u8>());
    work::split(cx, groups * panels, 1, 8 * inputs * PANEL, &|range| {
        for piece in range {
            let first = first_row + piece / panels * group_stride + piece % panels * PANEL;
            let count = PANEL.min(outputs - piece % panels * PANEL);
            // SAFETY: a panel is written by one piece.
            write(&from, first, count, unsafe { to.shared_row_mut(piece) }, quads);
        }
    });
    let rows = (first_row, group_stride);
    let format = WeightFormat::Int8;
    Ok(Packed { product, groups, inputs, outputs, format, version, data, scales: None, rows })
}

/// `count` rows of the weight from `first` on become the columns of a panel.
fn write(from: &Mat<'_, f32>, first: usize, count: usize, panel: &mut [u8], quads: usize) {
    panel.fill(0);
    let (codes, scales) = panel.split_at_mut(quads * QUAD_BYTES);
    for j in 0..count {
        let row = from.row(first + j);
        let scale = row.iter().fold(0.0, |most, x| larger(most, *x)) / LARGEST;
        for (p, x) in row.iter().enumerate() {
            codes[p / QUAD * QUAD_BYTES + j * QUAD + p % QUAD] =
                to_int8(quotient(*x, scale)).cast_unsigned().wrapping_add(ABOVE);
        }
        scales[4 * j..][..4].copy_from_slice(&scale.to_ne_bytes());
    }
}

/// One group as the right side of a product.
pub(super) fn integers(weight: &Packed, group: usize) -> Integers {
    let quads = weight.inputs.div_ceil(QUAD);
    let first = group * weight.outputs.div_ceil(PANEL) * panel_bytes(quads);
    Integers { at: weight.data.host::<u8>().pointer().wrapping_add(first), quads }
}
