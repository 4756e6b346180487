//! Register tiles of a product of integers, once over a few instructions, for each level that has them.
//!
//! Outside, the columns of a tile; inside, tiles of rows: the codes of a panel stay in the first cache. The sums of a block of
//! inputs are integers; they become floats at its end, with the scale that its row has there.

#[cfg(target_arch = "x86_64")]
use super::int8::ABOVE;
use super::int8::{Integers, QUAD, QUAD_BYTES, panel_bytes};
use super::int8_rows::{BLOCK_BYTES, SHARE, row_bytes};
use super::tile::{Out, PANEL};

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// One block of a product: `rows x columns` from a row of codes and a panel on.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub rows: usize,
    pub columns: usize,
    /// Rows of [`row_bytes`].
    pub left: *const u8,
    pub right: Integers,
    pub out: Out,
    pub add: bool,
}

/// Vectors of sums, one per column, and how four products are added to each.
///
/// # Safety
/// All functions: the processor has the level; pointers are good for what is read and written.
pub(super) trait Dots {
    /// Sums of [`COLUMNS`](Dots::COLUMNS) columns.
    type Sums: Copy;
    /// As many floats.
    type Floats: Copy;
    /// Codes of as many columns, four steps each.
    type Weights: Copy;
    /// Four codes of a row, for every column.
    type Row: Copy;
    /// Columns of a vector.
    const COLUMNS: usize;
    /// Most rows of a tile.
    const TILE_ROWS: usize;
    /// Columns of a tile of one row, and of more: as many as keep the sums in registers.
    const TILE_COLUMNS: [usize; 2];

    /// Computes a block with the level's features on.
    unsafe fn run(block: Block);
    /// Sums that are all `start`, which makes up for the codes of weights being larger; or zeros, where they are not.
    unsafe fn sums(start: i32) -> Self::Sums;
    /// Zeros.
    unsafe fn floats() -> Self::Floats;
    /// A vector of codes.
    unsafe fn weights(at: *const u8) -> Self::Weights;
    /// Four codes of a row.
    unsafe fn row(at: *const u8) -> Self::Row;
    /// Adds the four products of each column.
    unsafe fn add(sums: Self::Sums, row: Self::Row, weights: Self::Weights) -> Self::Sums;
    /// `sums * scale + to`, rounded once.
    unsafe fn scaled(sums: Self::Sums, scale: f32, to: Self::Floats) -> Self::Floats;
    /// Asks for a cache line, which need not be good, to be brought to the second cache.
    unsafe fn prefetch(at: *const u8);
    /// Floats to memory.
    unsafe fn store(to: *mut f32, floats: Self::Floats);
}

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
    let width = D::TILE_COLUMNS[usize::from(rows > 1)];
    let count = rows.div_ceil(D::TILE_ROWS);
    for first_column in (0..columns).step_by(width) {
        let panel = right.at.wrapping_add(first_column / PANEL * panel_bytes(right.quads));
        for i in 0..count {
            let (first, end) = (i * rows / count, (i + 1) * rows / count);
            let of = Tile {
                quads: right.quads,
                left: left.wrapping_add(first * row_bytes(right.quads)),
                panel,
                start: first_column % PANEL,
                columns: width.min(columns - first_column),
                out: out.from(first, first_column),
                add,
                bring: rows > 1 && first_column % PANEL == 0,
            };
            let rows = end - first;
            // SAFETY: the tile lies inside the block.
            unsafe {
                match width {
                    32 => dispatch!(D, rows, 32, of, 1, 2, 3, 4, 5, 6),
                    16 => dispatch!(D, rows, 16, of, 1, 2, 3, 4, 5, 6),
                    _ => dispatch!(D, rows, 8, of, 1, 2, 3, 4, 5, 6),
                }
            }
        }
    }
}

/// One tile: `columns` columns of a panel, from column `start` on.
struct Tile {
    quads: usize,
    left: *const u8,
    panel: *const u8,
    start: usize,
    columns: usize,
    out: Out,
    add: bool,
    /// Whether the next panel is asked for. One row reads panels as fast as they come.
    bring: bool,
}

