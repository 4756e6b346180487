//! Coverage-guided fuzzing of tokenizer.json; see fuzz/README.md.
#![no_main]

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::campaign::fuzz("tokenizer", input));
