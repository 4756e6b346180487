//! `[[stage]]`: one entry of a run, in order.

use super::dtype::Dtype;
use super::routing::BalanceConfig;
use serde::{Deserialize, Serialize};

pub use super::eval::{EvalConfig, Gate, Metric};

/// A stage: its name, where it starts, what it must reach, and the settings of its kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Unique name; also the name of its artefact and in the journal.
    pub name: String,
    /// An earlier stage, a run folder, a checkpoint or a Hugging Face folder. Absent: the last policy stage, or fresh
    /// weights if there is none.
    pub start_from: Option<String>,
    /// What is measured on the stage's result (and in between).
    pub eval: Vec<EvalConfig>,
    /// Stops the run with a message if a measurement falls short.
    pub gate: Option<Gate>,
    /// The settings of the stage's kind.
    #[serde(flatten)]
    pub kind: StageKind,
}

/// `kind` and its own keys.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum StageKind {
    /// Next-token prediction on packed documents.
    Pretrain(PretrainStage),
    /// The same with YaRN at a longer sequence.
    LongContext(LongContextStage),
    /// Next-token prediction on the assistant's tokens of conversations.
    Sft(SftStage),
    /// A scalar head fitted on preference pairs.
    RewardModel(RewardModelStage),
    /// Group relative policy optimization.
    Grpo(GrpoStage),
}

impl StageKind {
    /// The name in TOML and journal.
    pub fn name(&self) -> &'static str {
        match self {
            StageKind::Pretrain(_) => "pretrain",
            StageKind::LongContext(_) => "long-context",
            StageKind::Sft(_) => "sft",
            StageKind::RewardModel(_) => "reward-model",
            StageKind::Grpo(_) => "grpo",
        }
    }

    /// True if the stage's result is a policy (a reward model is not).
    pub fn makes_policy(&self) -> bool {
        !matches!(self, StageKind::RewardModel(_))
    }
}

/// AdamW and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Shape after the warm-up.
    pub schedule: Schedule,
    /// Final rate as a share of the peak, for cosine and linear.
    pub final_share: f64,
    /// For `step-decay`: the rate is multiplied by `decay_factor` at each of these shares of the stage's steps
    /// (the factors are cumulative products: 0.316, then 0.1).
    pub decay_at: Vec<f64>,
    /// See `decay_at`.
    pub decay_factor: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; on matrices only, never on norm weights.
    pub weight_decay: f64,
    /// Global gradient norm limit; 0 for none.
    pub clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            learning_rate: 1e-3,
            warmup_steps: 0,
            schedule: Schedule::Constant,
            final_share: 0.1,
            decay_at: vec![0.6, 0.9],
            decay_factor: 0.316,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
        }
    }
}

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The peak throughout.
    Constant,
    /// Straight line to `final_share`.
    Linear,
    /// Half a cosine to `final_share`.
    Cosine,
    /// The paper's: a factor at given shares of the steps.
    StepDecay,
}

/// A data set in a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureEntry {
    /// Name of a set in `[data.sets]`.
    pub set: String,
    /// Share of the rows of a batch.
    #[serde(default = "one")]
    pub share: f64,
}

/// `kind = "pretrain"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainStage {
    /// The mixture, by share of rows.
    pub data: Vec<MixtureEntry>,
    /// Optimizer steps.
    pub steps: u64,
    /// Rows (sequences) of a batch, at the end of the ramp.
    pub batch: usize,
    /// Tokens of a row.
    pub sequence: usize,
    /// Rows of the first steps; 0 for no ramp.
    #[serde(default)]
    pub batch_start: usize,
    /// Share of the stage's tokens over which the batch grows linearly in tokens from `batch_start` to `batch`.
    #[serde(default)]
    pub batch_ramp: f64,
    /// Documents that go through the model at once; 0 for about 1024 tokens. Changes no result.
    #[serde(default)]
    pub micro_batch: usize,
    /// Pairs of token and expert that a device may process of each document, as a multiple of an even share; those of the
    /// lowest affinity are dropped. Absent: none is. The paper: 1.0.
    #[serde(default)]
    pub capacity_factor: Option<f64>,
    /// Weights of the balance losses.
    #[serde(default)]
    pub balance: BalanceConfig,
    /// Optimizer.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// β of the paper's YaRN.
