//! Forward passes of one model over whole sequences: log-probabilities, or a reward model's score.
//!
//! Neighbours that begin alike, as replies to one prompt, share those tokens' rows; that changes no bit.

use super::hybrid::HybridEngine;
use super::phase::{Phase, Role, ScoreJob, SequenceScore};
use super::resident::{Calibration, interrupted, out_of_memory};
use super::sampling::each_distribution;
use super::shelf::Stretch;
use crate::cluster::Team;
use crate::cluster::wire::{decode, encode};
use crate::config::fault::Fault;
use crate::model::{
    Documents, Family, PackFor, PackedModel, Params, PassError, Transformer, places,
};
use anyhow::{Result, bail};
use rehearsal_kernels::{Activity, Kernels};
use std::cell::Cell;
use std::ops::Range;
use std::time::Instant;

/// Rows that go through the model at once, if the budget allows; a longer sequence goes alone.
pub const ROWS_AT_ONCE: usize = 4096;

/// Rows whose logits are held at once.
const LOGIT_ROWS: usize = 64;

/// One model, ready for forward passes.
pub(super) struct Scorer<'a> {
    /// The device.
    pub kernels: &'a dyn Kernels,
    /// The model.
    pub model: &'a Transformer,
    /// Its weights.
    pub params: &'a Params,
    /// The same weights, packed for forward passes.
    pub packed: &'a PackedModel,
    /// A reward model's calibration; log-probabilities are wanted of a model without one.
    pub calibration: Option<Calibration>,
    /// Rows that go through at once: as many as fitted last.
    pub rows_at_once: &'a Cell<usize>,
}

impl Scorer<'_> {
    /// Scores every sequence of `job`, in order. Which sequences share a pass changes no bit, so that a pass that
    /// does not fit into the budget is begun again with half the rows.
    ///
    /// Of a team each rank scores a part of them and returns that; ranks of a tensor group score the same part, and the first
    /// of them returns it.
    pub fn score(&self, job: &ScoreJob, team: &Team) -> Result<Vec<SequenceScore>> {
        check(self.model, job)?;
        let job = &share(job, team.sequence_groups(), team.sequence_group());
        let mut scores = Vec::with_capacity(job.sequences.len());
        let mut first = 0;
        while self.model.go_on(first < job.sequences.len()).map_err(interrupted)? {
            if first == job.sequences.len() {
                self.model.stand_by(self.kernels, self.packed).map_err(interrupted)?;
                continue;
            }
            let end = first + fitting(job, first, self.rows_at_once.get());
            // Ranks that work together would have to begin again together.
            let can_part = end > first + 1 && self.model.is_alone();
            // What can go through in parts makes nothing leave the device.
            let modest = self.kernels.arena().modest(can_part);
            let pass = self.pass(job, first..end);
            drop(modest);
            match pass {
                Err(PassError::Memory(_)) if can_part => {
                    let rows = rows(job, first).take(end - first).sum::<usize>();
                    self.rows_at_once.set(rows / 2);
                }
                outcome => {
                    scores.extend(outcome.map_err(interrupted)?);
                    first = end;
                }
            }
        }
        scores.truncate(if team.hands_out() { scores.len() } else { 0 });
        Ok(scores)
    }

    /// Calls `each(sequence, position, log-probabilities of all tokens that may follow)` for every token but the last.
    pub fn each_distribution(
        &self,
        sequences: &[Vec<u32>],
        each: &mut dyn FnMut(usize, usize, &[f64]),
    ) -> Result<()> {
        let first = vec![1; sequences.len()];
        let role = super::phase::Role::Policy;
        let job = ScoreJob { role, sequences: sequences.to_vec(), temperature: 1.0, first };
        check(self.model, &job)?;
        for (index, sequence) in sequences.iter().enumerate() {
            let documents = Documents::pack(self.kernels, &[sequence]).map_err(out_of_memory)?;
            let pass = self.model.pass(self.kernels, &documents, self.packed);
            let hidden = self.model.forward_only(&pass, self.params, self.packed);
            let hidden = hidden.map_err(interrupted)?;
            let rows: Vec<u32> = (0..sequence.len() as u32 - 1).collect();
            for (tile, rows) in rows.chunks(LOGIT_ROWS).enumerate() {
                let heads = self.packed.heads();
                let logits = heads.logits(self.kernels, self.params, &hidden, rows);
                let logits = logits.map_err(interrupted)?;
                each_distribution(self.kernels, &logits, &mut |row, logprobs| {
                    each(index, tile * LOGIT_ROWS + row, logprobs);
                });
            }
        }
        Ok(())
    }

    /// One forward pass over some of the sequences.
    fn pass(&self, job: &ScoreJob, range: Range<usize>) -> Result<Vec<SequenceScore>, PassError> {
        let shared = Shared::new(job, range.clone());
        let packed_documents = Documents::pack_families(self.kernels, &shared.families)?;
        let pass = self.model.pass(self.kernels, &packed_documents, self.packed);
        let hidden = self.model.forward_only(&pass, self.params, self.packed)?;
        let heads = self.packed.heads();
        if let Some(Calibration { mean, deviation }) = self.calibration {
            let output = heads.scores(&pass, self.params, &hidden, &shared.last_rows())?;
            let calibrated = |raw: &f64| SequenceScore::Reward((raw - mean) / deviation);
            return Ok(output.scores.iter().map(calibrated).collect());
        }
        let (rows, targets) = shared.wanted();
        let logprobs = if rows.is_empty() {
            Vec::new()
        } else {
            heads.score(&pass, self.params, &hidden, &rows, &targets, job.temperature)?
        };
        let mut next = logprobs.iter().map(|logprob| *logprob as f32);
        let logprobs =
            |own: &[u32]| SequenceScore::Logprobs(next.by_ref().take(own.len()).collect());
        Ok(shared.own().map(logprobs).collect())
    }
}

