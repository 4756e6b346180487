//! Products of 8-bit integers: rows of activations, quantised as they come, with a weight packed in `Int8`.
//!
//! y[i][j] = (Σ_b scale[i][b] f32(Σ_p a[i][p] w[p][j])) * column scale: the inner sum is over the 16 inputs of block b,
//! one of integers and exact, also as an f32; the outer one is a chain of fused multiply-adds over b ascending from 0, rounded
//! like any. Then y is set or added to. So every instruction set, tile and split has the same bits.
//!
//! Codes go to ±127: a weight's with a scale per output column, an activation's with one per row and block. An activation
//! that is larger than the others spoils its block alone; one scale a row would lose accuracy to it.
//!
//! A weight's code rests as a byte with 128 added, since `vpdpbusd` multiplies bytes without a sign by bytes with one. A block's sum
//! therefore starts from -128 times the sum of its row's codes, which makes it the definition's.
//!
//! A number that is not finite makes the scale of its block or column NaN or infinite, and shows as NaN in every product of it.

use super::Cx;
use super::int8_rows::{self, row_bytes};
#[cfg(target_arch = "x86_64")]
use super::int8_tile::{Avx2, Vnni256, Vnni512};
use super::int8_tile::{Block, Dots, Plain};
use super::lanes::Isa;
use super::tile::PANEL;
use super::work::{Side, Term, each_block, split};
use crate::kernels::Store;
use std::cell::Cell;

/// What a weight's code has more where it rests.
pub(super) const ABOVE: u8 = 128;
/// Products that one instruction adds.
pub(super) const QUAD: usize = 4;
/// Bytes of four steps of a panel.
pub(super) const QUAD_BYTES: usize = QUAD * PANEL;
/// About how much faster products of integers are than the floats that pieces are measured in.
const SPEED_UP: usize = 3;

/// The right side of a product of integers: panels of one group, from a column on. A panel is `[k / 4][32][4]` codes, then
/// the columns' scales.
#[derive(Clone, Copy)]
pub(crate) struct Integers {
    pub at: *const u8,
    /// Steps of four inputs.
    pub quads: usize,
}

/// Bytes of a panel of so many quads.
pub(super) fn panel_bytes(quads: usize) -> usize {
    quads * QUAD_BYTES + 4 * PANEL
}

impl Integers {
    /// The same from column `j` on, a multiple of [`PANEL`].
    pub fn at_column(self, j: usize) -> Integers {
        debug_assert!(j.is_multiple_of(PANEL));
        Integers { at: self.at.wrapping_add(j / PANEL * panel_bytes(self.quads)), ..self }
    }
}

thread_local! {
    /// Codes of the activations of the products that this thread began, and where each term's are. They grow to the
    /// largest, then nothing allocates.
    static ROWS: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static PLACES: Cell<Vec<Place>> = const { Cell::new(Vec::new()) };
}

/// Where a term's rows of codes begin, and the bytes of one.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    row: usize,
}

/// As [`products`](super::work::products), for terms whose right sides are all [`Integers`].
///
/// # Safety
/// As there.
pub(super) unsafe fn products(cx: &Cx, terms: &[Term], store: Store) {
    let level = Level::of(cx.isa);
    let (mut bytes, mut places) = (0, PLACES.take());
    places.clear();
    places.extend(terms.iter().map(|term| {
        assert!(term.left.col == 1, "activations are rows of floats");
        let (at, row) = (bytes, row_bytes(integers(term).quads));
        bytes += term.shape[0] * row;
        Place { at, row }
    }));
    let mut rows = ROWS.take();
    if rows.len() < bytes {
        rows.resize(bytes, 0);
    }
    let codes = Codes(rows.as_mut_ptr());
    for (term, place) in terms.iter().zip(&places) {
        let [count, _, inputs] = term.shape;
        split(cx, count, 1, 4 * inputs, &|range| {
            for i in range {
                let row = term.left.at_row(i).at;
                // SAFETY: the row is an input of the product; its codes are written by this piece alone.
                unsafe { level.quantise(row, inputs, codes.row(*place, i)) };
            }
        });
    }
    each_block(cx, terms, SPEED_UP, &|index, i, j, steps| {
        let term = &terms[index];
        let [rows, cols, _] = term.shape;
        let block = Block {
            rows: steps.0.min(rows - i),
            columns: steps.1.min(cols - j),
            left: codes.row(places[index], i),
            right: integers(term).at_column(j),
            out: term.out.from(i, j),
            add: store == Store::Add,
        };
        // SAFETY: the block lies inside the operands, blocks are disjoint; the level was detected.
        unsafe { level.run(block) };
    });
    ROWS.set(rows);
    PLACES.set(places);
}

fn integers(term: &Term) -> Integers {
    let Side::Integers(right) = term.right else { unreachable!("checked by the caller") };
    right
}

/// Where the codes of all rows begin, for the threads that write and read them.
struct Codes(*mut u8);

// SAFETY: the pieces of a split write disjoint rows, and those of a product only read.
unsafe impl Sync for Codes {}

impl Codes {
    fn row(&self, place: Place, i: usize) -> *mut u8 {
        self.0.wrapping_add(place.at + i * place.row)
    }
}

/// The instructions that products of integers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only the plain one is there"))]
pub(crate) enum Level {
    /// `vpdpbusd` on 512 bits.
    Avx512Vnni,
    /// `vpdpbusd` on 256 bits.
    AvxVnni,
    /// `vpmaddubsw` on 256 bits: magnitudes of weights by activations that take the weights' signs, so that no sum of two
    /// products leaves 16 bits.
    Avx2,
    /// What the compiler makes of plain Rust: the same integers, slowly.
    Plain,
}

impl Level {
    /// The best level of the processor within an instruction set.
    pub fn of(isa: Isa) -> Level {
        Level::available(isa).next().expect("plain code is always there")
    }

    /// All levels of the processor within an instruction set, best first.
    pub fn available(isa: Isa) -> impl Iterator<Item = Level> {
        let all = [Level::Avx512Vnni, Level::AvxVnni, Level::Avx2, Level::Plain];
        all.into_iter().filter(move |level| level.is_available(isa))
    }

    fn is_available(self, isa: Isa) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Level::Avx512Vnni => isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni"),
            Level::AvxVnni => isa != Isa::Portable && is_x86_feature_detected!("avxvnni"),
            Level::Avx2 => isa != Isa::Portable,
            Level::Plain => true,
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = isa;
            self == Level::Plain
        }
    }

    /// A row of numbers becomes codes.
    ///
    /// # Safety
    /// The row has so many numbers, `to` room for [`row_bytes`]; the level is one of [`Level::available`].
    unsafe fn quantise(self, row: *const f32, inputs: usize, to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Vnni => int8_rows::avx512(row, inputs, to),
                #[cfg(target_arch = "x86_64")]
                Level::AvxVnni | Level::Avx2 => int8_rows::avx2(row, inputs, to),
                _ => int8_rows::plain(row, inputs, to),
            }
        }
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
