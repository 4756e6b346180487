//! The model against finite differences, against itself in its other form, and f32 against f64.

use crate::tiny::{
    Tiny, config, config_dense, config_dense_long, config_grouped, config_lite, config_scaled, cpu,
    documents, reference, relative_l2, worst,
};
use rehearsal::config::ModelConfig;
use rehearsal::config::engine::AttentionForm::{self, Absorbed, Expanded};
use rehearsal::config::routing::Balance;
use rehearsal::data::example::Pair;
use rehearsal::model::moe::Routing;
use rehearsal::model::{DecodeRows, Documents, LatentCache};
use rehearsal::train::Items;
use rehearsal_kernels::random::{Draws, Stream};
use rehearsal_kernels::{Buffer, CacheFormat, Kernels};

/// Compares every tensor's gradient with central differences at a few random elements.
fn check_gradients(
    config: &ModelConfig,
    value_head: bool,
    items: &Items<'_>,
    form: AttentionForm,
    balance: Balance,
    dropping: Option<(f64, &[u32])>,
) {
    let kernels = reference();
    let mut tiny = Tiny::new(&kernels, config, value_head);
    let (_, gradients, _) = tiny.trained(items, form, balance, dropping);
    let layout = tiny.model.layout.clone();
    assert!(gradients.missing(&layout, value_head).is_empty());
    let mut draws = Draws::new(1, Stream::Data, [7, 7, 7]);
    let mut worst = (0.0, String::new());
    for (index, spec) in
        layout.specs.iter().enumerate().filter(|(i, _)| layout.is_trained(*i, value_head))
    {
        let analytic = kernels.download_f64(&gradients.slab.tensor(index));
        let original = kernels.download_f64(&tiny.params.slab.tensor(index));
        let scale = analytic.iter().fold(0.0f64, |m, g| m.max(g.abs())).max(1e-4);
        for _ in 0..4 {
            let element = draws.below(original.len() as u64) as usize;
            let mut loss_at = |delta: f64| {
                let mut values = original.clone();
                values[element] += delta;
                kernels.upload_f64(&values, &mut tiny.params.slab.tensor_mut(index));
                tiny.trained(items, form, balance, dropping).0
            };
            let step = 1e-5;
            let numeric = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            kernels.upload_f64(&original, &mut tiny.params.slab.tensor_mut(index));
            let error = (numeric - analytic[element]).abs() / scale;
            if error > worst.0 {
                worst = (
                    error,
                    format!(
                        "{}[{element}]: {numeric:e} against {:e}",
                        spec.name, analytic[element]
                    ),
                );
            }
        }
    }
    println!("worst gradient element, {form:?}: {:e} at {}", worst.0, worst.1);
    assert!(worst.0 < 1e-5, "{} {}", worst.0, worst.1);
}

#[test]
fn every_gradient_equals_its_finite_difference() {
    for (config, form) in [
        (config(), Expanded),
        (config(), Absorbed),
        (config_lite(), Expanded),
        (config_lite(), Absorbed),
        (config_scaled(), Expanded),
        (config_scaled(), Absorbed),
        (config_dense(), Expanded),
        (config_dense_long(), Expanded),
    ] {
        let documents = documents(&config, &[7, 4, 9]);
        // The balance loss is only piecewise smooth: choices of experts must not flip within a step of 1e-5.
        let balance = Balance::of_experts(0.01);
        check_gradients(&config, false, &Items::Documents(&documents), form, balance, None);
    }
}

#[test]
fn gradients_with_every_balance_loss_and_dropped_pairs_equal_their_finite_differences() {
    for normalize in [false, true] {
        let mut config = config_grouped();
        config.norm_topk_prob = normalize;
        let documents = documents(&config, &[7, 4, 9]);
        let items = Items::Documents(&documents);
        let balance = Balance { expert: 0.02, device: 0.05, communication: 0.04 };
        // What is chosen and dropped must not flip within a step of 1e-5 either.
        let dropping: Option<(f64, &[u32])> = Some((0.9, &[0, 1, 0]));
        check_gradients(&config, false, &items, Expanded, balance, dropping);
        let kernels = reference();
        let routings =
            Tiny::new(&kernels, &config, false).trained(&items, Expanded, balance, dropping).2;
        for routing in &routings {
            let drops = routing.drops.unwrap();
            assert!(drops.dropped > 3 && drops.overflow > 0, "{drops:?}");
        }
        // The first layer with experts sees the same rows with and without drops, and what was chosen counts, not what stayed.
        let whole = Tiny::new(&kernels, &config, false).trained(&items, Expanded, balance, None).2;
        let counted = |r: &Routing| (r.experts.clone(), r.devices, r.balance.clone());
        assert_eq!(counted(&routings[0]), counted(&whole[0]));
        assert_eq!(whole[0].experts.iter().sum::<u32>(), 3 * 20);
    }
}

