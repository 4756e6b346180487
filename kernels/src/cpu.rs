//! CpuKernels: every operation in f32 on the processor's best instruction set, picked once at start.
//!
//! A door plate: it owns the threads and hands each method to its file in `ops`.

use crate::arena::{Arena, Kind, Owner};
use crate::buffer::{Buffer, DType};
use crate::format::{CacheLayout, CacheSpec, WeightFormat};
use crate::kernels::{
    AdamW, AttentionShape, DecodeBatch, HeadColumns, Kernels, Pack, Packed, Result, RopeTable,
    SampleRow, Sampled, Store,
};
use crate::ops::{self, Cx, Isa};
use crate::pool::Pool;
use crate::routing::{BalanceSpec, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};

/// The processor as a device.
pub struct CpuKernels {
    cx: Cx,
}

impl CpuKernels {
    /// Checks that the instruction set which REHEARSAL_ISA names is there; the fault names those that are.
    pub fn check_instruction_set() -> std::result::Result<(), String> {
        Isa::chosen(std::env::var_os(ops::ISA_VARIABLE)).map(drop)
    }

    /// Kernels with `threads` threads (0: one per core) whose buffers come from `arena`. They use the instruction
    /// set that REHEARSAL_ISA names, else the best.
    ///
    /// # Panics
    /// If REHEARSAL_ISA names none (see [`CpuKernels::check_instruction_set`]).
    pub fn new(threads: usize, arena: Arena) -> CpuKernels {
        CpuKernels::with_isa(Isa::detect(), threads, arena)
    }

    /// As `new`, on a chosen instruction set of this processor.
    pub(crate) fn with_isa(isa: Isa, threads: usize, arena: Arena) -> CpuKernels {
        assert!(Isa::available().contains(&isa), "this processor has no {}", isa.name());
        let scratch = arena.owner("scratch", Kind::Activations);
        CpuKernels { cx: Cx { pool: Pool::new(threads), isa, arena, scratch } }
    }

    /// Number of threads that compute.
    pub fn threads(&self) -> usize {
        self.cx.pool.threads()
    }
}

impl Kernels for CpuKernels {
    fn name(&self) -> String {
        format!("cpu {}", self.cx.isa.name())
    }
    fn float(&self) -> DType {
        DType::F32
    }
    fn multiplies_integers(&self) -> bool {
        ops::int8::Level::of(self.cx.isa) != ops::int8::Level::Plain
    }
    fn arena(&self) -> &Arena {
        &self.cx.arena
    }
    fn scratch(&self) -> Owner {
        self.cx.scratch
    }

    // --- movement -----------------------------------------------------------------------------
    fn upload(&self, src: &[f32], dst: &mut Buffer) {
        ops::rows::upload(&self.cx, src, dst, |x: f32| x)
    }
    fn download(&self, src: &Buffer) -> Vec<f32> {
        ops::rows::download(src, |x: f32| x)
    }
    fn upload_f64(&self, src: &[f64], dst: &mut Buffer) {
        ops::rows::upload(&self.cx, src, dst, |x: f64| x as f32)
    }
    fn download_f64(&self, src: &Buffer) -> Vec<f64> {
        ops::rows::download(src, |x: f32| f64::from(x))
    }
    fn upload_indices(&self, src: &[u32], dst: &mut Buffer) {
        ops::rows::upload(&self.cx, src, dst, |x: u32| x)
    }
    fn download_indices(&self, src: &Buffer) -> Vec<u32> {
        ops::rows::download(src, |x: u32| x)
    }
    fn append_bytes(&self, src: &Buffer, to: &mut Vec<u8>) {
        ops::rows::append_bytes(src, to)
    }
    fn upload_bytes(&self, src: &[u8], dst: &mut Buffer) {
        ops::rows::upload_bytes(src, dst)
    }
    fn fill(&self, dst: &mut Buffer, value: f64) {
        ops::rows::fill(&self.cx, dst, value)
    }
    fn copy(&self, src: &Buffer, dst: &mut Buffer) {
        ops::rows::copy(&self.cx, src, dst)
    }
    fn add(&self, src: &Buffer, dst: &mut Buffer) {
        ops::rows::add(&self.cx, src, dst)
    }
    fn scale(&self, src: &Buffer, factor: f64, dst: &mut Buffer) {
        ops::rows::scale(&self.cx, src, factor, dst)
    }

