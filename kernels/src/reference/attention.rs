//! Attention: causal over packed rows with its gradient, against the paged latent cache, and by ranges of a prompt.
//!
//! One form for MLA expanded, MLA absorbed and GQA ([`AttentionShape`] says how). Scores are
//! scale * (q_key . key + q_rope . k_rope), DeepSeek-V2 eq. 17 to 19.

use super::{add_scaled, dot, log_sum_exp, movement};
use crate::buffer::{Buffer, Mat};
use crate::kernels::{AttentionShape, DecodeBatch, Store};

/// What the forward pass read and wrote.
pub struct Forward<'a> {
    pub q: &'a Buffer,
    pub kv: &'a Buffer,
    pub k_rope: &'a Buffer,
    pub start: &'a Buffer,
    pub o: &'a Buffer,
    pub lse: &'a Buffer,
}

/// Where one head's query, key and value lie in their rows.
struct Head {
    query: usize,
    query_rope: usize,
    key: usize,
    value: usize,
    out: usize,
}

fn head(shape: &AttentionShape, index: usize) -> Head {
    let query = index * shape.query_width();
    let key = index / shape.sharing * shape.head_stride;
    Head {
        query,
        query_rope: query + shape.key_width,
        key,
        value: key + shape.value_offset,
        out: index * shape.value_width,
    }
}

/// The score of one query row and one cached or packed token.
fn score(shape: &AttentionShape, head: &Head, q: &[f64], kv: &[f64], k_rope: &[f64]) -> f64 {
    let key = dot(&q[head.query..][..shape.key_width], &kv[head.key..][..shape.key_width]);
    let rope = dot(&q[head.query_rope..][..shape.rope_width], &k_rope[..shape.rope_width]);
    shape.scale * (key + rope)
}

pub fn mla_train(
    shape: &AttentionShape,
    q: &Buffer,
    kv: &Buffer,
    k_rope: &Buffer,
    start: &Buffer,
    o: &mut Buffer,
    lse: &mut Buffer,
) {
    let (q, kv, k_rope) = (q.host::<f64>(), kv.host::<f64>(), k_rope.host::<f64>());
    let (mut o, mut lse) = (o.host_mut::<f64>(), lse.host_mut::<f64>());
    for t in 0..q.rows {
        let tokens = seen(start, t);
        for index in 0..shape.heads {
            let out = &mut o.row_mut(t)[index * shape.value_width..][..shape.value_width];
            let rows = Rows { kv, k_rope, tokens: &tokens };
            lse.row_mut(t)[index] = attend(shape, index, q.row(t), &rows, out);
        }
    }
}

/// The rows that row t sees: those of the segment that it continues, if any, then its own up to itself.
fn seen(start: &Buffer, t: usize) -> Vec<usize> {
    let start = start.host::<u32>();
    let (first, stem) = (start.row(t)[0], start.row(t)[start.cols - 1]);
    let of_stem = (0..start.rows).filter(|row| stem != first && start.row(*row)[0] == stem);
    of_stem.chain(first as usize..t + 1).collect()
}

/// The tokens that a query row sees, and where their keys and values are.
struct Rows<'a> {
    kv: Mat<'a, f64>,
    k_rope: Mat<'a, f64>,
    tokens: &'a [usize],
}

/// Writes one head's output of one row; returns the log-sum-exp of its scores.
fn attend(
    shape: &AttentionShape,
    index: usize,
    q: &[f64],
    rows: &Rows<'_>,
    out: &mut [f64],
) -> f64 {
    let head = head(shape, index);
    let scores: Vec<f64> = rows
        .tokens
        .iter()
        .map(|j| score(shape, &head, q, rows.kv.row(*j), rows.k_rope.row(*j)))
        .collect();
    let lse = log_sum_exp(&scores);
    out.fill(0.0);
    for (score, j) in scores.iter().zip(rows.tokens) {
        let value = &rows.kv.row(*j)[head.value..][..shape.value_width];
        add_scaled((score - lse).exp(), value, out);
    }
    lse
}

