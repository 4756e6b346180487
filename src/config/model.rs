//! `[model]`: a DeepSeek-V2 model under the published keys of its config.json.

use serde::{Deserialize, Serialize};

/// The published `config.json` of a DeepSeek-V2 model (deepseek_v2.md 1.14 and 7.2). Unknown keys of a *run TOML* are
/// refused; a Hugging Face config.json may hold more keys than these, which are carried over unread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Vocabulary rows of embedding and head, at least the tokenizer's.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// First layers with a dense FFN.
    pub first_k_dense_replace: usize,
    /// A layer after those is MoE if its index divides by this.
    #[serde(default = "one")]
    pub moe_layer_freq: usize,
    /// Width of the dense FFN.
    pub intermediate_size: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Routed experts N_r.
    pub n_routed_experts: usize,
    /// Shared experts N_s (stored as one FFN of N_s times the expert width).
    pub n_shared_experts: usize,
    /// Routed experts a token, K_r.
    pub num_experts_per_tok: usize,
    /// Groups of experts (devices D); 1 without device-limited routing.
    #[serde(default = "one")]
    pub n_group: usize,
    /// Groups a token may use (M).
    #[serde(default = "one")]
    pub topk_group: usize,
    /// How experts are chosen.
    #[serde(default)]
    pub topk_method: TopkMethod,
    /// What turns gate logits into scores.
    #[serde(default)]
    pub scoring_func: ScoringFunc,
    /// Divide the chosen weights by their sum (the scaling factor is then not applied).
    #[serde(default)]
    pub norm_topk_prob: bool,
    /// Factor on the chosen weights.
    #[serde(default = "one_float")]
    pub routed_scaling_factor: f64,
    /// Weight α1 of the expert-level balance loss in pretraining and SFT.
    #[serde(default = "aux_alpha")]
    pub aux_loss_alpha: f64,
    /// Balance loss per sequence (the only form built).
    #[serde(default = "yes")]
    pub seq_aux: bool,
    /// Attention heads n_h.
    pub num_attention_heads: usize,
    /// Published as the number of heads; sizes no cache.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Query compression d_c'; null for none (V2-Lite).
    #[serde(default)]
    pub q_lora_rank: Option<usize>,
    /// Latent width d_c.
    pub kv_lora_rank: usize,
    /// Key width per head without position.
    pub qk_nope_head_dim: usize,
    /// Width of the rotated key, shared by all heads; even.
    pub qk_rope_head_dim: usize,
    /// Value width per head.
    pub v_head_dim: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// RoPE base.
    #[serde(default = "rope_base")]
    pub rope_theta: f64,
    /// YaRN; null for none.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Epsilon of every RMSNorm.
    #[serde(default = "norm_epsilon")]
    pub rms_norm_eps: f64,
    /// Standard deviation of initial matrices (the paper: 0.006).
    #[serde(default = "init_range")]
    pub initializer_range: f64,
    /// Activation; only "silu".
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// One matrix for embedding and head.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Attention biases; only false.
    #[serde(default)]
    pub attention_bias: bool,
    /// Beginning-of-sequence id, if the model has one.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// End-of-sequence id.
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    /// Padding id.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
}

/// `topk_method`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopkMethod {
    /// The K best experts (early remote code spells it "gready").
    #[default]
    #[serde(alias = "gready")]
    Greedy,
    /// The K best experts of the M groups with the best single expert.
    GroupLimitedGreedy,
}

/// `scoring_func`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringFunc {
    /// Softmax over all routed experts.
    #[default]
    Softmax,
}

/// YaRN (deepseek_v2.md 1.4); accepted as `rope_scaling` and as `rope_parameters`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// "yarn".
    #[serde(alias = "rope_type", rename = "type")]
    pub kind: String,
    /// s: target length over original length.
    pub factor: f64,
    /// Length the model was pretrained at.
    pub original_max_position_embeddings: usize,
    /// β.
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    /// α.
    #[serde(default = "beta_slow")]
    pub beta_slow: f64,
    /// Multiplies cos and sin as mscale(s, mscale) / mscale(s, mscale_all_dim).
    #[serde(default = "one_float")]
    pub mscale: f64,
    /// Its mscale squared multiplies the softmax scale.
    #[serde(default)]
    pub mscale_all_dim: f64,
}

impl ModelConfig {
    /// True if layer `index` is a mixture of experts.
    pub fn is_moe(&self, index: usize) -> bool {
        self.n_routed_experts > 0
            && index >= self.first_k_dense_replace
            && index.is_multiple_of(self.moe_layer_freq)
    }

    /// Elements of one token's cache entry in one layer: d_c + d_R.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Query and key width per head in the expanded form: d_nope + d_R.
    pub fn query_width(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Width of the shared experts' one FFN.
    pub fn shared_width(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }
}

fn one() -> usize {
    1
}
fn one_float() -> f64 {
    1.0
}
fn yes() -> bool {
    true
}
fn aux_alpha() -> f64 {
    0.001
}
fn rope_base() -> f64 {
    10_000.0
}
fn norm_epsilon() -> f64 {
    1e-6
}
fn init_range() -> f64 {
    0.006
}
fn silu() -> String {
    "silu".to_string()
}
fn beta_fast() -> f64 {
    32.0
}
fn beta_slow() -> f64 {
    1.0
}
