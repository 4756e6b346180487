//! Multi-head latent attention (DeepSeek-V2, section 2.1 and appendix C; deepseek_v2.md 1.2 and 1.5).
//!
//! Shapes: T rows, H heads, c = kv_lora_rank, r = qk_rope_head_dim, n = qk_nope_head_dim, v = v_head_dim.
//! The form is an argument: *expanded* makes keys and values per head from the latent, *absorbed* moves W_UK
//! into the query and W_UV behind the sum over the latent; both give the same output up to rounding. Products
//! W_UK W_UQ and W_O W_UV are never formed.
//!
//! Steps of the forward pass (backward runs them in reverse):
//!   1. one product gives [q_a | latent | rope key]
//!   2. queries: norm and q_b, or q directly; RoPE on each head's rope part
//!   3. the latent is normed, the rope key rotated: together one cache entry
//!   4. attention in the chosen form
//!   5. W_O, added to the residual stream

use super::cache::LayerCache;
use super::linear::{Linear, Packing};
use super::norm::{Norm, Normed};
use super::params::{Gradients, MlaIndex, Params};
use super::pass::{Pass, PassError, floats};
use super::per_head::{Dims, PerHead, reversed};
use super::prefill::SamplerRows;
use super::transformer::PackFor;
use crate::config::ModelConfig;
use crate::config::engine::{AttentionForm, Prefill};
use rehearsal_kernels::{Buffer, CacheSpec, Kernels, OutOfMemory, Pack, Product, RopeTable, Store};

/// What goes round the ranks of a tensor group in step 5: inputs and outputs of W_O.
pub(super) const OUTPUT: [&str; 2] = ["outputs of heads", "outputs of attention"];

/// A packed attention layer: of all heads, or of those that a rank of a tensor group has.
pub struct Mla {
    dims: Dims,
    down: Linear,
    query: Option<(Norm, Linear)>,
    latent_norm: Norm,
    core: Core,
    output: Linear,
}

/// kv_b, packed for one of the two forms; for the sampler's prompts, for both.
#[allow(clippy::large_enum_variant, reason = "one per layer")]
enum Core {
    Expanded { kv_b: Linear },
    Absorbed { kv_b: usize, key: PerHead, value: PerHead, prompts: Option<Linear> },
}

/// Steps 1 to 3: what both forms and the sampler need.
struct Projected {
    down: Buffer,
    query_normed: Option<Normed>,
    q: Buffer,
    latent: Normed,
    k_rope: Buffer,
}

/// What the backward pass needs.
pub struct MlaSaved {
    projected: Projected,
    /// Expanded: [key | value] per head. Absorbed: the absorbed queries.
    expanded: Buffer,
    /// Output of attention: per head the value, or (absorbed) the sum over the latent.
    attended: Buffer,
    lse: Buffer,
    /// Per head the value, the input of W_O; absorbed form only.
    values: Option<Buffer>,
}

/// What the weight gradients wait for.
pub struct MlaPending {
    d_down: Buffer,
    dq: Buffer,
    d_query_normed: Option<Buffer>,
    d_latent: Buffer,
    /// Gradient of `expanded`.
    d_expanded: Buffer,
    /// Gradient of `values`; absorbed form only.
    d_values: Option<Buffer>,
}

/// Gradients below attention: rotated queries and keys, the latent, and what the core saved.
struct CoreGradients {
    dq: Buffer,
    d_latent: Buffer,
    dk_rope: Buffer,
    d_expanded: Buffer,
    d_values: Option<Buffer>,
}

