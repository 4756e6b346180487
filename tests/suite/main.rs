//! The suite: one binary, one module per capability.

mod runs;
mod tiny;
mod training;

mod alignment;
mod architectures;
mod attention;
mod budget;
mod edges;
mod end_to_end;
mod engine;
mod experts;
mod faults;
mod formats;
mod gguf;
mod interop;
mod model;
mod needle;
mod oracle;
mod prefill;
mod requirements;
mod routing;
mod signals;
mod targets;
mod tidy;
