//! What a person sets: one TOML, one file here per table.
//!
//! Plain data only. Reading, `--set`, and every message about a wrong key or value are in [`run`];
//! a module takes its own table, never the whole [`RunConfig`].

pub mod failpoint;
pub mod fault;
pub mod limited;
pub mod run;

// How a document becomes typed tables, in the order it happens.
mod document;
mod json;
pub(crate) mod nearest;
mod overrides;
mod published;
mod reader;
mod validate;
mod validate_cluster;
mod validate_grpo;
mod validate_model;
mod validate_routing;
mod validate_stage;

pub mod checkpoint;
pub mod cluster;
pub mod console;
pub mod data;
pub mod dtype;
mod end_tokens;
pub mod engine;
mod eval;
pub mod hardware;
pub mod latent_scaling;
pub mod model;
pub mod routing;
pub mod stage;
pub mod stage_model;
pub mod tokenizer;
pub mod trained_sets;

pub use checkpoint::CheckpointConfig;
pub use cluster::ClusterConfig;
pub use console::{ConsoleConfig, ConsoleMode};
pub use data::{DataConfig, FieldMap, NeedleConfig, Schema, SetConfig, WordMachineConfig};
pub use dtype::Dtype;
pub use end_tokens::EndTokens;
pub use engine::{Bytes, EngineConfig, Offload};
pub use fault::Fault;
pub use hardware::{FloatType, HardwareConfig};
pub use latent_scaling::LatentScaling;
pub use model::{Attention, ModelConfig, ModelType, RopeScaling};
pub use run::{ConfigError, Loaded, RunConfig, load_model};
pub use stage::{Stage, StageKind};
pub use stage_model::model_folder;
pub use tokenizer::TokenizerConfig;
pub use trained_sets::TrainedSets;
pub use validate::MOST_THREADS;
pub use validate_cluster::idle_samplers;
pub use validate_model::MOST_POSITIONS;
