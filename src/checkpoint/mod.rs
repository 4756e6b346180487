//! What is kept: tensors in files, committed checkpoints, exports.
//!
//! Knows no model and no optimizer: callers hand over names, shapes and numbers, and get them back.
//! Everything that is not a tensor is JSON, so that nothing in a checkpoint can execute.
//!
//! Invariants:
//!   * a folder under its final name is whole: it was written aside, synced, and renamed
//!   * nothing is read from a folder with a manifest before every byte of it was compared with the
//!     manifest

// The disk, and what its errors mean to a person.
mod disk;

// Tensors and the files beside them.
mod fused_experts;
mod mapped;
pub mod model_json;
pub mod pieces;
pub mod shards;
pub mod stored;
mod tensor_writer;
pub mod tensors;
pub mod tokenizer_json;

// Files of other programs.
pub mod gguf_read;

// Committed checkpoints.
pub mod manifest;
pub mod store;

// A folder that transformers loads, and a file that llama.cpp loads.
pub mod export;
mod export_gguf;
mod gguf;
mod gguf_keys;
mod gguf_tensors;
mod gguf_tokenizer;

pub use disk::disk_fault;
pub use export::{ExportReport, export_hf};
pub use export_gguf::export_gguf;
pub use gguf_read::GgufFile;
pub use gguf_tokenizer::GgufTokenizer;
pub use manifest::{FileRecord, Manifest};
pub use model_json::{read_model_config, write_model_config};
pub use pieces::{Pieces, piece_name};
pub use shards::Shard;
pub use store::{Commit, Latest, Rejected, Staging, Store};
pub use stored::StoredType;
pub use tensors::{TensorEntry, TensorFolder, write_shard, write_tensors};
