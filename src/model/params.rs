//! Named parameters: which tensors a model has, in which order they lie in memory, and their gradients.
//!
//! Names are the published ones, so that saving is a gather and a write. A layout is that of a whole model, or of the part
//! that a rank holds, which may be some rows of a tensor. Tensors that one product reads
//! together (q_a over kv_a, q over k over v, gate over up, all experts of a layer) are neighbours in the slab.
//!
//! Invariants:
//!   * every tensor of the published checkpoint is in the layout of the whole once, and nothing else but `score.weight`
//!   * a part's tensors are those of the whole that it holds, in the same order and with their numbers there
//!   * a gradient slab has the layout's shapes; after a backward pass every trainable tensor was written

use super::part::Part;
use super::placement;
use crate::cluster::{Work, made};
use crate::config::{Attention, ModelConfig};
use anyhow::{Result, ensure};
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{Kernels, Kind, OutOfMemory, Slab};
use std::ops::Range;
use std::sync::Arc;

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Number in the layout of the whole model.
    pub number: usize,
    /// Published name.
    pub name: String,
    /// Rows (output width) that are here; 1 for a norm weight.
    pub rows: usize,
    /// The first of them in the tensor of the whole model.
    pub first_row: usize,
    /// Rows of that.
    pub of_rows: usize,
    /// Columns (input width).
    pub cols: usize,
    /// True for a one-dimensional norm weight: starts at 1 and has no weight decay.
    pub is_norm: bool,
}

impl ParamSpec {
    /// Shape as saved: norm weights have one dimension.
    pub fn shape(&self) -> Vec<usize> {
        if self.is_norm { vec![self.cols] } else { vec![self.of_rows, self.cols] }
    }

    /// The elements that are here, of those that are saved.
    pub fn elements(&self) -> Range<usize> {
        self.first_row * self.cols..(self.first_row + self.rows) * self.cols
    }
}

/// Which tensors a model, or a rank's part of it, has, in slab order.
#[derive(Debug)]
pub struct Layout {
    /// All tensors.
    pub specs: Vec<ParamSpec>,
    /// Tensors of each layer that is held.
    pub layers: Vec<LayerIndex>,
    /// What is held.
    pub part: Part,
    /// `model.embed_tokens.weight`.
    pub embed: Option<usize>,
    /// `model.norm.weight`.
    pub norm: Option<usize>,
    /// `lm_head.weight`, or the embedding if tied.
    pub head: Option<usize>,
    /// Whether the head is the embedding.
    pub is_tied: bool,
    /// `score.weight [1, d]` of a reward model.
    pub score: Option<usize>,
    /// Whether the whole model has one.
    pub has_value_head: bool,
}

/// Tensors of one layer.
#[derive(Debug)]
pub struct LayerIndex {
    /// `input_layernorm`.
    pub input_norm: usize,
    /// `self_attn`.
    pub attention: AttentionIndex,
    /// `post_attention_layernorm`.
    pub post_norm: usize,
    /// `mlp`.
    pub feed_forward: FeedForwardIndex,
}

/// Tensors of one attention.
#[derive(Debug)]
pub enum AttentionIndex {
    /// Multi-head latent attention.
    Mla(MlaIndex),
    /// Grouped-query attention.
    Gqa(GqaIndex),
}

/// Tensors of one GQA.
#[derive(Debug)]
pub struct GqaIndex {
    /// q, k and v: one product.
    pub qkv: Range<usize>,
    /// o.
    pub output: usize,
}

/// Tensors of one MLA.
#[derive(Debug)]
pub struct MlaIndex {
    /// q_a (or q without compression) and kv_a: one product.
    pub down: Range<usize>,
    /// q_a_layernorm and q_b, if queries are compressed.
    pub query: Option<(usize, usize)>,
    /// kv_a_layernorm.
    pub latent_norm: usize,
    /// kv_b.
    pub kv_b: usize,
    /// o.
    pub output: usize,
}

