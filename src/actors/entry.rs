//! Entry: from what a person asked for to a company that does it, with the devices of this process.
//!
//! Knows no actor; what becomes of the run comes back as a result of the program.

use super::company::{Setup, run};
use super::director::StopSignal;
use super::mail::Mail;
use super::messages::*;
use super::port::Limits;
use super::post::Injection;
use super::stage_plan::Folders;
use super::worker::DeviceMaker;
use crate::cluster::layout::Sampling;
use crate::cluster::local::Renewed;
use crate::cluster::{Control, Team};
use crate::config::{Bytes, ConsoleMode, EngineConfig, Fault, RunConfig};
use crate::engine::hybrid::{EngineSetup, HybridEngine};
use crate::engine::{Machine, Profile};
use anyhow::Result;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A run to be made.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// Everything that it is.
    pub config: RunConfig,
    /// Its folder; the caller holds the lock.
    pub folder: PathBuf,
    /// The TOML's folder: relative paths in the config start here.
    pub config_dir: PathBuf,
    /// Bytes that the arenas may hold if the config has no budget; `None` for no limit.
    pub memory: Option<u64>,
    /// What the machine does in a second on the run's threads.
    pub machine: Machine,
    /// How progress is shown.
    pub console: ConsoleMode,
    /// Count what the device does, and a second one that only samples, if that is asked.
    pub profiles: [Option<Arc<Profile>>; 2],
    /// The other processes of the run; `None` for a run of one.
    pub processes: Option<Processes>,
}

/// The processes of a run, as one of them sees them.
#[derive(Clone)]
pub struct Processes {
    /// The devices, and the ways to them.
    pub team: Team,
    /// The ways to the other actors.
    pub control: Arc<Control>,
    /// What a person is told of them.
    pub described: String,
}

impl std::fmt::Debug for Processes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.team.fmt(f)
    }
}

/// Makes a run, from its newest commit if there is one, to its end; or this process's part of it.
pub fn start(request: RunRequest) -> Result<()> {
    let RunRequest { config, folder, config_dir, memory, machine, console, profiles, processes } =
        request;
    let (team, spill) = match &processes {
        None => (Team::alone(), folder.join("spill")),
        Some(processes) => {
            let team = processes.team.clone();
            let spill = folder.join("spill").join(format!("rank-{}", team.rank()));
            (team, spill)
        }
    };
    let limits = Limits::of(&config.engine);
    let described = processes.as_ref().map(|processes| processes.described.clone());
    let mail = processes.map(|processes| Mail::new(processes.control, limits.mailbox));
    let mut engine = config.engine.clone();
    engine.budget = engine.budget.or(memory.map(Bytes));
    let setup = EngineSetup { model: config.model.clone(), engine, seed: config.seed, spill, team };
    let has_sampler = config.cluster.samplers > 0 && mail.is_none();
    let links = mail.is_none().then(|| Renewed::new(if has_sampler { 2 } else { 1 }));
    let (setup, sampler) = match &links {
        Some(links) if has_sampler => {
            let seconds = config.cluster.deadline_seconds.max(1);
            let [trainer, sampler] = beside(setup, links, Duration::from_secs(seconds));
            (trainer, Some(sampler))
        }
        _ => (setup, None),
    };
    let [profile, sampler_profile] = profiles;
    let sampler = sampler.map(|setup| -> DeviceMaker {
        let links = links.clone();
        Arc::new(move || {
            let (setup, profile) = (linked(&setup, &links), sampler_profile.clone());
            Ok(Box::new(HybridEngine::profiled(setup, profile)?))
        })
    });
    let is_led = mail.as_ref().is_some_and(|mail| mail.rank() > 0);
    let outcome = run(
        Setup {
            limits,
            config: Arc::new(config),
            folders: Folders { run: folder, config: config_dir },
            console: Some(console),
            machine,
            device: Arc::new(move || {
                Ok(Box::new(HybridEngine::profiled(linked(&setup, &links), profile.clone())?))
            }),
            sampler,
            injection: Arc::new(Injection::from_environment()?),
            bench: None,
            stop: StopSignal::default(),
            mail: mail.clone(),
            processes: described,
        },
        |_| {},
    );
    if let Some(mail) = mail {
        let unready = |error| Failure::new(FailureKind::Other, format!("{error:#}"));
        let ended = outcome.as_ref().map_err(unready);
        mail.part(&ended.cloned().unwrap_or_else(Outcome::Failed));
    }
    match outcome? {
        Outcome::Done | Outcome::Timed(_) => Ok(()),
        // Rank 0 has said so, and how to go on.
        Outcome::Stopped(_) if is_led => Ok(()),
        Outcome::Stopped(signal) => Err(Fault::Stopped(signal).into()),
        Outcome::Failed(failure) => Err(failure.into_error()),
    }
}

/// A trainer and a sampler in one process, each with half of the memory and with cores of its own where there are two.
fn beside(setup: EngineSetup, links: &Renewed, deadline: Duration) -> [EngineSetup; 2] {
    let threads = match setup.engine.threads {
        0 => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
        threads => threads,
    };
    let own = [threads.div_ceil(2), (threads / 2).max(1)];
    let mut places = [0, 1].into_iter().zip(own).zip(["trainer", "sampler"]);
    [(); 2].map(|()| {
        let ((rank, threads), name) = places.next().expect("there are two");
        let one = Sampling { ranks: 1, tensor: 1, expert: 1 };
        let team = Team { samplers: 1, samplers_layout: one, deadline, ..setup.team.clone() };
        let team = Team { link: links.end(rank), ..team };
        let half = |bytes: Option<Bytes>| bytes.map(|bytes| Bytes(bytes.0 / 2));
        let (budget, host_budget) = (half(setup.engine.budget), half(setup.engine.host_budget));
        let engine = EngineConfig { threads, budget, host_budget, ..setup.engine.clone() };
        EngineSetup { engine, team, spill: setup.spill.join(name), ..setup.clone() }
    })
}

/// What a device is made with now: of one process with links that have not stopped.
fn linked(setup: &EngineSetup, links: &Option<Arc<Renewed>>) -> EngineSetup {
    let mut setup = setup.clone();
    if let Some(links) = links {
        setup.team.link = links.end(setup.team.rank());
    }
    setup
}

/// Tells the other processes of a run that there is nothing to do.
pub fn dismiss(processes: &Processes) {
    Mail::new(Arc::clone(&processes.control), 1).part(&Outcome::Done);
}
