//! The model against an independent implementation: folders with what transformers computed for a model.
//!
//! The committed folders are in tests/data/oracle (tests/oracle/make_fixtures.py). tests/oracle/check.py makes fresh ones
//! and names their place in REHEARSAL_ORACLE; tests/oracle/fixture.py says what a folder holds. Each goes through the
//! product's own door: the engine opens it as a person's checkpoint, continues its prompts, and saves it; the model
//! then reads what was saved.

use crate::engine::stage;
use crate::tiny::{Tiny, cpu, relative_l2};
use candle_core::{Device, Tensor};
use rehearsal::checkpoint::{TensorFolder, read_model_config};
use rehearsal::cluster::Team;
use rehearsal::config::EngineConfig;
use rehearsal::config::engine::AttentionForm::{self, Absorbed, Expanded};
use rehearsal::config::engine::Prefill;
use rehearsal::data::example::Sequence;
use rehearsal::engine::hybrid::{EngineSetup, HybridEngine};
use rehearsal::engine::phase::{GenerateJob, GenerateRequest, ModelSource, Phase, PrepareStage};
use rehearsal::model::{DecodeRows, Documents, LatentCache, PackFor, Params, Transformer};
use rehearsal::train::Items;
use rehearsal_kernels::{CacheFormat, Kernels};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Names a folder of fixtures to be used instead of the committed ones.
const PLACE: &str = "REHEARSAL_ORACLE";
const PAGE_TOKENS: usize = 8;

struct Fixture {
    name: String,
    engine: HybridEngine,
    expected: HashMap<String, Tensor>,
    work: TempDir,
}

/// All fixtures, in order of their names.
fn fixtures() -> Vec<Fixture> {
    let committed = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracle");
    let place = std::env::var_os(PLACE).map_or_else(committed, PathBuf::from);
    let entries = std::fs::read_dir(&place)
        .unwrap_or_else(|e| panic!("no fixtures in {}: {e}", place.display()));
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "{} holds no fixture", place.display());
    folders.iter().map(|folder| Fixture::open(folder)).collect()
}

impl Fixture {
    fn open(folder: &Path) -> Fixture {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let work = TempDir::new().unwrap();
        let config = read_model_config(folder).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let settings =
            EngineConfig { threads: 2, page_tokens: PAGE_TOKENS, ..EngineConfig::default() };
        let spill = work.path().join("spill");
        let setup =
            EngineSetup { model: config, engine: settings, seed: 0, spill, team: Team::alone() };
        let mut engine = HybridEngine::new(setup).unwrap();
        let policy = ModelSource::Folder(folder.to_path_buf());
        engine
            .prepare(&PrepareStage { policy, optimizer: None, ..stage(None) })
            .unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let file = folder.join("expected.safetensors");
        let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        Fixture { name, engine, expected, work }
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let tensor = self.expected.get(name).unwrap_or_else(|| panic!("{}: no {name}", self.name));
        let flat = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        flat.into_iter().map(f64::from).collect()
    }

    fn integers(&self, name: &str) -> Vec<usize> {
        self.numbers(name).into_iter().map(|number| number as usize).collect()
    }

    /// The documents, with the targets of their loss.
    fn documents(&self) -> Vec<Sequence> {
        let (tokens, targets) = (self.integers("tokens"), self.integers("target"));
        let mut first = 0;
        let mut document = |length: &usize| {
            let range = first..first + length;
            first = range.end;
            Sequence {
                tokens: tokens[range.clone()].iter().map(|t| *t as u32).collect(),
                target: targets[range].iter().map(|t| *t == 1).collect(),
            }
        };
        self.integers("lengths").iter().map(&mut document).collect()
    }

    /// The model with the weights that the engine holds of it.
    fn load<'a>(&mut self, kernels: &'a dyn Kernels) -> Tiny<'a> {
        self.engine.save(self.work.path(), false).unwrap();
        let config = read_model_config(self.work.path()).unwrap();
        let saved = TensorFolder::open(self.work.path()).unwrap();
        let model = Transformer::new(kernels, &config, false).unwrap();
        let mut params = Params::new(kernels, model.layout.clone(), "policy").unwrap();
        params.load(kernels, |spec| saved.read_f32(&spec.name)).unwrap();
        Tiny { kernels, model, params }
    }
}

/// Logits of every position of a document, through the sampler's cache.
pub fn logits(
    kernels: &dyn Kernels,
    model: &Transformer,
    params: &Params,
    tokens: &[u32],
    prefill: Prefill,
) -> Vec<f64> {
    let packed =
        model.pack(kernels, params, "policy", 0, PackFor { prefill, ..PackFor::SAMPLING }).unwrap();
    let pages = tokens.len().div_ceil(PAGE_TOKENS);
    let mut cache =
        LatentCache::new(kernels, &model.config, CacheFormat::F32, pages, PAGE_TOKENS).unwrap();
    let mut rows = DecodeRows::default();
    rows.begin(&(0..pages as u32).rev().collect::<Vec<u32>>());
    for (position, token) in tokens.iter().enumerate() {
        rows.push(*token, position, PAGE_TOKENS);
        rows.want_last();
    }
    kernels.download_f64(&model.decode(kernels, params, &packed, &mut cache, &rows).unwrap())
}

