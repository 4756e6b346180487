//! Which rows of the sampler take the expanded form, and their attention (deepseek_v2.md 1.5).
//!
//! Rows of one sequence that come together are a chunk of a prompt. The absorbed form reads the cache as it is
//! and pays 2 d_c + d_R per query and context token of a head; the expanded one pays d_nope + d_R + d_v, after
//! making keys and values of the whole context from the cached latents: `RANGE` tokens at a time, merged by
//! log-sum-exp.
//!
//! Invariants:
//!   * a chunk's form is a function of its length and of the tokens before it; what else is in the pass changes
//!     no bit
//!   * keys and values of no more than RANGE tokens exist at once

use super::cache::DecodeRows;
use super::linear::Linear;
use super::pass::{floats, index_buffer, indices};
use super::per_head::Dims;
use crate::config::engine::{AttentionForm, Prefill};
use crate::config::{Attention, ModelConfig};
use rehearsal_kernels::{Buffer, CacheSpec, DecodeBatch, Kernels, OutOfMemory, Store};
use std::ops::Range;

/// Context tokens that are expanded at once.
pub(super) const RANGE: usize = 512;

/// The form that costs less for `queries` rows at the end of `context` tokens, these rows included.
pub fn prefill_form(config: &ModelConfig, queries: usize, context: usize) -> AttentionForm {
    let Dims { latent, nope, rope, value, .. } = Dims::new(config);
    let [before, queries] = [context - queries, queries].map(|count| count as u64);
    // Multiplications of a head. A row sees what is before the chunk, and of the chunk up to itself.
    let pairs = queries * before + queries * (queries + 1) / 2;
    let absorbed = pairs * (2 * latent + rope) as u64;
    let expanded = pairs * (nope + rope + value) as u64;
    // W_UK and W_UV meet each query in the absorbed form, each token of the context in the expanded one.
    let more_tokens = before * (latent * (nope + value)) as u64;
    if expanded + more_tokens < absorbed {
        AttentionForm::Expanded
    } else {
        AttentionForm::Absorbed
    }
}

/// Rows of a sampler's pass on the device, cut into parts of one form.
pub struct SamplerRows {
    /// Position of each row in its sequence `[T, 1]`.
    pub positions: Buffer,
    /// Cache slot of each row's own entry `[T, 1]`.
    pub slots: Buffer,
    /// The parts, in order; together they are all rows.
    pub parts: Vec<Part>,
    tables: Buffer,
    page_tokens: usize,
}

/// Neighbouring rows that take one form.
pub struct Part {
    /// The rows.
    pub rows: Range<usize>,
    /// Cached tokens that each sees, itself included.
    pub length: Buffer,
    /// What they expand; `None` for the absorbed form.
    pub context: Option<Context>,
    sequence: Buffer,
}

/// The cached tokens that a chunk of a prompt sees.
pub struct Context {
    /// Cache slots of each range of tokens.
    ranges: Vec<Buffer>,
}

impl SamplerRows {
    /// Cuts a pass into parts and brings it to the device.
    pub fn new(
        kernels: &dyn Kernels,
        config: &ModelConfig,
        rows: &DecodeRows,
        page_tokens: usize,
        prefill: Prefill,
    ) -> Result<SamplerRows, OutOfMemory> {
        let part = |(range, form): (Range<usize>, AttentionForm)| {
            let context = match form {
                AttentionForm::Absorbed => None,
                AttentionForm::Expanded => {
                    Some(Context::new(kernels, rows, range.end - 1, page_tokens)?)
                }
            };
            let length = indices(kernels, &rows.length[range.clone()])?;
            let sequence = indices(kernels, &rows.sequence[range.clone()])?;
            Ok(Part { rows: range, length, context, sequence })
        };
        Ok(SamplerRows {
            positions: indices(kernels, &rows.positions)?,
            slots: indices(kernels, &rows.slots)?,
            parts: plan(config, rows, prefill).into_iter().map(part).collect::<Result<_, _>>()?,
            tables: page_tables(kernels, rows)?,
            page_tokens,
        })
    }

