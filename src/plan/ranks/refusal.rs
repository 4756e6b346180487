//! Why a run does not fit into its devices, and the ways out: the smallest budget that would do, and what fits as it is.

use super::{DeviceMemory, device_memory};
use crate::config::{Bytes, ModelConfig, RunConfig, StageKind};
use std::fmt::Write;

/// Ranks up to which all layouts of as many are looked through for one that fits.
const MOST_SEARCHED: usize = 64;

/// Bytes that each process may hold; two devices of one process have a half each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// `engine.budget`.
    Budget(u64),
    /// What a process may take of its host's memory, where that is least.
    Memory(u64),
}

impl Room {
    /// Of one device.
    fn bytes(self, is_shared: bool) -> u64 {
        let (Room::Budget(bytes) | Room::Memory(bytes)) = self;
        if is_shared { bytes / 2 } else { bytes }
    }
}

/// A run that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Who, where, how much, and the ways out.
    pub text: String,
    /// The smallest `engine.budget` that would do.
    pub least_bytes: u64,
}

/// The phase that asks for most of what a device cannot do without.
struct Need<'a> {
    device: &'a DeviceMemory,
    stage: &'a str,
    phase: &'static str,
    bytes: u64,
}

fn need(devices: &[DeviceMemory]) -> Option<Need<'_>> {
    let of = |device| {
        let (stage, phase, bytes) = DeviceMemory::least(device)?;
        Some(Need { device, stage, phase, bytes })
    };
    // The first among equals.
    devices.iter().rev().filter_map(of).max_by_key(|need| need.bytes)
}

impl DeviceMemory {
    /// What it cannot do without: stage, phase and bytes.
    pub fn least(&self) -> Option<(&str, &'static str, u64)> {
        self.memory.least()
    }
}

/// Whether one of `devices` needs more than it may hold.
pub fn exceeds(devices: &[DeviceMemory], room: Room, is_shared: bool) -> bool {
    need(devices).is_some_and(|need| need.bytes > room.bytes(is_shared))
}

/// Why `devices`, planned for this run, do not fit into `room`, if they do not. `is_shared` says that two devices of one process
/// share it.
pub fn refusal(
    config: &RunConfig,
    models: &[ModelConfig],
    (devices, threads): (&[DeviceMemory], usize),
    room: Room,
    is_shared: bool,
) -> Option<Refusal> {
    let have = room.bytes(is_shared);
    let ranks = config.cluster.data * config.cluster.pipeline + config.cluster.samplers;
    let Need { device, stage, phase, bytes } =
        need(devices).filter(|_| exceeds(devices, room, is_shared))?;
    let least_bytes = if is_shared { 2 * bytes } else { bytes };
    let who = match (is_shared, device.samples) {
        (true, false) => "the device that trains".to_string(),
        (true, true) => "the device that samples".to_string(),
        (false, _) if ranks == 1 => "the run".to_string(),
        (false, _) => format!("rank {}", device.first_rank),
    };
    let mut text = format!("{who} needs {} in phase {phase} of stage {stage}, and ", Bytes(bytes));
    let fits = |config: &RunConfig| {
        let devices = device_memory(config, models, threads).ok()?;
        let need = need(&devices)?.bytes;
        (need <= have).then_some(need)
    };
    let ways = match room {
        Room::Budget(_) => {
            let part = if is_shared { "half of " } else { "" };
            let _ = write!(text, "{part}engine.budget leaves it {}; ", Bytes(have));
            format!("set engine.budget = {least_bytes} ({}) or more", Bytes(least_bytes))
        }
        Room::Memory(_) => {
            let (part, way) = match (is_shared, ranks == 1) {
                (true, _) => {
                    ("half of what this machine has free", ", or set cluster.samplers = 0")
                }
                (false, true) => ("its part of what this machine has free", ""),
                (false, false) => (
                    "its part of what is free on the host that has least",
                    ", or start fewer processes on a host",
                ),
            };
            let _ = write!(text, "{} are there for it, {part}; ", Bytes(have));
            format!("free memory, or raise the limit of a process (ulimit){way}")
        }
    };
    text += &ways;
    let ways = [in_parts(config, stage, phase, &fits), in_turn(config, stage, phase, &fits)];
    let ways = ways.into_iter().chain([by_plan(config, &fits), in_layout(config, &fits)]);
    for (way, need) in ways.flatten() {
        let _ = write!(text, ", or {way}, which needs {}", Bytes(need));
    }
    text += "; or take a smaller model";
    Some(Refusal { text, least_bytes })
}

