//! Coverage-guided fuzzing of safetensors files and indices of shards; see fuzz/README.md.
#![no_main]

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::campaign::fuzz("safetensors", input));