    /// A part's rows against the paged cache.
    pub fn batch<'a>(&'a self, part: &'a Part) -> DecodeBatch<'a> {
        let (sequence, length) = (&part.sequence, &part.length);
        DecodeBatch { tables: &self.tables, sequence, length, page_tokens: self.page_tokens }
    }
}

/// The page tables as one index matrix, short ones padded with page 0 (never read past a row's length).
fn page_tables(kernels: &dyn Kernels, rows: &DecodeRows) -> Result<Buffer, OutOfMemory> {
    let tables = (0..rows.sequences()).map(|sequence| rows.table(sequence));
    let width = tables.clone().map(<[u32]>::len).max().unwrap_or(0).max(1);
    let mut flat = Vec::with_capacity(rows.sequences() * width);
    for table in tables {
        flat.extend_from_slice(table);
        flat.resize(flat.len().next_multiple_of(width), 0);
    }
    let mut buffer = index_buffer(kernels, rows.sequences(), width)?;
    kernels.upload_indices(&flat, &mut buffer);
    Ok(buffer)
}

/// Rows and their form; neighbours in the absorbed form are one part.
fn plan(
    config: &ModelConfig,
    rows: &DecodeRows,
    prefill: Prefill,
) -> Vec<(Range<usize>, AttentionForm)> {
    // Grouped queries have one form.
    if prefill == Prefill::Absorbed || config.attention() != Attention::Mla {
        return vec![(0..rows.len(), AttentionForm::Absorbed)];
    }
    let mut parts: Vec<(Range<usize>, AttentionForm)> = Vec::new();
    for chunk in chunks(rows) {
        let form = prefill_form(config, chunk.len(), rows.length[chunk.end - 1] as usize);
        match parts.last_mut() {
            Some((range, AttentionForm::Absorbed)) if form == AttentionForm::Absorbed => {
                range.end = chunk.end;
            }
            _ => parts.push((chunk, form)),
        }
    }
    parts
}

/// Rows of one sequence whose positions follow each other.
fn chunks(rows: &DecodeRows) -> impl Iterator<Item = Range<usize>> {
    let follows = |row: usize| {
        rows.sequence[row] == rows.sequence[row - 1] && rows.length[row] == rows.length[row - 1] + 1
    };
    let mut first = 0;
    std::iter::from_fn(move || {
        let end = (first + 1..rows.len()).find(|row| !follows(*row)).unwrap_or(rows.len());
        let chunk = first..end;
        first = end;
        (!chunk.is_empty()).then_some(chunk)
    })
}

impl Context {
    /// All tokens that `row` sees.
    fn new(
        kernels: &dyn Kernels,
        rows: &DecodeRows,
        row: usize,
        page_tokens: usize,
    ) -> Result<Context, OutOfMemory> {
        let table = rows.table(rows.sequence[row] as usize);
        let slot = |token: usize| {
            table[token / page_tokens] * page_tokens as u32 + (token % page_tokens) as u32
        };
        let slots: Vec<u32> = (0..rows.length[row] as usize).map(slot).collect();
        let ranges = slots.chunks(RANGE).map(|slots| indices(kernels, slots));
        Ok(Context { ranges: ranges.collect::<Result<_, _>>()? })
    }