pub const PAPERS_BETA_FAST: f64 = 32.0;
/// α of the paper's YaRN.
pub const PAPERS_BETA_SLOW: f64 = 1.0;
/// mscale and mscale_all_dim of the paper's YaRN.
pub const PAPERS_MSCALE: f64 = 0.707;

/// `kind = "long-context"`: pretraining with YaRN from the model it starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LongContextStage {
    /// The mixture, by share of rows.
    pub data: Vec<MixtureEntry>,
    /// Optimizer steps.
    pub steps: u64,
    /// Rows of a batch.
    pub batch: usize,
    /// Tokens of a row.
    pub sequence: usize,
    /// How many times longer the context becomes: YaRN's factor s, times that of an earlier extension. The original
    /// length is the model's `max_position_embeddings` before its first extension.
    pub factor: f64,
    /// YaRN β.
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    /// YaRN α.
    #[serde(default = "beta_slow")]
    pub beta_slow: f64,
    /// YaRN mscale and mscale_all_dim.
    #[serde(default = "mscale")]
    pub mscale: f64,
    /// Documents at once; 0 for about 1024 tokens.
    #[serde(default)]
    pub micro_batch: usize,
    /// Pairs of token and expert that a device may process of each document, as a multiple of an even share; those of the
    /// lowest affinity are dropped. Absent: none is. The paper: 1.0.
    #[serde(default)]
    pub capacity_factor: Option<f64>,
    /// Weights of the balance losses.
    #[serde(default)]
    pub balance: BalanceConfig,
    /// Optimizer.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// `kind = "sft"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftStage {
    /// A set of conversations.
    pub data: String,
    /// Passes over the set.
    #[serde(default = "one_epoch")]
    pub epochs: u64,
    /// Conversations of a batch.
    pub batch: usize,
    /// Conversations at once; 0 for about 1024 tokens.
    #[serde(default)]
    pub micro_batch: usize,
    /// Weights of the balance losses.
    #[serde(default)]
    pub balance: BalanceConfig,
    /// Optimizer.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// `kind = "reward-model"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardModelStage {
    /// A set of preference pairs.
    pub data: String,
    /// Pairs that fix the mean and deviation of the calibrated score; training pairs if absent.
    #[serde(default)]
    pub calibration: Option<String>,
    /// Passes over the set.
    #[serde(default = "one_epoch")]
    pub epochs: u64,
    /// Pairs of a batch.
    pub batch: usize,
    /// Pairs at once; 0 for about 1024 tokens.
    #[serde(default)]
    pub micro_batch: usize,
    /// Optimizer.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// `kind = "grpo"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpoStage {
    /// A set of prompts with answers.
    pub data: String,
    /// Policy steps (batches of rollouts).
    pub steps: u64,
    /// Prompts of a step.
    pub prompts: usize,
    /// Rollouts of a prompt, G.
    pub group_size: usize,
    /// Most new tokens of a rollout.
    pub max_new_tokens: usize,
    /// Sampling temperature; trainer and sampler use the same.
    #[serde(default = "one")]
    pub temperature: f64,
    /// Refused unless 1: truncated sampling would put a bias in the ratio.
    #[serde(default = "one")]
    pub top_p: f64,
    /// Refused unless 0.
    #[serde(default)]
    pub top_k: usize,
    /// Ratio clip ε.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Weight β of the KL term (k3) to the reference; 0 needs no reference.
    #[serde(default = "kl")]
    pub kl_weight: f64,
    /// Updates per batch of rollouts, μ.
    #[serde(default = "one_epoch")]
    pub updates: u64,
    /// Ratio per token or per sequence.
    #[serde(default)]
    pub ratio_level: RatioLevel,
    /// How token losses of a rollout are averaged.
    #[serde(default)]
    pub length_norm: LengthNorm,
    /// Deviation in the advantage: of the population (divide by G) or of the sample (by G - 1).
    #[serde(default)]
    pub deviation: Deviation,
    /// Added to the deviation.
    #[serde(default = "deviation_epsilon")]
    pub deviation_epsilon: f64,
    /// The reward: a weighted sum of components.
    pub reward: Vec<RewardEntry>,
    /// Name of the policy stage that must have run before (stage 2 of the paper names its stage 1).
    #[serde(default)]
    pub after: Option<String>,
    /// Rollouts that go through the model at once in training, in whole groups where prompts are shared;
    /// 0 for about 1024 tokens.
    #[serde(default)]
    pub micro_batch: usize,
    /// Whether a prompt goes through the model once for all rollouts of its group in training. That is faster and takes
    /// memory for a whole group at once; the gradient differs in its last bits only.
    #[serde(default = "yes")]
    pub share_prompts: bool,
    /// What the policy's weights are kept as while rollouts are sampled; evals take f32. Other than f32 the sampler is not
    /// the trainer, and each token's loss is weighted by min(trainer's probability / sampler's, `importance_limit`).
    #[serde(default)]
    pub rollout_dtype: Dtype,
    /// Batches that rollouts may be behind the policy that they update: with 1 those of the next step are sampled before
    /// the update, by ranks that only sample (`cluster.samplers`) while the others train, and elsewhere before them.
    #[serde(default)]
    pub max_staleness: u64,
    /// Most that a token (a rollout, for the ratio per sequence) may weigh; 2 if absent. Only beside a `rollout_dtype`.
    #[serde(default)]
    pub importance_limit: Option<f64>,
    /// Optimizer.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

