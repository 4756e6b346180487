//! The suite: one binary, one module per capability.

mod tiny;

mod engine;
mod model;
mod oracle;
mod tidy;
