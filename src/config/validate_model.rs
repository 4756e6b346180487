//! Rules that a model's config must keep before anything is computed from it.

use super::ModelConfig;
use super::document::{ConfigError, Node};
use super::model::TopkMethod;

/// Checks a model. `document` holds it at `path`, for the places of faults.
pub fn model(model: &ModelConfig, document: &Node, path: &[&str]) -> Result<(), ConfigError> {
    let rules = ModelRules { model, document, path };
    rules.published()?;
    rules.sizes()?;
    rules.experts()?;
    rules.numbers()?;
    rules.yarn()
}

/// Most positions of a model: their table of angles still fits into memory.
pub const MOST_POSITIONS: usize = 1 << 22;
const LARGEST_WIDTH: usize = 1 << 20;
const MOST_PARAMETERS: f64 = 1e13;
const MOST_TENSORS: f64 = 1e7;

/// Parameters and tensors to an order of magnitude, where exact counts might overflow.
fn rough_counts(model: &ModelConfig) -> (f64, f64) {
    let size = |size: usize| size as f64;
    let (hidden, layers) = (size(model.hidden_size), size(model.num_hidden_layers));
    let heads = size(model.num_attention_heads);
    let query = heads * (size(model.qk_nope_head_dim) + size(model.qk_rope_head_dim));
    let rank = model.q_lora_rank.map_or(hidden, size);
    let attention = rank * (hidden + query)
        + size(model.kv_lora_rank)
            * (hidden + heads * size(model.qk_nope_head_dim + model.v_head_dim))
        + heads * size(model.v_head_dim) * hidden;
    let experts = size(model.n_routed_experts) + size(model.n_shared_experts);
    let feed_forward = 3.0
        * hidden
        * (size(model.intermediate_size) + experts * size(model.moe_intermediate_size));
    let parameters = 2.0 * size(model.vocab_size) * hidden + layers * (attention + feed_forward);
    (parameters, layers * (12.0 + 3.0 * size(model.n_routed_experts)))
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

    /// What only the published form of DeepSeek-V2 has.
    fn published(&self) -> Result<(), ConfigError> {
        let model = self.model;
        let node = self.path.iter().try_fold(self.document, |node, key| node.get(key));
        let kind = node.and_then(|node| node.get("model_type")).and_then(Node::text);
        self.require(kind.is_none_or(|kind| kind == "deepseek_v2"), "model_type", || {
            format!(
                "model.model_type = {:?} is another architecture; only \"deepseek_v2\" is built",
                kind.unwrap_or("")
            )
        })?;
        self.require(model.hidden_act == "silu", "hidden_act", || {
            format!("model.hidden_act = {:?} is not built; use \"silu\"", model.hidden_act)
        })?;
        self.require(!model.attention_bias, "attention_bias", || {
            "model.attention_bias = true is not built, and DeepSeek-V2 has no biases; use false"
                .to_string()
        })?;
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
            ("kv_lora_rank", model.kv_lora_rank),
            ("qk_nope_head_dim", model.qk_nope_head_dim),
            ("qk_rope_head_dim", model.qk_rope_head_dim),
            ("v_head_dim", model.v_head_dim),
            ("max_position_embeddings", model.max_position_embeddings),
        ];
        for (key, size) in sizes {
            self.require(size > 0, key, || format!("model.{key} = 0 must be at least 1"))?;
        }
        self.require_moderate()?;
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
        let ids = [
            ("bos_token_id", model.bos_token_id),
            ("eos_token_id", model.eos_token_id),
            ("pad_token_id", model.pad_token_id),
        ];
        for (key, id) in ids {
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
            let divisors: Vec<String> =
                (1..=experts).filter(|n| experts.is_multiple_of(*n)).map(|n| n.to_string()).collect();
            format!(
                "model.n_group = {groups} does not divide model.n_routed_experts = {experts}; use {}",
                divisors.join(", ")
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
        self.require(yarn.kind == "yarn", "rope_scaling.type", || {
            format!("model.rope_scaling.type = {:?} is not built; use \"yarn\" or leave rope_scaling out", yarn.kind)
        })?;
        self.require(yarn.factor >= 1.0, "rope_scaling.factor", || {
            format!(
                "model.rope_scaling.factor = {} must be at least 1: YaRN only lengthens",
                yarn.factor
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
