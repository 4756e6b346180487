//! Experts: the group-limited router, the balance loss, the sort into slots and the way back.
//!
//! DeepSeek-V2, sections 2.2.1 to 2.2.3. A group's score is its maximum; experts outside the kept
//! groups can never be chosen; ties go to the lowest index.

use super::{add_scaled, dot, log_sum_exp, movement};
use crate::arena::{Arena, Owner};
use crate::buffer::{Buffer, DType};
use crate::kernels::{Result, RouterSpec, Routes};

pub fn router(
    spec: &RouterSpec,
    logits: &Buffer,
    scores: &mut Buffer,
    experts: &mut Buffer,
    weights: &mut Buffer,
) {
    let (logits, mut scores) = (logits.host::<f64>(), scores.host_mut::<f64>());
    let (mut experts, mut weights) = (experts.host_mut::<u32>(), weights.host_mut::<f64>());
    for t in 0..logits.rows {
        let lse = log_sum_exp(logits.row(t));
        for (score, logit) in scores.row_mut(t).iter_mut().zip(logits.row(t)) {
            *score = (logit - lse).exp();
        }
        let scores = scores.row(t);
        let chosen = choose(spec, scores);
        let sum: f64 = chosen.iter().map(|e| scores[*e]).sum();
        let factor = if spec.normalize { 1.0 / (sum + 1e-20) } else { spec.scale };
        for (k, expert) in chosen.into_iter().enumerate() {
            experts.row_mut(t)[k] = expert as u32;
            weights.row_mut(t)[k] = scores[expert] * factor;
        }
    }
}

/// The experts of one token, in descending score.
fn choose(spec: &RouterSpec, scores: &[f64]) -> Vec<usize> {
    let size = scores.len() / spec.groups;
    let best = |group: usize| {
        scores[group * size..][..size].iter().copied().fold(f64::NEG_INFINITY, f64::max)
    };
    let groups: Vec<f64> = (0..spec.groups).map(best).collect();
    let kept = descending(&groups, (0..spec.groups).collect(), spec.top_groups);
    let candidates = (0..scores.len()).filter(|e| kept.contains(&(e / size))).collect();
    descending(scores, candidates, spec.top_k)
}

/// The first `count` of ascending `items` by descending value; a stable sort keeps ties in order.
fn descending(values: &[f64], mut items: Vec<usize>, count: usize) -> Vec<usize> {
    items.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    items.truncate(count);
    items
}

pub fn router_backward(
    spec: &RouterSpec,
    scores: &Buffer,
    experts: &Buffer,
    d_weights: &Buffer,
    d_scores: &Buffer,
    d_logits: &mut Buffer,
) {
    let (scores, experts) = (scores.host::<f64>(), experts.host::<u32>());
    let (d_weights, d_scores) = (d_weights.host::<f64>(), d_scores.host::<f64>());
    let mut d_logits = d_logits.host_mut::<f64>();
    for t in 0..scores.rows {
        let (s, chosen, dw) = (scores.row(t), experts.row(t), d_weights.row(t));
        let mut ds = d_scores.row(t).to_vec();
        let sum = chosen.iter().map(|e| s[*e as usize]).sum::<f64>() + 1e-20;
        let mean: f64 = chosen.iter().zip(dw).map(|(e, dw)| s[*e as usize] / sum * dw).sum();
        for (expert, dw) in chosen.iter().zip(dw) {
            let gradient = if spec.normalize { (dw - mean) / sum } else { spec.scale * dw };
            ds[*expert as usize] += gradient;
        }
        let mean = dot(&ds, s);
        for (e, d) in d_logits.row_mut(t).iter_mut().enumerate() {
            *d = s[e] * (ds[e] - mean);
        }
    }
}

