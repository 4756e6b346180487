//! Preference pairs for reward models: shuffled epochs of whole token sequences.
//!
//! Knows no scores. The last batch of the stage may be shorter.

use crate::data::example::Pair;
use crate::data::order::{EpochOrder, OrderKey};

/// The pairs of a stage.
#[derive(Debug)]
pub struct Preferences {
    pairs: Vec<Pair>,
    order: EpochOrder,
    batch: usize,
    positions: u64,
}

impl Preferences {
    /// Encoded pairs, at least one, passed over `epochs` times.
    pub fn new(pairs: Vec<Pair>, key: OrderKey, epochs: u64, batch: usize) -> Preferences {
        let order = EpochOrder::new(key, pairs.len());
        let positions = epochs * pairs.len() as u64;
        Preferences { pairs, order, batch, positions }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.positions.div_ceil(self.batch as u64)
    }

    /// The pairs of a step.
    pub fn batch(&mut self, step: u64) -> Vec<Pair> {
        let chosen = self.order.batch(step, self.batch, self.positions);
        chosen.into_iter().map(|index| self.pairs[index].clone()).collect()
    }
}
