//! The sampler's memory: one cache entry per token and layer, in pages (deepseek_v2.md 1.6).
//!
//! An entry of MLA is the latent after its norm (d_c elements), then the rope key after its rotation
//! (d_R): all that attention needs of a token, for all heads. An entry of GQA is all rotated keys,
//! then all values. Which sequence holds which page is `inference::pages`' business.
//!
//! Invariants:
//!   * slot of token j of a sequence = table[j / page_tokens] * page_tokens + j % page_tokens
//!   * one more token costs `ModelConfig::cache_width` elements in the cache's format a layer, and nothing else

use crate::config::{Attention, ModelConfig};
use rehearsal_kernels::{Buffer, CacheFormat, CacheLayout, Kernels, Kind, OutOfMemory};

/// Rows of one sampler step, of one or many sequences: chunks of prompts, or one new token per
/// sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecodeRows {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Its position in its sequence.
    pub positions: Vec<u32>,
    /// Cache slot that its own entry is written to.
    pub slots: Vec<u32>,
    /// Its sequence: a row of `tables`.
    pub sequence: Vec<u32>,
    /// Cached tokens that it sees, itself included.
    pub length: Vec<u32>,
    /// Page numbers of all sequences, one sequence after another.
    pages: Vec<u32>,
    /// Where each sequence's pages begin.
    tables: Vec<u32>,
    /// Rows whose logits are wanted, in the order wanted; a row may be wanted more than once.
    pub wanted: Vec<u32>,
}

impl DecodeRows {
    /// Adds the sequence that the next rows belong to.
    pub fn begin(&mut self, pages: &[u32]) {
        self.tables.push(self.pages.len() as u32);
        self.pages.extend_from_slice(pages);
    }

    /// Adds a row to the sequence last begun, whose pages must reach to `position`.
    pub fn push(&mut self, token: u32, position: usize, page_tokens: usize) {
        assert!(!self.tables.is_empty(), "a row belongs to a sequence that was begun");
        let table = self.table(self.tables.len() - 1);
        let slot = table[position / page_tokens] as usize * page_tokens + position % page_tokens;
        self.tokens.push(token);
        self.positions.push(position as u32);
        self.slots.push(slot as u32);
        self.sequence.push(self.tables.len() as u32 - 1);
        self.length.push(position as u32 + 1);
    }

    /// Wants the logits of the row last added.
    pub fn want_last(&mut self) {
        self.wanted.push(self.tokens.len() as u32 - 1);
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.tables.len()
    }

    /// Page numbers of a sequence.
    pub fn table(&self, sequence: usize) -> &[u32] {
        let end = self.tables.get(sequence + 1).map_or(self.pages.len(), |next| *next as usize);
        &self.pages[self.tables[sequence] as usize..end]
    }

    /// Takes all rows out; the lists keep their memory.
    pub fn clear(&mut self) {
        let DecodeRows { tokens, positions, slots, sequence, length, pages, tables, wanted } = self;
        for list in [tokens, positions, slots, sequence, length, pages, tables, wanted] {
            list.clear();
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True if there is no row.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// What a token of a model leaves in a layer's cache.
pub fn cache_layout(config: &ModelConfig, format: CacheFormat) -> CacheLayout {
    let rope = match config.attention() {
        Attention::Mla => config.qk_rope_head_dim,
        Attention::Gqa { .. } => 0,
    };
    CacheLayout { format, latent: config.cache_width() - rope, rope }
}

/// One layer's cache, to write to and to attend to.
pub struct LayerCache<'a> {
    /// A row per slot.
    pub rows: &'a mut Buffer,
    /// What a row holds.
    pub layout: CacheLayout,
}

/// The cache entries of all layers.
pub struct LatentCache {
    /// One buffer per layer: a row of `layout` for each of `page_count * page_tokens` slots.
    pub layers: Vec<Buffer>,
    /// What a row holds.
    pub layout: CacheLayout,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// A page on its way to another one: a buffer cannot be read and written in one call.
    transit: Buffer,
}

impl LatentCache {
    /// Memory for `page_count` pages.
    pub fn new(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        format: CacheFormat,
        page_count: usize,
        page_tokens: usize,
    ) -> Result<LatentCache, OutOfMemory> {
        let owner = kernels.arena().owner("policy", Kind::Cache);
        let layout = cache_layout(config, format);
        let (dtype, cols) = kernels.cache_shape(&layout);
        let (arena, rows) = (kernels.arena(), page_count * page_tokens);
        Ok(LatentCache {
            layers: arena.buffers(owner, dtype, rows, cols, config.num_hidden_layers)?,
            layout,
            page_tokens,
            transit: arena.buffer(owner, dtype, page_tokens, cols)?,
        })
    }

    /// Bytes of one page over all layers.
    pub fn page_bytes(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        format: CacheFormat,
        page_tokens: usize,
    ) -> u64 {
        let (dtype, cols) = kernels.cache_shape(&cache_layout(config, format));
        (config.num_hidden_layers * page_tokens * cols * dtype.size()) as u64
    }

    /// Number of pages.
    pub fn page_count(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.rows() / self.page_tokens)
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| (layer.len() * layer.dtype().size()) as u64).sum()
    }

