//! Experts: the group-limited router, what a device drops, the sort into slots and the way back.
//!
//! DeepSeek-V2, sections 2.2.1, 2.2.2 and 2.2.4. A group's score is its maximum; experts outside the kept
//! groups can never be chosen; ties go to the lowest index.

use super::{add_scaled, dot, log_sum_exp, movement};
use crate::arena::{Arena, Owner};
use crate::buffer::{Buffer, DType};
use crate::kernels::Result;
use crate::routing::{DROPPED, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};

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

pub fn count_routes(experts: &Buffer, count: usize, groups: usize) -> RouteCounts {
    let experts = experts.host::<u32>();
    let chose = |t: usize, expert: usize| experts.row(t).contains(&(expert as u32));
    let size = count / groups;
    let tokens = |expert| (0..experts.rows).filter(|t| chose(*t, expert)).count() as u32;
    let devices = (0..groups).map(|group| {
        let own = group * size..(group + 1) * size;
        (0..experts.rows).filter(|t| own.clone().any(|expert| chose(*t, expert))).count() as u64
    });
    RouteCounts { experts: (0..count).map(tokens).collect(), devices: devices.sum() }
}

/// DeepSeek-V2, section 2.2.4, for each segment: a pair stays if fewer than ceil(cf K T / D) pairs of its group come
/// before it, by score and then by order.
pub fn drop_overflow(
    spec: &DropSpec,
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    protected: &Buffer,
    kept: &mut Buffer,
) -> DropCounts {
    let (segment, protected) = (movement::read::<u32>(segment), movement::read::<u32>(protected));
    let (scores, experts, mut kept) =
        (scores.host::<f64>(), experts.host::<u32>(), kept.host_mut::<u32>());
    let (size, top_k) = (scores.cols / spec.groups, experts.cols);
    let expert = |pair: usize| experts.row(pair / top_k)[pair % top_k] as usize;
    let score = |pair: usize| scores.row(pair / top_k)[expert(pair)];
    let mut counts = DropCounts::default();
    for pair in 0..segment.len() * top_k {
        let number = segment[pair / top_k];
        let tokens = segment.iter().filter(|other| **other == number).count();
        let even = (top_k * tokens) as f64 / spec.groups as f64;
        let budget = (spec.capacity_factor * even - 1e-9).ceil().max(1.0) as usize;
        let before = |other: &usize| {
            let beside =
                segment[other / top_k] == number && expert(*other) / size == expert(pair) / size;
            beside && (score(*other) > score(pair) || score(*other) == score(pair) && *other < pair)
        };
        let beyond = (0..segment.len() * top_k).filter(before).count() >= budget;
        let stays = protected[number as usize] == 1;
        counts.overflow += u64::from(beyond && stays);
        counts.dropped += u64::from(beyond && !stays);
        kept.row_mut(pair / top_k)[pair % top_k] =
            if beyond && !stays { DROPPED } else { expert(pair) as u32 };
    }
    counts
}

pub fn routes(arena: &Arena, scratch: Owner, experts: &Buffer, count: usize) -> Result<Routes> {
    let (tokens, top_k) = (experts.rows(), experts.cols());
    let chosen = movement::read::<u32>(experts);
    let mut order: Vec<usize> = (0..chosen.len()).filter(|pair| chosen[*pair] != DROPPED).collect();
    order.sort_by_key(|pair| chosen[*pair]);
    let mut slot = vec![DROPPED; chosen.len()];
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
        token: indices(&token, token.len(), 1)?,
        slot: indices(&slot, tokens, top_k)?,
    })
}

pub fn combine(x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) {
    let (x, slot, weights) = (x.host::<f64>(), routes.slot.host::<u32>(), weights.host::<f64>());
    let mut y = y.host_mut::<f64>();
    for t in 0..slot.rows {
        for (slot, weight) in slot.row(t).iter().zip(weights.row(t)).filter(|p| *p.0 != DROPPED) {
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
            if *slot == DROPPED {
                d_weights.row_mut(t)[k] = 0.0;
                continue;
            }
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
        for slot in slot.row(t).iter().filter(|slot| **slot != DROPPED) {
            add_scaled(1.0, x.row(*slot as usize), y.row_mut(t));
        }
    }
}
