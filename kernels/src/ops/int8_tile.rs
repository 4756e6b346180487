//! Register tiles of a product of integers, once over a few instructions, for each level that has them.
//!
//! Outside, half a panel or a whole one; inside, tiles of rows: the codes of a panel stay in the first cache. A tile's sums
//! are integers; they become floats once, at the end, through one epilogue.

use super::int8::{Integers, PAIR, PAIR_BYTES, panel_bytes, row_codes};
use super::tile::{Out, PANEL};

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// One block of a product: `rows x columns` from a row of codes and a panel on.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub rows: usize,
    pub columns: usize,
    /// Rows of [`row_codes`].
    pub left: *const i16,
    pub right: Integers,
    pub out: Out,
    pub add: bool,
}

/// Vectors of sums, one sum per column, and how two products are added to each.
///
/// # Safety
/// All functions: the processor has the level; pointers are good for what is read and written.
pub(super) trait Dots {
    /// Sums of `COLUMNS` columns.
    type Sums: Copy;
    /// Codes of `COLUMNS` columns, two steps each, widened.
    type Weights: Copy;
    /// Two codes of a row, for every column.
    type Row: Copy;
    /// Columns of a vector.
    const COLUMNS: usize;
    /// Most rows of a tile.
    const TILE_ROWS: usize;
    /// Whether such a tile is a whole panel wide: the registers hold its sums, and a code of a row serves twice as many.
    const WHOLE_PANELS: bool;

    /// Computes a block with the level's features on.
    unsafe fn run(block: Block);
    /// Zeros.
    unsafe fn zero() -> Self::Sums;
    /// A vector of codes.
    unsafe fn weights(at: *const u8) -> Self::Weights;
    /// Two codes of a row.
    unsafe fn row(at: *const i16) -> Self::Row;
    /// Adds the two products of each column.
    unsafe fn add(sums: Self::Sums, row: Self::Row, weights: Self::Weights) -> Self::Sums;
    /// Asks for a cache line, which need not be good, to be brought to the second cache.
    unsafe fn prefetch(at: *const u8);
    /// Sums to memory.
    unsafe fn store(to: *mut i32, sums: Self::Sums);
}

/// Rows up to which a tile is a whole panel wide: few sums would wait for each other.
const FEW_ROWS: usize = 2;

macro_rules! dispatch {
    ($level:ty, $rows:ident, $width:literal, $of:ident, $($count:literal),*) => {
        match $rows {
            $($count => tile::<$level, $count, $width>($of),)*
            _ => unreachable!("a tile has at most {} rows", <$level>::TILE_ROWS),
        }
    };
}

/// All tiles of a block.
///
/// # Safety
/// Called inside `D::run`.
#[inline(always)]
unsafe fn tiles<D: Dots>(block: Block) {
    let Block { rows, columns, left, right, out, add } = block;
    let few = rows <= FEW_ROWS;
    let width = if few || D::WHOLE_PANELS { PANEL } else { PANEL / 2 };
    let count = rows.div_ceil(if few { FEW_ROWS } else { D::TILE_ROWS });
    for first_column in (0..columns).step_by(width) {
        let panel = right.at.wrapping_add(first_column / PANEL * panel_bytes(right.pairs));
        for i in 0..count {
            let (first, end) = (i * rows / count, (i + 1) * rows / count);
            let of = Tile {
                pairs: right.pairs,
                left: left.wrapping_add(first * row_codes(right.pairs)),
                panel,
                start: first_column % PANEL,
                columns: width.min(columns - first_column),
                out: out.from(first, first_column),
                add,
            };
            let rows = end - first;
            // SAFETY: the tile lies inside the block.
            unsafe {
                if few {
                    dispatch!(D, rows, 32, of, 1, 2)
                } else if D::WHOLE_PANELS {
                    dispatch!(D, rows, 32, of, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
                } else {
                    dispatch!(D, rows, 16, of, 1, 2, 3, 4, 5, 6)
                }
            }
        }
    }
}

/// One tile: `columns` columns of a panel, from column `start` on.
struct Tile {
    pairs: usize,
    left: *const i16,
    panel: *const u8,
    start: usize,
    columns: usize,
    out: Out,
    add: bool,
}

/// # Safety
/// Called inside `D::run`; the tile lies inside the operands.
// Counted loops over rows and vectors unroll into registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn tile<D: Dots, const ROWS: usize, const WIDTH: usize>(of: Tile) {
    let vectors = WIDTH / D::COLUMNS;
    let stride = row_codes(of.pairs);
    let mut sums = [[0i32; WIDTH]; ROWS];
    // SAFETY: the panel has `pairs` pairs, so has each of the rows; at most 4 vectors fill WIDTH columns.
    unsafe {
        let mut wide = [[D::zero(); 4]; ROWS];
        let mut at = of.panel.add(of.start * PAIR);
        for pair in 0..of.pairs {
            // A pair of a panel fills a line. One or two rows read the panels as fast as they come.
            if ROWS > FEW_ROWS {
                D::prefetch(at.wrapping_add(panel_bytes(of.pairs)));
            }
            for v in 0..vectors {
                let weights = D::weights(at.add(v * D::COLUMNS * PAIR));
                for i in 0..ROWS {
                    let row = D::row(of.left.add(i * stride + pair * PAIR));
                    wide[i][v] = D::add(wide[i][v], row, weights);
                }
            }
            at = at.add(PAIR_BYTES);
        }
        for i in 0..ROWS {
            for v in 0..vectors {
                D::store(sums[i].as_mut_ptr().add(v * D::COLUMNS), wide[i][v]);
            }
        }
        let after = of.panel.add(of.pairs * PAIR_BYTES);
        let scales = after.cast::<f32>().add(of.start).cast::<[f32; WIDTH]>().read_unaligned();
        for (i, sums) in sums.iter().enumerate() {
            let scale = of.left.add(i * stride + of.pairs * PAIR).cast::<f32>().read_unaligned();
            let to = of.out.at.add(i * of.out.row);
            let mut values = [0.0f32; WIDTH];
            for j in 0..WIDTH {
                values[j] = sums[j] as f32 * (scale * scales[j]);
            }
            if of.columns == WIDTH {
                finish(to.cast::<[f32; WIDTH]>(), &values, of.add);
                continue;
            }
            for j in 0..of.columns {
                let y = to.add(j);
                *y = if of.add { *y + values[j] } else { values[j] };
            }
        }
    }
}

