//! What is judged: rewards, advantages and GRPO's loss per token. Plain numbers, no tensors.

pub mod rollout;

// From text to a reward.
pub mod reward;
pub mod verifiers;

// From rewards to an update.
pub mod advantage;
pub mod grpo;

// What a step looked like.
pub mod stats;
