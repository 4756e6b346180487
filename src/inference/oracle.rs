//! A stand-in for the model in tests: its "logits" are a hash of every cache entry that a row sees.
//!
//! A cache entry is a hash of its token, its position and all entries before it, as in a real
//! network. So a wrong page, slot, position, length, copy or share changes the tokens that come
//! out. The naive rollout beside it keeps one plain list of entries and knows no pages.

use super::generate::{Forward, Limits};
use super::job::{GenerateJob, GenerateRequest};
use super::score::ForwardRows;
use crate::model::cache::DecodeRows;
use crate::rl::rollout::{Rollout, Stop};
use anyhow::Result;
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{SampleRow, Sampled};
use std::cell::Cell;
use std::rc::Rc;

/// Property tests with an explicit seed that write no files.
pub fn fixed(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(29);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

const VOCABULARY: u64 = 40;

fn mix(state: u64, value: u64) -> u64 {
    let z = (state ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31)
}

fn fold(entries: impl Iterator<Item = u64>) -> u64 {
    entries.fold(17, mix)
}

fn entry(before: u64, token: u32, position: u32) -> u64 {
    mix(mix(before, u64::from(token)), u64::from(position))
}

fn sample(seen: u64, row: &SampleRow) -> Sampled {
    let token = mix(seen, row.uniform.to_bits()) % VOCABULARY;
    Sampled { token: token as u32, logprob: logprob(seen, token as u32) }
}

fn logprob(seen: u64, token: u32) -> f64 {
    -((mix(seen, u64::from(token)) % 4096) as f64) / 512.0
}

/// The stand-in with its cache.
pub struct Machine {
    version: u64,
    page_tokens: usize,
    entries: Vec<Option<u64>>,
    /// Forward passes so far.
    pub passes: Rc<Cell<usize>>,
    /// Rows of all passes so far.
    pub rows: usize,
    /// Most rows of one pass.
    pub widest: usize,
    /// Most sequences of one pass.
    pub batch: usize,
    /// Runs of one sequence's rows in a pass: first position and length.
    pub runs: Vec<(u32, usize)>,
}

impl Machine {
    pub fn new(limits: &Limits) -> Machine {
        let entries = vec![None; limits.page_count * limits.page_tokens];
        Machine {
            version: 7,
            page_tokens: limits.page_tokens,
            entries,
            passes: Rc::default(),
            rows: 0,
            widest: 0,
            batch: 0,
            runs: Vec::new(),
        }
    }

    /// What each row sees after the rows' own entries were written.
    fn run(&mut self, rows: &DecodeRows) -> Vec<u64> {
        self.passes.set(self.passes.get() + 1);
        self.rows += rows.len();
        self.widest = self.widest.max(rows.len());
        self.batch = self.batch.max(rows.sequences());
        let mut first = 0;
        for run in rows.sequence.chunk_by(|a, b| a == b) {
            self.runs.push((rows.positions[first], run.len()));
            first += run.len();
        }
        let mut seen = Vec::new();
        for row in 0..rows.len() {
            let (length, table) =
                (rows.length[row] as usize, rows.table(rows.sequence[row] as usize));
            let slot = |j: usize| {
                table[j / self.page_tokens] as usize * self.page_tokens + j % self.page_tokens
            };
            let read = |j: usize| {
                self.entries[slot(j)].expect("a row sees only entries that were written")
            };
            assert_eq!(
                rows.slots[row] as usize,
                slot(length - 1),
                "a row's entry goes where the row then reads it"
            );
            let before = fold((0..length - 1).map(read));
            let own = entry(before, rows.tokens[row], rows.positions[row]);
            self.entries[slot(length - 1)] = Some(own);
            seen.push(mix(before, own));
        }
        seen
    }
}

impl Forward for Machine {
    fn version(&self) -> u64 {
        self.version
    }

    fn copy_page(&mut self, from: u32, to: u32, tokens: usize) {
        let (from, to) = (from as usize * self.page_tokens, to as usize * self.page_tokens);
        // What is not copied is gone: a real page holds someone's old entries there.
        self.entries[to..to + self.page_tokens].fill(None);
        self.entries.copy_within(from..from + tokens, to);
    }

    fn forward(&mut self, rows: &DecodeRows, sampling: &[SampleRow]) -> Result<Vec<Sampled>> {
        let seen = self.run(rows);
        assert_eq!(rows.wanted.len(), sampling.len());
        Ok(rows
            .wanted
            .iter()
            .zip(sampling)
            .map(|(row, how)| sample(seen[*row as usize], how))
            .collect())
    }
}

impl ForwardRows for Machine {
    fn logprobs(&mut self, rows: &DecodeRows, each: &mut dyn FnMut(usize, &[f64])) -> Result<()> {
        let seen = self.run(rows);
        for (index, row) in rows.wanted.iter().enumerate() {
            let logprob = |token| logprob(seen[*row as usize], token);
            each(index, &(0..VOCABULARY as u32).map(logprob).collect::<Vec<_>>());
        }
        Ok(())
    }
}

/// Entries of a text, one after another.
fn entries(tokens: &[u32]) -> Vec<u64> {
    let mut list: Vec<u64> = Vec::new();
    for (position, token) in tokens.iter().enumerate() {
        let before = fold(list.iter().copied());
        list.push(entry(before, *token, position as u32));
    }
    list
}

/// Log-probabilities from the second token on, each from its plain history.
pub fn naive_logprobs(tokens: &[u32]) -> Vec<f32> {
    let list = entries(tokens);
    (1..tokens.len())
        .map(|end| logprob(fold(list[..end].iter().copied()), tokens[end]) as f32)
        .collect()
}

/// One rollout, sampled token by token from its plain history.
pub fn naive_rollout(
    job: &GenerateJob,
    request: &GenerateRequest,
    index: u32,
    context: usize,
) -> Rollout {
    let mut text = request.tokens.clone();
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    let stop = loop {
        let counters = [job.step, request.prompt, u64::from(index), tokens.len() as u64];
        let uniform = random::uniform(job.seed, Stream::Sample, counters);
        let row =
            SampleRow { temperature: job.temperature, top_p: job.top_p, top_k: job.top_k, uniform };
        let sampled = sample(fold(entries(&text).into_iter()), &row);
        tokens.push(sampled.token);
        logprobs.push(sampled.logprob as f32);
        text.push(sampled.token);
        if job.stop_tokens.contains(&sampled.token) {
            break Stop::Eos;
        }
        if tokens.len() == job.max_new_tokens || text.len() == context {
            break Stop::Length;
        }
    };
    Rollout { sample: index, tokens, logprobs, stop, text: String::new() }
}
