//! Formats in which weights rest: what a number is kept as, and which numbers share a scale.
//!
//! Knows names, sizes and blocks; `ops::quantize` has the arithmetic. Products compute in f32 whatever the format:
//! it decides what is read from memory, not how it is multiplied.
//!
//! A kept number is worth `f32(code) * scale`, rounded once to f32; scale = largest magnitude of its block / the
//! format's largest code.

/// What a packed weight's numbers are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 32-bit floats: the weights themselves. The only one that is trained.
    #[default]
    F32,
    /// 16-bit brain floats: f32 rounded to nearest even at 8 bits of precision, no scale.
    Bf16,
    /// FP8 E4M3 (saturating, to nearest even), one scale per output channel: a row of the weight.
    Fp8Channel,
    /// FP8 E4M3 with one scale per 128 x 128 block of the weight, as DeepSeek-V3's checkpoints have them.
    Fp8Block,
    /// 8-bit integers from -127 to 127, one scale per output channel.
    Int8,
}

impl WeightFormat {
    /// All formats, widest first.
    pub const ALL: [WeightFormat; 5] = [
        WeightFormat::F32,
        WeightFormat::Bf16,
        WeightFormat::Fp8Channel,
        WeightFormat::Fp8Block,
        WeightFormat::Int8,
    ];

    /// Bytes of one number, scales apart.
    pub fn code_bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::Bf16 => 2,
            WeightFormat::Fp8Channel | WeightFormat::Fp8Block | WeightFormat::Int8 => 1,
        }
    }

    /// Rows and columns of the weight that share a scale; `None` for a format without scales. Blocks are counted from
    /// the weight's first row, whatever rows are packed, so that every packing of one weight has the same values.
    pub(crate) fn block(self, cols: usize) -> Option<(usize, usize)> {
        match self {
            WeightFormat::F32 | WeightFormat::Bf16 => None,
            WeightFormat::Fp8Channel | WeightFormat::Int8 => Some((1, cols)),
            WeightFormat::Fp8Block => Some((SCALE_BLOCK, SCALE_BLOCK)),
        }
    }

    /// The largest code of a format with scales.
    pub(crate) fn largest(self) -> f32 {
        match self {
            WeightFormat::Int8 => 127.0,
            _ => E4M3_LARGEST,
        }
    }
}

/// Rows and columns of a block that shares a scale.
const SCALE_BLOCK: usize = 128;

/// The largest finite number of FP8 E4M3.
pub(crate) const E4M3_LARGEST: f32 = 448.0;
