//! DeepSeekMoE (deepseek_v2.md 1.9-1.11): y += Σ shared FFN(u) + Σ_{i in S} g_i FFN_i(u).
//!
//! Tokens are sorted by expert (slots), so that each expert's products run on neighbouring rows. The gate is
//! computed in the float dtype of the kernels (f32 or wider) on every path.

use super::linear::{Linear, Packing};
use super::mlp::{Mlp, MlpPending, MlpSaved};
use super::params::{FeedForwardIndex, Gradients, Params};
use super::pass::{Pass, floats, index_buffer};
use crate::config::ModelConfig;
use crate::config::model::TopkMethod;
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, RouterSpec, Routes, Store, WeightFormat};

/// A packed mixture of experts.
pub struct Moe {
    spec: RouterSpec,
    experts: usize,
    router: Linear,
    gate_up: Linear,
    down: Linear,
    shared: Option<Mlp>,
}

/// What the backward pass needs.
pub struct MoeSaved {
    scores: Buffer,
    chosen: Buffer,
    weights: Buffer,
    routes: Routes,
    /// Inputs, pre-activations, activations and outputs in slot order.
    x: Buffer,
    gate_up: Buffer,
    activated: Buffer,
    y: Buffer,
    shared: Option<MlpSaved>,
}

/// What the weight gradients wait for.
pub struct MoePending {
    d_y: Buffer,
    d_gate_up: Buffer,
    d_logits: Buffer,
    shared: Option<MlpPending>,
    balance_loss: f64,
}

/// What a layer's routing did.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Slots that were routed to each expert.
    pub slots: Vec<u32>,
    /// Balance loss of this pass, weighted.
    pub balance_loss: f64,
}

/// How a model's routers choose.
pub fn router_spec(config: &ModelConfig) -> RouterSpec {
    let limited = config.topk_method == TopkMethod::GroupLimitedGreedy;
    RouterSpec {
        groups: if limited { config.n_group } else { 1 },
        top_groups: if limited { config.topk_group } else { 1 },
        top_k: config.num_experts_per_tok,
        scale: config.routed_scaling_factor,
        normalize: config.norm_topk_prob,
    }
}

