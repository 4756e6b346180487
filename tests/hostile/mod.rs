//! Files that somebody else wrote, changed at random, against everything that reads one.
//!
//! One engine of mutations and one list of targets, mounted by `suite` (some thousands of inputs),
//! by `proof` (millions) and by the targets of `fuzz/`. What is measured is in [`campaign`].
#![allow(dead_code)] // Each binary that mounts this uses a part of it.

pub mod campaign;
pub mod meter;
pub mod mutate;
pub mod seeds;
pub mod targets;
pub mod tree;
