//! ZeRO-1: every rank that holds a tensor answers for some of its elements (deepseek_v2.md 3).
//!
//! Gradients are summed where their elements are answered for, moments live there, and the changed weights go from there
//! to all that hold the tensor. So a rank keeps 1/R of the moments of what it shares with R - 1 others, and each element is
//! updated once, as on one rank.
//!
//! Invariants:
//!   * sums are added in order of the ranks
//!   * no message is longer than a bucket for each rank

use crate::cluster::layout::{Run, Shared};
use crate::cluster::link::Operation;
use crate::cluster::{Group, Team};
use crate::config::ModelConfig;
use crate::model::pass::floats;
use crate::model::{Layout, PassError, placement};
use rehearsal_kernels::{Kernels, Slab};

/// Elements that go to a rank at once at most: few enough that what is copied, sent and added stays in the cache, and that its
/// memory is taken from the heap again.
pub const BUCKET: usize = 1 << 18;

/// Whom a rank shares its tensors with.
pub struct Zero {
    shared: Vec<SharedRanks>,
    /// What this rank answers for, in order of the tensors of its layout.
    pub own: Vec<Run>,
}

/// Ranks that hold the same tensors, and of each bucket what each answers for, as runs of this rank's layout.
struct SharedRanks {
    group: Group,
    buckets: Vec<Vec<Vec<Run>>>,
}

impl Zero {
    /// For a rank that holds `part` of a model.
    pub fn new(team: &Team, config: &ModelConfig, part: &Layout) -> Zero {
        let tensors = placement::of_model(config, part.has_value_head);
        let layout = team.layout(config.num_hidden_layers);
        let mut index_of = vec![0; tensors.len()];
        part.specs.iter().enumerate().for_each(|(index, spec)| index_of[spec.number] = index);
        let here = |run: Run| Run { tensor: index_of[run.tensor], elements: run.elements };
        let (mut shared, mut own) = (Vec::new(), Vec::new());
        for Shared { ranks, parts } in layout.sharing(team.rank(), &tensors) {
            let group = team.group(ranks);
            let parts: Vec<Vec<Run>> =
                parts.into_iter().map(|runs| runs.into_iter().map(here).collect()).collect();
            own.extend(parts[group.own()].iter().cloned());
            if parts.len() > 1 {
                shared.push(SharedRanks { group, buckets: buckets(&parts, BUCKET) });
            }
        }
        own.sort_by_key(|run| run.tensor);
        Zero { shared, own }
    }

    /// Sums of all ranks' gradients, where this rank answers for them.
    pub fn reduce(&self, kernels: &dyn Kernels, gradients: &mut Slab) -> Result<(), PassError> {
        self.by_bucket(|shared, bucket| shared.reduce(kernels, gradients, bucket))
    }

    /// Gives the other ranks what this one answers for, and takes what they do.
    pub fn gather(&self, kernels: &dyn Kernels, weights: &mut Slab) -> Result<(), PassError> {
        self.by_bucket(|shared, bucket| shared.gather(kernels, weights, bucket))
    }

    /// Sum of the squares of the gradients that this rank answers for.
    pub fn squares(&self, kernels: &dyn Kernels, gradients: &Slab) -> f64 {
        // Without others it is one sum over everything.
        if self.shared.is_empty() && self.own.len() == gradients.count() {
            return kernels.squared_sum(&gradients.whole());
        }
        let run = |run: &Run| kernels.squared_sum(&gradients.run(run.tensor, run.elements.clone()));
        self.own.iter().map(run).sum()
    }

    fn by_bucket(
        &self,
        mut exchange: impl FnMut(&SharedRanks, &[Vec<Run>]) -> Result<(), PassError>,
    ) -> Result<(), PassError> {
        let mut buckets = self.shared.iter().flat_map(|s| s.buckets.iter().map(move |b| (s, b)));
        buckets.try_for_each(|(shared, bucket)| exchange(shared, bucket))
    }
}

