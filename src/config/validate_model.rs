//! Rules that a model's config must keep before anything is computed from it.

use super::document::{ConfigError, Node, Value};
use super::model::{NEEDED_BY_DEEPSEEK_V2, OPTIONS_OF_DEEPSEEK_V2, TopkMethod};
use super::{Attention, EndTokens, LatentScaling, ModelConfig, ModelType};

/// Checks a model. `document` holds it at `path`, for the places of faults.
pub fn model(model: &ModelConfig, document: &Node, path: &[&str]) -> Result<(), ConfigError> {
    let rules = ModelRules { model, document, path };
    rules.architecture()?;
    rules.published()?;
    rules.sizes()?;
    rules.require_moderate()?;
    rules.heads()?;
    rules.ids()?;
    rules.experts()?;
    rules.numbers()?;
    rules.yarn()
}

/// Most positions of a model: their table of angles still fits into memory.
pub const MOST_POSITIONS: usize = 1 << 22;
const LARGEST_WIDTH: usize = 1 << 20;
const MOST_PARAMETERS: f64 = 1e13;
/// Ten times those of the largest models: their names alone take a tenth of a gigabyte.
const MOST_TENSORS: f64 = 1e6;

/// Parameters and tensors to an order of magnitude, where exact counts might overflow.
fn rough_counts(model: &ModelConfig) -> (f64, f64) {
    let size = |size: usize| size as f64;
    let (hidden, layers) = (size(model.hidden_size), size(model.num_hidden_layers));
    let heads = size(model.num_attention_heads);
    let attention = match model.attention() {
        Attention::Mla => {
            let query = heads * (size(model.qk_nope_head_dim) + size(model.qk_rope_head_dim));
            let rank = model.q_lora_rank.map_or(hidden, size);
            rank * (hidden + query)
                + size(model.kv_lora_rank)
                    * (hidden + heads * size(model.qk_nope_head_dim + model.v_head_dim))
                + heads * size(model.v_head_dim) * hidden
        }
        Attention::Gqa { kv_heads, head_dim } => {
            2.0 * (heads + size(kv_heads)) * size(head_dim) * hidden
        }
    };
    let experts = size(model.n_routed_experts) + size(model.n_shared_experts);
    let feed_forward = 3.0
        * hidden
        * (size(model.intermediate_size) + experts * size(model.moe_intermediate_size));
    let parameters = 2.0 * size(model.vocab_size) * hidden + layers * (attention + feed_forward);
    (parameters, layers * (12.0 + 3.0 * size(model.n_routed_experts)))
}

/// What divides a number, for a message.
fn divisors(number: usize) -> String {
    let divisors = (1..=number).filter(|n| number.is_multiple_of(*n)).map(|n| n.to_string());
    divisors.collect::<Vec<_>>().join(", ")
}

struct ModelRules<'a> {
    model: &'a ModelConfig,
    document: &'a Node,
    path: &'a [&'a str],
}

