//! The model against an independent implementation: fixtures that transformers made (tests/oracle/make_fixtures.py).

use crate::tiny::{cpu, relative_l2, worst};
use candle_core::{Device, Tensor};
use rehearsal::checkpoint::{TensorFolder, read_model_config};
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::{AttentionForm, Prefill};
use rehearsal::data::example::Sequence;
use rehearsal::model::{DecodeRows, Documents, LatentCache, PackFor, Params, Transformer};
use rehearsal::train::Items;
use rehearsal::train::objective::{Micro, Tally};
use rehearsal_kernels::{CacheFormat, Kernels};
use std::collections::HashMap;
use std::path::PathBuf;

const CASES: [&str; 2] = ["greedy-q-lora", "group-limited-yarn"];

struct Fixture {
    config: ModelConfig,
    weights: TensorFolder,
    expected: HashMap<String, Tensor>,
}

impl Fixture {
    fn open(case: &str) -> Fixture {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracle").join(case);
        Fixture {
            config: read_model_config(&folder).unwrap(),
            weights: TensorFolder::open_file(&folder.join("model.safetensors")).unwrap(),
            expected: candle_core::safetensors::load(
                folder.join("expected.safetensors"),
                &Device::Cpu,
            )
            .unwrap(),
        }
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let flat = self.expected[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        flat.into_iter().map(f64::from).collect()
    }

    fn tokens(&self, name: &str) -> Vec<u32> {
        self.numbers(name).into_iter().map(|t| t as u32).collect()
    }

    fn load(&self, kernels: &dyn Kernels) -> (Transformer, Params) {
        let model = Transformer::new(kernels, &self.config, false).unwrap();
        let mut params = Params::new(kernels, model.layout.clone(), "policy").unwrap();
        params.load(kernels, |spec| self.weights.read_f32(&spec.name)).unwrap();
        assert_eq!(
            self.weights.names().len(),
            model.layout.specs.len(),
            "every tensor is used once"
        );
        (model, params)
    }
}

/// Logits of every position through the sampler's path.
pub fn logits(
    kernels: &dyn Kernels,
    model: &Transformer,
    params: &Params,
    tokens: &[u32],
    prefill: Prefill,
) -> Vec<f64> {
    let packed =
        model.pack(kernels, params, "policy", 0, PackFor { prefill, ..PackFor::SAMPLING }).unwrap();
    let mut cache =
        LatentCache::new(kernels, &model.config, CacheFormat::F32, tokens.len().div_ceil(8), 8)
            .unwrap();
    let all = 0..tokens.len() as u32;
    let rows = DecodeRows {
        tokens: tokens.to_vec(),
        positions: all.clone().collect(),
        slots: all.clone().collect(),
        sequence: vec![0; tokens.len()],
        length: all.clone().map(|i| i + 1).collect(),
        tables: vec![(0..tokens.len().div_ceil(8) as u32).collect()],
        wanted: all.collect(),
    };
    kernels.download_f64(&model.decode(kernels, params, &packed, &mut cache, &rows).unwrap())
}

#[test]
fn logits_equal_those_of_transformers() {
    for case in CASES {
        let (fixture, kernels) = (Fixture::open(case), cpu(2));
        let (model, params) = fixture.load(&kernels);
        for prefill in [Prefill::Absorbed, Prefill::ByCost] {
            let got = logits(&kernels, &model, &params, &fixture.tokens("tokens"), prefill);
            let (index, error) = worst(&got, &fixture.numbers("logits"), 1.0);
            println!("{case}, {prefill:?}: largest error of a logit {error:e}");
            assert!(error < 1e-4, "{case}, {prefill:?}, logit {index}: {error:e}");
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_transformers() {
    for (case, form) in [
        (CASES[0], AttentionForm::Expanded),
        (CASES[1], AttentionForm::Absorbed),
        (CASES[1], AttentionForm::Expanded),
    ] {
        let (fixture, kernels) = (Fixture::open(case), cpu(2));
        let (model, params) = fixture.load(&kernels);
        let documents = [Sequence::all_targets(fixture.tokens("tokens"))];
        let items = Items::Documents(&documents);
        let packed =
            model.pack(&kernels, &params, "policy", 0, PackFor::documents(form, true)).unwrap();
        let mut gradients =
            rehearsal::model::Gradients::new(&kernels, &model.layout, "policy").unwrap();
        let packed_documents = Documents::pack(&kernels, &items.sequences(0..1)).unwrap();
        let pass = model.pass(&kernels, &packed_documents, &packed);
        let (hidden, saved) = model.forward(&pass, &params, &packed).unwrap();
        let mut d_hidden = pass.floats(hidden.rows(), hidden.cols()).unwrap();
        kernels.fill(&mut d_hidden, 0.0);
        let mut tally = Tally::default();
        let mut micro = Micro {
            pass: &pass,
            params: &params,
            heads: &packed.heads,
            hidden: &hidden,
            d_hidden: &mut d_hidden,
            gradients: &mut gradients,
        };
        items.evaluate(0..1, &mut micro, &mut tally).unwrap();
        model.backward(&pass, &params, &packed, saved, d_hidden, &mut gradients).unwrap();
        let loss = fixture.numbers("loss")[0];
        assert!((tally.loss - loss).abs() < 1e-4, "{case}: loss {} against {loss}", tally.loss);
        let errors = model.layout.specs.iter().enumerate().map(|(index, spec)| {
            let got = kernels.download_f64(&gradients.slab.tensor(index));
            (relative_l2(&got, &fixture.numbers(&format!("gradient.{}", spec.name))), &spec.name)
        });
        let (error, name) = errors.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        println!("{case}, {form:?}: largest relative L2 {error:e} at {name}");
        assert!(error < 1e-4, "{case}, {form:?}, {name}: relative L2 {error:e}");
    }
}

#[test]
fn greedy_continuations_equal_those_of_transformers() {
    for case in CASES {
        let (fixture, kernels) = (Fixture::open(case), cpu(1));
        let (model, params) = fixture.load(&kernels);
        let mut tokens = fixture.tokens("tokens")[..6].to_vec();
        for wanted in fixture.tokens("greedy") {
            let all = logits(&kernels, &model, &params, &tokens, Prefill::Absorbed);
            let last = &all[all.len() - model.config.vocab_size..];
            let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            assert_eq!(best as u32, wanted, "{case}, after {} tokens", tokens.len());
            tokens.push(wanted);
        }
    }
}
