//! Conversations for SFT: shuffled epochs, loss on the assistant's replies alone.
//!
//! Knows no template; it is given encoded conversations. The last batch of the stage may be
//! shorter.

use crate::data::example::Sequence;
use crate::data::order::{EpochOrder, OrderKey};

/// The conversations of a stage.
#[derive(Debug)]
pub struct Conversations {
    sequences: Vec<Sequence>,
    order: EpochOrder,
    batch: usize,
    positions: u64,
}

impl Conversations {
    /// Encoded conversations, at least one, passed over `epochs` times.
    pub fn new(
        sequences: Vec<Sequence>,
        key: OrderKey,
        epochs: u64,
        batch: usize,
    ) -> Conversations {
        let order = EpochOrder::new(key, sequences.len());
        let positions = epochs * sequences.len() as u64;
        Conversations { sequences, order, batch, positions }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.positions.div_ceil(self.batch as u64)
    }

    /// The conversations of a step.
    pub fn batch(&mut self, step: u64) -> Vec<Sequence> {
        let chosen = self.order.batch(step, self.batch, self.positions);
        chosen.into_iter().map(|index| self.sequences[index].clone()).collect()
    }
}
