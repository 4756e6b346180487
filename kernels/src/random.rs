//! Counter-based random numbers: a pure function of a key, with no hidden state.
//!
//! Every draw of the product is keyed by (seed, stream, and up to four counters such as step, prompt,
//! sample, position), so that thread count, batch mix and restarts change nothing.
//!
//! The mixer is SplitMix64's finaliser over a chained sum; it is not for cryptography.

/// What a random number is for. Two streams never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Initial weights: counters (tensor, element).
    Init = 1,
    /// Order of examples in an epoch: counters (stage, epoch, index).
    Order = 2,
    /// Choice between data sets and of document windows: counters (stage, step, row).
    Mixture = 3,
    /// Sampled tokens: counters (step, prompt, sample, position).
    Sample = 4,
    /// Made-up data: counters (set, index, draw).
    Data = 5,
    /// Choice of prompts for a step: counters (stage, step, slot).
    Prompts = 6,
    /// Sequences that keep all their tokens: counters (stage, step, number).
    Protect = 7,
}

/// 64 random bits for a key.
pub fn bits(seed: u64, stream: Stream, counters: [u64; 4]) -> u64 {
    let mut state = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
    state = mix(state.wrapping_add(stream as u64).wrapping_mul(0xd134_2543_de82_ef95));
    for counter in counters {
        state = mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15)
            ^ mix(counter.wrapping_add(0x2545_f491_4f6c_dd1d)));
    }
    state
}

/// A number in [0, 1) with 53 random bits.
pub fn uniform(seed: u64, stream: Stream, counters: [u64; 4]) -> f64 {
    (bits(seed, stream, counters) >> 11) as f64 / (1u64 << 53) as f64
}

/// An integer in [0, bound).
pub fn below(seed: u64, stream: Stream, counters: [u64; 4], bound: u64) -> u64 {
    assert!(bound > 0);
    ((u128::from(bits(seed, stream, counters)) * u128::from(bound)) >> 64) as u64
}

/// A draw from N(0, 1) (Box-Muller; one of the pair).
pub fn normal(seed: u64, stream: Stream, counters: [u64; 4]) -> f64 {
    let word = bits(seed, stream, counters);
    let first = ((word >> 11) as f64 + 1.0) / ((1u64 << 53) as f64 + 1.0);
    let second = (mix(word) >> 11) as f64 / (1u64 << 53) as f64;
    (-2.0 * first.ln()).sqrt() * (std::f64::consts::TAU * second).cos()
}

/// A sequence of draws under one key: for code that draws a varying number of times.
pub struct Draws {
    seed: u64,
    stream: Stream,
    key: [u64; 3],
    next: u64,
}

impl Draws {
    /// Starts the sequence for `key`.
    pub fn new(seed: u64, stream: Stream, key: [u64; 3]) -> Draws {
        Draws { seed, stream, key, next: 0 }
    }

    /// An integer in [0, bound).
    pub fn below(&mut self, bound: u64) -> u64 {
        let counters = self.advance();
        below(self.seed, self.stream, counters, bound)
    }

    /// A number in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        let counters = self.advance();
        uniform(self.seed, self.stream, counters)
    }

    /// Shuffles `items` (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    fn advance(&mut self) -> [u64; 4] {
        self.next += 1;
        [self.key[0], self.key[1], self.key[2], self.next - 1]
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_moments_of_their_distributions() {
        let count = 40_000u64;
        let (mut sum, mut square, mut flat) = (0.0, 0.0, 0.0);
        for i in 0..count {
            let z = normal(7, Stream::Init, [3, i, 0, 0]);
            sum += z;
            square += z * z;
            flat += uniform(7, Stream::Sample, [1, 2, 3, i]);
        }
        let n = count as f64;
        assert!(
            (sum / n).abs() < 0.02 && (square / n - 1.0).abs() < 0.03,
            "{} {}",
            sum / n,
            square / n
        );
        assert!((flat / n - 0.5).abs() < 0.01);
    }

    #[test]
    fn every_part_of_the_key_changes_the_number() {
        let base = bits(1, Stream::Sample, [2, 3, 4, 5]);
        let others = [
            bits(2, Stream::Sample, [2, 3, 4, 5]),
            bits(1, Stream::Order, [2, 3, 4, 5]),
            bits(1, Stream::Sample, [3, 3, 4, 5]),
            bits(1, Stream::Sample, [2, 4, 4, 5]),
            bits(1, Stream::Sample, [2, 3, 5, 5]),
            bits(1, Stream::Sample, [2, 3, 4, 6]),
            bits(1, Stream::Sample, [3, 2, 4, 5]),
        ];
        assert!(others.iter().all(|o| *o != base));
        assert_eq!(base, bits(1, Stream::Sample, [2, 3, 4, 5]));
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Draws::new(1, Stream::Order, [0, 0, 0]).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
