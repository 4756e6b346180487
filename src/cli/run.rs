//! `rehearsal run`: from a TOML to an aligned, exported model.
//!
//! Everything that can be refused is refused before the folder is touched: the config, its data files,
//! the budget, the disk. Then the folder is opened and the actors take over.

use super::backend::require_backend;
use super::check::check_files;
use super::check_report::CheckReport;
use super::command::{Threads, cores, warned};
use super::generate::seed;
use super::launch::{FIRST_WORD, Launched};
use super::machine::{
    FreeMemory, free_disk, held_disk, measured, measured_for_run, measured_products,
    share_for_arenas,
};
use super::output::say;
use super::profile::{ProfileReport, counting};
use super::ranks::{Ranks, require_sampling, threads};
use super::run_folder::{Opened, RunFolder, Wish, is_finished, is_resumed, open};
use crate::actors::{RunRequest, start};
use crate::cluster::Team;
use crate::cluster::mesh::{Load, Mesh, MeshError};
use crate::config::{Bytes, ConsoleMode, Fault, Loaded, RunConfig};
use crate::console::TypedCommand;
use crate::console::text::visible;
use crate::engine::{Machine, Profile};
use anyhow::Result;
use clap::{Args, ValueEnum};
use rehearsal_kernels::machine::Effort;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Makes a run.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    long_about = "Make a run: train, align and export a model through the stages of a TOML. The run folder holds the \
                  resolved config, journal.jsonl, checkpoints, rollouts, plots and export/. The same command goes on \
                  with an unfinished run; Ctrl-C finishes the step and commits first, a second Ctrl-C stops at once. Of a \
                  build with the feature `mpi`, mpirun or srun make the run over as many processes as [cluster] has ranks: \
                  data times pipeline, and samplers.",
    after_help = "Example:\n  rehearsal run configs/quickstart.toml\n  \
                  rehearsal run configs/quickstart.toml --set stage.solve.steps=100 --out runs/longer --seed 2\n  \
                  rehearsal run configs/quickstart.toml --resume\n  \
                  mpirun -n 2 rehearsal run configs/smoke.toml --out runs/two --set cluster.data=2"
)]
pub struct RunArgs {
    /// The run's TOML; paths in it start at its folder
    #[arg(value_name = "CONFIG.toml")]
    pub config: PathBuf,
    /// Set a key of the TOML; stage.NAME.key addresses a stage. May be given more than once
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// The run's folder; runs/NAME if absent, NAME being the stem of the config
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on with the run in the folder; end at once if it is finished
    #[arg(long, conflicts_with = "fresh")]
    pub resume: bool,
    /// Move a run that is in the folder aside and start anew
    #[arg(long)]
    pub fresh: bool,
    /// How progress is shown
    #[arg(long, value_enum)]
    pub console: Option<Console>,
    /// Write where the time of this process went to profile.txt and profile.json in the run's folder
    #[arg(long)]
    pub profile: bool,
    /// Seed of every random number, in place of the TOML's
    #[arg(long, value_name = "N", value_parser = seed)]
    pub seed: Option<u64>,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// `--console`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Console {
    /// A screen on a terminal, plain lines elsewhere
    Auto,
    /// The full screen
    Screen,
    /// One line a step
    Plain,
    /// Nothing
    Off,
}

impl From<Console> for ConsoleMode {
    fn from(console: Console) -> ConsoleMode {
        match console {
            Console::Auto => ConsoleMode::Auto,
            Console::Screen => ConsoleMode::Screen,
            Console::Plain => ConsoleMode::Plain,
            Console::Off => ConsoleMode::Off,
        }
    }
}

/// Runs, or does this process's part of a run of several.
pub fn run(args: RunArgs) -> Result<()> {
    let Some(launched) = Launched::from_environment() else {
        let loaded = load(&args)?;
        require_mesh(&loaded, 1)?;
        require_backend(&loaded, 1)?;
        return lead(&args, loaded, None);
    };
    let readied = || {
        launched.require_mpi()?;
        let loaded = load(&args)?;
        let mesh = require_mesh(&loaded, launched.processes)?;
        require_backend(&loaded, launched.processes)?;
        require_sampling(&loaded, mesh)?;
        Ok((loaded, mesh))
    };
    let (mut loaded, mesh) = readied().map_err(|mistake| launched.words(mistake, FIRST_WORD))?;
    if loaded.config.engine.threads == 0 {
        loaded.config.engine.threads = threads(&launched);
    }
    let out = out_folder(&args);
    let ranks = Ranks::join(&launched, &loaded, mesh, &out.to_string_lossy())?;
    let made = require_room(&args, &loaded, &ranks).and_then(|()| match ranks.rank() {
        0 => lead(&args, loaded, Some((&launched, &ranks))),
        _ => follow(out, loaded, &ranks),
    });
    ranks.part(made)
}

