//! What training and sampling eat: token sequences, pairs, prompts.
//!
//! "Example" is the training item; "sample" is only ever the verb. Knows no tensors.

use serde::{Deserialize, Serialize};

/// One document: it sees only itself, and its positions start at 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// For each token, whether it is a target of the next-token loss; the first never is.
    pub target: Vec<bool>,
}

impl Sequence {
    /// A document whose every token but the first is a target.
    pub fn all_targets(tokens: Vec<u32>) -> Sequence {
        let target = (0..tokens.len()).map(|i| i > 0).collect();
        Sequence { tokens, target }
    }

    /// Number of targets.
    pub fn targets(&self) -> usize {
        self.target.iter().filter(|t| **t).count()
    }
}

/// A prompt with a better and a worse reply, each as a whole token sequence that ends with the end token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Prompt and preferred reply.
    pub chosen: Vec<u32>,
    /// Prompt and the other reply.
    pub rejected: Vec<u32>,
}

/// Something to answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Line number in its set, from 0.
    pub index: u64,
    /// Rendered text, special tokens included.
    pub text: String,
    /// Token ids, the generation prompt included.
    pub tokens: Vec<u32>,
    /// What a verifier compares with; absent where no rule applies.
    pub answer: Option<String>,
}

/// One optimizer step's worth of documents or pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Batch {
    /// For the next-token loss (pretraining, long context, SFT).
    Documents(Vec<Sequence>),
    /// For the preference loss.
    Pairs(Vec<Pair>),
}

impl Batch {
    /// Tokens that go through the model.
    pub fn tokens(&self) -> usize {
        match self {
            Batch::Documents(sequences) => sequences.iter().map(|s| s.tokens.len()).sum(),
            Batch::Pairs(pairs) => pairs.iter().map(|p| p.chosen.len() + p.rejected.len()).sum(),
        }
    }
}
