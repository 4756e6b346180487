//! What one call of each operation costs at least, from its shapes: FLOPs and bytes.
//!
//! FLOPs: a product of m x k by k x n is 2 m k n. An addition, multiplication, division, comparison, exponential or root
//! elsewhere is one each; those of a softmax beside a product (attention, head) are not counted, so that the counts of
//! products are those of a model's formula. What an operation computes again that an earlier one has already made
//! (scores in attention's gradient, logits in the head's) is `recomputed`. Padding, masked scores and the like are work
//! that nobody asked for: they are not counted, and show as a low share of the roof.
//!
//! Bytes: everything that is read or written, once, in the type that it is kept in. `resting` are those of what rests
//! between calls (weights, gradients, moments, cache), `passing` those of activations.

use crate::attention::{AttentionShape, DecodeBatch};
use crate::buffer::Buffer;
use crate::format::WeightFormat;
use crate::kernels::{Kernels, Store};
use crate::packed::{Pack, Packed, Product};
use crate::routing::Routes;

/// What a call costs at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Operations that nothing else has made.
    pub flops: f64,
    /// Operations that repeat earlier ones.
    pub recomputed: f64,
    /// True if they are of 8-bit integers.
    pub is_int8: bool,
    /// Bytes of what rests between calls.
    pub resting: f64,
    /// Bytes of what passes.
    pub passing: f64,
    /// What tells calls of one operation apart: width in and out of a product, else 0.
    pub shape: [usize; 2],
}

/// Bytes of a buffer's elements.
fn bytes(buffer: &Buffer) -> f64 {
    (buffer.len() * buffer.dtype().size()) as f64
}

/// Bytes of several.
fn all(buffers: &[&Buffer]) -> f64 {
    buffers.iter().map(|buffer| bytes(buffer)).sum()
}

/// How often an output is touched.
fn touched(store: Store) -> f64 {
    match store {
        Store::Set => 1.0,
        Store::Add => 2.0,
    }
}

/// Copies of host numbers, in or out.
pub(super) fn movement(host_bytes: usize, device: &Buffer) -> Cost {
    Cost { passing: host_bytes as f64 + bytes(device), ..Cost::default() }
}

/// `flops` for each element of the first buffer; all buffers are touched once.
pub(super) fn elementwise(flops: f64, buffers: &[&Buffer]) -> Cost {
    Cost { flops: flops * buffers[0].len() as f64, passing: all(buffers), ..Cost::default() }
}

/// The same on what rests.
pub(super) fn resting(flops: f64, buffers: &[&Buffer]) -> Cost {
    Cost { flops: flops * buffers[0].len() as f64, resting: all(buffers), ..Cost::default() }
}

/// Packing: the weight's rows are read, their codes written.
pub(super) fn pack(weight: &Buffer, pack: &Pack, format: WeightFormat) -> Cost {
    let elements = pack.groups * pack.rows * weight.cols();
    let resting = elements * (weight.dtype().size() + format.code_bytes());
    Cost { resting: resting as f64, ..Cost::default() }
}

/// Rows of x times a packed weight, for `products` groups of it whose widths are the weight's.
fn product(rows: usize, weight: &Packed, products: f64, store: Store, size: usize) -> Cost {
    let (inputs, outputs) = (weight.inputs as f64, weight.outputs as f64);
    let each = rows as f64 * products;
    Cost {
        flops: 2.0 * each * inputs * outputs,
        is_int8: is_int8(weight),
        resting: weight.bytes() as f64,
        passing: each * (inputs + touched(store) * outputs) * size as f64,
        shape: [weight.inputs, weight.outputs],
        ..Cost::default()
    }
}

/// Products of this weight multiply integers.
fn is_int8(weight: &Packed) -> bool {
    weight.format == WeightFormat::Int8 && weight.product == Product::Transposed
}

/// See [`Kernels::linear`].
pub(super) fn linear(x: &Buffer, weight: &Packed, store: Store) -> Cost {
    product(x.rows(), weight, 1.0, store, x.dtype().size())
}

/// See [`Kernels::linear_heads`].
pub(super) fn linear_heads(x: &Buffer, weight: &Packed, store: Store) -> Cost {
    product(x.rows(), weight, weight.groups as f64, store, x.dtype().size())
}

