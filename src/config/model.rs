//! `[model]`: a model under the published keys of its config.json: DeepSeek-V2, or the dense transformer that it is
//! compared with (DeepSeek 67B, a Llama).
//!
//! One flat table for both: keys that only DeepSeek-V2 has are 0 in a Llama and are neither read nor written there.
//! Which attention and which feed-forward a layer has is asked with [`ModelConfig::attention`] and
//! [`ModelConfig::is_moe`]; nothing else should look at `model_type`.

use super::EndTokens;
use super::latent_scaling::LatentScaling;
use serde::ser::{Error, SerializeMap};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// The published `config.json` of a model (deepseek_v2.md 1.14 and 7.2). Unknown keys of a *run TOML* are refused; a
/// Hugging Face config.json may hold more keys than these, which are carried over unread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct ModelConfig {
    /// The architecture.
    #[serde(default)]
    pub model_type: ModelType,
    /// Vocabulary rows of embedding and head, at least the tokenizer's.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Layers L.
    pub num_hidden_layers: usize,
    /// First layers with a dense FFN.
    #[serde(default)]
    pub first_k_dense_replace: usize,
    /// A layer after those is MoE if its index divides by this.
    #[serde(default = "one")]
    pub moe_layer_freq: usize,
    /// Width of the dense FFN.
    pub intermediate_size: usize,
    /// Width of one expert.
    #[serde(default)]
    pub moe_intermediate_size: usize,
    /// Routed experts N_r.
    #[serde(default)]
    pub n_routed_experts: usize,
    /// Shared experts N_s (stored as one FFN of N_s times the expert width).
    #[serde(default)]
    pub n_shared_experts: usize,
    /// Routed experts a token, K_r.
    #[serde(default)]
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
    /// Divide the chosen weights by their sum, if there are several (the scaling factor is then not applied).
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
    /// Key-value heads of a Llama; as many as heads if left out. DeepSeek-V2 publishes its number of heads here, which
    /// sizes no cache.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Width of a Llama's heads; hidden_size / num_attention_heads if left out. In DeepSeek-V2 the width of the rotated
    /// key, for programs that look for it.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Query compression d_c'; null for none (V2-Lite).
    #[serde(default)]
    pub q_lora_rank: Option<usize>,
    /// Latent width d_c.
    #[serde(default)]
    pub kv_lora_rank: usize,
    /// Key width per head without position.
    #[serde(default)]
    pub qk_nope_head_dim: usize,
    /// Width of the rotated key, shared by all heads; even.
    #[serde(default)]
    pub qk_rope_head_dim: usize,
    /// Value width per head.
    #[serde(default)]
    pub v_head_dim: usize,
    /// Factors behind the norms of the latents; an export folds them into the norms' weights.
    #[serde(default)]
    pub latent_scaling: LatentScaling,
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
    /// Biases of feed-forward layers, which only a Llama publishes; only false.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Beginning-of-sequence id, if the model has one.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// End-of-sequence id, or several.
    #[serde(default)]
    pub eos_token_id: Option<EndTokens>,
    /// Padding id.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
}

/// `model_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// MLA and DeepSeekMoE.
    #[default]
    DeepseekV2,
    /// Grouped-query attention and one dense FFN a layer, as DeepSeek 67B.
    Llama,
}

/// How the layers of a model attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Multi-head latent attention.
    Mla,
    /// Grouped-query attention.
    Gqa {
        /// Key-value heads.
        kv_heads: usize,
        /// Width of a query, key and value.
        head_dim: usize,
    },
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
    /// A Llama's factor on cos and sin, in place of the ratio of the two mscales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
}

/// Keys that only DeepSeek-V2 has and that have no default.
pub const NEEDED_BY_DEEPSEEK_V2: [&str; 9] = [
    "first_k_dense_replace",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
];

/// Keys that only DeepSeek-V2 has and that have a default.
pub const OPTIONS_OF_DEEPSEEK_V2: [&str; 11] = [
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
    "q_lora_rank",
    "latent_scaling",
];

impl RopeScaling {
    /// mscale(s, a) = 0.1 a ln s + 1, or 1 if s <= 1.
    pub fn mscale(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }
}

impl Serialize for ModelConfig {
    /// The keys of its architecture.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = ModelConfig::serialize(self, serde_json::value::Serializer);
        let Value::Object(mut keys) = all.map_err(S::Error::custom)? else {
            unreachable!("a struct serializes as an object")
        };
        keys.retain(|key, _| match self.model_type {
            ModelType::DeepseekV2 => key != "mlp_bias",
            ModelType::Llama => {
                let of_deepseek = NEEDED_BY_DEEPSEEK_V2.iter().chain(&OPTIONS_OF_DEEPSEEK_V2);
                !of_deepseek.into_iter().any(|other| other == key)
            }
        });
        let mut map = serializer.serialize_map(Some(keys.len()))?;
        for (key, value) in &keys {
            // TOML has no null, and leaves out what is None.
            map.serialize_entry(key, &Some(value).filter(|value| !value.is_null()))?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ModelConfig, D::Error> {
        ModelConfig::deserialize(deserializer)
    }
}

impl ModelConfig {
    /// True if layer `index` is a mixture of experts.
    pub fn is_moe(&self, index: usize) -> bool {
        self.n_routed_experts > 0
            && index >= self.first_k_dense_replace
            && index.is_multiple_of(self.moe_layer_freq)
    }

    /// How its layers attend.
    pub fn attention(&self) -> Attention {
        match self.model_type {
            ModelType::DeepseekV2 => Attention::Mla,
            ModelType::Llama => Attention::Gqa {
                kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
                head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads),
            },
        }
    }

    /// Elements of one token's cache entry in one layer: d_c + d_R, or the keys and values of all key-value heads.
    pub fn cache_width(&self) -> usize {
        match self.attention() {
            Attention::Mla => self.kv_lora_rank + self.qk_rope_head_dim,
            Attention::Gqa { kv_heads, head_dim } => 2 * kv_heads * head_dim,
        }
    }

    /// Query and key width per head: d_nope + d_R in the expanded form.
    pub fn query_width(&self) -> usize {
        match self.attention() {
            Attention::Mla => self.qk_nope_head_dim + self.qk_rope_head_dim,
            Attention::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// How much of a query and key is rotated.
    pub fn rope_width(&self) -> usize {
        match self.attention() {
            Attention::Mla => self.qk_rope_head_dim,
            Attention::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// Value width per head.
    pub fn value_width(&self) -> usize {
        match self.attention() {
            Attention::Mla => self.v_head_dim,
            Attention::Gqa { head_dim, .. } => head_dim,
        }
    }

    /// The same model with the keys that others imply: key-value heads, and `head_dim` for programs that look for it.
    pub fn completed(mut self) -> ModelConfig {
        self.head_dim = Some(self.rope_width());
        self.num_key_value_heads.get_or_insert(self.num_attention_heads);
        self
    }

    /// Factors behind the norms of the query latent and of the key-value latent.
    pub fn latent_factors(&self) -> (f64, f64) {
        let factor = |rank| self.latent_scaling.factor(self.hidden_size, rank);
        (self.q_lora_rank.map_or(1.0, factor), factor(self.kv_lora_rank))
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