    /// Copies the first `tokens` entries of page `from` to page `to`, in every layer.
    pub fn copy_page(&mut self, kernels: &dyn Kernels, from: u32, to: u32, tokens: usize) {
        assert!(tokens <= self.page_tokens, "a page has {} tokens, not {tokens}", self.page_tokens);
        let rows =
            |page: u32| page as usize * self.page_tokens..page as usize * self.page_tokens + tokens;
        for layer in &mut self.layers {
            let mut transit = self.transit.rows_of_mut(0..tokens);
            kernels.copy(&layer.rows_of(rows(from)), &mut transit);
            kernels.copy(&transit, &mut layer.rows_of_mut(rows(to)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::{Arena, CpuKernels, ReferenceKernels};

    fn config(layers: usize) -> ModelConfig {
        let text = format!(
            r#"{{"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": {layers}, "first_k_dense_replace": 1,
            "intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 2, "n_shared_experts": 1,
            "num_experts_per_tok": 1, "num_attention_heads": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 64}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    /// The allocator's own count for a cache; a page of 256 tokens fills whole pages of the arena in every format.
    fn held(kernels: &dyn Kernels, format: CacheFormat, page_count: usize, layers: usize) -> u64 {
        let config = config(layers);
        // So that no larger region serves that an earlier cache left.
        kernels.arena().trim();
        let cache = LatentCache::new(kernels, &config, format, page_count, 256).unwrap();
        assert_eq!(cache.page_count(), page_count);
        let page_bytes = LatentCache::page_bytes(kernels, &config, format, 256);
        assert_eq!(cache.bytes(), page_count as u64 * page_bytes);
        kernels.arena().held_by(Kind::Cache)
    }

    #[test]
    fn each_token_costs_one_entry_of_latent_and_rope_key_a_layer() {
        let kernels = ReferenceKernels::new(Arena::new(None));
        let held = |page_count, layers| held(&kernels, CacheFormat::F32, page_count, layers);
        // In f64: 8 bytes an element; the number of heads plays no part.
        assert_eq!(held(10, 3) - held(9, 3), 256 * 3 * 576 * 8);
        assert_eq!(held(10, 4) - held(10, 3), 10 * 256 * 576 * 8);
        assert_eq!(kernels.arena().held_by(Kind::Cache), 0);
    }

    #[test]
    fn each_token_costs_the_bytes_of_the_cache_s_format() {
        let kernels = CpuKernels::new(1, Arena::new(None));
        for (format, bytes) in CacheFormat::ALL.into_iter().zip([576 * 4, 576 * 2, 648, 430]) {
            let held = |page_count, layers| held(&kernels, format, page_count, layers);
            assert_eq!(held(256, 3) - held(128, 3), 128 * 256 * 3 * bytes, "{format:?}");
            assert_eq!(held(128, 4) - held(128, 3), 128 * 256 * bytes, "{format:?}");
        }
    }

    #[test]
    fn a_page_is_copied_in_every_layer_and_touches_nothing_else() {
        let kernels = ReferenceKernels::new(Arena::new(None));
        let mut cache = LatentCache::new(&kernels, &config(2), CacheFormat::F32, 3, 4).unwrap();
        let (rows, width) = (12, 576);
        let before: Vec<Vec<f64>> = (0..2)
            .map(|layer| (0..rows * width).map(|i| (layer * 100_000 + i) as f64).collect())
            .collect();
        for (layer, values) in cache.layers.iter_mut().zip(&before) {
            kernels.upload_f64(values, layer);
        }
        cache.copy_page(&kernels, 2, 1, 3);
        for (layer, values) in cache.layers.iter().zip(before) {
            let mut expected = values.clone();
            expected[4 * width..7 * width].copy_from_slice(&values[8 * width..11 * width]);
            assert_eq!(kernels.download_f64(layer), expected);
        }
    }

    #[test]
    fn rows_carry_the_slots_of_their_pages() {
        let mut rows = DecodeRows::default();
        rows.begin(&[7, 2]);
        rows.push(50, 3, 4);
        rows.push(51, 4, 4);
        rows.want_last();
        rows.begin(&[0]);
        rows.push(60, 1, 4);
        assert_eq!(rows.slots, [31, 8, 1]);
        assert_eq!(
            (rows.sequence.as_slice(), rows.length.as_slice()),
            (&[0, 0, 1][..], &[4, 5, 2][..])
        );
        assert_eq!((rows.len(), rows.wanted.as_slice()), (3, &[1][..]));
    }
}
