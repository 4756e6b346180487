//! Coverage-guided fuzzing of manifests, calibrations, journals and records of runs; see fuzz/README.md.
#![no_main]

#[path = "../../tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::campaign::fuzz("checkpoint", input));
