//! The product: C (=|+=) A B in register tiles.
//!
//! Rows of a tile share each load of B, its columns each broadcast of A. Around the tiles: blocks of rows
//! (A stays in the second cache), blocks of k (a panel of B stays in the first), panels of 32 columns.
//! Between blocks of k a tile's sums are stored to C and loaded again, which rounds nothing. A transposed
//! A, and a B that is not packed and is used often, are copied to the stack block by block. While a packed
//! panel is used, the next one is brought to the second cache, so that weights come from memory beside the
//! multiplications and not between them.
//!
//! Invariants:
//!   * one chain of fused multiply-adds per output element, over p ascending, for any block or tile
//!   * what lies beyond column n is neither read nor written, except the zero padding of packed panels

use super::lanes::{Isa, LANES, Lanes, OnLanes};
pub(super) use super::operands::Bring;
pub(crate) use super::operands::{Left, Next, Out, Right};
use crate::kernels::Store;
use std::mem::MaybeUninit;

/// Columns of a panel of B.
pub(crate) const PANEL: usize = 32;
/// Rows of A in one block.
pub(super) const BLOCK_ROWS: usize = 96;
/// Steps of p in one block.
pub(super) const BLOCK_DEPTH: usize = 256;
/// Rows of tiles from which copying a panel of B pays.
const ROWS_TO_COPY_B: usize = 16;

/// C[m, n] (=|+=) A[m, k] B[k, n]: element (i, p) of A is at `a + i * a_row + p * a_col`, row p of B at
/// `b + p * b_row` with n contiguous columns, row i of C at `c + i * c_row`. One fused-multiply-add chain per
/// output element over p ascending (`Store::Add` starts it from C's value): the same bits for any m, any
/// split of n and any instruction set.
///
/// # Safety
/// The addresses are good for what the shapes say, and C overlaps neither A nor B.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn product(
    isa: Isa,
    m: usize,
    n: usize,
    k: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    store: Store,
) {
    let left = Left { at: a, row: a_row, col: a_col };
    let right = Right { at: b, row: b_row, panel: PANEL, next: Next::Nothing };
    // SAFETY: the caller's promise, in other words.
    unsafe { multiply(isa, [m, n, k], left, right, Out { at: c, row: c_row }, store) }
}

/// [`product`] with B in panels.
///
/// # Safety
/// As for [`product`].
pub(crate) unsafe fn multiply(
    isa: Isa,
    [m, n, k]: [usize; 3],
    left: Left,
    right: Right,
    out: Out,
    store: Store,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if store == Store::Set {
            for i in 0..m {
                // SAFETY: row i of C has n columns.
                unsafe { std::slice::from_raw_parts_mut(out.at.add(i * out.row), n) }.fill(0.0);
            }
        }
        return;
    }
    let copy_a = left.col != 1;
    let copy_b = right.row != PANEL && m >= ROWS_TO_COPY_B;
    let job = Blocks { shape: [m, n, k], left, right, out, store };
    // SAFETY: the caller's promise; `isa` was detected.
    unsafe {
        match (copy_a, copy_b) {
            (false, false) => isa.run(job),
            (true, false) => isa.run(Copying::<true, false>(job)),
            (false, true) => isa.run(Copying::<false, true>(job)),
            (true, true) => isa.run(Copying::<true, true>(job)),
        }
    }
}

/// A product whose operands are read where they lie.
struct Blocks {
    shape: [usize; 3],
    left: Left,
    right: Right,
    out: Out,
    store: Store,
}

impl OnLanes for Blocks {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let [m, n, k] = self.shape;
        // SAFETY: every block lies inside the operands.
        unsafe {
            for row in (0..m).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(m - row);
                for (p, depth) in depths(k, BLOCK_DEPTH) {
                    let (left, right, out) = self.block(row, p);
                    let ahead =
                        self.after(row + rows, p + depth).map_or(Bring::Nothing, Bring::Panel);
                    columns::<L>([rows, n, depth], left, right, out, adds(self.store, p), ahead);
                }
            }
        }
    }
}

impl Blocks {
    /// The operands of the block of rows from `row` and of steps from `p`.
    #[inline(always)]
    unsafe fn block(&self, row: usize, p: usize) -> (Left, Right, Out) {
        let (left, right, out) = (self.left, self.right, self.out);
        // SAFETY: the block lies inside the operands.
        unsafe {
            (
                Left { at: left.at.add(row * left.row + p * left.col), ..left },
                Right { at: right.at.add(p * right.row), ..right },
                Out { at: out.at.add(row * out.row), ..out },
            )
        }
    }

