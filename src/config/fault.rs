//! Faults that end the program with an exit code of their own.
//!
//! Lowest floor, so that every module can say whose fault something is: a wrong input, a lack of
//! resources, or a signal. Everything else is an ordinary error and ends with 1. How a fault becomes
//! text and exit code is decided in one place, `cli::failure`.

use thiserror::Error;

/// What a fault says that going on cannot mend.
pub const START_AGAIN: &str = "start again with --fresh";

/// A failure that is not the program's own.
#[derive(Debug, Error)]
pub enum Fault {
    /// The user's input or configuration: exit code 2. The text names the place, the value and a way out.
    #[error("{0}")]
    User(String),
    /// Memory, disk or a budget: exit code 4.
    #[error("{0}")]
    Resources(String),
    /// A signal ended the run after a commit: exit code 128 + the signal's number.
    #[error("stopped by {}", signal_name(*.0))]
    Stopped(i32),
}

impl Fault {
    /// A fault of the user's input, ready to be returned as an error.
    pub fn user(text: impl Into<String>) -> anyhow::Error {
        Fault::User(text.into()).into()
    }

    /// A lack of resources, ready to be returned as an error.
    pub fn resources(text: impl Into<String>) -> anyhow::Error {
        Fault::Resources(text.into()).into()
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Fault::User(_) => 2,
            Fault::Resources(_) => 4,
            Fault::Stopped(signal) => u8::try_from(128 + signal).unwrap_or(1),
        }
    }
}

/// A signal's name, or its number if a run does not listen to it.
pub fn signal_name(signal: i32) -> String {
    match signal {
        1 => "SIGHUP".to_string(),
        2 => "SIGINT".to_string(),
        15 => "SIGTERM".to_string(),
        other => format!("signal {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_the_exit_code_of_the_contract() {
        assert_eq!(Fault::User(String::new()).exit_code(), 2);
        assert_eq!(Fault::Resources(String::new()).exit_code(), 4);
        assert_eq!(Fault::Stopped(1).exit_code(), 129);
        assert_eq!(Fault::Stopped(2).exit_code(), 130);
        assert_eq!(Fault::Stopped(15).exit_code(), 143);
        assert_eq!(Fault::Stopped(2).to_string(), "stopped by SIGINT");
    }
}
