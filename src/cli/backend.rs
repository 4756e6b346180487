//! Backend: what carries the exchanges of a run of several processes, as `cluster.backend` says.

use crate::config::cluster::Backend;
use crate::config::{ConfigError, Loaded};

/// Refuses NCCL where it has nothing to carry, or this build does not know it.
pub fn require_backend(loaded: &Loaded, processes: usize) -> Result<(), ConfigError> {
    let why = match loaded.config.cluster.backend {
        Backend::Mpi => return Ok(()),
        Backend::Nccl if processes == 1 => {
            "carries between processes, and this is one; start several, or leave the key out"
        }
        Backend::Nccl if !cfg!(feature = "cuda") => {
            "wants a build with `--features cuda,mpi`; leave the key out, and exchanges go over MPI"
        }
        Backend::Nccl => return Ok(()),
    };
    Err(loaded.fault(&["cluster", "backend"], format!("backend = \"nccl\" {why}")))
}

#[cfg(all(feature = "mpi", feature = "cuda"))]
mod over_nccl {
    use super::*;
    use crate::cluster::nccl::Nccl;
    use crate::cluster::{Link, Team};
    use anyhow::Result;
    use rehearsal_kernels::cuda::NcclDevice;
    use std::sync::Arc;

    /// Has the team's exchanges go over NCCL if the config says so, and tells what a person is to know of it. `names` are
    /// those of the processes.
    pub fn connect(loaded: &Loaded, names: &[String], team: &mut Team) -> Result<Option<String>> {
        if loaded.config.cluster.backend == Backend::Mpi {
            return Ok(None);
        }
        let open = || NcclDevice::open(place_on_host(names, team.rank()));
        let nccl = Nccl::join(team.link.clone(), names.len(), team.deadline, open)?;
        let told = format!("exchanges go over NCCL, between {}", nccl.gpus().join(", "));
        team.link = Arc::new(nccl) as Arc<dyn Link>;
        Ok(Some(told))
    }
}

#[cfg(all(feature = "mpi", feature = "cuda"))]
pub use over_nccl::connect;

/// Leaves the team's exchanges to MPI: a build without GPUs refuses all else beforehand.
#[cfg(all(feature = "mpi", not(feature = "cuda")))]
pub fn connect(
    _: &Loaded,
    _: &[String],
    _: &mut crate::cluster::Team,
) -> anyhow::Result<Option<String>> {
    Ok(None)
}

/// How many ranks before this one are on its host; names are of processes, each with its host behind the last blank.
#[cfg(any(all(feature = "mpi", feature = "cuda"), test))]
fn place_on_host(names: &[String], rank: usize) -> usize {
    let host = |name: &String| name.rsplit(' ').next().map(str::to_string);
    names[..rank].iter().filter(|name| host(name) == host(&names[rank])).count()
}

#[cfg(test)]
mod tests {
    use super::super::loaded;
    use super::*;

    #[test]
    fn nccl_is_refused_for_one_process_and_by_a_build_without_gpus() {
        let nccl = loaded(&["cluster.backend=nccl"]);
        let refusal = require_backend(&nccl, 1).unwrap_err().to_string();
        assert!(refusal.starts_with("--set cluster.backend=nccl: "), "{refusal}");
        assert!(refusal.contains("carries between processes, and this is one"), "{refusal}");
        match (cfg!(feature = "cuda"), require_backend(&nccl, 2)) {
            (true, Ok(())) => {}
            (false, Err(refusal)) => {
                let text = refusal.to_string();
                assert!(text.contains("cluster.backend") && text.contains("cuda,mpi"), "{text}");
            }
            (built, other) => panic!("{built} {other:?}"),
        }
        require_backend(&loaded(&[]), 1).unwrap();
    }

    #[test]
    fn a_rank_counts_those_before_it_on_its_host() {
        let names = ["process 7 on a", "process 8 on b", "process 9 on a", "process 7 on b"];
        let names = names.map(str::to_string);
        assert_eq!([0, 1, 2, 3].map(|rank| place_on_host(&names, rank)), [0, 0, 1, 1]);
    }
}
