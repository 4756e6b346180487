//! Balance losses: DeepSeek-V2, eq. 23 to 31, letter by letter, for each segment of rows.
//!
//! f_i = E / (K T) * tokens that chose i; P_i = mean score of i. Of a device (a group of experts): f' = the mean of its f,
//! f'' = D / (M T) * tokens that chose one of its experts or more, P' = P'' = the sum of its P. The gradient goes through
//! P alone.

use super::movement;
use crate::buffer::Buffer;
use crate::routing::BalanceSpec;

pub fn balance_loss(
    spec: &BalanceSpec,
    scores: &Buffer,
    experts: &Buffer,
    segment: &Buffer,
    d_scores: &mut Buffer,
) -> Vec<f64> {
    let segment = movement::read::<u32>(segment);
    let segments = segment.last().map_or(0, |last| last + 1);
    (0..segments)
        .map(|number| {
            let rows = (0..segment.len()).filter(|t| segment[*t] == number).collect();
            Terms { spec, scores, experts, rows }.loss(d_scores)
        })
        .collect()
}

/// One sequence.
struct Terms<'a> {
    spec: &'a BalanceSpec,
    scores: &'a Buffer,
    experts: &'a Buffer,
    rows: Vec<usize>,
}

impl Terms<'_> {
    fn loss(&self, d_scores: &mut Buffer) -> f64 {
        let (count, size) = (self.scores.cols(), self.size());
        let mut loss = 0.0;
        for expert in 0..count {
            loss += self.spec.expert * self.f(expert) * self.p(expert);
        }
        for device in 0..self.spec.groups {
            let own = device * size..(device + 1) * size;
            let p: f64 = own.map(|expert| self.p(expert)).sum();
            loss += self.spec.device * self.f_device(device) * p;
            loss += self.spec.communication * self.f_communication(device) * p;
        }
        let mut d_scores = d_scores.host_mut::<f64>();
        for expert in 0..count {
            let device = expert / size;
            // d loss / d P_i, and d P_i / d s_it = 1 / T.
            let by_p = self.spec.expert * self.f(expert)
                + self.spec.device * self.f_device(device)
                + self.spec.communication * self.f_communication(device);
            for t in &self.rows {
                d_scores.row_mut(*t)[expert] += by_p / self.tokens() / self.spec.sequences as f64;
            }
        }
        loss
    }

    fn tokens(&self) -> f64 {
        self.rows.len() as f64
    }

    /// Experts of a device.
    fn size(&self) -> usize {
        self.scores.cols() / self.spec.groups
    }

    fn p(&self, expert: usize) -> f64 {
        let scores = self.scores.host::<f64>();
        self.rows.iter().map(|t| scores.row(*t)[expert]).sum::<f64>() / self.tokens()
    }

    fn f(&self, expert: usize) -> f64 {
        let experts = self.experts.host::<u32>();
        let chose = |t: &&usize| experts.row(**t).contains(&(expert as u32));
        let per_token = self.scores.cols() as f64 / (experts.cols as f64 * self.tokens());
        per_token * self.rows.iter().filter(chose).count() as f64
    }

    fn f_device(&self, device: usize) -> f64 {
        let size = self.size();
        (device * size..(device + 1) * size).map(|expert| self.f(expert)).sum::<f64>() / size as f64
    }

    fn f_communication(&self, device: usize) -> f64 {
        let (experts, size) = (self.experts.host::<u32>(), self.size());
        let goes = |t: &&usize| experts.row(**t).iter().any(|e| *e as usize / size == device);
        let per_token = self.spec.groups as f64 / (self.spec.top_groups as f64 * self.tokens());
        per_token * self.rows.iter().filter(goes).count() as f64
    }
}
