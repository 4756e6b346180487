//! Launch: what mpirun or srun say of the processes beside this one.
//!
//! They tell each process its rank in the environment, before any library has started; so a build without MPI knows that it
//! is one of several, and a process that was started by itself starts no library.

use crate::config::Fault;
use anyhow::{Error, Result};
use std::time::Duration;

/// Who starts processes, and the variables of how many there are, of this one's rank, and of how many are on this host. The
/// first that tells all three counts: mpirun and mpiexec start theirs through srun where Slurm is there, and srun sets what PMI
/// wants (`--mpi=pmi2`), but not how many are on the host.
const LAUNCHERS: [(&str, [&str; 3]); 3] = [
    ("mpirun", ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"]),
    ("mpiexec", ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"]),
    // SLURM_NTASKS also stands where a batch script starts one process by itself; this one does not.
    ("srun", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"]),
];

/// Number of the host among those of the step, under srun.
const HOST_OF_STEP: &str = "SLURM_NODEID";

/// How long another rank than 0 keeps a mistake to itself that it finds before it has joined. Rank 0, which has the same TOML,
/// has said it by then, and the launcher has ended the others, which takes mpirun a second or two; who is still there found a
/// mistake of its own.
pub const FIRST_WORD: Duration = Duration::from_secs(4);

/// How long a rank that has said why it ends stays, so that the launcher, which ends all others when the first one goes, passes on
/// what everybody said: rank 0, whose exit code it is to be, and any other one.
const LAST_WORD: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// A process that was started with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Who started them.
    pub by: &'static str,
    /// This one's rank.
    pub rank: usize,
    /// How many there are; more than one.
    pub processes: usize,
    /// How many of them are on this host, as far as that is told.
    pub local: usize,
}

impl Launched {
    /// What the environment says; `None` for a process by itself, also where mpirun was told to start one.
    pub fn from_environment() -> Option<Launched> {
        Launched::read(&|name| std::env::var(name).ok())
    }

    fn read(variable: &dyn Fn(&str) -> Option<String>) -> Option<Launched> {
        let number = |name: &str| variable(name)?.parse::<usize>().ok();
        let host = number(HOST_OF_STEP).unwrap_or(0);
        let told = LAUNCHERS.iter().filter_map(|(by, [processes, rank, local])| {
            let (processes, rank) = (number(processes)?, number(rank)?);
            let local = variable(local).and_then(|text| text.parse().ok().or(on_host(&text, host)));
            Some((Launched { by, rank, processes, local: local.unwrap_or(1) }, local.is_some()))
        });
        // Who does not tell how many are on the host is believed where nobody does.
        let told: Vec<(Launched, bool)> = told.collect();
        let first = told.iter().find(|(_, is_whole)| *is_whole).or(told.first());
        let (launched, _) = first.filter(|(launched, _)| launched.processes > 1)?;
        let local = launched.local.clamp(1, launched.processes);
        Some(Launched { local, ..launched.clone() })
    }

    /// What was typed before the program to start these processes, as far as it can be known: all of it under mpirun, where the
    /// processes are alike; else who starts how many.
    pub fn prefix(&self) -> Vec<String> {
        let own: Vec<String> = std::env::args().collect();
        let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
        let typed = parent.and_then(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).ok());
        let typed =
            typed.map(|line| String::from_utf8_lossy(&line).into_owned()).unwrap_or_default();
        let typed: Vec<&str> = typed.trim_end_matches('\0').split('\0').collect();
        before(&own, &typed).unwrap_or_else(|| self.plain_prefix(&|name| std::env::var(name).ok()))
    }

    fn plain_prefix(&self, variable: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
        let mut words = vec![self.by.to_string()];
        // What srun was told, or its cluster is set to, of how processes find each other.
        let how = variable("SLURM_MPI_TYPE").filter(|how| self.by == "srun" && how != "none");
        words.extend(how.map(|how| format!("--mpi={how}")));
        words.extend(["-n".to_string(), self.processes.to_string()]);
        words
    }

    /// What this rank says of a mistake that it finds before it has joined the others: rank 0 as it is, any other one
    /// so much later, with its name.
    pub fn words(&self, mistake: Error, later: Duration) -> Error {
        if self.rank == 0 {
            return mistake;
        }
        std::thread::sleep(later);
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        mistake.context(format!("rank {} of {} on {host}", self.rank, self.processes))
    }

    /// Stays a moment after its last words.
    pub fn linger(&self) {
        std::thread::sleep(LAST_WORD[usize::from(self.rank > 0)]);
    }

    /// Refuses several processes where the build knows no MPI.
    pub fn require_mpi(&self) -> Result<()> {
        match cfg!(feature = "mpi") {
            true => Ok(()),
            false => Err(Fault::user(format!(
                "{} started {} processes, and this binary was built for one; build it with `cargo build --release \
                 --features mpi` (that needs an MPI library and libclang), or start one process",
                self.by, self.processes
            ))),
        }
    }
}

#[cfg(feature = "mpi")]
/// What the launcher calls this start of processes; nothing if it has no name for it.
pub fn job() -> String {
    let named = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID"];
    named.iter().find_map(|name| std::env::var(name).ok()).unwrap_or_default()
}

/// Names of mpirun; Open MPI 5 goes on as prterun, which stands beside it.
const MPIRUN: [&str; 4] = ["mpirun", "mpiexec", "orterun", "prterun"];

/// The words before this program's own in the command line of an mpirun; `None` if that line is another's, or starts
/// other processes too.
fn before(own: &[String], typed: &[&str]) -> Option<Vec<String>> {
    let (launcher, program) = (typed.first()?, typed.len().checked_sub(own.len())?);
    let name = launcher.rsplit('/').next()?;
    if !MPIRUN.contains(&name) || program == 0 || typed[program..] != *own || typed.contains(&":") {
        return None;
    }
    let mut words: Vec<String> = typed[..program].iter().map(|word| word.to_string()).collect();
    words[0] = launcher.replace("prterun", "mpirun");
    Some(words)
}

/// How many processes are on a host, of a list such as "4" or, of several hosts, "4(x2),3".
fn on_host(list: &str, host: usize) -> Option<usize> {
    let mut first = 0;
    for part in list.split(',') {
        let (count, times) = part.split_once("(x").unwrap_or((part, "1)"));
        let times = times.strip_suffix(')')?.parse::<usize>().ok()?;
        first += times;
        if host < first {
            return count.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Option<Launched> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        Launched::read(&|name| find(name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn each_launcher_tells_rank_and_number() {
        let open = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let expected = Launched { by: "mpirun", rank: 3, processes: 4, local: 2 };
        assert_eq!(read(&open), Some(expected));
        let hydra = read(&[("PMI_SIZE", "2"), ("PMI_RANK", "0")]).unwrap();
        assert_eq!((hydra.by, hydra.rank, hydra.processes, hydra.local), ("mpiexec", 0, 2, 1));
        assert_eq!(read(&SLURM), Some(Launched { by: "srun", rank: 9, processes: 11, local: 3 }));
    }

    #[test]
    fn the_words_before_the_program_are_those_of_its_own_mpirun() {
        let own = ["target/rehearsal", "run", "a.toml"].map(String::from);
        let of = |line: &str| before(&own, &line.split(' ').collect::<Vec<_>>());
        let words = |line: &str| Some(line.split(' ').map(String::from).collect::<Vec<_>>());
        let line = "mpirun --oversubscribe -n 4 env X=1";
        assert_eq!(of(&format!("{line} target/rehearsal run a.toml")), words(line));
        let five = of("/opt/bin/prterun --with-ft ulfm -n 2 target/rehearsal run a.toml");
        assert_eq!(five, words("/opt/bin/mpirun --with-ft ulfm -n 2"));
        for other in [
            "mpirun -n 1 target/rehearsal run a.toml : -n 1 target/rehearsal run a.toml",
            "mpirun -n 1 target/rehearsal run b.toml",
            "bash target/rehearsal run a.toml",
            "target/rehearsal run a.toml",
            "slurmstepd: [15.0]",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn without_its_words_a_launcher_starts_as_many_by_what_srun_was_told() {
        let shown = |by, how: Option<&str>| {
            let launched = Launched { by, rank: 0, processes: 2, local: 2 };
            launched.plain_prefix(&|_| how.map(String::from)).join(" ")
        };
        assert_eq!(shown("srun", Some("pmix")), "srun --mpi=pmix -n 2");
        assert_eq!(shown("srun", Some("none")), "srun -n 2");
        assert_eq!(shown("mpirun", Some("pmix")), "mpirun -n 2");
    }

    /// What a task of `srun -N 3 -n 11` has on its last host, as the manual of srun tells of its output environment.
    const SLURM: [(&str, &str); 10] = [
        ("SLURM_JOB_ID", "200505"),
        ("SLURM_JOB_NUM_NODES", "3"),
        ("SLURM_NTASKS", "11"),
        ("SLURM_NODEID", "2"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_PROCID", "9"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_NODES", "3"),
        ("SLURM_STEP_NUM_TASKS", "11"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
    ];

    #[test]
    fn whatever_speaks_for_a_task_of_srun_it_is_srun_s_and_under_slurm_mpirun_s_are_its_own() {
        let with = |others: &[(&'static str, &'static str)]| {
            let all: Vec<(&str, &str)> = SLURM.iter().chain(others).copied().collect();
            read(&all).unwrap()
        };
        // `--mpi=pmi2` and `--mpi=pmix`.
        let pmi2 = with(&[("PMI_SIZE", "11"), ("PMI_RANK", "9"), ("PMI_FD", "7")]);
        assert_eq!((pmi2.by, pmi2.rank, pmi2.processes, pmi2.local), ("srun", 9, 11, 3));
        let pmix = with(&[("PMIX_RANK", "9"), ("PMIX_NAMESPACE", "slurm.pmix.200505.0")]);
        assert_eq!((pmix.by, pmix.rank, pmix.processes, pmix.local), ("srun", 9, 11, 3));
        // Daemons of mpirun and mpiexec are a step of their own, of a task for each host.
        let open = with(&[
            ("OMPI_COMM_WORLD_SIZE", "44"),
            ("OMPI_COMM_WORLD_RANK", "40"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ]);
        assert_eq!((open.by, open.rank, open.processes, open.local), ("mpirun", 40, 44, 4));
        let hydra = with(&[("PMI_SIZE", "22"), ("PMI_RANK", "20"), ("MPI_LOCALNRANKS", "2")]);
        assert_eq!((hydra.by, hydra.rank, hydra.processes, hydra.local), ("mpiexec", 20, 22, 2));
        // A step of one, as `srun --pty bash` and an interactive `salloc` make it.
        assert_eq!(read(&[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_PROCID", "0")]), None);
    }

    #[test]
    fn a_list_of_hosts_tells_how_many_are_on_each() {
        let hosts =
            |list: &str| -> Vec<Option<usize>> { (0..4).map(|h| on_host(list, h)).collect() };
        assert_eq!(hosts("4(x2),3"), [Some(4), Some(4), Some(3), None]);
        assert_eq!(hosts("1,2(x3)"), [Some(1), Some(2), Some(2), Some(2)]);
        assert_eq!(hosts("6")[..2], [Some(6), None]);
        assert_eq!(hosts("x")[0], None);
    }

    #[test]
    fn a_mistake_is_said_by_rank_0_and_by_whoever_it_is_of() {
        let words = |rank| {
            let launched = Launched { by: "mpirun", rank, processes: 4, local: 2 };
            format!("{:#}", launched.words(Fault::user("a.toml: no such file"), Duration::ZERO))
        };
        assert_eq!(words(0), "a.toml: no such file");
        let other = words(3);
        let (first, last) = other.split_once(": ").unwrap();
        assert!(first.starts_with("rank 3 of 4 on "), "{other}");
        assert_eq!(last, "a.toml: no such file");
    }

    #[test]
    fn a_process_by_itself_is_no_rank() {
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")]), None);
        // Of a job of four processes, a batch script that starts this one without srun.
        assert_eq!(read(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]), None);
    }

    #[test]
    fn a_build_without_mpi_refuses_several_processes_and_names_the_feature() {
        let launched = Launched { by: "mpirun", rank: 1, processes: 2, local: 2 };
        match (cfg!(feature = "mpi"), launched.require_mpi()) {
            (true, Ok(())) => {}
            (false, Err(refusal)) => {
                let text = refusal.to_string();
                assert!(text.contains("mpirun started 2") && text.contains("--features mpi"));
                assert!(matches!(refusal.downcast_ref(), Some(Fault::User(_))));
            }
            (built, other) => panic!("{built} {other:?}"),
        }
    }
}