impl HybridEngine {
    /// Runs one model over whole sequences.
    pub fn score(&mut self, job: &ScoreJob) -> Result<Vec<SequenceScore>> {
        let _during = Activity::Score.begin(&self.kernels);
        let team = self.setup.team.clone();
        let scorer = self.scorer(&job.role)?;
        let began = Instant::now();
        let scores = scorer.score(job, &team);
        let scores = scores.and_then(|scores| self.gathered(scores));
        if job.role == Role::Reference {
            self.chores.reference_seconds += began.elapsed().as_secs_f64();
        }
        scores
    }

    /// All ranks' scores in order, at rank 0; nothing elsewhere.
    fn gathered(&self, scores: Vec<SequenceScore>) -> Result<Vec<SequenceScore>> {
        if self.setup.team.is_alone() {
            return Ok(scores);
        }
        let all = self.world.gather("scores", 0, encode(&scores))?;
        let parts: Result<Vec<Vec<SequenceScore>>, _> =
            all.iter().map(|bytes| decode(bytes)).collect();
        Ok(parts?.concat())
    }

    /// A model of the Score phase, packed.
    pub(super) fn scorer(&mut self, role: &Role) -> Result<Scorer<'_>> {
        self.expect_phase(Phase::Score, "score")?;
        let (form, format) = (self.form, self.formats.weights);
        if self.working.scored.as_ref().is_none_or(|(scored, ..)| scored != role) {
            self.kernels.enter(Activity::Switch);
            self.unload_scored()?;
            self.conductor.begin(Stretch::Score(role.clone()))?;
            let pack = PackFor { format, ..PackFor::documents(form, false) };
            let switched = if *role == Role::Policy { self.switched()? } else { None };
            let kernels = self.kernels.as_ref();
            let resident = match role {
                Role::Policy => self.policy.as_mut(),
                role => self.others.get_mut(role),
            };
            let Some(resident) = resident else {
                bail!("the engine holds no model {}", role.name())
            };
            let params = match switched {
                Some(params) => params,
                None => resident.take(kernels)?.0,
            };
            let began = Instant::now();
            let switch = self.switch.as_ref().filter(|_| *role == Role::Policy);
            let model = switch.map_or(&resident.model, |switch| &switch.model);
            let packed = model.pack(kernels, &params, &role.name(), self.policy_version, pack);
            self.chores.packed_since(began);
            self.working.scored = Some((role.clone(), params, packed.map_err(out_of_memory)?));
            kernels.enter(Activity::Score);
        }
        let (role, params, packed) = self.working.scored.as_ref().expect("just loaded");
        let resident =
            if *role == Role::Policy { self.policy.as_ref() } else { self.others.get(role) };
        let resident = resident.expect("it was just loaded");
        let has_scalar_head = resident.model.layout.has_value_head;
        let calibration = has_scalar_head.then_some(resident.calibration);
        let switch = self.switch.as_ref().filter(|_| *role == Role::Policy);
        let model = switch.map_or(&resident.model, |switch| &switch.model);
        let kernels = self.kernels.as_ref();
        let rows_at_once = &self.rows_at_once;
        Ok(Scorer { kernels, model, params, packed, calibration, rows_at_once })
    }
}

/// The sequences that one of several ranks, or groups of such, scores.
fn share(job: &ScoreJob, ranks: usize, rank: usize) -> ScoreJob {
    let lengths: Vec<usize> = job.sequences.iter().map(Vec::len).collect();
    let own = share_of(&lengths, ranks, rank);
    ScoreJob {
        sequences: job.sequences[own.clone()].to_vec(),
        first: job.first[own].to_vec(),
        ..job.clone()
    }
}

