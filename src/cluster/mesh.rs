//! Mesh: the ranks of a training layout, and the groups in which they work together (deepseek_v2.md 3).
//!
//! N = D x P ranks: P pipeline stages of D data ranks. E neighbouring data ranks of a stage are an expert group: each
//! holds 1/E of the stage's experts, and tokens travel between them. D/E groups hold the same experts.
//!
//! Invariants:
//!   * rank = stage * D + data, and `place` is its inverse
//!   * the groups of one kind tile the ranks; a rank's own group holds it

use crate::config::nearest::joined;
use std::ops::Range;

/// Sizes of a training layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    data: usize,
    pipeline: usize,
    expert: usize,
}

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Pipeline stage, 0 holds the embedding.
    pub stage: usize,
    /// Number within the stage.
    pub data: usize,
    /// Number within the expert group.
    pub expert: usize,
}

/// What a mesh is to carry, as far as it limits the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Layers of the model.
    pub layers: usize,
    /// Routed experts of a layer; 0 for a dense model.
    pub experts: usize,
}

/// Sizes that do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// A size of 0.
    #[error("cluster.{key} = 0 leaves nobody to work; use 1 or more")]
    Zero {
        /// Last part of the key.
        key: &'static str,
    },
    /// The processes that were started are not as many as the layout has ranks.
    #[error(
        "cluster.data = {data} times cluster.pipeline = {pipeline} is {wanted}, and {ranks} processes were started; start \
         {wanted} (-n {wanted}), or set cluster.data = {data_that_fits}"
    )]
    Ranks {
        /// D.
        data: usize,
        /// P.
        pipeline: usize,
        /// D x P.
        wanted: usize,
        /// Processes there are.
        ranks: usize,
        /// D with which the same P would use them all, or a P of 1.
        data_that_fits: String,
    },
    /// E does not divide something.
    #[error("cluster.expert = {expert} does not divide {of} = {number}; use {divisors}")]
    Expert {
        /// E.
        expert: usize,
        /// Key of what it should divide.
        of: &'static str,
        /// Its value.
        number: usize,
        /// Values that divide all that E has to.
        divisors: String,
    },
    /// A size of the layout of sampling does not divide something.
    #[error("cluster.rollout.{key} = {size} does not divide {of} = {number}; use {divisors}")]
    Rollout {
        /// Last part of the key.
        key: &'static str,
        /// Its value.
        size: usize,
        /// What it should divide.
        of: &'static str,
        /// How many of that there are.
        number: usize,
        /// Values that divide all that it has to.
        divisors: String,
    },
    /// Tensor groups and expert groups cross each other.
    #[error(
        "cluster.rollout.tensor = {tensor} and cluster.rollout.expert = {expert}: one has to divide the other; use \
         tensor = 1, or the same for both"
    )]
    TensorAndExpert {
        /// T.
        tensor: usize,
        /// E'.
        expert: usize,
    },
    /// More stages than layers.
    #[error(
        "cluster.pipeline = {pipeline} leaves stages without a layer: the model has {layers}; use {layers} or less"
    )]
    Stages {
        /// P.
        pipeline: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// Two pieces for each stage are more than there are layers.
    #[error(
        "cluster.schedule = \"zb-v\" gives each of cluster.pipeline = {pipeline} stages two pieces of the stack, and the model \
         has {layers} layers; use cluster.pipeline = {} or less, or another schedule", layers / 2
    )]
    Pieces {
        /// P.
        pipeline: usize,
        /// Layers of the model.
        layers: usize,
    },
}

impl MeshError {
    /// Last part of the key that is at fault.
    pub fn key(&self) -> &'static str {
        match self {
            MeshError::Zero { key } => key,
            MeshError::Ranks { .. } => "data",
            MeshError::Expert { .. } => "expert",
            MeshError::Stages { .. } => "pipeline",
            MeshError::Pieces { .. } => "schedule",
            MeshError::Rollout { key, .. } => key,
            MeshError::TensorAndExpert { .. } => "tensor",
        }
    }

    /// Path of the key that is at fault, below `cluster`.
    pub fn path(&self) -> Vec<&'static str> {
        match self {
            MeshError::Rollout { .. } | MeshError::TensorAndExpert { .. } => {
                vec!["rollout", self.key()]
            }
            _ => vec![self.key()],
        }
    }
}

