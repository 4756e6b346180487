//! Proof: what the suite tries in thousands, in millions. Behind the feature `proof`, outside CI:
//! `cargo test --release --features proof,mpi --test proof -- --nocapture --test-threads 1`.

#[path = "../exact/mod.rs"]
mod exact;
#[path = "../hostile/mod.rs"]
mod hostile;
#[allow(dead_code, reason = "the suite's; of its runs only the finished one is wanted")]
#[path = "../suite/runs.rs"]
mod runs;

#[allow(dead_code, reason = "the suite's")]
#[path = "../suite/checkpoints.rs"]
mod checkpoints;
#[path = "../suite/ranks.rs"]
mod ranks;
#[allow(dead_code, reason = "the suite's")]
#[path = "../suite/tiny.rs"]
mod tiny;

#[cfg(feature = "mpi")]
#[allow(dead_code, reason = "the suite's")]
#[path = "../suite/mpirun.rs"]
mod mpirun;
#[cfg(feature = "mpi")]
#[allow(dead_code, reason = "the suite's")]
#[path = "../suite/process_runs.rs"]
mod process_runs;

#[cfg(feature = "mpi")]
mod deaths;
mod exact_steps;
mod hostile_files;
mod layout_pairs;
mod layouts;