    /// Sets o to the attention of queries `q`, which see `length` tokens each.
    pub(super) fn attend(
        &self,
        kernels: &dyn Kernels,
        dims: &Dims,
        kv_b: &Linear,
        q: &Buffer,
        length: &Buffer,
        spec: &CacheSpec<'_>,
        cache: &Buffer,
        o: &mut Buffer,
    ) -> Result<(), OutOfMemory> {
        let shape = dims.expanded();
        let mut lse = floats(kernels, q.rows(), dims.heads)?;
        for (index, slots) in self.ranges.iter().enumerate() {
            let mut entries = floats(kernels, slots.rows(), dims.latent + dims.rope)?;
            kernels.read_cache(spec, cache, slots, &mut entries);
            let mut kv = floats(kernels, slots.rows(), kv_b.outputs())?;
            kv_b.forward(kernels, &entries.cols_of(0..dims.latent), &mut kv, Store::Set);
            let k_rope = entries.cols_of(dims.latent..entries.cols());
            let (first, store) = (index * RANGE, if index == 0 { Store::Set } else { Store::Add });
            kernels.mla_prefill(&shape, q, &kv, &k_rope, first, length, o, &mut lse, store)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::AttentionForm::{Absorbed, Expanded};
    use super::*;
    use crate::config::load_model;
    use std::path::Path;

    fn preset(name: &str) -> ModelConfig {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        load_model(&folder.join("configs/model").join(name)).unwrap()
    }

    /// The fewest rows at the end of `context` tokens that are cheaper expanded.
    fn break_even(config: &ModelConfig, context: usize) -> usize {
        let forms: Vec<AttentionForm> =
            (1..=context).map(|queries| prefill_form(config, queries, context)).collect();
        let first = forms.iter().position(|form| *form == Expanded).expect("a prompt is expanded");
        assert!(forms[first..].iter().all(|form| *form == Expanded), "more rows stay expanded");
        first + 1
    }

    #[test]
    fn the_published_models_break_even_at_about_171_query_tokens() {
        // 2 * 512 * 256 / (2176 - 640) = 170.7 for a long context; both have the same widths of a head.
        for name in ["deepseek-v2.json", "deepseek-v2-lite.json"] {
            let config = preset(name);
            assert_eq!(break_even(&config, 163_840), 171, "{name}");
            assert!((160..=171).contains(&break_even(&config, 4096)), "{name}");
        }
    }

    #[test]
    fn a_fresh_prompt_is_expanded_and_a_new_token_absorbed_in_every_model() {
        for name in ["deepseek-v2.json", "deepseek-v2-lite.json", "gsm8k.json", "quickstart.json"] {
            let config = preset(name);
            for context in [2, 3, 16, 512, 1024] {
                assert_eq!(prefill_form(&config, context, context), Expanded, "{name} {context}");
                assert_eq!(prefill_form(&config, 1, context), Absorbed, "{name} {context}");
            }
        }
        // Where the latent is no wider than what it makes, nothing is gained by expanding it.
        let narrow = ModelConfig { kv_lora_rank: 16, ..preset("gsm8k.json") };
        assert_eq!(prefill_form(&narrow, 512, 512), Absorbed);
    }

    /// Rows of a chunk of `count` tokens of a sequence, after `before`.
    fn push_chunk(rows: &mut DecodeRows, before: usize, count: usize) {
        rows.begin(&(0..80).collect::<Vec<u32>>());
        (before..before + count).for_each(|position| rows.push(1, position, 16));
    }

    #[test]
    fn a_chunk_takes_its_form_whatever_stands_beside_it() {
        let config = preset("gsm8k.json");
        let mut rows = DecodeRows::default();
        // (before, count, is expanded); the second and third are different sequences at one length.
        let chunks = [
            (40, 1, false),
            (40, 1, false),
            (41, 1, false),
            (0, 30, true),
            (0, 30, true),
            (512, 3, false),
            (512, 300, true),
            (1000, 1, false),
        ];
        let mut wanted: Vec<(Range<usize>, AttentionForm)> = Vec::new();
        for (before, count, is_expanded) in chunks {
            let mut alone = DecodeRows::default();
            push_chunk(&mut alone, before, count);
            let form = if is_expanded { Expanded } else { Absorbed };
            assert_eq!(plan(&config, &alone, Prefill::ByCost), [(0..count, form)]);
            wanted.push((rows.len()..rows.len() + count, form));
            push_chunk(&mut rows, before, count);
        }
        let found = plan(&config, &rows, Prefill::ByCost);
        let form_of = |parts: &[(Range<usize>, AttentionForm)], row: usize| {
            parts.iter().find(|(rows, _)| rows.contains(&row)).expect("every row is in a part").1
        };
        for row in 0..rows.len() {
            assert_eq!(form_of(&found, row), form_of(&wanted, row), "row {row}");
        }
        let ends: Vec<usize> = found.iter().map(|(rows, _)| rows.end).collect();
        assert_eq!(ends, [3, 33, 63, 66, 366, 367], "absorbed neighbours are one part");
        assert_eq!(plan(&config, &rows, Prefill::Absorbed), [(0..rows.len(), Absorbed)]);
    }
}