    fn gather_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        ops::rows::gather_rows(&self.cx, src, index, dst)
    }
    fn scatter_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        ops::rows::scatter_rows(&self.cx, src, index, dst)
    }
    fn scatter_add_rows(&self, src: &Buffer, index: &Buffer, dst: &mut Buffer) {
        ops::rows::scatter_add_rows(&self.cx, src, index, dst)
    }

    // --- products -----------------------------------------------------------------------------
    fn pack(
        &self,
        owner: Owner,
        weight: &Buffer,
        pack: Pack,
        format: WeightFormat,
        version: u64,
    ) -> Result<Packed> {
        ops::pack::pack(&self.cx, owner, weight, pack, format, version)
    }
    fn linear(&self, x: &Buffer, weight: &Packed, y: &mut Buffer, store: Store) {
        ops::linear::linear(&self.cx, x, weight, y, store)
    }
    fn linear_heads(
        &self,
        x: &Buffer,
        weight: &Packed,
        columns: HeadColumns,
        y: &mut Buffer,
        store: Store,
    ) {
        ops::linear::linear_heads(&self.cx, x, weight, columns, y, store)
    }
    fn linear_experts(&self, x: &Buffer, weight: &Packed, routes: &Routes, y: &mut Buffer) {
        ops::grouped::linear_experts(&self.cx, x, weight, routes, y)
    }
    fn linear_backward_weight(&self, dy: &Buffer, x: &Buffer, dw: &mut Buffer) {
        ops::linear::linear_backward_weight(&self.cx, dy, x, dw)
    }
    fn linear_heads_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        columns: HeadColumns,
        pack: Pack,
        dw: &mut Buffer,
    ) {
        ops::linear::linear_heads_backward_weight(&self.cx, dy, x, columns, pack, dw)
    }
    fn linear_experts_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        routes: &Routes,
        dw: &mut Buffer,
    ) {
        ops::grouped::linear_experts_backward_weight(&self.cx, dy, x, routes, dw)
    }

    // --- norms, positions, gates ----------------------------------------------------------------
    fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        epsilon: f64,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        ops::rms_norm::rms_norm(&self.cx, x, weight, epsilon, y, inverse_rms)
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
        ops::rms_norm::rms_norm_backward_input(&self.cx, dy, x, weight, inverse_rms, dx, store)
    }
    fn rms_norm_backward_weight(
        &self,
        dy: &Buffer,
        x: &Buffer,
        inverse_rms: &Buffer,
        dw: &mut Buffer,
    ) {
        ops::rms_norm::rms_norm_backward_weight(&self.cx, dy, x, inverse_rms, dw)
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
        ops::rope::rope(&self.cx, x, positions, table, heads, first, stride, inverse)
    }
    fn swiglu(&self, gate_up: &Buffer, y: &mut Buffer) {
        ops::swiglu::swiglu(&self.cx, gate_up, y)
    }
    fn swiglu_backward(&self, dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer) {
        ops::swiglu::swiglu_backward(&self.cx, dy, gate_up, d_gate_up)
    }

    // --- attention --------------------------------------------------------------------------------
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
        ops::mla_train::mla_train(&self.cx, shape, q, kv, k_rope, start, o, lse)
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
        ops::mla_train::mla_train_backward_input(
            &self.cx, shape, q, kv, k_rope, start, o, lse, d_o, dq, dkv, dk_rope,
        )
    }
    fn cache_shape(&self, layout: &CacheLayout) -> (DType, usize) {
        ops::cache_rows::cache_shape(layout)
    }
    fn write_cache(
        &self,
        spec: &CacheSpec<'_>,
        latent: &Buffer,
        rope: &Buffer,
        slots: &Buffer,
        cache: &mut Buffer,
    ) {
        ops::cache_rows::write_cache(&self.cx, spec, latent, rope, slots, cache)
    }
    fn read_cache(&self, spec: &CacheSpec<'_>, cache: &Buffer, slots: &Buffer, rows: &mut Buffer) {
        ops::cache_rows::read_cache(&self.cx, spec, cache, slots, rows)
    }
    fn mla_decode(
        &self,
        shape: &AttentionShape,
        q: &Buffer,
        spec: &CacheSpec<'_>,
        cache: &Buffer,
        batch: &DecodeBatch<'_>,
        o: &mut Buffer,
    ) -> Result<()> {
        ops::mla_decode::mla_decode(&self.cx, shape, q, spec, cache, batch, o)
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
        ops::mla_prefill::mla_prefill(&self.cx, shape, q, kv, k_rope, first, length, o, lse, store)
    }

    // --- experts ----------------------------------------------------------------------------------
    fn router(
        &self,
        spec: &RouterSpec,
        logits: &Buffer,
        scores: &mut Buffer,
        experts: &mut Buffer,
        weights: &mut Buffer,
    ) {
        ops::router::router(&self.cx, spec, logits, scores, experts, weights)
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
        ops::router::router_backward(&self.cx, spec, scores, experts, d_weights, d_scores, d_logits)
    }
    fn balance_loss(
        &self,
        spec: &BalanceSpec,
        scores: &Buffer,
        experts: &Buffer,
        segment: &Buffer,
        d_scores: &mut Buffer,
    ) -> Vec<f64> {
        ops::balance::balance_loss(&self.cx, spec, scores, experts, segment, d_scores)
    }
    fn count_routes(&self, experts: &Buffer, count: usize, groups: usize) -> RouteCounts {
        ops::routes::count_routes(&self.cx, experts, count, groups)
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
        ops::dropping::drop_overflow(&self.cx, spec, scores, experts, segment, protected, kept)
    }
    fn routes(&self, experts: &Buffer, count: usize) -> Result<Routes> {
        ops::routes::routes(&self.cx, experts, count)
    }
    fn combine(&self, x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) {
        ops::routes::combine(&self.cx, x, routes, weights, y)
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
        ops::routes::combine_backward(&self.cx, dy, x, routes, weights, dx, d_weights)
    }
    fn sum_slots(&self, x: &Buffer, routes: &Routes, y: &mut Buffer) {
        ops::routes::sum_slots(&self.cx, x, routes, y)
    }

    // --- head ---------------------------------------------------------------------------------------
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
        ops::head_logprob::head_logprob(
            &self.cx,
            x,
            head,
            targets,
            temperature,
            logprob,
            entropy,
            kept,
        )
    }
    fn logits_logprob(
        &self,
        logits: &mut Buffer,
        targets: &Buffer,
        temperature: f64,
        logprob: &mut Buffer,
    ) {
        ops::head_logprob::logits_logprob(&self.cx, logits, targets, temperature, logprob)
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
        ops::head_logprob::head_logprob_backward(
            &self.cx,
            x,
            head,
            plain,
            targets,
            temperature,
            c,
            kept,
            dx,
            dw,
        )
    }
    fn sample(&self, logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled> {
        ops::sample::sample(&self.cx, logits, rows)
    }

    // --- optimizer ------------------------------------------------------------------------------------
    fn squared_sum(&self, x: &Buffer) -> f64 {
        ops::adamw::squared_sum(&self.cx, x)
    }
    fn adamw(&self, update: &AdamW, g: &Buffer, w: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
        ops::adamw::adamw(&self.cx, update, g, w, m, v)
    }
}
