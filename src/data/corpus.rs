//! Text to packed rows: whole documents one after another, and mixtures of several sets.
//!
//! A row of a pretraining batch holds documents until it is full; the last one is cut at the row's
//! end. A document longer than a row is cut into pieces of a row's length first. Documents of a row
//! are handed out apart, because none may see another.
//!
//! Invariants:
//!   * a row begins where a document (or a piece of a long one) begins, and is never over-full
//!   * row r of a set is a function of (seed, stage, set, r)
//!   * after any number of steps each set has given its share of all rows to within one row

use crate::data::example::Sequence;
use crate::data::order::OrderKey;
use anyhow::Result;

/// A sequence of one token has no target.
const LEAST_TOKENS: usize = 2;

/// The documents of one set, in memory as tokens.
#[derive(Debug)]
pub struct Corpus {
    tokens: Vec<u32>,
    /// Where each piece begins, and its length.
    pieces: Vec<(usize, usize)>,
    sequence: usize,
    key: OrderKey,
    /// Rows of all epochs up to and including each known one.
    rows_until: Vec<u64>,
    current: Option<(u64, Epoch)>,
}

/// One epoch's pieces in order, and where rows begin.
#[derive(Debug)]
struct Epoch {
    order: Vec<u32>,
    rows: Vec<std::ops::Range<usize>>,
}

impl Corpus {
    /// Cuts documents into pieces of at most `sequence` tokens.
    pub fn new(
        documents: impl Iterator<Item = Result<Vec<u32>>>,
        sequence: usize,
        key: OrderKey,
    ) -> Result<Corpus> {
        assert!(sequence >= LEAST_TOKENS);
        let (mut tokens, mut pieces) = (Vec::new(), Vec::new());
        for document in documents {
            for piece in document?.chunks(sequence).filter(|piece| piece.len() >= LEAST_TOKENS) {
                pieces.push((tokens.len(), piece.len()));
                tokens.extend_from_slice(piece);
            }
        }
        let rows_until = Vec::new();
        Ok(Corpus { tokens, pieces, sequence, key, rows_until, current: None })
    }

    /// True if there is nothing to learn from.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The documents of a row.
    pub fn row(&mut self, row: u64) -> Vec<Sequence> {
        assert!(!self.is_empty(), "an empty corpus has no rows");
        while self.rows_until.last().is_none_or(|until| *until <= row) {
            let epoch = self.rows_until.len() as u64;
            let rows = self.epoch(epoch).rows.len() as u64;
            self.rows_until.push(self.rows_until.last().unwrap_or(&0) + rows);
        }
        let epoch = self.rows_until.partition_point(|until| *until <= row);
        let before = if epoch == 0 { 0 } else { self.rows_until[epoch - 1] };
        let (sequence, in_epoch) = (self.sequence, (row - before) as usize);
        let made = self.epoch(epoch as u64);
        let chosen: Vec<u32> = made.order[made.rows[in_epoch].clone()].to_vec();
        let mut filled = 0;
        let mut documents = Vec::with_capacity(chosen.len());
        for piece in chosen {
            let (start, length) = self.pieces[piece as usize];
            let taken = length.min(sequence - filled);
            filled += taken;
            if taken >= LEAST_TOKENS {
                documents.push(Sequence::all_targets(self.tokens[start..start + taken].to_vec()));
            }
        }
        documents
    }

    fn epoch(&mut self, epoch: u64) -> &Epoch {
        if self.current.as_ref().is_none_or(|(known, _)| *known != epoch) {
            let order = self.key.shuffle(epoch, self.pieces.len());
            let mut rows = Vec::new();
            let (mut begin, mut filled) = (0, 0);
            for (place, piece) in order.iter().enumerate() {
                filled += self.pieces[*piece as usize].1;
                if filled >= self.sequence {
                    rows.push(begin..place + 1);
                    (begin, filled) = (place + 1, 0);
                }
            }
            // What fills no row waits for the next shuffle, unless it is all there is.
            if rows.is_empty() {
                rows.push(0..order.len());
            }
            self.current = Some((epoch, Epoch { order, rows }));
        }
        &self.current.as_ref().expect("it was just made").1
    }
}

/// How many rows each set gives to each step.
#[derive(Debug)]
pub struct Mixture {
    corpora: Vec<Corpus>,
    /// `given[step][set]`: rows of the set in all steps before.
    given: Vec<Vec<u64>>,
}

impl Mixture {
    /// A mixture of corpora by shares (of any sum) over steps of `rows[step]` rows.
    pub fn new(corpora: Vec<Corpus>, shares: &[f64], rows: &[usize]) -> Mixture {
        assert_eq!(corpora.len(), shares.len());
        Mixture { corpora, given: apportion(shares, rows) }
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.given.len() as u64 - 1
    }

