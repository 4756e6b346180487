//! What a person sees: the journal of a run, the picture of its present state, lines on a terminal,
//! curves.
//!
//! Everything here is made from events and from one [`Board`]; nothing asks an actor or a tensor.

// The event log, and what an event looks like.
pub mod event;
pub mod journal;

// The present.
mod alive;
pub mod board;
mod board_text;

// For people.
pub mod heat_map;
pub mod lanes;
pub mod next_steps;
pub mod plain;
pub mod plot;
pub mod text;
pub mod timeline;

pub use board::{Board, BoardWriter};
pub use event::Event;
pub use heat_map::HeatMap;
pub use journal::{Journal, read_events};
pub use next_steps::TypedCommand;
pub use plain::Plain;
pub use plot::write_curves;