impl Mla {
    /// Packs the weights for one form of attention.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
        index: &MlaIndex,
        pack: PackFor,
    ) -> Result<Mla, OutOfMemory> {
        let dims = Dims::new(config);
        let norm = |weight, factor| Norm { weight, epsilon: dims.epsilon, factor };
        let (query_factor, latent_factor) = config.latent_factors();
        let query = match index.query {
            Some((weight, q_b)) => {
                let q_b = Linear::pack(packing, params, q_b..q_b + 1, 1)?;
                Some((norm(weight, query_factor), q_b))
            }
            None => None,
        };
        let inner = packing.inner();
        let expanding = || Linear::pack(&inner, params, index.kv_b..index.kv_b + 1, 1);
        let core = match pack.form {
            AttentionForm::Expanded => Core::Expanded { kv_b: expanding()? },
            AttentionForm::Absorbed => {
                let rows = |product, first_row, rows| Pack {
                    product,
                    groups: dims.heads,
                    group_stride: dims.nope + dims.value,
                    first_row,
                    rows,
                };
                let weight = params.slab.tensor(index.kv_b);
                Core::Absorbed {
                    kv_b: index.kv_b,
                    key: PerHead::pack(&inner, &weight, rows(Product::Plain, 0, dims.nope))?,
                    value: PerHead::pack(
                        &inner,
                        &weight,
                        rows(Product::Transposed, dims.nope, dims.value),
                    )?,
                    prompts: match pack.prefill {
                        Prefill::Absorbed => None,
                        Prefill::ByCost => Some(expanding()?),
                    },
                }
            }
        };
        Ok(Mla {
            dims,
            down: Linear::pack(packing, params, index.down.clone(), 1)?,
            query,
            latent_norm: norm(index.latent_norm, latent_factor),
            core,
            output: Linear::pack_cut(packing, params, index.output)?,
        })
    }

    /// `y += MLA(x)` over packed documents.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        x: &Buffer,
        y: &mut Buffer,
    ) -> Result<MlaSaved, PassError> {
        let (kernels, dims) = (pass.kernels, &self.dims);
        let projected = self.project(kernels, params, x, &pass.documents.positions, pass.rope)?;
        let mut lse = pass.floats(x.rows(), dims.heads)?;
        let start = &pass.documents.start;
        match &self.core {
            Core::Expanded { kv_b } => {
                let mut kv = pass.floats(x.rows(), kv_b.outputs())?;
                kv_b.forward(kernels, &projected.latent.y, &mut kv, Store::Set);
                let mut o = pass.floats(x.rows(), dims.heads * dims.value)?;
                kernels.mla_train(
                    &dims.expanded(),
                    &projected.q,
                    &kv,
                    &projected.k_rope,
                    start,
                    &mut o,
                    &mut lse,
                )?;
                self.output.add_all(kernels, OUTPUT, &o, y)?;
                Ok(MlaSaved { projected, expanded: kv, attended: o, lse, values: None })
            }
            Core::Absorbed { value, .. } => {
                let q = self.absorb(kernels, &projected.q)?;
                let mut z = pass.floats(x.rows(), dims.heads * dims.latent)?;
                let latent = &projected.latent.y;
                kernels.mla_train(
                    &dims.absorbed(),
                    &q,
                    latent,
                    &projected.k_rope,
                    start,
                    &mut z,
                    &mut lse,
                )?;
                let mut o = pass.floats(x.rows(), dims.heads * dims.value)?;
                self.values(kernels, value, &z, &mut o);
                self.output.add_all(kernels, OUTPUT, &o, y)?;
                Ok(MlaSaved { projected, expanded: q, attended: z, lse, values: Some(o) })
            }
        }
    }

    /// `y += MLA(x)` for sampler rows: writes their entries to `cache` and attends to it, absorbed but for the parts
    /// that expand their context.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        x: &Buffer,
        rope: &RopeTable,
        rows: &SamplerRows,
        cache: &mut LayerCache<'_>,
        y: &mut Buffer,
    ) -> Result<(), PassError> {
        let Core::Absorbed { value, prompts, .. } = &self.core else {
            panic!("the sampler packs the absorbed form")
        };
        let dims = &self.dims;
        let projected = self.project(kernels, params, x, &rows.positions, rope)?;
        // What the norm multiplied the latent by: a format of few bits takes it out again.
        let channels = params.slab.tensor(self.latent_norm.weight);
        let spec = CacheSpec { layout: cache.layout, channels: Some(&channels) };
        let (latent, key) = (&projected.latent.y, &projected.k_rope);
        kernels.write_cache(&spec, latent, key, &rows.slots, cache.rows);
        let mut o = floats(kernels, x.rows(), dims.heads * dims.value)?;
        for part in &rows.parts {
            let q = projected.q.rows_of(part.rows.clone());
            let mut o = o.rows_of_mut(part.rows.clone());
            if let Some(context) = &part.context {
                let kv_b = prompts.as_ref().expect("kv_b is packed for prompts by cost");
                let seen = &part.length;
                context.attend(kernels, dims, kv_b, &q, seen, &spec, cache.rows, &mut o)?;
                continue;
            }
            let q = self.absorb(kernels, &q)?;
            let mut z = floats(kernels, q.rows(), dims.heads * dims.latent)?;
            let batch = rows.batch(part);
            kernels.mla_decode(&dims.absorbed(), &q, &spec, cache.rows, &batch, &mut z)?;
            self.values(kernels, value, &z, &mut o);
        }
        self.output.add_all(kernels, OUTPUT, &o, y)
    }

    /// Sets dx, given the gradient dy of the output.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        saved: &MlaSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<MlaPending, OutOfMemory> {
        let (kernels, dims) = (pass.kernels, &self.dims);
        let projected = &saved.projected;
        // 5, 4: W_O and attention.
        let CoreGradients { mut dq, d_latent, mut dk_rope, d_expanded, d_values } =
            self.backward_core(pass, saved, dy)?;
        // 3, 2: rotate back, norms, q_b.
        self.rotate(kernels, &mut dq, &pass.documents.positions, pass.rope, true);
        kernels.rope(&mut dk_rope, &pass.documents.positions, pass.rope, 1, 0, 0, true);
        let mut d_down = pass.floats(dy.rows(), projected.down.cols())?;
        let d_query_normed = self.backward_query(pass, params, projected, &dq, &mut d_down)?;
        let columns = dims.query_a..dims.query_a + dims.latent;
        self.latent_norm.backward_input(
            kernels,
            params,
            &d_latent,
            &projected.down.cols_of(columns.clone()),
            &projected.latent,
            &mut d_down.cols_of_mut(columns.clone()),
            Store::Set,
        );
        kernels.copy(&dk_rope, &mut d_down.cols_of_mut(columns.end..columns.end + dims.rope));
        // 1: the joined product.
        self.down.backward_input(kernels, &d_down, dx, Store::Set);
        Ok(MlaPending { d_down, dq, d_query_normed, d_latent, d_expanded, d_values })
    }

    /// Steps 5 and 4 of the backward pass: W_O and attention.
    fn backward_core(
        &self,
        pass: &Pass<'_>,
        saved: &MlaSaved,
        dy: &Buffer,
    ) -> Result<CoreGradients, OutOfMemory> {
        let (kernels, dims, rows) = (pass.kernels, &self.dims, dy.rows());
        let projected = &saved.projected;
        let mut d_values = pass.floats(rows, dims.heads * dims.value)?;
        self.output.backward_input(kernels, dy, &mut d_values, Store::Set);
        let mut d_expanded = pass.floats(rows, saved.expanded.cols())?;
        let mut d_latent = pass.floats(rows, dims.latent)?;
        let mut dk_rope = pass.floats(rows, dims.rope)?;
        let mut dq = pass.floats(rows, dims.heads * dims.query())?;
        let start = &pass.documents.start;
        let d_values = match &self.core {
            Core::Expanded { kv_b } => {
                kernels.mla_train_backward_input(
                    &dims.expanded(),
                    &projected.q,
                    &saved.expanded,
                    &projected.k_rope,
                    start,
                    &saved.attended,
                    &saved.lse,
                    &d_values,
                    &mut dq,
                    &mut d_expanded,
                    &mut dk_rope,
                )?;
                kv_b.backward_input(kernels, &d_expanded, &mut d_latent, Store::Set);
                None
            }
            Core::Absorbed { key, value, .. } => {
                let mut dz = pass.floats(rows, dims.heads * dims.latent)?;
                kernels.linear_heads(
                    &d_values,
                    value.backward(),
                    reversed(dims.value_columns()),
                    &mut dz,
                    Store::Set,
                );
                kernels.mla_train_backward_input(
                    &dims.absorbed(),
                    &saved.expanded,
                    &projected.latent.y,
                    &projected.k_rope,
                    start,
                    &saved.attended,
                    &saved.lse,
                    &dz,
                    &mut d_expanded,
                    &mut d_latent,
                    &mut dk_rope,
                )?;
                kernels.linear_heads(
                    &d_expanded,
                    key.backward(),
                    reversed(dims.key_columns()),
                    &mut dq,
                    Store::Set,
                );
                dims.copy_rope(kernels, &d_expanded, dims.latent, &mut dq, dims.nope);
                Some(d_values)
            }
        };
        Ok(CoreGradients { dq, d_latent, dk_rope, d_expanded, d_values })
    }

    /// Adds the weights' gradients; x and dy are the forward's input and the output's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        saved: &MlaSaved,
        pending: &MlaPending,
        x: &Buffer,
        dy: &Buffer,
        gradients: &mut Gradients,
    ) {
        let (dims, projected) = (&self.dims, &saved.projected);
        match &self.core {
            Core::Expanded { kv_b } => {
                self.output.backward_weight(kernels, dy, &saved.attended, gradients);
                kv_b.backward_weight(kernels, &pending.d_expanded, &projected.latent.y, gradients);
            }
            Core::Absorbed { kv_b, key, value, .. } => {
                let (values, d_values) =
                    saved.values.as_ref().zip(pending.d_values.as_ref()).expect("absorbed form");
                self.output.backward_weight(kernels, dy, values, gradients);
                let mut dw = gradients.tensor(*kv_b);
                kernels.linear_heads_backward_weight(
                    d_values,
                    &saved.attended,
                    dims.value_columns(),
                    value.rows,
                    &mut dw,
                );
                kernels.linear_heads_backward_weight(
                    &pending.d_expanded,
                    &projected.q,
                    dims.key_columns(),
                    key.rows,
                    &mut dw,
                );
            }
        }
        if let (Some((norm, q_b)), Some(normed), Some(d_normed)) =
            (&self.query, &projected.query_normed, &pending.d_query_normed)
        {
            q_b.backward_weight(kernels, &pending.dq, &normed.y, gradients);
            norm.backward_weight(
                kernels,
                d_normed,
                &projected.down.cols_of(0..dims.query_a),
                normed,
                gradients,
            );
        }
        let latent = projected.down.cols_of(dims.query_a..dims.query_a + dims.latent);
        self.latent_norm.backward_weight(
            kernels,
            &pending.d_latent,
            &latent,
            &projected.latent,
            gradients,
        );
        self.down.backward_weight(kernels, &pending.d_down, x, gradients);
    }

    /// Steps 1 to 3.
    fn project(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        x: &Buffer,
        positions: &Buffer,
        rope: &RopeTable,
    ) -> Result<Projected, OutOfMemory> {
        let dims = &self.dims;
        let mut down = floats(kernels, x.rows(), self.down.outputs())?;
        self.down.forward(kernels, x, &mut down, Store::Set);
        let mut q = floats(kernels, x.rows(), dims.heads * dims.query())?;
        let query_normed = match &self.query {
            Some((norm, q_b)) => {
                let normed = norm.forward(kernels, params, &down.cols_of(0..dims.query_a))?;
                q_b.forward(kernels, &normed.y, &mut q, Store::Set);
                Some(normed)
            }
            None => {
                kernels.copy(&down.cols_of(0..dims.query_a), &mut q);
                None
            }
        };
        self.rotate(kernels, &mut q, positions, rope, false);
        let columns = dims.query_a..dims.query_a + dims.latent;
        let latent = self.latent_norm.forward(kernels, params, &down.cols_of(columns.clone()))?;
        let mut k_rope = floats(kernels, x.rows(), dims.rope)?;
        kernels.copy(&down.cols_of(columns.end..columns.end + dims.rope), &mut k_rope);
        kernels.rope(&mut k_rope, positions, rope, 1, 0, 0, false);
        Ok(Projected { down, query_normed, q, latent, k_rope })
    }

    /// Moves W_UK into the query: per head [q_nope W_UK | q_rope].
    fn absorb(&self, kernels: &dyn Kernels, q: &Buffer) -> Result<Buffer, OutOfMemory> {
        let Core::Absorbed { key, .. } = &self.core else { panic!("packed for the absorbed form") };
        let dims = &self.dims;
        let mut absorbed = floats(kernels, q.rows(), dims.heads * (dims.latent + dims.rope))?;
        kernels.linear_heads(q, &key.forward, dims.key_columns(), &mut absorbed, Store::Set);
        self.dims.copy_rope(kernels, q, dims.nope, &mut absorbed, dims.latent);
        Ok(absorbed)
    }

    /// Per head W_UV z.
    fn values(&self, kernels: &dyn Kernels, value: &PerHead, z: &Buffer, o: &mut Buffer) {
        kernels.linear_heads(z, &value.forward, self.dims.value_columns(), o, Store::Set);
    }

    fn rotate(
        &self,
        kernels: &dyn Kernels,
        q: &mut Buffer,
        positions: &Buffer,
        rope: &RopeTable,
        inverse: bool,
    ) {
        kernels.rope(
            q,
            positions,
            rope,
            self.dims.heads,
            self.dims.nope,
            self.dims.query(),
            inverse,
        );
    }

    /// Writes the query part of d_down; returns the gradient of the normed queries if they are compressed.
    fn backward_query(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        projected: &Projected,
        dq: &Buffer,
        d_down: &mut Buffer,
    ) -> Result<Option<Buffer>, OutOfMemory> {
        let columns = 0..self.dims.query_a;
        let (Some((norm, q_b)), Some(normed)) = (&self.query, &projected.query_normed) else {
            pass.kernels.copy(dq, &mut d_down.cols_of_mut(columns));
            return Ok(None);
        };
        let mut d_normed = pass.floats(dq.rows(), self.dims.query_a)?;
        q_b.backward_input(pass.kernels, dq, &mut d_normed, Store::Set);
        norm.backward_input(
            pass.kernels,
            params,
            &d_normed,
            &projected.down.cols_of(columns.clone()),
            normed,
            &mut d_down.cols_of_mut(columns),
            Store::Set,
        );
        Ok(Some(d_normed))
    }
}