impl GrpoStage {
    /// The limit of importance weights; `None` if rollouts come from the trainer's own numbers and have none.
    pub fn importance_weights(&self) -> Option<f64> {
        (self.rollout_dtype != Dtype::F32)
            .then(|| self.importance_limit.unwrap_or(USUAL_IMPORTANCE_LIMIT))
    }
}

/// `importance_limit` where none is given.
const USUAL_IMPORTANCE_LIMIT: f64 = 2.0;

/// One component of a reward: exactly one of `verifier` and `model`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardEntry {
    /// A program that checks the answer.
    #[serde(default)]
    pub verifier: Option<VerifierKind>,
    /// A reward-model stage by name; its calibrated score is used, clamped to ±3.
    #[serde(default)]
    pub model: Option<String>,
    /// Weight c of the component.
    #[serde(default = "one")]
    pub weight: f64,
    /// For a verifier: credit for a partly right answer, as a share of 1.
    #[serde(default)]
    pub partial: f64,
}

impl RewardEntry {
    /// The component's name in the journal.
    pub fn name(&self) -> String {
        match (&self.verifier, &self.model) {
            (Some(verifier), _) => verifier.name().to_string(),
            (None, Some(model)) => model.clone(),
            (None, None) => "none".to_string(),
        }
    }
}

/// A verifier: text to a score with a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifierKind {
    /// The whole reply equals the answer.
    Exact,
    /// What follows `Answer:` in the last line equals the answer.
    AnswerLine,
    /// The final number equals the answer's final number.
    Number,
    /// The reply matches the answer as a regular expression.
    Regex,
    /// The share of `<<a*b=c>>` annotations that are correct (0 without any).
    Annotations,
}

impl VerifierKind {
    /// The name in TOML, journal and command line.
    pub fn name(self) -> &'static str {
        match self {
            VerifierKind::Exact => "exact",
            VerifierKind::AnswerLine => "answer-line",
            VerifierKind::Number => "number",
            VerifierKind::Regex => "regex",
            VerifierKind::Annotations => "annotations",
        }
    }
}

/// `ratio_level`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RatioLevel {
    /// DeepSeekMath's token form.
    #[default]
    Token,
    /// DeepSeek-V2's printed form: one ratio for the whole output.
    Sequence,
}

/// `length_norm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LengthNorm {
    /// 1 / |o_i|.
    #[default]
    PerOutput,
    /// No division.
    None,
    /// 1 / `max_new_tokens`.
    Constant,
}

/// `deviation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deviation {
    /// Divide by G.
    #[default]
    Population,
    /// Divide by G - 1.
    Sample,
}

fn one() -> f64 {
    1.0
}
fn yes() -> bool {
    true
}
fn one_epoch() -> u64 {
    1
}
fn beta_fast() -> f64 {
    PAPERS_BETA_FAST
}
fn beta_slow() -> f64 {
    PAPERS_BETA_SLOW
}
fn mscale() -> f64 {
    PAPERS_MSCALE
}
fn clip() -> f64 {
    0.2
}
fn kl() -> f64 {
    0.04
}
fn deviation_epsilon() -> f64 {
    1e-4
}
