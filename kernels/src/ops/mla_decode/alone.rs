//! Attention of one row to keys that none of its neighbours reads with it, in registers from end to end.
//!
//! Sixteen keys at a time are turned on their way from the cache and meet all query heads at once; nothing
//! is written but scores and output. It asks for keys that lie as one run of floats, and for pages of whole
//! vectors of keys. The operations are those of the general path, in the same order.

use super::super::Isa;
use super::super::lanes::{LANES, Lanes, OnLanes};
use super::super::mla_train::{BLOCK, divide, softmax_row};

/// One row's query heads that share a key, and where their numbers lie.
pub(super) struct Alone<'a> {
    /// Query heads.
    pub heads: usize,
    /// Width of a key and of a value.
    pub widths: (usize, usize),
    /// Softmax scale.
    pub scale: f64,
    /// Queries `[heads, key width]`.
    pub q: *const f32,
    /// First key of each LANES tokens, whose cache rows are `stride` floats apart; then those that
    /// are read next.
    pub keys: &'a [*const f32],
    /// Floats from a cache row to the next.
    pub stride: usize,
    /// Floats from a key to its value.
    pub value: usize,
    /// Tokens that the row sees.
    pub seen: usize,
    /// Scratch of whole blocks of keys for each of a group of heads.
    pub scores: &'a mut [f32],
    /// Output `[heads, value width]`.
    pub out: *mut f32,
}

impl Alone<'_> {
    /// Sets the output.
    ///
    /// # Safety
    /// The addresses are good for what their comments say, each key's up to a whole vector of rows.
    pub unsafe fn run(self, isa: Isa) {
        assert!(self.keys.len() >= self.seen.div_ceil(LANES), "decode: a key for each token");
        // SAFETY: the caller's promise; `isa` was detected.
        unsafe { isa.run(self) }
    }
}

/// Calls a function with the number of a group's heads as a constant.
macro_rules! with_heads {
    ($count:expr, $call:ident, $args:tt) => {
        match $count {
            1 => $call!(1, $args),
            2 => $call!(2, $args),
            3 => $call!(3, $args),
            4 => $call!(4, $args),
            5 => $call!(5, $args),
            _ => $call!(6, $args),
        }
    };
}

macro_rules! attend {
    ($heads:literal, ($self:ident, $first:ident)) => {
        $self.attend::<L, $heads>($first)
    };
}

impl OnLanes for Alone<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        for (first, count) in groups::<L>(self.heads) {
            // SAFETY: the group's heads are among the row's.
            unsafe { with_heads!(count, attend, (self, first)) };
        }
    }
}

impl Alone<'_> {
    /// All of a group of `HEADS` heads from `first`.
    #[inline(always)]
    unsafe fn attend<L: Lanes, const HEADS: usize>(&mut self, first: usize) {
        let (width, value) = self.widths;
        let blocks = self.seen.div_ceil(LANES);
        let padded = self.seen.next_multiple_of(BLOCK);
        // SAFETY: the addresses are good for the row's keys, queries and outputs.
        unsafe {
            let q = self.q.add(first * width);
            let to = self.scores.as_mut_ptr();
            all_scores::<L, HEADS>(q, width, self.keys, blocks, self.stride, to, padded);
            let mut sums = [0.0; HEADS];
            for (i, sum) in sums.iter_mut().enumerate() {
                let row = &mut self.scores[i * padded..][..padded];
                *sum = softmax_row(row, self.seen, self.scale as f32).sum;
            }
            let out = self.out.add(first * value);
            let values = Values {
                weights: self.scores.as_ptr(),
                padded,
                keys: &self.keys[..blocks],
                offset: self.value,
                stride: self.stride,
                seen: self.seen,
                out,
                row: value,
                adds: false,
            };
            values.all::<L, HEADS>(value);
            for (i, sum) in sums.into_iter().enumerate() {
                divide(std::slice::from_raw_parts_mut(out.add(i * value), value), sum);
            }
        }
    }
}