/// Tensors of one FFN.
#[derive(Debug)]
pub enum FeedForwardIndex {
    /// gate and up, down.
    Dense(MlpIndex),
    /// Router, routed experts, shared experts.
    Moe {
        /// `mlp.gate.weight`.
        router: usize,
        /// gate and up of the first expert that is held, of the next one, and so on.
        gate_up: Range<usize>,
        /// down of the same experts.
        down: Range<usize>,
        /// The shared experts' one FFN.
        shared: Option<MlpIndex>,
    },
}

/// Tensors of one SwiGLU.
#[derive(Debug)]
pub struct MlpIndex {
    /// gate and up: one product.
    pub gate_up: Range<usize>,
    /// down.
    pub down: usize,
}

impl Layout {
    /// The tensors of a model, with a scalar head if `value_head`.
    pub fn new(config: &ModelConfig, value_head: bool) -> Layout {
        Layout::of_part(config, value_head, Part::whole(config))
    }

    /// Those of a part of it.
    pub fn of_part(config: &ModelConfig, value_head: bool, part: Part) -> Layout {
        let mut builder = Builder { specs: Vec::new(), count: 0, is_held: true };
        let (d, is_tied) = (config.hidden_size, config.tie_word_embeddings);
        builder.is_held = part.embedding || (is_tied && part.head);
        let embedding = builder.matrix("model.embed_tokens.weight".into(), config.vocab_size, d);
        let embed = part.embedding.then_some(embedding);
        let mut layers = Vec::new();
        for number in 0..config.num_hidden_layers {
            builder.is_held = part.holds_layer(number);
            let layer = builder.layer(config, number, &part.experts);
            layers.extend(part.holds_layer(number).then_some(layer));
        }
        builder.is_held = part.head;
        let norm = builder.norm("model.norm.weight".into(), d);
        let head = match is_tied {
            true => embedding,
            false => builder.matrix("lm_head.weight".into(), config.vocab_size, d),
        };
        let score = value_head.then(|| builder.matrix("score.weight".into(), 1, d));
        let [norm, head] = [norm, head].map(|index| part.head.then_some(index));
        let score = score.filter(|_| part.head);
        let (specs, has_value_head, share) = (builder.specs, value_head, part.share);
        let mut layout =
            Layout { specs, layers, part, embed, norm, head, is_tied, score, has_value_head };
        placement::keep_share(&mut layout, config, share);
        layout
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.specs.iter().map(|s| s.rows * s.cols).sum()
    }

    /// Tensors that a next-token (`scalar_head` false) or preference loss trains: a reward model has no use for its
    /// vocabulary head.
    pub fn is_trained(&self, index: usize, scalar_head: bool) -> bool {
        if scalar_head {
            Some(index) != self.head || self.is_tied
        } else {
            Some(index) != self.score
        }
    }

    fn shapes(&self) -> Vec<(usize, usize)> {
        self.specs.iter().map(|s| (s.rows, s.cols)).collect()
    }
}

struct Builder {
    specs: Vec<ParamSpec>,
    /// Tensors of the whole model so far.
    count: usize,
    /// Whether the part holds what comes.
    is_held: bool,
}

impl Builder {
    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> usize {
        self.push(name, rows, cols, false)
    }

    fn norm(&mut self, name: String, width: usize) -> usize {
        self.push(name, 1, width, true)
    }

    /// The index that a tensor has, or would have if it were held.
    fn push(&mut self, name: String, rows: usize, cols: usize, is_norm: bool) -> usize {
        let (number, index) = (self.count, self.specs.len());
        self.count += 1;
        if self.is_held {
            let (first_row, of_rows) = (0, rows);
            self.specs.push(ParamSpec { number, name, rows, first_row, of_rows, cols, is_norm });
        }
        index
    }

