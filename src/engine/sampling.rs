//! The Generate phase: weights packed for sampling, and the latent cache they fill.

use super::resident::out_of_memory;
use crate::config::EngineConfig;
use crate::inference::job::GenerateJob;
use crate::inference::{Forward, ForwardTargets};
use crate::model::{DecodeRows, LatentCache, PackedModel, Params, Transformer};
use anyhow::Result;
use rehearsal_kernels::{Kernels, SampleRow, Sampled};

/// The policy as the sampler sees it.
pub struct Decoder<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// The model.
    pub model: &'a Transformer,
    /// Its weights (embedding and norms are read from here).
    pub params: &'a Params,
    /// The same weights, packed for sampling.
    pub packed: &'a PackedModel,
    /// The latent cache.
    pub cache: &'a mut LatentCache,
}

impl Forward for Decoder<'_> {
    fn forward(&mut self, rows: &DecodeRows, sampling: &[SampleRow]) -> Result<Vec<Sampled>> {
        let logits = self
            .model
            .decode(self.kernels, self.params, self.packed, self.cache, rows)
            .map_err(out_of_memory)?;
        Ok(if sampling.is_empty() { Vec::new() } else { self.kernels.sample(&logits, sampling) })
    }

    fn copy_page(&mut self, from: u32, to: u32, tokens: usize) {
        self.cache.copy_page(self.kernels, from, to, tokens);
    }

    fn version(&self) -> u64 {
        self.packed.version
    }
}

impl ForwardTargets for Decoder<'_> {
    fn logprobs(&mut self, rows: &DecodeRows, targets: &[u32]) -> Result<Vec<f32>> {
        let logits = self
            .model
            .decode(self.kernels, self.params, self.packed, self.cache, rows)
            .map_err(out_of_memory)?;
        let flat = self.kernels.download_f64(&logits);
        let logprob = |(row, target): (&[f64], &u32)| {
            let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|logit| (logit - highest).exp()).sum();
            (row[*target as usize] - highest - sum.ln()) as f32
        };
        Ok(flat.chunks_exact(logits.cols()).zip(targets).map(logprob).collect())
    }
}

/// Pages that let `decode_batch` of the job's rollouts run at once, but no more than all of them need and, under
/// a budget, no more than half of what is left (the rest is for activations).
pub fn pages_for(
    job: &GenerateJob,
    engine: &EngineConfig,
    kernels: &dyn Kernels,
    page_bytes: u64,
    context: usize,
) -> usize {
    let page = engine.page_tokens;
    let rollout = |tokens: usize| (tokens + job.max_new_tokens).min(context).div_ceil(page) + 1;
    let all: usize =
        job.requests.iter().map(|r| rollout(r.tokens.len()) * r.samples as usize).sum();
    let longest = job.requests.iter().map(|r| rollout(r.tokens.len())).max().unwrap_or(1);
    let wanted = all.min(longest * engine.decode_batch).max(longest);
    let arena = kernels.arena();
    let room = arena.budget().map_or(u64::MAX, |budget| budget.saturating_sub(arena.held()) / 2);
    wanted.min((room / page_bytes.max(1)) as usize).max(longest)
}