impl Moe {
    /// Packs the weights.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
        index: &FeedForwardIndex,
    ) -> Result<Moe, OutOfMemory> {
        let FeedForwardIndex::Moe { router, gate_up, down, shared } = index else {
            panic!("a dense layer has no experts");
        };
        let experts = config.n_routed_experts;
        let shared = shared.as_ref().map(|index| Mlp::pack(packing, params, index)).transpose()?;
        Ok(Moe {
            spec: router_spec(config),
            experts,
            // DeepSeek-V2 keeps its gate in f32 whatever the other weights are (deepseek_v2.md, section 5).
            router: Linear::pack(
                &packing.kept(WeightFormat::F32),
                params,
                *router..*router + 1,
                1,
            )?,
            gate_up: Linear::pack(packing, params, gate_up.clone(), experts)?,
            down: Linear::pack(packing, params, down.clone(), experts)?,
            shared,
        })
    }

    /// `y += MoE(u)`.
    pub fn forward(
        &self,
        kernels: &dyn Kernels,
        u: &Buffer,
        y: &mut Buffer,
    ) -> Result<MoeSaved, OutOfMemory> {
        let (rows, slots) = (u.rows(), u.rows() * self.spec.top_k);
        let mut logits = floats(kernels, rows, self.experts)?;
        self.router.forward(kernels, u, &mut logits, Store::Set);
        let mut scores = floats(kernels, rows, self.experts)?;
        let mut chosen = index_buffer(kernels, rows, self.spec.top_k)?;
        let mut weights = floats(kernels, rows, self.spec.top_k)?;
        kernels.router(&self.spec, &logits, &mut scores, &mut chosen, &mut weights);
        let routes = kernels.routes(&chosen, self.experts)?;
        let mut x = floats(kernels, slots, u.cols())?;
        kernels.gather_rows(u, &routes.token, &mut x);
        let mut gate_up = floats(kernels, slots, self.gate_up.outputs())?;
        self.gate_up.forward_experts(kernels, &x, &routes, &mut gate_up);
        let mut activated = floats(kernels, slots, self.gate_up.outputs() / 2)?;
        kernels.swiglu(&gate_up, &mut activated);
        let mut output = floats(kernels, slots, u.cols())?;
        self.down.forward_experts(kernels, &activated, &routes, &mut output);
        kernels.combine(&output, &routes, &weights, y);
        let shared = self.shared.as_ref().map(|mlp| mlp.forward(kernels, u, y)).transpose()?;
        Ok(MoeSaved { scores, chosen, weights, routes, x, gate_up, activated, y: output, shared })
    }

    /// Sets dx; the balance loss of the pass is added to the gradient and returned.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        saved: &MoeSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<MoePending, OutOfMemory> {
        let kernels = pass.kernels;
        let shared = match (&self.shared, &saved.shared) {
            (Some(mlp), Some(saved)) => Some(mlp.backward_input(pass, saved, dy, dx)?),
            _ => {
                kernels.fill(dx, 0.0);
                None
            }
        };
        let mut d_y = pass.floats(saved.y.rows(), saved.y.cols())?;
        let mut d_weights = pass.floats(saved.weights.rows(), saved.weights.cols())?;
        kernels.combine_backward(
            dy,
            &saved.y,
            &saved.routes,
            &saved.weights,
            &mut d_y,
            &mut d_weights,
        );
        let mut d_activated = pass.floats(d_y.rows(), saved.activated.cols())?;
        self.down.backward_input_experts(kernels, &d_y, &saved.routes, &mut d_activated);
        let mut d_gate_up = pass.floats(d_y.rows(), saved.gate_up.cols())?;
        kernels.swiglu_backward(&d_activated, &saved.gate_up, &mut d_gate_up);
        let mut d_x = pass.floats(d_y.rows(), saved.x.cols())?;
        self.gate_up.backward_input_experts(kernels, &d_gate_up, &saved.routes, &mut d_x);
        kernels.sum_slots(&d_x, &saved.routes, dx);

        let mut d_scores = pass.floats(saved.scores.rows(), self.experts)?;
        kernels.fill(&mut d_scores, 0.0);
        let balance_loss = self.balance(pass, saved, &mut d_scores);
        let mut d_logits = pass.floats(saved.scores.rows(), self.experts)?;
        kernels.router_backward(
            &self.spec,
            &saved.scores,
            &saved.chosen,
            &d_weights,
            &d_scores,
            &mut d_logits,
        );
        self.router.backward_input(kernels, &d_logits, dx, Store::Add);
        Ok(MoePending { d_y, d_gate_up, d_logits, shared, balance_loss })
    }

    /// Adds the weights' gradients; u and dy are the forward's input and the output's gradient.
    pub fn backward_weight(
        &self,
        kernels: &dyn Kernels,
        saved: &MoeSaved,
        pending: &MoePending,
        u: &Buffer,
        dy: &Buffer,
        gradients: &mut Gradients,
    ) {
        self.router.backward_weight(kernels, &pending.d_logits, u, gradients);
        self.down.backward_weight_experts(
            kernels,
            &pending.d_y,
            &saved.activated,
            &saved.routes,
            gradients,
        );
        self.gate_up.backward_weight_experts(
            kernels,
            &pending.d_gate_up,
            &saved.x,
            &saved.routes,
            gradients,
        );
        if let (Some(mlp), Some(saved), Some(pending)) =
            (&self.shared, &saved.shared, &pending.shared)
        {
            mlp.backward_weight(kernels, saved, pending, u, dy, gradients);
        }
    }

    /// Load and balance loss of a pass.
    pub fn routing(
        &self,
        kernels: &dyn Kernels,
        saved: &MoeSaved,
        pending: &MoePending,
    ) -> Routing {
        let offsets = kernels.download_indices(&saved.routes.offsets);
        let slots = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Routing { slots, balance_loss: pending.balance_loss }
    }

    fn balance(&self, pass: &Pass<'_>, saved: &MoeSaved, d_scores: &mut Buffer) -> f64 {
        if pass.balance == 0.0 {
            return 0.0;
        }
        let segment = &pass.documents.segment;
        pass.share
            * pass.kernels.balance_loss(
                &saved.scores,
                &saved.chosen,
                segment,
                pass.balance,
                pass.share,
                d_scores,
            )
    }
}
