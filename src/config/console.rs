//! `[console]`: how progress is shown.

use serde::{Deserialize, Serialize};

/// `[console]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// `--console` overrides it.
    pub mode: ConsoleMode,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleMode {
    /// A screen on a terminal (plain until the screen console is built), plain lines elsewhere.
    #[default]
    Auto,
    /// The full-screen console.
    Screen,
    /// One line a step.
    Plain,
    /// Nothing.
    Off,
}
