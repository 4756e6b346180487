//! Tiny models and documents that the other modules of the suite train and sample.

use rehearsal::config::engine::AttentionForm;
use rehearsal::config::routing::Balance;
use rehearsal::config::{LatentScaling, ModelConfig};
use rehearsal::data::example::Sequence;
use rehearsal::model::moe::Routing;
use rehearsal::model::pass::indices;
use rehearsal::model::{Capacity, Gradients, PackFor, PackedModel, Params, Transformer};
use rehearsal::train::Items;
use rehearsal::train::objective::{Micro, Tally};
use rehearsal::train::routing::balance_loss;
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{Arena, CpuKernels, Kernels, ReferenceKernels};

/// A three-layer model: one dense, two MoE; with compressed queries.
pub fn config() -> ModelConfig {
    serde_json::from_str(
        r#"{"vocab_size":29,"hidden_size":12,"num_hidden_layers":3,"first_k_dense_replace":1,"intermediate_size":10,
        "moe_intermediate_size":6,"n_routed_experts":4,"n_shared_experts":2,"num_experts_per_tok":2,
        "num_attention_heads":2,"q_lora_rank":8,"kv_lora_rank":6,"qk_nope_head_dim":4,"qk_rope_head_dim":4,
        "v_head_dim":5,"max_position_embeddings":64,"rope_theta":100.0,"initializer_range":0.3,
        "routed_scaling_factor":1.5,"aux_loss_alpha":0.01}"#,
    )
    .unwrap()
}

/// The same without compressed queries, with group-limited routing and YaRN.
pub fn config_lite() -> ModelConfig {
    let mut config = config();
    config.q_lora_rank = None;
    config.topk_method = rehearsal::config::model::TopkMethod::GroupLimitedGreedy;
    (config.n_group, config.topk_group) = (2, 1);
    config.rope_scaling = Some(
        serde_json::from_str(
            r#"{"type":"yarn","factor":4.0,"original_max_position_embeddings":16,"mscale":0.707,"mscale_all_dim":1.0}"#,
        )
        .unwrap(),
    );
    config
}

/// A dense model of two layers, whose four heads share two keys and values and are wider than the stream divided by them.
pub fn config_dense() -> ModelConfig {
    serde_json::from_str(
        r#"{"model_type":"llama","vocab_size":29,"hidden_size":12,"num_hidden_layers":2,"intermediate_size":10,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":4,"max_position_embeddings":64,"rope_theta":100.0,
        "initializer_range":0.3}"#,
    )
    .unwrap()
}

/// The dense model with as many keys as heads, and YaRN.
pub fn config_dense_long() -> ModelConfig {
    let mut config = config_dense();
    config.num_key_value_heads = None;
    config.rope_scaling = Some(
        serde_json::from_str(
            r#"{"type":"yarn","factor":4.0,"original_max_position_embeddings":16,"attention_factor":1.1}"#,
        )
        .unwrap(),
    );
    config
}

/// The three-layer model with scaled latents.
pub fn config_scaled() -> ModelConfig {
    ModelConfig { latent_scaling: LatentScaling::Sqrt, ..config() }
}

/// With group-limited routing over four devices, of which a token uses two.
pub fn config_grouped() -> ModelConfig {
    let mut config = config();
    config.topk_method = rehearsal::config::model::TopkMethod::GroupLimitedGreedy;
    (config.n_routed_experts, config.n_group, config.topk_group) = (8, 4, 2);
    config.num_experts_per_tok = 3;
    config
}

/// Kernels in f64.
pub fn reference() -> ReferenceKernels {
    ReferenceKernels::new(Arena::new(None))
}

/// Kernels in f32.
pub fn cpu(threads: usize) -> CpuKernels {
    CpuKernels::new(threads, Arena::new(None))
}

/// Documents of given lengths with random tokens; some tokens are no targets.
pub fn documents(config: &ModelConfig, lengths: &[usize]) -> Vec<Sequence> {
    let token = |d: usize, i: usize| {
        random::below(5, Stream::Data, [d as u64, i as u64, 0, 0], config.vocab_size as u64) as u32
    };
    let document = |(d, length): (usize, &usize)| Sequence {
        tokens: (0..*length).map(|i| token(d, i)).collect(),
        target: (0..*length).map(|i| i > 0 && (i + d) % 5 != 1).collect(),
    };
    lengths.iter().enumerate().map(document).collect()
}