/// With p = softmax(s): dp = d_o . v, ds = p * (dp - d_o . o), then the chain rule into q and keys.
pub fn mla_train_backward_input(
    shape: &AttentionShape,
    forward: &Forward<'_>,
    d_o: &Buffer,
    dq: &mut Buffer,
    dkv: &mut Buffer,
    dk_rope: &mut Buffer,
) {
    for gradient in [&mut *dq, &mut *dkv, &mut *dk_rope] {
        movement::fill(gradient, 0.0);
    }
    let (q, kv, k_rope) =
        (forward.q.host::<f64>(), forward.kv.host::<f64>(), forward.k_rope.host::<f64>());
    let (o, lse, d_o) = (forward.o.host::<f64>(), forward.lse.host::<f64>(), d_o.host::<f64>());
    let (mut dq, mut dkv, mut dk_rope) =
        (dq.host_mut::<f64>(), dkv.host_mut::<f64>(), dk_rope.host_mut::<f64>());
    for t in 0..q.rows {
        let tokens = seen(forward.start, t);
        for index in 0..shape.heads {
            let head = head(shape, index);
            let d_out = &d_o.row(t)[head.out..][..shape.value_width];
            let mean = dot(d_out, &o.row(t)[head.out..][..shape.value_width]);
            for j in tokens.iter().copied() {
                let s = score(shape, &head, q.row(t), kv.row(j), k_rope.row(j));
                let p = (s - lse.row(t)[index]).exp();
                let value = &kv.row(j)[head.value..][..shape.value_width];
                let ds = shape.scale * p * (dot(d_out, value) - mean);
                let (key, query) =
                    (head.key..head.key + shape.key_width, head.query..head.query_rope);
                let turned = head.query_rope..head.query_rope + shape.rope_width;
                add_scaled(p, d_out, &mut dkv.row_mut(j)[head.value..][..shape.value_width]);
                add_scaled(ds, &q.row(t)[query.clone()], &mut dkv.row_mut(j)[key.clone()]);
                add_scaled(ds, &q.row(t)[turned.clone()], dk_rope.row_mut(j));
                add_scaled(ds, &kv.row(j)[key], &mut dq.row_mut(t)[query]);
                add_scaled(ds, k_rope.row(j), &mut dq.row_mut(t)[turned]);
            }
        }
    }
}

pub fn mla_decode(
    shape: &AttentionShape,
    q: &Buffer,
    cache: &Buffer,
    batch: &DecodeBatch<'_>,
    o: &mut Buffer,
) {
    let latent = cache.cols() - shape.rope_width;
    let (kv, k_rope) = (cache.cols_of(0..latent), cache.cols_of(latent..cache.cols()));
    let tables = batch.tables.host::<u32>();
    let sequence = movement::read::<u32>(batch.sequence);
    let length = movement::read::<u32>(batch.length);
    let (q, mut o) = (q.host::<f64>(), o.host_mut::<f64>());
    for row in 0..q.rows {
        let pages = tables.row(sequence[row] as usize);
        let slot = |j: usize| {
            pages[j / batch.page_tokens] as usize * batch.page_tokens + j % batch.page_tokens
        };
        let tokens: Vec<usize> = (0..length[row] as usize).map(slot).collect();
        let rows = Rows { kv: kv.host(), k_rope: k_rope.host(), tokens: &tokens };
        for index in 0..shape.heads {
            let out = &mut o.row_mut(row)[index * shape.value_width..][..shape.value_width];
            attend(shape, index, q.row(row), &rows, out);
        }
    }
}

/// With parts a and b of the tokens: o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b, and
/// lse = ln(exp(lse_a) + exp(lse_b)).
pub fn mla_prefill(
    shape: &AttentionShape,
    q: &Buffer,
    (kv, k_rope): (&Buffer, &Buffer),
    first: usize,
    length: &Buffer,
    o: &mut Buffer,
    lse: &mut Buffer,
    store: Store,
) {
    let (kv, k_rope, q) = (kv.host::<f64>(), k_rope.host::<f64>(), q.host::<f64>());
    let (mut o, mut lse) = (o.host_mut::<f64>(), lse.host_mut::<f64>());
    for (t, length) in movement::read::<u32>(length).into_iter().enumerate() {
        let tokens: Vec<usize> = (0..kv.rows).filter(|j| first + j < length as usize).collect();
        for index in 0..shape.heads {
            let out = &mut o.row_mut(t)[index * shape.value_width..][..shape.value_width];
            let before = &mut lse.row_mut(t)[index];
            if store == Store::Set {
                out.fill(0.0);
                *before = f64::NEG_INFINITY;
            }
            if tokens.is_empty() {
                continue;
            }
            let mut part = vec![0.0; shape.value_width];
            let rows = Rows { kv, k_rope, tokens: &tokens };
            let new = attend(shape, index, q.row(t), &rows, &mut part);
            let both = log_sum_exp(&[*before, new]);
            let kept = (*before - both).exp();
            out.iter_mut().for_each(|o| *o *= kept);
            add_scaled((new - both).exp(), &part, out);
            *before = both;
        }
    }
}
