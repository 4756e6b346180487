//! Bytes that the arena holds for a pass through a part of a model, beside weights: what a layer keeps for its backward pass,
//! and what it needs while it runs.
//!
//! Follows the passes of `block`, `mla`, `gqa`, `mlp`, `moe` and `heads` buffer by buffer, so that a plan knows beforehand what they
//! will take; a test holds it against the arena. What is never there at the same time is not added up where that is easily
//! seen, and is where it is not: the bytes are an upper bound.
//!
//! T rows of tokens; S = T K slots of experts; R rows that the experts here work on.

use super::gqa::shape;
use super::heads::MOST_KEPT;
use super::params::Layout;
use super::per_head::Dims;
use super::prefill::RANGE;
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::{Attention, ModelConfig};
use rehearsal_kernels::sizes::{self, AttentionRows, scratch};
use rehearsal_kernels::{AttentionShape, CacheFormat};

/// The rows of a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassRows {
    /// Tokens, T.
    pub tokens: usize,
    /// Sequences, a stem's branches each.
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

/// Bytes of a layer, or of a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerBytes {
    /// What the backward pass needs, beside the layer's input.
    pub kept: u64,
    /// Most in the forward pass, what is kept and the output among it.
    pub forward: u64,
    /// What weight gradients wait for, beside the gradient of the output.
    pub pending: u64,
    /// Most in the backward pass, what is pending and the gradient of the input among it.
    pub backward: u64,
}

/// A part of a model, as passes go through it.
pub struct PassBytes<'a> {
    /// All of the model.
    pub config: &'a ModelConfig,
    /// What is here.
    pub layout: &'a Layout,
    /// Ranks that share the routed experts of a layer, each with as many rows as this one; 1 if they are all here.
    pub expert_ranks: usize,
    /// Ranks that have the same rows and share heads; 1 if they are all here.
    pub tensor_ranks: usize,
    /// Form of attention.
    pub form: AttentionForm,
    /// Threads.
    pub threads: usize,
}

