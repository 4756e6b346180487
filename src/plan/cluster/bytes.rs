//! Bytes of each rank by phase, from the real layouts.
//!
//! All ranks of a pipeline stage hold as much as its first one, or less: its share of the moments is the one that is longer
//! by an element where they do not divide. Owners are named as in the ledger.
//!
//! | phase    | resident                                                                                  |
//! |----------|-------------------------------------------------------------------------------------------|
//! | train    | weights, gradients, its ZeRO-1 share of moments and f32 masters, activations of the live micro-batches |
//! | generate | weights as trained, the sampler's copy in its own layout and type, cache                  |
//! | score    | weights, the model that scores and the one that comes next, activations of one layer      |
//!
//! What is not offloaded stays in every phase. The first `engine.recompute` layers of each piece keep nothing but their
//! input; with `[cluster.hardware]` the fewest that would fit are told. Without it the copies that this program packs for a CPU
//! are counted too.

use super::batch::Batch;
use super::load::Load;
use crate::cluster::layout::{Home, Sampling, Slice, Tensor, Training};
use crate::config::stage::GrpoStage;
use crate::config::{Attention, Bytes, Offload, RunConfig, Stage, StageKind};
use crate::plan::cost::cache_elements_per_token;
use crate::plan::estimate::example_tokens;
use crate::plan::memory::{Owners, kept_numbers, others, total, widest_numbers};
use crate::train::pipeline::Schedule;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;

/// What the ranks of one pipeline stage hold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageBytes {
    /// First of its ranks.
    pub first_rank: usize,
    /// Last of them.
    pub last_rank: usize,
    /// Its layers, piece by piece: first and the one behind the last.
    pub layers: Vec<[usize; 2]>,
    /// The least `engine.recompute` with which training fits into the device, in the stage of the run that asks for most; absent
    /// without `[cluster.hardware]`, and where none fits.
    pub least_recompute: Option<usize>,
    /// Bytes by phase and owner, of the stage of the run that holds most in the phase.
    pub phases: BTreeMap<&'static str, Owners>,
}

/// Who holds most.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peak {
    /// Bytes.
    pub bytes: u64,
    /// The first rank that holds them.
    pub rank: usize,
    /// In which phase.
    pub phase: &'static str,
    /// Of which stage of the run.
    pub stage: String,
}

/// What the ranks of a stage hold of a model, as trained.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Elements.
    pub weights: u64,
    /// Those of routed experts among them.
    pub experts: u64,
    /// Those that are multiplied with, and packed on a CPU.
    pub multiplied: u64,
    /// Elements whose moments it keeps.
    pub moments: u64,
}

/// The layouts of a run.
#[derive(Debug)]
pub struct Layouts {
    /// Of training.
    pub training: Training,
    /// Of sampling.
    pub sampling: Sampling,
    /// The model's tensors.
    pub tensors: Vec<Tensor>,
    /// What the ranks of each stage hold.
    pub held: Vec<Held>,
}

impl Layouts {
    /// Of layouts and tensors.
    pub fn new(training: Training, sampling: Sampling, tensors: Vec<Tensor>) -> Layouts {
        let mesh = *training.mesh();
        let of = |stage: usize| {
            let rank = stage * mesh.data();
            let mut held = Held::default();
            for slice in training.weights(rank, &tensors) {
                let (tensor, count) = (&tensors[slice.tensor], slice.elements() as u64);
                held.weights += count;
                held.experts += if matches!(tensor.home, Home::Expert { .. }) { count } else { 0 };
                held.multiplied += if is_multiplied(tensor) { count } else { 0 };
            }
            let runs = training.moments(rank, &tensors);
            held.moments = runs.iter().map(|run| run.elements.len() as u64).sum();
            held
        };
        let held = (0..mesh.pipeline()).map(of).collect();
        Layouts { training, sampling, tensors, held }
    }

    /// Bytes of the sampler's copy on its fullest rank, in a type; `own` bytes for what is not multiplied with.
    pub fn sampler_bytes(&self, code: u64, own: u64) -> u64 {
        let of = |slice: &Slice| {
            let tensor = &self.tensors[slice.tensor];
            let each = match tensor.home {
                _ if !is_multiplied(tensor) => own,
                Home::Head | Home::Tied => code.max(2),
                _ => code,
            };
            slice.elements() as u64 * each
        };
        self.sampling.weights(0, &self.tensors).iter().map(of).sum()
    }

    /// Elements of routed experts that a rank has for sampling.
    pub fn sampled_experts(&self) -> u64 {
        let slices = self.sampling.weights(0, &self.tensors);
        let is_expert =
            |slice: &&Slice| matches!(self.tensors[slice.tensor].home, Home::Expert { .. });
        slices.iter().filter(is_expert).map(|slice| slice.elements() as u64).sum()
    }
}

