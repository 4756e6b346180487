//! The Generate phase of the engine: the packed policy, and the latent cache that it fills.

use super::hybrid::HybridEngine;
use super::phase::{Phase, Role};
use super::resident::{interrupted, out_of_memory};
use crate::config::engine::Prefill;
use crate::config::fault::Fault;
use crate::config::{Bytes, EngineConfig, ModelConfig};
use crate::inference::job::{DecodePasses, GenerateJob, GenerateReport, TokenGroup};
use crate::inference::{Forward, ForwardRows, Limits, generate, read_decoded, score_decoded};
use crate::model::cost::{forward_flops, weights_read};
use crate::model::parameters::{keys_and_values, multiplied};
use crate::model::{DecodeRows, LatentCache, PackedModel, Params, Transformer};
use anyhow::{Result, bail};
use rehearsal_kernels::{Activity, Buffer, Kernels, Kind, SampleRow, Sampled};
use std::collections::HashMap;

/// The policy as the sampler sees it.
pub(super) struct Decoder<'a> {
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
            .map_err(interrupted)?;
        Ok(if sampling.is_empty() { Vec::new() } else { self.kernels.sample(&logits, sampling) })
    }

    fn go_on(&mut self, has_rows: bool) -> Result<bool> {
        self.model.go_on(has_rows).map_err(interrupted)
    }

    fn stand_by(&mut self) -> Result<()> {
        self.model.stand_by(self.kernels, self.packed).map_err(interrupted)
    }

    fn copy_page(&mut self, from: u32, to: u32, tokens: usize) {
        self.cache.copy_page(self.kernels, from, to, tokens);
    }

    fn version(&self) -> u64 {
        self.packed.version
    }

    fn enter(&mut self, activity: Activity) {
        self.kernels.enter(activity);
    }
}

impl ForwardRows for Decoder<'_> {
    fn logprobs(&mut self, rows: &DecodeRows, each: &mut dyn FnMut(usize, &[f64])) -> Result<()> {
        let logits = self
            .model
            .decode(self.kernels, self.params, self.packed, self.cache, rows)
            .map_err(interrupted)?;
        each_distribution(self.kernels, &logits, each);
        Ok(())
    }
}

/// Calls `each(row, log-probabilities)` for every row of logits, at temperature 1.
pub(super) fn each_distribution(
    kernels: &dyn Kernels,
    logits: &Buffer,
    each: &mut dyn FnMut(usize, &[f64]),
) {
    for (index, row) in kernels.download_f64(logits).chunks_exact_mut(logits.cols()).enumerate() {
        let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|logit| (logit - highest).exp()).sum();
        let log = sum.ln();
        row.iter_mut().for_each(|logit| *logit = *logit - highest - log);
        each(index, row);
    }
}

/// Pages that a rollout of so many tokens in all may hold, in pages of `page` tokens.
pub fn pages_of(tokens: usize, context: usize, page: usize) -> usize {
    tokens.min(context).div_ceil(page) + 1
}

/// Pages that let `decode_batch` of the job's rollouts run at once, but no more than all of them need and, under
/// a budget, no more than half of what is left (the rest is for activations, and what is on the device for other phases, of
/// which `spare_bytes` would make room). A rollout that would not fit alone is
/// refused with the most new tokens that would.
fn pages_for(
    job: &GenerateJob,
    engine: &EngineConfig,
    kernels: &dyn Kernels,
    spare_bytes: u64,
    page_bytes: u64,
    context: usize,
) -> Result<usize> {
    let page = engine.page_tokens;
    let rollout = |tokens: usize| pages_of(tokens + job.max_new_tokens, context, page);
    let all: usize =
        job.requests.iter().map(|r| rollout(r.tokens.len()) * r.samples as usize).sum();
    let prompt = job.requests.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
    let longest = rollout(prompt);
    let wanted = all.min(longest * engine.decode_batch).max(longest);
    let arena = kernels.arena();
    let Some(budget) = arena.budget() else { return Ok(wanted) };
    let others = arena.in_use().saturating_sub(arena.held_by(Kind::Cache) + spare_bytes);
    let room = budget.saturating_sub(others);
    let fitting = (room / page_bytes.max(1)) as usize;
    if longest > fitting {
        let new_tokens = (fitting.saturating_sub(1) * page).saturating_sub(prompt);
        let way_out = match new_tokens {
            0 => "raise engine.budget".to_string(),
            most => format!(
                "ask for at most {most} new tokens (max_new_tokens), or raise engine.budget"
            ),
        };
        return Err(Fault::resources(format!(
            "one rollout of {prompt} + {} tokens takes {} of latent cache, and {} of the budget of {} are left; {way_out}",
            job.max_new_tokens,
            Bytes(longest as u64 * page_bytes),
            Bytes(room),
            Bytes(budget)
        )));
    }
    Ok(wanted.min(fitting / 2).max(longest))
}

