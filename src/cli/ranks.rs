//! Ranks: a process that mpirun or srun started becomes one of a run's.
//!
//! Rank 0 makes the run; the others' part is to do what it asks of their devices. However a process's part ends, it tells the
//! others how, so that none is left behind.

use super::check_report::CheckReport;
use super::command::cores;
use super::failure::Said;
use super::launch::Launched;
use super::machine::{FreeMemory, share_for_arenas};
use crate::actors::{Processes, dismiss};
use crate::cluster::layout::Sampling;
use crate::cluster::{Broken, Control, Mesh, Team};
use crate::config::stage::StageKind;
use crate::config::{Dtype, Fault, Loaded, Stage};
use crate::console::text::visible;
use anyhow::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

/// One process of a run of several.
pub struct Ranks {
    /// What the actors need of the others.
    pub processes: Processes,
    /// Bytes that every rank has free: the least of what they have.
    free: Option<u64>,
    /// Every rank's process and host.
    names: Vec<String>,
    #[cfg(feature = "mpi")]
    mpi: Arc<crate::cluster::Mpi>,
}

impl Ranks {
    /// This rank.
    pub fn rank(&self) -> usize {
        self.processes.team.rank()
    }

    /// Bytes that every rank's arena may take where the config has no budget.
    pub fn arenas(&self) -> Option<u64> {
        self.free.map(share_for_arenas)
    }

    fn control(&self) -> &Arc<Control> {
        &self.processes.control
    }

    /// Refuses a run that the plan of its ranks does not fit into: whoever's plan that is, the first of them says why and all end.
    /// `has_work` is rank 0's to say: a finished run needs no room.
    pub fn require_room(&self, report: &CheckReport, has_work: bool) -> Result<()> {
        let lack = report.lack(self.free);
        let team = &self.processes.team;
        let ranks = team.mesh.ranks() + team.samplers;
        let group = team.group((0..ranks).collect());
        let own = [u8::from(lack.is_some()), u8::from(has_work)];
        let votes = group.all_to_all("whether a rank's plan fits", &vec![own.to_vec(); ranks])?;
        let Some(refuses) = votes.iter().position(|vote| vote[0] == 1).filter(|_| votes[0][1] == 1)
        else {
            return Ok(());
        };
        let lack = lack.filter(|_| self.rank() == refuses);
        if let Some(why) = lack.and_then(|lack| report.refusal(lack)) {
            let _ = writeln!(std::io::stderr(), "error: {}", visible(&why));
        }
        Err(Said { code: 4 }.into())
    }

    /// Ends this process's part: tells the others how, and closes the library with them.
    pub fn part(self, made: Result<()>) -> Result<()> {
        let rank = self.rank();
        let made = match made {
            Ok(()) if rank == 0 => {
                dismiss(&self.processes);
                Ok(())
            }
            Err(error) if error.is::<Said>() => Err(error),
            Err(error) if !matches!(error.downcast_ref(), Some(Fault::Stopped(_))) => {
                let (why, code) = (format!("{error:#}"), super::failure::exit_code(&error));
                self.control().stop().set(&Broken::Failed { rank, why, code });
                self.control().flush();
                let told = self.control().stop().why();
                // Every rank says the same words; which of them says it is worth knowing.
                let ends = format!("rank {rank} of {} ends", self.names.len());
                Err(echoed(rank, told).unwrap_or(own_words(rank, error)).context(ends))
            }
            other => other,
        };
        self.leave();
        made
    }
}

/// A rank's own failure, which comes back from rank 0 with this rank's name, without it.
fn own_words(rank: usize, error: Error) -> Error {
    let text = format!("{error:#}");
    match text.strip_prefix(&format!("rank {rank}: ")) {
        Some(words) => super::failure::with_code(words, super::failure::exit_code(&error)),
        None => error,
    }
}

/// The few words of a rank that ends because another failed: that one and rank 0 tell why, at length, and a screen has few lines.
fn echoed(rank: usize, told: Option<Broken>) -> Option<Error> {
    let Some(Broken::Failed { rank: failed, code, .. }) = told else { return None };
    let words = format!("rank {failed} failed");
    (rank != 0 && rank != failed).then(|| super::failure::with_code(&words, code))
}

