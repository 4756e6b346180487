//! A prompt by ranges: the bits of `mla_train` in one range, and bits that depend on no neighbour and no thread.

use super::*;
use crate::ops::Isa;
use crate::ops::check::{floats, indices, normal, read, with};
use crate::ops::mla_train::mla_train;

const SHAPE: AttentionShape = AttentionShape {
    heads: 3,
    sharing: 1,
    key_width: 10,
    rope_width: 6,
    value_width: 7,
    head_stride: 17,
    value_offset: 10,
    scale: 0.3,
};
const TOKENS: usize = 150;

/// Queries, keys and values of TOKENS tokens of one sequence.
struct Prompt {
    q: Buffer,
    kv: Buffer,
    k_rope: Buffer,
}

impl Prompt {
    fn new(cx: &Cx) -> Prompt {
        Prompt {
            q: normal(cx, TOKENS, SHAPE.heads * SHAPE.query_width(), 1),
            kv: normal(cx, TOKENS, SHAPE.heads * SHAPE.head_stride, 2),
            k_rope: normal(cx, TOKENS, SHAPE.rope_width, 3),
        }
    }

    /// Output and log-sum-exp of the tokens `rows`, with ranges of keys that end at `cuts`.
    fn by_ranges(&self, cx: &Cx, rows: Range<usize>, cuts: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let blank = |cols| floats(cx, rows.len(), cols, &vec![f32::NAN; rows.len() * cols]);
        let (mut o, mut lse) = (blank(SHAPE.heads * SHAPE.value_width), blank(SHAPE.heads));
        let lengths: Vec<u32> = rows.clone().map(|row| row as u32 + 1).collect();
        let length = indices(cx, rows.len(), 1, &lengths);
        let (q, mut first) = (self.q.rows_of(rows), 0);
        for &end in cuts {
            let store = if first == 0 { Store::Set } else { Store::Add };
            let (kv, k_rope) = (self.kv.rows_of(first..end), self.k_rope.rows_of(first..end));
            let (o, lse) = (&mut o, &mut lse);
            mla_prefill(cx, &SHAPE, &q, &kv, &k_rope, first, &length, o, lse, store).unwrap();
            first = end;
        }
        (read(&o), read(&lse))
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn one_range_has_the_bits_of_training_attention() {
    for threads in [1, 3] {
        let cx = with(threads, Isa::detect());
        let prompt = Prompt::new(&cx);
        let start = indices(&cx, TOKENS, 1, &[0; TOKENS]);
        let blank = |cols| floats(&cx, TOKENS, cols, &vec![f32::NAN; TOKENS * cols]);
        let (mut o, mut lse) = (blank(SHAPE.heads * SHAPE.value_width), blank(SHAPE.heads));
        let Prompt { q, kv, k_rope } = &prompt;
        mla_train(&cx, &SHAPE, q, kv, k_rope, &start, &mut o, &mut lse).unwrap();
        let (found, found_lse) = prompt.by_ranges(&cx, 0..TOKENS, &[TOKENS]);
        assert_eq!(bits(&found), bits(&read(&o)));
        assert_eq!(bits(&found_lse), bits(&read(&lse)));
    }
}

#[test]
fn neighbours_threads_and_instruction_sets_change_no_bit() {
    let cuts = [32, 33, 100, TOKENS];
    let one = with(1, Isa::Portable);
    let (wanted, wanted_lse) = Prompt::new(&one).by_ranges(&one, 0..TOKENS, &cuts);
    let width = SHAPE.heads * SHAPE.value_width;
    for isa in Isa::available() {
        for threads in [1, 2, 4] {
            let cx = with(threads, isa);
            let prompt = Prompt::new(&cx);
            for rows in [0..TOKENS, 0..1, 31..34, 99..101, 7..140] {
                let (found, found_lse) = prompt.by_ranges(&cx, rows.clone(), &cuts);
                let (o, lse) = (rows.start * width..rows.end * width, rows.start * 3..rows.end * 3);
                assert_eq!(bits(&found), bits(&wanted[o]), "{isa:?} {threads} {rows:?}");
                assert_eq!(bits(&found_lse), bits(&wanted_lse[lse]), "{isa:?} {threads} {rows:?}");
            }
        }
    }
}

#[test]
fn a_row_that_sees_nothing_of_a_range_is_empty_alone_and_unchanged_by_it() {
    let cx = with(2, Isa::detect());
    let prompt = Prompt::new(&cx);
    let (whole, lse) = prompt.by_ranges(&cx, 0..60, &[60]);
    let (longer, longer_lse) = prompt.by_ranges(&cx, 0..60, &[60, 100, TOKENS]);
    assert_eq!((bits(&whole), bits(&lse)), (bits(&longer), bits(&longer_lse)));
    // The range from token 40 on alone: rows 0 to 39 see none of it.
    let (width, length) = (SHAPE.heads * SHAPE.value_width, indices(&cx, 2, 1, &[40, 41]));
    let (mut o, mut lse) =
        (floats(&cx, 2, width, &vec![f32::NAN; 2 * width]), floats(&cx, 2, 3, &[f32::NAN; 6]));
    let (kv, k_rope) = (prompt.kv.rows_of(40..90), prompt.k_rope.rows_of(40..90));
    let q = prompt.q.rows_of(39..41);
    mla_prefill(&cx, &SHAPE, &q, &kv, &k_rope, 40, &length, &mut o, &mut lse, Store::Set).unwrap();
    let (o, lse) = (read(&o), read(&lse));
    assert!(o[..width].iter().all(|x| *x == 0.0) && lse[..3] == [f32::NEG_INFINITY; 3]);
    // The other row sees one token: its value, whatever the score.
    let value = &read(&prompt.kv)[40 * SHAPE.heads * SHAPE.head_stride..];
    for head in 0..SHAPE.heads {
        let value = &value[head * SHAPE.head_stride + SHAPE.value_offset..][..SHAPE.value_width];
        let found = &o[width + head * SHAPE.value_width..][..SHAPE.value_width];
        assert_eq!(bits(found), bits(value));
    }
}

#[test]
fn scores_far_from_zero_merge_without_overflow() {
    let cx = with(1, Isa::detect());
    let prompt = Prompt::new(&cx);
    let shape = AttentionShape { scale: 60.0, ..SHAPE };
    let length = indices(&cx, 1, 1, &[TOKENS as u32]);
    let q = prompt.q.rows_of(TOKENS - 1..TOKENS);
    let run = |cuts: &[usize]| {
        let (mut o, mut lse) =
            (floats(&cx, 1, 21, &[f32::NAN; 21]), floats(&cx, 1, 3, &[f32::NAN; 3]));
        let mut first = 0;
        for &end in cuts {
            let (kv, k_rope) = (prompt.kv.rows_of(first..end), prompt.k_rope.rows_of(first..end));
            let store = if first == 0 { Store::Set } else { Store::Add };
            mla_prefill(&cx, &shape, &q, &kv, &k_rope, first, &length, &mut o, &mut lse, store)
                .unwrap();
            first = end;
        }
        read(&o)
    };
    let (whole, parts) = (run(&[TOKENS]), run(&[1, 50, TOKENS]));
    let worst = whole.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4 && whole.iter().chain(&parts).all(|x| x.is_finite()), "{worst}");
}
