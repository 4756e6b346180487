//! Proof: what the suite tries in thousands, in millions. Behind the feature `proof`, outside CI:
//! `cargo test --release --features proof --test proof -- --nocapture --test-threads 1`.

#[path = "../hostile/mod.rs"]
mod hostile;

mod hostile_files;