/// The layouts in which those that train and those that only sample do the latter.
fn sampling(loaded: &Loaded, mesh: Mesh) -> Result<[Sampling; 2]> {
    let layouts = Sampling::of_run(&loaded.config.cluster, mesh, &loaded.config.model);
    Ok(layouts.map_err(|error| {
        let path: Vec<&str> = std::iter::once("cluster").chain(error.path()).collect();
        loaded.fault(&path, error.to_string())
    })?)
}

/// Refuses layouts of sampling that the ranks do not divide into.
pub fn require_sampling(loaded: &Loaded, mesh: Mesh) -> Result<()> {
    sampling(loaded, mesh).map(drop)
}

/// What a person is told where rollouts are to be sampled from integers and some ranks have no instructions for them.
fn without_integers(loaded: &Loaded, lack: &[usize], names: &[String]) -> Option<String> {
    let wants = |stage: &Stage| matches!(&stage.kind, StageKind::Grpo(grpo) if grpo.rollout_dtype == Dtype::Int8);
    let rank = lack.first().filter(|_| loaded.config.stages.iter().any(wants))?;
    let (name, others) = (&names[*rank], lack.len() - 1);
    let others = if others > 0 { format!(" (nor have {others} more)") } else { String::new() };
    Some(format!(
        "rank {rank}, {name}, has no instructions for products of integers{others}: all ranks sample from f32 weights"
    ))
}

/// Threads of a rank that is told no number: its share of the cores, unless it was bound to its own.
pub fn threads(launched: &Launched) -> usize {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let status = read("/proc/self/status");
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let online = read("/sys/devices/system/cpu/online");
    match listed(allowed.unwrap_or_default()) < listed(&online) {
        true => cores(),
        false => (cores() / launched.local).max(1),
    }
}

/// How many numbers a list such as "0-3,8" has.
fn listed(text: &str) -> usize {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let numbers = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        Some(numbers.1.saturating_sub(numbers.0) + 1)
    };
    text.split(',').filter_map(range).sum()
}

/// What must be the same on all ranks, by key: all of the config but threads and console, and what was typed beside it.
fn same_everywhere(loaded: &Loaded, out: &str) -> BTreeMap<String, String> {
    let mut config = loaded.config.clone();
    config.engine.threads = 0;
    config.console = Default::default();
    let value = serde_json::to_value(&config).expect("a config is plain data");
    let mut table = BTreeMap::from([("--out".to_string(), out.to_string())]);
    flatten("", &value, &mut table);
    table
}

fn flatten(path: &str, value: &Value, table: &mut BTreeMap<String, String>) {
    let under = |key: &str| match path {
        "" => key.to_string(),
        path => format!("{path}.{key}"),
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| flatten(&under(key), v, table)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(at, v)| flatten(&under(&at.to_string()), v, table));
        }
        plain => drop(table.insert(path.to_string(), plain.to_string())),
    }
}

#[cfg(feature = "mpi")]
mod over_mpi {
    use super::super::backend::connect;
    use super::super::launch;
    use super::super::presence::{Presence, clear};
    use super::*;
    use crate::cluster::{Ident, Joined, Link, Mpi, Stop, join};
    use anyhow::Context;
    use rehearsal_kernels::{Arena, CpuKernels, Kernels};
    use std::path::Path;
    use std::time::Duration;

    /// What a person is told of the processes of these names, and what they agreed on.
    fn described(names: &[String], library: &str, notes: Vec<String>) -> String {
        let hosts: std::collections::BTreeSet<&str> =
            names.iter().filter_map(|name| name.rsplit(' ').next()).collect();
        let hosts: Vec<&str> = hosts.into_iter().collect();
        // mpirun of Open MPI sets it where it was told `--with-ft ulfm`.
        let is_tolerant = std::env::var("OMPI_MCA_mpi_ft_enable").is_ok_and(|on| on == "1");
        let tolerance = match is_tolerant {
            true => "with fault tolerance (ULFM): if one dies, the others stop by themselves",
            false => "without fault tolerance: if one dies, the launcher may end the others",
        };
        let (count, hosts) = (names.len(), hosts.join(", "));
        let mut lines = vec![format!("{count} processes on {hosts} over {library}, {tolerance}")];
        lines.extend(notes);
        lines.join("\n")
    }

