//! Products with a weight that is kept in codes: a tile of panels is unpacked to the stack, then multiplied.
//!
//! The tile goes through the product's own micro-kernel, so that the result is that of f32 panels of the same
//! values, bit for bit, for any rows, blocks and threads.

use super::lanes::{Isa, Lanes, OnLanes};
use super::quantize::{from_bf16, from_e4m3};
use super::tile::{
    BLOCK_DEPTH, BLOCK_ROWS, Bring, Left, Next, Out, PANEL, Right, Stack, adds, columns, depths,
};
use crate::format::WeightFormat;
use crate::kernels::{Product, Store};

/// Floats of an unpacked tile: 32 KiB, the first cache.
const TILE: usize = PANEL * BLOCK_DEPTH;
/// Panels side by side when there are few rows: these want wide tiles.
const WIDE: usize = 4;
/// Rows that count as few.
const FEW_ROWS: usize = 3;

/// The right side of a product in codes: panels of one group, from a column on.
#[derive(Clone, Copy)]
pub(crate) struct Codes {
    pub format: WeightFormat,
    pub product: Product,
    /// The group's first panel.
    pub at: *const u8,
    /// Steps of a panel: the product's inputs.
    pub inputs: usize,
    /// Columns of the product.
    pub outputs: usize,
    /// Panel that counts as the first.
    pub panel: usize,
    /// Scales of the whole weight, in its own rows and columns.
    pub scales: Scales,
}

/// Where the scales of a weight's blocks lie.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    /// Null for a format without scales.
    pub at: *const f32,
    /// Scales of a row of blocks.
    pub stride: usize,
    /// Rows and columns of a block.
    pub block: (usize, usize),
    /// Row of the weight that is the group's first.
    pub first_row: usize,
}

impl Codes {
    /// The same from column `j` on, a multiple of [`PANEL`].
    pub fn at_column(self, j: usize) -> Codes {
        debug_assert!(j.is_multiple_of(PANEL));
        Codes { panel: self.panel + j / PANEL, ..self }
    }

    /// Steps `first..end` of a panel as floats at `to`.
    ///
    /// # Safety
    /// The panel has these steps, and `to` is good for a row of [`PANEL`] floats for each.
    #[inline(always)]
    unsafe fn unpack(&self, panel: usize, first: usize, end: usize, to: *mut f32) {
        let panel = self.panel + panel;
        let mut step = first;
        while step < end {
            let mut scales = [1.0; PANEL];
            // SAFETY: the caller's promise; codes and floats of a step lie side by side.
            unsafe {
                let next = self.scales_of(panel, step, &mut scales).min(end);
                let (codes, to) =
                    ((panel * self.inputs + step) * PANEL, to.add((step - first) * PANEL));
                let steps = next - step;
                match self.format {
                    WeightFormat::F32 => unreachable!("floats are no codes"),
                    WeightFormat::Bf16 => {
                        let codes = self.at.cast::<u16>().add(codes);
                        decode(codes, steps, to, |code, _| from_bf16(code), &scales);
                    }
                    WeightFormat::Fp8Channel | WeightFormat::Fp8Block => {
                        let codes = self.at.add(codes);
                        decode(codes, steps, to, |code, scale| from_e4m3(code) * scale, &scales);
                    }
                    WeightFormat::Int8 => {
                        let codes = self.at.cast::<i8>().add(codes);
                        decode(codes, steps, to, |code, scale| f32::from(code) * scale, &scales);
                    }
                }
                step = next;
            }
        }
    }

    /// Scales of a panel's columns at `step`; returns the step where they change.
    ///
    /// # Safety
    /// The panel has this step.
    #[inline(always)]
    unsafe fn scales_of(&self, panel: usize, step: usize, to: &mut [f32; PANEL]) -> usize {
        let Scales { at, stride, block: (rows, cols), first_row } = self.scales;
        if at.is_null() {
            return usize::MAX;
        }
        let count = PANEL.min(self.outputs - panel * PANEL);
        // SAFETY: the weight has a scale for each of its rows and columns.
        unsafe {
            match self.product {
                Product::Transposed => {
                    for (j, scale) in to[..count].iter_mut().enumerate() {
                        let row = (first_row + panel * PANEL + j) / rows;
                        *scale = *at.add(row * stride + step / cols);
                    }
                    (step / cols + 1) * cols
                }
                Product::Plain => {
                    let row = (first_row + step) / rows;
                    for (j, scale) in to[..count].iter_mut().enumerate() {
                        *scale = *at.add(row * stride + (panel * PANEL + j) / cols);
                    }
                    (row + 1) * rows - first_row
                }
            }
        }
    }
}

/// Rows of codes to rows of floats.
///
/// # Safety
/// Both addresses are good for `steps` rows of [`PANEL`].
#[inline(always)]
unsafe fn decode<T: Copy>(
    codes: *const T,
    steps: usize,
    to: *mut f32,
    value: impl Fn(T, f32) -> f32,
    scales: &[f32; PANEL],
) {
    for p in 0..steps {
        // SAFETY: the caller's promise.
        unsafe {
            // Copies, which cannot lie over each other: the compiler turns the loop into vectors.
            let codes = codes.add(p * PANEL).cast::<[T; PANEL]>().read_unaligned();
            let mut values = [0.0; PANEL];
            for j in 0..PANEL {
                values[j] = value(codes[j], scales[j]);
            }
            to.add(p * PANEL).cast::<[f32; PANEL]>().write_unaligned(values);
        }
    }
}

/// C[m, n] (=|+=) A[m, k] B[k, n] with B in codes; the rows of A are contiguous.
///
/// # Safety
/// The addresses are good for what the shapes say, and C overlaps neither A nor B.
pub(crate) unsafe fn multiply_codes(
    isa: Isa,
    [m, n, k]: [usize; 3],
    left: Left,
    codes: Codes,
    out: Out,
    store: Store,
) {
    assert!(left.col == 1 && k > 0, "activations are rows of floats");
    if m > 0 && n > 0 {
        // SAFETY: the caller's promise; `isa` was detected.
        unsafe { isa.run(Unpacking { shape: [m, n, k], left, codes, out, store }) }
    }
}

struct Unpacking {
    shape: [usize; 3],
    left: Left,
    codes: Codes,
    out: Out,
    store: Store,
}

impl OnLanes for Unpacking {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Unpacking { shape: [m, n, k], left, codes, out, store } = self;
        let panels = if m <= FEW_ROWS { WIDE } else { 1 };
        let mut tile = Stack::<TILE>::new();
        let tile: *mut f32 = tile.as_mut_ptr();
        // SAFETY: every block lies inside the operands, and a tile of `panels` fits the stack array.
        unsafe {
            for row in (0..m).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(m - row);
                for (p, depth) in depths(k, BLOCK_DEPTH / panels) {
                    let left = Left { at: left.at.add(row * left.row + p), ..left };
                    for j in (0..n).step_by(panels * PANEL) {
                        let width = (panels * PANEL).min(n - j);
                        for panel in 0..width.div_ceil(PANEL) {
                            let to = tile.add(panel * depth * PANEL);
                            codes.unpack(j / PANEL + panel, p, p + depth, to);
                        }
                        let right = Right {
                            at: tile,
                            row: PANEL,
                            panel: depth * PANEL,
                            next: Next::Nothing,
                        };
                        let out = Out { at: out.at.add(row * out.row + j), ..out };
                        columns::<L>(
                            [rows, width, depth],
                            left,
                            right,
                            out,
                            adds(store, p),
                            Bring::Nothing,
                        );
                    }
                }
            }
        }
    }
}
