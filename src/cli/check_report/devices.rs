//! What `check` and `run` say of the devices of a run that has several: what each holds, and why they are refused.

use super::CheckReport;
use crate::cli::launch::Launched;
use crate::cli::machine::{FreeMemory, share_for_arenas};
use crate::config::{Bytes, ModelConfig, RunConfig};
use crate::plan::memory::total;
use crate::plan::ranks::{Room, exceeds, refusal};
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

    /// Processes, on one host if they all are.
    fn processes(&self) -> usize {
        let cluster = &self.config.cluster;
        match self.is_one_process() {
            true => 1,
            false => cluster.data * cluster.pipeline + cluster.samplers,
        }
    }

    /// Whether one process has all devices: one that mpirun did not start with others, as it may a trainer and a sampler.
    fn is_one_process(&self) -> bool {
        let cluster = &self.config.cluster;
        cluster.data * cluster.pipeline == 1 && Launched::from_environment().is_none()
    }
}

/// What devices do not fit into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// What their arenas may hold.
    Arenas(Room),
    /// So many bytes, with the examples of a step beside their arenas.
    Free(u64),
}

impl CheckReport {
    /// What the devices do not fit into where each process has so many bytes free; `None` if they do.
    pub fn devices_lack(&self, free: Option<u64>) -> Option<Lack> {
        let budget = self.budget_bytes.map(Room::Budget);
        // A budget may take more than a share of what is free.
        let arenas = free.map(|free| if budget.is_some() { free } else { share_for_arenas(free) });
        let rooms = [budget, arenas.map(Room::Memory)];
        let is_over = |room: &Room| self.exceeds(*room);
        let over = rooms.into_iter().flatten().find(is_over).map(Lack::Arenas);
        let is_over = |free: &u64| self.over_host(self.process_least().unwrap_or(0), *free);
        over.or_else(|| free.filter(is_over).map(Lack::Free))
    }

    fn exceeds(&self, room: Room) -> bool {
        self.run.as_ref().is_some_and(|run| exceeds(&self.devices, room, run.is_one_process()))
    }

    /// Why the devices do not fit.
    pub fn devices_refused(&self, lack: Lack) -> Option<String> {
        match lack {
            Lack::Arenas(room) => {
                let Run { config, models, threads } = self.run.as_ref()?;
                let is_shared = self.run.as_ref()?.is_one_process();
                let refused = refusal(config, models, (&self.devices, *threads), room, is_shared)?;
                Some(format!("{}\n{self}", refused.text))
            }
            Lack::Free(free) => self.host_refused(self.process_least()?, free),
        }
    }

    /// Bytes that the arenas of a process cannot do without: of all devices of one, of the largest of several.
    fn process_least(&self) -> Option<u64> {
        let least = self.devices.iter().filter_map(|device| Some(device.least()?.2));
        match self.run.as_ref()?.is_one_process() {
            true => Some(least.sum()),
            false => least.max(),
        }
    }

    pub(super) fn devices_over_budget(&self, budget: u64) -> Option<String> {
        self.devices_refused(Lack::Arenas(Room::Budget(budget)))
    }

    /// Of a machine with so much free, for all processes.
    pub(super) fn devices_over_memory(&self, free: FreeMemory) -> Option<String> {
        let free = free.of_each(self.run.as_ref()?.processes());
        self.devices_refused(self.devices_lack(free)?)
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
