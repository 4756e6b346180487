//! What a model's weights are kept as where it is only read.
//!
//! Names alone; `engine::formats` says which format of the kernels each is.

use serde::{Deserialize, Serialize};

/// Type of packed weights; norms, embedding and router stay f32, the head is bf16 where they are FP8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// 32-bit floats: the trainer's own numbers.
    #[default]
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// FP8 E4M3, a scale per output channel.
    Fp8,
    /// FP8 E4M3, a scale per 128 x 128 block.
    Fp8Block,
    /// 8-bit integers, a scale per output channel.
    Int8,
}

impl Dtype {
    /// All types, widest first.
    pub const ALL: [Dtype; 5] = [Dtype::F32, Dtype::Bf16, Dtype::Fp8, Dtype::Fp8Block, Dtype::Int8];

    /// The name in TOML, journal and command line.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::Fp8 => "fp8",
            Dtype::Fp8Block => "fp8-block",
            Dtype::Int8 => "int8",
        }
    }
}
