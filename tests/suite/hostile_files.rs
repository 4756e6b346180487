//! Files that somebody else wrote: some thousands of changed ones against each reader. See
//! `tests/hostile`; `proof` tries a million of each.

use crate::hostile::campaign::must_hold;

const INPUTS: u64 = 20_000;

#[test]
fn no_safetensors_file_makes_a_reader_fail() {
    must_hold("safetensors", INPUTS);
}

#[test]
fn no_config_of_a_model_makes_a_reader_fail() {
    must_hold("config", INPUTS);
}

#[test]
fn no_tokenizer_makes_a_reader_fail() {
    must_hold("tokenizer", INPUTS);
}

#[test]
fn no_chat_template_makes_a_reader_fail() {
    must_hold("chat", INPUTS);
}

#[test]
fn no_checkpoint_makes_a_reader_fail() {
    must_hold("checkpoint", INPUTS);
}

#[test]
fn no_config_of_a_run_makes_a_reader_fail() {
    must_hold("run", INPUTS);
}

#[test]
fn no_data_set_makes_a_reader_fail() {
    must_hold("lines", INPUTS);
}

#[test]
fn no_gguf_file_makes_a_reader_fail() {
    must_hold("gguf", INPUTS);
}
