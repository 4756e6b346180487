//! Link: how frames get from one rank to another, whatever carries them.
//!
//! Knows no tensors and no groups; `collective` is made of it. A frame says which call it belongs to, so that ranks which
//! are not at the same call find out at once. Frames of one rank to another go in lanes: what the ranks do in one order
//! shares a lane, and what each does in an order of its own (stages of a pipeline) has one for itself.
//!
//! Invariants:
//!   * frames of one rank to another arrive once, and in order within a lane
//!   * no wait outlasts its deadline without progress of whom it is for, and every end of one says who that was (`wait`)

use super::carrier::Carrier;
use super::progress::Board;
use super::wait;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What frames of one rank to another keep their order in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lane {
    /// All collectives.
    Groups,
    /// Activations on their way up to a piece of the stack.
    Up(u32),
    /// Their gradients on their way down to a piece of the stack.
    Down(u32),
    /// Weights on their way to another layout.
    Switch,
}

/// What ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// One after another: everybody is there.
    Barrier,
    /// One rank's numbers to all.
    Broadcast,
    /// The sum of all ranks' numbers, a part for each.
    ReduceScatter,
    /// All ranks' parts to all.
    AllGather,
    /// All ranks' parts to one.
    Gather,
    /// A part of its own from each to each.
    AllToAll,
    /// From one rank to another.
    Pass,
}

/// The call that a frame belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// What it is for, e.g. "gradients of stage 0".
    pub name: String,
    /// What the ranks do.
    pub operation: Operation,
    /// Number of the call in its group, or between its two ranks.
    pub number: u64,
    /// Elements of the whole.
    pub elements: usize,
    /// Bytes of an element.
    pub width: usize,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Call { name, operation, number, elements, width } = self;
        write!(f, "call {number}, {operation:?} of {elements} elements of {width} bytes for {name}")
    }
}

/// A message between ranks.
#[derive(Clone, Debug)]
pub struct Frame {
    /// What it keeps its order in.
    pub lane: Lane,
    /// What it belongs to.
    pub call: Call,
    /// What it carries.
    pub bytes: Vec<u8>,
}

/// Why ranks no longer work together. None of them goes on after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Broken {
    /// A rank that others wait for did nothing for too long.
    #[error(
        "rank {rank} waited in {call} for rank {missing}, which made no progress for {seconds} s{last}"
    )]
    Late {
        /// Who waited.
        rank: usize,
        /// For whom.
        missing: usize,
        /// In which call, and who is between the two.
        call: String,
        /// How long the missing one may do nothing.
        seconds: u64,
        /// What it was last at, as the end of a sentence.
        last: String,
    },
    /// A rank's process gave no sign of life.
    #[error("rank {missing}, {name}, gave rank {rank} no sign of life for {seconds} s{last}")]
    Silent {
        /// Who listened.
        rank: usize,
        /// Who was silent.
        missing: usize,
        /// What that one is called.
        name: String,
        /// How long.
        seconds: u64,
        /// What it was last at, as the end of a sentence.
        last: String,
    },
    /// A rank did not answer while the ranks became a run.
    #[error(
        "rank {missing} did not answer rank {rank} within {seconds} s, which waited for {what}; see whether its host can be \
         reached and its process runs, or raise cluster.deadline_seconds"
    )]
    Absent {
        /// Who waited.
        rank: usize,
        /// For whom.
        missing: usize,
        /// For what.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// Ranks are at different calls.
    #[error("rank {rank} is at {call}, rank {other} at {theirs}")]
    Apart {
        /// Who found it.
        rank: usize,
        /// Its call.
        call: String,
        /// The other rank.
        other: usize,
        /// Its call.
        theirs: String,
    },
    /// A rank is no longer there.
    #[error("rank {gone} is gone: {found}")]
    Gone {
        /// Who found it.
        rank: usize,
        /// Who is gone.
        gone: usize,
        /// How that is known.
        found: String,
    },
    /// A rank could not do its part.
    #[error("rank {rank}: {why}")]
    Failed {
        /// Which.
        rank: usize,
        /// Why.
        why: String,
        /// The exit code that its error has.
        code: u8,
    },
}

/// One rank's ends of the connections with all others.
pub trait Link: Send + Sync {
    /// This rank.
    fn rank(&self) -> usize;

    /// Sends a frame; does not wait for the other to take it.
    fn send(&self, to: usize, frame: Frame) -> Result<(), Broken>;

    /// The next frame of a rank in a lane, if it has come by then; `call` is what it is wanted for.
    fn take(
        &self,
        from: usize,
        lane: Lane,
        call: &Call,
        until: Instant,
    ) -> Result<Option<Frame>, Broken>;

    /// How far the ranks are.
    fn board(&self) -> &Arc<Board>;

    /// Tells all ranks why this one stops; their waits end with the same words.
    fn stop(&self, why: &Broken);

    /// Why the ranks have stopped, if they have.
    fn stopped(&self) -> Option<Broken>;

    /// What carries long payloads of exchanges beside the link, if anything does: on all ranks, or on none.
    fn carrier(&self) -> Option<&dyn Carrier> {
        None
    }

    /// The next frame of a rank in a lane. Waits for it for as long as that rank makes progress, and then `deadline`.
    fn receive(
        &self,
        from: usize,
        lane: Lane,
        call: &Call,
        deadline: Duration,
    ) -> Result<Frame, Broken> {
        wait::receive(self, from, lane, call, deadline)
    }
}
