//! Profiled: kernels that count and time what other kernels do.
//!
//! A door plate: `timed` lists every operation with what a call costs at least (`cost`), forwards it, and adds the call
//! to a [`Profile`] (`counts`). The numbers are the inner kernels' own: nothing of them is touched. Without a profile
//! nobody makes one of these, and nothing is paid for it.
//!
//! Invariants:
//!   * a method of the trait without a default is in this file, or it does not compile; a method that computes is timed
//!     (tested against the trait's own text)

mod clock;
mod cost;
mod counts;
#[cfg(test)]
mod tests;

pub use clock::ClockKind;
pub use cost::Cost;
pub use counts::{ActivityProfile, Count, Profile};

use crate::activity::Activity;
use crate::arena::{Arena, Kind, Owner};
use crate::buffer::{Buffer, DType};
use crate::format::{CacheLayout, CacheSpec, WeightFormat};
use crate::kernels::{
    AdamW, AttentionShape, DecodeBatch, HeadColumns, Kernels, Pack, Packed, Result, RopeTable,
    SampleRow, Sampled, Store,
};
use crate::routing::{BalanceSpec, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};
use std::sync::Arc;

/// Kernels whose every operation is counted.
pub struct Profiled {
    inner: Box<dyn Kernels>,
    profile: Arc<Profile>,
}

impl Profiled {
    /// Counts into `profile` what `inner` does.
    pub fn new(inner: Box<dyn Kernels>, profile: Arc<Profile>) -> Profiled {
        Profiled { inner, profile }
    }
}

/// Writes the trait's methods: one that is told, and those that are timed, each with its cost. A cost may look at the
/// arguments and ask the inner kernels (`kernels`) for indices; the time that this takes is the profile's own.
macro_rules! timed {
    ($kernels:ident; $(
        $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? => $cost:expr;
    )*) => {
        /// Places of the operations in [`OPERATIONS`].
        #[allow(non_camel_case_types)]
        enum Operation { $($name),* }

        /// Names of the operations that are timed, in the trait's order.
        pub(crate) const OPERATIONS: &[&str] = &[$(stringify!($name)),*];

        impl Kernels for Profiled {
            fn name(&self) -> String {
                self.inner.name()
            }
            fn float(&self) -> DType {
                self.inner.float()
            }
            fn multiplies_integers(&self) -> bool {
                self.inner.multiplies_integers()
            }
            fn arena(&self) -> &Arena {
                self.inner.arena()
            }
            fn scratch(&self) -> Owner {
                self.inner.scratch()
            }
            fn cache_shape(&self, layout: &CacheLayout) -> (DType, usize) {
                self.inner.cache_shape(layout)
            }
            fn enter(&self, activity: Activity) {
                let arena = self.inner.arena();
                self.profile.enter(activity, || arena.held() - arena.held_by(Kind::Activations));
            }
            $(fn $name(&self, $($argument: $type),*) $(-> $result)? {
                let announced = self.profile.now();
                #[allow(unused_variables)]
                let $kernels = self.inner.as_ref();
                let cost: Cost = $cost;
                let began = self.profile.now();
                let result = self.inner.$name($($argument),*);
                let times = [announced, began, self.profile.now()];
                self.profile.add(Operation::$name as usize, cost, times);
                result
            })*
        }
    };
}

