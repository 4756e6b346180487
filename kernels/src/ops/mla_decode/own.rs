//! Keys that one row alone reads: where they lie in the cache, for the loops of `alone`.
//!
//! A row that shares no page with its neighbours goes through one loop as a whole; of rows that share a prompt,
//! each one's own blocks of keys go through the same loops one by one.

use super::super::Isa;
use super::super::lanes::LANES;
use super::super::mla_train::BLOCK;
use super::alone::{Alone, BlockScores, BlockValues, Values};
use super::{Cached, Decode, Run};
use crate::buffer::{Mat, MatMut};
use crate::kernels::AttentionShape;

/// A block of keys that one row alone reads, where they lie.
pub(super) struct Own<'a> {
    cache: &'a Mat<'a, f32>,
    /// First key of each vector; beyond `vectors` they mean nothing.
    first: [*const f32; BLOCK / LANES],
    vectors: usize,
}

impl Decode<'_> {
    /// True if a key is one run of floats and each page has whole vectors of keys.
    pub(super) fn is_plain(&self) -> bool {
        let AttentionShape { heads, sharing, key_width, rope_width, .. } = *self.shape;
        (rope_width == 0 || heads == sharing && key_width == self.shape.kv_width())
            && self.page_tokens.is_multiple_of(LANES)
    }

    /// A run's keys, if one row alone reads them and they can be read where they lie.
    pub(super) fn own(&self, run: &Run) -> Option<Own<'_>> {
        let Cached::Floats(cache) = &self.cache else { return None };
        let first = |i| cache.row(run.slots[i * LANES]).as_ptr();
        let vectors = run.count.div_ceil(LANES);
        (run.rows.len() == 1 && self.is_plain()).then(|| Own {
            cache,
            first: std::array::from_fn(first),
            vectors,
        })
    }

    /// Scores of a run of one row.
    ///
    /// # Safety
    /// `scores` is good for a row of BLOCK floats, `stride` apart, for each head.
    pub(super) unsafe fn own_scores(
        &self,
        isa: Isa,
        run: &Run,
        own: &Own<'_>,
        scores: *mut f32,
        stride: usize,
    ) {
        let AttentionShape { heads, sharing, head_stride, .. } = *self.shape;
        let (query, width) = (self.q.row(run.rows.start), self.shape.query_width());
        for key in 0..heads / sharing {
            let keys = own.first.map(|first| first.wrapping_add(key * head_stride));
            let job = BlockScores {
                heads: sharing,
                width,
                q: query[key * sharing * width..].as_ptr(),
                keys: &keys[..own.vectors],
                stride: own.cache.stride,
                scores: (scores.wrapping_add(key * sharing * stride), stride),
            };
            // SAFETY: pages of whole vectors lie in the cache; the caller's promise; `isa` was detected.
            unsafe { isa.run(job) };
        }
    }

    /// Adds a run's weighted values to the output of its one row, or sets it.
    ///
    /// # Safety
    /// `weights` is good for `run.count` floats, `stride` apart, for each head; the row is the caller's own.
    pub(super) unsafe fn own_values(
        &self,
        isa: Isa,
        run: &Run,
        own: &Own<'_>,
        weights: *const f32,
        stride: usize,
        adds: bool,
    ) {
        let AttentionShape { heads, sharing, head_stride, value_offset, value_width, .. } =
            *self.shape;
        // SAFETY: the caller's promise.
        let out = unsafe { self.o.shared_row_mut(run.rows.start) };
        for key in 0..heads / sharing {
            let head = key * sharing;
            let values = Values {
                weights: weights.wrapping_add(head * stride),
                padded: stride,
                keys: &own.first[..own.vectors],
                offset: key * head_stride + value_offset,
                stride: own.cache.stride,
                seen: run.count,
                out: out[head * value_width..].as_mut_ptr(),
                row: value_width,
                adds,
            };
            // SAFETY: the values lie in the cache behind their keys; `isa` was detected.
            unsafe { isa.run(BlockValues { heads: sharing, values }) };
        }
    }

    /// Attention of one row to floats; rows up to `end` are next.
    pub(super) fn alone(
        &self,
        isa: Isa,
        cache: &Mat<'_, f32>,
        row: usize,
        end: usize,
        keys: &mut Vec<*const f32>,
        scores: &mut MatMut<'_, f32>,
    ) {
        let AttentionShape { sharing, head_stride, value_offset, value_width, scale, .. } =
            *self.shape;
        let (seen, width) = (self.seen(row), self.shape.query_width());
        assert!(seen > 0, "decode: row {row} sees no token");
        keys.clear();
        let mut some = |row: usize, tokens: usize| {
            let table = self.table(row);
            let rows = (0..tokens).step_by(LANES).map(|token| self.slot(table, token));
            keys.extend(rows.map(|slot| cache.row(slot).as_ptr()));
        };
        some(row, seen);
        if row + 1 < end {
            some(row + 1, BLOCK.min(self.seen(row + 1)));
        }
        // SAFETY: a group's scratch has a row of scores for each head, and its output rows are its own.
        let (scores, out) = unsafe {
            let count = scores.rows * scores.stride;
            (std::slice::from_raw_parts_mut(scores.pointer(), count), self.o.shared_row_mut(row))
        };
        for head in 0..self.shape.heads / sharing {
            if head > 0 {
                keys.iter_mut().for_each(|key| *key = key.wrapping_add(head_stride));
            }
            let first = head * sharing;
            let job = Alone {
                heads: sharing,
                widths: (width, value_width),
                scale,
                q: self.q.row(row)[first * width..].as_ptr(),
                keys,
                stride: cache.stride,
                value: value_offset,
                seen,
                scores,
                out: out[first * value_width..].as_mut_ptr(),
            };
            // SAFETY: pages of whole vectors lie in the cache, and a row's heads in q and o.
            unsafe { job.run(isa) };
        }
    }
}
