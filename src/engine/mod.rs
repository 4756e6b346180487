//! What one device does: it holds models and moves between the layouts of training and of sampling.
//!
//! [`HybridEngine`] is the only door. It keeps the law of the phases (see [`phase`]) and moves idle models off
//! the device; the count of who holds how many bytes is the arena's own.

pub mod phase;

pub mod offload_plan;
pub mod timeline;

mod conductor;
pub mod offload;
mod shelf;
mod transfers;

mod parked_optimizer;
pub mod policy_files;
pub mod resident;

pub mod formats;
pub mod hybrid;
mod readying;
mod sampling;
mod saving;
mod scoring;
mod switch;

pub mod utilisation;

pub use crate::inference::scheduler::PREFILL_ROWS;
pub use formats::{Formats, weight_format};
pub use hybrid::{EngineSetup, HybridEngine, SavedState};
pub use phase::{Phase, PhaseReport, PrepareStage, Role, ScoreJob, SequenceScore};
pub use rehearsal_kernels::machine::{Machine, Rates};
pub use rehearsal_kernels::{Profile, heap};
pub use resident::check_weights;
pub use sampling::pages_of;
pub use scoring::ROWS_AT_ONCE;
pub use shelf::{Stretch, changes, needs};
pub use switch::{BUCKET, switches};
pub use transfers::RATE;