timed! {
    kernels;
    // --- movement ---
    upload(src: &[f32], dst: &mut Buffer) => cost::movement(4 * src.len(), dst);
    download(src: &Buffer) -> Vec<f32> => cost::movement(4 * src.len(), src);
    upload_f64(src: &[f64], dst: &mut Buffer) => cost::movement(8 * src.len(), dst);
    download_f64(src: &Buffer) -> Vec<f64> => cost::movement(8 * src.len(), src);
    upload_indices(src: &[u32], dst: &mut Buffer) => cost::movement(4 * src.len(), dst);
    download_indices(src: &Buffer) -> Vec<u32> => cost::movement(4 * src.len(), src);
    append_bytes(src: &Buffer, to: &mut Vec<u8>) => cost::movement(src.len() * src.dtype().size(), src);
    upload_bytes(src: &[u8], dst: &mut Buffer) => cost::movement(src.len(), dst);
    fill(dst: &mut Buffer, value: f64) => cost::elementwise(0.0, &[dst]);
    copy(src: &Buffer, dst: &mut Buffer) => cost::elementwise(0.0, &[src, dst]);
    add(src: &Buffer, dst: &mut Buffer) => cost::elementwise(1.0, &[src, dst, dst]);
    scale(src: &Buffer, factor: f64, dst: &mut Buffer) => cost::elementwise(1.0, &[src, dst]);
    gather_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) =>
        cost::elementwise(0.0, &[dst, dst, index]);
    scatter_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) =>
        cost::elementwise(0.0, &[src, src, index]);
    scatter_add_rows(src: &Buffer, index: &Buffer, dst: &mut Buffer) =>
        cost::elementwise(1.0, &[src, src, src, index]);
    // --- products ---
    pack(
        owner: Owner, weight: &Buffer, pack: Pack, format: WeightFormat, version: u64
    ) -> Result<Packed> => cost::pack(weight, &pack, format);
    linear(x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store) =>
        cost::linear(x, weight, store);
    linear_heads(x: &Buffer, weight: &Packed, columns: HeadColumns, y: &mut Buffer, store: Store) =>
        cost::linear_heads(x, weight, store);
    linear_experts(x: &Buffer, weight: &Packed, routes: &Routes, y: &mut Buffer) =>
        cost::linear_experts(kernels, x, weight, routes);
    linear_backward_weight(dy: &Buffer, x: &Buffer, dw: &mut Buffer) =>
        cost::linear_backward_weight(dy, x);
    linear_heads_backward_weight(
        dy: &Buffer, x: &Buffer, columns: HeadColumns, pack: Pack, dw: &mut Buffer
    ) => cost::linear_heads_backward_weight(dy, &pack, dw);
    linear_experts_backward_weight(dy: &Buffer, x: &Buffer, routes: &Routes, dw: &mut Buffer) =>
        cost::linear_experts_backward_weight(kernels, dy, x, routes, dw);
    // --- norms, positions, gates ---
    rms_norm(x: &Buffer, weight: &Buffer, epsilon: f64, y: &mut Buffer, inverse_rms: &mut Buffer) =>
        cost::elementwise(4.0, &[x, y, weight, inverse_rms]);
    rms_norm_backward_input(
        dy: &Buffer, x: &Buffer, weight: &Buffer, inverse_rms: &Buffer, dx: &mut Buffer,
        store: Store
    ) => cost::elementwise(8.0, &[x, dy, dx, weight, inverse_rms]);
    rms_norm_backward_weight(dy: &Buffer, x: &Buffer, inverse_rms: &Buffer, dw: &mut Buffer) =>
        cost::elementwise(3.0, &[x, dy, inverse_rms, dw]);
    rope(
        x: &mut Buffer, positions: &Buffer, table: &RopeTable, heads: usize, first: usize,
        stride: usize, inverse: bool
    ) => cost::rope(x, positions, &table.cos, heads);
    swiglu(gate_up: &Buffer, y: &mut Buffer) => cost::elementwise(5.0, &[y, gate_up]);
    swiglu_backward(dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer) =>
        cost::elementwise(10.0, &[dy, gate_up, d_gate_up]);
    // --- attention ---
    mla_train(
        shape: &AttentionShape, q: &Buffer, kv: &Buffer, k_rope: &Buffer, start: &Buffer,
        o: &mut Buffer, lse: &mut Buffer
    ) -> Result<()> => cost::mla_train(kernels, shape, start, &[q, kv, k_rope, o, lse]);
    mla_train_backward_input(
        shape: &AttentionShape, q: &Buffer, kv: &Buffer, k_rope: &Buffer, start: &Buffer,
        o: &Buffer, lse: &Buffer, d_o: &Buffer, dq: &mut Buffer, dkv: &mut Buffer,
        dk_rope: &mut Buffer
    ) -> Result<()> => cost::mla_train_backward(
            kernels, shape, start, &[q, kv, k_rope, o, lse, d_o, dq, dkv, dk_rope]
        );
    write_cache(
        spec: &CacheSpec<'_>, latent: &Buffer, rope: &Buffer, slots: &Buffer, cache: &mut Buffer
    ) => cost::cache_rows(cache, slots, &[latent, rope]);
    read_cache(spec: &CacheSpec<'_>, cache: &Buffer, slots: &Buffer, rows: &mut Buffer) =>
        cost::cache_rows(cache, slots, &[rows]);
    mla_decode(
        shape: &AttentionShape, q: &Buffer, spec: &CacheSpec<'_>, cache: &Buffer,
        batch: &DecodeBatch<'_>, o: &mut Buffer
    ) -> Result<()> => cost::mla_decode(kernels, shape, q, cache, batch, o);
    mla_prefill(
        shape: &AttentionShape, q: &Buffer, kv: &Buffer, k_rope: &Buffer, first: usize,
        length: &Buffer, o: &mut Buffer, lse: &mut Buffer, store: Store
    ) -> Result<()> => cost::mla_prefill(
            kernels, shape, (first, kv.rows()), length, &[q, kv, k_rope], &[o, lse], store
        );
    // --- experts ---
    router(
        spec: &RouterSpec, logits: &Buffer, scores: &mut Buffer, experts: &mut Buffer,
        weights: &mut Buffer
    ) => cost::elementwise(5.0, &[logits, scores, experts, weights]);
    router_backward(
        spec: &RouterSpec, scores: &Buffer, experts: &Buffer, d_weights: &Buffer,
        d_scores: &Buffer, d_logits: &mut Buffer
    ) => cost::elementwise(6.0, &[scores, experts, d_weights, d_scores, d_logits]);
    balance_loss(
        spec: &BalanceSpec, scores: &Buffer, experts: &Buffer, segment: &Buffer,
        d_scores: &mut Buffer
    ) -> Vec<f64> => cost::elementwise(4.0, &[scores, experts, segment, d_scores, d_scores]);
    count_routes(experts: &Buffer, count: usize, groups: usize) -> RouteCounts =>
        cost::elementwise(0.0, &[experts]);
    drop_overflow(
        spec: &DropSpec, scores: &Buffer, experts: &Buffer, segment: &Buffer, protected: &Buffer,
        kept: &mut Buffer
    ) -> DropCounts => cost::elementwise(0.0, &[scores, experts, segment, protected, kept]);
    routes(experts: &Buffer, count: usize) -> Result<Routes> =>
        cost::elementwise(0.0, &[experts, experts, experts]);
    combine(x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) =>
        cost::slots(2.0, x, routes, &[x, weights, y, y]);
    combine_backward(
        dy: &Buffer, x: &Buffer, routes: &Routes, weights: &Buffer, dx: &mut Buffer,
        d_weights: &mut Buffer
    ) => cost::slots(4.0, x, routes, &[dy, x, weights, dx, d_weights]);
    sum_slots(x: &Buffer, routes: &Routes, y: &mut Buffer) =>
        cost::slots(1.0, x, routes, &[x, y, y]);
    // --- head ---
    head_logprob(
        x: &Buffer, head: &Packed, targets: &Buffer, temperature: f64, logprob: &mut Buffer,
        entropy: &mut Buffer, kept: Option<&mut Buffer>
    ) -> Result<()> => cost::head_logprob(x, head, &[targets, logprob, entropy], kept.as_deref());
    logits_logprob(
        logits: &mut Buffer, targets: &Buffer, temperature: f64, logprob: &mut Buffer
    ) => cost::elementwise(5.0, &[logits, targets, logprob]);
    head_logprob_backward(
        x: &Buffer, head: &Packed, plain: &Packed, targets: &Buffer, temperature: f64,
        c: &Buffer, kept: Option<&mut Buffer>, dx: &mut Buffer, dw: &mut Buffer
    ) -> Result<()> => cost::head_logprob_backward(x, head, plain, &[targets, c], kept.as_deref(), dw);
    sample(logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled> => cost::elementwise(5.0, &[logits]);
    // --- optimizer ---
    squared_sum(x: &Buffer) -> f64 => cost::resting(2.0, &[x]);
    adamw(update: &AdamW, g: &Buffer, w: &mut Buffer, m: &mut Buffer, v: &mut Buffer) =>
        cost::resting(14.0, &[g, w, w, m, m, v, v]);
}