impl HybridEngine {
    /// Samples rollouts from the policy; each group is handed out when its last rollout ends.
    pub fn generate(
        &mut self,
        job: &GenerateJob,
        on_group: &mut dyn FnMut(TokenGroup),
    ) -> Result<GenerateReport> {
        self.expect_phase(Phase::Generate, "generate")?;
        let team = &self.setup.team;
        let job = &job.share(team.sequence_groups(), team.sequence_group());
        let hands_out = team.hands_out();
        let pages = |engine: &HybridEngine, page_bytes, context| {
            let (settings, spare) = (&engine.setup.engine, engine.conductor.shelf.spare_bytes());
            let kernels = engine.kernels.as_ref();
            let pages = pages_for(job, settings, kernels, spare, page_bytes, context)?;
            // Who has the same sequences has to admit them in the same passes.
            engine.sampling_model().tensor.as_ref().map_or(Ok(pages), |ranks| {
                Ok(ranks.least("pages of the latent cache", pages as u64)? as usize)
            })
        };
        let tokens = job.requests.iter().map(|request| request.tokens.as_slice());
        self.check_tokens(tokens)?;
        let config = self.model_config().expect("checked by expect_phase").clone();
        let mut useful_flops: f64 =
            job.requests.iter().map(|r| forward_flops(&config, 0, r.tokens.len())).sum();
        let prompts: HashMap<u32, usize> =
            job.requests.iter().map(|r| (r.slot, r.tokens.len())).collect();
        let mut count = |group: TokenGroup| {
            let replies = group.rollouts.iter().map(|rollout| rollout.tokens.len());
            let flops = |reply| forward_flops(&config, prompts[&group.slot], reply);
            useful_flops += replies.map(flops).sum::<f64>();
            if hands_out {
                on_group(group);
            }
        };
        let mut report =
            self.with_cache(pages, |decoder, limits| generate(decoder, job, limits, &mut count))?;
        report.useful_flops = useful_flops;
        if !hands_out {
            // The first rank of the group tells what all of them have made.
            (report.prompt_tokens, report.new_tokens, report.useful_flops) = (0, 0, 0.0);
        }
        (report.least_bytes, report.working_bytes) = self.bytes_of(&report.decode, &config);
        Ok(report)
    }

    /// What passes that decoded had to read, and the weights with the cached tokens of the pass that saw most.
    fn bytes_of(&self, decode: &[DecodePasses], config: &ModelConfig) -> (f64, f64) {
        let (kernels, here) = (self.kernels.as_ref(), &self.sampling_model().here);
        let token = LatentCache::page_bytes(kernels, here, self.formats.cache, 1) as f64;
        // Where prompts may be expanded kv_b is packed once more, which decoding does not read.
        let beside = match self.prefill {
            Prefill::Absorbed => 0,
            Prefill::ByCost => keys_and_values(config),
        };
        let (all, held) = ((multiplied(config) + beside) as f64, self.packed_bytes() as f64);
        let (mut read, mut most) = (0.0, 0.0_f64);
        for passes in decode {
            let weights = weights_read(config, passes.rows as usize) / all * held;
            let cached = passes.cached_tokens as f64 * token;
            read += passes.passes as f64 * weights + cached;
            most = most.max(cached / passes.passes as f64);
        }
        (read, held + most)
    }

    /// Log-probabilities of each sequence's tokens from the second on, token by token through the sampler's cache.
    pub fn score_decoded(&mut self, sequences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        self.with_pages_of(sequences, |decoder, limits| score_decoded(decoder, sequences, limits))
    }

