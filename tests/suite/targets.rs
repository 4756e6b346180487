//! What counts in a loss: the targets alone, each in its own document.

use crate::tiny::{Tiny, config, config_lite, documents, reference, worst};
use rehearsal::config::engine::AttentionForm::Expanded;
use rehearsal::data::example::Sequence;
use rehearsal::model::Documents;
use rehearsal::train::Items;

/// Loss and gradients of one step over `documents`.
fn step(tiny: &Tiny<'_>, documents: &[Sequence]) -> (f64, Vec<f64>) {
    let (loss, gradients) = tiny.loss_and_gradients(&Items::Documents(documents), Expanded, 0.0);
    (loss, tiny.kernels.download_f64(&gradients.slab.whole()))
}

#[test]
fn the_loss_is_the_mean_over_targets_and_no_prompt_token_adds_to_it() {
    let kernels = reference();
    let tiny = Tiny::new(&kernels, &config(), false);
    let mut asked = documents(&config(), &[9, 13]);
    for (document, prompt) in asked.iter_mut().zip([4, 7]) {
        document.target = (0..document.tokens.len()).map(|i| i >= prompt).collect();
    }
    let (loss, gradients) = step(&tiny, &asked);
    let packed = tiny.pack(Expanded, false);
    let (mut sum, mut count) = (0.0, 0);
    for (document, prompt) in asked.iter().zip([4, 7]) {
        let alone = Documents::pack(&kernels, &[document.tokens.as_slice()]).unwrap();
        let pass = tiny.model.pass(&kernels, &alone, &packed);
        let hidden = tiny.model.forward_only(&pass, &tiny.params, &packed).unwrap();
        let rows: Vec<u32> = (prompt as u32 - 1..document.tokens.len() as u32 - 1).collect();
        let replies = &document.tokens[prompt..];
        let heads = packed.heads();
        let output =
            heads.logprobs(&pass, &tiny.params, &hidden, &rows, replies, 1.0, false).unwrap();
        sum -= output.logprobs.iter().sum::<f64>();
        count += replies.len();
    }
    assert!((loss - sum / count as f64).abs() < 1e-12, "{loss} against {}", sum / count as f64);
    // A prompt that nothing answers is no part of the mean either.
    asked.push(Sequence { tokens: vec![3, 5, 7, 11, 13], target: vec![false; 5] });
    let (same_loss, same_gradients) = step(&tiny, &asked);
    assert_eq!(same_loss, loss);
    let (index, error) = worst(&same_gradients, &gradients, 1e-3);
    assert!(error < 1e-10, "element {index}: {error:e}");
}

#[test]
fn packed_documents_have_the_loss_and_gradients_that_they_have_alone() {
    for config in [config(), config_lite()] {
        let kernels = reference();
        let tiny = Tiny::new(&kernels, &config, false);
        let all = documents(&config, &[11, 3, 20]);
        let (loss, gradients) = step(&tiny, &all);
        let total: usize = all.iter().map(Sequence::targets).sum();
        let (mut loss_alone, mut alone) = (0.0, vec![0.0; gradients.len()]);
        for document in &all {
            let share = document.targets() as f64 / total as f64;
            let (loss, gradients) = step(&tiny, std::slice::from_ref(document));
            loss_alone += share * loss;
            alone.iter_mut().zip(&gradients).for_each(|(sum, g)| *sum += share * g);
        }
        assert!((loss - loss_alone).abs() < 1e-12, "{loss} against {loss_alone}");
        let (index, error) = worst(&gradients, &alone, 1e-3);
        assert!(error < 1e-10, "element {index}: {error:e}");
    }
}
