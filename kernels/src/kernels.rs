//! The one trait between the model and a device: steps of a DeepSeek-V2 model at fused granularity.
//!
//! Shapes: T rows (tokens), d hidden width, E experts, K experts a token, S slots (T x K less what was dropped), H heads.
//! Every buffer is a matrix `[rows, cols]`; heads and experts are column or row blocks of it. Floats
//! have the dtype [`Kernels::float`]; indices are `U32`. A wrong shape or dtype is our own mistake and
//! asserts; only memory can run out ([`OutOfMemory`]).
//!
//! Invariants every implementation keeps:
//!   * one output element is one fused-multiply-add chain over its reduction index in ascending order,
//!     so that it does not depend on the other rows, on row splits or on the number of threads
//!   * `*_backward_weight` adds to its gradient and continues the same chain over rows, so that a
//!     batch in one piece or in several gives the same bits
//!   * no method shows a host slice of device memory

use crate::activity::Activity;
use crate::arena::{Arena, OutOfMemory, Owner};
use crate::buffer::{Buffer, DType};
use crate::format::{CacheLayout, CacheSpec, WeightFormat};
use crate::routing::{BalanceSpec, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};

pub use crate::packed::{HeadColumns, Pack, Packed, Product};

pub use crate::attention::{AttentionShape, DecodeBatch};

/// Columns by which rows of as many as a vocabulary lie further apart than they are wide: rows a power of two apart would
/// share the lines of a cache.
pub const ROW_GAP: usize = 16;

/// Result of an operation that may need memory.
pub type Result<T> = std::result::Result<T, OutOfMemory>;

/// Whether a product replaces its output or adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `y = product`.
    Set,
    /// `y = y + product` (the chain starts from y).
    Add,
}

/// Which two columns of a block a rotation turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// (2k, 2k + 1): the order of DeepSeek-V2's weights.
    Interleaved,
    /// (k, k + width / 2): the order of Llama's weights.
    Halves,
}

/// cos and sin of every position: two buffers `[positions, rope_width / 2]`.
pub struct RopeTable {
    /// What is turned together.
    pub pairing: Pairing,

    /// Cosines, YaRN's multiplier included.
    pub cos: Buffer,
    /// Sines, YaRN's multiplier included.
    pub sin: Buffer,
}

/// One AdamW update (decoupled decay; bias-corrected).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient is multiplied by this first (clip factor).
    pub gradient_scale: f64,
    /// Step number from 1, for bias correction.
    pub step: u64,
}

/// How one row is sampled.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow {
    /// 0 is greedy (log-probability at temperature 1).
    pub temperature: f64,
    /// Nucleus: smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// The k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// The row's random number in [0, 1).
    pub uniform: f64,
}

/// A sampled token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub token: u32,
    /// log-softmax of logits / T at the token, before any truncation.
    pub logprob: f64,
}

/// The operations of a device.
pub trait Kernels: Send + Sync {
    /// What computes: "cpu avx512", "cpu avx2", "reference", "cuda 0".
    fn name(&self) -> String;
    /// Float dtype of every float buffer.
    fn float(&self) -> DType;
    /// Whether it has instructions for the products of integers of [`WeightFormat::Int8`]. Without them those have the same
    /// bits and take longer than products of floats.
    fn multiplies_integers(&self) -> bool;
    /// The arena that makes this device's buffers.
    fn arena(&self) -> &Arena;
    /// Owner of scratch buffers inside operations (kind `Activations`).
    fn scratch(&self) -> Owner;
    /// Says what the operations from here on are for. Changes nothing; only a profile listens.
    fn enter(&self, _activity: Activity) {}