/// # Safety
/// Called inside `D::run`; the tile lies inside the operands.
// Counted loops over rows and vectors unroll into registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn tile<D: Dots, const ROWS: usize, const WIDTH: usize>(of: Tile) {
    let vectors = WIDTH / D::COLUMNS;
    let stride = row_bytes(of.quads);
    // SAFETY: the panel has `quads` quads, each of the rows has blocks for as many; at most 4 vectors fill WIDTH columns.
    unsafe {
        let mut floats = [[D::floats(); 4]; ROWS];
        let (mut at, mut left) = (of.panel.add(of.start * QUAD), of.left);
        let mut rest = of.quads;
        while rest > 0 {
            let numbers = left.add(SHARE);
            let mut sums = [[D::sums(0); 4]; ROWS];
            for i in 0..ROWS {
                sums[i] = [D::sums(numbers.add(i * stride).cast::<i32>().read_unaligned()); 4];
            }
            // A loop of any length: unrolled, whole runs were slower by a tenth.
            let quads = rest.min(SHARE / QUAD);
            for quad in 0..quads {
                // A quad of a panel fills two lines.
                if of.bring {
                    let next = at.wrapping_add(panel_bytes(of.quads));
                    D::prefetch(next);
                    D::prefetch(next.wrapping_add(QUAD_BYTES / 2));
                }
                let mut weights = [D::weights(at); 4];
                for v in 1..vectors {
                    weights[v] = D::weights(at.add(v * D::COLUMNS * QUAD));
                }
                for i in 0..ROWS {
                    let row = D::row(left.add(i * stride + quad * QUAD));
                    for v in 0..vectors {
                        sums[i][v] = D::add(sums[i][v], row, weights[v]);
                    }
                }
                at = at.add(QUAD_BYTES);
            }
            for i in 0..ROWS {
                let scale = numbers.add(i * stride + 4).cast::<f32>().read_unaligned();
                for v in 0..vectors {
                    floats[i][v] = D::scaled(sums[i][v], scale, floats[i][v]);
                }
            }
            left = left.add(BLOCK_BYTES);
            rest -= quads;
        }
        let after = of.panel.add(of.quads * QUAD_BYTES);
        let scales = after.cast::<f32>().add(of.start).cast::<[f32; WIDTH]>().read_unaligned();
        let mut values = [[0.0f32; WIDTH]; ROWS];
        // A loop of its own, short enough to be unrolled: otherwise the floats would not stay in registers before.
        for i in 0..ROWS {
            for v in 0..vectors {
                D::store(values[i].as_mut_ptr().add(v * D::COLUMNS), floats[i][v]);
            }
        }
        for (i, values) in values.iter_mut().enumerate() {
            for j in 0..WIDTH {
                values[j] *= scales[j];
            }
            let to = of.out.at.add(i * of.out.row);
            if of.columns == WIDTH {
                finish(to.cast::<[f32; WIDTH]>(), values, of.add);
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

/// A level of vectors with `vpdpbusd`: its name, features, vectors and instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! level_vnni {
    (
        $(#[$doc:meta])* $name:ident, $features:literal, $integers:ty, $floats:ty, $columns:literal, $tile:expr,
        $set:ident, $set_float:ident, $load:ident, $dot:ident, $float:ident, $fma:ident, $store:ident
    ) => {
        $(#[$doc])*
        pub(super) struct $name;

        // SAFETY (all blocks): the trait's contract gives the features and good pointers.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Dots for $name {
            type Sums = $integers;
            type Floats = $floats;
            type Weights = $integers;
            type Row = $integers;
            const COLUMNS: usize = $columns;
            const TILE_ROWS: usize = 6;
            const TILE_COLUMNS: [usize; 2] = $tile;

            #[target_feature(enable = $features)]
            unsafe fn run(block: Block) {
                unsafe { tiles::<$name>(block) }
            }
            #[inline(always)]
            unsafe fn sums(start: i32) -> $integers {
                unsafe { $set(start) }
            }
            #[inline(always)]
            unsafe fn floats() -> $floats {
                unsafe { $set_float(0.0) }
            }
            #[inline(always)]
            unsafe fn weights(at: *const u8) -> $integers {
                unsafe { $load(at.cast()) }
            }
            #[inline(always)]
            unsafe fn row(at: *const u8) -> $integers {
                unsafe { $set(at.cast::<i32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn add(sums: $integers, row: $integers, weights: $integers) -> $integers {
                unsafe { $dot(sums, weights, row) }
            }
            #[inline(always)]
            unsafe fn scaled(sums: $integers, scale: f32, to: $floats) -> $floats {
                unsafe { $fma($float(sums), $set_float(scale), to) }
            }
            #[inline(always)]
            unsafe fn prefetch(at: *const u8) {
                unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, floats: $floats) {
                unsafe { $store(to, floats) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
level_vnni!(
    /// 512-bit vectors with `vpdpbusd`.
    Vnni512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma", __m512i, __m512, 16, [32, 32],
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_loadu_si512, _mm512_dpbusd_epi32, _mm512_cvtepi32_ps,
    _mm512_fmadd_ps, _mm512_storeu_ps
);

#[cfg(target_arch = "x86_64")]
level_vnni!(
    /// 256-bit vectors with `vpdpbusd`.
    Vnni256, "avx2,fma,avxvnni", __m256i, __m256, 8, [32, 16],
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_loadu_si256, _mm256_dpbusd_avx_epi32, _mm256_cvtepi32_ps,
    _mm256_fmadd_ps, _mm256_storeu_ps
);

/// 256-bit vectors with `vpmaddubsw`.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

// SAFETY (all blocks below): the trait's contract gives the features and good pointers.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Avx2 {
    type Sums = __m256i;
    type Floats = __m256;
    /// The codes as they are meant, and their magnitudes.
    type Weights = [__m256i; 2];
    type Row = __m256i;
    const COLUMNS: usize = 8;
    const TILE_ROWS: usize = 6;
    const TILE_COLUMNS: [usize; 2] = [32, 8];

    #[target_feature(enable = "avx2,fma")]
    unsafe fn run(block: Block) {
        unsafe { tiles::<Avx2>(block) }
    }
    #[inline(always)]
    unsafe fn sums(_: i32) -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn floats() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn weights(at: *const u8) -> [__m256i; 2] {
        unsafe {
            let above = _mm256_set1_epi8(ABOVE.cast_signed());
            let codes = _mm256_xor_si256(_mm256_loadu_si256(at.cast()), above);
            [codes, _mm256_abs_epi8(codes)]
        }
    }
    #[inline(always)]
    unsafe fn row(at: *const u8) -> __m256i {
        unsafe { _mm256_set1_epi32(at.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn add(sums: __m256i, row: __m256i, [codes, sizes]: [__m256i; 2]) -> __m256i {
        unsafe {
            let pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(row, codes));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn scaled(sums: __m256i, scale: f32, to: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale), to) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, floats: __m256) {
        unsafe { _mm256_storeu_ps(to, floats) }
    }
}

/// Arrays.
pub(super) struct Plain;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Dots for Plain {
    type Sums = [i32; 8];
    type Floats = [f32; 8];
    type Weights = [u8; 8 * QUAD];
    type Row = [i8; QUAD];
    const COLUMNS: usize = 8;
    const TILE_ROWS: usize = 2;
    const TILE_COLUMNS: [usize; 2] = [8, 8];

    unsafe fn run(block: Block) {
        unsafe { tiles::<Plain>(block) }
    }
    #[inline(always)]
    unsafe fn sums(start: i32) -> [i32; 8] {
        [start; 8]
    }
    #[inline(always)]
    unsafe fn floats() -> [f32; 8] {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn weights(at: *const u8) -> [u8; 8 * QUAD] {
        unsafe { at.cast::<[u8; 8 * QUAD]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn row(at: *const u8) -> [i8; QUAD] {
        unsafe { at.cast::<[i8; QUAD]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn add(mut sums: [i32; 8], row: [i8; QUAD], weights: [u8; 8 * QUAD]) -> [i32; 8] {
        for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(QUAD)) {
            for (x, w) in row.iter().zip(weights) {
                *sum += i32::from(*x) * i32::from(*w);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn scaled(sums: [i32; 8], scale: f32, mut to: [f32; 8]) -> [f32; 8] {
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = (sum as f32).mul_add(scale, *to);
        }
        to
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn store(to: *mut f32, floats: [f32; 8]) {
        unsafe { to.cast::<[f32; 8]>().write_unaligned(floats) }
    }
}