    /// Calls `each(sequence, position, log-probabilities of all tokens that may follow)` for every token but a
    /// sequence's last: in Generate token by token through the cache, in Score sequence by sequence without one.
    pub fn each_distribution(
        &mut self,
        sequences: &[Vec<u32>],
        each: &mut dyn FnMut(usize, usize, &[f64]),
    ) -> Result<()> {
        if self.phase == Phase::Score {
            let _during = Activity::Score.begin(&self.kernels);
            return self.scorer(&Role::Policy)?.each_distribution(sequences, each);
        }
        self.with_pages_of(sequences, |decoder, limits| {
            read_decoded(decoder, sequences, limits, each)
        })
    }

    /// Runs `work` with the packed policy and a cache in which as many of the sequences fit as may run together.
    fn with_pages_of<T>(
        &mut self,
        sequences: &[Vec<u32>],
        work: impl FnOnce(&mut Decoder<'_>, &Limits) -> Result<T>,
    ) -> Result<T> {
        self.expect_phase(Phase::Generate, "score through the cache")?;
        self.check_tokens(sequences.iter().map(Vec::as_slice))?;
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(1);
        let page = self.setup.engine.page_tokens;
        let at_once = sequences.len().clamp(1, self.setup.engine.decode_batch);
        self.with_cache(|_, _, _| Ok(longest.div_ceil(page) * at_once), work)
    }

    /// Runs `work` with the packed policy and a cache of at least `pages(self, bytes of a page, context)`.
    fn with_cache<T>(
        &mut self,
        pages: impl FnOnce(&HybridEngine, u64, usize) -> Result<usize>,
        work: impl FnOnce(&mut Decoder<'_>, &Limits) -> Result<T>,
    ) -> Result<T> {
        let _during = Activity::Decode.begin(&self.kernels);
        let (page_tokens, decode_batch) =
            (self.setup.engine.page_tokens, self.setup.engine.decode_batch);
        let config = self.sampling_model().here.clone();
        let (context, format) = (config.max_position_embeddings, self.formats.cache);
        let pages = pages(
            self,
            LatentCache::page_bytes(self.kernels.as_ref(), &config, format, page_tokens),
            context,
        )?;
        let kernels = self.kernels.as_ref();
        if self.working.cache.as_ref().is_none_or(|cache| cache.page_count() < pages) {
            self.working.cache = None;
            let cache = LatentCache::new(kernels, &config, format, pages, page_tokens)
                .map_err(out_of_memory)?;
            self.working.cache = Some(cache);
        }
        let cache = self.working.cache.as_mut().expect("just made");
        let limits = Limits { decode_batch, context, page_count: cache.page_count(), page_tokens };
        let packed = self.working.packed.as_ref().expect("Generate packs the policy");
        if let (Some(switch), Some(params)) = (&self.switch, &self.working.switched) {
            let model = &switch.model;
            return work(&mut Decoder { kernels, model, params, packed, cache }, &limits);
        }
        let policy = self.policy.as_mut().expect("checked by expect_phase");
        let (params, _) = policy.take(kernels)?;
        let result = work(
            &mut Decoder { kernels, model: &policy.model, params: &params, packed, cache },
            &limits,
        );
        policy.weights.put(params.slab);
        result
    }

    /// The policy as it is sampled.
    fn sampling_model(&self) -> &Transformer {
        let policy = self.policy.as_ref().expect("checked by expect_phase");
        self.switch.as_ref().map_or(&policy.model, |switch| &switch.model)
    }

    fn check_tokens<'a>(&self, mut sequences: impl Iterator<Item = &'a [u32]>) -> Result<()> {
        let vocabulary = self.policy.as_ref().map_or(0, |policy| policy.model.config.vocab_size);
        match sequences
            .find_map(|tokens| tokens.iter().find(|token| **token as usize >= vocabulary))
        {
            Some(token) => bail!(Fault::User(format!(
                "token id {token} is outside the vocabulary, which ends at {}",
                vocabulary - 1
            ))),
            None => Ok(()),
        }
    }
}
