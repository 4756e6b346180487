//! `[cluster]`: how a run is spread over processes (deepseek_v2.md 3 and 4.5).
//!
//! Processes are started by mpirun or srun; these keys say what each of them holds. They change no result but for the
//! order in which numbers are added, and are no part of a run's identity: a run may go on in another layout.

use super::hardware::HardwareConfig;
use serde::{Deserialize, Serialize};

/// `[cluster]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Data ranks of each pipeline stage, D. A run has D x P processes.
    pub data: usize,
    /// Pipeline stages, P.
    pub pipeline: usize,
    /// Neighbouring data ranks that share a layer's routed experts, E; divides D.
    pub expert: usize,
    /// Ranks beside those D x P that only sample, in the layout of `rollout`, and take each version of the policy from them;
    /// 0 if all ranks sample. With `max_staleness` in a stage they sample while the others train. A run of one process can
    /// have one, on cores of its own.
    pub samplers: usize,
    /// Order in which a stage runs the passes of its micro-batches.
    pub schedule: PipelineSchedule,
    /// What carries the long payloads of exchanges between the ranks of a group.
    pub backend: Backend,
    /// Seconds without progress (not one layer, tensor, piece of a file or frame) after which a rank that others wait for is
    /// named and the run stops (news of progress take up to half a second between processes, which are waited for, too); so also
    /// a process that is silent for as long. Work that goes on takes as long as it takes.
    pub deadline_seconds: u64,
    /// The layout of sampling.
    pub rollout: RolloutLayout,
    /// The machines that `check` plans for; without them it predicts no hours.
    pub hardware: Option<HardwareConfig>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        ClusterConfig {
            data: 1,
            pipeline: 1,
            expert: 1,
            samplers: 0,
            schedule: PipelineSchedule::OneForwardOneBackward,
            backend: Backend::Mpi,
            deadline_seconds: 60,
            rollout: RolloutLayout::default(),
            hardware: None,
        }
    }
}

/// `[cluster.rollout]`: every rank goes through all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutLayout {
    /// Ranks that share the heads of attention, inner widths and the vocabulary; each has the latent cache of all their
    /// sequences.
    pub tensor: usize,
    /// Ranks that share a layer's routed experts.
    pub expert: usize,
}

impl Default for RolloutLayout {
    fn default() -> Self {
        RolloutLayout { tensor: 1, expert: 1 }
    }
}

/// What carries exchanges: gradients, changed weights, tokens of experts, parts of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The MPI library.
    Mpi,
    /// NCCL, between a GPU of each rank.
    Nccl,
}

/// How a stage orders its passes (arXiv 2401.10241).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PipelineSchedule {
    /// One forward, one backward.
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// Weight gradients wait until nothing else is to do.
    #[serde(rename = "zb-h1")]
    ZeroBubbleH1,
    /// More forward passes first, for more memory.
    #[serde(rename = "zb-h2")]
    ZeroBubbleH2,
    /// Two pieces of the stack for each stage.
    #[serde(rename = "zb-v")]
    ZeroBubbleV,
}
