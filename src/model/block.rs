//! One layer: h = x + attention(norm(x)); y = h + FFN(norm(h)) (deepseek_v2.md 1.1).

use super::attention::{Attention, AttentionPending, AttentionSaved};
use super::cache::LayerCache;
use super::dispatch::ExpertRanks;
use super::linear::Packing;
use super::mlp::{Mlp, MlpPending, MlpSaved};
use super::moe::{Moe, MoePending, MoeSaved, Routing};
use super::norm::{Norm, Normed};
use super::params::{FeedForwardIndex, Gradients, LayerIndex, Params};
use super::pass::{Pass, PassError, floats};
use super::prefill::SamplerRows;
use super::transformer::PackFor;
use crate::config::ModelConfig;
use rehearsal_kernels::{Buffer, Kernels, OutOfMemory, RopeTable, Store};
use std::sync::Arc;

/// A packed layer.
pub struct Block {
    input_norm: Norm,
    attention: Attention,
    post_norm: Norm,
    feed_forward: FeedForward,
}

#[allow(clippy::large_enum_variant, reason = "one per layer")]
enum FeedForward {
    Dense(Mlp),
    Moe(Moe),
}

#[allow(clippy::large_enum_variant, reason = "one per layer")]
enum FeedForwardSaved {
    Dense(MlpSaved),
    Moe(MoeSaved),
}

#[allow(clippy::large_enum_variant, reason = "one per layer")]
enum FeedForwardPending {
    Dense(MlpPending),
    Moe(MoePending),
}

/// What the backward pass needs.
pub struct BlockSaved {
    x: Buffer,
    input: Normed,
    attention: AttentionSaved,
    h: Buffer,
    post: Normed,
    feed_forward: FeedForwardSaved,
}

/// What the weight gradients wait for.
pub struct BlockPending {
    dy: Buffer,
    dh: Buffer,
    d_input: Buffer,
    d_post: Buffer,
    attention: AttentionPending,
    feed_forward: FeedForwardPending,
}

impl Block {
    /// Packs the weights of a layer of a model; `here` is the model with the heads that are here.
    pub fn pack(
        packing: &Packing<'_>,
        params: &Params,
        [config, here]: [&ModelConfig; 2],
        index: &LayerIndex,
        pack: PackFor,
        experts: Option<Arc<ExpertRanks>>,
    ) -> Result<Block, OutOfMemory> {
        let norm = |weight| Norm { weight, epsilon: config.rms_norm_eps, factor: 1.0 };
        let feed_forward = match &index.feed_forward {
            FeedForwardIndex::Dense(mlp) => FeedForward::Dense(Mlp::pack(packing, params, mlp)?),
            moe => FeedForward::Moe(Moe::pack(packing, params, config, moe, experts)?),
        };
        Ok(Block {
            input_norm: norm(index.input_norm),
            attention: Attention::pack(packing, params, here, &index.attention, pack)?,
            post_norm: norm(index.post_norm),
            feed_forward,
        })
    }

