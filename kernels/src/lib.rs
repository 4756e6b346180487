//! The arithmetic of Rehearsal: everything that touches a number in a tensor.
//!
//! Callers see [`Buffer`]s made by an [`Arena`], and one trait, [`Kernels`], whose methods are the
//! fused steps of a DeepSeek-V2 model. They never see a host slice of device memory: that is what
//! keeps one model definition good for a CPU, for the f64 reference and for CUDA.
//!
//! SIMD, cudarc and nearly all `unsafe` of the product live behind this wall.

// Memory, in reading order.
pub mod arena;
pub mod below;
pub mod buffer;
mod mapping;
pub mod random;
pub mod sizes;
pub mod slab;

// The trait and its implementations.
pub mod activity;
pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod format;
pub mod heap;
pub mod kernels;
pub mod machine;
pub mod packed;
pub mod profiled;
pub mod reference;
pub mod routing;

mod ops;
mod pool;

pub use activity::{Activity, Ongoing};
pub use arena::{Arena, Kind, OutOfMemory, Owner};
pub use attention::{AttentionShape, DecodeBatch};
pub use below::{Below, HostMemory, MappedFiles, SlabCopy};
pub use buffer::{Buffer, DType, View, ViewMut};
pub use cpu::CpuKernels;
pub use format::{CacheFormat, CacheLayout, CacheSpec, WeightFormat};
pub use kernels::{
    AdamW, HeadColumns, Kernels, Pack, Packed, Pairing, Product, ROW_GAP, RopeTable, SampleRow,
    Sampled, Store,
};
pub use machine::{Machine, Rates};
pub use profiled::{ActivityProfile, Profile, Profiled};
pub use reference::ReferenceKernels;
pub use routing::{BalanceSpec, DROPPED, DropCounts, DropSpec, RouteCounts, RouterSpec, Routes};
pub use slab::{Slab, SlabReader};
