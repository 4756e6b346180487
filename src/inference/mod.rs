//! Forward only: sampling with continuous batching over a paged latent cache, and scoring through
//! it.
//!
//! Knows pages, sequences and rows, but no weights and no device: the model is behind [`Forward`],
//! so that every rule here is tested without one.

// What is asked for and handed out.
pub mod job;

// Who holds what, from a page to a batch.
pub mod pages;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

// The loops.
pub mod generate;
pub mod score;

#[cfg(test)]
mod oracle;

pub use generate::{Forward, Limits, generate};
pub use job::{DecodePasses, GenerateJob, GenerateReport, GenerateRequest, TokenGroup};
pub use score::{ForwardRows, read_decoded, score_decoded};
