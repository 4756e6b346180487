//! Prompts for alignment: those of a step come from shuffled epochs of the set.
//!
//! Knows no rewards. A prompt keeps its line number as `index`: the random numbers of its rollouts
//! hang on it.

use crate::data::example::Prompt;
use crate::data::order::{EpochOrder, OrderKey};

/// The prompts of a stage.
#[derive(Debug)]
pub struct Prompts {
    prompts: Vec<Prompt>,
    order: EpochOrder,
    count: usize,
    steps: u64,
}

impl Prompts {
    /// Encoded prompts, at least one; `count` of them go into each of `steps` steps.
    pub fn new(prompts: Vec<Prompt>, key: OrderKey, count: usize, steps: u64) -> Prompts {
        let order = EpochOrder::new(key, prompts.len());
        Prompts { prompts, order, count, steps }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The prompts of a step, in order of slot.
    pub fn step(&mut self, step: u64) -> Vec<Prompt> {
        let chosen = self.order.batch(step, self.count, u64::MAX);
        chosen.into_iter().map(|index| self.prompts[index].clone()).collect()
    }
}
