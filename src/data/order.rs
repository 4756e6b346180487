//! The order of examples: a fresh shuffle every epoch, as a function of counters.
//!
//! Knows no examples, only their number. Position p of a stage is example p % count of epoch
//! p / count, so that a batch is found again from its step alone.
//!
//! Invariants:
//!   * each epoch holds every index once
//!   * the order depends on the seed, the stream, the key and the epoch, not on earlier questions

use rehearsal_kernels::random::{Draws, Stream};

/// What makes an order its own: two orders with different keys are unrelated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderKey {
    /// The run's seed.
    pub seed: u64,
    /// What the order is for.
    pub stream: Stream,
    /// The stage's number in the run.
    pub stage: u64,
    /// The set's number in the stage.
    pub set: u64,
}

impl OrderKey {
    /// The indices 0..count in the order of an epoch.
    pub fn shuffle(&self, epoch: u64, count: usize) -> Vec<u32> {
        let count =
            u32::try_from(count).expect("a set of more than 4 billion examples fits no memory");
        let mut order: Vec<u32> = (0..count).collect();
        Draws::new(self.seed, self.stream, [self.stage, epoch, self.set]).shuffle(&mut order);
        order
    }
}

/// Positions of a stage to indices of its examples.
#[derive(Debug)]
pub struct EpochOrder {
    key: OrderKey,
    count: usize,
    // The shuffles last used: a batch spans two epochs at most where a set is larger than a batch.
    recent: Vec<(u64, Vec<u32>)>,
}

impl EpochOrder {
    /// An order of `count` examples, at least one.
    pub fn new(key: OrderKey, count: usize) -> EpochOrder {
        assert!(count > 0, "an empty set has no order");
        EpochOrder { key, count, recent: Vec::new() }
    }

    /// The example at a position.
    pub fn index(&mut self, position: u64) -> usize {
        let (epoch, place) = (position / self.count as u64, position % self.count as u64);
        if !self.recent.iter().any(|(known, _)| *known == epoch) {
            if self.recent.len() == 2 {
                self.recent.remove(0);
            }
            self.recent.push((epoch, self.key.shuffle(epoch, self.count)));
        }
        let known = self.recent.iter().find(|(known, _)| *known == epoch);
        known.expect("it was just made").1[place as usize] as usize
    }

    /// The examples of a step of `batch` examples, up to position `end`.
    pub fn batch(&mut self, step: u64, batch: usize, end: u64) -> Vec<usize> {
        let start = step * batch as u64;
        (start..end.min(start + batch as u64)).map(|position| self.index(position)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64, stage: u64) -> EpochOrder {
        EpochOrder::new(OrderKey { seed, stream: Stream::Order, stage, set: 0 }, 10)
    }

    #[test]
    fn every_epoch_holds_every_example_once_and_epochs_differ() {
        let mut order = order(1, 0);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|e| (0..10).map(|p| order.index(e * 10 + p)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn a_step_is_the_same_whatever_was_asked_before() {
        let mut forward = order(1, 0);
        let batches: Vec<_> = (0..20).map(|step| forward.batch(step, 3, u64::MAX)).collect();
        for step in [19, 0, 7, 3] {
            assert_eq!(order(1, 0).batch(step, 3, u64::MAX), batches[step as usize]);
            assert_eq!(forward.batch(step, 3, u64::MAX), batches[step as usize]);
        }
        assert_ne!(order(2, 0).batch(0, 8, u64::MAX), order(1, 0).batch(0, 8, u64::MAX));
        assert_ne!(order(1, 1).batch(0, 8, u64::MAX), order(1, 0).batch(0, 8, u64::MAX));
        assert_eq!(forward.batch(3, 3, 10).len(), 1, "the last batch is shorter");
    }
}