fn is_multiplied(tensor: &Tensor) -> bool {
    tensor.rows > 1 && tensor.home != Home::Embedding
}

/// Sizes of one stage of a run on the ranks of one stage of the pipeline.
pub struct Sizes<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The stage of the run.
    pub stage: &'a Stage,
    /// Its model and machine.
    pub load: Load<'a>,
    /// Layouts.
    pub layouts: &'a Layouts,
    /// Micro-batches of the stage of the run.
    pub batch: Batch,
    /// The schedule, of as many micro-batches as can be live.
    pub schedule: &'a Schedule,
}

impl Sizes<'_> {
    /// Bytes by phase.
    pub fn phases(&self, place: usize) -> BTreeMap<&'static str, Owners> {
        let mut train = self.lasting(place);
        let recomputed = self.config.engine.recompute;
        train.insert("policy/activations".into(), self.activations(place, recomputed));
        let mut phases = BTreeMap::from([("train", train)]);
        if let StageKind::Grpo(grpo) = &self.stage.kind {
            phases.insert("generate", self.generate(place, grpo));
            if !others(grpo).is_empty() {
                phases.insert("score", self.score(place, grpo));
            }
        }
        phases
    }

    /// The least `engine.recompute` with which training fits into so many bytes.
    pub fn least_recompute(&self, place: usize, room: u64) -> Option<usize> {
        let lasting = total(&self.lasting(place));
        let most = self.layouts.training.layers(place).iter().map(Range::len).max().unwrap_or(0);
        (0..=most).find(|count| lasting.saturating_add(self.activations(place, *count)) <= room)
    }

    fn number(&self) -> u64 {
        self.load.number_bytes() as u64
    }

    fn held(&self, place: usize) -> Held {
        self.layouts.held[place]
    }

    fn weights(&self, place: usize) -> u64 {
        self.held(place).weights * self.number()
    }

    /// Bytes of two moments, and of f32 masters beside narrower weights.
    fn optimizer(&self, place: usize) -> [(&'static str, u64); 2] {
        let masters = if self.number() < 4 { 4 } else { 0 };
        let moments = self.held(place).moments;
        [("policy/moments", 8 * moments), ("policy/masters", masters * moments)]
    }

    /// What training holds but for activations.
    fn lasting(&self, place: usize) -> Owners {
        let gradient = self.load.hardware.map_or(4, |hardware| hardware.gradient_dtype.bytes());
        let mut owners = self.parked(place, 0);
        owners.insert("policy/weights".into(), self.weights(place));
        owners.insert("policy/gradients".into(), self.held(place).weights * gradient);
        owners.extend(self.optimizer(place).map(|(owner, bytes)| (owner.to_string(), bytes)));
        self.add_packed(&mut owners, place, 2);
        owners.retain(|_, bytes| *bytes > 0);
        owners
    }

    /// What live micro-batches keep, the first `recomputed` layers of each piece their input alone, and what one layer needs
    /// on its way back.
    fn activations(&self, place: usize, recomputed: usize) -> u64 {
        let model = self.load.model;
        let kept = |(index, layer): (usize, usize)| match index < recomputed {
            true => model.hidden_size,
            false => kept_numbers(model, model.is_moe(layer)),
        };
        let pieces = self.layouts.training.layers(place).into_iter();
        let kept: usize = pieces.flat_map(|piece| piece.enumerate().map(kept)).sum();
        let live = self.schedule.most_live(place);
        let tokens = self.batch.tokens_held as f64;
        // A layer's activations with their gradients, and those of a layer that is computed again.
        let once = if recomputed > 0 { 3 } else { 2 } * widest_numbers(model);
        ((live * kept as f64 + once as f64) * tokens * self.load.number_bytes()) as u64
    }

    fn generate(&self, place: usize, grpo: &GrpoStage) -> Owners {
        let mut owners = self.parked(place, 0);
        owners.insert("policy/weights".into(), self.weights(place));
        let code = self.load.code_bytes(grpo.rollout_dtype);
        let sampler = self.layouts.sampler_bytes(code, self.number());
        owners.insert("policy/sampler".into(), sampler);
        owners.insert("policy/cache".into(), self.cache(grpo));
        let rows = self.rows_at_once(grpo) as u64;
        let activations = rows * widest_numbers(self.load.model) as u64 * self.number();
        owners.insert("policy/activations".into(), activations);
        self.add_resting_optimizer(&mut owners, place);
        owners
    }

    /// Sequences that a rank decodes at once: the ranks of a tensor group decode the same ones.
    fn rows_at_once(&self, grpo: &GrpoStage) -> usize {
        let Sampling { ranks, tensor, .. } = self.layouts.sampling;
        let rows = (grpo.prompts * grpo.group_size).div_ceil(ranks / tensor);
        rows.min(self.config.engine.decode_batch)
    }

    /// The latents of MLA cannot be cut by heads, keys and values of groups of heads can.
    fn cache(&self, grpo: &GrpoStage) -> u64 {
        let model = self.load.model;
        let longest = example_tokens(self.config) + grpo.max_new_tokens;
        let page = self.config.engine.page_tokens;
        let tokens = longest.min(model.max_position_embeddings).div_ceil(page) * page;
        let parts = match model.attention() {
            Attention::Mla => 1,
            Attention::Gqa { kv_heads, .. } => self.layouts.sampling.tensor.min(kv_heads),
        } as u64;
        let bits = u64::from(self.load.hardware.map_or(32, |hardware| hardware.cache_bits));
        let elements = (self.rows_at_once(grpo) * tokens) as u64 * cache_elements_per_token(model);
        (elements / parts * bits).div_ceil(8)
    }

    fn score(&self, place: usize, grpo: &GrpoStage) -> Owners {
        let mut owners = self.parked(place, 2);
        owners.insert("policy/weights".into(), self.weights(place));
        for role in others(grpo).iter().take(2) {
            owners.insert(format!("{role}/weights"), self.weights(place));
        }
        let tokens = self.batch.tokens_held as u64;
        let activations = tokens * widest_numbers(self.load.model) as u64 * self.number();
        owners.insert("policy/activations".into(), activations);
        self.add_packed(&mut owners, place, 1);
        self.add_resting_optimizer(&mut owners, place);
        owners
    }

    fn add_packed(&self, owners: &mut Owners, place: usize, copies: u64) {
        if self.load.hardware.is_none() {
            owners.insert("policy/packed".into(), 4 * copies * self.held(place).multiplied);
        }
    }

    fn add_resting_optimizer(&self, owners: &mut Owners, place: usize) {
        if !self.config.engine.offloads(Offload::Optimizer) {
            let rests = self.optimizer(place).into_iter().filter(|(_, bytes)| *bytes > 0);
            owners.extend(rests.map(|(owner, bytes)| (owner.to_string(), bytes)));
        }
    }

    /// Weights of other models that are on the device in every phase, but for the first `scoring` ones.
    fn parked(&self, place: usize, scoring: usize) -> Owners {
        let StageKind::Grpo(grpo) = &self.stage.kind else { return Owners::new() };
        let parked = others(grpo).into_iter().skip(scoring).filter(|role| !self.offloads(role));
        parked.map(|role| (format!("{role}/weights"), self.weights(place))).collect()
    }

    fn offloads(&self, role: &str) -> bool {
        let what = if role == "reference" { Offload::Reference } else { Offload::RewardModels };
        self.config.engine.offloads(what)
    }

    /// Bytes that the ranks of a stage keep on their host: what is offloaded.
    pub fn host(&self, place: usize) -> u64 {
        let StageKind::Grpo(grpo) = &self.stage.kind else { return 0 };
        let roles = others(grpo).into_iter().filter(|role| self.offloads(role)).count() as u64;
        let optimizer: u64 = self.optimizer(place).iter().map(|(_, bytes)| bytes).sum();
        let optimizer = if self.config.engine.offloads(Offload::Optimizer) { optimizer } else { 0 };
        roles * self.weights(place) + optimizer
    }
}

/// Why a plan does not fit, with ways out.
pub fn over_device(
    peak: &Peak,
    stages: &[StageBytes],
    room: Bytes,
    device: &str,
) -> Option<String> {
    let least = stages.iter().map(|stage| stage.least_recompute);
    let least = least.collect::<Option<Vec<usize>>>().and_then(|least| least.into_iter().max());
    (peak.bytes > room.0).then(|| {
        let recompute = least.map(|least| format!("engine.recompute = {least}"));
        let way_out = match peak.phase {
            "train" if recompute.is_some() => recompute.as_deref().unwrap_or_default(),
            "generate" => {
                "cluster.rollout.expert or rollout_dtype of fewer bytes, or decode_batch down"
            }
            "score" => "\"reference\" and \"reward-models\" in engine.offload",
            _ => "more of cluster.data or cluster.pipeline, a smaller micro_batch, or shorter rows",
        };
        format!(
            "rank {} holds {} in phase {} of stage {}, and the {device} has {}; try {way_out}",
            peak.rank,
            Bytes(peak.bytes),
            peak.phase,
            peak.stage,
            room
        )
    })
}
