//! Products of 8-bit integers: rows of activations, quantised as they come, with a weight packed in `Int8`.
//!
//! y[i][j] = f32(Σ_p a[i][p] w[p][j]) * (row scale * column scale), the last rounding steps in this order; then y is
//! set or added to. The sum is one of integers and exact, so that every instruction set, tile and split has its bits.
//!
//! Codes: a weight's go to ±127 with a scale per output column, an activation's to ±1023 with one per row and product, so
//! that activations add nothing to the error of the weights. Weights rest as bytes and are widened on the way: `vpmaddwd`
//! multiplies 16 bits. `vpmaddubsw`, which multiplies bytes, saturates unless both codes end at about ±90; it was a quarter
//! faster in the product and six times as far from f32 in the model's distribution.
//!
//! A number that is not finite makes the scale of its row or column NaN or infinite, and shows as NaN in every product of it.

use super::Cx;
#[cfg(target_arch = "x86_64")]
use super::int8_tile::{Avx2, Vnni256, Vnni512};
use super::int8_tile::{Block, Dots, Plain};
use super::lanes::{Isa, Lanes, OnLanes};
use super::tile::PANEL;
use super::work::{Side, Term, each_block, split};
use crate::kernels::Store;
use std::cell::RefCell;

/// Largest magnitude of an activation's code.
pub(super) const ROW_LARGEST: f32 = 1023.0;
/// Most inputs of a product of integers: 127 * 1023 * 2^14 is within 32 bits.
pub(crate) const MOST_INPUTS: usize = 1 << 14;
/// Products that one instruction adds.
pub(super) const PAIR: usize = 2;
/// Bytes of two steps of a panel.
pub(super) const PAIR_BYTES: usize = PAIR * PANEL;
/// About how much faster products of integers are than the floats that pieces are measured in.
const SPEED_UP: usize = 2;
/// Below this a row counts as zeros: its inverse scale would not be a number.
const LEAST: f32 = 1e-36;
/// Added to a small number it leaves the nearest integer, ties to even, in the low bits.
const ROUNDING: f32 = 12_582_912.0;

/// The right side of a product of integers: panels of one group, from a column on. A panel is `[k / 2][32][2]` codes, then
/// the columns' scales.
#[derive(Clone, Copy)]
pub(crate) struct Integers {
    pub at: *const u8,
    /// Steps of two inputs.
    pub pairs: usize,
}

/// Bytes of a panel of so many pairs.
pub(super) fn panel_bytes(pairs: usize) -> usize {
    pairs * PAIR_BYTES + 4 * PANEL
}

impl Integers {
    /// The same from column `j` on, a multiple of [`PANEL`].
    pub fn at_column(self, j: usize) -> Integers {
        debug_assert!(j.is_multiple_of(PANEL));
        Integers { at: self.at.wrapping_add(j / PANEL * panel_bytes(self.pairs)), ..self }
    }
}

/// The scale of a row, and what a number of it is multiplied by to become a code. Both are 0 if all numbers are about 0; the
/// scale is NaN if one of them is not finite.
#[inline(always)]
fn scale(row: &[f32]) -> (f32, f32) {
    // As integers, magnitudes are ordered as they are as numbers, and what is not finite comes last.
    let bits = row.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff));
    let most = f32::from_bits(bits);
    if !most.is_finite() {
        (f32::NAN, 0.0)
    } else if most < LEAST {
        (0.0, 0.0)
    } else {
        (most / ROW_LARGEST, ROW_LARGEST / most)
    }
}

/// The code of `x`.
#[inline(always)]
fn code(x: f32, inverse: f32) -> i16 {
    (x * inverse + ROUNDING).to_bits() as i16
}

/// A row of activations becomes `pairs` pairs of codes and the row's scale.
struct Quantise {
    row: *const f32,
    inputs: usize,
    pairs: usize,
    to: *mut i16,
}

impl OnLanes for Quantise {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the row has `inputs` numbers, and `to` room for what `row_codes` counts.
        let (row, to) = unsafe {
            (
                std::slice::from_raw_parts(self.row, self.inputs),
                std::slice::from_raw_parts_mut(self.to, row_codes(self.pairs)),
            )
        };
        let (scale, inverse) = scale(row);
        let (codes, last) = to.split_at_mut(self.pairs * PAIR);
        for (to, x) in codes.iter_mut().zip(row) {
            *to = code(*x, inverse);
        }
        codes[self.inputs..].fill(0);
        let bits = scale.to_bits();
        last.copy_from_slice(&[bits as i16, (bits >> 16) as i16]);
    }
}

