//! Rules of `[cluster]` that need no count of processes.

use super::RunConfig;
use super::document::ConfigError;
use super::dtype::Dtype;
use super::engine::Bytes;
use super::stage::{Stage, StageKind};
use super::validate::Rules;
use super::validate_model::MOST_POSITIONS;

/// Ranks in one direction of a layout at most.
const MOST_RANKS: usize = 1 << 16;
/// Devices of a node at most.
const MOST_DEVICES: usize = 1024;
/// Bits of a cached element.
const CACHE_BITS: std::ops::RangeInclusive<u32> = 1..=32;

/// Checks the table.
pub fn cluster(rules: &Rules) -> Result<(), ConfigError> {
    let cluster = &rules.config.cluster;
    rules.require(cluster.deadline_seconds > 0, &["cluster", "deadline_seconds"], || {
        "cluster.deadline_seconds = 0 must be at least 1".to_string()
    })?;
    let sizes =
        [("data", cluster.data), ("pipeline", cluster.pipeline), ("samplers", cluster.samplers)];
    for (key, value) in sizes {
        rules.require(value <= MOST_RANKS, &["cluster", key], || {
            format!("cluster.{key} = {value} is too many; use at most {MOST_RANKS}")
        })?;
    }
    let samples = |stage: &Stage| matches!(stage.kind, StageKind::Grpo(_));
    let samplers = cluster.samplers;
    rules.require(samplers == 0 || rules.config.stages.iter().any(samples), &["cluster", "samplers"], || {
        format!(
            "cluster.samplers = {samplers} keeps ranks for sampling alone, and no stage of the run is of kind grpo; use \
             cluster.samplers = 0"
        )
    })?;
    let is_blocked = |stage: &Stage| matches!(&stage.kind, StageKind::Grpo(grpo) if grpo.rollout_dtype == Dtype::Fp8Block);
    let tensor = cluster.rollout.tensor;
    for stage in rules.config.stages.iter().filter(|stage| is_blocked(stage)) {
        rules.require(tensor <= 1, &["cluster", "rollout", "tensor"], || {
            format!(
                "cluster.rollout.tensor = {tensor} cuts weights between rows, and stage.{}.rollout_dtype = \"fp8-block\" \
                 shares scales over 128 of them; use cluster.rollout.tensor = 1, or rollout_dtype = \"fp8\"",
                stage.name
            )
        })?;
    }
    hardware(rules)
}

/// What is told of a run whose samplers have nothing to do while the others train; `None` of any other.
pub fn idle_samplers(config: &RunConfig) -> Option<String> {
    let waits =
        |stage: &&Stage| matches!(&stage.kind, StageKind::Grpo(grpo) if grpo.max_staleness == 0);
    let waiting: Vec<_> = config.stages.iter().filter(waits).map(|stage| &stage.name).collect();
    let first = waiting.first().filter(|_| config.cluster.samplers > 0)?;
    let names: Vec<String> = waiting.iter().map(|name| format!("{name:?}")).collect();
    Some(format!(
        "cluster.samplers = {}: in stage {} those ranks wait while the others train, and the others while they sample; set \
         stage.{first}.max_staleness = 1 to have both at once, or cluster.samplers = 0",
        config.cluster.samplers,
        names.join(", "),
    ))
}

fn hardware(rules: &Rules) -> Result<(), ConfigError> {
    let Some(hardware) = &rules.config.cluster.hardware else { return Ok(()) };
    let path = |key| ["cluster", "hardware", key];
    let rates = [
        ("memory_bytes_per_second", hardware.memory_bytes_per_second),
        ("peak_flops", hardware.peak_flops),
        ("node_bytes_per_second", hardware.node_bytes_per_second),
        ("network_bytes_per_second", hardware.network_bytes_per_second),
        ("host_bytes_per_second", hardware.host_bytes_per_second),
    ];
    let published = hardware.published_gpu_hours.map(|hours| ("published_gpu_hours", hours));
    for (key, value) in rates.into_iter().chain(published) {
        rules.require(value > 0.0 && value.is_finite(), &path(key), || {
            format!("cluster.hardware.{key} = {value} must be above 0")
        })?;
    }
    for (key, share) in [
        ("dense_efficiency", hardware.dense_efficiency),
        ("moe_efficiency", hardware.moe_efficiency),
    ] {
        rules.require(share > 0.0 && share <= 1.0, &path(key), || {
            format!("cluster.hardware.{key} = {share} is a share of peak_flops; it must lie above 0 and be at most 1")
        })?;
    }
    for (key, seconds) in [
        ("node_latency_seconds", hardware.node_latency_seconds),
        ("network_latency_seconds", hardware.network_latency_seconds),
    ] {
        rules.require((0.0..1.0).contains(&seconds), &path(key), || {
            format!("cluster.hardware.{key} = {seconds} must lie between 0 and 1")
        })?;
    }
    for (key, Bytes(bytes)) in
        [("device_memory", hardware.device_memory), ("host_memory", hardware.host_memory)]
    {
        rules.require(bytes > 0, &path(key), || {
            format!("cluster.hardware.{key} = 0 holds nothing; write it as in \"80 GiB\"")
        })?;
    }
    for (key, count, most) in [
        ("devices_per_node", hardware.devices_per_node, MOST_DEVICES),
        ("efficiency_sequence", hardware.efficiency_sequence, MOST_POSITIONS),
    ] {
        rules.require((1..=most).contains(&count), &path(key), || {
            format!("cluster.hardware.{key} = {count} must be from 1 to {most}")
        })?;
    }
    rules.require(CACHE_BITS.contains(&hardware.cache_bits), &path("cache_bits"), || {
        format!("cluster.hardware.cache_bits = {} must be from 1 to 32", hardware.cache_bits)
    })
}
