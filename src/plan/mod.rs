//! What a run will cost, before it starts: parameters, bytes by phase and owner, FLOPs, tokens, disk, time.
//!
//! Arithmetic on the config alone; reads no file and touches no device. Counts of parameters, tensors
//! and cache bytes are exact, everything else is an estimate and says so.

// Of a run that is spread over many processes.
pub mod cluster;
pub mod ranks;
pub mod simulation;

// Exact.
pub mod comparison;
pub mod cost;

// Estimates.
pub mod estimate;
pub mod host;
pub mod limit;
pub mod memory;
pub mod offload;

pub use cluster::{ClusterPlan, PlanError, cluster_picture, cluster_plan};
pub use comparison::{Comparison, compare};
pub use cost::{Utilisation, cache_bytes_per_token, cache_elements_per_token, utilisation};
pub use estimate::{Estimate, StageEstimate, estimate};
pub use host::host_bytes;
pub use memory::{Memory, StageMemory, model_memory};
pub use offload::{OffloadPlan, offload};
pub use ranks::{DeviceMemory, device_memory};
