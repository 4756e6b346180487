//! Rehearsal: pretrains, aligns and exports DeepSeek-V2 models, from one TOML.
//!
//! The floors, from the ground up; a folder may use those below it, never those above:
//!
//! * `rehearsal_kernels` (a crate of its own): buffers, arenas, and the fused steps of the model
//! * [`config`]: what a person sets; [`console`]: what a person sees
//! * [`data`]: what it eats; [`cluster`]: where it runs
//! * [`model`]: what is learned; [`rl`]: what is judged; [`checkpoint`]: what is kept
//! * [`train`]: how weights change; [`inference`]: forward only
//! * [`engine`]: what one device does; [`plan`]: what a run will cost
//! * [`actors`]: who acts; [`cli`]: what a person says
//!
//! A good first walk: `actors/director.rs`, `actors/messages.rs`, `engine/hybrid.rs`, `train/step.rs` or
//! `inference/generate.rs`, `model/transformer.rs`.

pub mod config;
pub mod console;

pub mod cluster;
pub mod data;

pub mod checkpoint;
pub mod model;
pub mod rl;

pub mod inference;
pub mod train;

pub mod engine;
pub mod plan;

pub mod actors;
pub mod cli;
