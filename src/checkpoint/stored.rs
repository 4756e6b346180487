//! How a file stores numbers: f32, bf16, or ggml's q8_0 (blocks of 32 with one scale).
//!
//! Never f16: the residual stream of DeepSeek-V2 overflows it, and a program that loads a model in the type of its file
//! would find out in silence. Rounding is to the nearest, ties to even, and to ggml's blocks by `candle`.

use crate::config::Fault;
use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

/// Numbers of one block of q8_0: a row must hold whole blocks.
pub const BLOCK: usize = 32;

/// A type of numbers in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// Four bytes a number.
    F32,
    /// Two bytes: the upper half of an f32.
    Bf16,
    /// 34 bytes a block of 32 numbers; GGUF alone.
    Q8_0,
}

impl StoredType {
    /// Reads the name of a type, as on the command line.
    pub fn parse(name: &str) -> Result<StoredType, String> {
        match name {
            "f32" => Ok(StoredType::F32),
            "bf16" => Ok(StoredType::Bf16),
            "q8_0" => Ok(StoredType::Q8_0),
            "f16" | "fp16" | "float16" => {
                Err("f16 overflows in the residual stream of DeepSeek-V2; use bf16".to_string())
            }
            _ => Err("expected f32, bf16 or q8_0".to_string()),
        }
    }

    /// The name that configs of Hugging Face have for it, if it can stand in a safetensors file.
    pub(super) fn torch_name(self) -> Result<&'static str> {
        match self {
            StoredType::F32 => Ok("float32"),
            StoredType::Bf16 => Ok("bfloat16"),
            StoredType::Q8_0 => Err(Fault::user(
                "a Hugging Face folder holds no q8_0; use f32 or bf16, or --format gguf",
            )),
        }
    }

    /// Bytes of so many numbers; whole blocks if there are blocks.
    pub(super) fn bytes(self, numbers: usize) -> u64 {
        match self {
            StoredType::F32 => 4 * numbers as u64,
            StoredType::Bf16 => 2 * numbers as u64,
            StoredType::Q8_0 => {
                assert!(numbers.is_multiple_of(BLOCK), "{numbers} numbers are no whole blocks");
                34 * (numbers / BLOCK) as u64
            }
        }
    }

    /// Appends numbers to `bytes`, little-endian.
    pub(super) fn encode(self, numbers: &[f32], bytes: &mut Vec<u8>) -> Result<()> {
        let kind = match self {
            StoredType::F32 => {
                bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
                return Ok(());
            }
            StoredType::Bf16 => GgmlDType::BF16,
            StoredType::Q8_0 => GgmlDType::Q8_0,
        };
        let tensor = Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)?;
        bytes.extend_from_slice(&QTensor::quantize(&tensor, kind)?.data()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(kind: StoredType, numbers: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        kind.encode(numbers, &mut bytes).expect("numbers can be stored");
        assert_eq!(bytes.len() as u64, kind.bytes(numbers.len()));
        bytes
    }

    #[test]
    fn bf16_rounds_to_the_nearest_and_ties_to_even() {
        // One bit below the upper half is a tie: 0x3f80_8000 lies between 0x3f80 (even) and 0x3f81.
        let bits =
            [0x3f80_7fff_u32, 0x3f80_8000, 0x3f80_8001, 0x3f81_8000, 0xbf81_8000, 0x7f7f_ffff];
        let numbers: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
        let bytes = encoded(StoredType::Bf16, &numbers);
        let halves: Vec<u16> =
            bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!(halves, [0x3f80, 0x3f80, 0x3f81, 0x3f82, 0xbf82, 0x7f80]);
    }

    #[test]
    fn q8_0_keeps_every_number_to_half_a_step_of_its_block() {
        let numbers: Vec<f32> =
            (0..96).map(|i| ((i * 37 % 64) as f32 - 31.5) * 0.01 * (1 + i / 32) as f32).collect();
        let bytes = encoded(StoredType::Q8_0, &numbers);
        for (block, own) in bytes.chunks_exact(34).zip(numbers.chunks_exact(32)) {
            let largest = own.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let step = f64::from(largest) / 127.0;
            for (code, x) in block[2..].iter().zip(own) {
                let error = (f64::from(*code as i8) * step - f64::from(*x)).abs();
                assert!(error <= 0.5 * step * 1.001, "{x}: {error} is over half of {step}");
            }
        }
    }

    #[test]
    fn f16_is_refused_with_its_reason() {
        assert_eq!(StoredType::parse("bf16"), Ok(StoredType::Bf16));
        assert!(StoredType::parse("f16").unwrap_err().contains("overflows"));
        assert!(StoredType::parse("int3").unwrap_err().contains("f32, bf16 or q8_0"));
        assert!(StoredType::Q8_0.torch_name().unwrap_err().to_string().contains("--format gguf"));
    }
}
