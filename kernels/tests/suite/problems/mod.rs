//! Problems: random inputs for one operation each, and the outputs that it gives on any device.
//!
//! A problem names its operation, how far an f32 device may be from the f64 reference (as a share
//! of 1 + |value|), and runs on a bench. Sizes are chosen to miss every tile width, and to be large
//! enough that several threads are used.

pub mod attention;
mod experts;
mod head;
mod products;
mod rows;

use crate::bench::{Bench, Output};

/// An operation with its inputs.
pub struct Problem {
    pub name: &'static str,
    pub tolerance: f64,
    pub run: fn(&Bench<'_>) -> Vec<Output>,
}

/// Every operation of the trait that computes.
pub fn all() -> Vec<Problem> {
    [products::PROBLEMS, rows::PROBLEMS, attention::PROBLEMS, experts::PROBLEMS, head::PROBLEMS]
        .into_iter()
        .flatten()
        .map(|(name, tolerance, run)| Problem { name, tolerance: *tolerance, run: *run })
        .collect()
}

/// Name, tolerance and body of a problem.
type Entry = (&'static str, f64, fn(&Bench<'_>) -> Vec<Output>);