/// Places of a row of codes and of its scale, whose low half comes first.
pub(super) fn row_codes(pairs: usize) -> usize {
    pairs * PAIR + 2
}

thread_local! {
    /// Codes of the activations of the product that this thread began. It grows to the largest, then nothing allocates.
    static ROWS: RefCell<Vec<i16>> = const { RefCell::new(Vec::new()) };
}

/// A term and where its rows of codes begin.
struct Quantised<'a> {
    term: &'a Term,
    right: Integers,
    at: usize,
}

// SAFETY: addresses; whoever reads or writes there says why it may.
unsafe impl Sync for Quantised<'_> {}

/// As [`products`](super::work::products), for terms whose right sides are all [`Integers`].
///
/// # Safety
/// As there.
pub(super) unsafe fn products(cx: &Cx, terms: &[Term], store: Store) {
    let mut places = 0;
    let quantised: Vec<Quantised<'_>> = terms
        .iter()
        .map(|term| {
            let Side::Integers(right) = term.right else { unreachable!("checked by the caller") };
            assert!(term.left.col == 1, "activations are rows of floats");
            let at = places;
            places += term.shape[0] * row_codes(right.pairs);
            Quantised { term, right, at }
        })
        .collect();
    let mut rows = ROWS.take();
    if rows.len() < places {
        rows.resize(places, 0);
    }
    let codes = Codes(rows.as_mut_ptr());
    for one in &quantised {
        let [count, _, inputs] = one.term.shape;
        split(cx, count, 1, 4 * inputs, &|range| {
            for i in range {
                let (row, to) = (one.term.left.at_row(i).at, codes.row(one, i));
                // SAFETY: the row is an input of the product; its codes are written by this piece alone.
                unsafe { cx.isa.run(Quantise { row, inputs, pairs: one.right.pairs, to }) };
            }
        });
    }
    let level = Level::of(cx.isa);
    each_block(cx, terms, SPEED_UP, &|index, i, j, steps| {
        let one = &quantised[index];
        let [rows, cols, _] = one.term.shape;
        let block = Block {
            rows: steps.0.min(rows - i),
            columns: steps.1.min(cols - j),
            left: codes.row(one, i),
            right: one.right.at_column(j),
            out: one.term.out.from(i, j),
            add: store == Store::Add,
        };
        // SAFETY: the block lies inside the operands, blocks are disjoint; the level was detected.
        unsafe { level.run(block) };
    });
    ROWS.set(rows);
}

/// Where the codes of all rows begin, for the threads that write and read them.
struct Codes(*mut i16);

// SAFETY: the pieces of a split write disjoint rows, and those of a product only read.
unsafe impl Sync for Codes {}

impl Codes {
    fn row(&self, one: &Quantised<'_>, i: usize) -> *mut i16 {
        self.0.wrapping_add(one.at + i * row_codes(one.right.pairs))
    }
}

/// The instructions that products of integers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only the plain one is there"))]
pub(crate) enum Level {
    /// `vpdpwssd` on 512 bits.
    Avx512Vnni,
    /// `vpdpwssd` on 256 bits.
    AvxVnni,
    /// `vpmaddwd` on 256 bits.
    Avx2,
    /// What the compiler makes of plain Rust: the same integers, slowly.
    Plain,
}

impl Level {
    /// The best level of the processor within an instruction set.
    pub fn of(isa: Isa) -> Level {
        Level::available(isa)[0]
    }

    /// All levels of the processor within an instruction set, best first.
    pub fn available(isa: Isa) -> Vec<Level> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni") {
                found.push(Level::Avx512Vnni);
            }
            if isa != Isa::Portable && is_x86_feature_detected!("avxvnni") {
                found.push(Level::AvxVnni);
            }
            if isa != Isa::Portable {
                found.push(Level::Avx2);
            }
        }
        let _ = isa;
        found.push(Level::Plain);
        found
    }

    /// Computes a block.
    ///
    /// # Safety
    /// The addresses are good for the block's shape, and the level is one of [`Level::available`].
    unsafe fn run(self, block: Block) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Vnni => Vnni512::run(block),
                #[cfg(target_arch = "x86_64")]
                Level::AvxVnni => Vnni256::run(block),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => Avx2::run(block),
                _ => Plain::run(block),
            }
        }
    }
}

#[cfg(test)]
mod tests;
