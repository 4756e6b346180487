//! Attention of a sampler's rows against the paged cache: MLA absorbed, GQA, or any other shape.
//!
//! Knows no weights: queries come rotated (and absorbed), and a latent that comes out is still to
//! be expanded. A cache row is a token's row of kv, then its shared rope key. Rows are taken in
//! small groups; where neighbours read the same pages (a prompt's own rows, samples of one prompt),
//! their keys are transposed once and the heads that share a key go through one product. Rows in
//! codes are unpacked block by block; then they are rows of floats.
//!
//! Invariants:
//!   * a row's result depends on its query and on the tokens that it sees, not on its neighbours,
//!     on page size or page numbers
//!   * the operations are those of `mla_train` of the same shape, in the same order

mod alone;
mod own;

use super::cache_rows::Coded;
use super::lanes::LANES;
use super::mla_train::{BLOCK, attempt, divide, softmax};
use super::tile::{Left, Next, Out, Right, multiply, product};
use super::transpose::transpose;
use super::{Cx, Isa};
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::format::{CacheFormat, CacheLayout, CacheSpec};
use crate::kernels::{AttentionShape, DecodeBatch, Result, Store};
use std::cell::Cell;
use std::ops::Range;

/// Query rows times heads in one group.
pub(crate) const GROUP: usize = 64;

