//! How an error ends the program: its exit code and its text.
//!
//! 0 done; 2 the user's input or config; 4 resources; 128 + n stopped by signal n; 1 anything else.

use crate::config::{ConfigError, Fault};
use rehearsal_kernels::OutOfMemory;
use std::io::{Error as IoError, ErrorKind};

/// An error whose words a person has already, from this process or from another one of the run.
#[derive(Debug, thiserror::Error)]
#[error("it was said why")]
pub struct Said {
    /// The exit code.
    pub code: u8,
}

/// Whether there is nothing left to say of an error.
pub fn is_said(error: &anyhow::Error) -> bool {
    error.is::<Said>()
}

/// The exit code of an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    // A fault may stand anywhere in the chain: as the error itself, as its cause, or as context.
    if let Some(fault) = error.downcast_ref::<Fault>() {
        return fault.exit_code();
    }
    if let Some(said) = error.downcast_ref::<Said>() {
        return said.code;
    }
    error.chain().find_map(cause_code).unwrap_or(1)
}

/// An error of these words that ends the program with this code.
pub fn with_code(words: &str, code: u8) -> anyhow::Error {
    match code {
        2 => Fault::user(words),
        4 => Fault::resources(words),
        _ => anyhow::Error::msg(words.to_string()),
    }
}

fn cause_code(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(fault) = cause.downcast_ref::<Fault>() {
        return Some(fault.exit_code());
    }
    if cause.is::<ConfigError>() {
        return Some(2);
    }
    if cause.is::<OutOfMemory>() {
        return Some(4);
    }
    let kind = cause.downcast_ref::<IoError>()?.kind();
    matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::OutOfMemory)
        .then_some(4)
}

/// True if the error only says that nobody reads the output any more (`rehearsal check | head`).
pub fn is_closed_output(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<IoError>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_fault_keeps_its_code_wherever_it_stands_in_the_chain() {
        let inner = Fault::user("no such file");
        assert_eq!(exit_code(&inner), 2);
        assert_eq!(exit_code(&inner.context("failed to open the model")), 2);
        let outer =
            anyhow!("cause").context(Fault::Resources("full".to_string())).context("while writing");
        assert_eq!(exit_code(&outer), 4);
        assert_eq!(exit_code(&Fault::Stopped(15).into()), 143);
        assert_eq!(exit_code(&anyhow!("anything else")), 1);
    }

    #[test]
    fn lack_of_memory_and_disk_ends_with_4() {
        let memory =
            OutOfMemory { owner: "policy/weights".to_string(), asked: 2, held: 1, budget: Some(2) };
        assert_eq!(exit_code(&anyhow::Error::new(memory).context("train")), 4);
        let disk: anyhow::Result<()> =
            Err(IoError::from(ErrorKind::StorageFull)).context("failed to write a shard");
        assert_eq!(exit_code(&disk.unwrap_err()), 4);
        assert_eq!(exit_code(&IoError::from(ErrorKind::NotFound).into()), 1);
    }

    #[test]
    fn output_that_nobody_reads_is_no_failure() {
        assert!(is_closed_output(
            &anyhow::Error::new(IoError::from(ErrorKind::BrokenPipe)).context("print")
        ));
        assert!(!is_closed_output(&anyhow!("x")));
    }
}