    /// The share of all rows that the steps before `step` hold.
    pub fn share(&self, step: u64) -> f64 {
        let rows = |step: usize| self.given[step].iter().sum::<u64>() as f64;
        rows(step as usize) / rows(self.given.len() - 1)
    }

    /// The documents of a step.
    pub fn batch(&mut self, step: u64) -> Vec<Sequence> {
        let (before, after) = (&self.given[step as usize], &self.given[step as usize + 1]);
        let mut documents = Vec::new();
        for (set, corpus) in self.corpora.iter_mut().enumerate() {
            for row in before[set]..after[set] {
                documents.extend(corpus.row(row));
            }
        }
        documents
    }
}

/// Rows of each set before each step, and after the last: what a set is owed is rounded down, and
/// the rows that are left go to the largest remainders, the first set first.
fn apportion(shares: &[f64], rows: &[usize]) -> Vec<Vec<u64>> {
    let sum: f64 = shares.iter().sum();
    let mut given = vec![vec![0u64; shares.len()]];
    let mut total = 0.0;
    for rows in rows {
        total += *rows as f64;
        let before = given.last().expect("it starts with one entry").clone();
        // The small constant keeps 0.25 * 8 rows from being owed 1.9999999.
        let owed: Vec<f64> = before
            .iter()
            .zip(shares)
            .map(|(before, share)| share / sum * total - *before as f64 + 1e-9)
            .collect();
        let mut now: Vec<u64> = owed.iter().map(|owed| owed.max(0.0).floor() as u64).collect();
        let mut order: Vec<usize> = (0..shares.len()).collect();
        let remainder = |set: &usize| owed[*set] - owed[*set].max(0.0).floor();
        order.sort_by(|a, b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(b)));
        let mut left = *rows as i64 - now.iter().sum::<u64>() as i64;
        for set in order.iter().cycle().take(order.len() * 2) {
            if left > 0 && shares[*set] > 0.0 {
                now[*set] += 1;
                left -= 1;
            }
        }
        for set in order.iter().rev() {
            if left < 0 && now[*set] > 0 {
                now[*set] -= 1;
                left += 1;
            }
        }
        assert_eq!(left, 0, "rows are neither lost nor made up");
        given.push(before.iter().zip(&now).map(|(before, now)| before + now).collect());
    }
    given
}

