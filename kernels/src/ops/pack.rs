//! Packing: a weight copied into panels of 32 output columns, so that a product reads it in one stream.
//!
//! `[groups][outputs / 32][inputs][32]`, zero padded: of Wᵀ for `Product::Transposed`, of W for
//! `Product::Plain`; the elements are floats, or codes whose scales lie apart. Knows nothing of products but this
//! layout. A weight for products of integers lies as `int8_pack` says.

use super::quantize::{quotient, scales, to_bf16, to_e4m3, to_int8};
use super::tile::{Next, PANEL, Right};
use super::transpose::transpose;
use super::unpack::{Codes, Scales};
use super::work::Side;
use super::{Cx, Isa, int8_pack, work};
use crate::arena::Owner;
use crate::buffer::{Buffer, DType, Mat};
use crate::format::WeightFormat;
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
    format: WeightFormat,
    version: u64,
) -> Result<Packed> {
    let Pack { product, groups, group_stride, first_row, rows } = pack;
    assert!(groups > 0 && rows > 0 && weight.cols() > 0, "an empty weight is not packed");
    let last = first_row + (groups - 1) * group_stride + rows;
    assert!(last <= weight.rows(), "rows up to {last} of {}", weight.rows());
    let (inputs, outputs) = widths(weight.cols(), pack);
    if int8_pack::is_integer(format, product) {
        return int8_pack::pack(cx, owner, weight, pack, version);
    }
    let (dtype, count, bytes) = shape(weight.cols(), pack, format);
    let mut data = cx.arena.buffer(owner, dtype, count, bytes / dtype.size())?;
    let scales = scales(cx, owner, weight, format)?;
    let job = Panels { weight: weight.host(), pack, inputs, outputs };
    match (format, &scales) {
        (WeightFormat::F32, _) => {
            job.write_floats(cx, data.host_mut::<f32>().pointer());
        }
        (WeightFormat::Bf16, _) => {
            job.write(cx, data.host_mut::<u8>().pointer().cast::<u16>(), |_, _, x| to_bf16(x));
        }
        (WeightFormat::Int8, Some(scales)) => {
            let scales = scales.host::<f32>();
            job.write(cx, data.host_mut::<u8>().pointer().cast::<i8>(), |row, _, x| {
                to_int8(quotient(x, scales.row(row)[0]))
            });
        }
        (WeightFormat::Fp8Channel | WeightFormat::Fp8Block, Some(scales)) => {
            let scales = scales.host::<f32>();
            let (rows, cols) = format.block(weight.cols()).expect("the format has scales");
            job.write(cx, data.host_mut::<u8>().pointer(), |row, col, x| {
                to_e4m3(quotient(x, scales.row(row / rows)[col / cols]))
            });
        }
        _ => unreachable!("a format of 8 bits has scales"),
    }
    let rows = (first_row, group_stride);
    Ok(Packed { product, groups, inputs, outputs, format, version, data, scales, rows })
}

/// Inputs and outputs of the product that rows of so many columns are packed for.
fn widths(cols: usize, pack: Pack) -> (usize, usize) {
    match pack.product {
        Product::Transposed => (cols, pack.rows),
        Product::Plain => (pack.rows, cols),
    }
}

/// What a weight of so many columns is packed into: type of its codes, rows of them, and bytes of a row.
pub(crate) fn shape(cols: usize, pack: Pack, format: WeightFormat) -> (DType, usize, usize) {
    let (inputs, outputs) = widths(cols, pack);
    let panels = pack.groups * outputs.div_ceil(PANEL);
    if int8_pack::is_integer(format, pack.product) {
        return (DType::U8, panels, int8_pack::bytes_of_panel(inputs));
    }
    let dtype = if format == WeightFormat::F32 { DType::F32 } else { DType::U8 };
    (dtype, panels * inputs, PANEL * format.code_bytes())
}

/// Rows and columns of the scales beside it, if it has any.
pub(crate) fn scales_shape(
    rows: usize,
    cols: usize,
    pack: Pack,
    format: WeightFormat,
) -> Option<(usize, usize)> {
    let is_beside = !int8_pack::is_integer(format, pack.product);
    let (block_rows, block_cols) = format.block(cols).filter(|_| is_beside)?;
    Some((rows.div_ceil(block_rows), cols.div_ceil(block_cols)))
}

/// One group as the right side of a product.
pub(crate) fn panels(weight: &Packed, group: usize) -> Side {
    assert!(group < weight.groups);
    if int8_pack::is_integer(weight.format, weight.product) {
        return Side::Integers(int8_pack::integers(weight, group));
    }
    let panel = weight.inputs * PANEL;
    let first = group * weight.outputs.div_ceil(PANEL) * panel;
    if weight.format == WeightFormat::F32 {
        let at = weight.data.host::<f32>().pointer().wrapping_add(first);
        return Side::Floats(Right { at, row: PANEL, panel, next: Next::Behind });
    }
    let cols = match weight.product {
        Product::Transposed => weight.inputs,
        Product::Plain => weight.outputs,
    };
    let (at, stride) = match &weight.scales {
        Some(scales) => (scales.host::<f32>().pointer(), scales.stride()),
        None => (std::ptr::null(), 0),
    };
    let block = weight.format.block(cols).unwrap_or((1, cols));
    let first_row = weight.rows.0 + group * weight.rows.1;
    Side::Codes(Codes {
        format: weight.format,
        product: weight.product,
        at: weight.data.host::<u8>().pointer().wrapping_add(first * weight.format.code_bytes()),
        inputs: weight.inputs,
        outputs: weight.outputs,
        panel: 0,
        scales: Scales { at, stride, block, first_row },
    })
}