/// See [`Kernels::linear_experts`]: weights of experts that have a slot.
pub(super) fn linear_experts(
    kernels: &dyn Kernels,
    x: &Buffer,
    weight: &Packed,
    routes: &Routes,
) -> Cost {
    let cost = product(routes.slots(), weight, 1.0, Store::Set, x.dtype().size());
    Cost { resting: cost.resting * used_share(kernels, routes), ..cost }
}

/// The share of the experts that have a slot.
fn used_share(kernels: &dyn Kernels, routes: &Routes) -> f64 {
    let offsets = kernels.download_indices(&routes.offsets);
    let used = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
    used as f64 / routes.experts.max(1) as f64
}

/// A gradient of `rows x cols` of a weight, in so many groups, over `terms` rows of dy and x.
fn weight_gradient(terms: usize, [rows, cols]: [usize; 2], groups: usize, size: usize) -> Cost {
    let elements = (groups * rows * cols) as f64;
    Cost {
        flops: 2.0 * terms as f64 * elements,
        resting: 2.0 * elements * size as f64,
        passing: (terms * groups * (rows + cols) * size) as f64,
        shape: [cols, rows],
        ..Cost::default()
    }
}

/// See [`Kernels::linear_backward_weight`].
pub(super) fn linear_backward_weight(dy: &Buffer, x: &Buffer) -> Cost {
    weight_gradient(dy.rows(), [dy.cols(), x.cols()], 1, x.dtype().size())
}

/// See [`Kernels::linear_heads_backward_weight`].
pub(super) fn linear_heads_backward_weight(dy: &Buffer, pack: &Pack, dw: &Buffer) -> Cost {
    weight_gradient(dy.rows(), [pack.rows, dw.cols()], pack.groups, dw.dtype().size())
}

/// See [`Kernels::linear_experts_backward_weight`]: a slot is a term of its own expert's gradient alone.
pub(super) fn linear_experts_backward_weight(
    kernels: &dyn Kernels,
    dy: &Buffer,
    x: &Buffer,
    routes: &Routes,
    dw: &Buffer,
) -> Cost {
    let shape = [dy.cols(), x.cols()];
    let one = weight_gradient(routes.slots(), shape, 1, dw.dtype().size());
    Cost { resting: 2.0 * bytes(dw) * used_share(kernels, routes), ..one }
}

/// See [`Kernels::rope`]: four products and two sums for each pair.
pub(super) fn rope(x: &Buffer, positions: &Buffer, table: &Buffer, heads: usize) -> Cost {
    let elements = (x.rows() * heads * 2 * table.cols()) as f64;
    let passing = 2.0 * elements * x.dtype().size() as f64 + bytes(positions);
    Cost { flops: 3.0 * elements, passing, ..Cost::default() }
}

/// Operations of one query's scores and of its sum over values, for each key that it sees, over all heads.
fn pair_flops(shape: &AttentionShape) -> [f64; 2] {
    let heads = shape.heads as f64;
    [2.0 * heads * shape.query_width() as f64, 2.0 * heads * shape.value_width as f64]
}

/// Pairs of a row and a token that it sees: the segment up to itself, and its stem.
fn seen_from_starts(kernels: &dyn Kernels, start: &Buffer) -> f64 {
    let places = kernels.download_indices(start);
    let mut rows_of = vec![0_u64; start.rows()];
    let mut pairs = 0;
    for places in places.chunks_exact(start.cols()) {
        let (first, stem) = (places[0] as usize, places[places.len() - 1] as usize);
        rows_of[first] += 1;
        pairs += rows_of[first] + if stem == first { 0 } else { rows_of[stem] };
    }
    pairs as f64
}

/// See [`Kernels::mla_train`].
pub(super) fn mla_train(
    kernels: &dyn Kernels,
    shape: &AttentionShape,
    start: &Buffer,
    buffers: &[&Buffer],
) -> Cost {
    let [scores, values] = pair_flops(shape);
    let flops = (scores + values) * seen_from_starts(kernels, start);
    Cost { flops, passing: bytes(start) + all(buffers), ..Cost::default() }
}

/// See [`Kernels::mla_train_backward_input`]: two products for each one of the forward pass, and the scores again.
pub(super) fn mla_train_backward(
    kernels: &dyn Kernels,
    shape: &AttentionShape,
    start: &Buffer,
    buffers: &[&Buffer],
) -> Cost {
    let [scores, values] = pair_flops(shape);
    let seen = seen_from_starts(kernels, start);
    Cost {
        flops: 2.0 * (scores + values) * seen,
        recomputed: scores * seen,
        passing: bytes(start) + all(buffers),
        ..Cost::default()
    }
}