impl ModelRules<'_> {
    fn require(
        &self,
        holds: bool,
        key: &str,
        message: impl FnOnce() -> String,
    ) -> Result<(), ConfigError> {
        if holds {
            return Ok(());
        }
        let path: Vec<&str> = self.path.iter().copied().chain(key.split('.')).collect();
        Err(ConfigError { place: self.document.place_of(&path), message: message() })
    }

    /// True if the key was written, and not as null.
    fn has(&self, key: &str) -> bool {
        let node = self.path.iter().try_fold(self.document, |node, key| node.get(key));
        let value = node.and_then(|node| node.get(key));
        value.is_some_and(|node| !matches!(node.value, Value::Null))
    }

    /// The keys that an architecture needs are there, and those of the other are not.
    fn architecture(&self) -> Result<(), ConfigError> {
        let of_deepseek = NEEDED_BY_DEEPSEEK_V2.into_iter().chain(OPTIONS_OF_DEEPSEEK_V2);
        match self.model.model_type {
            ModelType::DeepseekV2 => NEEDED_BY_DEEPSEEK_V2.into_iter().try_for_each(|key| {
                self.require(self.has(key), key, || {
                    format!("`model` has no key `{key}`, which has no default; add it")
                })
            }),
            ModelType::Llama => of_deepseek.into_iter().try_for_each(|key| {
                self.require(!self.has(key), key, || {
                    format!(
                        "model.{key} is a key of deepseek_v2, and model.model_type = \"llama\"; take one of them out"
                    )
                })
            }),
        }
    }

    /// What every published model of these architectures has.
    fn published(&self) -> Result<(), ConfigError> {
        let model = self.model;
        self.require(model.hidden_act == "silu", "hidden_act", || {
            format!("model.hidden_act = {:?} is not built; use \"silu\"", model.hidden_act)
        })?;
        for (key, bias) in [("attention_bias", model.attention_bias), ("mlp_bias", model.mlp_bias)]
        {
            self.require(!bias, key, || {
                format!("model.{key} = true is not built: no layer here has biases; use false")
            })?;
        }
        self.require(model.seq_aux, "seq_aux", || {
            "model.seq_aux = false is not built: the balance loss is per sequence; use true"
                .to_string()
        })
    }

    fn sizes(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let sizes = [
            ("vocab_size", model.vocab_size),
            ("hidden_size", model.hidden_size),
            ("num_hidden_layers", model.num_hidden_layers),
            ("moe_layer_freq", model.moe_layer_freq),
            ("intermediate_size", model.intermediate_size),
            ("num_attention_heads", model.num_attention_heads),
            ("max_position_embeddings", model.max_position_embeddings),
        ];
        self.require_above_zero(&sizes)
    }

    fn require_above_zero(&self, sizes: &[(&str, usize)]) -> Result<(), ConfigError> {
        sizes.iter().try_for_each(|(key, size)| {
            self.require(*size > 0, key, || format!("model.{key} = 0 must be at least 1"))
        })
    }

    /// Widths of the heads.
    fn heads(&self) -> Result<(), ConfigError> {
        match self.model.attention() {
            Attention::Mla => self.latent_heads(),
            Attention::Gqa { kv_heads, head_dim } => self.grouped_heads(kv_heads, head_dim),
        }
    }

    fn latent_heads(&self) -> Result<(), ConfigError> {
        let model = self.model;
        self.require_above_zero(&[
            ("kv_lora_rank", model.kv_lora_rank),
            ("qk_nope_head_dim", model.qk_nope_head_dim),
            ("qk_rope_head_dim", model.qk_rope_head_dim),
            ("v_head_dim", model.v_head_dim),
        ])?;
        self.require(model.q_lora_rank != Some(0), "q_lora_rank", || {
            "model.q_lora_rank = 0 must be at least 1; for no query compression leave it out (null)"
                .to_string()
        })?;
        self.require(model.qk_rope_head_dim.is_multiple_of(2), "qk_rope_head_dim", || {
            format!(
                "model.qk_rope_head_dim = {} is odd, and RoPE turns pairs; make it even",
                model.qk_rope_head_dim
            )
        })?;
        let width = model.head_dim.unwrap_or(model.qk_rope_head_dim);
        self.require(width == model.qk_rope_head_dim, "head_dim", || {
            format!(
                "model.head_dim = {width} is the width of the rotated key in deepseek_v2, and model.qk_rope_head_dim = {}; \
                 leave head_dim out",
                model.qk_rope_head_dim
            )
        })?;
        let factor = match model.latent_scaling {
            LatentScaling::Constant(factor) => factor,
            LatentScaling::Off | LatentScaling::Sqrt => 1.0,
        };
        self.require(factor > 0.0, "latent_scaling", || {
            format!("model.latent_scaling = {factor} must be above 0; use \"off\" for none")
        })
    }

    fn grouped_heads(&self, kv_heads: usize, head_dim: usize) -> Result<(), ConfigError> {
        let (model, heads) = (self.model, self.model.num_attention_heads);
        self.require(kv_heads > 0 && heads.is_multiple_of(kv_heads), "num_key_value_heads", || {
            format!(
                "model.num_key_value_heads = {kv_heads} does not divide model.num_attention_heads = {heads}; use {}",
                divisors(heads)
            )
        })?;
        let derived = model.head_dim.is_none();
        self.require(!derived || model.hidden_size.is_multiple_of(heads), "hidden_size", || {
            format!(
                "model.hidden_size = {} is no multiple of model.num_attention_heads = {heads}; change one of them or add \
                 head_dim",
                model.hidden_size
            )
        })?;
        self.require(head_dim > 0, "head_dim", || {
            format!("model.head_dim = {head_dim} must be at least 1")
        })?;
        self.require(head_dim.is_multiple_of(2), "head_dim", || {
            let from = if derived { " (hidden_size / num_attention_heads)" } else { "" };
            format!("model.head_dim = {head_dim}{from} is odd, and RoPE turns pairs; make it even")
        })
    }

    /// Special tokens are tokens.
    fn ids(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let ids = [("bos_token_id", model.bos_token_id), ("pad_token_id", model.pad_token_id)];
        let ends = model.eos_token_id.iter().flat_map(EndTokens::ids);
        let ends = ends.map(|id| ("eos_token_id", Some(*id)));
        for (key, id) in ids.into_iter().chain(ends) {
            self.require(id.is_none_or(|id| (id as usize) < model.vocab_size), key, || {
                let id = id.unwrap_or_default();
                format!(
                    "model.{key} = {id} is no token of model.vocab_size = {}; ids start at 0",
                    model.vocab_size
                )
            })?;
        }
        Ok(())
    }

    /// Sizes that can be counted with: far above any model, far below what overflows.
    fn require_moderate(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let most = [
            ("vocab_size", model.vocab_size, 1 << 24),
            ("num_hidden_layers", model.num_hidden_layers, 10_000),
            ("hidden_size", model.hidden_size, LARGEST_WIDTH),
            ("intermediate_size", model.intermediate_size, LARGEST_WIDTH),
            ("moe_intermediate_size", model.moe_intermediate_size, LARGEST_WIDTH),
            ("n_routed_experts", model.n_routed_experts, 1 << 16),
            ("n_shared_experts", model.n_shared_experts, 1 << 10),
            ("num_attention_heads", model.num_attention_heads, 1 << 16),
            ("num_key_value_heads", model.num_key_value_heads.unwrap_or(0), 1 << 16),
            ("head_dim", model.head_dim.unwrap_or(0), 1 << 16),
            ("q_lora_rank", model.q_lora_rank.unwrap_or(0), LARGEST_WIDTH),
            ("kv_lora_rank", model.kv_lora_rank, LARGEST_WIDTH),
            ("qk_nope_head_dim", model.qk_nope_head_dim, 1 << 16),
            ("qk_rope_head_dim", model.qk_rope_head_dim, 1 << 16),
            ("v_head_dim", model.v_head_dim, 1 << 16),
            ("max_position_embeddings", model.max_position_embeddings, MOST_POSITIONS),
        ];
        for (key, size, most) in most {
            self.require(size <= most, key, || {
                format!("model.{key} = {size} is more than any model has; use at most {most}")
            })?;
        }
        let (parameters, tensors) = rough_counts(model);
        self.require(parameters <= MOST_PARAMETERS && tensors <= MOST_TENSORS, "hidden_size", || {
            format!(
                "the model has about {parameters:.1e} parameters in {tensors:.1e} tensors, more than can be counted \
                 with; lower its sizes, layers or experts"
            )
        })
    }

    fn experts(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let (experts, groups) = (model.n_routed_experts, model.n_group);
        if experts == 0 {
            return Ok(());
        }
        self.require(model.moe_intermediate_size > 0, "moe_intermediate_size", || {
            "model.moe_intermediate_size = 0 must be at least 1 in a model with experts".to_string()
        })?;
        self.require(groups > 0 && experts.is_multiple_of(groups), "n_group", || {
            format!(
                "model.n_group = {groups} does not divide model.n_routed_experts = {experts}; use {}",
                divisors(experts)
            )
        })?;
        self.require((1..=groups).contains(&model.topk_group), "topk_group", || {
            format!(
                "model.topk_group = {} must lie between 1 and model.n_group = {groups}",
                model.topk_group
            )
        })?;
        let kept = match model.topk_method {
            TopkMethod::Greedy => experts,
            TopkMethod::GroupLimitedGreedy => experts / groups * model.topk_group,
        };
        self.require((1..=kept).contains(&model.num_experts_per_tok), "num_experts_per_tok", || {
            format!(
                "model.num_experts_per_tok = {} must lie between 1 and {kept}, the routed experts that a token may use",
                model.num_experts_per_tok
            )
        })
    }

    fn numbers(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let above_zero = [
            ("rms_norm_eps", model.rms_norm_eps),
            ("initializer_range", model.initializer_range),
            ("routed_scaling_factor", model.routed_scaling_factor),
        ];
        for (key, value) in above_zero {
            self.require(value > 0.0, key, || format!("model.{key} = {value} must be above 0"))?;
        }
        self.require(model.rope_theta > 1.0, "rope_theta", || {
            format!("model.rope_theta = {} must be above 1; the paper's is 10000", model.rope_theta)
        })?;
        self.require(model.aux_loss_alpha >= 0.0, "aux_loss_alpha", || {
            format!(
                "model.aux_loss_alpha = {} must not be negative; 0 turns the balance loss off",
                model.aux_loss_alpha
            )
        })
    }

    fn yarn(&self) -> Result<(), ConfigError> {
        let Some(yarn) = &self.model.rope_scaling else { return Ok(()) };
        self.require(yarn.factor >= 1.0, "rope_scaling.factor", || {
            format!(
                "model.rope_scaling.factor = {} must be at least 1: YaRN only lengthens",
                yarn.factor
            )
        })?;
        let factor = yarn.attention_factor;
        let gqa = self.model.attention() != Attention::Mla;
        self.require(factor.is_none() || gqa, "rope_scaling.attention_factor", || {
            "model.rope_scaling.attention_factor is a key of llama; deepseek_v2 has mscale and mscale_all_dim".to_string()
        })?;
        self.require(factor.unwrap_or(1.0) > 0.0, "rope_scaling.attention_factor", || {
            format!(
                "model.rope_scaling.attention_factor = {} must be above 0",
                factor.unwrap_or(1.0)
            )
        })?;
        self.require(yarn.original_max_position_embeddings > 0, "rope_scaling.original_max_position_embeddings", || {
            "model.rope_scaling.original_max_position_embeddings = 0 must be the length of pretraining".to_string()
        })?;
        self.require(yarn.beta_fast > yarn.beta_slow && yarn.beta_slow > 0.0, "rope_scaling.beta_fast", || {
            format!(
                "model.rope_scaling.beta_fast = {} must be above beta_slow = {}, and that above 0; the paper's are 32 and 1",
                yarn.beta_fast, yarn.beta_slow
            )
        })
    }
}
