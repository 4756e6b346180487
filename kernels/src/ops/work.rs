//! How an operation is cut into pieces for the pool, and how a piece reaches its part of the output.
//!
//! Small operations stay on the caller: waking a thread costs more than they do. The cut may depend on
//! the number of threads, because every output element is computed whole by one piece. Pieces come in
//! multiples of the threads and ascend by rows, so that a thread finds in its own cache the rows that it
//! wrote an operation ago.

use super::Cx;
use super::int8::{self, Integers};
use super::tile::{BLOCK_ROWS, Left, Out, PANEL, Right, multiply};
use super::unpack::{Codes, multiply_codes};
use crate::buffer::MatMut;
use crate::kernels::Store;
use std::cell::Cell;
use std::ops::Range;

/// Operations of a product below which a piece is not worth another thread: it takes half a microsecond to a
/// whole one to tell the other core, and to bring it what this one wrote. Other loops count an operation that
/// takes as long as several of a product as so many.
const GRAIN: usize = 120_000;
/// Pieces per thread that even out threads of different speed.
const PIECES_PER_THREAD: usize = 4;
/// Rows whose products take as long as reading B from the third cache.
const ROWS_TO_READ: usize = 3;
/// Rows below which a product is rather cut by columns.
const ROWS_PER_BLOCK: usize = 24;

/// Cuts `count` items of `cost` operations each into ranges of whole multiples of `step`, and runs `call`
/// once per range on the pool.
pub(crate) fn split(
    cx: &Cx,
    count: usize,
    step: usize,
    cost: usize,
    call: &(dyn Fn(Range<usize>) + Sync),
) {
    let size = match pieces(cx, count * cost) {
        1 => count.max(1),
        pieces => count.div_ceil(pieces).next_multiple_of(step),
    };
    cx.pool.run(count.div_ceil(size), &|piece| call(piece * size..count.min((piece + 1) * size)));
}

/// As [`split`], but each item is a piece of its own: for items of unequal cost, few enough to be counted one by one.
pub(crate) fn each(cx: &Cx, count: usize, cost: usize, call: &(dyn Fn(usize) + Sync)) {
    match pieces(cx, count * cost) {
        1 => (0..count).for_each(call),
        _ => cx.pool.run(count, call),
    }
}

/// Runs `call` for every row of a `rows x cols` matrix, in one or more ranges of columns.
pub(crate) fn segments(
    cx: &Cx,
    rows: usize,
    cols: usize,
    cost: usize,
    call: &(dyn Fn(usize, Range<usize>) + Sync),
) {
    split(cx, rows * cols, 16, cost, &|range| {
        let mut at = range.start;
        while at < range.end {
            let (row, col) = (at / cols, at % cols);
            let end = cols.min(col + range.end - at);
            call(row, col..end);
            at += end - col;
        }
    });
}

/// Number of pieces for `work` operations: 1 if they stay on the caller.
fn pieces(cx: &Cx, work: usize) -> usize {
    match (cx.pool.threads(), work / GRAIN) {
        (1, _) | (_, 0) => 1,
        (threads, grains) if grains < threads => grains,
        (threads, grains) => (grains / threads).min(PIECES_PER_THREAD) * threads,
    }
}

/// Columns of one row, to write to, from one of several threads.
///
/// # Safety
/// No two threads may touch the same element at the same time.
#[allow(clippy::mut_from_ref)]
pub(crate) unsafe fn part_mut<'a, T>(
    matrix: &'a MatMut<'_, T>,
    row: usize,
    cols: Range<usize>,
) -> &'a mut [T] {
    assert!(row < matrix.rows && cols.start <= cols.end && cols.end <= matrix.cols);
    // SAFETY: inside the buffer by the assertion; exclusive by the caller's promise.
    unsafe {
        let first = matrix.pointer().add(row * matrix.stride + cols.start);
        std::slice::from_raw_parts_mut(first, cols.len())
    }
}

/// One product: C[m, n] (=|+=) A[m, k] B[k, n] with `shape` = [m, n, k].
#[derive(Clone, Copy)]
pub(crate) struct Term {
    pub shape: [usize; 3],
    pub left: Left,
    pub right: Side,
    pub out: Out,
}

/// B of a product: floats, codes that are unpacked on the way, or integers that A becomes too.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Floats(Right),
    Codes(Codes),
    Integers(Integers),
}

// SAFETY: a Term is addresses; `products` makes its callers promise that they may be used.
unsafe impl Sync for Term {}

