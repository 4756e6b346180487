//! The optimizer's two steps: the square of a norm, and AdamW.
//!
//! AdamW as in Loshchilov and Hutter: decay acts on the weight itself, moments are bias-corrected.

use super::movement;
use crate::buffer::Buffer;
use crate::kernels::AdamW;

pub fn squared_sum(x: &Buffer) -> f64 {
    movement::read::<f64>(x).iter().fold(0.0, |sum, x| x.mul_add(*x, sum))
}

pub fn adamw(update: &AdamW, g: &Buffer, w: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
    let (g, mut w) = (g.host::<f64>(), w.host_mut::<f64>());
    let (mut m, mut v) = (m.host_mut::<f64>(), v.host_mut::<f64>());
    let correction1 = 1.0 - update.beta1.powi(update.step as i32);
    let correction2 = 1.0 - update.beta2.powi(update.step as i32);
    for row in 0..g.rows {
        let (w, m, v) = (w.row_mut(row), m.row_mut(row), v.row_mut(row));
        for (i, g) in g.row(row).iter().enumerate() {
            let g = g * update.gradient_scale;
            m[i] = update.beta1 * m[i] + (1.0 - update.beta1) * g;
            v[i] = update.beta2 * v[i] + (1.0 - update.beta2) * g * g;
            let direction = (m[i] / correction1) / ((v[i] / correction2).sqrt() + update.epsilon);
            w[i] -= update.learning_rate * (direction + update.weight_decay * w[i]);
        }
    }
}
