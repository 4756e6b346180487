//! The suite: one binary, one module per capability.

mod tiny;

mod edges;
mod end_to_end;
mod engine;
mod model;
mod oracle;
mod tidy;
