//! RMSNorm, rotary positions and the SwiGLU gate, with their gradients.
//!
//! Sources: DeepSeek-V2, section 2 (norm and gate as in LLaMA); the rotation is the interleaved one
//! of the published checkpoints: pair k is components (2k, 2k + 1).

use super::{dot, movement};
use crate::buffer::Buffer;
use crate::kernels::{Pairing, RopeTable, Store};

pub fn rms_norm(
    x: &Buffer,
    weight: &Buffer,
    epsilon: f64,
    y: &mut Buffer,
    inverse_rms: &mut Buffer,
) {
    let (x, weight) = (x.host::<f64>(), weight.host::<f64>().row(0));
    let (mut y, mut inverse_rms) = (y.host_mut::<f64>(), inverse_rms.host_mut::<f64>());
    for t in 0..x.rows {
        let row = x.row(t);
        let mean_square = dot(row, row) / row.len() as f64;
        let inverse = 1.0 / (mean_square + epsilon).sqrt();
        inverse_rms.row_mut(t)[0] = inverse;
        for (i, y) in y.row_mut(t).iter_mut().enumerate() {
            *y = weight[i] * (row[i] * inverse);
        }
    }
}

/// dx_i = r * (w_i dy_i - x_i r² / d * Σ_j w_j dy_j x_j) with r = inverse_rms.
pub fn rms_norm_backward_input(
    dy: &Buffer,
    x: &Buffer,
    weight: &Buffer,
    inverse_rms: &Buffer,
    dx: &mut Buffer,
    store: Store,
) {
    let (dy, x, weight) = (dy.host::<f64>(), x.host::<f64>(), weight.host::<f64>().row(0));
    let (inverse_rms, mut dx) = (inverse_rms.host::<f64>(), dx.host_mut::<f64>());
    for t in 0..x.rows {
        let (row, inverse) = (x.row(t), inverse_rms.row(t)[0]);
        let weighted: Vec<f64> = dy.row(t).iter().zip(weight).map(|(dy, w)| dy * w).collect();
        let projection = dot(&weighted, row) * inverse * inverse / row.len() as f64;
        for (i, dx) in dx.row_mut(t).iter_mut().enumerate() {
            let gradient = inverse * (weighted[i] - row[i] * projection);
            *dx = if store == Store::Add { *dx + gradient } else { gradient };
        }
    }
}

pub fn rms_norm_backward_weight(dy: &Buffer, x: &Buffer, inverse_rms: &Buffer, dw: &mut Buffer) {
    let (dy, x, inverse_rms) = (dy.host::<f64>(), x.host::<f64>(), inverse_rms.host::<f64>());
    let mut dw = dw.host_mut::<f64>();
    for t in 0..x.rows {
        for (i, dw) in dw.row_mut(0).iter_mut().enumerate() {
            *dw = dy.row(t)[i].mul_add(x.row(t)[i] * inverse_rms.row(t)[0], *dw);
        }
    }
}

/// Rotates the blocks that begin at the columns `starts`, back if `inverse`.
pub fn rope(
    x: &mut Buffer,
    positions: &Buffer,
    table: &RopeTable,
    starts: &[usize],
    inverse: bool,
) {
    let positions = movement::read::<u32>(positions);
    assert_eq!(positions.len(), x.rows(), "one position a row");
    let (cos, sin, mut x) = (table.cos.host::<f64>(), table.sin.host::<f64>(), x.host_mut::<f64>());
    for (t, position) in positions.into_iter().enumerate() {
        let (cos, sin) = (cos.row(position as usize), sin.row(position as usize));
        for start in starts {
            let block = &mut x.row_mut(t)[*start..][..2 * cos.len()];
            for k in 0..cos.len() {
                let (i, j) = match table.pairing {
                    Pairing::Interleaved => (2 * k, 2 * k + 1),
                    Pairing::Halves => (k, k + cos.len()),
                };
                let (c, s) = (cos[k], if inverse { -sin[k] } else { sin[k] });
                (block[i], block[j]) = (block[i] * c - block[j] * s, block[i] * s + block[j] * c);
            }
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn swiglu(gate_up: &Buffer, y: &mut Buffer) {
    let width = y.cols();
    assert_eq!(gate_up.cols(), 2 * width, "gate left, up right");
    let (gate_up, mut y) = (gate_up.host::<f64>(), y.host_mut::<f64>());
    for t in 0..gate_up.rows {
        let (gate, up) = gate_up.row(t).split_at(width);
        for (i, y) in y.row_mut(t).iter_mut().enumerate() {
            *y = gate[i] * sigmoid(gate[i]) * up[i];
        }
    }
}

pub fn swiglu_backward(dy: &Buffer, gate_up: &Buffer, d_gate_up: &mut Buffer) {
    let width = dy.cols();
    assert_eq!(gate_up.cols(), 2 * width, "gate left, up right");
    let (dy, gate_up, mut d) =
        (dy.host::<f64>(), gate_up.host::<f64>(), d_gate_up.host_mut::<f64>());
    for t in 0..gate_up.rows {
        let (gate, up) = gate_up.row(t).split_at(width);
        let (d_gate, d_up) = d.row_mut(t).split_at_mut(width);
        for (i, dy) in dy.row(t).iter().enumerate() {
            let (g, s) = (gate[i], sigmoid(gate[i]));
            d_gate[i] = dy * up[i] * s * (1.0 + g * (1.0 - s));
            d_up[i] = dy * g * s;
        }
    }
}
