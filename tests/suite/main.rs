//! The suite: one binary, one module per capability.

#[path = "../exact/mod.rs"]
mod exact;
#[path = "../hostile/mod.rs"]
mod hostile;
#[cfg(feature = "mpi")]
mod mpirun;
mod runs;
mod tiny;
mod training;

mod ahead;
mod alignment;
mod architectures;
mod attention;
mod budget;
mod checkpoint_faults;
mod checkpoints;
mod cluster_plan;
mod edges;
mod end_to_end;
mod engine;
mod exactness;
mod experts;
#[cfg(feature = "mpi")]
mod fault_tolerance;
mod faults;
mod formats;
mod gguf;
mod heap;
mod hostile_files;
mod interop;
mod model;
mod needle;
mod offload;
mod oracle;
mod prefill;
#[cfg(feature = "mpi")]
mod process_checkpoints;
#[cfg(feature = "mpi")]
mod process_nccl;
#[cfg(feature = "mpi")]
mod process_runs;
#[cfg(feature = "mpi")]
mod process_srun;
#[cfg(feature = "mpi")]
mod process_starts;
#[cfg(feature = "mpi")]
mod processes;
mod profile;
mod rank_memory;
mod ranks;
mod ranks_engine;
mod ranks_tensor;
mod requirements;
mod rollout_formats;
mod rollouts;
mod routing;
mod signals;
mod targets;
mod tidy;
#[cfg(feature = "mpi")]
mod two_hosts;
