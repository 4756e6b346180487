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
    bucket: usize,
}

/// Ranks that hold the same tensors, and what each answers for, as runs of this rank's layout.
struct SharedRanks {
    group: Group,
    parts: Vec<Vec<Run>>,
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
            shared.extend((parts.len() > 1).then_some(SharedRanks { group, parts }));
        }
        own.sort_by_key(|run| run.tensor);
        Zero { shared, own, bucket: BUCKET }
    }

    /// Sums of all ranks' gradients, where this rank answers for them.
    pub fn reduce(&self, kernels: &dyn Kernels, gradients: &mut Slab) -> Result<(), PassError> {
        self.by_bucket(|shared, round| shared.reduce(kernels, gradients, round, self.bucket))
    }

    /// Gives the other ranks what this one answers for, and takes what they do.
    pub fn gather(&self, kernels: &dyn Kernels, weights: &mut Slab) -> Result<(), PassError> {
        self.by_bucket(|shared, round| shared.gather(kernels, weights, round, self.bucket))
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
        mut round: impl FnMut(&SharedRanks, usize) -> Result<(), PassError>,
    ) -> Result<(), PassError> {
        for shared in &self.shared {
            let size = |runs: &Vec<Run>| runs.iter().map(|run| run.elements.len()).sum::<usize>();
            let longest = shared.parts.iter().map(size).max().unwrap_or(0);
            (0..longest.div_ceil(self.bucket)).try_for_each(|number| round(shared, number))?;
        }
        Ok(())
    }
}

impl SharedRanks {
    fn reduce(
        &self,
        kernels: &dyn Kernels,
        gradients: &mut Slab,
        round: usize,
        bucket: usize,
    ) -> Result<(), PassError> {
        let window = |place: usize| window(&self.parts[place], round, bucket);
        let bytes = |place: usize| bytes_of(kernels, gradients, &window(place));
        let (own, width) = (window(self.group.own()), kernels.float().size());
        let name = "sums of gradients";
        let sent = self.group.send_to_all(name, Operation::ReduceScatter, 0, width, bytes)?;
        let parts = sent.take()?;
        let mut first = 0;
        for Run { tensor, elements } in own {
            let bytes = first * width..(first + elements.len()) * width;
            first += elements.len();
            let mut sum = floats(kernels, 1, elements.len())?;
            let mut other = floats(kernels, 1, elements.len())?;
            for (place, part) in parts.iter().enumerate() {
                let to = if place == 0 { &mut sum } else { &mut other };
                match part {
                    Some(part) => kernels.upload_bytes(&part[bytes.clone()], to),
                    None => kernels.copy(&gradients.run(tensor, elements.clone()), to),
                }
                if place > 0 {
                    kernels.add(&other, &mut sum);
                }
            }
            kernels.copy(&sum, &mut gradients.run_mut(tensor, elements));
        }
        Ok(())
    }

    fn gather(
        &self,
        kernels: &dyn Kernels,
        weights: &mut Slab,
        round: usize,
        bucket: usize,
    ) -> Result<(), PassError> {
        let width = kernels.float().size();
        let own = bytes_of(kernels, weights, &window(&self.parts[self.group.own()], round, bucket));
        let name = "changed weights";
        let bytes = |_| own.clone();
        let sent = self.group.send_to_all(name, Operation::AllGather, 0, width, bytes)?;
        for (place, part) in sent.take()?.into_iter().enumerate() {
            let Some(part) = part else { continue };
            let mut first = 0;
            for Run { tensor, elements } in window(&self.parts[place], round, bucket) {
                let bytes = first * width..(first + elements.len()) * width;
                first += elements.len();
                kernels.upload_bytes(&part[bytes], &mut weights.run_mut(tensor, elements));
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

/// What bucket number `round` has of some runs laid one after another.
fn window(runs: &[Run], round: usize, bucket: usize) -> Vec<Run> {
    let (from, to) = (round * bucket, (round + 1) * bucket);
    let (mut inside, mut first) = (Vec::new(), 0);
    for Run { tensor, elements } in runs {
        let end = first + elements.len();
        let (start, stop) = (from.max(first), to.min(end));
        if start < stop {
            let elements = elements.start + start - first..elements.start + stop - first;
            inside.push(Run { tensor: *tensor, elements });
        }
        first = end;
    }
    inside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_runs_once_and_are_no_longer_than_a_bucket() {
        let runs = [(0, 3..10), (2, 0..1), (5, 4..30)];
        let runs = runs.map(|(tensor, elements)| Run { tensor, elements });
        let all = |runs: &[Run]| -> Vec<(usize, usize)> {
            runs.iter().flat_map(|run| run.elements.clone().map(|i| (run.tensor, i))).collect()
        };
        for bucket in [1, 3, 7, 8, 100] {
            let windows: Vec<Vec<Run>> =
                (0..34usize.div_ceil(bucket)).map(|round| window(&runs, round, bucket)).collect();
            assert!(windows.iter().all(|window| all(window).len() <= bucket));
            assert_eq!(all(&windows.concat()), all(&runs));
        }
    }
}
