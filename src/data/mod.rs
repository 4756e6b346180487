//! What a run eats: files of examples, turned into token sequences, pairs and prompts.
//!
//! The generated task writes files like any other; everything after it reads only files. Order and
//! mixture are pure functions of (seed, stage, step), so that a resumed run eats the same batches.

pub mod example;

// Files to records, records to tokens.
pub mod chat;
mod chat_json;
pub mod jsonl;
pub mod lines;
pub mod tokenizer;
mod tokenizer_json;
mod tokenizer_rules;

// Tokens to batches.
pub mod conversations;
pub mod corpus;
pub mod order;
pub mod preferences;
pub mod prompts;
pub mod protected;

// A stage's sets, opened; and the check that nothing held out is trained on.
pub mod audit;
pub mod loader;
pub mod sources;

// The generated tasks.
pub mod needle;
pub mod needle_files;
pub mod word_machine;
pub mod word_machine_files;
mod word_machine_pairs;

pub use audit::AuditReport;
pub use chat::{ChatTemplate, Message, Role};
pub use example::{Batch, Pair, Prompt, Sequence};
pub use jsonl::check_set;
pub use loader::{Loader, StageData};
pub use sources::Sources;
pub use tokenizer::Tokenizer;
