//! Programs that judge a reply: text to a score with a reason.
//!
//! No tensors, no tokens, no panics: replies are hostile text. Everything runs in time linear in
//! the reply; expressions and patterns are bounded.

mod annotations;
mod answer;
mod expression;
mod number;
mod pattern;
pub mod verdict;

pub use verdict::{Verdict, check_answer, verify};
