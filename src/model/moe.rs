//! DeepSeekMoE (deepseek_v2.md 1.9-1.12): y += Σ shared FFN(u) + Σ_{i in S} g_i FFN_i(u).
//!
//! Tokens are sorted by expert (slots), so that each expert's products run on neighbouring rows. The gate is
//! computed in the float dtype of the kernels (f32 or wider) on every path. A pair of token and expert that a full device
//! drops has no slot: it costs nothing and adds nothing; the other weights of the token stay what they are.

use super::dispatch::{Dispatched, ExpertRanks, Slots};
use super::linear::{Linear, Packing};
use super::mlp::{Mlp, MlpPending, MlpSaved};
use super::params::{FeedForwardIndex, Gradients, Params};
use super::pass::{Capacity, Pass, PassError, floats, index_buffer};
use super::tensor_ranks::TensorRanks;
use crate::cluster::Doing;
use crate::config::ModelConfig;
use crate::config::routing::Balance;
use rehearsal_kernels::{
    BalanceSpec, Buffer, DropCounts, DropSpec, Kernels, OutOfMemory, RouterSpec, Routes, Store,
    WeightFormat,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A packed mixture of experts.
pub struct Moe {
    spec: RouterSpec,
    experts: usize,
    /// Who has the other experts, if they are not all here.
    ranks: Option<Arc<ExpertRanks>>,
    /// Who has the same rows, if others do: each sends its share of them to their experts.
    sharers: Option<Arc<TensorRanks>>,
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
    /// What was dropped, if anything might be.
    drops: Option<DropCounts>,
    /// Slots of this rank's tokens.
    routes: Routes,
    /// Whose tokens the experts here worked on, if others' were among them.
    dispatched: Option<Dispatched>,
    /// Inputs, pre-activations and activations of the experts here, by expert.
    x: Buffer,
    gate_up: Buffer,
    activated: Buffer,
    /// Outputs in the slots of this rank's tokens.
    y: Buffer,
    shared: Option<MlpSaved>,
}

/// What the weight gradients wait for.
pub struct MoePending {
    d_y: Buffer,
    d_gate_up: Buffer,
    d_logits: Buffer,
    shared: Option<MlpPending>,
    balance: Vec<f64>,
}

/// What a layer's router did in a pass.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Routing {
    /// Tokens that chose each expert, whether or not they were dropped.
    pub experts: Vec<u32>,
    /// Rows T.
    pub tokens: usize,
    /// Groups of experts, D.
    pub groups: usize,
    /// Groups that hold an expert of a token, summed over tokens.
    pub devices: u64,
    /// What full devices dropped, if they were limited.
    pub drops: Option<DropCounts>,
    /// Balance losses of each document, weighted; none if all weights are 0.
    pub balance: Vec<f64>,
}

/// How a model's routers choose.
pub fn router_spec(config: &ModelConfig) -> RouterSpec {
    let groups = config.device_count();
    RouterSpec {
        groups,
        top_groups: if groups > 1 { config.topk_group } else { 1 },
        top_k: config.num_experts_per_tok,
        scale: config.routed_scaling_factor,
        // As published: a single expert's score is not divided by itself.
        normalize: config.norm_topk_prob && config.num_experts_per_tok > 1,
    }
}

impl MoeSaved {
    /// The rows of each expert here.
    fn routes_here(&self) -> &Routes {
        self.dispatched.as_ref().map_or(&self.routes, |dispatched| &dispatched.routes)
    }
}

