//! Decoded rows against trained ones: the same bits for any shape, batch, page size, thread count
//! and set.

use super::*;
use crate::ops::Isa;
use crate::ops::cache_rows::{cache_shape, read_cache, write_cache};
use crate::ops::check::{floats, indices, normal, read, with};
use crate::ops::mla_train::mla_train;

const ABSORBED: AttentionShape = AttentionShape {
    heads: 3,
    sharing: 3,
    key_width: 20,
    rope_width: 6,
    value_width: 20,
    head_stride: 0,
    value_offset: 0,
    scale: 0.3,
};

/// All keys, then all values, as in GQA.
const GROUPED: AttentionShape = AttentionShape {
    heads: 6,
    sharing: 3,
    key_width: 10,
    rope_width: 0,
    value_width: 10,
    head_stride: 10,
    value_offset: 20,
    scale: 0.3,
};

/// A key and a value for each head, and a shared rope key behind them all.
const EXPANDED: AttentionShape = AttentionShape {
    heads: 3,
    sharing: 1,
    key_width: 7,
    rope_width: 6,
    value_width: 5,
    head_stride: 12,
    value_offset: 7,
    scale: 0.3,
};

/// More heads, and wider keys and values, than one set of registers holds.
const WIDE: AttentionShape = AttentionShape {
    heads: 7,
    sharing: 7,
    key_width: 86,
    rope_width: 6,
    value_width: 86,
    head_stride: 0,
    value_offset: 0,
    scale: 0.1,
};

const SHAPES: [AttentionShape; 4] = [ABSORBED, GROUPED, EXPANDED, WIDE];

/// Lengths of the sequences; the last two begin with the first PROMPT tokens of the first.
const LENGTHS: [usize; 5] = [70, 33, 5, 64, 45];
const PROMPT: usize = 40;

/// A cache of floats.
fn floats_of(shape: &AttentionShape) -> CacheSpec<'static> {
    spec_of(shape, CacheFormat::F32, None)
}

fn spec_of<'a>(
    shape: &AttentionShape,
    format: CacheFormat,
    channels: Option<&'a Buffer>,
) -> CacheSpec<'a> {
    let layout = CacheLayout { format, latent: shape.kv_width(), rope: shape.rope_width };
    CacheSpec { layout, channels }
}

/// All tokens of all sequences, one after another, and the trainer's output for them.
struct Tokens {
    shape: AttentionShape,
    q: Vec<f32>,
    kv: Vec<f32>,
    rope: Vec<f32>,
    output: Vec<f32>,
}

fn first(sequence: usize) -> usize {
    LENGTHS[..sequence].iter().sum()
}

fn tokens(cx: &Cx, shape: AttentionShape) -> Tokens {
    let rows = first(LENGTHS.len());
    let q = normal(cx, rows, shape.heads * shape.query_width(), 1);
    let fork = |b: Buffer| {
        let (cols, mut all) = (b.cols(), read(&b));
        for sequence in [3, 4] {
            all.copy_within(..PROMPT * cols, first(sequence) * cols);
        }
        all
    };
    let kv = fork(normal(cx, rows, shape.kv_width(), 2));
    let rope = fork(normal(cx, rows, shape.rope_width, 3));
    let start: Vec<u32> =
        (0..LENGTHS.len()).flat_map(|s| vec![first(s) as u32; LENGTHS[s]]).collect();
    let blank = |cols| floats(cx, rows, cols, &vec![f32::NAN; rows * cols]);
    let (mut o, mut lse) = (blank(shape.heads * shape.value_width), blank(shape.heads));
    let keys = floats(cx, rows, shape.kv_width(), &kv);
    let k_rope = floats(cx, rows, shape.rope_width, &rope);
    mla_train(cx, &shape, &q, &keys, &k_rope, &indices(cx, rows, 1, &start), &mut o, &mut lse)
        .unwrap();
    Tokens { shape, q: read(&q), kv, rope, output: read(&o) }
}

/// A cache full of NaN but for the tokens, in scattered pages; whole prompt pages are shared.
fn paged(cx: &Cx, tokens: &Tokens, page: usize) -> (Buffer, Buffer) {
    let across = 70_usize.div_ceil(page);
    let count = across * LENGTHS.len() + 3;
    assert!(!count.is_multiple_of(11));
    let mut tables = vec![0; across * LENGTHS.len()];
    let shape = &tokens.shape;
    let (wide, narrow) = (shape.kv_width(), shape.rope_width);
    let width = wide + narrow;
    let mut cache = vec![f32::NAN; count * page * width];
    for (sequence, &length) in LENGTHS.iter().enumerate() {
        for token in 0..length {
            let shared = sequence >= 3 && token / page < PROMPT / page;
            let owner = if shared { 0 } else { sequence };
            // 11 has no factor in common with the counts that occur, so pages are distinct.
            let number = (owner * across + token / page + 1) * 11 % count;
            tables[sequence * across + token / page] = number as u32;
            let row = first(sequence) + token;
            let slot = &mut cache[(number * page + token % page) * width..][..width];
            let (kv, rope) = slot.split_at_mut(wide);
            kv.copy_from_slice(&tokens.kv[row * wide..][..wide]);
            rope.copy_from_slice(&tokens.rope[row * narrow..][..narrow]);
        }
    }
    (floats(cx, count * page, width, &cache), indices(cx, LENGTHS.len(), across, &tables))
}