impl Term {
    /// Operations; each number of B counts as those of some rows, the time to bring it here.
    fn work(&self) -> usize {
        let [rows, cols, depth] = self.shape;
        let rows = if rows == 0 { 0 } else { rows + ROWS_TO_READ };
        2 * rows * cols * depth
    }

    /// Rows and columns of a block when C is cut into about `pieces` blocks.
    fn steps(&self, pieces: usize) -> (usize, usize) {
        let [rows, cols, _] = self.shape;
        if pieces <= 1 {
            return (rows, cols);
        }
        let most = (rows / ROWS_PER_BLOCK).clamp(1, pieces);
        // A block of a transposed A copies its part of both sides: rather fewer and larger ones, one a thread at least.
        let (row_blocks, pieces) = match self.left.col {
            1 => (most, pieces),
            _ => {
                let least = pieces.div_ceil(PIECES_PER_THREAD);
                ((rows / BLOCK_ROWS).clamp(least.min(most), most), least)
            }
        };
        // Rows first: a block of rows reads all of B once, and a block of columns all of A.
        let row_step = rows.div_ceil(row_blocks);
        let col_blocks = pieces.div_ceil(rows.div_ceil(row_step));
        (row_step, cols.div_ceil(col_blocks).next_multiple_of(PANEL))
    }

    /// Computes rows from `i` and columns from `j`, at most `steps` of each.
    unsafe fn block(&self, cx: &Cx, i: usize, j: usize, steps: (usize, usize), store: Store) {
        let [rows, cols, depth] = self.shape;
        let shape = [steps.0.min(rows - i), steps.1.min(cols - j), depth];
        // SAFETY: the block lies inside the operands.
        unsafe {
            let (left, out) = (self.left.at_row(i), self.out.from(i, j));
            match self.right {
                Side::Floats(right) => {
                    multiply(cx.isa, shape, left, right.at_column(j), out, store)
                }
                Side::Codes(codes) => {
                    multiply_codes(cx.isa, shape, left, codes.at_column(j), out, store)
                }
                Side::Integers(_) => unreachable!("integers have products of their own"),
            }
        }
    }
}

thread_local! {
    /// The terms and blocks of the products that this thread began, which keep their memory.
    static TERMS: Cell<Vec<Term>> = const { Cell::new(Vec::new()) };
    static BLOCKS: Cell<Vec<Place>> = const { Cell::new(Vec::new()) };
}

/// Computes all products; their outputs are disjoint.
///
/// # Safety
/// The addresses of every term are good for its shape, and no output overlaps an input or another output.
pub(crate) unsafe fn products(cx: &Cx, all: impl Iterator<Item = Term>, store: Store) {
    let mut terms = TERMS.take();
    terms.clear();
    terms.extend(all);
    // All terms of a call are groups of one weight.
    if let [Term { right: Side::Integers(_), .. }, ..] = terms[..] {
        // SAFETY: the caller's promise.
        unsafe { int8::products(cx, &terms, store) };
    } else {
        each_block(cx, &terms, 1, &|index, i, j, steps| {
            // SAFETY: the caller's promise; the blocks of a term are disjoint.
            unsafe { terms[index].block(cx, i, j, steps, store) };
        });
    }
    TERMS.set(terms);
}

/// A block: its term, first row and column, and the rows and columns of a whole one.
type Place = (usize, usize, usize, (usize, usize));

/// Cuts the products of all terms into blocks and calls `call(term, row, column, steps)` once for each, on the pool. They
/// are `speed_up` times as fast as products of floats.
pub(super) fn each_block(
    cx: &Cx,
    terms: &[Term],
    speed_up: usize,
    call: &(dyn Fn(usize, usize, usize, (usize, usize)) + Sync),
) {
    let total: usize = terms.iter().map(Term::work).sum();
    let wanted = pieces(cx, total / speed_up);
    if wanted == 1 {
        for (index, term) in terms.iter().enumerate() {
            call(index, 0, 0, (term.shape[0], term.shape[1]));
        }
        return;
    }
    let mut blocks = BLOCKS.take();
    blocks.clear();
    for (index, term) in terms.iter().enumerate() {
        let [rows, cols, _] = term.shape;
        let steps = term.steps((wanted * term.work()).div_ceil(total));
        for i in (0..rows).step_by(steps.0.max(1)) {
            blocks.extend((0..cols).step_by(steps.1.max(1)).map(|j| (index, i, j, steps)));
        }
    }
    cx.pool.run(blocks.len(), &|piece| {
        let (index, i, j, steps) = blocks[piece];
        call(index, i, j, steps);
    });
    BLOCKS.set(blocks);
}