/// A whole row of a tile into y.
///
/// # Safety
/// `to` is good for WIDTH floats.
#[inline(always)]
unsafe fn finish<const WIDTH: usize>(to: *mut [f32; WIDTH], values: &[f32; WIDTH], add: bool) {
    // SAFETY: the caller's promise.
    let to = unsafe { &mut *to };
    if add {
        for j in 0..WIDTH {
            to[j] += values[j];
        }
    } else {
        *to = *values;
    }
}

/// 512-bit vectors with `vpdpwssd`.
#[cfg(target_arch = "x86_64")]
pub(super) struct Vnni512;

// SAFETY (all blocks below): the trait's contract gives the features and good pointers.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Vnni512 {
    type Sums = __m512i;
    type Weights = __m512i;
    type Row = __m512i;
    const COLUMNS: usize = 16;
    const TILE_ROWS: usize = 12;
    const WHOLE_PANELS: bool = true;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
    unsafe fn run(block: Block) {
        unsafe { tiles::<Vnni512>(block) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn weights(at: *const u8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn row(at: *const i16) -> __m512i {
        unsafe { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn add(sums: __m512i, row: __m512i, weights: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(sums, row, weights) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut i32, sums: __m512i) {
        unsafe { _mm512_storeu_si512(to.cast(), sums) }
    }
}

/// A level of 256-bit vectors: its name, features and how it adds.
#[cfg(target_arch = "x86_64")]
macro_rules! level256 {
    ($(#[$doc:meta])* $name:ident, $features:literal, |$sums:ident, $row:ident, $weights:ident| $add:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Dots for $name {
            type Sums = __m256i;
            type Weights = __m256i;
            type Row = __m256i;
            const COLUMNS: usize = 8;
            const TILE_ROWS: usize = 6;
            const WHOLE_PANELS: bool = false;

            #[target_feature(enable = $features)]
            unsafe fn run(block: Block) {
                unsafe { tiles::<$name>(block) }
            }
            #[inline(always)]
            unsafe fn zero() -> __m256i {
                unsafe { _mm256_setzero_si256() }
            }
            #[inline(always)]
            unsafe fn weights(at: *const u8) -> __m256i {
                unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())) }
            }
            #[inline(always)]
            unsafe fn row(at: *const i16) -> __m256i {
                unsafe { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn add($sums: __m256i, $row: __m256i, $weights: __m256i) -> __m256i {
                unsafe { $add }
            }
            #[inline(always)]
            unsafe fn prefetch(at: *const u8) {
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut i32, sums: __m256i) {
                unsafe { _mm256_storeu_si256(to.cast(), sums) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
level256!(
    /// 256-bit vectors with `vpdpwssd`.
    Vnni256,
    "avx2,fma,avxvnni",
    |sums, row, weights| _mm256_dpwssd_avx_epi32(sums, row, weights)
);

#[cfg(target_arch = "x86_64")]
level256!(
    /// 256-bit vectors with `vpmaddwd`.
    Avx2,
    "avx2,fma",
    |sums, row, weights| _mm256_add_epi32(sums, _mm256_madd_epi16(row, weights))
);

/// Arrays.
pub(super) struct Plain;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Plain {
    type Sums = [i32; 8];
    type Weights = [i8; 8 * PAIR];
    type Row = [i16; PAIR];
    const COLUMNS: usize = 8;
    const TILE_ROWS: usize = 2;
    const WHOLE_PANELS: bool = false;

    unsafe fn run(block: Block) {
        unsafe { tiles::<Plain>(block) }
    }
    #[inline(always)]
    unsafe fn zero() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn weights(at: *const u8) -> [i8; 8 * PAIR] {
        unsafe { at.cast::<[i8; 8 * PAIR]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn row(at: *const i16) -> [i16; PAIR] {
        unsafe { at.cast::<[i16; PAIR]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn add(mut sums: [i32; 8], row: [i16; PAIR], weights: [i8; 8 * PAIR]) -> [i32; 8] {
        for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(PAIR)) {
            for (x, w) in row.iter().zip(weights) {
                *sum += i32::from(*x) * i32::from(*w);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn store(to: *mut i32, sums: [i32; 8]) {
        unsafe { to.cast::<[i32; 8]>().write_unaligned(sums) }
    }
}
