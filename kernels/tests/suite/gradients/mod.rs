//! Finite differences: every backward of the reference kernels against central differences.
//!
//! The loss of a test is Σ r * y with random r, so that the gradient handed to the backward is r.
//! All in f64 with steps of 1e-5; the agreement asked for is 1e-7 of 1 + |gradient|.

mod attention;
mod experts;
mod products;
mod rows;

use crate::bench::Bench;
use rehearsal_kernels::{Arena, ReferenceKernels};

/// Runs `test` on a bench of reference kernels.
fn on_reference(test: impl Fn(&Bench<'_>)) {
    let kernels = ReferenceKernels::new(Arena::new(None));
    test(&Bench::new(&kernels));
}