/// f_i = E / (K T) * tokens that chose i; P_i = mean score of i; loss = alpha Σ f_i P_i.
/// DeepSeek-V2, eq. 23 to 25, for each segment; the mean over segments.
pub fn balance_loss(
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    alpha: f64,
    weight: f64,
    d_scores: &mut Buffer,
) -> f64 {
    let segment = movement::read::<u32>(segment);
    let (scores, experts, mut d_scores) =
        (scores.host::<f64>(), experts.host::<u32>(), d_scores.host_mut::<f64>());
    let segments = segment.last().map_or(0, |last| last + 1);
    let mut loss = 0.0;
    for number in 0..segments {
        let rows: Vec<usize> = (0..segment.len()).filter(|t| segment[*t] == number).collect();
        let tokens = rows.len() as f64;
        let per_choice = scores.cols as f64 / (experts.cols as f64 * tokens);
        for expert in 0..scores.cols {
            let hits = rows.iter().flat_map(|t| experts.row(*t)).filter(|e| **e as usize == expert);
            let f = per_choice * hits.count() as f64;
            let p = rows.iter().map(|t| scores.row(*t)[expert]).sum::<f64>() / tokens;
            loss += alpha * f * p / f64::from(segments);
            for t in &rows {
                d_scores.row_mut(*t)[expert] += weight * alpha * f / (tokens * f64::from(segments));
            }
        }
    }
    loss
}

pub fn routes(arena: &Arena, scratch: Owner, experts: &Buffer, count: usize) -> Result<Routes> {
    let (tokens, top_k) = (experts.rows(), experts.cols());
    let chosen = movement::read::<u32>(experts);
    let mut order: Vec<usize> = (0..chosen.len()).collect();
    order.sort_by_key(|pair| chosen[*pair]);
    let mut slot = vec![0; chosen.len()];
    for (place, pair) in order.iter().enumerate() {
        slot[*pair] = place as u32;
    }
    let token: Vec<u32> = order.iter().map(|pair| (pair / top_k) as u32).collect();
    let before = |expert: usize| chosen.iter().filter(|e| (**e as usize) < expert).count() as u32;
    let offsets: Vec<u32> = (0..count + 1).map(before).collect();
    let indices = |values: &[u32], rows, cols| {
        let mut buffer = arena.buffer(scratch, DType::U32, rows, cols)?;
        movement::write(values, &mut buffer);
        Ok(buffer)
    };
    Ok(Routes {
        experts: count,
        offsets: indices(&offsets, count + 1, 1)?,
        token: indices(&token, tokens * top_k, 1)?,
        slot: indices(&slot, tokens, top_k)?,
    })
}

pub fn combine(x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) {
    let (x, slot, weights) = (x.host::<f64>(), routes.slot.host::<u32>(), weights.host::<f64>());
    let mut y = y.host_mut::<f64>();
    for t in 0..slot.rows {
        for (slot, weight) in slot.row(t).iter().zip(weights.row(t)) {
            add_scaled(*weight, x.row(*slot as usize), y.row_mut(t));
        }
    }
}

pub fn combine_backward(
    dy: &Buffer,
    x: &Buffer,
    routes: &Routes,
    weights: &Buffer,
    dx: &mut Buffer,
    d_weights: &mut Buffer,
) {
    let (dy, x, slot) = (dy.host::<f64>(), x.host::<f64>(), routes.slot.host::<u32>());
    let (weights, mut dx) = (weights.host::<f64>(), dx.host_mut::<f64>());
    let mut d_weights = d_weights.host_mut::<f64>();
    for t in 0..slot.rows {
        for (k, slot) in slot.row(t).iter().enumerate() {
            d_weights.row_mut(t)[k] = dot(dy.row(t), x.row(*slot as usize));
            for (dx, dy) in dx.row_mut(*slot as usize).iter_mut().zip(dy.row(t)) {
                *dx = weights.row(t)[k] * dy;
            }
        }
    }
}

pub fn sum_slots(x: &Buffer, routes: &Routes, y: &mut Buffer) {
    let (x, slot, mut y) = (x.host::<f64>(), routes.slot.host::<u32>(), y.host_mut::<f64>());
    for t in 0..slot.rows {
        for slot in slot.row(t) {
            add_scaled(1.0, x.row(*slot as usize), y.row_mut(t));
        }
    }
}
