//! `[checkpoint]`: when to commit and how much to keep.

use serde::{Deserialize, Serialize};

/// `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between commits; the end of a stage always commits.
    pub every_steps: u64,
    /// Seconds after which a step boundary commits in any case.
    pub every_seconds: u64,
    /// Committed checkpoints that are kept.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 20, every_seconds: 300, keep: 2 }
    }
}