    /// Starts MPI; who it waits for in vain is named, by every rank.
    fn started(
        launched: &Launched,
        own: &Ident,
        out: &Path,
        (deadline, stop): (Duration, &Arc<Stop>),
    ) -> Result<Arc<Mpi>> {
        let ranks = [launched.rank, launched.processes];
        let presence = Presence::begin(out, ranks, deadline, [launch::job(), own.name()]);
        match Mpi::start(deadline, Arc::clone(stop)) {
            Ok(mpi) => {
                presence.end();
                Ok(mpi)
            }
            Err(why) => Err(presence
                .explain(why)
                .context(format!("rank {} of {} ends", ranks[0], ranks[1]))),
        }
    }

    impl Ranks {
        /// Joins the other processes, which must have the same binary and the same config.
        pub fn join(launched: &Launched, loaded: &Loaded, mesh: Mesh, out: &str) -> Result<Ranks> {
            let cluster = &loaded.config.cluster;
            let deadline = Duration::from_secs(cluster.deadline_seconds.max(1));
            let [trainers, samplers_layout] = sampling(loaded, mesh)?;
            let binary = std::fs::read("/proc/self/exe").context("failed to read this binary")?;
            let own = Ident {
                host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                pid: std::process::id(),
                processes: launched.processes,
                binary: blake3::hash(&binary).to_hex().to_string(),
                config: same_everywhere(loaded, out),
                memory: FreeMemory::here().of_each(launched.local),
                lacks_integers: !CpuKernels::new(1, Arena::new(None)).multiplies_integers(),
            };
            let stop = Arc::new(Stop::default());
            let mpi = started(launched, &own, Path::new(out), (deadline, &stop))?;
            let refused = |why: Broken| match why {
                Broken::Failed { code: 2, .. } => Fault::user(why.to_string()),
                why => anyhow::Error::new(why),
            };
            let ranks = mpi.ranks();
            if ranks != launched.processes {
                let (by, processes) = (launched.by, launched.processes);
                return Err(Fault::user(format!(
                    "{by} tells of {processes} processes and MPI of {ranks}; start the program with the mpirun of \
                     the MPI that it was built with"
                )));
            }
            let joined = join(mpi.as_ref(), ranks, &own, [deadline; 2], stop);
            if mpi.rank() == 0 {
                clear(Path::new(out));
            }
            let Joined { control, names, memory: free, lack_integers } = joined.map_err(refused)?;
            let note = without_integers(loaded, &lack_integers, &names);
            let sampling = if mpi.rank() < mesh.ranks() { trainers } else { samplers_layout };
            let mut team = Team {
                link: mpi.clone(),
                mesh,
                schedule: cluster.schedule,
                sampling,
                samplers: cluster.samplers,
                samplers_layout,
                deadline,
                has_integers: lack_integers.is_empty(),
                ..Team::alone()
            };
            let carried = connect(loaded, &names, &mut team);
            let (carried, failed) = carried.map_or_else(|e| (None, Some(e)), |told| (told, None));
            let notes = [note, carried].into_iter().flatten().collect();
            let described = described(&names, mpi.library(), notes);
            let processes = Processes { team, control, described };
            let ranks = Ranks { processes, free, names, mpi };
            match failed {
                None => Ok(ranks),
                // Nobody goes before the others know why.
                Some(failed) => Err(ranks.part(Err(failed)).expect_err("it ends with a failure")),
            }
        }

        pub(super) fn leave(self) {
            let deadline = self.processes.team.deadline;
            self.mpi.leave(deadline);
        }
    }
}

#[cfg(not(feature = "mpi"))]
impl Ranks {
    /// Refuses: this build knows no other process.
    pub fn join(launched: &Launched, loaded: &Loaded, mesh: Mesh, out: &str) -> Result<Ranks> {
        launched.require_mpi()?;
        drop((sampling(loaded, mesh)?, same_everywhere(loaded, out)));
        drop((FreeMemory::here().of_each(launched.local), Team::alone()));
        drop(without_integers(loaded, &[], &[]));
        unreachable!("a build without MPI requires it in vain")
    }

