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
        let groups = self.heads.div_ceil(L::HEADS);
        for group in 0..groups {
            let first = group * self.heads / groups;
            let count = (group + 1) * self.heads / groups - first;
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
            let mut block = 0;
            while block < blocks {
                let (to, keys) = (to.add(block * LANES), &self.keys[block..]);
                if block + 1 < blocks && L::KEYS == 2 {
                    let (now, then) = keys.split_at(2);
                    scores::<L, HEADS, 2>(q, width, now, then, self.stride, to, padded);
                    block += 2;
                } else {
                    let (now, then) = keys.split_at(1);
                    scores::<L, HEADS, 1>(q, width, now, then, self.stride, to, padded);
                    block += 1;
                }
            }
            let mut sums = [0.0; HEADS];
            for (i, sum) in sums.iter_mut().enumerate() {
                let row = &mut self.scores[i * padded..][..padded];
                *sum = softmax_row(row, self.seen, self.scale as f32).sum;
            }
            let out = self.out.add(first * value);
            let weights = self.scores.as_ptr();
            let mut column = 0;
            while column < value {
                let left = value - column;
                let at = Values {
                    weights,
                    padded,
                    keys: &self.keys[..blocks],
                    offset: self.value + column,
                    stride: self.stride,
                    seen: self.seen,
                    out: out.add(column),
                    row: value,
                };
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
                    column = value;
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                divide(std::slice::from_raw_parts_mut(out.add(i * value), value), sum);
            }
        }
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

/// Weighted sums of some columns of the values.
struct Values<'a> {
    weights: *const f32,
    /// Floats from a head's weights to the next one's.
    padded: usize,
    keys: &'a [*const f32],
    offset: usize,
    stride: usize,
    seen: usize,
    out: *mut f32,
    row: usize,
}

impl Values<'_> {
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
