//! `[[stage.eval]]` and `[stage.gate]`: what is measured on a stage's model, and what it must reach.

use super::stage::VerifierKind;
use serde::{Deserialize, Serialize};

/// Something measured on a stage's model: `verifier` on prompts, or `metric`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Name in the journal.
    pub name: String,
    /// A data set.
    pub data: String,
    /// Checks greedy replies to prompts; the journal gets `pass_at_1`, or `rate` with `as_rate`.
    #[serde(default)]
    pub verifier: Option<VerifierKind>,
    /// Report the share as `rate` (how often the model refuses) and not as `pass_at_1`.
    #[serde(default)]
    pub as_rate: bool,
    /// `perplexity` of texts, or `accuracy` of a reward model on pairs.
    #[serde(default)]
    pub metric: Option<Metric>,
    /// Most new tokens of a reply.
    #[serde(default = "eval_tokens")]
    pub max_new_tokens: usize,
    /// Also measure before the stage's first step.
    #[serde(default)]
    pub before: bool,
    /// Also measure every so many steps; 0 for the end only.
    #[serde(default)]
    pub every: u64,
    /// Sample replies shown on the console and kept in the journal.
    #[serde(default)]
    pub show: usize,
    /// Only the first so many examples; 0 for all.
    #[serde(default)]
    pub limit: usize,
}

/// `metric`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// exp of the mean negative log-probability per token.
    Perplexity,
    /// Share of pairs whose chosen reply scores higher.
    Accuracy,
}

/// A measurement that must be reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Name of one of the stage's evals.
    pub eval: String,
    /// Least value that passes.
    #[serde(default)]
    pub minimum: Option<f64>,
    /// Greatest value that passes.
    #[serde(default)]
    pub maximum: Option<f64>,
}

fn eval_tokens() -> usize {
    64
}
