//! Coverage-guided fuzzing of GGUF files; see fuzz/README.md.
#![no_main]

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::campaign::fuzz("gguf", input));