/// A weight on its way into panels.
struct Panels<'a> {
    weight: Mat<'a, f32>,
    pack: Pack,
    inputs: usize,
    outputs: usize,
}

/// An address that several threads write to, each its own panels.
struct Shared<T>(*mut T);

// SAFETY: see the type.
unsafe impl<T> Sync for Shared<T> {}

/// What writes a panel: first row of its group, its columns, the panel.
type OnPanel<'a, T> = &'a (dyn Fn(usize, Range<usize>, &mut [[T; PANEL]]) + Sync);

impl Panels<'_> {
    /// Writes all panels to `data`, which has room for them; `keep` makes an element of (row, column, number).
    fn write<T: Copy + Default>(
        &self,
        cx: &Cx,
        data: *mut T,
        keep: impl Fn(usize, usize, f32) -> T + Sync,
    ) {
        self.each(cx, data, &|first, columns, panel| match self.pack.product {
            Product::Transposed => turn(&self.weight, first, columns, panel, &keep),
            Product::Plain => copy(&self.weight, first, columns, panel, &keep),
        });
    }

    /// The same of the numbers as they are: training does it at every step.
    fn write_floats(&self, cx: &Cx, data: *mut f32) {
        self.each(cx, data, &|first, columns, panel| match self.pack.product {
            Product::Transposed => turn_floats(cx.isa, &self.weight, first, columns, panel),
            Product::Plain => copy(&self.weight, first, columns, panel, &|_, _, x| x),
        });
    }

    /// Calls `call` for every panel of `data`.
    fn each<T: Copy + Default>(&self, cx: &Cx, data: *mut T, call: OnPanel<'_, T>) {
        let (inputs, panels, data) =
            (self.inputs, self.outputs.div_ceil(PANEL), Shared(data.cast::<[T; PANEL]>()));
        let Pack { groups, group_stride, first_row, .. } = self.pack;
        let data = &data;
        work::split(cx, groups * panels, 1, 4 * inputs * PANEL, &|range| {
            for piece in range {
                let start = piece % panels * PANEL;
                // SAFETY: the data holds `inputs` rows for each panel; `piece` is written by this piece alone.
                let panel =
                    unsafe { std::slice::from_raw_parts_mut(data.0.add(piece * inputs), inputs) };
                let first = first_row + piece / panels * group_stride;
                call(first, start..self.outputs.min(start + PANEL), panel);
            }
        });
    }
}

/// [`turn`] of the numbers as they are, by vectors.
fn turn_floats(
    isa: Isa,
    from: &Mat<'_, f32>,
    first: usize,
    columns: Range<usize>,
    panel: &mut [[f32; PANEL]],
) {
    for (block, to) in panel.chunks_mut(TURN).enumerate() {
        let part = block * TURN..block * TURN + to.len();
        let mut rows: [&[f32]; PANEL] = [&[]; PANEL];
        for (row, column) in rows.iter_mut().zip(columns.clone()) {
            *row = &from.row(first + column)[part.clone()];
        }
        transpose(isa, &rows[..columns.len()], to.as_flattened_mut());
    }
}

/// panel[p][j] = W[first + columns[j]][p].
fn turn<T: Copy + Default>(
    from: &Mat<'_, f32>,
    first: usize,
    columns: Range<usize>,
    panel: &mut [[T; PANEL]],
    keep: &impl Fn(usize, usize, f32) -> T,
) {
    for start in (0..panel.len()).step_by(TURN) {
        let end = panel.len().min(start + TURN);
        for (j, column) in columns.clone().enumerate() {
            let row = &from.row(first + column)[start..end];
            for (i, (to, x)) in panel[start..end].iter_mut().zip(row).enumerate() {
                to[j] = keep(first + column, start + i, *x);
            }
        }
        for to in &mut panel[start..end] {
            to[columns.len()..].fill(T::default());
        }
    }
}

/// panel[p][j] = W[first + p][columns[j]].
fn copy<T: Copy + Default>(
    from: &Mat<'_, f32>,
    first: usize,
    columns: Range<usize>,
    panel: &mut [[T; PANEL]],
    keep: &impl Fn(usize, usize, f32) -> T,
) {
    for (p, to) in panel.iter_mut().enumerate() {
        let row = &from.row(first + p)[columns.clone()];
        for (i, (to, x)) in to.iter_mut().zip(row).enumerate() {
            *to = keep(first + p, columns.start + i, *x);
        }
        to[columns.len()..].fill(T::default());
    }
}