/// The same of all documents.
fn decoded(tiny: &Tiny<'_>, documents: &[Sequence], prefill: Prefill) -> Vec<f64> {
    let of = |d: &Sequence| logits(tiny.kernels, &tiny.model, &tiny.params, &d.tokens, prefill);
    documents.iter().flat_map(of).collect()
}

/// The same from the trainer's forward pass.
fn trained(tiny: &Tiny<'_>, documents: &[Sequence], form: AttentionForm) -> Vec<f64> {
    let (packed, kernels) = (tiny.pack(form, false), tiny.kernels);
    let tokens: Vec<&[u32]> = documents.iter().map(|d| d.tokens.as_slice()).collect();
    let documents = Documents::pack(kernels, &tokens).unwrap();
    let pass = tiny.model.pass(kernels, &documents, &packed);
    let hidden = tiny.model.forward_only(&pass, &tiny.params, &packed).unwrap();
    let all: Vec<u32> = (0..hidden.rows() as u32).collect();
    kernels.download_f64(&packed.heads().logits(kernels, &tiny.params, &hidden, &all).unwrap())
}

#[test]
fn logits_equal_those_of_transformers() {
    let mut faults = Vec::new();
    for mut fixture in fixtures() {
        let kernels = cpu(2);
        let (tiny, documents) = (fixture.load(&kernels), fixture.documents());
        for (path, got) in [
            ("decoded", decoded(&tiny, &documents, Prefill::Absorbed)),
            ("prefilled", decoded(&tiny, &documents, Prefill::ByCost)),
            ("expanded", trained(&tiny, &documents, Expanded)),
            ("absorbed", trained(&tiny, &documents, Absorbed)),
        ] {
            let expected = fixture.numbers("logits");
            assert_eq!(got.len(), expected.len());
            let errors = got.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let error = errors.max_by(f64::total_cmp).unwrap();
            let told = format!("{} {path}: logit {error:.1e}", fixture.name);
            println!("oracle {told}");
            faults.extend((error >= 1e-4 || error.is_nan()).then_some(told));
        }
    }
    assert!(faults.is_empty(), "more than 1e-4 apart\n{}", faults.join("\n"));
}

#[test]
fn loss_and_every_gradient_equal_those_of_transformers() {
    let mut faults = Vec::new();
    for mut fixture in fixtures() {
        for form in [Expanded, Absorbed] {
            let (loss, (gradient, parameter)) = differences(&mut fixture, form);
            let name = &fixture.name;
            for (what, error) in [("loss", loss), ("gradient", gradient)] {
                let told = format!("{name} {form:?}: {what} {error:.1e}, {parameter}");
                println!("oracle {told}");
                faults.extend((error >= 1e-4 || error.is_nan()).then_some(told));
            }
        }
    }
    assert!(faults.is_empty(), "more than 1e-4 apart\n{}", faults.join("\n"));
}

/// How far the loss is off, and the gradient with the largest relative L2.
fn differences(fixture: &mut Fixture, form: AttentionForm) -> (f64, (f64, String)) {
    let kernels = cpu(2);
    let tiny = fixture.load(&kernels);
    let documents = fixture.documents();
    let (loss, gradients) = tiny.loss_and_gradients(&Items::Documents(&documents), form, 0.0);
    let loss = (loss - fixture.numbers("loss")[0]).abs();
    let expected = fixture.expected.keys().filter(|key| key.starts_with("gradient.")).count();
    assert_eq!(
        expected,
        tiny.model.layout.specs.len(),
        "{}: another set of parameters",
        fixture.name
    );
    let errors = tiny.model.layout.specs.iter().enumerate().map(|(index, spec)| {
        let got = kernels.download_f64(&gradients.slab.tensor(index));
        let expected = fixture.numbers(&format!("gradient.{}", spec.name));
        (relative_l2(&got, &expected), spec.name.clone())
    });
    (loss, errors.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap())
}

#[test]
fn greedy_continuations_equal_those_of_transformers() {
    let mut faults = Vec::new();
    for mut fixture in fixtures() {
        let prompt = fixture.integers("prompt")[0];
        let documents = fixture.documents();
        let greedy = fixture.integers("greedy");
        let expected: Vec<&[usize]> = greedy.chunks(greedy.len() / documents.len()).collect();
        let request = |(slot, document): (usize, &Sequence)| GenerateRequest {
            slot: slot as u32,
            tokens: document.tokens[..prompt].to_vec(),
            prompt: slot as u64,
            samples: 1,
        };
        let job = GenerateJob {
            requests: documents.iter().enumerate().map(request).collect(),
            max_new_tokens: expected[0].len(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            stop_tokens: Vec::new(),
            seed: 0,
            step: 0,
            policy_version: 0,
        };
        fixture.engine.enter_phase(Phase::Generate).unwrap();
        let mut groups = Vec::new();
        fixture.engine.generate(&job, &mut |group| groups.push(group)).unwrap();
        groups.sort_by_key(|group| group.slot);
        assert_eq!(groups.len(), expected.len());
        for (group, expected) in groups.iter().zip(&expected) {
            let got: Vec<usize> = group.rollouts[0].tokens.iter().map(|t| *t as usize).collect();
            let told = format!("{}, document {}: {got:?} {expected:?}", fixture.name, group.slot);
            faults.extend((got != *expected).then_some(told));
        }
        println!("oracle {}: {} greedy tokens", fixture.name, greedy.len());
    }
    assert!(faults.is_empty(), "ours and the expected ones\n{}", faults.join("\n"));
}
