//! The generate and score phases of a device.

use super::items::longest_example;
use super::{Device, Extent, Phase};
use crate::config::stage::EvalConfig;
use crate::config::{Dtype, StageKind};
use crate::engine::{PREFILL_ROWS, ROWS_AT_ONCE, pages_of, weight_format};
use crate::model::PackFor;
use crate::model::pass_bytes::PassRows;
use crate::model::weight_bytes::{cache_bytes, packed_bytes_of, weight_bytes};
use crate::plan::estimate::generated_lines;
use crate::plan::memory::{Owners, total};

/// What is to be sampled.
#[derive(Clone, Copy)]
struct Wanted {
    /// Prompts of this device's share; as many as decode at once if nobody knows.
    prompts: usize,
    /// Rollouts of each.
    samples: usize,
    /// New tokens at most.
    new_tokens: usize,
    dtype: Dtype,
}

impl Device<'_> {
    /// The larger of evals and rollouts; `None` if this device never samples in the stage.
    pub(super) fn generate(&self, extent: Extent) -> Option<Phase> {
        if self.place.is_some() && self.team.samplers > 0 {
            return None;
        }
        let groups = self.sampling().ranks / self.sampling().tensor;
        let evals = self.stage.eval.iter().filter(|eval| eval.verifier.is_some());
        let eval = |eval: &EvalConfig| Wanted {
            prompts: self
                .examples(&eval.data, eval.limit)
                .map_or(self.config.engine.decode_batch, |all| all.div_ceil(groups)),
            samples: 1,
            new_tokens: eval.max_new_tokens,
            dtype: Dtype::F32,
        };
        let rollouts = match &self.stage.kind {
            StageKind::Grpo(grpo) => Some(Wanted {
                prompts: grpo.prompts.div_ceil(groups),
                samples: grpo.group_size,
                new_tokens: grpo.max_new_tokens,
                // A processor without products of integers samples from f32.
                dtype: match grpo.rollout_dtype {
                    Dtype::Int8 => Dtype::F32,
                    dtype => dtype,
                },
            }),
            _ => None,
        };
        let wanted = evals.map(eval).chain(rollouts);
        let phases = wanted.map(|wanted| self.sample(wanted, extent));
        phases.max_by_key(|phase| total(&phase.working))
    }

    /// A commit between two steps, after an eval that sampled: moments come in beside what that has made. `None` where no eval
    /// stands before a commit.
    pub(super) fn save(&self, extent: Extent) -> Option<Phase> {
        let is_between = |eval: &EvalConfig| eval.verifier.is_some() && eval.every > 0;
        self.place.filter(|_| self.stage.eval.iter().any(is_between))?;
        let mut phase = self.generate(extent)?;
        phase.working.remove("policy/activations");
        phase.needed = self.items();
        phase.needed.retain(|owner, _| owner.starts_with("policy/"));
        Some(phase)
    }

    fn sample(&self, wanted: Wanted, extent: Extent) -> Phase {
        let engine = &self.config.engine;
        let context = self.model.max_position_embeddings;
        let whole =
            longest_example(self.config, self.model).max(wanted.new_tokens + 1).min(context);
        let prompt = whole.saturating_sub(wanted.new_tokens).max(1);
        let passes = self.sampling_passes();
        let rollouts = wanted.prompts * wanted.samples;
        let decode = PassRows {
            tokens: rollouts.min(engine.decode_batch),
            sequences: rollouts.min(engine.decode_batch),
            longest: whole,
        };
        let rows = (wanted.prompts * prompt).min(PREFILL_ROWS);
        let prefill =
            PassRows { tokens: rows, sequences: wanted.prompts.min(rows), longest: prompt };
        let first = rollouts.min(engine.decode_batch + wanted.samples);
        let pages = whole.div_ceil(engine.page_tokens) + 1;
        let cache = crate::engine::Formats::default().cache;
        let pass = |rows: PassRows, logits| passes.decode(rows, logits, pages, self.prefill, cache);
        let activations = pass(decode, decode.tokens).max(pass(prefill, first));
        let format = weight_format(wanted.dtype);
        let pack = PackFor { format, prefill: self.prefill, ..PackFor::SAMPLING };
        let here = self.sampled.part.attention(self.model);
        let bytes = |pages| cache_bytes(&here, pages, engine.page_tokens);
        let longest = pages_of(prompt + wanted.new_tokens, context, engine.page_tokens);
        let asked = (longest * rollouts.min(engine.decode_batch)).max(longest);
        let [longest, asked] = [longest, asked].map(bytes);
        let cache = match extent {
            Extent::Asked => asked,
            // The engine gives the cache no more than half of what is left, and no less than one rollout takes; pages of
            // the arena come on top.
            Extent::Least => {
                let rounding = bytes(1);
                longest.max(asked.min(activations + rounding))
            }
        };
        let mut working = self.switched();
        working.extend([
            ("policy/packed".to_string(), packed_bytes_of(&self.sampled, self.model, pack)),
            ("policy/cache".to_string(), cache),
            ("policy/activations".to_string(), activations),
        ]);
        Phase { needed: self.policy(), working }
    }

    /// The examples of a set that are looked at, of which `limit` are the first, or all; `None` where only the set's file tells.
    fn examples(&self, set: &str, limit: usize) -> Option<usize> {
        let limit = (limit > 0).then_some(limit);
        let lines = generated_lines(self.config).get(set).map(|lines| *lines as usize);
        lines.into_iter().chain(limit).min()
    }

    /// Sequences that the policy scores in one job, of all ranks; `None` where only a file tells.
    fn measured(&self) -> Option<usize> {
        let of = |set: &str, limit| self.examples(set, limit).map(|examples| 2 * examples);
        let evals = self.stage.eval.iter().filter(|eval| eval.metric.is_some());
        let evals = evals.map(|eval| of(&eval.data, eval.limit));
        let fitted = match &self.stage.kind {
            StageKind::RewardModel(stage) => {
                Some(of(stage.calibration.as_ref().unwrap_or(&stage.data), 0))
            }
            _ => None,
        };
        let all: Option<Vec<usize>> = evals.chain(fitted).collect();
        all?.into_iter().max()
    }

    fn policy(&self) -> Owners {
        Owners::from([("policy/weights".to_string(), weight_bytes(&self.own))])
    }

    /// The policy in another layout than the one that it is kept in.
    fn switched(&self) -> Owners {
        let switched = self.switches().then(|| weight_bytes(&self.sampled));
        switched
            .map(|bytes| ("policy in sampling/weights".to_string(), bytes))
            .into_iter()
            .collect()
    }

    /// The model whose scoring holds most; `None` if nothing is scored here in the stage.
    pub(super) fn score(&self, extent: Extent) -> Option<Phase> {
        let trains = self.place.is_some();
        let is_fitted = matches!(self.stage.kind, StageKind::RewardModel(_));
        let has_policy = trains && (self.is_measured() || is_fitted) || self.compares();
        let policy = has_policy.then(|| "policy".to_string());
        let roles = policy.into_iter().chain(self.others());
        let phases = roles.map(|role| self.scored(&role, extent));
        phases.max_by_key(|phase| total(&phase.needed) + total(&phase.working))
    }

    /// Whether an eval scores.
    fn is_measured(&self) -> bool {
        self.stage.eval.iter().any(|eval| eval.metric.is_some())
    }

    /// Whether it scores what it has sampled ahead, by the policy that sampled it.
    fn compares(&self) -> bool {
        let samples = self.place.is_none() || self.team.samplers == 0;
        samples && matches!(&self.stage.kind, StageKind::Grpo(grpo) if grpo.max_staleness > 0)
    }

    fn scored(&self, role: &str, extent: Extent) -> Phase {
        let is_policy = role == "policy";
        let layout = if is_policy { None } else { Some(self.layout_of(role)) };
        let layout = layout.as_ref().unwrap_or(&self.sampled);
        let pack = PackFor::documents(self.form, false);
        let (needed, mut working) = match is_policy {
            true => (self.policy(), self.switched()),
            false => {
                let weights = (format!("{role}/weights"), weight_bytes(layout));
                (Owners::from([weights]), Owners::new())
            }
        };
        let rows = self.scored_rows(is_policy, extent);
        working.extend([
            (format!("{role}/packed"), packed_bytes_of(layout, self.model, pack)),
            (
                "policy/activations".to_string(),
                self.sampling_passes().forward_only(rows, rows.tokens),
            ),
        ]);
        Phase { needed, working }
    }

    /// Rows that go through at once: of rollouts this device's share, which shares prompts; of evals as many as the engine takes.
    fn scored_rows(&self, is_policy: bool, extent: Extent) -> PassRows {
        let longest = longest_example(self.config, self.model);
        // Who has all experts and heads takes less at once where memory is short.
        let sampling = self.sampling();
        if extent == Extent::Least && sampling.tensor == 1 && sampling.expert == 1 {
            return PassRows { tokens: longest, sequences: 1, longest };
        }
        let most = ROWS_AT_ONCE.max(longest);
        let groups = sampling.ranks / sampling.tensor;
        let share = |rows: usize| rows.div_ceil(groups) + if groups > 1 { longest } else { 0 };
        let tokens = match &self.stage.kind {
            _ if is_policy && !self.compares() => {
                self.measured().map_or(most, |all| share(all * longest))
            }
            // An eval may have more than the batch that is compared.
            StageKind::Grpo(_) if is_policy && self.is_measured() => most,
            StageKind::Grpo(grpo) => {
                let prompt = longest.saturating_sub(grpo.max_new_tokens).max(1);
                let group = prompt + grpo.group_size * grpo.max_new_tokens;
                share(grpo.prompts * group + prompt * (groups - 1))
            }
            _ => most,
        };
        let tokens = tokens.min(most);
        PassRows { tokens, sequences: 2 * tokens.div_ceil(longest.max(1)).max(1), longest }
    }
}