/// Refuses a run of several processes that does not fit into their memory, before anything is loaded or written.
fn require_room(args: &RunArgs, loaded: &Loaded, ranks: &Ranks) -> Result<()> {
    let out = out_folder(args);
    // Of a folder that cannot be used `lead` says why.
    let has_work = ranks.rank() == 0 && !is_finished(&out, loaded, wish(args)).unwrap_or(true);
    let threads = loaded.config.engine.threads.max(1);
    let report = CheckReport::of_run(&here(loaded), Default::default(), threads, 1.0)?;
    ranks.require_room(&report, has_work)
}

/// The run on this machine, whatever others are described.
fn here(loaded: &Loaded) -> Loaded {
    let mut here = loaded.clone();
    here.config.cluster.hardware = None;
    here
}

fn wish(args: &RunArgs) -> Wish {
    match (args.resume, args.fresh) {
        (true, _) => Wish::Resume,
        (_, true) => Wish::Fresh,
        _ => Wish::Plain,
    }
}

/// Makes the run.
fn lead(args: &RunArgs, loaded: Loaded, ranks: Option<(&Launched, &Ranks)>) -> Result<()> {
    let out = out_folder(args);
    let wish = wish(args);
    // A finished run that is only asked for again needs neither its data nor any room.
    if is_finished(&out, &loaded, wish)? {
        return say_finished(&out);
    }
    let mut room = require_resources(&out, &loaded, wish, ranks.is_none())?;
    if let Some((_, ranks)) = ranks {
        room.arenas = ranks.arenas();
    }
    let resume = resume_command(args, &out, ranks.map(|(launched, _)| launched));
    match open(&out, &loaded, wish, resume.clone())? {
        Opened::Finished => say_finished(&out),
        Opened::Ready(folder) => {
            let (path, threads) = (folder.path.clone(), room.threads);
            let has_sampler = ranks.is_none() && loaded.config.cluster.samplers > 0;
            let profiles = counting_devices(args.profile, threads, has_sampler);
            let is_silent = loaded.config.console.mode == ConsoleMode::Off;
            let ranks = ranks.map(|(_, ranks)| ranks);
            let made = drive(folder, loaded, &room, profiles.clone(), &resume, ranks);
            // A run that was stopped has a profile too.
            made.and(write_profile(&profiles, &path, threads, is_silent))
        }
    }
}

/// Does what rank 0 asks of this process's device.
fn follow(out: PathBuf, loaded: Loaded, ranks: &Ranks) -> Result<()> {
    start(RunRequest {
        config: loaded.config,
        folder: out,
        config_dir: loaded.folder,
        memory: ranks.arenas(),
        machine: Machine::default(),
        console: ConsoleMode::Off,
        profiles: [None, None],
        processes: Some(ranks.processes.clone()),
    })
}

/// The command that goes on with the run: the same config, whatever else was typed.
fn resume_command(args: &RunArgs, out: &Path, launched: Option<&Launched>) -> TypedCommand {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    // mpirun looks for the program where it was found before, and not for an installed one.
    let mut words = launched.map_or(Vec::new(), Launched::prefix);
    let program = launched.and_then(|_| std::env::args().next());
    words.push(program.unwrap_or_else(|| "rehearsal".to_string()));
    words.extend(["run".to_string(), text(&args.config)]);
    for assignment in &args.set {
        words.extend(["--set".to_string(), assignment.clone()]);
    }
    if let Some(seed) = args.seed {
        words.extend(["--seed".to_string(), seed.to_string()]);
    }
    words.extend(["--out".to_string(), text(out), "--resume".to_string()]);
    TypedCommand { directory: std::env::current_dir().unwrap_or_default(), words }
}

fn say_finished(out: &Path) -> Result<()> {
    say(&format!("{} is finished; its model is in {}", out.display(), out.join("export").display()))
}

fn load(args: &RunArgs) -> Result<Loaded> {
    let mut assignments = args.set.clone();
    assignments.extend(args.seed.map(|seed| format!("seed={seed}")));
    assignments.extend(args.threads.given().map(|threads| format!("engine.threads={threads}")));
    let mut loaded = RunConfig::load(&args.config, &assignments)?;
    if let Some(console) = args.console {
        loaded.config.console.mode = console.into();
    }
    Ok(loaded)
}

