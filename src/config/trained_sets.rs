//! The sets that a run trains on, by what they teach.

use super::stage::{MixtureEntry, StageKind};
use super::{DataConfig, RunConfig};
use std::collections::BTreeSet;

/// The sets that any stage trains on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrainedSets {
    /// By pretraining and long-context stages.
    pub pretrained: Vec<String>,
    /// By SFT.
    pub tuned: Vec<String>,
    /// By reward models (their calibration included) and GRPO.
    pub aligned: Vec<String>,
}

impl RunConfig {
    /// The sets that its stages train on.
    pub fn trained_sets(&self) -> TrainedSets {
        let mut sets = TrainedSets::default();
        let mixture =
            |data: &[MixtureEntry]| data.iter().map(|entry| entry.set.clone()).collect::<Vec<_>>();
        for stage in &self.stages {
            match &stage.kind {
                StageKind::Pretrain(s) => sets.pretrained.extend(mixture(&s.data)),
                StageKind::LongContext(s) => sets.pretrained.extend(mixture(&s.data)),
                StageKind::Sft(s) => sets.tuned.push(s.data.clone()),
                StageKind::RewardModel(s) => {
                    sets.aligned.push(s.data.clone());
                    sets.aligned.extend(s.calibration.clone());
                }
                StageKind::Grpo(s) => sets.aligned.push(s.data.clone()),
            }
        }
        sets
    }
}

impl TrainedSets {
    /// All of them, each once.
    pub fn all(&self) -> Vec<String> {
        let sets: BTreeSet<_> =
            [&self.pretrained, &self.tuned, &self.aligned].into_iter().flatten().cloned().collect();
        sets.into_iter().collect()
    }

    /// Those whose files are there before the run.
    pub fn given(mut self, data: &DataConfig) -> TrainedSets {
        for sets in [&mut self.pretrained, &mut self.tuned, &mut self.aligned] {
            sets.retain(|name| data.is_given(name));
        }
        self
    }
}

impl DataConfig {
    /// True for a set whose file is there before the run, false for one that the run generates.
    pub fn is_given(&self, name: &str) -> bool {
        self.sets.get(name).is_some_and(|set| !set.file.starts_with("run:"))
    }
}
