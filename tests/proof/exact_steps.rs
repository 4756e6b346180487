//! Five hundred steps of alignment without one bit between sampler and trainer, however the work is cut.

use crate::exact::{Subject, WAYS, Way, check_exact};

/// The suite's ways, and two more for each instruction set that is not the best.
fn ways() -> Vec<Way> {
    let mut ways = WAYS.to_vec();
    for isa in crate::runs::instruction_sets().into_iter().skip(1) {
        ways.push(Way { isa, threads: 2, decode_batch: 7, ..WAYS[0] });
        ways.push(Way { isa, threads: 4, decode_batch: 128, ..WAYS[2] });
    }
    ways
}

#[test]
fn five_hundred_steps_of_the_smallest_model() {
    check_exact(&Subject::smoke(), &ways(), 500);
}

#[test]
fn five_hundred_steps_of_a_model_of_two_million_parameters() {
    let tiny = Subject {
        model: "tiny.json",
        start_from: None,
        prompts: 2,
        group_size: 3,
        max_new_tokens: 24,
    };
    check_exact(&tiny, &ways(), 500);
}