impl Moe {
    /// Packs the weights.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        config: &ModelConfig,
        index: &FeedForwardIndex,
        ranks: Option<Arc<ExpertRanks>>,
    ) -> Result<Moe, OutOfMemory> {
        let FeedForwardIndex::Moe { router, gate_up, down, shared } = index else {
            panic!("a dense layer has no experts");
        };
        let (experts, here) = (config.n_routed_experts, down.len());
        let shared = shared.as_ref().map(|index| Mlp::pack(packing, params, index)).transpose()?;
        Ok(Moe {
            spec: router_spec(config),
            experts,
            ranks,
            sharers: packing.ranks.cloned(),
            // DeepSeek-V2 keeps its gate in f32 whatever the other weights are (deepseek_v2.md, section 5).
            router: Linear::pack(
                &packing.kept(WeightFormat::F32),
                params,
                *router..*router + 1,
                1,
            )?,
            gate_up: Linear::pack(packing, params, gate_up.clone(), here)?,
            down: Linear::pack(packing, params, down.clone(), here)?,
            shared,
        })
    }

    /// `y += MoE(u)`. Of the ranks of a tensor group, which have the same rows, each sends its share to the experts. `limit` is what a device may process, with the number of each row's document.
    pub fn forward(
        &self,
        kernels: &dyn Kernels,
        u: &Buffer,
        y: &mut Buffer,
        limit: Option<(&Capacity, &Buffer)>,
    ) -> Result<MoeSaved, PassError> {
        let own = self.sharers.as_ref().map_or(0..u.rows(), |sharers| sharers.own(u.rows()));
        let (own_u, rows) = (u.rows_of(own.clone()), own.len());
        let mut logits = floats(kernels, rows, self.experts)?;
        self.router.forward(kernels, &own_u, &mut logits, Store::Set);
        let mut scores = floats(kernels, rows, self.experts)?;
        let mut chosen = index_buffer(kernels, rows, self.spec.top_k)?;
        let mut weights = floats(kernels, rows, self.spec.top_k)?;
        kernels.router(&self.spec, &logits, &mut scores, &mut chosen, &mut weights);
        let (routes, drops) = self.routes(kernels, &scores, &chosen, limit)?;
        let mut x = floats(kernels, routes.slots(), u.cols())?;
        kernels.gather_rows(&own_u, &routes.token, &mut x);
        let slots = match &self.ranks {
            Some(ranks) => ranks.send(kernels, x, &routes)?,
            None => Slots::Here(x),
        };
        let (x, dispatched, shared) = match self.is_serial() {
            true => {
                let (x, dispatched) = slots.take(kernels)?;
                (x, dispatched, self.activate_shared(kernels, u)?)
            }
            false => {
                let shared = self.activate_shared(kernels, u)?;
                let (x, dispatched) = slots.take(kernels)?;
                (x, dispatched, shared)
            }
        };
        let here = dispatched.as_ref().map_or(&routes, |dispatched| &dispatched.routes);
        let mut gate_up = floats(kernels, x.rows(), self.gate_up.outputs())?;
        self.gate_up.forward_experts(kernels, &x, here, &mut gate_up);
        let mut activated = floats(kernels, x.rows(), self.gate_up.outputs() / 2)?;
        kernels.swiglu(&gate_up, &mut activated);
        let mut output = floats(kernels, x.rows(), u.cols())?;
        self.down.forward_experts(kernels, &activated, here, &mut output);
        let output = self.give_back(kernels, output, dispatched.as_ref())?;
        kernels.combine(&output, &routes, &weights, &mut y.rows_of_mut(own));
        self.join_rows(kernels, y)?;
        if let (Some(mlp), Some(saved)) = (&self.shared, &shared) {
            mlp.finish(kernels, saved, y)?;
        }
        Ok(MoeSaved {
            scores,
            chosen,
            weights,
            drops,
            routes,
            dispatched,
            x,
            gate_up,
            activated,
            y: output,
            shared,
        })
    }

    /// Brings together the rows that ranks of a tensor group have sent to experts: what the shared experts need of them
    /// first, where there are such.
    fn join_rows(&self, kernels: &dyn Kernels, y: &mut Buffer) -> Result<(), PassError> {
        const ROWS: &str = "rows with their experts' outputs";
        let Some(sharers) = &self.sharers else { return Ok(()) };
        let joined = match self.shared.is_some() {
            true => sharers.rows_to_columns(kernels, ROWS, y),
            false => sharers.gather_rows(kernels, ROWS, y),
        };
        Ok(joined?)
    }

    fn is_serial(&self) -> bool {
        self.ranks.as_ref().is_some_and(|ranks| ranks.is_serial)
    }

    /// What of the shared experts can be computed while tokens are under way.
    fn activate_shared(
        &self,
        kernels: &dyn Kernels,
        u: &Buffer,
    ) -> Result<Option<MlpSaved>, OutOfMemory> {
        self.beside(|| self.shared.as_ref().map(|mlp| mlp.activate(kernels, u)).transpose())
    }

    /// Runs `work` of the shared experts, and writes down when.
    fn beside<T>(&self, work: impl FnOnce() -> T) -> T {
        let timeline = self.ranks.as_ref().map(|ranks| (&ranks.timeline, ranks.timeline.now()));
        let made = work();
        if let Some((timeline, since)) = timeline {
            timeline.add(Doing::SharedExperts, since);
        }
        made
    }

    /// Rows by expert as rows in this rank's slots.
    fn give_back(
        &self,
        kernels: &dyn Kernels,
        made: Buffer,
        dispatched: Option<&Dispatched>,
    ) -> Result<Buffer, PassError> {
        match (&self.ranks, dispatched) {
            (Some(ranks), Some(dispatched)) => ranks.give_back(kernels, &made, dispatched),
            _ => Ok(made),
        }
    }

    /// The slots of what the router chose, less what full devices drop.
    fn routes(
        &self,
        kernels: &dyn Kernels,
        scores: &Buffer,
        chosen: &Buffer,
        limit: Option<(&Capacity, &Buffer)>,
    ) -> Result<(Routes, Option<DropCounts>), OutOfMemory> {
        let Some((capacity, segment)) = limit else {
            return Ok((kernels.routes(chosen, self.experts)?, None));
        };
        let spec = DropSpec { groups: self.spec.groups, capacity_factor: capacity.factor };
        let mut kept = index_buffer(kernels, chosen.rows(), chosen.cols())?;
        let protected = &capacity.protected;
        let drops = kernels.drop_overflow(&spec, scores, chosen, segment, protected, &mut kept);
        Ok((kernels.routes(&kept, self.experts)?, Some(drops)))
    }

    /// Sets dx; the balance losses of the pass are added to the gradient.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        saved: &MoeSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<MoePending, PassError> {
        let kernels = pass.kernels;
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
        let (d_y, shared) = self.send_gradients(pass, saved, d_y, dy, dx)?;
        let here = saved.routes_here();
        let mut d_activated = pass.floats(d_y.rows(), saved.activated.cols())?;
        self.down.backward_input_experts(kernels, &d_y, here, &mut d_activated);
        let mut d_gate_up = pass.floats(d_y.rows(), saved.gate_up.cols())?;
        kernels.swiglu_backward(&d_activated, &saved.gate_up, &mut d_gate_up);
        let mut d_x = pass.floats(d_y.rows(), saved.x.cols())?;
        self.gate_up.backward_input_experts(kernels, &d_gate_up, here, &mut d_x);
        let d_x = self.give_back(kernels, d_x, saved.dispatched.as_ref())?;
        kernels.sum_slots(&d_x, &saved.routes, dx);

        let mut d_scores = pass.floats(saved.scores.rows(), self.experts)?;
        kernels.fill(&mut d_scores, 0.0);
        let balance = self.balance(pass, saved, &mut d_scores);
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
        Ok(MoePending { d_y, d_gate_up, d_logits, shared, balance })
    }

    /// The gradients of the outputs of the experts here; sets dx to that of the shared experts while they are under way.
    fn send_gradients(
        &self,
        pass: &Pass<'_>,
        saved: &MoeSaved,
        d_y: Buffer,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<(Buffer, Option<MlpPending>), PassError> {
        let kernels = pass.kernels;
        let (Some(ranks), Some(dispatched)) = (&self.ranks, &saved.dispatched) else {
            return Ok((d_y, self.backward_shared(pass, saved, dy, dx)?));
        };
        let sending = ranks.send_again(kernels, &d_y, dispatched)?;
        if ranks.is_serial {
            let d_y = sending.take_again(kernels, &d_y, dispatched)?;
            return Ok((d_y, self.backward_shared(pass, saved, dy, dx)?));
        }
        let shared = self.backward_shared(pass, saved, dy, dx)?;
        Ok((sending.take_again(kernels, &d_y, dispatched)?, shared))
    }

    fn backward_shared(
        &self,
        pass: &Pass<'_>,
        saved: &MoeSaved,
        dy: &Buffer,
        dx: &mut Buffer,
    ) -> Result<Option<MlpPending>, OutOfMemory> {
        self.beside(|| match (&self.shared, &saved.shared) {
            (Some(mlp), Some(saved)) => mlp.backward_input(pass, saved, dy, dx).map(Some),
            _ => {
                pass.kernels.fill(dx, 0.0);
                Ok(None)
            }
        })
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
            saved.routes_here(),
            gradients,
        );
        self.gate_up.backward_weight_experts(
            kernels,
            &pending.d_gate_up,
            &saved.x,
            saved.routes_here(),
            gradients,
        );
        if let (Some(mlp), Some(saved), Some(pending)) =
            (&self.shared, &saved.shared, &pending.shared)
        {
            mlp.backward_weight(kernels, saved, pending, u, dy, gradients);
        }
    }

    /// What the router did.
    pub fn routing(
        &self,
        kernels: &dyn Kernels,
        saved: &MoeSaved,
        pending: &MoePending,
    ) -> Routing {
        let groups = self.spec.groups;
        let counts = kernels.count_routes(&saved.chosen, self.experts, groups);
        Routing {
            experts: counts.experts,
            tokens: saved.chosen.rows(),
            groups,
            devices: counts.devices,
            drops: saved.drops,
            balance: pending.balance.clone(),
        }
    }

    /// The balance losses of each document; they count what was chosen, dropped or not.
    fn balance(&self, pass: &Pass<'_>, saved: &MoeSaved, d_scores: &mut Buffer) -> Vec<f64> {
        if pass.balance == Balance::NONE {
            return Vec::new();
        }
        let Balance { expert, device, communication } = pass.balance;
        let RouterSpec { groups, top_groups, .. } = self.spec;
        let sequences = pass.sequences;
        let spec = BalanceSpec { groups, top_groups, expert, device, communication, sequences };
        let (segment, kernels) = (&pass.documents.segment, pass.kernels);
        kernels.balance_loss(&spec, &saved.scores, &saved.chosen, segment, d_scores)
    }
}