    // --- movement -----------------------------------------------------------------------------
    /// Copies host numbers in, converting to the float dtype; `src.len() == dst.len()`.
    fn upload(&self, src: &[f32], dst: &mut Buffer);
    /// Copies numbers out as f32.
    fn download(&self, src: &Buffer) -> Vec<f32>;
    /// As `upload`, from f64.
    fn upload_f64(&self, src: &[f64], dst: &mut Buffer);
    /// As `download`, to f64.
    fn download_f64(&self, src: &Buffer) -> Vec<f64>;
    /// Copies indices in.
    fn upload_indices(&self, src: &[u32], dst: &mut Buffer);
    /// Copies indices out.
    fn download_indices(&self, src: &Buffer) -> Vec<u32>;
    /// Copies the numbers out as they are, row after row, little-endian: what one rank sends another.
    fn download_bytes(&self, src: &Buffer) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(src.len() * src.dtype().size());
        self.append_bytes(src, &mut bytes);
        bytes
    }
    /// The same behind what `to` has.
    fn append_bytes(&self, src: &Buffer, to: &mut Vec<u8>);
    /// As `upload`, from the bytes of `download_bytes`.
    fn upload_bytes(&self, src: &[u8], dst: &mut Buffer);
    /// Sets every element.
    fn fill(&self, dst: &mut Buffer, value: f64);
    /// `dst = src` (floats or indices).
    fn copy(&self, src: &Buffer, dst: &mut Buffer);
    /// `dst += src`.
    fn add(&self, src: &Buffer, dst: &mut Buffer);
    /// `dst = factor * src`.
    fn scale(&self, src: &Buffer, factor: f64, dst: &mut Buffer);
    /// `dst[i] = src[index[i]]`, row by row.
    fn gather_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer);
    /// `dst[index[i]] = src[i]`, row by row; the indices are distinct.
    fn scatter_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer);
    /// `dst[index[i]] += src[i]` in ascending i: gradient of `gather_rows` and of an embedding.
    fn scatter_add_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer);

    // --- products -----------------------------------------------------------------------------
    /// Packs a weight for `linear`, `linear_heads` or `linear_experts`, kept in `format`. Two packings of one weight in
    /// one format have the same values, whatever rows and product they are for.
    fn pack(
        &self,
        owner: Owner,
        weight: &Buffer,
        pack: Pack,
        format: WeightFormat,
        version: u64,
    ) -> Result<Packed>;
    /// `y (=|+=) x op(W)`, group 0. Serves forward passes and input gradients alike ([`Product`]).
    fn linear(&self, x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store);
    /// One product per head on column blocks.
    fn linear_heads(
        &self,
        x: &Buffer,
        weight: &Packed,
        columns: HeadColumns,
        y: &mut Buffer,
        store: Store,
    );
    /// One product per expert: x and y are in slot order, expert e owns the slots of `routes`.
    fn linear_experts(&self, x: &Buffer, weight: &Packed, routes: &Routes, y: &mut Buffer);
    /// `dw[n, k] += dyᵀ[n, m] x[m, k]`.
    fn linear_backward_weight(&self, dy: &Buffer, x: &Buffer, dw: &mut Buffer);
    /// Per head: rows `pack.first_row + h * pack.group_stride ..` of dw. `columns.input` are the x columns of a
    /// `Transposed` product, `columns.output` its y columns; for a `Plain` product dw += xᵀ dy instead.
    fn linear_heads_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        columns: HeadColumns,
        pack: Pack,
        dw: &mut Buffer,
    );
    /// Per expert, in slot order; dw has `experts` blocks of rows.
    fn linear_experts_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        dw: &mut Buffer,
    );

    // --- norms, positions, gates ----------------------------------------------------------------
    /// `y = w * (x / rms(x))`; keeps `inverse_rms [T, 1]` = 1 / sqrt(mean(x²) + eps).
    fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        epsilon: f64,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    );
    /// `dx (=|+=)` the norm's input gradient.
    fn rms_norm_backward_input(
        &self,
        dy: &Buffer,
        x: &Buffer,
        weight: &Buffer,
        inverse_rms: &Buffer,
        dx: &mut Buffer,
        store: Store,
    );
    /// `dw [1, d] += Σ_t dy * x * inverse_rms`, t ascending.
    fn rms_norm_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        inverse_rms: &Buffer,
        dw: &mut Buffer,
    );
    /// Rotates, in place, the table's pairs of `heads` blocks: head h's block starts at column
    /// `first + h * stride` and is 2 x the table's width. `inverse` rotates back: the gradient.
    fn rope(
        &self,
        x: &mut Buffer,
        positions: &Buffer,
        table: &RopeTable,
        heads: usize,
        first: usize,
        stride: usize,
        inverse: bool,
    );
    /// `y[T, f] = silu(x[:, ..f]) * x[:, f..]`: gate left, up right.
    fn swiglu(&self, gate_up: &Buffer, y: &mut Buffer);
    /// Gradient of `swiglu` with respect to gate and up.
    fn swiglu_backward(&self, dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer);

    // --- attention --------------------------------------------------------------------------------
    /// Causal attention of packed rows: row t sees rows `start[t] ..= t` (`start` is `U32 [T, 1]`). A second column makes
    /// segments continue others: it holds the first row of the segment whose rows all come before `start[t]`, the same
    /// as the first column where there is none. The bits are those of a sequence that repeats that stem. Writes o `[T, H * value_width]` and the log-sum-exp of the scaled scores, `lse [T, H]`.
    fn mla_train(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        k_rope: &Buffer,
        start: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
    ) -> Result<()>;
    /// Sets dq, dkv and dk_rope; probabilities are recomputed from `lse`.
    fn mla_train_backward_input(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        k_rope: &Buffer,
        start: &Buffer,
        o: &Buffer,
        lse: &Buffer,
        d_o: &Buffer,
        dq: &mut Buffer,
        dkv: &mut Buffer,
        dk_rope: &mut Buffer,
    ) -> Result<()>;
    /// Type and columns of a cache row on this device.
    fn cache_shape(&self, layout: &CacheLayout) -> (DType, usize);
    /// Keeps the rows of `latent` and `rope` (of no columns if the layout has no rope key) in the cache's `slots
    /// [n, 1]`, which are distinct.
    fn write_cache(
        &self,
        spec: &CacheSpec<'_>,
        latent: &Buffer,
        rope: &Buffer,
        slots: &Buffer,
        cache: &mut Buffer,
    );
    /// Reads the cache rows in `slots [n, 1]` as numbers: `rows [n, latent + rope]`.
    fn read_cache(&self, spec: &CacheSpec<'_>, cache: &Buffer, slots: &Buffer, rows: &mut Buffer);
    /// Attention against the paged cache, whose rows are a token's row of kv, then its shared rope key, kept as `spec`
    /// says. Slot of token j = tables[sequence][j / page_tokens] * page_tokens + j % page_tokens. The same operations in
    /// the same order as `mla_train` of the same shape, on the numbers that `read_cache` gives.
    fn mla_decode(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        spec: &CacheSpec<'_>,
        cache: &Buffer,
        batch: &DecodeBatch<'_>,
        o: &mut Buffer,
    ) -> Result<()>;
    /// Attention of a prompt's rows to tokens `first ..` of their sequence, whose keys and values these are:
    /// row r sees those below `length[r]` (`U32 [T, 1]`). `Set` writes o and lse of this range alone (0 and -∞
    /// for a row that sees none of it); `Add` merges them by log-sum-exp with those of the ranges before.
    fn mla_prefill(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        k_rope: &Buffer,
        first: usize,
        length: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
        store: Store,
    ) -> Result<()>;

    // --- experts ----------------------------------------------------------------------------------
    /// scores = softmax(logits) `[T, E]`; experts `U32 [T, K]` in descending score (ties: lowest index);
    /// weights `[T, K]`.
    fn router(
        &self,
        spec: &RouterSpec,
        logits: &Buffer,
        scores: &mut Buffer,
        experts: &mut Buffer,
        weights: &mut Buffer,
    );
    /// d_logits from d_weights `[T, K]` and from d_scores `[T, E]` (the balance losses' gradient).
    fn router_backward(
        &self,
        spec: &RouterSpec,
        scores: &Buffer,
        experts: &Buffer,
        d_weights: &Buffer,
        d_scores: &Buffer,
        d_logits: &mut Buffer,
    );
    /// Balance losses of experts, devices and communication (eq. 23-31), one term per segment of rows: returns
    /// α1 Σ f P + α2 Σ f' P' + α3 Σ f'' P'' of each segment, and adds to d_scores the gradient (through P only) of their
    /// sum divided by `spec.sequences`. `segment [T, 1]` numbers the rows' sequences from 0 without gaps, in order.
    fn balance_loss(
        &self,
        spec: &BalanceSpec,
        scores: &Buffer,
        experts: &Buffer,
        segment: &Buffer,
        d_scores: &mut Buffer,
    ) -> Vec<f64>;
    /// Tokens of each of `count` experts, and the groups that the tokens' experts lie in.
    fn count_routes(&self, experts: &Buffer, count: usize, groups: usize) -> RouteCounts;
    /// `kept U32 [T, K]` = experts, with [`DROPPED`](crate::DROPPED) for what exceeds a group's budget in a segment: the
    /// pairs of the lowest scores, of equal ones the last. A segment whose number has a 1 in `protected [segments, 1]`
    /// keeps all.
    fn drop_overflow(
        &self,
        spec: &DropSpec,
        scores: &Buffer,
        experts: &Buffer,
        segment: &Buffer,
        protected: &Buffer,
        kept: &mut Buffer,
    ) -> DropCounts;
    /// Sorts (token, choice) pairs by expert; dropped ones get no slot.
    fn routes(&self, experts: &Buffer, count: usize) -> Result<Routes>;
    /// `y[t] += Σ_k weights[t, k] * x[slot(t, k)]`, k ascending, over what was not dropped.
    fn combine(&self, x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer);
    /// d_x in slot order and d_weights `[T, K]`, which is 0 for a dropped pair.
    fn combine_backward(
        &self,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        weights: &Buffer,
        dx: &mut Buffer,
        d_weights: &mut Buffer,
    );
    /// `y[t] += Σ_k x[slot(t, k)]`, k ascending: gradient of the gather into slot order.
    fn sum_slots(&self, x: &Buffer, routes: &Routes, y: &mut Buffer);

    // --- head ---------------------------------------------------------------------------------------
    /// For rows x `[R, d]` and `targets U32 [R, 1]`: log-softmax(x W / T) at the target and the entropy, each `[R, 1]`.
    /// `kept [R, V]` (with [`ROW_GAP`] between its rows) takes the probabilities for the backward pass; without it no more than a tile of them is ever held.
    fn head_logprob(
        &self,
        x: &Buffer,
        head: &Packed,
        targets: &Buffer,
        temperature: f64,
        logprob: &mut Buffer,
        entropy: &mut Buffer,
        kept: Option<&mut Buffer>,
    ) -> Result<()>;
    /// The same log-probabilities, to the bit, of logits `[R, V]` that are there already; uses these up.
    fn logits_logprob(
        &self,
        logits: &mut Buffer,
        targets: &Buffer,
        temperature: f64,
        logprob: &mut Buffer,
    );
    /// With c `[R, 1]` = d(loss)/d(logprob): sets dx and adds to dw `[V, d]`. `plain` is the head packed for `Plain`.
    /// `kept` is what the forward pass kept, and is used up; without it the same bits come from another product.
    fn head_logprob_backward(
        &self,
        x: &Buffer,
        head: &Packed,
        plain: &Packed,
        targets: &Buffer,
        temperature: f64,
        c: &Buffer,
        kept: Option<&mut Buffer>,
        dx: &mut Buffer,
        dw: &mut Buffer,
    ) -> Result<()>;
    /// Samples one token per row of logits `[R, V]`.
    fn sample(&self, logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled>;

    // --- optimizer ------------------------------------------------------------------------------------
    /// Σ x², in f64, in one fixed order.
    fn squared_sum(&self, x: &Buffer) -> f64;
    /// One AdamW update of w from g, in place; m and v are the moments.
    fn adamw(&self, update: &AdamW, g: &Buffer, w: &mut Buffer, m: &mut Buffer, v: &mut Buffer);
}
