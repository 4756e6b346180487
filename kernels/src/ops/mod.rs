//! The operations of `CpuKernels`, one file each: shapes checked, work split into fixed pieces, loops.
//!
//! Every operation is a free function that takes [`Cx`] first and then the arguments of its trait
//! method. Loops are written once, in plain Rust or over [`lanes::Lanes`], and compiled once per
//! instruction set by [`Isa::run`].
//!
//! Invariants:
//!   * an output element is computed by one piece, so that the number of threads changes no bit
//!   * all instruction sets do the same floating-point operations in the same order
//!
//! ```text
//! foundations   lanes (16 floats), exp, transpose, operands and tile (the product), work (how it is split)
//! products      quantize (codes), pack, unpack, int8 (integers: products, _pack, _rows, _tile), linear, grouped
//! rows          rows, rms_norm, rope, swiglu
//! attention     cache_rows (every format), mla_train, mla_decode, mla_prefill
//! experts       router, balance, dropping, routes
//! head          head_logprob, logits_logprob, sample
//! optimizer     adamw
//! ```

pub(crate) mod exp;
pub(crate) mod lanes;
mod operands;
pub(crate) mod tile;
pub(crate) mod transpose;
pub(crate) mod work;

pub(crate) mod grouped;
pub(crate) mod int8;
mod int8_pack;
mod int8_rows;
mod int8_tile;
pub(crate) mod linear;
pub(crate) mod pack;
pub(crate) mod quantize;
pub(crate) mod unpack;

pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod swiglu;

pub(crate) mod cache_rows;
pub(crate) mod mla_decode;
pub(crate) mod mla_prefill;
pub(crate) mod mla_train;

pub(crate) mod balance;
pub(crate) mod dropping;
pub(crate) mod router;
pub(crate) mod routes;

pub(crate) mod head_logprob;
pub(crate) mod sample;

pub(crate) mod adamw;

#[cfg(test)]
mod agreement;
#[cfg(test)]
mod check;

use crate::arena::{Arena, Owner};
use crate::pool::Pool;

pub(crate) use lanes::{ISA_VARIABLE, Isa, Lanes, OnLanes};

/// What every operation works with.
pub(crate) struct Cx {
    /// The threads that share an operation's pieces.
    pub pool: Pool,
    /// The instruction set, picked once at start.
    pub isa: Isa,
    /// Where scratch buffers come from.
    pub arena: Arena,
    /// Who holds them.
    pub scratch: Owner,
}