impl PassBytes<'_> {
    /// A layer of the model, by its number there.
    pub fn layer(&self, layer: usize, rows: PassRows) -> LayerBytes {
        let (t, d) = (rows.tokens, self.config.hidden_size);
        let stream = scratch(t, d);
        let norm = norm(t, d, 1.0);
        let attention = self.attention(rows);
        let feed_forward = self.feed_forward(layer, t);
        let with_attention = norm + stream + attention.kept;
        let pending = stream + feed_forward.pending;
        let both = pending + 2 * stream + attention.pending;
        LayerBytes {
            kept: with_attention + norm + feed_forward.kept,
            forward: (with_attention + attention.forward)
                .max(with_attention + norm + stream + feed_forward.kept + feed_forward.forward),
            pending: both,
            backward: (pending + feed_forward.backward)
                .max(both + attention.backward)
                .max(both + stream),
        }
    }

    /// The residual stream of so many rows.
    pub fn stream(&self, rows: usize) -> u64 {
        scratch(rows, self.config.hidden_size)
    }

    /// Indices of the rows, and of what may be dropped of their sequences.
    pub fn documents(&self, rows: PassRows) -> u64 {
        3 * scratch(rows.tokens, 1) + scratch(rows.tokens, 2) + scratch(rows.sequences, 1)
    }

    /// Forward alone through all layers that are here, and the heads at `wanted` rows; nothing is kept.
    pub fn forward_only(&self, rows: PassRows, wanted: usize) -> u64 {
        let layers = self.config.num_hidden_layers;
        let layer = (0..layers).map(|layer| self.layer(layer, rows).forward).max().unwrap_or(0);
        let stream = self.stream(rows.tokens);
        let heads = self.gathered(wanted) + 3 * scratch(wanted, 1) + self.logits_tile(wanted);
        self.documents(rows) + stream + layer.max(heads)
    }

    /// Loss and gradients at the top of the stack, at `wanted` of so many rows, of tokens or (`is_scalar`) of scores.
    pub fn objective(&self, rows: usize, wanted: usize, is_scalar: bool) -> u64 {
        let logits = match is_scalar {
            true => 0,
            false if wanted * self.config.vocab_size <= MOST_KEPT => {
                sizes::head_kept(wanted, self.config.vocab_size)
            }
            false => sizes::head_tile(wanted, self.config.vocab_size),
        };
        let gradients = scratch(wanted, 1) + 2 * self.stream(wanted);
        self.stream(rows) + self.gathered(wanted) + 3 * scratch(wanted, 1) + logits + gradients
    }

    /// A pass of the sampler over so many rows, of which `wanted` have their logits wanted; `pages` is the page table's width, `cache`
    /// the format of what they see.
    pub fn decode(
        &self,
        rows: PassRows,
        wanted: usize,
        pages: usize,
        prefill: Prefill,
        cache: CacheFormat,
    ) -> u64 {
        let (t, d) = (rows.tokens, self.config.hidden_size);
        let indices = 6 * scratch(t, 1)
            + scratch(rows.sequences, pages)
            + 2 * rows.sequences as u64 * scratch(1, 1);
        let attention = norm(t, d, 1.0) + self.decode_attention(rows, prefill, cache);
        let layers = 0..self.config.num_hidden_layers;
        let feed_forward =
            layers.map(|layer| self.feed_forward(layer, t)).map(|ff| ff.kept + ff.forward);
        let feed_forward = 2 * norm(t, d, 1.0) + feed_forward.max().unwrap_or(0);
        let logits = self.gathered(wanted) + scratch(wanted, self.config.vocab_size);
        indices + self.stream(t) + attention.max(feed_forward).max(logits)
    }

    fn decode_attention(&self, rows: PassRows, prefill: Prefill, cache: CacheFormat) -> u64 {
        let (t, here) = (rows.tokens, self.here());
        let width = if cache == CacheFormat::F32 { 0 } else { here.cache_width() };
        let widened = self.widened(t);
        if let Attention::Gqa { .. } = here.attention() {
            let shape = shape(&here);
            let qkv = scratch(t, (shape.heads + 2 * shape.heads / shape.sharing) * shape.key_width);
            let attended = scratch(t, shape.heads * shape.value_width);
            let running = sizes::attention_decode(&shape, rows.longest, width, self.threads);
            return qkv + attended + scratch(t, 0) + running.max(widened);
        }
        let dims = Dims::new(&here);
        let running = sizes::attention_decode(&dims.absorbed(), rows.longest, width, self.threads);
        let absorbed = scratch(t, dims.heads * (dims.latent + dims.rope))
            + scratch(t, dims.heads * dims.latent)
            + running;
        let expanded = match prefill {
            Prefill::Absorbed => 0,
            Prefill::ByCost => {
                let tokens = rows.longest.min(RANGE);
                scratch(t, dims.heads)
                    + scratch(rows.longest, 1) * rows.sequences.max(1) as u64
                    + scratch(tokens, dims.latent + dims.rope)
                    + scratch(tokens, dims.heads * (dims.nope + dims.value))
                    + sizes::attention_prefill(&dims.expanded(), tokens, self.threads)
            }
        };
        self.projected(t, &dims)
            + scratch(t, dims.heads * dims.value)
            + absorbed.max(expanded).max(widened)
    }

    fn here(&self) -> ModelConfig {
        self.layout.part.attention(self.config)
    }

    /// Columns that this rank has of so many.
    fn own(&self, columns: usize) -> usize {
        columns.div_ceil(self.tensor_ranks)
    }

    /// Inputs of W_O with the columns of all ranks, where others have some.
    fn widened(&self, rows: usize) -> u64 {
        let all = self.config.num_attention_heads * self.config.value_width();
        if self.tensor_ranks > 1 { scratch(rows, all) } else { 0 }
    }

    fn gathered(&self, wanted: usize) -> u64 {
        let d = self.config.hidden_size;
        2 * scratch(wanted, 1) + scratch(wanted, d) + norm(wanted, d, 1.0)
    }

    /// Logits where they are not kept: a tile, of all ranks' columns where others have some.
    fn logits_tile(&self, wanted: usize) -> u64 {
        sizes::head_tile(wanted, self.config.vocab_size)
    }

    /// Queries, keys' latents and all that they are made from.
    fn projected(&self, rows: usize, dims: &Dims) -> u64 {
        let (query_factor, latent_factor) = self.config.latent_factors();
        let queries = match self.config.q_lora_rank {
            Some(rank) => norm(rows, rank, query_factor),
            None => 0,
        };
        scratch(rows, dims.query_a + dims.latent + dims.rope)
            + scratch(rows, dims.heads * dims.query())
            + queries
            + norm(rows, dims.latent, latent_factor)
            + scratch(rows, dims.rope)
    }

    fn attention(&self, rows: PassRows) -> LayerBytes {
        let here = self.here();
        match here.attention() {
            Attention::Mla => self.latent_attention(rows, &Dims::new(&here)),
            Attention::Gqa { .. } => self.grouped_attention(rows, &shape(&here)),
        }
    }

    fn latent_attention(&self, rows: PassRows, dims: &Dims) -> LayerBytes {
        let (t, heads) = (rows.tokens, dims.heads);
        let of_heads = |width| scratch(t, heads * width);
        let (shape, expanded, attended, values) = match self.form {
            AttentionForm::Expanded => (dims.expanded(), dims.nope + dims.value, dims.value, 0),
            AttentionForm::Absorbed => {
                (dims.absorbed(), dims.latent + dims.rope, dims.latent, of_heads(dims.value))
            }
        };
        let seen = attention_rows(rows);
        let kept = self.projected(t, dims)
            + of_heads(expanded)
            + of_heads(attended)
            + scratch(t, heads)
            + values;
        let running = sizes::attention(&shape, seen, self.threads).max(self.widened(t));
        let normed = self.config.q_lora_rank.map_or(0, |rank| scratch(t, rank));
        let pending = scratch(t, dims.query_a + dims.latent + dims.rope)
            + of_heads(dims.query())
            + normed
            + scratch(t, dims.latent)
            + of_heads(expanded)
            + values;
        let sums = if self.form == AttentionForm::Absorbed { of_heads(dims.latent) } else { 0 };
        let backward = of_heads(dims.value)
            + scratch(t, dims.rope)
            + sums
            + sizes::attention_backward(&shape, seen, self.threads);
        LayerBytes { kept, forward: running, pending, backward }
    }

    fn grouped_attention(&self, rows: PassRows, shape: &AttentionShape) -> LayerBytes {
        let t = rows.tokens;
        let key_heads = shape.heads / shape.sharing;
        let [queries, keys] = [shape.heads, 2 * key_heads].map(|heads| heads * shape.key_width);
        let attended = scratch(t, shape.heads * shape.value_width);
        let (seen, nothing) = (attention_rows(rows), scratch(t, 0));
        let running = sizes::attention(shape, seen, self.threads).max(self.widened(t));
        let backward = sizes::attention_backward(shape, seen, self.threads);
        LayerBytes {
            kept: scratch(t, queries + keys) + attended + scratch(t, shape.heads),
            forward: nothing + running,
            pending: scratch(t, queries + keys),
            backward: attended + scratch(t, queries) + scratch(t, keys) + 2 * nothing + backward,
        }
    }

    fn feed_forward(&self, layer: usize, rows: usize) -> LayerBytes {
        match self.config.is_moe(layer) {
            true => self.experts(rows),
            false => self.mlp(rows, self.config.intermediate_size),
        }
    }

    /// A SwiGLU of an inner width.
    fn mlp(&self, rows: usize, inner: usize) -> LayerBytes {
        let own = self.own(inner);
        let widened = if self.tensor_ranks > 1 { scratch(rows, inner) } else { 0 };
        LayerBytes {
            kept: scratch(rows, 2 * own) + scratch(rows, own),
            forward: widened,
            pending: scratch(rows, 2 * own),
            backward: scratch(rows, own),
        }
    }

    fn experts(&self, all_rows: usize) -> LayerBytes {
        let (config, d) = (self.config, self.config.hidden_size);
        let (experts, choices, inner) =
            (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size);
        let rows = self.own(all_rows);
        let (slots, here) = (rows * choices, experts.div_ceil(self.expert_ranks));
        // No token has more experts here than there are.
        let received = match self.expert_ranks {
            1 => slots,
            ranks => ranks * rows * choices.min(here),
        };
        let is_shared = self.expert_ranks > 1;
        let shared = match config.shared_width() {
            0 => LayerBytes::default(),
            width => self.mlp(all_rows, width),
        };
        let [sent, worked] = [slots, received].map(|rows| scratch(rows, d));
        let dispatched = if is_shared { sizes::routes(received, 1, here) } else { 0 };
        let kept = scratch(rows, experts)
            + 2 * scratch(rows, choices)
            + sizes::routes(rows, choices, experts)
            + dispatched
            + worked
            + scratch(received, 2 * inner)
            + scratch(received, inner)
            + sent
            + shared.kept;
        let on_the_way = match is_shared {
            true => (sent + worked + scratch(received, 1)).max(2 * worked),
            false => 0,
        };
        let gates = scratch(rows, experts);
        let coming = if is_shared { sent + worked } else { 0 };
        let inputs = scratch(received, inner) + worked + coming + gates;
        LayerBytes {
            kept,
            forward: gates + scratch(rows, choices) + on_the_way + shared.forward,
            pending: worked + scratch(received, 2 * inner) + gates + shared.pending,
            backward: scratch(rows, choices) + inputs.max(coming + shared.backward),
        }
    }
}