impl Mesh {
    /// The mesh of one rank.
    pub const ONE: Mesh = Mesh { data: 1, pipeline: 1, expert: 1 };

    /// `data` x `pipeline` ranks with experts over `expert` of them, for as many processes and for a model.
    pub fn new(
        [data, pipeline, expert]: [usize; 3],
        ranks: usize,
        load: Load,
    ) -> Result<Mesh, MeshError> {
        for (key, size) in [("data", data), ("pipeline", pipeline), ("expert", expert)] {
            if size == 0 {
                return Err(MeshError::Zero { key });
            }
        }
        if data * pipeline != ranks {
            let data_that_fits = match ranks.is_multiple_of(pipeline) {
                true => (ranks / pipeline).to_string(),
                false => format!("{ranks} and cluster.pipeline = 1"),
            };
            let wanted = data * pipeline;
            return Err(MeshError::Ranks { data, pipeline, wanted, ranks, data_that_fits });
        }
        let experts = if load.experts == 0 { 1 } else { load.experts };
        for (of, number) in [("cluster.data", data), ("n_routed_experts", experts)] {
            if !number.is_multiple_of(expert) {
                let both = (1..=data).filter(|e| data % e == 0 && experts % e == 0);
                let both: Vec<String> = both.map(|e| e.to_string()).collect();
                let divisors = joined(&both, "or");
                return Err(MeshError::Expert { expert, of, number, divisors });
            }
        }
        if pipeline > load.layers {
            return Err(MeshError::Stages { pipeline, layers: load.layers });
        }
        Ok(Mesh { data, pipeline, expert })
    }

    /// Data ranks of a stage, D.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Pipeline stages, P.
    pub fn pipeline(&self) -> usize {
        self.pipeline
    }

    /// Ranks of an expert group, E.
    pub fn expert(&self) -> usize {
        self.expert
    }

    /// All ranks, N.
    pub fn ranks(&self) -> usize {
        self.data * self.pipeline
    }

    /// Where a rank stands.
    pub fn place(&self, rank: usize) -> Place {
        assert!(rank < self.ranks(), "rank {rank} of {}", self.ranks());
        let (stage, data) = (rank / self.data, rank % self.data);
        Place { stage, data, expert: data % self.expert }
    }

    /// The ranks of a rank's stage: they hold the same weights but for experts, whose gradients are summed over them.
    pub fn data_group(&self, rank: usize) -> Vec<usize> {
        let first = self.place(rank).stage * self.data;
        (first..first + self.data).collect()
    }

    /// The ranks that hold a stage's experts once between them, and send each other tokens.
    pub fn expert_group(&self, rank: usize) -> Vec<usize> {
        let first = rank - self.place(rank).expert;
        (first..first + self.expert).collect()
    }

    /// The ranks that hold the same experts as a rank.
    pub fn expert_replicas(&self, rank: usize) -> Vec<usize> {
        let Place { stage, expert, .. } = self.place(rank);
        let first = stage * self.data + expert;
        (first..(stage + 1) * self.data).step_by(self.expert).collect()
    }

    /// The ranks that a micro-batch goes through, first stage first.
    pub fn pipeline_group(&self, rank: usize) -> Vec<usize> {
        (rank % self.data..self.ranks()).step_by(self.data).collect()
    }
}

