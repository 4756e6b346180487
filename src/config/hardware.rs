//! `[cluster.hardware]`: the machines that a plan is for, and what is assumed of them (deepseek_v2.md 3; performance.md 4).
//!
//! `check` plans with these figures and `run` does not look at them. Every key must be given but the last: a plan has no
//! figure of its own, so that without the table it tells bytes and FLOPs and no hours.

use super::engine::Bytes;
use serde::{Deserialize, Serialize};

/// `[cluster.hardware]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareConfig {
    /// What a device is called in the report.
    pub device: String,
    /// Devices that the faster links of a node join; ranks fill nodes in their order.
    pub devices_per_node: usize,
    /// Memory of a device.
    pub device_memory: Bytes,
    /// Bytes a second between a device and its memory.
    pub memory_bytes_per_second: f64,
    /// FLOPs a second of a device at its best, in `compute_dtype`.
    pub peak_flops: f64,
    /// Share of the peak that useful FLOPs of layers without experts, and of the head, make use of. Whatever else a kernel does
    /// or repeats (norms, recomputed activations) is inside, attention's scores at `efficiency_sequence` too.
    pub dense_efficiency: f64,
    /// The same of layers with experts.
    pub moe_efficiency: f64,
    /// Tokens of the sequences that the two efficiencies hold for: there attention's scores take no time of their own, and
    /// longer or shorter sequences take as much more or less as their scores do.
    pub efficiency_sequence: usize,
    /// Bytes a second that a device sends, and as many that it receives, within a node.
    pub node_bytes_per_second: f64,
    /// Seconds until the first byte is there.
    pub node_latency_seconds: f64,
    /// The same between nodes, for each device.
    pub network_bytes_per_second: f64,
    /// Seconds until the first byte is there.
    pub network_latency_seconds: f64,
    /// Memory of a node's host.
    pub host_memory: Bytes,
    /// Bytes a second between a device and its host, in each direction.
    pub host_bytes_per_second: f64,
    /// Type of the weights and activations that are computed with.
    pub compute_dtype: FloatType,
    /// Type in which gradients are added up.
    pub gradient_dtype: FloatType,
    /// Bits of a cached element while rollouts are sampled, scales included.
    pub cache_bits: u32,
    /// GPU hours of a trillion tokens that were published, to be told beside the plan's. Nothing is computed from it.
    #[serde(default)]
    pub published_gpu_hours: Option<f64>,
}

/// Type of a number that is added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FloatType {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
}

impl FloatType {
    /// Bytes of a number.
    pub fn bytes(self) -> u64 {
        match self {
            FloatType::F32 => 4,
            FloatType::Bf16 => 2,
        }
    }
}
