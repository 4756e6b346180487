//! Reference: every operation of [`Kernels`] in plain f64 loops, one thread, no tricks.
//!
//! This is the definition that the other implementations are tested against and that finite
//! differences are taken on. It shares no arithmetic with them: it knows neither tiles, threads nor
//! SIMD, and calls nothing in `ops`.
//!
//! Invariants:
//!   * every float buffer is `F64`; packed weights and cache rows are the values that their formats keep
//!   * sums run over their index in ascending order and start from the output they add to

mod attention;
mod balance;
mod experts;
mod formats;
mod head;
mod movement;
mod norms;
mod optimizer;
mod products;

use crate::arena::{Arena, Kind, Owner};
use crate::buffer::{Buffer, DType};
use crate::format::{CacheLayout, CacheSpec, WeightFormat};
use crate::kernels::{
    AdamW, AttentionShape, DecodeBatch, HeadColumns, Kernels, Pack, Packed, Result, RopeTable,
    SampleRow, Sampled, Store,
};
use crate::routing::{BalanceSpec, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};

/// The operations in f64 loops. Slow on purpose; for tests and for tiny models.
pub struct ReferenceKernels {
    arena: Arena,
    scratch: Owner,
}

impl ReferenceKernels {
    /// Reference kernels on buffers of `arena`.
    pub fn new(arena: Arena) -> ReferenceKernels {
        let scratch = arena.owner("scratch", Kind::Activations);
        ReferenceKernels { arena, scratch }
    }
}

/// `start + Σ a[i] * b[i]`, one fused chain in ascending i.
fn chain<'a>(start: f64, pairs: impl Iterator<Item = (&'a f64, &'a f64)>) -> f64 {
    pairs.fold(start, |sum, (a, b)| a.mul_add(*b, sum))
}

/// `a · b`.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "a dot product joins rows of one width");
    chain(0.0, a.iter().zip(b))
}

/// `y += factor * x`.
fn add_scaled(factor: f64, x: &[f64], y: &mut [f64]) {
    assert_eq!(x.len(), y.len(), "rows of one width are added");
    for (y, x) in y.iter_mut().zip(x) {
        *y = factor.mul_add(*x, *y);
    }
}

/// log Σ exp(z), without overflow.
fn log_sum_exp(z: &[f64]) -> f64 {
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln()
}

impl Kernels for ReferenceKernels {
    fn name(&self) -> String {
        "reference".to_string()
    }

    fn float(&self) -> DType {
        DType::F64
    }

    fn multiplies_integers(&self) -> bool {
        false
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn scratch(&self) -> Owner {
        self.scratch
    }

    fn upload(&self, src: &[f32], dst: &mut Buffer) {
        let wide: Vec<f64> = src.iter().map(|x| f64::from(*x)).collect();
        movement::write(&wide, dst);
    }

    fn download(&self, src: &Buffer) -> Vec<f32> {
        movement::read::<f64>(src).iter().map(|x| *x as f32).collect()
    }

    fn upload_f64(&self, src: &[f64], dst: &mut Buffer) {
        movement::write(src, dst);
    }

    fn download_f64(&self, src: &Buffer) -> Vec<f64> {
        movement::read(src)
    }

    fn upload_indices(&self, src: &[u32], dst: &mut Buffer) {
        movement::write(src, dst);
    }

    fn download_indices(&self, src: &Buffer) -> Vec<u32> {
        movement::read(src)
    }

    fn append_bytes(&self, src: &Buffer, to: &mut Vec<u8>) {
        movement::append_bytes(src, to);
    }

    fn upload_bytes(&self, src: &[u8], dst: &mut Buffer) {
        movement::upload_bytes(src, dst);
    }

    fn fill(&self, dst: &mut Buffer, value: f64) {
        movement::fill(dst, value);
    }

    fn copy(&self, src: &Buffer, dst: &mut Buffer) {
        movement::copy(src, dst);
    }

    fn add(&self, src: &Buffer, dst: &mut Buffer) {
        movement::add(src, dst);
    }

    fn scale(&self, src: &Buffer, factor: f64, dst: &mut Buffer) {
        movement::scale(src, factor, dst);
    }

    fn gather_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        movement::gather_rows(src, index, dst);
    }

