//! How weights change: learning rate, objective, optimizer, and the step that joins them.
//!
//! Knows the model and plain rollouts; nothing of phases, files or actors.

pub mod job;
pub mod learning_rate;
pub mod objective;
pub mod optimizer;
pub mod pipeline;
pub mod ranks;
pub mod rollouts;
pub mod routing;
pub mod stages;
pub mod step;
pub mod zero;

pub use learning_rate::learning_rate;
pub use objective::{Items, Micro};
pub use optimizer::Optimizer;
pub use ranks::Ranks;
pub use rollouts::Rollouts;
pub use step::{Trainee, train_step};