    fn leave(self) {}
}

#[cfg(test)]
mod tests {
    use super::super::loaded;
    use super::*;
    use crate::cluster::mesh::Load;

    #[test]
    fn a_rank_repeats_at_length_who_is_gone_and_in_few_words_who_failed() {
        let failed = Broken::Failed { rank: 2, why: "no room left".to_string(), code: 4 };
        let said = |rank| echoed(rank, Some(failed.clone()));
        assert!(said(0).is_none() && said(2).is_none(), "they tell why");
        let other = said(1).unwrap();
        assert_eq!(other.to_string(), "rank 2 failed");
        assert_eq!(super::super::failure::exit_code(&other), 4);
        let gone = Broken::Gone { rank: 0, gone: 2, found: "its control link closed".to_string() };
        assert!(echoed(1, Some(gone)).is_none() && echoed(1, None).is_none());
    }

    #[test]
    fn a_rank_names_itself_once_in_a_failure_of_its_own() {
        let own = own_words(3, Fault::resources("rank 3: no room left"));
        assert_eq!(own.to_string(), "no room left");
        assert_eq!(super::super::failure::exit_code(&own), 4);
        assert_eq!(own_words(0, Fault::user("rank 3: no")).to_string(), "rank 3: no");
    }

    #[test]
    fn a_list_of_cores_is_counted() {
        assert_eq!([listed("0-3,8"), listed("\t0\n"), listed("")], [5, 1, 0]);
    }

    #[test]
    fn what_must_be_the_same_tells_every_key_but_threads_and_console() {
        let table = |set: &[&str]| same_everywhere(&loaded(set), "runs/a");
        let plain = table(&[]);
        assert_eq!(plain["seed"], "1");
        assert_eq!(plain["cluster.data"], "1");
        assert_eq!(plain, table(&["engine.threads=3", "console.mode=off"]));
        for set in ["seed=2", "cluster.deadline_seconds=9", "stage.align.kl_weight=0.5"] {
            let other = table(&[set]);
            let differ = plain.iter().filter(|(key, value)| other.get(*key) != Some(value));
            assert_eq!(differ.count(), 1, "{set}");
        }
        assert_ne!(plain, same_everywhere(&loaded(&[]), "runs/b"));
    }

    #[test]
    fn who_cannot_sample_from_integers_is_told_where_that_is_asked_for() {
        let names: Vec<String> = (7..10).map(|pid| format!("process {pid} on there")).collect();
        let told = |set: &[&str], lack: &[usize]| without_integers(&loaded(set), lack, &names);
        let integers = ["stage.align.rollout_dtype=int8", "engine.exact=false"];
        assert_eq!([told(&[], &[1]), told(&integers, &[])], [None, None]);
        let text = told(&integers, &[1]).unwrap();
        assert!(text.starts_with("rank 1, process 8 on there, has no instructions"), "{text}");
        assert!(text.ends_with("all ranks sample from f32 weights"), "{text}");
        assert!(told(&integers, &[0, 2]).unwrap().contains("integers (nor have 1 more): all"));
    }

    #[test]
    fn a_layout_of_sampling_that_does_not_divide_is_refused_with_those_that_do() {
        let sampling = |set: &str| {
            let loaded = loaded(&[set]);
            let model = &loaded.config.model;
            let load = Load { layers: model.num_hidden_layers, experts: model.n_routed_experts };
            sampling(&loaded, Mesh::new([4, 1, 1], 4, load).unwrap())
        };
        let refusal = |set: &str| sampling(set).unwrap_err().to_string();
        let text = refusal("cluster.rollout.expert=3");
        assert!(text.contains("expert = 3 does not divide the number of ranks = 4; use"), "{text}");
        let text = refusal("cluster.rollout.tensor=4");
        assert!(text.contains("tensor = 4 does not divide num_attention_heads = 2; use 1 or 2"));
        let [layout, _] = sampling("cluster.rollout.expert=2").unwrap();
        assert_eq!(layout, Sampling { ranks: 4, tensor: 1, expert: 2 });
    }
}
