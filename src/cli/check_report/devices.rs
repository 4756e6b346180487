//! What `check` and `run` say of the devices of a run that has several: what each holds, and why they are refused.

use super::CheckReport;
use crate::cli::machine::share_for_arenas;
use crate::config::{Bytes, ModelConfig, RunConfig};
use crate::plan::memory::total;
use crate::plan::ranks::{Refusal, Room, exceeds, refusal};
use std::fmt::{self, Formatter};

/// What devices are planned from.
#[derive(Debug)]
pub struct Run {
    config: RunConfig,
    models: Vec<ModelConfig>,
    threads: usize,
}

impl Run {
    /// Of a run, its stages' models and the threads of a device.
    pub fn new(config: &RunConfig, models: &[ModelConfig], threads: usize) -> Run {
        Run { config: config.clone(), models: models.to_vec(), threads }
    }

    /// Devices on one host if they all are.
    fn count(&self) -> usize {
        let cluster = &self.config.cluster;
        cluster.data * cluster.pipeline + cluster.samplers
    }

    /// Whether one process has them all.
    fn is_one_process(&self) -> bool {
        self.config.cluster.data * self.config.cluster.pipeline == 1
    }
}

impl CheckReport {
    /// Whether one of the devices of processes needs more than it may hold.
    pub fn devices_exceed(&self, room: Room) -> bool {
        exceeds(&self.devices, room, false)
    }

    /// Why the devices do not fit into so much, if they do not.
    pub fn devices_over(&self, room: Room, is_shared: bool) -> Option<Refusal> {
        let Run { config, models, threads } = self.run.as_ref()?;
        let refused = refusal(config, models, (&self.devices, *threads), room, is_shared)?;
        Some(Refusal { text: format!("{}\n{self}", refused.text), ..refused })
    }

    pub(super) fn devices_over_budget(&self, budget: u64) -> Option<String> {
        let is_shared = self.run.as_ref()?.is_one_process();
        self.devices_over(Room::Budget(budget), is_shared).map(|refused| refused.text)
    }

    /// Of a machine that has so many bytes free, for all of them.
    pub(super) fn devices_over_memory(&self, free: u64) -> Option<String> {
        let count = self.run.as_ref()?.count();
        let free = if self.budget_bytes.is_some() { free } else { share_for_arenas(free) };
        let room = Room::Memory(free / count as u64);
        self.devices_over(room, false).map(|refused| refused.text)
    }

    /// Bytes of each kind of device by phase, of the stage that holds most in it.
    pub(super) fn write_devices(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for device in &self.devices {
            let ranks = match device.first_rank == device.last_rank {
                true => format!("rank {}", device.first_rank),
                false => format!("ranks {}-{}", device.first_rank, device.last_rank),
            };
            let phase = |(phase, owners): (&&str, &_)| format!("{phase} {}", Bytes(total(owners)));
            let phases: Vec<String> = device.memory.by_phase().iter().map(phase).collect();
            writeln!(out, "{ranks:<9} {}", phases.join(", "))?;
            if let Some((stage, phase, bytes)) = device.memory.least() {
                writeln!(out, "          {} at least, in {phase} of {stage}", Bytes(bytes))?;
            }
        }
        Ok(())
    }
}