fn attention_rows(rows: PassRows) -> AttentionRows {
    AttentionRows { rows: rows.tokens, segments: rows.sequences, longest: rows.longest }
}

/// A normed copy of rows; a factor has copies of its own.
fn norm(rows: usize, cols: usize, factor: f64) -> u64 {
    let scaled = if factor == 1.0 { 0 } else { scratch(1, cols) + scratch(rows, 1) };
    scratch(rows, cols) + scratch(rows, 1) + scaled
}

#[cfg(test)]
mod tests {
    use super::super::parameters::tests::preset;
    use super::super::{Documents, Family, PackFor, Params, Transformer};
    use super::*;
    use rehearsal_kernels::{Arena, CpuKernels, Kernels};

    /// What is planned and what an arena counted of a training pass: kept, most in its forward pass, and most in all.
    fn measured(name: &str, form: AttentionForm, tokens: usize) -> ([u64; 3], [u64; 3]) {
        let config = preset(name);
        let kernels = CpuKernels::new(2, Arena::new(None));
        let model = Transformer::new(&kernels, &config, false).unwrap();
        let mut params = Params::new(&kernels, model.layout.clone(), "policy").unwrap();
        params.initialize(&kernels, 1, 0.02);
        let pack = PackFor::documents(form, true);
        let packed = model.pack(&kernels, &params, "policy", 0, pack).unwrap();
        let mut gradients =
            super::super::Gradients::new(&kernels, &model.layout, "policy").unwrap();
        gradients.clear(&kernels);
        let arena = kernels.arena();
        let before = arena.in_use();
        let document: Vec<u32> = (0..tokens as u32).map(|i| i % 200 + 2).collect();
        let families = [Family::alone(&document), Family::alone(&document)];
        let documents = Documents::pack_families(&kernels, &families).unwrap();
        let pass = model.pass(&kernels, &documents, &packed);
        let (y, saved) = model.forward(&pass, &params, &packed, 0, None).unwrap();
        let kept = arena.in_use() - before;
        let used = arena.most_used() - before;
        model.backward(&pass, &params, &packed, 0, saved, y, &mut gradients).unwrap();
        let all = arena.most_used() - before;
        let bytes = PassBytes {
            config: &config,
            layout: &model.layout,
            expert_ranks: 1,
            tensor_ranks: 1,
            form,
            threads: 2,
        };
        let rows = PassRows { tokens: 2 * tokens, sequences: 2, longest: tokens };
        let layers: Vec<LayerBytes> =
            (0..config.num_hidden_layers).map(|layer| bytes.layer(layer, rows)).collect();
        let stream = bytes.stream(2 * tokens);
        let mut live = bytes.documents(rows) + stream;
        let mut most = 0;
        for layer in &layers {
            most = most.max(live + layer.forward);
            live += layer.kept + stream;
        }
        let (planned_kept, forward) = (live, most);
        for layer in layers.iter().rev() {
            most = most.max(live + layer.backward);
            live -= layer.kept + stream;
        }
        ([planned_kept, forward, most], [kept, used, all])
    }

    #[test]
    fn a_training_pass_holds_no_more_than_is_planned_and_nearly_as_much() {
        for name in ["smoke.json", "tiny.json", "quickstart.json", "cpu-nano-dense.json"] {
            for form in [AttentionForm::Expanded, AttentionForm::Absorbed] {
                for tokens in [5, 60, 100] {
                    let (planned, measured) = measured(name, form, tokens);
                    for (planned, measured) in planned.into_iter().zip(measured) {
                        let what = format!("{name} {form:?} {tokens}: {measured} of {planned}");
                        // The arena's pool has larger regions here and there.
                        let planned = sizes::budget_for(planned);
                        assert!(measured <= planned && planned <= measured * 5 / 4, "{what}");
                    }
                }
            }
        }
    }
}