#[test]
fn a_reward_models_gradients_equal_their_finite_differences() {
    for config in [config(), config_dense()] {
        let pairs: Vec<Pair> = documents(&config, &[5, 7, 6, 4])
            .chunks(2)
            .map(|pair| Pair { chosen: pair[0].tokens.clone(), rejected: pair[1].tokens.clone() })
            .collect();
        check_gradients(&config, true, &Items::Pairs(&pairs), Expanded, Balance::NONE, None);
    }
}

#[test]
fn tied_embeddings_collect_both_gradients() {
    let mut config = config();
    config.tie_word_embeddings = true;
    let documents = documents(&config, &[8, 5]);
    let items = Items::Documents(&documents);
    check_gradients(&config, false, &items, Expanded, Balance::NONE, None);
}

#[test]
fn the_absorbed_form_equals_the_expanded_one() {
    for config in [config(), config_lite(), config_scaled()] {
        let documents = documents(&config, &[11, 3, 20]);
        let kernels = reference();
        let tiny = Tiny::new(&kernels, &config, false);
        let items = Items::Documents(&documents);
        let (expanded, absorbed) = (
            tiny.loss_and_gradients(&items, Expanded, 0.0),
            tiny.loss_and_gradients(&items, Absorbed, 0.0),
        );
        assert!((expanded.0 - absorbed.0).abs() < 1e-10, "{} {}", expanded.0, absorbed.0);
        let whole = |g: &rehearsal::model::Gradients| kernels.download_f64(&g.slab.whole());
        let (index, error) = worst(&whole(&absorbed.1), &whole(&expanded.1), 1e-3);
        assert!(error < 1e-9, "element {index}: {error:e}");
    }
}

#[test]
fn f32_gradients_follow_the_f64_reference() {
    for (config, form) in [
        (config(), Expanded),
        (config_lite(), Absorbed),
        (config_scaled(), Expanded),
        (config_dense(), Expanded),
    ] {
        let documents = documents(&config, &[11, 3, 20]);
        let items = Items::Documents(&documents);
        let (fast, exact) = (cpu(2), reference());
        let (ours, wanted) = (Tiny::new(&fast, &config, false), Tiny::new(&exact, &config, false));
        let (got, want) = (
            ours.loss_and_gradients(&items, form, 0.01),
            wanted.loss_and_gradients(&items, form, 0.01),
        );
        assert!((got.0 - want.0).abs() < 1e-5, "loss {} against {}", got.0, want.0);
        for (index, spec) in ours.model.layout.specs.iter().enumerate() {
            let error = relative_l2(
                &fast.download_f64(&got.1.slab.tensor(index)),
                &exact.download_f64(&want.1.slab.tensor(index)),
            );
            assert!(error < 1e-4, "{}: relative L2 {error:e}", spec.name);
        }
    }
}

#[test]
fn thread_count_changes_no_bit_of_a_gradient() {
    for config in [config(), config_dense()] {
        let documents = documents(&config, &[30, 17, 41, 9]);
        let gradients: Vec<Vec<u32>> = [1, 2, 4]
            .map(|threads| {
                let kernels = cpu(threads);
                let tiny = Tiny::new(&kernels, &config, false);
                let (_, gradients) =
                    tiny.loss_and_gradients(&Items::Documents(&documents), Expanded, 0.01);
                bits(&kernels, &gradients.slab.whole())
            })
            .to_vec();
        assert!(gradients[0] == gradients[1] && gradients[0] == gradients[2]);
    }
}

fn bits(kernels: &dyn Kernels, buffer: &Buffer) -> Vec<u32> {
    kernels.download(buffer).iter().map(|x| x.to_bits()).collect()
}

/// Log-probabilities of one document's tokens through the training forward.
fn logprobs(tiny: &Tiny<'_>, form: AttentionForm, documents: &[&[u32]], which: usize) -> Vec<f64> {
    let packed = tiny.pack(form, false);
    let packed_documents = Documents::pack(tiny.kernels, documents).unwrap();
    let pass = tiny.model.pass(tiny.kernels, &packed_documents, &packed);
    let hidden = tiny.model.forward_only(&pass, &tiny.params, &packed).unwrap();
    let base: usize = documents[..which].iter().map(|d| d.len()).sum();
    let rows: Vec<u32> = (0..documents[which].len() as u32 - 1).map(|i| base as u32 + i).collect();
    packed
        .heads()
        .logprobs(&pass, &tiny.params, &hidden, &rows, &documents[which][1..], 1.0, false)
        .unwrap()
        .logprobs
}