    /// From the residual stream x to the next layer's.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        x: Buffer,
    ) -> Result<(Buffer, BlockSaved), PassError> {
        let kernels = pass.kernels;
        let input = self.input_norm.forward(kernels, params, &x)?;
        let mut h = pass.copy(&x)?;
        let attention = self.attention.forward(pass, params, &input.y, &mut h)?;
        let post = self.post_norm.forward(kernels, params, &h)?;
        let mut y = pass.copy(&h)?;
        let feed_forward = match &self.feed_forward {
            FeedForward::Dense(mlp) => {
                FeedForwardSaved::Dense(mlp.forward(kernels, &post.y, &mut y)?)
            }
            FeedForward::Moe(moe) => {
                let limit = pass.capacity.as_ref().map(|c| (c, &pass.documents.segment));
                FeedForwardSaved::Moe(moe.forward(kernels, &post.y, &mut y, limit)?)
            }
        };
        Ok((y, BlockSaved { x, input, attention, h, post, feed_forward }))
    }

    /// The same for sampler rows, in place.
    pub fn decode(
        &self,
        kernels: &dyn Kernels,
        params: &Params,
        x: &mut Buffer,
        rope: &RopeTable,
        rows: &SamplerRows,
        cache: &mut LayerCache<'_>,
    ) -> Result<(), PassError> {
        let input = self.input_norm.forward(kernels, params, x)?;
        self.attention.decode(kernels, params, &input.y, rope, rows, cache, x)?;
        let post = self.post_norm.forward(kernels, params, x)?;
        match &self.feed_forward {
            FeedForward::Dense(mlp) => drop(mlp.forward(kernels, &post.y, x)?),
            FeedForward::Moe(moe) => drop(moe.forward(kernels, &post.y, x, None)?),
        }
        Ok(())
    }

    /// Takes part in a pass of other ranks without a row of its own.
    pub fn stand_by(&self, kernels: &dyn Kernels, width: usize) -> Result<(), PassError> {
        if let FeedForward::Moe(moe) = &self.feed_forward {
            let [u, mut y] = [floats(kernels, 0, width)?, floats(kernels, 0, width)?];
            moe.forward(kernels, &u, &mut y, None)?;
        }
        Ok(())
    }

    /// From the gradient of the layer's output to that of its input.
    pub fn backward_input(
        &self,
        pass: &Pass<'_>,
        params: &Params,
        saved: &BlockSaved,
        dy: Buffer,
    ) -> Result<(Buffer, BlockPending), PassError> {
        let kernels = pass.kernels;
        let mut d_post = pass.floats(dy.rows(), dy.cols())?;
        let feed_forward = match (&self.feed_forward, &saved.feed_forward) {
            (FeedForward::Dense(mlp), FeedForwardSaved::Dense(saved)) => {
                FeedForwardPending::Dense(mlp.backward_input(pass, saved, &dy, &mut d_post)?)
            }
            (FeedForward::Moe(moe), FeedForwardSaved::Moe(saved)) => {
                FeedForwardPending::Moe(moe.backward_input(pass, saved, &dy, &mut d_post)?)
            }
            _ => unreachable!("a layer saves what it computes"),
        };
        let mut dh = pass.copy(&dy)?;
        self.post_norm.backward_input(
            kernels,
            params,
            &d_post,
            &saved.h,
            &saved.post,
            &mut dh,
            Store::Add,
        );
        let mut d_input = pass.floats(dy.rows(), dy.cols())?;
        let attention =
            self.attention.backward_input(pass, params, &saved.attention, &dh, &mut d_input)?;
        let mut dx = pass.copy(&dh)?;
        self.input_norm.backward_input(
            kernels,
            params,
            &d_input,
            &saved.x,
            &saved.input,
            &mut dx,
            Store::Add,
        );
        Ok((dx, BlockPending { dy, dh, d_input, d_post, attention, feed_forward }))
    }

    /// Adds the weights' gradients.
    pub fn backward_weight(
        &self,
        pass: &Pass<'_>,
        saved: &BlockSaved,
        pending: &BlockPending,
        gradients: &mut Gradients,
    ) {
        let kernels = pass.kernels;
        match (&self.feed_forward, &saved.feed_forward, &pending.feed_forward) {
            (
                FeedForward::Dense(mlp),
                FeedForwardSaved::Dense(saved_mlp),
                FeedForwardPending::Dense(pending_mlp),
            ) => {
                mlp.backward_weight(
                    kernels,
                    saved_mlp,
                    pending_mlp,
                    &saved.post.y,
                    &pending.dy,
                    gradients,
                );
            }
            (
                FeedForward::Moe(moe),
                FeedForwardSaved::Moe(saved_moe),
                FeedForwardPending::Moe(pending_moe),
            ) => {
                moe.backward_weight(
                    kernels,
                    saved_moe,
                    pending_moe,
                    &saved.post.y,
                    &pending.dy,
                    gradients,
                );
            }
            _ => unreachable!("a layer saves what it computes"),
        }
        self.post_norm.backward_weight(kernels, &pending.d_post, &saved.h, &saved.post, gradients);
        self.attention.backward_weight(
            kernels,
            &saved.attention,
            &pending.attention,
            &saved.input.y,
            &pending.dh,
            gradients,
        );
        self.input_norm.backward_weight(
            kernels,
            &pending.d_input,
            &saved.x,
            &saved.input,
            gradients,
        );
    }

    /// What the layer's router did; `None` for a dense layer.
    pub fn routing(
        &self,
        kernels: &dyn Kernels,
        saved: &BlockSaved,
        pending: &BlockPending,
    ) -> Option<Routing> {
        match (&self.feed_forward, &saved.feed_forward, &pending.feed_forward) {
            (
                FeedForward::Moe(moe),
                FeedForwardSaved::Moe(saved),
                FeedForwardPending::Moe(pending),
            ) => Some(moe.routing(kernels, saved, pending)),
            _ => None,
        }
    }
}
