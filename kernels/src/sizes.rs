//! Bytes that an arena holds for what is asked of it, before it is asked: pure functions of shapes.
//!
//! Of operations, what they hold beside their arguments while they run. Plans of memory are made of these; tests hold them
//! against arenas that the operations ran on.

use crate::arena::{Kind, WASTE, rounded};
use crate::attention::AttentionShape;
use crate::format::WeightFormat;
use crate::kernels::ROW_GAP;
use crate::ops::head_logprob::ROWS as HEAD_ROWS;
use crate::ops::mla_decode::GROUP;
use crate::ops::mla_train::{BLOCK, ROWS};
use crate::ops::pack;
use crate::packed::Pack;

/// The budget that suffices for so many bytes in use, whatever larger regions serve.
pub fn budget_for(bytes: u64) -> u64 {
    bytes + bytes.div_ceil(WASTE - 1)
}

/// Bytes of a buffer of activations or scratch: `rows x cols` numbers of four bytes.
pub fn scratch(rows: usize, cols: usize) -> u64 {
    rounded(Kind::Activations, 4 * rows * cols)
}

/// Bytes of a slab of so many f32 numbers.
pub fn slab(kind: Kind, elements: usize) -> u64 {
    rounded(kind, 4 * elements)
}

/// Bytes of a weight of `rows x cols` numbers, packed: codes and, where the format has them, scales.
pub fn packed(rows: usize, cols: usize, pack: Pack, format: WeightFormat) -> u64 {
    let of = |bytes| rounded(Kind::Packed, bytes);
    let (_, count, width) = pack::shape(cols, pack, format);
    let scales = pack::scales_shape(rows, cols, pack, format);
    of(count * width) + scales.map_or(0, |(rows, cols)| of(4 * rows * cols))
}

/// Rows of a pass over documents, as attention sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionRows {
    /// All of them.
    pub rows: usize,
    /// Segments: documents, and branches of shared stems.
    pub segments: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

/// What attention over documents holds while it runs forward on so many threads: panels of keys, and each thread's scores.
pub fn attention(shape: &AttentionShape, of: AttentionRows, threads: usize) -> u64 {
    let seen = of.longest.next_multiple_of(BLOCK);
    panels(shape, of, shape.query_width()) + threads as u64 * scratch(ROWS, seen)
}

/// The same of its backward pass.
pub fn attention_backward(shape: &AttentionShape, of: AttentionRows, threads: usize) -> u64 {
    let seen = of.longest.next_multiple_of(BLOCK);
    let values = match shape.value_offset == 0 && shape.value_width <= shape.key_width {
        true => 0,
        false => panels(shape, of, shape.value_width),
    };
    let heads = |width| scratch(shape.heads * of.rows, width);
    panels(shape, of, shape.query_width())
        + values
        + heads(shape.query_width())
        + heads(shape.value_width)
        + scratch(of.rows, shape.heads)
        + 2 * threads as u64 * scratch(ROWS, seen)
}

/// Panels of keys or values. A segment begins a panel of its own, and a branch repeats its stem's last one at most.
fn panels(shape: &AttentionShape, of: AttentionRows, width: usize) -> u64 {
    let panels = of.rows / BLOCK + 2 * of.segments;
    scratch(shape.heads / shape.sharing * panels, width * BLOCK)
}

/// What attention of a sampler's rows holds on so many threads, whose longest sequence has `longest` tokens; `coded` is the
/// width of a cache row that is not kept in f32, else 0.
pub fn attention_decode(
    shape: &AttentionShape,
    longest: usize,
    coded: usize,
    threads: usize,
) -> u64 {
    let rows = (GROUP / shape.heads).max(1) * shape.heads;
    let panel = scratch(1, (shape.query_width() + coded) * BLOCK);
    threads as u64 * (panel + scratch(rows, longest.next_multiple_of(BLOCK)))
}

/// What a chunk of a prompt holds while it attends to `tokens` expanded ones.
pub fn attention_prefill(shape: &AttentionShape, tokens: usize, threads: usize) -> u64 {
    let of = AttentionRows { rows: tokens, segments: 1, longest: tokens };
    attention(shape, of, threads) + threads as u64 * scratch(ROWS, shape.value_width)
}

/// The routes of `rows` tokens to `choices` of `experts` each, and what finding them holds.
pub fn routes(rows: usize, choices: usize, experts: usize) -> u64 {
    2 * scratch(1, experts + 1) + scratch(rows * choices, 1) + scratch(rows, choices)
}

/// A tile of logits, where no probabilities are kept.
pub fn head_tile(rows: usize, vocabulary: usize) -> u64 {
    scratch(rows.min(HEAD_ROWS), vocabulary + ROW_GAP)
}

/// Probabilities that are kept for a backward pass.
pub fn head_kept(rows: usize, vocabulary: usize) -> u64 {
    scratch(rows, vocabulary + ROW_GAP)
}