/// Rows of each step: `batch`, after a growth from `start` that is linear in the rows already seen, over a share `ramp`
/// of all rows (DeepSeek-V2, section 3.1.2: 2304 to 9216 over the first 225 of 8100 billion tokens).
pub fn rows_by_step(steps: u64, batch: usize, start: usize, ramp: f64) -> Vec<usize> {
    let rows_with = |all: f64| {
        let mut seen = 0;
        let grow = |_| {
            let share = if start == 0 { 1.0 } else { (seen as f64 / (ramp * all)).min(1.0) };
            // Nothing seen over no ramp at all is 0 / 0.
            let share = if share.is_nan() { 1.0 } else { share };
            let grown = start as f64 + (batch as f64 - start as f64) * share;
            let rows = (grown as usize).max(1);
            seen += rows;
            rows
        };
        (0..steps).map(grow).collect::<Vec<usize>>()
    };
    // The more rows there are, the longer the ramp and the fewer rows the steps have: one number agrees with itself.
    let (mut low, mut high) = (0.0, (steps * batch as u64) as f64);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let enough = rows_with(middle).iter().sum::<usize>() as f64 >= middle;
        *(if enough { &mut low } else { &mut high }) = middle;
    }
    rows_with(high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rehearsal_kernels::random::Stream;

    fn key(seed: u64) -> OrderKey {
        OrderKey { seed, stream: Stream::Order, stage: 2, set: 0 }
    }

    fn corpus(lengths: &[usize], sequence: usize, seed: u64) -> Corpus {
        // Token = 1000 * document + place, so that a token tells where it comes from.
        let documents = lengths.iter().enumerate().map(|(document, length)| {
            Ok((0..*length).map(|place| (1000 * document + place) as u32).collect())
        });
        Corpus::new(documents, sequence, key(seed)).unwrap()
    }

    proptest! {
        #[test]
        fn rows_are_full_and_start_at_documents(
            lengths in proptest::collection::vec(2usize..40, 6..30),
            sequence in 4usize..24,
            seed in 0u64..50,
        ) {
            let mut set = corpus(&lengths, sequence, seed);
            for row in 0..40 {
                let documents = set.row(row);
                let tokens: usize = documents.iter().map(|d| d.tokens.len()).sum();
                // One token may be missing: a cut that leaves a single token is dropped.
                let full = tokens <= sequence && tokens + 1 >= sequence;
                prop_assert!(full, "{tokens} of {sequence}");
                for document in &documents {
                    prop_assert_eq!(document.tokens[0] as usize % 1000 % sequence, 0);
                    let follow = document.tokens.windows(2).all(|pair| pair[1] == pair[0] + 1);
                    prop_assert!(follow, "a document is cut only at its end");
                    prop_assert_eq!(document.targets(), document.tokens.len() - 1);
                }
            }
            let mut again = corpus(&lengths, sequence, seed);
            for row in [39, 0, 17] {
                prop_assert_eq!(again.row(row), set.row(row));
            }
        }

        #[test]
        fn shares_are_kept_after_every_step(
            shares in proptest::collection::vec(0.0f64..1.0, 1..5),
            rows in proptest::collection::vec(1usize..9, 1..60),
        ) {
            prop_assume!(shares.iter().sum::<f64>() > 0.1);
            let given = apportion(&shares, &rows);
            let sum: f64 = shares.iter().sum();
            let mut total = 0u64;
            for (step, rows) in rows.iter().enumerate() {
                total += *rows as u64;
                prop_assert_eq!(given[step + 1].iter().sum::<u64>(), total);
                for set in 0..shares.len() {
                    prop_assert!(given[step + 1][set] >= given[step][set]);
                    let target = shares[set] / sum * total as f64;
                    let off = (given[step + 1][set] as f64 - target).abs();
                    prop_assert!(off <= shares.len() as f64 / 2.0 + 0.5, "{off} rows off");
                }
            }
        }
    }

    #[test]
    fn even_shares_are_the_same_in_every_batch() {
        let given = apportion(&[0.25, 0.75], &[8; 100]);
        assert!(given.windows(2).all(|g| g[1][0] - g[0][0] == 2 && g[1][1] - g[0][1] == 6));
        let thin = apportion(&[0.05, 0.95], &[4; 100]);
        assert_eq!(thin[100], [20, 380], "a share of less than a row a step comes in time");
    }

    #[test]
    fn an_epoch_gives_every_document_once() {
        let mut set = corpus(&[8; 20], 8, 3);
        let epoch = |set: &mut Corpus, first: u64| -> Vec<u32> {
            (first..first + 20).map(|row| set.row(row)[0].tokens[0] / 1000).collect()
        };
        let (mut one, mut two) = (epoch(&mut set, 0), epoch(&mut set, 20));
        assert_ne!(one, two);
        one.sort_unstable();
        two.sort_unstable();
        assert_eq!(one, (0..20).collect::<Vec<_>>());
        assert_eq!(two, one);
        assert_ne!(epoch(&mut corpus(&[8; 20], 8, 4), 0), epoch(&mut corpus(&[8; 20], 8, 3), 0));
    }

    #[test]
    fn a_corpus_smaller_than_a_row_is_one_short_row() {
        let mut set = corpus(&[3, 4], 100, 1);
        for row in 0..3 {
            assert_eq!(set.row(row).iter().map(|d| d.tokens.len()).sum::<usize>(), 7);
        }
    }

    #[test]
    fn the_batch_grows_in_a_line_and_then_stays() {
        assert_eq!(rows_by_step(4, 8, 0, 0.5), [8, 8, 8, 8]);
        let rows = rows_by_step(8, 8, 4, 0.5);
        assert_eq!(rows, [4, 4, 5, 6, 7, 8, 8, 8]);
        let mut mixture =
            Mixture::new(vec![corpus(&[4; 9], 4, 1)], &[1.0], &rows_by_step(8, 8, 4, 0.5));
        assert_eq!((mixture.steps(), mixture.batch(0).len(), mixture.batch(7).len()), (8, 4, 8));
        assert_eq!([0, 1, 4, 7].map(|step| mixture.share(step) * 50.0), [0.0, 4.0, 19.0, 42.0]);
    }

    #[test]
    fn the_papers_batch_is_2304_at_first_and_9216_from_225_of_8100_billion_tokens() {
        let rows = rows_by_step(2000, 9216, 2304, 225.0 / 8100.0);
        let all: usize = rows.iter().sum();
        let grown = rows.iter().position(|rows| *rows == 9216).unwrap();
        let seen: usize = rows[..grown].iter().sum();
        assert_eq!(rows[0], 2304);
        assert!((seen as f64 / all as f64 - 225.0 / 8100.0).abs() < 1e-4);
        assert!(rows.windows(2).all(|pair| pair[0] <= pair[1]));
    }
}