    /// What of B is read after the block that ends before `row` and step `p`: its next steps, its first ones
    /// again, or what its owner names.
    fn after(&self, row: usize, p: usize) -> Option<*const f32> {
        let ([m, n, k], Right { at, row: step, panel, next }) = (self.shape, self.right);
        match next {
            Next::Nothing => None,
            _ if p < k => Some(at.wrapping_add(p * step)),
            _ if row < m => Some(at),
            Next::Behind => Some(at.wrapping_add(n.div_ceil(PANEL) * panel)),
            Next::At(next) => Some(next),
        }
    }

    /// The rows of a transposed A that are copied after the block that ends before step `p`.
    fn rows_after(&self, (row, rows): (usize, usize), p: usize) -> Bring {
        let ([m, _, k], Left { at, row: step, col }) = (self.shape, self.left);
        match step {
            1 if p < k => Bring::Rows(at.wrapping_add(row + p * col), col),
            1 if row + rows < m => Bring::Rows(at.wrapping_add(row + rows), col),
            _ => Bring::Nothing,
        }
    }
}

/// A product that copies blocks of A (tile by tile, transposed) or of B (into a panel) to the stack first.
struct Copying<const A: bool, const B: bool>(Blocks);

/// Floats on the stack, not yet set.
#[repr(align(64))]
pub(super) struct Stack<const N: usize>([MaybeUninit<f32>; N]);

impl<const N: usize> Stack<N> {
    #[inline(always)]
    pub fn new() -> Stack<N> {
        Stack([MaybeUninit::uninit(); N])
    }

    #[inline(always)]
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

impl<const A: bool, const B: bool> OnLanes for Copying<A, B> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let job = self.0;
        let [m, n, k] = job.shape;
        let mut a = Stack::<{ BLOCK_ROWS * BLOCK_DEPTH }>::new();
        let mut b = Stack::<{ PANEL * BLOCK_DEPTH }>::new();
        // SAFETY: every block lies inside the operands and fits the stack arrays; `copy_*` fill what is read.
        unsafe {
            for row in (0..m).step_by(BLOCK_ROWS) {
                let rows = BLOCK_ROWS.min(m - row);
                for (p, depth) in depths(k, BLOCK_DEPTH) {
                    let (mut left, right, out) = job.block(row, p);
                    let add = adds(job.store, p);
                    let mut bring = job.rows_after((row, rows), p + depth);
                    if A {
                        copy_left::<L>(rows, depth, left, a.as_mut_ptr());
                        left = Left { at: a.as_mut_ptr(), row: 1, col: 0 };
                    }
                    if !B {
                        columns::<L>([rows, n, depth], left, right, out, add, Bring::Nothing);
                        continue;
                    }
                    for j in (0..n).step_by(PANEL) {
                        let width = PANEL.min(n - j);
                        let from = right.at.add(j / PANEL * right.panel);
                        copy_panel(width, depth, from, right.row, b.as_mut_ptr());
                        let panel = Right { at: b.as_mut_ptr(), row: PANEL, panel: 0, ..right };
                        let out = Out { at: out.at.add(j), ..out };
                        columns::<L>([rows, width, depth], left, panel, out, add, bring);
                        bring = Bring::Nothing;
                    }
                }
            }
        }
    }
}

/// Blocks of p as (first, count), of nearly equal size and at most `most` steps.
#[inline(always)]
pub(super) fn depths(k: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let blocks = k.div_ceil(most);
    (0..blocks).map(move |i| (i * k / blocks, (i + 1) * k / blocks - i * k / blocks))
}

/// Whether the block that starts at step `p` continues what C holds.
#[inline(always)]
pub(super) fn adds(store: Store, p: usize) -> bool {
    store == Store::Add || p > 0
}

/// Tiles of nearly equal height as (first, count).
#[inline(always)]
fn tiles<L: Lanes>(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = m.div_ceil(L::TILE_ROWS);
    (0..count).map(move |i| (i * m / count, (i + 1) * m / count - i * m / count))
}

