//! A cluster in simulated time: what ranks do and send each other, one event after the other.
//!
//! [`engine`] knows lines of work, links and meetings, and nothing of models; [`programs`] writes down what each rank does in
//! a step of training, from the real schedules and layouts. Nothing here is measured.

pub mod engine;
pub mod programs;

pub use engine::{Act, Channel, Links, Outcome, Program, Span, What, simulate};