/// Refuses a layout of training that the model or the number of processes does not allow.
fn require_mesh(loaded: &Loaded, processes: usize) -> Result<Mesh> {
    let (cluster, model) = (&loaded.config.cluster, &loaded.config.model);
    let load = Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
    let place = |error: MeshError| loaded.fault(&["cluster", error.key()], error.to_string());
    // A run of one process can have a second device, which only samples.
    let samplers = if processes == 1 { 0 } else { cluster.samplers };
    if cluster.samplers > 1 && processes == 1 || samplers >= processes {
        let text = format!(
            "cluster.samplers = {} beside cluster.data = {} times cluster.pipeline = {} wants {} processes, and {processes} \
             were started; start as many",
            cluster.samplers,
            cluster.data,
            cluster.pipeline,
            cluster.data * cluster.pipeline + cluster.samplers
        );
        return Err(loaded.fault(&["cluster", "samplers"], text).into());
    }
    let sizes = [cluster.data, cluster.pipeline, cluster.expert];
    let mesh = Mesh::new(sizes, processes - samplers, load);
    let mesh = mesh.map_err(place)?;
    Team::require_pieces(mesh, cluster.schedule, model.num_hidden_layers).map_err(place)?;
    Ok(mesh)
}

fn out_folder(args: &RunArgs) -> PathBuf {
    let stem = args.config.file_stem().unwrap_or_default();
    args.out.clone().unwrap_or_else(|| Path::new("runs").join(stem))
}

/// What a run was found to have.
struct Room {
    /// Bytes that the arenas may take if the config has no budget; `None` for no limit.
    arenas: Option<u64>,
    /// Bytes that the run is planned to hold at most.
    planned: u64,
    /// Threads that it computes on.
    threads: usize,
}

/// Refuses a run that its budget or the machine cannot hold, whose data is wrong, or that the disk cannot hold.
fn require_resources(out: &Path, loaded: &Loaded, wish: Wish, is_alone: bool) -> Result<Room> {
    let configured = Some(loaded.config.engine.threads).filter(|threads| *threads > 0);
    let threads = warned(configured.unwrap_or_else(cores));
    let free = FreeMemory::here();
    let products = measured_products(threads);
    let plan = CheckReport::of_run(&here(loaded), check_files(loaded)?, threads, products)?;
    let plan = plan.on_machine(free);
    // What one of several ranks holds is a part of that, and was planned for.
    let refusal = plan.over_budget().or_else(|| plan.over_memory());
    if let Some(refusal) = refusal.filter(|_| is_alone) {
        return Err(Fault::resources(refusal));
    }
    // What a run that goes on has written is part of what it takes.
    let held = if is_resumed(out, loaded, wish)? { held_disk(out)? } else { 0 };
    let (needed, free_disk) = (plan.disk_bytes().saturating_sub(held), free_disk(out)?);
    match needed > free_disk {
        true => Err(Fault::resources(format!(
            "{}: the run takes up to {} of disk{}, and {} are free; make room, lower checkpoint.keep, or choose \
             another --out",
            out.display(),
            Bytes(needed),
            if held > 0 { " beside what it holds" } else { "" },
            Bytes(free_disk)
        ))),
        false => {
            let (arenas, planned) = (free.of_each(1).map(share_for_arenas), plan.peak_bytes());
            Ok(Room { arenas, planned, threads })
        }
    }
}

fn drive(
    mut folder: RunFolder,
    loaded: Loaded,
    room: &Room,
    profiles: [Option<Arc<Profile>>; 2],
    resume: &TypedCommand,
    ranks: Option<&Ranks>,
) -> Result<()> {
    let console = loaded.config.console.mode;
    if console != ConsoleMode::Off {
        if let Some(aside) = &folder.moved {
            say(&format!("the old run was moved to {}", aside.display()))?;
        }
        if folder.resumed {
            say(&format!("going on with the run in {}", folder.path.display()))?;
        }
    }
    let request = RunRequest {
        config: loaded.config,
        folder: folder.path.clone(),
        config_dir: loaded.folder,
        memory: room.arenas,
        machine: measured_for_run(room.threads, room.planned),
        console,
        profiles,
        processes: ranks.map(|ranks| ranks.processes.clone()),
    };
    match start(request) {
        Ok(()) => folder.finish(),
        Err(error) => {
            if matches!(error.downcast_ref::<Fault>(), Some(Fault::Stopped(_))) {
                // On a line of its own, to be copied. After a hang-up nobody may be there to read it.
                let command = visible(&resume.shown_in(&resume.directory));
                let shown = folder.path.display();
                let _ =
                    writeln!(std::io::stderr(), "{shown} is committed; go on with\n  {command}");
            }
            Err(error)
        }
    }
}