/// Copies A so that a tile of r rows lies as `[p][r]`: the tile that starts at row i is at `i * depth`.
#[inline(always)]
unsafe fn copy_left<L: Lanes>(m: usize, depth: usize, left: Left, to: *mut f32) {
    // SAFETY: m x depth elements are read and written; a tile has fewer rows than a vector lanes.
    unsafe {
        if left.row == 1 {
            // A step's elements are neighbours, so that each line of A is read once.
            let mut starts = [(0, 0); BLOCK_ROWS.div_ceil(4)];
            let count = m.div_ceil(L::TILE_ROWS);
            for (start, tile) in starts.iter_mut().zip(tiles::<L>(m)) {
                *start = tile;
            }
            for p in 0..depth {
                let from = left.at.add(p * left.col);
                for (first, rows) in &starts[..count] {
                    let x = L::load_some(from.add(*first), *rows);
                    L::store_some(to.add(first * depth + p * rows), *rows, x);
                }
            }
            return;
        }
        for (first, rows) in tiles::<L>(m) {
            let (from, to) = (left.at.add(first * left.row), to.add(first * depth));
            for p in 0..depth {
                for i in 0..rows {
                    *to.add(p * rows + i) = *from.add(i * left.row + p * left.col);
                }
            }
        }
    }
}

/// Copies `width` columns of B into a panel; columns beyond are set to zero.
#[inline(always)]
unsafe fn copy_panel(width: usize, depth: usize, from: *const f32, row: usize, to: *mut f32) {
    // SAFETY: rows of `width` elements are read, rows of a panel written.
    unsafe {
        for p in 0..depth {
            let (from, to) = (from.add(p * row), to.add(p * PANEL));
            if width == PANEL {
                std::ptr::copy_nonoverlapping(from, to, PANEL);
            } else {
                std::ptr::copy_nonoverlapping(from, to, width);
                std::slice::from_raw_parts_mut(to.add(width), PANEL - width).fill(0.0);
            }
        }
    }
}

/// One block of rows and of p against all columns. `left.col == 0` means A as [`copy_left`] leaves it.
/// While a panel is used, what comes next is asked for, a little with each step.
#[inline(always)]
pub(super) unsafe fn columns<L: Lanes>(
    [m, n, depth]: [usize; 3],
    left: Left,
    right: Right,
    out: Out,
    add: bool,
    bring: Bring,
) {
    // Few rows leave registers for more columns, and those keep the multiply-add units busy.
    let count = m.div_ceil(L::TILE_ROWS);
    let vectors = L::TILE_VECTORS[m.div_ceil(count).min(4) - 1];
    let mut j = 0;
    // SAFETY: the tiles lie inside the block.
    unsafe {
        while j < n {
            let fitting = 1 << ((n - j) / LANES).max(1).ilog2();
            let width = (vectors.min(fitting) * LANES).min(n - j);
            let from = right.at.add(j / PANEL * right.panel + j % PANEL);
            let panel = j / PANEL + width.div_ceil(PANEL);
            let bring = match bring {
                Bring::Panel(_) if panel * PANEL < n => {
                    Bring::Panel(right.at.wrapping_add(panel * right.panel))
                }
                bring => bring,
            };
            for (tile, (first, rows)) in tiles::<L>(m).enumerate() {
                let ahead = match bring {
                    Bring::Panel(at) => {
                        let share = (j % PANEL / LANES * count + tile) * depth;
                        Ahead::new(at, share, width.div_ceil(LANES).min(2), count)
                    }
                    Bring::Rows(at, step) => Ahead::line(at.wrapping_add(tile * LANES), step),
                    Bring::Nothing => Ahead::line(from, 0),
                };
                let (at, row, col) = match left.col {
                    0 => (left.at.add(first * depth), 1, rows),
                    col => (left.at.add(first * left.row), left.row, col),
                };
                let tile = Operands {
                    depth,
                    left: Left { at, row, col },
                    right: Right { at: from, ..right },
                    out: Out { at: out.at.add(first * out.row + j), ..out },
                    add,
                    ahead,
                };
                tile.dispatch::<L>(rows, width);
            }
            j += width;
        }
    }
}

/// One tile's operands.
struct Operands {
    depth: usize,
    left: Left,
    right: Right,
    out: Out,
    add: bool,
    ahead: Ahead,
}

/// The part of what comes next that a tile asks for: the tiles of a panel share it evenly.
struct Ahead {
    at: *const u8,
    /// Bytes from one vector's to the next one's.
    line: usize,
    /// Bytes of each step.
    step: usize,
}

impl Ahead {
    /// Tile number `share / depth` of those that use a panel `vectors` at a time, `count` for each column.
    #[inline(always)]
    fn new(panel: *const f32, share: usize, vectors: usize, count: usize) -> Ahead {
        let bytes = vectors * LANES * size_of::<f32>();
        let at = panel.cast::<u8>().wrapping_add(share * bytes / count);
        Ahead { at, line: bytes / vectors / count, step: bytes / count }
    }

