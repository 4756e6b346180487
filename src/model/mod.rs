//! What is learned: a DeepSeek-V2 transformer or the dense one that it is compared with, layer by layer, with explicit
//! backward passes.
//!
//! Every module has `forward`, `backward_input` (B: what the layer below waits for) and
//! `backward_weight` (W: may run later), over [`Kernels`](rehearsal_kernels::Kernels). There is no autograd.
//! Knows nothing of losses, optimizers or phases.

// What a model counts and costs, from its config alone.
pub mod cost;
pub mod parameters;

// What a model is made of.
pub mod documents;
pub mod params;
pub mod part;
pub mod pass;
pub mod placement;
pub mod rope;

// From the bottom of a block to the whole stack.
pub mod linear;
pub mod norm;

pub mod attention;
pub mod dispatch;
pub mod gqa;
pub mod mla;
pub mod mlp;
pub mod moe;
mod per_head;
pub mod prefill;
pub mod tensor_ranks;

pub mod block;
pub mod heads;
pub mod transformer;

// The sampler's memory.
pub mod cache;

// What all of it holds in memory, beforehand.
pub mod pass_bytes;
pub mod weight_bytes;

pub use cache::{DecodeRows, LatentCache, cache_layout};
pub use cost::{flops_per_token, forward_flops_per_token};
pub use dispatch::ExpertRanks;
pub use documents::{Documents, Family, places};
pub use parameters::{Parameters, parameters};
pub use params::{Gradients, Layout, Params};
pub use part::Part;
pub use pass::{Capacity, Pass, PassError};
pub use tensor_ranks::TensorRanks;
pub use transformer::{PackFor, PackedModel, Transformer};
