//! Launch: what mpirun or srun say of the processes beside this one.
//!
//! They tell each process its rank in the environment, before any library has started; so a build without MPI knows that it
//! is one of several, and a process that was started by itself starts no library.

use crate::config::Fault;
use anyhow::Result;

/// Who starts processes, and the variables of how many there are, of this one's rank, and of how many are on this host.
const LAUNCHERS: [(&str, [&str; 3]); 3] = [
    ("mpirun", ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"]),
    ("mpiexec", ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"]),
    // SLURM_NTASKS also stands where a batch script starts one process by itself; this one does not.
    ("srun", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"]),
];

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
        // srun writes "4" or, of several hosts, "4(x2),3".
        let number = |name: &str| {
            let text = variable(name)?;
            let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            text[..end].parse::<usize>().ok()
        };
        LAUNCHERS.iter().find_map(|(by, [processes, rank, local])| {
            let (processes, rank) = (number(processes)?, number(rank)?);
            let local = number(local).unwrap_or(1).clamp(1, processes);
            (processes > 1).then_some(Launched { by, rank, processes, local })
        })
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
        let slurm = [
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_PROCID", "9"),
            ("SLURM_STEP_TASKS_PER_NODE", "8(x2)"),
        ];
        assert_eq!(read(&slurm), Some(Launched { by: "srun", rank: 9, processes: 16, local: 8 }));
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