type Fits<'a> = &'a dyn Fn(&RunConfig) -> Option<u64>;

/// One example at a time, if that fits.
fn in_parts(config: &RunConfig, stage: &str, phase: &str, fits: Fits<'_>) -> Option<(String, u64)> {
    let mut parts = config.clone();
    let kind = parts.stages.iter_mut().find(|other| other.name == stage).map(|s| &mut s.kind)?;
    let micro_batch = match kind {
        StageKind::Pretrain(stage) => &mut stage.micro_batch,
        StageKind::LongContext(stage) => &mut stage.micro_batch,
        StageKind::Sft(stage) => &mut stage.micro_batch,
        StageKind::RewardModel(stage) => &mut stage.micro_batch,
        StageKind::Grpo(stage) => &mut stage.micro_batch,
    };
    *micro_batch = 1;
    let need = fits(&parts).filter(|_| phase == "train")?;
    Some((format!("set stage.{stage}.micro_batch = 1"), need))
}

/// Rollouts that go through one by one and not together with those of their prompt, if that fits.
fn in_turn(config: &RunConfig, stage: &str, phase: &str, fits: Fits<'_>) -> Option<(String, u64)> {
    let mut turns = config.clone();
    match turns.stages.iter_mut().find(|other| other.name == stage).map(|s| &mut s.kind)? {
        StageKind::Grpo(grpo) if grpo.share_prompts => grpo.share_prompts = false,
        _ => return None,
    }
    let need = fits(&turns).filter(|_| phase == "train")?;
    Some((format!("set stage.{stage}.share_prompts = false"), need))
}

/// Whatever need not be there left elsewhere, if that fits.
fn by_plan(config: &RunConfig, fits: Fits<'_>) -> Option<(String, u64)> {
    config.engine.offload.as_ref()?;
    let mut planned = config.clone();
    planned.engine.offload = None;
    Some(("leave engine.offload out".to_string(), fits(&planned)?))
}

/// The layout of as many ranks that fits and has the fewest keys changed; of several the one that needs least.
fn in_layout(config: &RunConfig, fits: Fits<'_>) -> Option<(String, u64)> {
    let own = &config.cluster;
    let ranks = own.data * own.pipeline;
    let divisors = |of: usize| (1..=of).filter(move |size| of.is_multiple_of(*size));
    if ranks > MOST_SEARCHED {
        return None;
    }
    let samplers = if own.samplers > 0 { own.samplers } else { ranks };
    let mut found: Option<(usize, u64, String)> = None;
    for pipeline in divisors(ranks) {
        for expert in divisors(ranks / pipeline) {
            for sampled in divisors(samplers) {
                let mut other = config.clone();
                let cluster = &mut other.cluster;
                (cluster.data, cluster.pipeline) = (ranks / pipeline, pipeline);
                (cluster.expert, cluster.rollout.expert) = (expert, sampled);
                let keys = [
                    ("data", own.data, cluster.data),
                    ("pipeline", own.pipeline, pipeline),
                    ("expert", own.expert, expert),
                    ("rollout.expert", own.rollout.expert, sampled),
                ];
                let changed = keys.iter().filter(|(_, before, after)| before != after);
                let count = changed.clone().count();
                if count == 0 || found.as_ref().is_some_and(|(fewest, ..)| count > *fewest) {
                    continue;
                }
                let Some(need) = fits(&other) else { continue };
                let sets = changed.map(|(key, _, after)| format!("cluster.{key} = {after}"));
                let set = sets.collect::<Vec<_>>().join(" with ");
                if found.as_ref().is_none_or(|(few, least, _)| (count, need) < (*few, *least)) {
                    found = Some((count, need, set));
                }
            }
        }
    }
    found.map(|(_, need, set)| (format!("set {set}"), need))
}