/// The keys of one block that a row alone reads, beside others that it shares: its scores there.
pub(super) struct BlockScores<'a> {
    pub heads: usize,
    pub width: usize,
    /// Queries `[heads, width]`.
    pub q: *const f32,
    /// First key of each LANES tokens.
    pub keys: &'a [*const f32],
    pub stride: usize,
    /// Scores of the first head, and floats to the next one's.
    pub scores: (*mut f32, usize),
}

macro_rules! score {
    ($heads:literal, ($self:ident, $q:ident, $to:ident)) => {
        all_scores::<L, $heads>(
            $q,
            $self.width,
            $self.keys,
            $self.keys.len(),
            $self.stride,
            $to,
            $self.scores.1,
        )
    };
}

impl OnLanes for BlockScores<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (first, count) in groups::<L>(self.heads) {
            // SAFETY: the group's heads are among the row's.
            unsafe {
                let q = self.q.add(first * self.width);
                let to = self.scores.0.add(first * self.scores.1);
                with_heads!(count, score, (self, q, to));
            }
        }
    }
}

/// The same keys' weighted values, which are added to the output or set it.
pub(super) struct BlockValues<'a> {
    pub heads: usize,
    pub values: Values<'a>,
}

macro_rules! sum {
    ($heads:literal, ($group:ident, $width:ident)) => {
        $group.all::<L, $heads>($width)
    };
}

impl OnLanes for BlockValues<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (values, width) = (self.values, self.values.row);
        for (first, count) in groups::<L>(self.heads) {
            // SAFETY: the group's heads are among the row's.
            unsafe {
                let group = Values {
                    weights: values.weights.add(first * values.padded),
                    out: values.out.add(first * width),
                    ..values
                };
                with_heads!(count, sum, (group, width));
            }
        }
    }
}

/// Groups of nearly as many heads, which registers hold, as (first, count).
#[inline(always)]
fn groups<L: Lanes>(heads: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = heads.div_ceil(L::HEADS);
    (0..count).map(move |i| (i * heads / count, (i + 1) * heads / count - i * heads / count))
}

/// Scores of `HEADS` heads against the first `blocks` of `keys`.
#[inline(always)]
unsafe fn all_scores<L: Lanes, const HEADS: usize>(
    q: *const f32,
    width: usize,
    keys: &[*const f32],
    blocks: usize,
    stride: usize,
    to: *mut f32,
    row: usize,
) {
    let mut block = 0;
    while block < blocks {
        let vectors = if block + 1 < blocks && L::KEYS == 2 { 2 } else { 1 };
        let (now, then) = keys[block..].split_at(vectors);
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.add(block * LANES);
            match vectors {
                2 => scores::<L, HEADS, 2>(q, width, now, then, stride, to, row),
                _ => scores::<L, HEADS, 1>(q, width, now, then, stride, to, row),
            }
        }
        block += vectors;
    }
}

/// Scores of `HEADS` heads against `VECTORS` vectors of keys; asks for the keys `then` meanwhile.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn scores<L: Lanes, const HEADS: usize, const VECTORS: usize>(
    q: *const f32,
    width: usize,
    now: &[*const f32],
    then: &[*const f32],
    stride: usize,
    to: *mut f32,
    row: usize,
) {
    // SAFETY: sixteen keys lie behind each address, and a vector of scores for each behind `to`.
    unsafe {
        let mut sums = [[L::splat(0.0); VECTORS]; HEADS];
        let whole = width / 8 * 8;
        for column in (0..whole).step_by(8) {
            if column % LANES == 0 {
                for next in &then[..then.len().min(VECTORS)] {
                    // Line by line as they lie, which the processor's own prefetching takes up.
                    for line in column..column + LANES {
                        L::prefetch(next.wrapping_add(line * LANES));
                    }
                }
            }
            let mut turned = [[L::splat(0.0); 8]; VECTORS];
            for v in 0..VECTORS {
                turned[v] = L::turned(now[v].add(column), stride);
            }
            for p in 0..8 {
                for i in 0..HEADS {
                    let x = L::splat(*q.add(i * width + column + p));
                    for v in 0..VECTORS {
                        sums[i][v] = L::fma(x, turned[v][p], sums[i][v]);
                    }
                }
            }
        }
        for column in whole..width {
            for v in 0..VECTORS {
                let key: [f32; LANES] =
                    std::array::from_fn(|key| *now[v].add(key * stride + column));
                let key = L::load(key.as_ptr());
                for i in 0..HEADS {
                    sums[i][v] = L::fma(L::splat(*q.add(i * width + column)), key, sums[i][v]);
                }
            }
        }
        for i in 0..HEADS {
            for v in 0..VECTORS {
                L::store(to.add(i * row + v * LANES), sums[i][v]);
            }
        }
    }
}

