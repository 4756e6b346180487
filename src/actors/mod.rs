//! Who acts: thin, asynchronous actors that hold no tensor.
//!
//! A run is started by [`start`]; `bench grpo` drives the same actors through [`bench_grpo`]. Read `director` for the
//! loop and `messages` for everything that is said; actors reach each other through `port` only.

// What is said, and how.
pub mod messages;
pub mod port;
pub mod post;

// Who leads.
mod alignment;
pub mod bench;
pub mod director;
mod evals;
mod stage_plan;

// Who works.
pub mod checkpointer;
pub mod fine_tuner;
pub mod monitor;
pub mod policy_updater;
pub mod pretrainer;
mod reader;
pub mod reward_scorer;
mod rollout_file;
pub mod rollout_generator;
pub mod worker;

// Who sets up and watches.
pub mod company;
mod staff;
pub mod supervisor;

#[cfg(test)]
mod arbitrary;
#[cfg(test)]
mod tests;

pub use bench::{BenchRequest, bench_grpo};
pub use company::{RunRequest, start};
