//! Absorbed attention of a sampler's rows against the paged latent cache.
//!
//! Knows no weights: queries come absorbed and rotated, and the latent that comes out is still to
//! be expanded. One cache row serves as key and value of all heads. Rows are taken in small groups;
//! where neighbours read the same pages (a prompt's own rows, samples of one prompt), their keys
//! are transposed once and their heads go through one product.
//!
//! Invariants:
//!   * a row's result depends on its query and on the tokens that it sees, not on its neighbours,
//!     on page size or page numbers
//!   * the operations are those of `mla_train` in the absorbed form, in the same order

use super::Cx;
use super::mla_train::{BLOCK, attempt, divide, softmax, transpose};
use super::tile::product;
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::kernels::{AttentionShape, DecodeBatch, Result, Store};
use std::ops::Range;

/// Query rows times heads in one group.
const GROUP: usize = 64;

/// See [`Kernels::mla_decode`](crate::Kernels::mla_decode).
pub(crate) fn mla_decode(
    cx: &Cx,
    shape: &AttentionShape,
    q: &Buffer,
    cache: &Buffer,
    batch: &DecodeBatch<'_>,
    o: &mut Buffer,
) -> Result<()> {
    check(shape, q, cache, batch, o);
    let o = o.host_mut();
    let job = Decode {
        shape,
        q: q.host(),
        cache: cache.host(),
        tables: batch.tables.host(),
        sequence: batch.sequence.host(),
        length: batch.length.host(),
        page_tokens: batch.page_tokens,
        o: &o,
    };
    let size = (GROUP / shape.heads).max(1);
    let seen: usize = (0..job.q.rows).map(|row| job.seen(row)).sum();
    let cost =
        2 * seen * shape.heads * (shape.query_width() + shape.value_width) / job.q.rows.max(1);
    attempt(cx, job.q.rows.div_ceil(size), cost * size, &|piece| {
        job.group(cx, piece * size..job.q.rows.min((piece + 1) * size))
    })
}

fn check(shape: &AttentionShape, q: &Buffer, cache: &Buffer, batch: &DecodeBatch<'_>, o: &Buffer) {
    let absorbed =
        shape.sharing == shape.heads && shape.head_stride == 0 && shape.value_offset == 0;
    assert!(
        absorbed && shape.value_width <= shape.key_width,
        "decode: attention in the absorbed form"
    );
    assert_eq!(q.cols(), shape.heads * shape.query_width(), "decode: columns of q");
    assert_eq!(cache.cols(), shape.query_width(), "decode: columns of the cache");
    assert_eq!(
        (o.rows(), o.cols()),
        (q.rows(), shape.heads * shape.value_width),
        "decode: shape of o"
    );
    for rows in [batch.sequence, batch.length] {
        assert_eq!(
            (rows.rows(), rows.cols()),
            (q.rows(), 1),
            "decode: one sequence and length per row"
        );
    }
    assert!(batch.page_tokens > 0, "decode: tokens of a page");
}

struct Decode<'a> {
    shape: &'a AttentionShape,
    q: Mat<'a, f32>,
    cache: Mat<'a, f32>,
    tables: Mat<'a, u32>,
    sequence: Mat<'a, u32>,
    length: Mat<'a, u32>,
    page_tokens: usize,
    o: &'a MatMut<'a, f32>,
}

/// Neighbouring rows that read the same slots for a block of keys.
struct Run {
    rows: Range<usize>,
    slots: [usize; BLOCK],
    count: usize,
}

