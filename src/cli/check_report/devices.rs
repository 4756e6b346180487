//! What `check` and `run` say of the devices of a run: what each holds, and why they are refused.

use super::CheckReport;
use crate::cli::launch::Launched;
use crate::cli::machine::share_for_arenas;
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

    /// Whether two devices of one process share its room.
    fn is_shared(&self) -> bool {
        self.is_one_process() && self.config.cluster.samplers > 0
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
    /// What the run does not fit into where each of its processes has so many bytes free; `None` if it does.
    pub fn lack(&self, free: Option<u64>) -> Option<Lack> {
        let run = self.run.as_ref()?;
        let budget = self.budget_bytes.map(Room::Budget);
        // A budget may take more than a share of what is free.
        let arenas = free.map(|free| if budget.is_some() { free } else { share_for_arenas(free) });
        let rooms = [budget, arenas.map(Room::Memory)];
        let is_over = |room: &Room| exceeds(&self.devices, *room, run.is_shared());
        let over = rooms.into_iter().flatten().find(is_over).map(Lack::Arenas);
        let host = self.host.as_ref().map_or(0, |(_, bytes)| *bytes);
        let is_over = |free: &u64| self.process_least().saturating_add(host) > *free;
        over.or_else(|| free.filter(is_over).map(Lack::Free))
    }

    /// Why the run does not fit.
    pub fn refusal(&self, lack: Lack) -> Option<String> {
        let run = self.run.as_ref()?;
        let Run { config, models, threads } = run;
        let devices = (&self.devices[..], *threads);
        let text = match lack {
            Lack::Arenas(room) => refusal(config, models, devices, room, run.is_shared())?.text,
            Lack::Free(free) => {
                let (stage, host) = self.host.as_ref()?;
                format!(
                    "this machine has {} free for a process, and stage {stage} holds {} of examples at once beside the {} \
                     that its model takes; lower its batch (or prompts, group_size, steps)",
                    Bytes(free),
                    Bytes(*host),
                    Bytes(self.process_least())
                )
            }
        };
        Some(format!("{text}\n{self}"))
    }

    /// Bytes that the arenas of a process cannot do without: of both devices of one, of the largest of several.
    fn process_least(&self) -> u64 {
        let least = self.devices.iter().filter_map(|device| Some(device.least()?.2));
        match self.run.as_ref().is_some_and(Run::is_one_process) {
            true => least.sum(),
            false => least.max().unwrap_or(0),
        }
    }

    /// Why the run cannot fit into its budget, if it cannot whatever is away and however few examples go through at once.
    pub fn over_budget(&self) -> Option<String> {
        self.refusal(self.lack(None)?)
    }

    /// Why the run cannot fit into this machine, if it cannot.
    pub fn over_memory(&self) -> Option<String> {
        let free = self.free?.of_each(self.run.as_ref()?.processes());
        self.refusal(self.lack(free)?)
    }

    /// Whether one device is all that the run has.
    fn is_alone(&self) -> bool {
        matches!(&self.devices[..], [device] if device.last_rank == 0)
    }

    /// Bytes of each kind of device by phase, of the stage that holds most in it; of one alone with their owners.
    pub(super) fn write_memory(&self, out: &mut Formatter<'_>) -> fmt::Result {
        if !self.is_alone() && self.run.is_some() {
            return self.write_devices(out);
        }
        for (phase, owners) in &self.memory {
            writeln!(out, "memory    {phase}: {}", Bytes(total(owners)))?;
            for (owner, bytes) in owners {
                writeln!(out, "            {owner:<24} {:>12}", Bytes(*bytes).to_string())?;
            }
        }
        Ok(())
    }

    /// The most that a device alone is planned to hold, and what it can do with.
    pub(super) fn write_peak(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let device = self.devices.first().filter(|_| self.is_alone());
        let Some(memory) = device.map(|device| &device.memory) else { return Ok(()) };
        if let Some((stage, phase, bytes)) = memory.peak() {
            writeln!(out, "peak      {} in stage {stage}, phase {phase}", Bytes(bytes))?;
        }
        match memory.least() {
            Some((stage, phase, bytes)) => {
                writeln!(out, "          {} at least, in {phase} of {stage}", Bytes(bytes))
            }
            None => Ok(()),
        }
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