    fn layer(&mut self, config: &ModelConfig, index: usize, experts: &Range<usize>) -> LayerIndex {
        let prefix = format!("model.layers.{index}");
        LayerIndex {
            input_norm: self.norm(format!("{prefix}.input_layernorm.weight"), config.hidden_size),
            attention: match config.attention() {
                Attention::Mla => {
                    AttentionIndex::Mla(self.mla(config, &format!("{prefix}.self_attn")))
                }
                Attention::Gqa { kv_heads, head_dim } => {
                    let rows = [config.num_attention_heads * head_dim, kv_heads * head_dim];
                    let prefix = format!("{prefix}.self_attn");
                    AttentionIndex::Gqa(self.gqa(config.hidden_size, rows, &prefix))
                }
            },
            post_norm: self
                .norm(format!("{prefix}.post_attention_layernorm.weight"), config.hidden_size),
            feed_forward: if config.is_moe(index) {
                self.moe(config, &format!("{prefix}.mlp"), experts)
            } else {
                FeedForwardIndex::Dense(self.mlp(
                    config.hidden_size,
                    config.intermediate_size,
                    &format!("{prefix}.mlp"),
                ))
            },
        }
    }

    /// Grouped-query attention with as many rows of queries, and of keys and values.
    fn gqa(&mut self, d: usize, [queries, keys]: [usize; 2], prefix: &str) -> GqaIndex {
        let first = self.matrix(format!("{prefix}.q_proj.weight"), queries, d);
        self.matrix(format!("{prefix}.k_proj.weight"), keys, d);
        let last = self.matrix(format!("{prefix}.v_proj.weight"), keys, d);
        let output = self.matrix(format!("{prefix}.o_proj.weight"), d, queries);
        GqaIndex { qkv: first..last + 1, output }
    }

    fn mla(&mut self, config: &ModelConfig, prefix: &str) -> MlaIndex {
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let query_rows = heads * config.query_width();
        let first = match config.q_lora_rank {
            Some(rank) => self.matrix(format!("{prefix}.q_a_proj.weight"), rank, d),
            None => self.matrix(format!("{prefix}.q_proj.weight"), query_rows, d),
        };
        self.matrix(format!("{prefix}.kv_a_proj_with_mqa.weight"), config.cache_width(), d);
        let query = config.q_lora_rank.map(|rank| {
            let norm = self.norm(format!("{prefix}.q_a_layernorm.weight"), rank);
            (norm, self.matrix(format!("{prefix}.q_b_proj.weight"), query_rows, rank))
        });
        let latent_norm = self.norm(format!("{prefix}.kv_a_layernorm.weight"), config.kv_lora_rank);
        let expanded = heads * (config.qk_nope_head_dim + config.v_head_dim);
        let kv_b = self.matrix(format!("{prefix}.kv_b_proj.weight"), expanded, config.kv_lora_rank);
        let output = self.matrix(format!("{prefix}.o_proj.weight"), d, heads * config.v_head_dim);
        MlaIndex { down: first..first + 2, query, latent_norm, kv_b, output }
    }

    fn mlp(&mut self, d: usize, width: usize, prefix: &str) -> MlpIndex {
        let gate = self.matrix(format!("{prefix}.gate_proj.weight"), width, d);
        self.matrix(format!("{prefix}.up_proj.weight"), width, d);
        let down = self.matrix(format!("{prefix}.down_proj.weight"), d, width);
        MlpIndex { gate_up: gate..gate + 2, down }
    }

    fn moe(
        &mut self,
        config: &ModelConfig,
        prefix: &str,
        experts: &Range<usize>,
    ) -> FeedForwardIndex {
        let (d, width, count) =
            (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts);
        let router = self.matrix(format!("{prefix}.gate.weight"), count, d);
        let is_held = self.is_held;
        let first = self.specs.len();
        for expert in 0..count {
            self.is_held = is_held && experts.contains(&expert);
            self.matrix(format!("{prefix}.experts.{expert}.gate_proj.weight"), width, d);
            self.matrix(format!("{prefix}.experts.{expert}.up_proj.weight"), width, d);
        }
        let middle = self.specs.len();
        for expert in 0..count {
            self.is_held = is_held && experts.contains(&expert);
            self.matrix(format!("{prefix}.experts.{expert}.down_proj.weight"), d, width);
        }
        let down = middle..self.specs.len();
        self.is_held = is_held;
        let shared = (config.n_shared_experts > 0)
            .then(|| self.mlp(d, config.shared_width(), &format!("{prefix}.shared_experts")));
        FeedForwardIndex::Moe { router, gate_up: first..middle, down, shared }
    }
}

