//! The suite: one binary, one module per capability.

mod tiny;

mod model;
mod tidy;