    /// One line with each step, which are `step` floats apart.
    #[inline(always)]
    fn line(at: *const f32, step: usize) -> Ahead {
        Ahead { at: at.cast(), line: 0, step: step * size_of::<f32>() }
    }
}

/// A tile of `ROWS x VECTORS` vectors; with `MASKED` its one vector has `columns < 16` columns.
struct Tile<const ROWS: usize, const VECTORS: usize, const MASKED: bool> {
    of: Operands,
    columns: usize,
}

macro_rules! dispatch {
    ($self:ident, $width:ident, $rows:ident, $lanes:ty, $(($count:literal $(, $vectors:literal)*)),*) => {
        match $rows {
            $($count => match $width.div_ceil(LANES) {
                $($vectors => {
                    <$lanes>::call(Tile::<$count, $vectors, false> { of: $self, columns: $width })
                })*
                _ if $width < LANES => {
                    <$lanes>::call(Tile::<$count, 1, true> { of: $self, columns: $width })
                }
                _ => <$lanes>::call(Tile::<$count, 1, false> { of: $self, columns: LANES }),
            },)*
            _ => unreachable!("a tile has at most {} rows", <$lanes>::TILE_ROWS),
        }
    };
}

impl Operands {
    /// Calls the tile of `rows` rows and `width` columns: as many vectors as fit, or a part of one.
    #[inline(always)]
    unsafe fn dispatch<L: Lanes>(self, rows: usize, width: usize) {
        // SAFETY: the tile lies inside the operands.
        unsafe {
            match L::TILE_ROWS {
                14 => dispatch!(
                    self,
                    width,
                    rows,
                    L,
                    (1, 8, 4, 2),
                    (2, 4, 2),
                    (3, 4, 2),
                    (4, 2),
                    (5, 2),
                    (6, 2),
                    (7, 2),
                    (8, 2),
                    (9, 2),
                    (10, 2),
                    (11, 2),
                    (12, 2),
                    (13, 2),
                    (14, 2)
                ),
                6 => {
                    dispatch!(self, width, rows, L, (1, 4, 2), (2, 2), (3, 2), (4), (5), (6))
                }
                _ => dispatch!(self, width, rows, L, (1), (2), (3), (4)),
            }
        }
    }
}

impl<const ROWS: usize, const VECTORS: usize, const MASKED: bool> OnLanes
    for Tile<ROWS, VECTORS, MASKED>
{
    type Out = ();
    // Counted loops over rows and vectors unroll into registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Tile { of: Operands { depth, left, right, out, add, ahead }, columns } = self;
        // SAFETY: the tile lies inside the operands; vector v starts at column 16 v, and a tile of more
        // than one vector starts at a panel's first column (or all of B has one stride).
        unsafe {
            let mut sums = [[L::splat(0.0); VECTORS]; ROWS];
            if add {
                for i in 0..ROWS {
                    for v in 0..VECTORS {
                        sums[i][v] =
                            load::<L, MASKED>(out.at.add(i * out.row + v * LANES), columns);
                    }
                }
            }
            let (mut a, mut b, mut next) = (left.at, right.at, ahead.at);
            for _ in 0..depth {
                // One row is read as fast as the processor's own prefetching goes.
                for v in 0..if ROWS == 1 { 0 } else { VECTORS } {
                    let panel = v / 2 * right.panel * size_of::<f32>();
                    L::prefetch(next.wrapping_add(panel + v % 2 * ahead.line).cast());
                }
                next = next.wrapping_add(ahead.step);
                let mut row = [L::splat(0.0); VECTORS];
                for v in 0..VECTORS {
                    row[v] = load::<L, MASKED>(b.add(v / 2 * right.panel + v % 2 * LANES), columns);
                }
                for i in 0..ROWS {
                    let x = L::splat(*a.add(i * left.row));
                    for v in 0..VECTORS {
                        sums[i][v] = L::fma(x, row[v], sums[i][v]);
                    }
                }
                b = b.add(right.row);
                a = a.add(left.col);
            }
            for i in 0..ROWS {
                for v in 0..VECTORS {
                    let to = out.at.add(i * out.row + v * LANES);
                    if MASKED {
                        L::store_some(to, columns, sums[i][v])
                    } else {
                        L::store(to, sums[i][v])
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load<L: Lanes, const MASKED: bool>(at: *const f32, columns: usize) -> L::V {
    // SAFETY: the tile's columns lie inside the operand.
    unsafe { if MASKED { L::load_some(at, columns) } else { L::load(at) } }
}