/// Cuts `count` things into `parts` neighbouring ranges, the first ones one longer where it does not divide.
pub fn cut(count: usize, parts: usize, part: usize) -> Range<usize> {
    let (least, more) = (count / parts, count % parts);
    let first = part * least + part.min(more);
    first..first + least + usize::from(part < more)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: Load = Load { layers: 60, experts: 160 };

    fn refusal(sizes: [usize; 3], ranks: usize, load: Load) -> String {
        Mesh::new(sizes, ranks, load).unwrap_err().to_string()
    }

    #[test]
    fn groups_of_a_kind_tile_the_ranks_and_each_rank_is_in_its_own() {
        for sizes in [[1, 1, 1], [2, 1, 2], [4, 3, 2], [8, 2, 4], [8, 2, 8], [6, 4, 3], [8, 16, 8]]
        {
            let [data, pipeline, expert] = sizes;
            let mesh = Mesh::new(sizes, data * pipeline, Load { layers: 60, experts: 24 }).unwrap();
            type Group = fn(&Mesh, usize) -> Vec<usize>;
            let groups: [(Group, usize); 4] = [
                (Mesh::data_group, data),
                (Mesh::expert_group, expert),
                (Mesh::expert_replicas, data / expert),
                (Mesh::pipeline_group, pipeline),
            ];
            for (group, size) in groups {
                let group = |rank| group(&mesh, rank);
                let mut seen = vec![0; mesh.ranks()];
                for rank in 0..mesh.ranks() {
                    let group_of = group(rank);
                    assert!(group_of.contains(&rank) && group_of.len() == size, "{sizes:?} {rank}");
                    assert!(group_of.iter().all(|other| group(*other) == group_of), "{sizes:?}");
                    group_of.iter().for_each(|other| seen[*other] += 1);
                }
                assert!(seen.iter().all(|count| *count == size), "{sizes:?}: {seen:?}");
            }
        }
    }

    #[test]
    fn a_place_says_stage_data_and_expert() {
        let mesh = Mesh::new([8, 16, 4], 128, V2).unwrap();
        assert_eq!(mesh.place(0), Place { stage: 0, data: 0, expert: 0 });
        assert_eq!(mesh.place(8 * 5 + 6), Place { stage: 5, data: 6, expert: 2 });
        assert_eq!(mesh.expert_group(46), [44, 45, 46, 47]);
        assert_eq!(mesh.expert_replicas(46), [42, 46]);
        assert_eq!(mesh.pipeline_group(3)[..3], [3, 11, 19]);
    }

    #[test]
    fn sizes_that_do_not_go_together_are_refused_with_those_that_do() {
        assert_eq!(
            refusal([6, 1, 4], 6, V2),
            "cluster.expert = 4 does not divide cluster.data = 6; use 1 or 2"
        );
        assert_eq!(
            refusal([3, 2, 3], 6, V2),
            "cluster.expert = 3 does not divide n_routed_experts = 160; use 1"
        );
        assert!(refusal([4, 1, 2], 4, Load { layers: 3, experts: 0 }).contains("use 1"));
        let text = refusal([2, 2, 1], 6, V2);
        assert!(
            text.contains("is 4, and 6 processes") && text.ends_with("cluster.data = 3"),
            "{text}"
        );
        let text = refusal([2, 4, 1], 6, V2);
        assert!(text.ends_with("cluster.data = 6 and cluster.pipeline = 1"), "{text}");
        let text = refusal([1, 4, 1], 4, Load { layers: 3, experts: 8 });
        assert!(text.contains("the model has 3; use 3 or less"), "{text}");
        assert!(refusal([1, 0, 1], 0, V2).starts_with("cluster.pipeline = 0 leaves"));
    }

    #[test]
    fn a_cut_tiles_and_differs_by_one_at_most() {
        for (count, parts) in [(60, 16), (7, 3), (3, 3), (2, 5), (0, 2)] {
            let ranges: Vec<Range<usize>> =
                (0..parts).map(|part| cut(count, parts, part)).collect();
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
            assert_eq!((ranges[0].start, ranges[parts - 1].end), (0, count));
            assert!(ranges.iter().all(|range| range.len().abs_diff(count / parts) <= 1));
        }
    }
}