/// Profiles of the run's devices in this process, if they are asked. Of two at work the seconds of the process say nothing.
fn counting_devices(asked: bool, threads: usize, has_sampler: bool) -> [Option<Arc<Profile>>; 2] {
    match has_sampler {
        true => [(); 2].map(|()| counting(asked, threads.max(2))),
        false => [counting(asked, threads), None],
    }
}

/// Writes where the time of this process went into the run's folder, and says where, if that was asked.
fn write_profile(
    profiles: &[Option<Arc<Profile>>; 2],
    folder: &Path,
    threads: usize,
    is_silent: bool,
) -> Result<()> {
    let [Some(profile), sampler] = profiles else { return Ok(()) };
    // Two devices share the threads.
    let threads = if sampler.is_some() { threads.div_ceil(2) } else { threads };
    let machine = measured(threads, Effort::brief);
    let sampler = sampler.as_ref().map(|sampler| ProfileReport::new(sampler, &machine));
    let [table, json] = ProfileReport::new(profile, &machine).beside(sampler).write(folder)?;
    match is_silent {
        true => Ok(()),
        false => {
            say(&format!("where the time went is in {} and {}", table.display(), json.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::super::command::Command;
    use super::*;
    use clap::Parser;

    fn args(line: &str) -> RunArgs {
        let Command::Run(args) =
            Cli::parse_from(format!("rehearsal run {line}").split(' ')).command
        else {
            unreachable!()
        };
        args
    }

    fn smoke() -> String {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smoke.toml").display().to_string()
    }

    #[test]
    fn the_command_line_outranks_the_toml() {
        let line = format!(
            "{} --seed 9 --threads 3 --console off --set stage.align.steps=2 --set engine.mailbox=5",
            smoke()
        );
        let config = load(&args(&line)).unwrap().config;
        assert_eq!((config.seed, config.engine.threads, config.engine.mailbox), (9, 3, 5));
        assert_eq!(config.console.mode, ConsoleMode::Off);
        assert_eq!(load(&args(&smoke())).unwrap().config.seed, 1);
    }

    #[test]
    fn the_folder_is_named_after_the_config_unless_it_is_given() {
        assert_eq!(out_folder(&args("configs/quickstart.toml")), Path::new("runs/quickstart"));
        assert_eq!(out_folder(&args("a.toml --out b/c")), Path::new("b/c"));
    }

    #[test]
    fn the_command_that_goes_on_repeats_what_was_set() {
        let typed =
            args("a.toml --set stage.base.steps=9 --set x=1 --seed 7 --out o --console off");
        assert_eq!(
            resume_command(&typed, &out_folder(&typed), None).words.join(" "),
            "rehearsal run a.toml --set stage.base.steps=9 --set x=1 --seed 7 --out o --resume"
        );
        let plain = args("configs/quickstart.toml --fresh --threads 2");
        assert_eq!(
            resume_command(&plain, &out_folder(&plain), None).words.join(" "),
            "rehearsal run configs/quickstart.toml --out runs/quickstart --resume"
        );
    }

    #[test]
    fn a_layout_that_does_not_divide_is_refused_with_those_that_do() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let refusal = |set: &str| {
            let line = format!("{} {set} --out {}", smoke(), out.display());
            run(args(&line)).unwrap_err().to_string()
        };
        let text = refusal("--set cluster.data=2");
        assert!(text.contains("is 2, and 1 processes were started; start 2"), "{text}");
        let text = refusal("--set cluster.expert=2");
        assert!(text.contains("cluster.expert = 2 does not divide cluster.data = 1"), "{text}");
        assert!(text.contains("--set"), "the place is named: {text}");
        assert!(!out.exists());
    }

    #[test]
    fn a_budget_that_is_too_small_is_refused_before_anything_is_written() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("run");
        let line = format!("{} --set engine.budget=100000 --out {}", smoke(), out.display());
        let loaded = load(&args(&line)).unwrap();
        let report = CheckReport::of_run(&loaded, Default::default(), 1, 1e11).unwrap();
        assert!(report.over_budget().is_some());
        let failure = run(args(&line)).unwrap_err();
        assert!(
            matches!(failure.downcast_ref::<Fault>(), Some(Fault::Resources(_))),
            "{failure:#}"
        );
        assert!(!out.exists());
    }
}