    fn scatter_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        movement::scatter_rows(src, index, dst);
    }

    fn scatter_add_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        movement::scatter_add_rows(src, index, dst);
    }

    fn pack(
        &self,
        owner: Owner,
        weight: &Buffer,
        pack: Pack,
        format: WeightFormat,
        version: u64,
    ) -> Result<Packed> {
        products::pack(&self.arena, owner, weight, pack, format, version)
    }

    fn linear(&self, x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store) {
        products::linear(x, weight, y, store);
    }

    fn linear_heads(
        &self,
        x: &Buffer,
        weight: &Packed,
        columns: HeadColumns,
        y: &mut Buffer,
        store: Store,
    ) {
        products::linear_heads(x, weight, columns, y, store);
    }

    fn linear_experts(&self, x: &Buffer, weight: &Packed, routes: &Routes, y: &mut Buffer) {
        products::linear_experts(x, weight, routes, y);
    }

    fn linear_backward_weight(&self, dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
        products::linear_backward_weight(dy, x, dw);
    }

    fn linear_heads_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        columns: HeadColumns,
        pack: Pack,
        dw: &mut Buffer,
    ) {
        products::linear_heads_backward_weight(dy, x, columns, pack, dw);
    }

    fn linear_experts_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        dw: &mut Buffer,
    ) {
        products::linear_experts_backward_weight(dy, x, routes, dw);
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        epsilon: f64,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        norms::rms_norm(x, weight, epsilon, y, inverse_rms);
    }

    fn rms_norm_backward_input(
        &self,
        dy: &Buffer,
        x: &Buffer,
        weight: &Buffer,
        inverse_rms: &Buffer,
        dx: &mut Buffer,
        store: Store,
    ) {
        norms::rms_norm_backward_input(dy, x, weight, inverse_rms, dx, store);
    }

    fn rms_norm_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        inverse_rms: &Buffer,
        dw: &mut Buffer,
    ) {
        norms::rms_norm_backward_weight(dy, x, inverse_rms, dw);
    }

    fn rope(
        &self,
        x: &mut Buffer,
        positions: &Buffer,
        table: &RopeTable,
        heads: usize,
        first: usize,
        stride: usize,
        inverse: bool,
    ) {
        let starts: Vec<usize> = (0..heads).map(|head| first + head * stride).collect();
        norms::rope(x, positions, table, &starts, inverse);
    }

    fn swiglu(&self, gate_up: &Buffer, y: &mut Buffer) {
        norms::swiglu(gate_up, y);
    }

    fn swiglu_backward(&self, dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer) {
        norms::swiglu_backward(dy, gate_up, d_gate_up);
    }

    fn mla_train(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        kv: &Buffer,
        k_rope: &Buffer,
        start: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
    ) -> Result<()> {
        attention::mla_train(shape, q, kv, k_rope, start, o, lse);
        Ok(())
    }

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
    ) -> Result<()> {
        let forward = attention::Forward { q, kv, k_rope, start, o, lse };
        attention::mla_train_backward_input(shape, &forward, d_o, dq, dkv, dk_rope);
        Ok(())
    }

    fn cache_shape(&self, layout: &CacheLayout) -> (DType, usize) {
        (DType::F64, layout.width())
    }

    fn write_cache(
        &self,
        spec: &CacheSpec<'_>,
        latent: &Buffer,
        rope: &Buffer,
        slots: &Buffer,
        cache: &mut Buffer,
    ) {
        formats::write_cache(spec, latent, rope, slots, cache);
    }

    fn read_cache(&self, _: &CacheSpec<'_>, cache: &Buffer, slots: &Buffer, rows: &mut Buffer) {
        movement::gather_rows(cache, slots, rows);
    }

    fn mla_decode(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        _: &CacheSpec<'_>,
        cache: &Buffer,
        batch: &DecodeBatch<'_>,
        o: &mut Buffer,
    ) -> Result<()> {
        attention::mla_decode(shape, q, cache, batch, o);
        Ok(())
    }

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
    ) -> Result<()> {
        attention::mla_prefill(shape, q, (kv, k_rope), first, length, o, lse, store);
        Ok(())
    }

    fn router(
        &self,
        spec: &RouterSpec,
        logits: &Buffer,
        scores: &mut Buffer,
        experts: &mut Buffer,
        weights: &mut Buffer,
    ) {
        experts::router(spec, logits, scores, experts, weights);
    }

    fn router_backward(
        &self,
        spec: &RouterSpec,
        scores: &Buffer,
        experts: &Buffer,
        d_weights: &Buffer,
        d_scores: &Buffer,
        d_logits: &mut Buffer,
    ) {
        experts::router_backward(spec, scores, experts, d_weights, d_scores, d_logits);
    }

    fn balance_loss(
        &self,
        spec: &BalanceSpec,
        scores: &Buffer,
        experts: &Buffer,
        segment: &Buffer,
        d_scores: &mut Buffer,
    ) -> Vec<f64> {
        balance::balance_loss(spec, scores, experts, segment, d_scores)
    }

    fn count_routes(&self, experts: &Buffer, count: usize, groups: usize) -> RouteCounts {
        experts::count_routes(experts, count, groups)
    }

    fn drop_overflow(
        &self,
        spec: &DropSpec,
        scores: &Buffer,
        experts: &Buffer,
        segment: &Buffer,
        protected: &Buffer,
        kept: &mut Buffer,
    ) -> DropCounts {
        experts::drop_overflow(spec, scores, experts, segment, protected, kept)
    }

    fn routes(&self, experts: &Buffer, count: usize) -> Result<Routes> {
        experts::routes(&self.arena, self.scratch, experts, count)
    }

    fn combine(&self, x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) {
        experts::combine(x, routes, weights, y);
    }

    fn combine_backward(
        &self,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        weights: &Buffer,
        dx: &mut Buffer,
        d_weights: &mut Buffer,
    ) {
        experts::combine_backward(dy, x, routes, weights, dx, d_weights);
    }

    fn sum_slots(&self, x: &Buffer, routes: &Routes, y: &mut Buffer) {
        experts::sum_slots(x, routes, y);
    }

    fn head_logprob(
        &self,
        x: &Buffer,
        head: &Packed,
        targets: &Buffer,
        temperature: f64,
        logprob: &mut Buffer,
        entropy: &mut Buffer,
        kept: Option<&mut Buffer>,
    ) -> Result<()> {
        head::head_logprob(x, head, targets, temperature, logprob, entropy, kept);
        Ok(())
    }

    fn logits_logprob(
        &self,
        logits: &mut Buffer,
        targets: &Buffer,
        temperature: f64,
        logprob: &mut Buffer,
    ) {
        head::logits_logprob(logits, targets, temperature, logprob);
    }

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
    ) -> Result<()> {
        let forward = head::Forward { x, head, plain, targets, temperature };
        head::head_logprob_backward(&forward, c, kept.as_deref(), dx, dw);
        Ok(())
    }

    fn sample(&self, logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled> {
        head::sample(logits, rows)
    }

    fn squared_sum(&self, x: &Buffer) -> f64 {
        optimizer::squared_sum(x)
    }

    fn adamw(&self, update: &AdamW, g: &Buffer, w: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
        optimizer::adamw(update, g, w, m, v);
    }
}