/// Output rows of `rows`, each a sequence and a position, must be the trainer's. The buffers of
/// queries and outputs have `margin` columns that belong to nobody.
fn check_rows(cx: &Cx, tokens: &Tokens, page: usize, rows: &[(usize, usize)], margin: usize) {
    let (cache, tables) = paged(cx, tokens, page);
    let shape = &tokens.shape;
    let (wide, narrow) = (shape.heads * shape.query_width(), shape.heads * shape.value_width);
    let mut q = Vec::new();
    for (sequence, position) in rows {
        q.extend(&tokens.q[(first(*sequence) + position) * wide..][..wide]);
        q.extend(vec![f32::NAN; margin]);
    }
    let q = floats(cx, rows.len(), wide + margin, &q);
    let mut o =
        floats(cx, rows.len(), narrow + margin, &vec![f32::NAN; rows.len() * (narrow + margin)]);
    let of = |pick: &dyn Fn(&(usize, usize)) -> usize| {
        let numbers: Vec<u32> = rows.iter().map(|row| pick(row) as u32).collect();
        indices(cx, rows.len(), 1, &numbers)
    };
    let (sequence, length) = (of(&|row| row.0), of(&|row| row.1 + 1));
    let batch =
        DecodeBatch { tables: &tables, sequence: &sequence, length: &length, page_tokens: page };
    let spec = floats_of(shape);
    let (q, mut part) = (q.cols_of(0..wide), o.cols_of_mut(0..narrow));
    mla_decode(cx, shape, &q, &spec, &cache, &batch, &mut part).unwrap();
    let found = read(&o.cols_of(0..narrow));
    for (i, (sequence, position)) in rows.iter().enumerate() {
        let wanted = &tokens.output[(first(*sequence) + position) * narrow..][..narrow];
        let same = found[i * narrow..][..narrow]
            .iter()
            .zip(wanted)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "page {page}, sequence {sequence}, position {position}");
    }
}

#[test]
fn decoded_rows_equal_trained_rows_to_the_bit_for_any_batch_page_and_thread_count() {
    let prefill: Vec<_> =
        (0..LENGTHS.len()).flat_map(|s| (0..LENGTHS[s]).map(move |p| (s, p))).collect();
    let last: Vec<_> = [0, 3, 4, 1, 2].map(|s| (s, LENGTHS[s] - 1)).to_vec();
    let mixed: Vec<_> = (0..200).map(|i| (i * 7 % 5, i * 13 % LENGTHS[i * 7 % 5])).collect();
    for threads in [1, 3] {
        let cx = with(threads, Isa::detect());
        for tokens in SHAPES.map(|shape| tokens(&cx, shape)) {
            for page in [1, 5, 16, 32, 48] {
                for (rows, margin) in
                    [(&prefill, 0), (&last, 0), (&mixed, 0), (&mixed, 5), (&vec![(1, 0)], 0)]
                {
                    check_rows(&cx, &tokens, page, rows, margin);
                }
            }
        }
    }
}

#[test]
fn all_instruction_sets_decode_the_same_bits() {
    for shape in SHAPES {
        let trained = tokens(&with(1, Isa::Portable), shape);
        for isa in Isa::available() {
            check_rows(
                &with(2, isa),
                &trained,
                16,
                &[(0, 69), (1, 32), (2, 4), (3, 50), (3, 51), (4, 44)],
                0,
            );
        }
    }
}

#[test]
fn attention_to_codes_has_the_bits_of_attention_to_the_floats_that_are_read_from_them() {
    for (threads, isa) in Isa::available().into_iter().flat_map(|isa| [(1, isa), (3, isa)]) {
        let cx = with(threads, isa);
        for (shape, format) in
            SHAPES.iter().flat_map(|shape| CacheFormat::ALL.map(|format| (shape, format)))
        {
            let (slots, rows, page) = (90, 40, 5);
            let latent = normal(&cx, slots, shape.kv_width(), 1);
            let rope = normal(&cx, slots, shape.rope_width, 2);
            let channels = normal(&cx, 1, shape.kv_width(), 3);
            let spec = spec_of(shape, format, Some(&channels));
            let (dtype, cols) = cache_shape(&spec.layout);
            let mut codes = cx.arena.buffer(cx.scratch, dtype, slots, cols).unwrap();
            let all = indices(&cx, slots, 1, &(0..slots as u32).collect::<Vec<_>>());
            write_cache(&cx, &spec, &latent, &rope, &all, &mut codes);
            let mut kept = normal(&cx, slots, spec.layout.width(), 4);
            read_cache(&cx, &spec, &codes, &all, &mut kept);

            let tables: Vec<u32> = (0..36).map(|i| i * 7 % 18).collect();
            let number = |f: &dyn Fn(usize) -> usize| -> Vec<u32> {
                (0..rows).map(|row| f(row) as u32).collect()
            };
            let batch = DecodeBatch {
                tables: &indices(&cx, 2, 18, &tables),
                sequence: &indices(&cx, rows, 1, &number(&|row| row / 25)),
                length: &indices(&cx, rows, 1, &number(&|row| 1 + row * 31 % 90)),
                page_tokens: page,
            };
            let q = normal(&cx, rows, shape.heads * shape.query_width(), 5);
            let attended = |spec: &CacheSpec<'_>, cache: &Buffer| {
                let width = shape.heads * shape.value_width;
                let mut o = floats(&cx, rows, width, &vec![f32::NAN; rows * width]);
                mla_decode(&cx, shape, &q, spec, cache, &batch, &mut o).unwrap();
                read(&o).into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let wanted = attended(&floats_of(shape), &kept);
            assert_eq!(attended(&spec, &codes), wanted, "{format:?}, {} heads", shape.heads);
        }
    }
}