/// Which of sequences of such lengths a rank scores: neighbours, which may begin alike, about as many tokens for each rank.
/// No rank has none where another has two, and of fewer sequences than ranks the first ranks have one each.
fn share_of(lengths: &[usize], ranks: usize, rank: usize) -> Range<usize> {
    let (count, tokens) = (lengths.len(), lengths.iter().sum::<usize>());
    let mut share = 0..0;
    for rank in 0..=rank {
        let (first, others) = (share.end, ranks - rank - 1);
        let (mut end, mut sum) = (first, lengths[..first].iter().sum::<usize>());
        // A sequence is of the rank in whose part of the tokens its middle lies.
        while end < count && (2 * sum + lengths[end]) * ranks < 2 * tokens * (rank + 1) {
            sum += lengths[end];
            end += 1;
        }
        let least = (first + 1).min(count);
        share = first..end.clamp(least, count.saturating_sub(others).max(least));
    }
    share
}

/// Sequences of a pass by what neighbours share: all before their first wanted token.
struct Shared<'a> {
    families: Vec<Family<'a>>,
}

impl<'a> Shared<'a> {
    fn new(job: &'a ScoreJob, range: Range<usize>) -> Shared<'a> {
        let mut families: Vec<Family<'a>> = Vec::new();
        for index in range {
            let (stem, branch) = split(job, index);
            match families.last_mut().filter(|family| family.stem == stem) {
                Some(family) => family.branches.push(branch),
                None => families.push(Family { stem, branches: vec![branch] }),
            }
        }
        Shared { families }
    }

    /// The last row of each sequence.
    fn last_rows(&self) -> Vec<u32> {
        places(&self.families).iter().zip(self.own()).map(|(p, own)| p.before(own.len())).collect()
    }

    /// Hidden rows and the tokens that follow them, for every wanted token.
    fn wanted(&self) -> (Vec<u32>, Vec<u32>) {
        let places = places(&self.families);
        let rows = places
            .iter()
            .zip(self.own())
            .flat_map(|(place, own)| (0..own.len()).map(|index| place.before(index)));
        (rows.collect(), self.own().flatten().copied().collect())
    }

    /// The tokens of each sequence from the first wanted one on.
    fn own(&self) -> impl Iterator<Item = &'a [u32]> {
        self.families.iter().flat_map(|family| family.branches.iter().copied())
    }
}

/// A sequence before its first wanted token, and the rest.
fn split(job: &ScoreJob, index: usize) -> (&[u32], &[u32]) {
    let sequence = &job.sequences[index];
    sequence.split_at(job.first[index].min(sequence.len()))
}

/// Rows that each sequence from number `first` on adds to a pass that begins with it.
fn rows(job: &ScoreJob, first: usize) -> impl Iterator<Item = usize> {
    (first..job.sequences.len()).map(move |index| {
        let (stem, branch) = split(job, index);
        let is_shared = index > first && split(job, index - 1).0 == stem;
        branch.len() + if is_shared { 0 } else { stem.len() }
    })
}

/// How many sequences from number `first` on have at most `most` rows together; at least one.
fn fitting(job: &ScoreJob, first: usize, most: usize) -> usize {
    let mut held = 0;
    let fits = |rows: &usize| {
        held += rows;
        held <= most
    };
    rows(job, first).take_while(fits).count().max(1)
}

fn check(model: &Transformer, job: &ScoreJob) -> Result<()> {
    let (context, vocabulary) = (model.config.max_position_embeddings, model.config.vocab_size);
    for (index, sequence) in job.sequences.iter().enumerate() {
        if sequence.is_empty() {
            bail!(Fault::User(format!("sequence {index} has no token to score")));
        }
        if sequence.len() > context {
            let tokens = sequence.len();
            bail!(Fault::User(format!(
                "sequence {index} has {tokens} tokens, the model's context is {context}; shorten it"
            )));
        }
        if let Some(token) = sequence.iter().find(|t| **t as usize >= vocabulary) {
            bail!(Fault::User(format!(
                "sequence {index} holds token id {token}, the vocabulary ends at {}",
                vocabulary - 1
            )));
        }
    }
    assert!(job.first.len() == job.sequences.len() && job.first.iter().all(|f| *f >= 1));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
        #[test]
        fn all_ranks_have_some_of_few_sequences_and_about_as_much_of_many(
            lengths in prop::collection::vec(1usize..50, 0..30), ranks in 1usize..9,
        ) {
            let shares: Vec<Range<usize>> =
                (0..ranks).map(|rank| share_of(&lengths, ranks, rank)).collect();
            let mut end = 0;
            for share in &shares {
                prop_assert_eq!(share.start, end, "in order, each once");
                end = share.end;
            }
            prop_assert_eq!(end, lengths.len());
            let busy = shares.iter().take_while(|share| !share.is_empty()).count();
            prop_assert_eq!(busy, ranks.min(lengths.len()), "the first ranks are busy: {:?}", shares);
            let tokens = |share: &Range<usize>| lengths[share.clone()].iter().sum::<usize>();
            let longest = lengths.iter().copied().max().unwrap_or(0);
            let even = lengths.iter().sum::<usize>() / ranks;
            prop_assert!(shares.iter().all(|share| tokens(share) <= even + 2 * longest), "{:?}", shares);
        }
    }
}
