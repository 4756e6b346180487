//! What routing is told and what it tells: how experts are chosen, balanced, dropped and laid into slots.
//!
//! Experts lie in groups of equal size; a group stands for the device that would hold it. D groups, of which a token may
//! use M (DeepSeek-V2, section 2.2). Knows no tensors' contents; the operations are methods of
//! [`Kernels`](crate::Kernels).

use crate::buffer::Buffer;

/// Stands for an expert in the choices of a token, and for a slot in [`Routes::slot`], where the pair was dropped.
pub const DROPPED: u32 = u32::MAX;

/// How a router chooses experts (DeepSeek-V2, section 2.2.2).
#[derive(Clone, Copy, Debug)]
pub struct RouterSpec {
    /// Groups of contiguous experts; 1 for plain greedy.
    pub groups: usize,
    /// Groups kept by their maximum score.
    pub top_groups: usize,
    /// Experts a token, K.
    pub top_k: usize,
    /// `routed_scaling_factor`.
    pub scale: f64,
    /// `norm_topk_prob`: weights are divided by their sum (+1e-20) and the scale is *not* applied.
    pub normalize: bool,
}

/// The balance losses (DeepSeek-V2, section 2.2.3).
#[derive(Clone, Copy, Debug)]
pub struct BalanceSpec {
    /// Groups of contiguous experts, D.
    pub groups: usize,
    /// Groups a token may use, M.
    pub top_groups: usize,
    /// Weight α1 of the expert-level loss.
    pub expert: f64,
    /// Weight α2 of the device-level loss.
    pub device: f64,
    /// Weight α3 of the communication loss.
    pub communication: f64,
    /// Sequences that the mean is taken over: those of the whole step, of which a pass may hold only some.
    pub sequences: usize,
}

/// How many (token, choice) pairs a device may process (DeepSeek-V2, section 2.2.4).
#[derive(Clone, Copy, Debug)]
pub struct DropSpec {
    /// Groups of contiguous experts, D.
    pub groups: usize,
    /// Pairs that a device may process, as a multiple of an even share.
    pub capacity_factor: f64,
}

impl DropSpec {
    /// Pairs of one sequence, which has `pairs` of them in all, that one device may process: ceil(cf * pairs / D). The
    /// small constant keeps a factor of 1.1 on 100 pairs from making 111 of 110.00000000000001.
    pub fn budget(&self, pairs: usize) -> usize {
        let even = self.capacity_factor * pairs as f64 / self.groups as f64;
        (even - 1e-9).ceil().max(1.0) as usize
    }
}

/// Pairs that did not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DropCounts {
    /// Pairs that were dropped.
    pub dropped: u64,
    /// Pairs beyond the budget that stayed, because their sequence is protected.
    pub overflow: u64,
}

/// Where the tokens of a pass want to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteCounts {
    /// Tokens that chose each expert.
    pub experts: Vec<u32>,
    /// Groups that hold a chosen expert, summed over tokens.
    pub devices: u64,
}

/// A counting sort of the (token, choice) pairs by expert: slot order is expert, then token. A dropped pair has no slot.
pub struct Routes {
    /// Number of experts E.
    pub experts: usize,
    /// First slot of each expert and the total S: `U32 [E + 1, 1]`.
    pub offsets: Buffer,
    /// Token of each slot: `U32 [S, 1]`.
    pub token: Buffer,
    /// Slot of each (token, choice), or [`DROPPED`]: `U32 [T, K]`.
    pub slot: Buffer,
}

impl Routes {
    /// Number of slots S: T x K less what was dropped.
    pub fn slots(&self) -> usize {
        self.token.rows()
    }
}