/// Cache rows, read or written, and the numbers outside of the cache.
pub(super) fn cache_rows(cache: &Buffer, slots: &Buffer, numbers: &[&Buffer]) -> Cost {
    let row = (cache.cols() * cache.dtype().size()) as f64;
    let passing = bytes(slots) + all(numbers);
    Cost { resting: slots.rows() as f64 * row, passing, ..Cost::default() }
}

/// See [`Kernels::mla_decode`]: a token that several rows see is read once.
pub(super) fn mla_decode(
    kernels: &dyn Kernels,
    shape: &AttentionShape,
    q: &Buffer,
    cache: &Buffer,
    batch: &DecodeBatch<'_>,
    o: &Buffer,
) -> Cost {
    let tables = kernels.download_indices(batch.tables);
    let sequence = kernels.download_indices(batch.sequence);
    let length = kernels.download_indices(batch.length);
    // Tokens of each page that some row sees.
    let mut read = vec![0; cache.rows().div_ceil(batch.page_tokens)];
    let mut pairs = 0;
    for (sequence, length) in sequence.iter().zip(&length) {
        let (pages, length) = (batch.tables.cols(), *length as usize);
        pairs += length;
        for (index, first) in (0..length).step_by(batch.page_tokens).enumerate() {
            let page: &mut usize = &mut read[tables[*sequence as usize * pages + index] as usize];
            *page = (*page).max(batch.page_tokens.min(length - first));
        }
    }
    let [scores, values] = pair_flops(shape);
    let rows: usize = read.iter().sum();
    Cost {
        flops: (scores + values) * pairs as f64,
        resting: (rows * cache.cols() * cache.dtype().size()) as f64,
        passing: all(&[q, o, batch.tables, batch.sequence, batch.length]),
        ..Cost::default()
    }
}

/// See [`Kernels::mla_prefill`].
pub(super) fn mla_prefill(
    kernels: &dyn Kernels,
    shape: &AttentionShape,
    (first, keys): (usize, usize),
    length: &Buffer,
    inputs: &[&Buffer],
    outputs: &[&Buffer],
    store: Store,
) -> Cost {
    let seen = |length: &u32| (*length as usize).saturating_sub(first).min(keys) as f64;
    let pairs: f64 = kernels.download_indices(length).iter().map(seen).sum();
    let [scores, values] = pair_flops(shape);
    Cost {
        flops: (scores + values) * pairs,
        passing: bytes(length) + all(inputs) + touched(store) * all(outputs),
        ..Cost::default()
    }
}

/// `flops` for each number of a slot; buffers are touched once.
pub(super) fn slots(flops: f64, x: &Buffer, routes: &Routes, buffers: &[&Buffer]) -> Cost {
    let flops = flops * (routes.slots() * x.cols()) as f64;
    Cost { flops, passing: bytes(&routes.slot) + all(buffers), ..Cost::default() }
}

/// See [`Kernels::head_logprob`].
pub(super) fn head_logprob(
    x: &Buffer,
    head: &Packed,
    columns: &[&Buffer],
    kept: Option<&Buffer>,
) -> Cost {
    Cost {
        flops: 2.0 * (x.rows() * head.inputs * head.outputs) as f64,
        is_int8: is_int8(head),
        resting: head.bytes() as f64,
        passing: bytes(x) + all(columns) + kept.map_or(0.0, bytes),
        shape: [head.inputs, head.outputs],
        ..Cost::default()
    }
}

/// See [`Kernels::head_logprob_backward`]: gradients of rows and of the weight, and the logits again where no
/// probabilities were kept.
pub(super) fn head_logprob_backward(
    x: &Buffer,
    head: &Packed,
    plain: &Packed,
    columns: &[&Buffer],
    kept: Option<&Buffer>,
    dw: &Buffer,
) -> Cost {
    let forward = head_logprob(x, head, columns, kept);
    Cost {
        flops: 2.0 * forward.flops,
        recomputed: if kept.is_some() { 0.0 } else { forward.flops },
        resting: forward.resting + plain.bytes() as f64 + 2.0 * bytes(dw),
        passing: forward.passing + bytes(x),
        ..forward
    }
}