/// A model with random weights.
pub struct Tiny<'a> {
    pub kernels: &'a dyn Kernels,
    pub model: Transformer,
    pub params: Params,
}

impl<'a> Tiny<'a> {
    pub fn new(kernels: &'a dyn Kernels, config: &ModelConfig, value_head: bool) -> Tiny<'a> {
        let model = Transformer::new(kernels, config, value_head).unwrap();
        let mut params = Params::new(kernels, model.layout.clone(), "policy").unwrap();
        params.initialize(kernels, 3, config.initializer_range);
        // Norm weights that differ from 1, and a scalar head that differs from 0, show what depends on them.
        for (index, spec) in model.layout.specs.iter().enumerate() {
            if spec.is_norm || model.layout.score == Some(index) {
                let base = if spec.is_norm { 1.0 } else { 0.0 };
                let value = |i: usize| {
                    base + 0.3
                        * random::normal(9, Stream::Init, [index as u64, i as u64, 1, 0]) as f32
                };
                let values: Vec<f32> = (0..spec.rows * spec.cols).map(value).collect();
                kernels.upload(&values, &mut params.slab.tensor_mut(index));
            }
        }
        Tiny { kernels, model, params }
    }

    pub fn pack(&self, form: AttentionForm, training: bool) -> PackedModel {
        self.pack_for(PackFor::documents(form, training))
    }

    pub fn pack_for(&self, pack: PackFor) -> PackedModel {
        self.model.pack(self.kernels, &self.params, "policy", 1, pack).unwrap()
    }

    /// Loss (the experts' balance loss included) and gradients of one micro-batch.
    pub fn loss_and_gradients(
        &self,
        items: &Items<'_>,
        form: AttentionForm,
        balance: f64,
    ) -> (f64, Gradients) {
        let (loss, gradients, _) = self.trained(items, form, Balance::of_experts(balance), None);
        (loss, gradients)
    }

    /// Loss, gradients and routing with all balance losses, and with devices that drop what exceeds a capacity factor,
    /// except of the documents that are protected.
    pub fn trained(
        &self,
        items: &Items<'_>,
        form: AttentionForm,
        balance: Balance,
        dropping: Option<(f64, &[u32])>,
    ) -> (f64, Gradients, Vec<Routing>) {
        let packed = self.pack(form, true);
        let mut gradients = Gradients::new(self.kernels, &self.model.layout, "policy").unwrap();
        let documents = items.pack(self.kernels, 0..items.len()).unwrap();
        let mut pass = self.model.pass(self.kernels, &documents, &packed);
        pass.balance = balance;
        pass.sequences = items.documents();
        pass.capacity = dropping.map(|(factor, protected)| Capacity {
            factor,
            protected: indices(self.kernels, protected).unwrap(),
        });
        let (hidden, saved) = self.model.forward(&pass, &self.params, &packed, 0, None).unwrap();
        let mut d_hidden = pass.floats(hidden.rows(), hidden.cols()).unwrap();
        self.kernels.fill(&mut d_hidden, 0.0);
        let mut tally = Tally::default();
        let mut micro = Micro {
            pass: &pass,
            params: &self.params,
            heads: packed.heads(),
            hidden: &hidden,
            d_hidden: &mut d_hidden,
            gradients: &mut gradients,
        };
        items.evaluate(0..items.len(), &mut micro, &mut tally).unwrap();
        let (_, routings) = self
            .model
            .backward(&pass, &self.params, &packed, 0, saved, d_hidden, &mut gradients)
            .unwrap();
        (tally.loss + balance_loss(std::slice::from_ref(&routings)), gradients, routings)
    }
}

/// |a - b| / max(|b|, floor), the largest.
pub fn worst(a: &[f64], b: &[f64], floor: f64) -> (usize, f64) {
    assert_eq!(a.len(), b.len());
    let error = |i: usize| (a[i] - b[i]).abs() / b[i].abs().max(floor);
    (0..a.len()).map(|i| (i, error(i))).max_by(|x, y| x.1.total_cmp(&y.1)).unwrap_or((0, 0.0))
}

/// ||a - b|| / ||b||.
pub fn relative_l2(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &[f64]| x.iter().map(|v| v * v).sum::<f64>().sqrt();
    let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(b).max(1e-30)
}
