//! A million changed files against each reader, or as many as `REHEARSAL_INPUTS` says.

use crate::hostile::campaign::must_hold;

fn inputs() -> u64 {
    let given = std::env::var("REHEARSAL_INPUTS").ok();
    given.map_or(1_000_000, |count| count.parse().expect("REHEARSAL_INPUTS is a number"))
}

#[test]
fn a_million_safetensors_files() {
    must_hold("safetensors", inputs());
}

#[test]
fn a_million_configs_of_models() {
    must_hold("config", inputs());
}

#[test]
fn a_million_tokenizers() {
    must_hold("tokenizer", inputs());
}

#[test]
fn a_million_chat_templates() {
    must_hold("chat", inputs());
}

#[test]
fn a_million_checkpoints() {
    must_hold("checkpoint", inputs());
}

#[test]
fn a_million_configs_of_runs() {
    must_hold("run", inputs());
}

#[test]
fn a_million_data_sets() {
    must_hold("lines", inputs());
}

#[test]
fn a_million_gguf_files() {
    must_hold("gguf", inputs());
}
