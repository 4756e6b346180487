//! What a device is working on, as its caller says it: the rows by which a profile tells time apart.
//!
//! An activity changes no number and no order of operations; only [`Profiled`](crate::Profiled) listens.

use crate::kernels::Kernels;
use serde::Serialize;
use std::sync::Arc;

/// What the operations of a while are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// Models are read from files and written to them.
    Load,
    /// The device moves from one phase to another: weights are packed, idle models leave or return.
    Switch,
    /// A sampler takes prompts in.
    Prefill,
    /// A sampler draws tokens.
    Decode,
    /// Whole sequences are scored.
    Score,
    /// The forward passes of a training step.
    Forward,
    /// Its backward passes.
    Backward,
    /// Its update, and the packing of the new weights.
    Update,
    /// Nothing: the device waits for its callers.
    #[default]
    Outside,
}

impl Activity {
    /// All of them, in the order of a table.
    pub const ALL: [Activity; 9] = [
        Activity::Load,
        Activity::Switch,
        Activity::Prefill,
        Activity::Decode,
        Activity::Score,
        Activity::Forward,
        Activity::Backward,
        Activity::Update,
        Activity::Outside,
    ];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Activity::Load => "load and save",
            Activity::Switch => "switch of phase",
            Activity::Prefill => "generate: prefill",
            Activity::Decode => "generate: decode",
            Activity::Score => "score",
            Activity::Forward => "train: forward",
            Activity::Backward => "train: backward",
            Activity::Update => "train: update and packing",
            Activity::Outside => "outside of the engine",
        }
    }

    /// Tells the device that it begins, and when the result is dropped that the device is outside again.
    pub fn begin(self, kernels: &Arc<dyn Kernels>) -> Ongoing {
        kernels.enter(self);
        Ongoing(kernels.clone())
    }
}

/// See [`Activity::begin`].
pub struct Ongoing(Arc<dyn Kernels>);

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.0.enter(Activity::Outside);
    }
}
