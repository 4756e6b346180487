//! Tests of the kernels through their public trait: one binary, one module per question.
//!
//!   * `gradients`: is every backward the derivative of its forward? (reference kernels)
//!   * `goldens`, `balance`: does a device do what the paper says? (numbers worked out by hand, both devices)
//!   * `routing`: does that hold for a hundred thousand tokens, equal scores and underflow among them?
//!   * `agreement`: does the CPU compute what the reference defines? (written tolerances)
//!   * `invariance`: do threads, row splits and batch pieces leave every bit alone?
//!   * `formats`: what is left of weights that are kept in few bits, and is it the same everywhere?
//!   * `cuda`: does the seam to a GPU hold? (skipped aloud where there is none)
//!
//! `bench` makes buffers and compares; `problems` are the random problems of the comparisons.

mod agreement;
mod balance;
mod bench;
#[cfg(feature = "cuda")]
mod cuda;
mod formats;
mod goldens;
mod gradients;
mod invariance;
mod problems;
mod routing;