#[test]
fn a_token_sees_neither_the_future_nor_another_document() {
    let kernels = cpu(2);
    let document: Vec<u32> = (0..18).map(|i| i * 7 % 29).collect();
    let neighbour: Vec<u32> = (0..9).map(|i| i * 5 % 29).collect();
    for (config, form) in [(config(), Expanded), (config(), Absorbed), (config_dense(), Expanded)] {
        let tiny = Tiny::new(&kernels, &config, false);
        let alone = logprobs(&tiny, form, &[&document], 0);
        assert_eq!(alone, logprobs(&tiny, form, &[&neighbour, &document, &neighbour], 1));
        for place in 1..document.len() - 1 {
            let mut changed = document.clone();
            changed[place] = (changed[place] + 1) % 29;
            let after = logprobs(&tiny, form, &[&changed], 0);
            // Entry i is the log-probability of token i + 1, from what stands before it.
            assert_eq!(alone[..place - 1], after[..place - 1], "{form:?}, {place}");
            assert!(alone[place..].iter().zip(&after[place..]).all(|(a, b)| a != b), "{place}");
        }
    }
}

/// Logits of every position of a document: a prompt of nine tokens in one go, then token by token, in scattered pages.
fn decoded_logits(tiny: &Tiny<'_>, document: &[u32]) -> Vec<Buffer> {
    let (kernels, packed) = (tiny.kernels, tiny.pack(Absorbed, false));
    let mut cache = LatentCache::new(kernels, &tiny.model.config, CacheFormat::F32, 8, 4).unwrap();
    let chunks = std::iter::once(0..9).chain((9..document.len()).map(|i| i..i + 1));
    let decode = |chunk: std::ops::Range<usize>| {
        let mut rows = DecodeRows::default();
        rows.begin(&[5, 2, 7, 0, 1, 3]);
        for position in chunk {
            rows.push(document[position], position, 4);
            rows.want_last();
        }
        tiny.model.decode(kernels, &tiny.params, &packed, &mut cache, &rows).unwrap()
    };
    chunks.map(decode).collect()
}

#[test]
fn decoding_from_the_cache_equals_the_training_forward_at_every_position() {
    let document: Vec<u32> = (0..23).map(|i| i * 11 % 29).collect();
    for config in [config(), config_lite(), config_scaled(), config_dense(), config_dense_long()] {
        let kernels = cpu(2);
        let tiny = Tiny::new(&kernels, &config, false);
        let flat: Vec<f64> = decoded_logits(&tiny, &document)
            .iter()
            .flat_map(|logits| kernels.download_f64(logits))
            .collect();
        let decoded: Vec<f64> = flat
            .chunks(config.vocab_size)
            .zip(&document[1..])
            .map(|(row, next)| row[*next as usize] - row.iter().map(|l| l.exp()).sum::<f64>().ln())
            .collect();
        for (form, tolerance) in [(Absorbed, 1e-5), (Expanded, 1e-4)] {
            let (index, error) = worst(&decoded, &logprobs(&tiny, form, &[&document], 0), 1.0);
            assert!(error < tolerance, "{form:?}, position {index}: {error:e}");
        }
    }
}

#[test]
fn decoding_has_the_bits_of_the_training_forward_in_the_form_of_the_sampler() {
    let document: Vec<u32> = (0..23).map(|i| i * 11 % 29).collect();
    for config in [config(), config_lite(), config_scaled(), config_dense(), config_dense_long()] {
        let kernels = cpu(2);
        let tiny = Tiny::new(&kernels, &config, false);
        let decoded: Vec<u32> = decoded_logits(&tiny, &document)
            .iter()
            .flat_map(|logits| bits(&kernels, logits))
            .collect();
        let packed = tiny.pack(Absorbed, false);
        let documents = Documents::pack(&kernels, &[&document]).unwrap();
        let pass = tiny.model.pass(&kernels, &documents, &packed);
        let hidden = tiny.model.forward_only(&pass, &tiny.params, &packed).unwrap();
        let rows: Vec<u32> = (0..document.len() as u32).collect();
        let logits = packed.heads().logits(&kernels, &tiny.params, &hidden, &rows).unwrap();
        assert_eq!(decoded, bits(&kernels, &logits), "{:?}", config.attention());
    }
}

#[test]
fn a_single_expert_is_not_divided_by_itself() {
    // As published: with K = 1 the weight is score times factor, whatever norm_topk_prob says.
    let kernels = reference();
    let loss = |experts: usize, norm_topk_prob: bool| {
        let mut config = config();
        (config.num_experts_per_tok, config.norm_topk_prob) = (experts, norm_topk_prob);
        let tiny = Tiny::new(&kernels, &config, false);
        let documents = documents(&config, &[9, 5]);
        tiny.loss_and_gradients(&Items::Documents(&documents), Expanded, 0.0).0
    };
    assert_eq!(loss(1, true), loss(1, false));
    assert_ne!(loss(2, true), loss(2, false));
}