impl SharedRanks {
    fn reduce(
        &self,
        kernels: &dyn Kernels,
        gradients: &mut Slab,
        bucket: &[Vec<Run>],
    ) -> Result<(), PassError> {
        let bytes = |place: usize| bytes_of(kernels, gradients, &bucket[place]);
        let (name, width) = ("sums of gradients", kernels.float().size());
        let sent = self.group.send_to_all(name, Operation::ReduceScatter, 0, width, bytes)?;
        let parts = sent.take()?;
        let mut first = 0;
        for Run { tensor, elements } in &bucket[self.group.own()] {
            let bytes = first * width..(first + elements.len()) * width;
            first += elements.len();
            let mut sum = floats(kernels, 1, elements.len())?;
            let mut other = floats(kernels, 1, elements.len())?;
            for (place, part) in parts.iter().enumerate() {
                let to = if place == 0 { &mut sum } else { &mut other };
                match part {
                    Some(part) => kernels.upload_bytes(&part[bytes.clone()], to),
                    None => kernels.copy(&gradients.run(*tensor, elements.clone()), to),
                }
                if place > 0 {
                    kernels.add(&other, &mut sum);
                }
            }
            kernels.copy(&sum, &mut gradients.run_mut(*tensor, elements.clone()));
        }
        Ok(())
    }

    fn gather(
        &self,
        kernels: &dyn Kernels,
        weights: &mut Slab,
        bucket: &[Vec<Run>],
    ) -> Result<(), PassError> {
        let own = bytes_of(kernels, weights, &bucket[self.group.own()]);
        let (name, width) = ("changed weights", kernels.float().size());
        let sent = self.group.send_to_all(name, Operation::AllGather, 0, width, |_| own.clone())?;
        for (part, runs) in sent.take()?.into_iter().zip(bucket) {
            let Some(part) = part else { continue };
            let mut first = 0;
            for Run { tensor, elements } in runs {
                let bytes = first * width..(first + elements.len()) * width;
                first += elements.len();
                kernels.upload_bytes(&part[bytes], &mut weights.run_mut(*tensor, elements.clone()));
            }
        }
        Ok(())
    }
}

fn bytes_of(kernels: &dyn Kernels, slab: &Slab, runs: &[Run]) -> Vec<u8> {
    let elements: usize = runs.iter().map(|run| run.elements.len()).sum();
    let mut bytes = Vec::with_capacity(elements * kernels.float().size());
    for Run { tensor, elements } in runs {
        kernels.append_bytes(&slab.run(*tensor, elements.clone()), &mut bytes);
    }
    bytes
}

/// Of each bucket, what each rank answers for: runs laid one after another, cut at every `bucket` elements.
fn buckets(parts: &[Vec<Run>], bucket: usize) -> Vec<Vec<Vec<Run>>> {
    let size = |runs: &Vec<Run>| runs.iter().map(|run| run.elements.len()).sum::<usize>();
    let longest = parts.iter().map(size).max().unwrap_or(0);
    let mut buckets = vec![vec![Vec::new(); parts.len()]; longest.div_ceil(bucket)];
    for (place, runs) in parts.iter().enumerate() {
        let mut at = 0;
        for Run { tensor, elements } in runs {
            let mut first = elements.start;
            while first < elements.end {
                let end = elements.end.min(first + bucket - at % bucket);
                buckets[at / bucket][place].push(Run { tensor: *tensor, elements: first..end });
                at += end - first;
                first = end;
            }
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    #[test]
    fn buckets_cover_each_rank_s_runs_once_in_their_order_and_none_is_too_long() {
        let runs = |runs: &[(usize, Range<usize>)]| -> Vec<Run> {
            let run = |(tensor, elements): &(usize, Range<usize>)| Run {
                tensor: *tensor,
                elements: elements.clone(),
            };
            runs.iter().map(run).collect()
        };
        let parts = [runs(&[(0, 3..10), (2, 0..1), (5, 4..30)]), runs(&[(5, 30..50)]), Vec::new()];
        let all = |runs: &[Run]| -> Vec<(usize, usize)> {
            runs.iter().flat_map(|run| run.elements.clone().map(|i| (run.tensor, i))).collect()
        };
        for bucket in [1, 3, 7, 8, 100] {
            let buckets = buckets(&parts, bucket);
            assert_eq!(buckets.len(), 34usize.div_ceil(bucket));
            for (place, part) in parts.iter().enumerate() {
                let of_place: Vec<&Vec<Run>> = buckets.iter().map(|runs| &runs[place]).collect();
                let lengths: Vec<usize> = of_place.iter().map(|runs| all(runs).len()).collect();
                let last = lengths.iter().rposition(|length| *length > 0).unwrap_or(0);
                assert!(lengths[..last].iter().all(|length| *length == bucket));
                assert!(lengths.iter().all(|length| *length <= bucket));
                assert_eq!(
                    all(&of_place.into_iter().flatten().cloned().collect::<Vec<_>>()),
                    all(part)
                );
            }
        }
    }
}
