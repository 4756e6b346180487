//! The output head: log-probability of targets with its gradient, and sampling.
//!
//! Logits are z = x Wᵀ / T, and x Wᵀ at T = 0; the reference may hold a whole row of them.

use super::{add_scaled, dot, log_sum_exp, movement};
use crate::buffer::Buffer;
use crate::kernels::{Packed, Product, SampleRow, Sampled};

/// What the forward pass read and wrote; `plain` is the same head, packed for the input gradient.
pub struct Forward<'a> {
    pub x: &'a Buffer,
    pub head: &'a Packed,
    pub plain: &'a Packed,
    pub targets: &'a Buffer,
    pub temperature: f64,
}

/// One row's logits over the temperature.
fn scaled_logits(x: &[f64], head: &Packed, temperature: f64) -> Vec<f64> {
    assert_eq!(head.product, Product::Transposed, "the head's forward product");
    let weights = head.data.host::<f64>();
    let divisor = divisor(temperature);
    (0..head.outputs).map(|token| dot(x, weights.row(token)) / divisor).collect()
}

/// Greedy decoding (T = 0) tells its log-probabilities at T = 1.
fn divisor(temperature: f64) -> f64 {
    if temperature == 0.0 { 1.0 } else { temperature }
}

/// softmax(x W / T) of one row, and its log-sum-exp.
fn softmax(x: &[f64], head: &Packed, temperature: f64) -> (Vec<f64>, f64) {
    let z = scaled_logits(x, head, temperature);
    let total = log_sum_exp(&z);
    (z.iter().map(|z| (z - total).exp()).collect(), total)
}

pub fn head_logprob(
    x: &Buffer,
    head: &Packed,
    targets: &Buffer,
    temperature: f64,
    logprob: &mut Buffer,
    entropy: &mut Buffer,
    mut kept: Option<&mut Buffer>,
) {
    let (x, targets) = (x.host::<f64>(), movement::read::<u32>(targets));
    let (mut logprob, mut entropy) = (logprob.host_mut::<f64>(), entropy.host_mut::<f64>());
    for (r, target) in targets.into_iter().enumerate() {
        let z = scaled_logits(x.row(r), head, temperature);
        let (p, total) = softmax(x.row(r), head, temperature);
        logprob.row_mut(r)[0] = z[target as usize] - total;
        entropy.row_mut(r)[0] = p.iter().zip(&z).map(|(p, z)| p * (total - z)).sum();
        if let Some(kept) = kept.as_deref_mut() {
            kept.host_mut::<f64>().row_mut(r).copy_from_slice(&p);
        }
    }
}

pub fn logits_logprob(logits: &Buffer, targets: &Buffer, temperature: f64, logprob: &mut Buffer) {
    let (logits, mut logprob) = (logits.host::<f64>(), logprob.host_mut::<f64>());
    for (r, target) in movement::read::<u32>(targets).into_iter().enumerate() {
        let z: Vec<f64> = logits.row(r).iter().map(|z| z / divisor(temperature)).collect();
        logprob.row_mut(r)[0] = z[target as usize] - log_sum_exp(&z);
    }
}

/// dz_v = c / T * (1[v is the target] - p_v); dx = dz W; dw += dzᵀ x.
pub fn head_logprob_backward(
    forward: &Forward<'_>,
    c: &Buffer,
    kept: Option<&Buffer>,
    dx: &mut Buffer,
    dw: &mut Buffer,
) {
    assert_eq!(forward.plain.product, Product::Plain, "the head's input gradient");
    let (x, targets) = (forward.x.host::<f64>(), movement::read::<u32>(forward.targets));
    let (c, weights) = (c.host::<f64>(), forward.plain.data.host::<f64>());
    let (mut dx, mut dw) = (dx.host_mut::<f64>(), dw.host_mut::<f64>());
    for (r, target) in targets.into_iter().enumerate() {
        dx.row_mut(r).fill(0.0);
        let p = match kept {
            Some(kept) => kept.host::<f64>().row(r).to_vec(),
            None => softmax(x.row(r), forward.head, forward.temperature).0,
        };
        for (token, p) in p.into_iter().enumerate() {
            let hit = if token == target as usize { 1.0 } else { 0.0 };
            let dz = c.row(r)[0] / divisor(forward.temperature) * (hit - p);
            add_scaled(dz, weights.row(token), dx.row_mut(r));
            add_scaled(dz, x.row(r), dw.row_mut(token));
        }
    }
}

pub fn sample(logits: &Buffer, rows: &[SampleRow]) -> Vec<Sampled> {
    assert_eq!(logits.rows(), rows.len(), "one rule a row");
    let logits = logits.host::<f64>();
    rows.iter().enumerate().map(|(r, row)| sample_row(logits.row(r), row)).collect()
}

/// Greedy takes the first of the largest logits. Otherwise the kept tokens, in the order of their
/// ids, share [0, their mass) and the row's random number picks one.
fn sample_row(logits: &[f64], row: &SampleRow) -> Sampled {
    let temperature = divisor(row.temperature);
    let z: Vec<f64> = logits.iter().map(|logit| logit / temperature).collect();
    let lse = log_sum_exp(&z);
    let mut order: Vec<usize> = (0..z.len()).collect();
    // Adding zero makes -0 equal to 0, so that the lower id comes first.
    order.sort_by(|a, b| (z[*b] + 0.0).total_cmp(&(z[*a] + 0.0)));
    if row.temperature == 0.0 {
        return Sampled { token: order[0] as u32, logprob: z[order[0]] - lse };
    }
    let probability = |token: usize| (z[token] - lse).exp();
    let mut kept = truncated(order, row, probability);
    kept.sort_unstable();
    let mut left = row.uniform * kept.iter().map(|token| probability(*token)).sum::<f64>();
    let last = kept[kept.len() - 1];
    let passes = |token: &usize| {
        left -= probability(*token);
        left < 0.0
    };
    let token = kept.into_iter().find(passes).unwrap_or(last);
    Sampled { token: token as u32, logprob: z[token] - lse }
}

/// The tokens that top-k and then the nucleus leave, from all tokens in descending probability. The
/// nucleus is a share of what top-k left.
fn truncated(
    mut order: Vec<usize>,
    row: &SampleRow,
    probability: impl Fn(usize) -> f64,
) -> Vec<usize> {
    if row.top_k > 0 {
        order.truncate(row.top_k);
    }
    if row.top_p < 1.0 {
        let total: f64 = order.iter().map(|token| probability(*token)).sum();
        let mut mass = 0.0;
        let reaches = |token: &usize| {
            mass += probability(*token);
            mass >= row.top_p * total
        };
        let count = order.iter().position(reaches).map_or(order.len(), |last| last + 1);
        order.truncate(count);
    }
    order
}
