//! Who acts: thin, asynchronous actors that hold no tensor.
//! A run is made by [`start`]; `bench grpo` drives the same actors through [`bench_grpo`]. Read
//! `director` for the loop and `messages` for everything that is said; actors reach each other
//! through ports only, and `supervisor` and `roll_call` keep them at work.

// What is said, and how.
mod contents;
pub mod messages;
pub mod port;
pub mod post;
// Who leads.
mod aligned;
mod alignment;
mod bench;
mod comparing;
pub mod director;
pub mod director_ports;
mod evals;
mod journal_lines;
pub mod stage_plan;
// Who works.
#[cfg(test)]
mod arbitrary;
mod checkpointer;
pub mod company;
mod courier;
mod crew;
mod deputy;
mod entry;
mod fine_tuner;
mod handing_over;
pub mod mail;
mod monitor;
mod outpost;
mod policy_updater;
mod pretrainer;
mod reader;
mod reward_scorer;
mod roll_call;
mod rollout_file;
mod rollout_generator;
mod rollout_watch;
mod staff;
pub mod stage_data;
pub mod supervisor;
#[cfg(test)]
mod tests;
pub mod worker;

pub use bench::{BenchRequest, bench_grpo};
pub use entry::{Processes, RunRequest, dismiss, start};
pub use stage_data::check_stage_data;