/// See [`Kernels::mla_decode`](crate::Kernels::mla_decode).
pub(crate) fn mla_decode(
    cx: &Cx,
    shape: &AttentionShape,
    q: &Buffer,
    spec: &CacheSpec<'_>,
    cache: &Buffer,
    batch: &DecodeBatch<'_>,
    o: &mut Buffer,
) -> Result<()> {
    check(shape, q, &spec.layout, batch, o);
    let o = o.host_mut();
    let job = Decode {
        shape,
        q: q.host(),
        cache: match spec.layout.format {
            CacheFormat::F32 => Cached::Floats(cache.host()),
            _ => Cached::Codes(Coded::new(spec, cache)),
        },
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

fn check(
    shape: &AttentionShape,
    q: &Buffer,
    layout: &CacheLayout,
    batch: &DecodeBatch<'_>,
    o: &Buffer,
) {
    assert!(shape.heads.is_multiple_of(shape.sharing), "decode: heads in equal groups");
    assert_eq!(q.cols(), shape.heads * shape.query_width(), "decode: columns of q");
    assert_eq!(
        (layout.latent, layout.rope),
        (shape.kv_width(), shape.rope_width),
        "decode: numbers of a cache row"
    );
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

/// What a thread lists of a group of rows; it keeps its memory.
#[derive(Default)]
struct Lists {
    /// Addresses of a row's keys, a vector of them apart.
    keys: Vec<*const f32>,
    /// Sums of a family's softmaxes.
    sums: Vec<f32>,
}

thread_local! {
    static LISTS: Cell<Lists> = const { Cell::new(Lists { keys: Vec::new(), sums: Vec::new() }) };
}

struct Decode<'a> {
    shape: &'a AttentionShape,
    q: Mat<'a, f32>,
    cache: Cached<'a>,
    tables: Mat<'a, u32>,
    sequence: Mat<'a, u32>,
    length: Mat<'a, u32>,
    page_tokens: usize,
    o: &'a MatMut<'a, f32>,
}

/// The cache's rows: floats that are read where they lie, or codes that are unpacked first.
enum Cached<'a> {
    Floats(Mat<'a, f32>),
    Codes(Coded<'a>),
}

impl Cached<'_> {
    /// Floats that a block of keys is unpacked to.
    fn scratch(&self) -> usize {
        match self {
            Cached::Floats(_) => 0,
            Cached::Codes(codes) => BLOCK * codes.width(),
        }
    }

    /// The floats that a run's keys lie in, and the run with its slots there.
    fn floats<'s>(&'s self, isa: Isa, run: &Run, scratch: &'s mut [f32]) -> (Mat<'s, f32>, Run) {
        let rows = run.rows.clone();
        match self {
            Cached::Floats(floats) => (*floats, Run { rows, ..*run }),
            Cached::Codes(codes) => {
                for (to, slot) in
                    scratch.chunks_exact_mut(codes.width()).zip(&run.slots[..run.count])
                {
                    codes.read(isa, *slot, to);
                }
                let slots = std::array::from_fn(|i| i);
                (Mat::of(scratch, codes.width()), Run { rows, slots, count: run.count })
            }
        }
    }
}

/// Query heads that one product takes: neighbours in a row, or one head of neighbouring rows. Row
/// and head count from the first of a run and of the heads that share a key.
struct Batch {
    row: usize,
    head: usize,
    count: usize,
    along_rows: bool,
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
        let width = self.shape.query_width();
        let longest =
            rows.clone().map(|row| self.seen(row)).max().unwrap_or(0).next_multiple_of(BLOCK);
        let both = width * BLOCK + self.cache.scratch();
        let mut panel = cx.arena.buffer(cx.scratch, DType::F32, 1, both)?;
        let shape = (rows.len() * self.shape.heads, longest);
        let mut scores = cx.arena.buffer(cx.scratch, DType::F32, shape.0, shape.1)?;
        let (mut panel, mut scores) = (panel.host_mut::<f32>(), scores.host_mut::<f32>());
        let mut first = rows.start;
        let mut lists = LISTS.take();
        for row in rows.clone() {
            // Rows that share no page go one by one: their second look at the cache is at a near one.
            if row + 1 == rows.end
                || self.slot(self.table(row + 1), 0) != self.slot(self.table(first), 0)
            {
                match &self.cache {
                    Cached::Floats(cache) if row == first && self.is_plain() => {
                        self.alone(cx.isa, cache, row, rows.end, &mut lists.keys, &mut scores);
                    }
                    _ => {
                        let scratch = (panel.row_mut(0), &mut lists.sums);
                        self.family(cx, first..row + 1, rows.end, scratch, &mut scores);
                    }
                }
                first = row + 1;
            }
        }
        LISTS.set(lists);
        Ok(())
    }

    /// Attention of neighbouring rows that begin with the same page; rows up to `end` are next.
    fn family(
        &self,
        cx: &Cx,
        rows: Range<usize>,
        end: usize,
        (scratch, sums): (&mut [f32], &mut Vec<f32>),
        scores: &mut MatMut<'_, f32>,
    ) {
        let heads = self.shape.heads;
        let longest = scores.stride;
        let blocks = rows.clone().map(|row| self.seen(row)).max().unwrap_or(0).div_ceil(BLOCK);
        let (panel, unpacked) = scratch.split_at_mut(self.shape.query_width() * BLOCK);
        for first in (0..blocks * BLOCK).step_by(BLOCK) {
            self.each_run(&rows, first, |run| {
                let to = (run.rows.start - rows.start) * heads;
                if let Some(own) = self.own(run) {
                    // SAFETY: the run's scores are rows of this group's scratch.
                    unsafe {
                        let c = scores.pointer().add(to * longest + first);
                        self.own_scores(cx.isa, run, &own, c, longest);
                    }
                    return;
                }
                let next = self.next(run, first, end);
                let (from, run) = &self.cache.floats(cx.isa, run, unpacked);
                for key in 0..heads / self.shape.sharing {
                    self.fill(cx.isa, from, run, key, panel);
                    // SAFETY: the run's scores are rows of this group's scratch.
                    unsafe {
                        let c = scores.pointer().add(to * longest + first);
                        self.score(cx, run, key, (panel, next), c, longest);
                    }
                }
            });
        }
        sums.clear();
        for i in 0..rows.len() * heads {
            let row = rows.start + i / heads;
            assert!(self.seen(row) > 0, "decode: row {row} sees no token");
            let scores = &mut scores.row_mut(i)[..blocks * BLOCK];
            sums.push(softmax(cx.isa, scores, self.seen(row), self.shape.scale).sum);
        }
        for first in (0..blocks * BLOCK).step_by(BLOCK) {
            self.each_run(&rows, first, |run| {
                let at = (run.rows.start - rows.start) * heads;
                if let Some(own) = self.own(run) {
                    // SAFETY: as above, and a group's output rows are its own.
                    unsafe {
                        let weights = scores.pointer().add(at * longest + first);
                        self.own_values(cx.isa, run, &own, weights, longest, first > 0);
                    }
                    return;
                }
                let (from, run) = &self.cache.floats(cx.isa, run, unpacked);
                // SAFETY: as above, and a group's output rows are its own.
                unsafe {
                    let weights = scores.pointer().add(at * longest + first);
                    self.add_values(cx, from, run, weights, longest, first == 0);
                }
            });
        }
        for (i, sum) in sums.drain(..).enumerate() {
            // SAFETY: a group's output rows are its own.
            let row = unsafe { self.o.shared_row_mut(rows.start + i / heads) };
            let width = self.shape.value_width;
            divide(&mut row[i % heads * width..][..width], sum);
        }
    }

    /// The cache rows that are read after a run's keys from `first`: its next block's, or the first of the
    /// row after it.
    fn next(&self, run: &Run, first: usize, end: usize) -> Next {
        let Cached::Floats(rows) = &self.cache else { return Next::Nothing };
        let (row, token) = match first + BLOCK {
            token if token < self.seen(run.rows.start) => (run.rows.start, token),
            _ => (run.rows.end, 0),
        };
        if row >= end || self.shape.sharing != self.shape.heads {
            return Next::Nothing;
        }
        Next::At(rows.row(self.slot(self.table(row), token)).as_ptr())
    }

    /// Pages of the tokens that `row` sees.
    fn table(&self, row: usize) -> &[u32] {
        self.tables.row(self.sequence.row(row)[0] as usize)
    }

    /// Cache row of a token, by the table of its sequence.
    fn slot(&self, table: &[u32], token: usize) -> usize {
        table[token / self.page_tokens] as usize * self.page_tokens + token % self.page_tokens
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
        let table = self.table(row);
        let mut slots = [0; BLOCK];
        let mut filled = 0;
        while filled < count {
            let (slot, rest) = (self.slot(table, first + filled), first + filled);
            let some = (self.page_tokens - rest % self.page_tokens).min(count - filled);
            slots[filled..filled + some].iter_mut().zip(slot..).for_each(|(to, slot)| *to = slot);
            filled += some;
        }
        (count > 0).then_some(Run { rows: row..row + 1, slots, count })
    }

    /// Transposes a run's keys of key-value head `key`: the key part, then the rope part.
    fn fill(&self, isa: Isa, from: &Mat<'_, f32>, run: &Run, key: usize, panel: &mut [f32]) {
        let (keys, ropes) = panel.split_at_mut(self.shape.key_width * BLOCK);
        turn(isa, from, run, key * self.shape.head_stride, keys);
        turn(isa, from, run, self.shape.kv_width(), ropes);
    }

    /// Scores of the heads that share key-value head `key`, of a run's rows, against its panel.
    ///
    /// # Safety
    /// `scores` is good for a row of BLOCK floats, `stride` apart, for each row and head.
    unsafe fn score(
        &self,
        cx: &Cx,
        Run { rows, count, .. }: &Run,
        key: usize,
        (panel, next): (&[f32], Next),
        scores: *mut f32,
        stride: usize,
    ) {
        let (heads, width) = (self.shape.heads, self.shape.query_width());
        // What lies behind the keys is the softmax's to clear.
        let keys = count.next_multiple_of(LANES);
        self.each_batch(rows, self.q.stride == heads * width, |batch| {
            let head = key * self.shape.sharing + batch.head;
            let query = self.q.row(rows.start + batch.row)[head * width..].as_ptr();
            let (from, by) =
                if batch.along_rows { (self.q.stride, heads * stride) } else { (width, stride) };
            // SAFETY: a query's heads lie one after another, and so do the rows of a batch.
            unsafe {
                let to = scores.add((batch.row * heads + head) * stride);
                let left = Left { at: query, row: from, col: 1 };
                let right = Right { at: panel.as_ptr(), row: BLOCK, panel: panel.len(), next };
                let out = Out { at: to, row: by };
                multiply(cx.isa, [batch.count, keys, width], left, right, out, Store::Set);
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
        from: &Mat<'_, f32>,
        run: &Run,
        weights: *const f32,
        stride: usize,
        sets: bool,
    ) {
        let (heads, width) = (self.shape.heads, self.shape.value_width);
        let shape = self.shape;
        for key in 0..heads / shape.sharing {
            let column = key * shape.head_stride + shape.value_offset;
            self.each_batch(&run.rows, self.o.stride == heads * width, |batch| {
                let head = key * shape.sharing + batch.head;
                let (by, out) = match batch.along_rows {
                    true => (heads * stride, self.o.stride),
                    false => (stride, width),
                };
                for keys in run.neighbours() {
                    let store = if sets && keys.start == 0 { Store::Set } else { Store::Add };
                    let value = from.row(run.slots[keys.start])[column..].as_ptr();
                    // SAFETY: neighbouring slots are neighbouring cache rows; the rest is the
                    // caller's promise.
                    unsafe {
                        let weights = weights.add((batch.row * heads + head) * stride + keys.start);
                        let row = (run.rows.start + batch.row) * self.o.stride;
                        let to = self.o.pointer().add(row + head * width);
                        let (m, k, b) = (batch.count, keys.len(), from.stride);
                        product(cx.isa, m, width, k, weights, by, 1, value, b, to, out, store);
                    }
                }
            });
        }
    }

    /// Calls `call` for the query heads of some rows that share a key: all at once if they lie
    /// `together`, else along the longer side.
    fn each_batch(&self, rows: &Range<usize>, together: bool, call: impl FnMut(Batch)) {
        let (rows, sharing) = (rows.len(), self.shape.sharing);
        let along = |along_rows, count| move |row, head| Batch { row, head, count, along_rows };
        if together && sharing == self.shape.heads {
            std::iter::once(along(false, rows * sharing)(0, 0)).for_each(call);
        } else if rows > sharing {
            (0..sharing).map(|head| along(true, rows)(0, head)).for_each(call);
        } else {
            (0..rows).map(|row| along(false, sharing)(row, 0)).for_each(call);
        }
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

/// Transposes as many columns from `first` of a run's rows as `panel` holds.
fn turn(isa: Isa, from: &Mat<'_, f32>, run: &Run, first: usize, panel: &mut [f32]) {
    let mut rows: [&[f32]; BLOCK] = [&[]; BLOCK];
    for (row, slot) in rows.iter_mut().zip(&run.slots[..run.count]) {
        *row = &from.row(*slot)[first..][..panel.len() / BLOCK];
    }
    transpose(isa, &rows[..run.count], panel);
}

#[cfg(test)]
mod tests;