impl Decode<'_> {
    fn seen(&self, row: usize) -> usize {
        self.length.row(row)[0] as usize
    }

    /// Attention of a group of neighbouring rows.
    fn group(&self, cx: &Cx, rows: Range<usize>) -> Result<()> {
        let (heads, width) = (self.shape.heads, self.shape.query_width());
        let longest =
            rows.clone().map(|row| self.seen(row)).max().unwrap_or(0).next_multiple_of(BLOCK);
        let mut panel = cx.arena.buffer(cx.scratch, DType::F32, 1, width * BLOCK)?;
        let mut scratch = cx.arena.buffer(cx.scratch, DType::F32, rows.len() * heads, longest)?;
        let (mut panel, mut scores) = (panel.host_mut::<f32>(), scratch.host_mut::<f32>());
        let panel = panel.row_mut(0);
        for first in (0..longest).step_by(BLOCK) {
            self.each_run(&rows, first, |run| {
                self.fill(run, panel);
                let to = (run.rows.start - rows.start) * heads;
                // SAFETY: the run's scores are rows of this group's scratch.
                unsafe {
                    let c = scores.pointer().add(to * longest + first);
                    self.score(cx, &run.rows, panel, c, longest);
                }
            });
        }
        let mut sums = Vec::with_capacity(scores.rows);
        for i in 0..scores.rows {
            let row = rows.start + i / heads;
            assert!(self.seen(row) > 0, "decode: row {row} sees no token");
            sums.push(softmax(cx.isa, scores.row_mut(i), self.seen(row), self.shape.scale).sum);
        }
        for first in (0..longest).step_by(BLOCK) {
            self.each_run(&rows, first, |run| {
                let from = (run.rows.start - rows.start) * heads;
                // SAFETY: as above, and a group's output rows are its own.
                unsafe {
                    let weights = scores.pointer().add(from * longest + first);
                    self.add_values(cx, run, weights, longest, first == 0);
                }
            });
        }
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: a group's output rows are its own.
            let row = unsafe { self.o.shared_row_mut(rows.start + i / heads) };
            let width = self.shape.value_width;
            divide(&mut row[i % heads * width..][..width], sum);
        }
        Ok(())
    }
    /// Calls `call` for every run of rows that share the slots of the keys from `first`.
    fn each_run(&self, rows: &Range<usize>, first: usize, mut call: impl FnMut(&Run)) {
        let mut open: Option<Run> = None;
        for row in rows.clone() {
            let next = self.run(row, first);
            open = match (open.take(), next) {
                (Some(run), Some(next)) if run.shares(&next) => Some(run.join(next)),
                (ended, next) => {
                    ended.iter().for_each(&mut call);
                    next
                }
            };
        }
        open.iter().for_each(&mut call);
    }

    /// The keys from `first` that one row sees; none if it ends before.
    fn run(&self, row: usize, first: usize) -> Option<Run> {
        let count = self.seen(row).saturating_sub(first).min(BLOCK);
        let table = self.tables.row(self.sequence.row(row)[0] as usize);
        let mut slots = [0; BLOCK];
        for (i, slot) in slots[..count].iter_mut().enumerate() {
            let token = first + i;
            *slot = table[token / self.page_tokens] as usize * self.page_tokens
                + token % self.page_tokens;
        }
        (count > 0).then_some(Run { rows: row..row + 1, slots, count })
    }

    /// Transposes a run's keys.
    fn fill(&self, run: &Run, panel: &mut [f32]) {
        let mut keys: [&[f32]; BLOCK] = [&[]; BLOCK];
        for (key, slot) in keys.iter_mut().zip(&run.slots[..run.count]) {
            *key = self.cache.row(*slot);
        }
        transpose(&keys[..run.count], panel);
    }

    /// Scores of all heads of some rows against a panel.
    ///
    /// # Safety
    /// `scores` is good for a row of BLOCK floats, `stride` apart, for each row and head.
    unsafe fn score(
        &self,
        cx: &Cx,
        rows: &Range<usize>,
        panel: &[f32],
        scores: *mut f32,
        stride: usize,
    ) {
        let (heads, width) = (self.shape.heads, self.shape.query_width());
        each_batch(rows, self.q.stride == heads * width, |row, count| {
            let query = self.q.row(rows.start + row).as_ptr();
            // SAFETY: a query's heads lie one after another, and so do the rows of a batch.
            unsafe {
                let to = scores.add(row * heads * stride);
                let m = count * heads;
                product(
                    cx.isa,
                    m,
                    BLOCK,
                    width,
                    query,
                    width,
                    1,
                    panel.as_ptr(),
                    BLOCK,
                    to,
                    stride,
                    Store::Set,
                );
            }
        });
    }

    /// Adds a run's weighted values to its output rows, or sets these from a row's first keys.
    ///
    /// # Safety `weights` is good for `run.count` floats, `stride` apart, for each row and head of
    /// the run; the run's output rows are the caller's own.
    unsafe fn add_values(
        &self,
        cx: &Cx,
        run: &Run,
        weights: *const f32,
        stride: usize,
        sets: bool,
    ) {
        let (heads, width) = (self.shape.heads, self.shape.value_width);
        each_batch(&run.rows, self.o.stride == heads * width, |row, count| {
            for keys in run.neighbours() {
                let store = if sets && keys.start == 0 { Store::Set } else { Store::Add };
                let value = self.cache.row(run.slots[keys.start]).as_ptr();
                // SAFETY: neighbouring slots are neighbouring cache rows; the rest is the caller's
                // promise.
                unsafe {
                    let from = weights.add(row * heads * stride + keys.start);
                    let to = self.o.pointer().add((run.rows.start + row) * self.o.stride);
                    let (m, k, b) = (count * heads, keys.len(), self.cache.stride);
                    product(cx.isa, m, width, k, from, stride, 1, value, b, to, width, store);
                }
            }
        });
    }
}

impl Run {
    /// True if both read the same slots as far as both go.
    fn shares(&self, other: &Run) -> bool {
        let common = self.count.min(other.count);
        self.rows.end == other.rows.start && self.slots[..common] == other.slots[..common]
    }

    fn join(self, next: Run) -> Run {
        let rows = self.rows.start..next.rows.end;
        if next.count > self.count { Run { rows, ..next } } else { Run { rows, ..self } }
    }

    /// Ranges of keys whose slots follow each other.
    fn neighbours(&self) -> impl Iterator<Item = Range<usize>> {
        let slots = &self.slots[..self.count];
        let mut first = 0;
        slots.chunk_by(|a, b| a + 1 == *b).map(move |chunk| {
            first += chunk.len();
            first - chunk.len()..first
        })
    }
}

/// Calls `call(first row, count)` for rows that one product can take: all if they follow each
/// other.
fn each_batch(rows: &Range<usize>, together: bool, mut call: impl FnMut(usize, usize)) {
    if together {
        call(0, rows.len());
    } else {
        (0..rows.len()).for_each(|row| call(row, 1));
    }
}

#[cfg(test)]
mod tests;
