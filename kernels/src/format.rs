//! Formats in which weights and cache rows rest: what a number is kept as, and which numbers share a scale.
//!
//! Knows names, sizes and blocks; `ops::quantize`, `ops::int8` and `ops::cache_rows` have the arithmetic. Products compute in
//! f32 whatever the format, which decides what is read from memory, not how it is multiplied; except int8, which multiplies
//! integers.
//!
//! A kept number is worth `f32(code) * scale`, rounded once to f32; scale = largest magnitude of its block / the
//! format's largest code.

use crate::buffer::Buffer;

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
    /// 8-bit integers from -127 to 127, one scale per output channel. Products for
    /// [`Transposed`](crate::Product::Transposed) are of integers: activations become codes from -127 to 127 with a scale for
    /// every 16 of a row. For [`Plain`](crate::Product::Plain) the codes are read back as f32, as in the other formats.
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

/// What the numbers of a cache row are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheFormat {
    /// 32-bit floats: the trainer's numbers, to the bit.
    #[default]
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// The latent as FP8 E4M3 with a bf16 scale per 128 numbers, the rope key as bf16.
    Fp8,
    /// At most 6 bits a number, scales included, at DeepSeek-V2's widths: the latent as 5-bit integers with a bf16 scale
    /// per 24, divided by the weight of its norm first; the rope key, which logits depend on most, as 8-bit integers.
    SixBit,
}

impl CacheFormat {
    /// All formats, widest first.
    pub const ALL: [CacheFormat; 4] =
        [CacheFormat::F32, CacheFormat::Bf16, CacheFormat::Fp8, CacheFormat::SixBit];
}

/// What a token leaves in a layer's cache: `latent` numbers (MLA's latent, or all keys and values of GQA), then `rope`
/// numbers of a key that all heads share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    /// What they are kept as.
    pub format: CacheFormat,
    /// Numbers before the rope key.
    pub latent: usize,
    /// Numbers of the rope key; 0 if there is none.
    pub rope: usize,
}

impl CacheLayout {
    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.latent + self.rope
    }

    /// Bytes of a row in fewer bits than f32, or of f32 itself; scales included.
    pub fn row_bytes(&self) -> usize {
        match self.format {
            CacheFormat::F32 => 4 * self.width(),
            _ => self.parts().iter().map(|(part, count)| part.bytes(*count)).sum(),
        }
    }

    /// How the two parts of a row in codes are kept, with their numbers.
    pub(crate) fn parts(&self) -> [(Part, usize); 2] {
        let wide = Part { code: Code::Bf16, group: usize::MAX };
        let (latent, rope) = match self.format {
            CacheFormat::F32 | CacheFormat::Bf16 => (wide, wide),
            CacheFormat::Fp8 => (Part { code: Code::E4m3, group: 128 }, wide),
            CacheFormat::SixBit => (
                Part { code: Code::Integer(5), group: 24 },
                Part { code: Code::Integer(8), group: 64 },
            ),
        };
        [(latent, self.latent), (rope, self.rope)]
    }
}

/// How a layer's cache rows are kept.
#[derive(Clone, Copy)]
pub struct CacheSpec<'a> {
    /// Format and widths.
    pub layout: CacheLayout,
    /// The size of each number before the rope key, `[1, latent]`: the weight of the norm that the latent comes out of.
    /// A format of few bits divides by it before numbers share a scale.
    pub channels: Option<&'a Buffer>,
}

/// A code of a cache row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// A bf16 number, without a scale.
    Bf16,
    /// FP8 E4M3.
    E4m3,
    /// An integer of this many bits, at most 8; eight of them fill as many bytes.
    Integer(usize),
}

/// How a part of a row is kept: a bf16 scale for each group, then the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// What a number becomes.
    pub code: Code,
    /// Numbers that share a scale, a multiple of 8.
    pub group: usize,
}

impl Part {
    /// Bytes of `count` numbers with their scales.
    pub fn bytes(self, count: usize) -> usize {
        let scales = 2 * count.div_ceil(self.group);
        match self.code {
            Code::Bf16 => 2 * count,
            Code::E4m3 => scales + count,
            Code::Integer(bits) => scales + count.div_ceil(8) * bits,
        }
    }

    /// The largest magnitude of a code that has a scale.
    pub fn largest(self) -> f32 {
        match self.code {
            Code::Integer(bits) => ((1 << (bits - 1)) - 1) as f32,
            _ => E4M3_LARGEST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_deepseek_v2_takes_at_most_6_bits_a_number() {
        let bytes = CacheFormat::ALL
            .map(|format| CacheLayout { format, latent: 512, rope: 64 }.row_bytes());
        assert_eq!(bytes, [2304, 1152, 648, 430]);
        // Widths that fill neither groups nor bytes.
        let layout = CacheLayout { format: CacheFormat::SixBit, latent: 20, rope: 6 };
        assert_eq!(layout.row_bytes(), (2 + 3 * 5) + (2 + 8));
        let dense = CacheLayout { format: CacheFormat::Fp8, latent: 2048, rope: 0 };
        assert_eq!(dense.row_bytes(), 2048 + 32);
    }
}