/// A model's weights.
pub struct Params {
    /// Which tensor is where.
    pub layout: Arc<Layout>,
    /// The tensors.
    pub slab: Slab,
}

impl Params {
    /// Zeroed weights that `role` owns.
    pub fn new(
        kernels: &dyn Kernels,
        layout: Arc<Layout>,
        role: &str,
    ) -> Result<Params, OutOfMemory> {
        let owner = kernels.arena().owner(role, Kind::Weights);
        let slab = kernels.arena().slab(owner, kernels.float(), &layout.shapes())?;
        Ok(Params { layout, slab })
    }

    /// Draws initial weights: matrices from N(0, `range`), norm weights 1, a scalar head 0.
    pub fn initialize(&mut self, kernels: &dyn Kernels, seed: u64, range: f64) {
        for (index, spec) in self.layout.specs.iter().enumerate() {
            let (elements, number) = (spec.elements(), spec.number as u64);
            let draw = |element: usize| {
                range * random::normal(seed, Stream::Init, [number, element as u64, 0, 0])
            };
            let values: Vec<f32> = match spec {
                spec if spec.is_norm => vec![1.0; elements.len()],
                _ if self.layout.score == Some(index) => vec![0.0; elements.len()],
                _ => elements.map(|element| draw(element) as f32).collect(),
            };
            kernels.upload(&values, &mut self.slab.tensor_mut(index));
            made(Work::Read);
        }
    }

    /// Fills every tensor from `read(spec)`, which returns the values of its rows that are here, in row order.
    pub fn load(
        &mut self,
        kernels: &dyn Kernels,
        mut read: impl FnMut(&ParamSpec) -> Result<Vec<f32>>,
    ) -> Result<()> {
        for (index, spec) in self.layout.specs.iter().enumerate() {
            let values = read(spec)?;
            ensure!(
                values.len() == spec.rows * spec.cols,
                "tensor {} has {} elements, the config wants {} of {:?}",
                spec.name,
                values.len(),
                spec.elements().len(),
                spec.shape()
            );
            kernels.upload(&values, &mut self.slab.tensor_mut(index));
            made(Work::Read);
        }
        Ok(())
    }
}

/// Gradients of a model's weights, and which tensors a backward pass has written.
pub struct Gradients {
    /// One gradient per tensor.
    pub slab: Slab,
    written: Vec<bool>,
}

impl Gradients {
    /// Zero gradients.
    pub fn new(
        kernels: &dyn Kernels,
        layout: &Layout,
        role: &str,
    ) -> Result<Gradients, OutOfMemory> {
        let owner = kernels.arena().owner(role, Kind::Gradients);
        let slab = kernels.arena().slab(owner, kernels.float(), &layout.shapes())?;
        Ok(Gradients { slab, written: vec![false; layout.specs.len()] })
    }

    /// Sets all gradients to zero and forgets which were written.
    pub fn clear(&mut self, kernels: &dyn Kernels) {
        kernels.fill(&mut self.slab.whole_mut(), 0.0);
        self.written.fill(false);
    }

    /// The joined gradient of neighbouring tensors, marked as written.
    pub fn span(&mut self, range: Range<usize>) -> rehearsal_kernels::ViewMut<'_> {
        self.written[range.clone()].fill(true);
        self.slab.span_mut(range)
    }

    /// The gradient of one tensor, marked as written.
    pub fn tensor(&mut self, index: usize) -> rehearsal_kernels::ViewMut<'_> {
        self.span(index..index + 1)
    }

    /// Trainable tensors that no backward pass wrote: must be none after a step.
    pub fn missing<'a>(&self, layout: &'a Layout, scalar_head: bool) -> Vec<&'a str> {
        // An embedding that is here as the head alone is written to where tokens enter, if the head is not trained.
        let is_elsewhere =
            |i: usize| scalar_head && layout.embed.is_none() && Some(i) == layout.head;
        let untouched = |i: &usize| {
            layout.is_trained(*i, scalar_head) && !self.written[*i] && !is_elsewhere(*i)
        };
        (0..layout.specs.len()).filter(untouched).map(|i| layout.specs[i].name.as_str()).collect()
    }
}
