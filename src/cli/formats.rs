//! `--dtype` and `--cache-dtype`: what a command that only reads a model keeps its numbers as.

use crate::config::Dtype;
use crate::engine::{Formats, HybridEngine, weight_format};
use anyhow::Result;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use rehearsal_kernels::CacheFormat;
use serde::Serialize;

/// Formats of weights and cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct FormatArgs {
    /// Type that the weights are packed in; norms, embedding and router stay f32, the head is bf16 with fp8
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,
    /// Type of the sampler's cache
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub cache_dtype: CacheDtype,
}

impl FormatArgs {
    /// Makes the engine keep its numbers so.
    pub fn apply(self, engine: &mut HybridEngine) -> Result<()> {
        engine.set_formats(Formats {
            weights: weight_format(self.dtype),
            cache: self.cache_dtype.into(),
        })
    }
}

/// What rollouts were sampled from, with a warning if that is not what was asked for.
pub fn sampled_as(asked: Dtype, found: Option<Dtype>) -> Dtype {
    let found = found.unwrap_or(asked);
    if found != asked {
        let (asked, found) = (asked.name(), found.name());
        tracing::warn!(
            "this processor has no instructions for {asked}: rollouts are sampled in {found}"
        );
    }
    found
}

impl ValueEnum for Dtype {
    fn value_variants<'a>() -> &'a [Dtype] {
        &Dtype::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Dtype::F32 => "32-bit floats",
            Dtype::Bf16 => "16-bit brain floats",
            Dtype::Fp8 => "FP8 E4M3, a scale per output channel",
            Dtype::Fp8Block => "FP8 E4M3, a scale per 128 x 128 block",
            Dtype::Int8 => "8-bit integers, a scale per output channel",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}

/// `--cache-dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheDtype {
    /// 32-bit floats: the trainer's numbers to the bit
    #[default]
    F32,
    /// 16-bit brain floats
    Bf16,
    /// FP8 E4M3, a scale per 128 numbers; the rope key as bf16
    Fp8,
    /// 5-bit latent and 8-bit rope key with their scales: 430 bytes for DeepSeek-V2's 576 numbers
    #[value(name = "6bit")]
    #[serde(rename = "6bit")]
    SixBit,
}

impl CacheDtype {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            CacheDtype::F32 => "f32",
            CacheDtype::Bf16 => "bf16",
            CacheDtype::Fp8 => "fp8",
            CacheDtype::SixBit => "6bit",
        }
    }
}

impl From<CacheDtype> for CacheFormat {
    fn from(dtype: CacheDtype) -> CacheFormat {
        match dtype {
            CacheDtype::F32 => CacheFormat::F32,
            CacheDtype::Bf16 => CacheFormat::Bf16,
            CacheDtype::Fp8 => CacheFormat::Fp8,
            CacheDtype::SixBit => CacheFormat::SixBit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::WeightFormat;

    #[test]
    fn every_format_has_a_name_on_the_command_line() {
        let weights: Vec<WeightFormat> =
            Dtype::value_variants().iter().map(|dtype| weight_format(*dtype)).collect();
        assert_eq!(weights, WeightFormat::ALL);
        for dtype in Dtype::ALL {
            let name = serde_json::to_string(&dtype).unwrap();
            assert_eq!(name, format!("\"{}\"", dtype.name()));
        }
        let caches: Vec<CacheFormat> =
            CacheDtype::value_variants().iter().map(|dtype| (*dtype).into()).collect();
        assert_eq!(caches, CacheFormat::ALL);
        for dtype in CacheDtype::value_variants() {
            let name = dtype.to_possible_value().unwrap();
            assert_eq!(name.get_name(), dtype.name());
            assert_eq!(serde_json::to_string(dtype).unwrap(), format!("\"{}\"", dtype.name()));
        }
    }
}