/// Weighted sums of the values.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// Weights of the first head.
    pub weights: *const f32,
    /// Floats from a head's weights to the next one's.
    pub padded: usize,
    /// First key of each LANES tokens.
    pub keys: &'a [*const f32],
    /// Floats from a key to its value.
    pub offset: usize,
    /// Floats from a cache row to the next.
    pub stride: usize,
    /// Tokens.
    pub seen: usize,
    /// Output of the first head.
    pub out: *mut f32,
    /// Floats from a head's output to the next one's.
    pub row: usize,
    /// Whether the output is added to.
    pub adds: bool,
}

impl Values<'_> {
    /// All `width` columns of `HEADS` heads.
    #[inline(always)]
    unsafe fn all<L: Lanes, const HEADS: usize>(self, width: usize) {
        let mut column = 0;
        while column < width {
            let left = width - column;
            // SAFETY: the columns are the values' own.
            unsafe {
                let at = Values { offset: self.offset + column, out: self.out.add(column), ..self };
                if left >= 4 * LANES && L::KEYS == 2 {
                    at.add::<L, HEADS, 4, false>(LANES);
                    column += 4 * LANES;
                } else if left >= 2 * LANES {
                    at.add::<L, HEADS, 2, false>(LANES);
                    column += 2 * LANES;
                } else if left >= LANES {
                    at.add::<L, HEADS, 1, false>(LANES);
                    column += LANES;
                } else {
                    at.add::<L, HEADS, 1, true>(left);
                    column = width;
                }
            }
        }
    }

    /// `VECTORS` vectors of columns, or `columns` of one if `MASKED`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn add<L: Lanes, const HEADS: usize, const VECTORS: usize, const MASKED: bool>(
        self,
        columns: usize,
    ) {
        // SAFETY: the columns are the values' own, for each key that the row sees.
        unsafe {
            let mut sums = [[L::splat(0.0); VECTORS]; HEADS];
            if self.adds {
                for i in 0..HEADS {
                    for v in 0..VECTORS {
                        let from = self.out.add(i * self.row + v * LANES);
                        sums[i][v] = match MASKED {
                            true => L::load_some(from, columns),
                            false => L::load(from),
                        };
                    }
                }
            }
            for (block, key) in self.keys.iter().enumerate() {
                let mut from = key.add(self.offset);
                let mut weights = self.weights.add(block * LANES);
                for _ in 0..LANES.min(self.seen - block * LANES) {
                    let mut values = [L::splat(0.0); VECTORS];
                    for v in 0..VECTORS {
                        values[v] = match MASKED {
                            true => L::load_some(from, columns),
                            false => L::load(from.add(v * LANES)),
                        };
                    }
                    for i in 0..HEADS {
                        let x = L::splat(*weights.add(i * self.padded));
                        for v in 0..VECTORS {
                            sums[i][v] = L::fma(x, values[v], sums[i][v]);
                        }
                    }
                    from = from.add(self.stride);
                    weights = weights.add(1);
                }
            }
            for i in 0..HEADS {
                for v in 0..VECTORS {
                    let to = self.out.add(i * self.row + v * LANES);
                    match MASKED {
                        true => L::store_some(to, columns, sums[i][v]),
                        false => L::store(to, sums[i][v]),
                    }
                }
            }
        }
    }
}
