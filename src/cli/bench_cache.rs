//! `rehearsal bench cache`: what a token costs in the cache, of two models in every format, and what made the difference.
//!
//! Measured is the growth of the arena's count for one layer's cache; a token's bytes are that times the layers. The
//! formula stands beside it. Error and speed are of random rows on this machine.

use super::bench::model_config;
use super::command::Threads;
use super::formats::CacheDtype;
use super::output::{say, say_json};
use crate::config::ModelConfig;
use crate::model::cache_layout;
use anyhow::Result;
use clap::{Args, ValueEnum};
use rehearsal_kernels::random::{self, Stream};
use rehearsal_kernels::{Arena, Buffer, CacheSpec, CpuKernels, DType, Kernels, Kind, OutOfMemory};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Tokens that are cached to be counted: they fill whole pages of the arena in every format.
const TOKENS: usize = 4096;
/// Rows whose error and speed are measured.
const ROWS: usize = 256;
/// Times that the rows are written and read.
const ROUNDS: usize = 8;

/// `bench cache`.
#[derive(Debug, Args)]
pub struct BenchCacheArgs {
    /// A checkpoint folder or a config.json
    #[arg(long, value_name = "M", default_value = "configs/model/deepseek-v2.json")]
    pub model: PathBuf,
    /// The model that it is compared with
    #[arg(long, value_name = "M", default_value = "configs/model/deepseek-67b.json")]
    pub against: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How fast
    #[command(flatten)]
    pub threads: Threads,
}

/// A model's cache in one format.
#[derive(Serialize)]
struct Kept {
    cache_dtype: CacheDtype,
    /// Numbers of a token over all layers.
    elements_per_token: usize,
    /// Scales included.
    bits_per_element: f64,
    /// Growth of the arena for one token of one layer.
    measured_bytes_per_token_layer: f64,
    /// The same times the layers.
    bytes_per_token: f64,
    /// What the format's formula gives.
    formula_bytes_per_token: usize,
    /// Root mean square of what is lost, as a share of the numbers'.
    relative_error: f64,
    /// Bytes of f32 rows, each second.
    write_bytes_per_second: f64,
    read_bytes_per_second: f64,
}

/// Where a reduction of bytes comes from; shares of the compared model's bytes at 16 bits.
#[derive(Serialize)]
struct Reduction {
    /// Fewer numbers, at the same bits.
    architecture: f64,
    /// Fewer bits, for the same numbers.
    bits: f64,
    /// Both.
    together: f64,
    /// Both, by formula, if a number took 6 bits exactly.
    at_exactly_6_bits: f64,
}

/// Stable keys of `--json`.
#[derive(Serialize)]
struct Comparison {
    bench: &'static str,
    model: PathBuf,
    against: PathBuf,
    layers: [usize; 2],
    model_cache: Vec<Kept>,
    against_cache: Vec<Kept>,
    /// The model at 6 bits against the other at bf16.
    reduction: Reduction,
}

/// Measures and prints.
pub fn run(args: &BenchCacheArgs) -> Result<()> {
    let (model, against) = (model_config(&args.model)?, model_config(&args.against)?);
    let kernels = CpuKernels::new(args.threads.count(), Arena::new(None));
    let every = |config: &ModelConfig| -> Result<Vec<Kept>, OutOfMemory> {
        CacheDtype::value_variants().iter().map(|dtype| kept(&kernels, config, *dtype)).collect()
    };
    let of =
        |config| every(config).map_err(|fault| crate::config::Fault::resources(fault.to_string()));
    let (model_cache, against_cache) = (of(&model)?, of(&against)?);
    let comparison = Comparison {
        bench: "cache",
        model: args.model.clone(),
        against: args.against.clone(),
        layers: [model.num_hidden_layers, against.num_hidden_layers],
        reduction: reduction(&model_cache, &against_cache),
        model_cache,
        against_cache,
    };
    if args.json { say_json(&comparison) } else { tell(&comparison) }
}

fn find(kept: &[Kept], dtype: CacheDtype) -> &Kept {
    kept.iter().find(|kept| kept.cache_dtype == dtype).expect("every format was measured")
}

fn reduction(model: &[Kept], against: &[Kept]) -> Reduction {
    let bytes = |kept: &[Kept], dtype| find(kept, dtype).bytes_per_token;
    let elements = |kept: &[Kept]| kept[0].elements_per_token as f64;
    let wide = CacheDtype::Bf16;
    let share = |part: f64, whole: f64| 1.0 - part / whole;
    Reduction {
        architecture: share(bytes(model, wide), bytes(against, wide)),
        bits: share(bytes(model, CacheDtype::SixBit), bytes(model, wide)),
        together: share(bytes(model, CacheDtype::SixBit), bytes(against, wide)),
        at_exactly_6_bits: share(6.0 * elements(model), 16.0 * elements(against)),
    }
}

/// Measures one model's cache in one format.
fn kept(
    kernels: &CpuKernels,
    config: &ModelConfig,
    dtype: CacheDtype,
) -> Result<Kept, OutOfMemory> {
    let (layout, layers) = (cache_layout(config, dtype.into()), config.num_hidden_layers);
    let owner = kernels.arena().owner("bench", Kind::Cache);
    let held = |tokens: usize| {
        let (dtype, cols) = kernels.cache_shape(&layout);
        // So that no larger region serves that an earlier cache left.
        kernels.arena().trim();
        let _cache = kernels.arena().buffer(owner, dtype, tokens, cols)?;
        Ok(kernels.arena().held_by(Kind::Cache))
    };
    let grown = (held(2 * TOKENS)? - held(TOKENS)?) as f64 / TOKENS as f64;

    let random = |rows: usize, cols: usize, part: u64| {
        let number = |i| random::normal(1, Stream::Data, [part, i, 0, 0]) as f32;
        let numbers: Vec<f32> = (0..(rows * cols) as u64).map(number).collect();
        let mut buffer = scratch(kernels, DType::F32, rows, cols)?;
        kernels.upload(&numbers, &mut buffer);
        Ok::<_, OutOfMemory>((buffer, numbers))
    };
    let (latent, latents) = random(ROWS, layout.latent, 1)?;
    let (rope, ropes) = random(ROWS, layout.rope, 2)?;
    let spec = CacheSpec { layout, channels: None };
    let (dtype_, cols) = kernels.cache_shape(&layout);
    let mut cache = scratch(kernels, dtype_, ROWS, cols)?;
    let mut slots = scratch(kernels, DType::U32, ROWS, 1)?;
    kernels.upload_indices(&(0..ROWS as u32).collect::<Vec<_>>(), &mut slots);
    let mut rows = scratch(kernels, DType::F32, ROWS, layout.width())?;
    let write = rate(layout.width(), &mut || {
        kernels.write_cache(&spec, &latent, &rope, &slots, &mut cache);
    });
    let read = rate(layout.width(), &mut || {
        kernels.read_cache(&spec, &cache, &slots, &mut rows);
    });
    let wanted = latents
        .chunks(layout.latent.max(1))
        .zip(ropes.chunks(layout.rope.max(1)).chain(std::iter::repeat(&[][..])))
        .flat_map(|(latent, rope)| latent.iter().chain(rope));
    let (lost, all) =
        kernels.download(&rows).iter().zip(wanted).fold((0.0, 0.0), |sums, (a, b)| {
            let (a, b) = (f64::from(*a), f64::from(*b));
            (sums.0 + (a - b) * (a - b), sums.1 + b * b)
        });
    Ok(Kept {
        cache_dtype: dtype,
        elements_per_token: layout.width() * layers,
        bits_per_element: 8.0 * grown / layout.width() as f64,
        measured_bytes_per_token_layer: grown,
        bytes_per_token: grown * layers as f64,
        formula_bytes_per_token: layout.row_bytes() * layers,
        relative_error: f64::sqrt(lost / all),
        write_bytes_per_second: write,
        read_bytes_per_second: read,
    })
}

fn scratch(
    kernels: &CpuKernels,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> Result<Buffer, OutOfMemory> {
    kernels.arena().buffer(kernels.scratch(), dtype, rows, cols)
}

/// Bytes of f32 that `work` on all rows goes through in a second, after one round that is not timed.
fn rate(width: usize, work: &mut dyn FnMut()) -> f64 {
    work();
    let began = Instant::now();
    (0..ROUNDS).for_each(|_| work());
    (ROUNDS * ROWS * width * size_of::<f32>()) as f64 / began.elapsed().as_secs_f64().max(1e-9)
}

fn tell(comparison: &Comparison) -> Result<()> {
    let Comparison { model, against, layers, model_cache, against_cache, reduction, .. } =
        comparison;
    table(model, layers[0], model_cache)?;
    table(against, layers[1], against_cache)?;
    let percent = |share: f64| format!("{:.2} %", -100.0 * share);
    say("6 bits of the first against bf16 of the second, bytes of a token:")?;
    say(&format!("  architecture alone  {}", percent(reduction.architecture)))?;
    say(&format!("  bits alone          {}", percent(reduction.bits)))?;
    say(&format!("  together            {}", percent(reduction.together)))?;
    say(&format!("  at exactly 6 bits   {} (formula)", percent(reduction.at_exactly_6_bits)))
}

fn table(model: &Path, layers: usize, rows: &[Kept]) -> Result<()> {
    say(&format!("{}, {layers} layers", model.display()))?;
    say(
        "  type   numbers    bits  measured a layer  x layers  formula    error      write       read",
    )?;
    for row in rows {
        let rate = |bytes: f64| format!("{:6.2} GB/s", bytes / 1e9);
        say(&format!(
            "  {:5} {:8} {:7.3} {:15.1} B {:9.0} {:8} {:8.5} {} {}",
            row.cache_dtype.name(),
            row.elements_per_token,
            row.bits_per_element,
            row.measured_bytes_per_token_layer,
            row.bytes_per_token,
            row.formula_bytes_per_token,
            row.relative_error,
            rate(row.write_bytes_per_second),
            rate(row.read_bytes_per_second),
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str) -> ModelConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model").join(name);
        model_config(&path).unwrap()
    }

    #[test]
    fn deepseek_v2_at_6_bits_takes_93_percent_less_than_the_dense_67b_at_16_and_82_of_them_are_architecture()
     {
        let kernels = CpuKernels::new(1, Arena::new(None));
        let every = |name| -> Vec<Kept> {
            let (config, dtypes) = (config(name), CacheDtype::value_variants());
            dtypes.iter().map(|dtype| kept(&kernels, &config, *dtype).unwrap()).collect()
        };
        let (mla, gqa) = (every("deepseek-v2.json"), every("deepseek-67b.json"));
        for kept in mla.iter().chain(&gqa) {
            assert_eq!(kept.bytes_per_token, kept.formula_bytes_per_token as f64);
        }
        let six = find(&mla, CacheDtype::SixBit);
        assert_eq!((six.elements_per_token, six.bytes_per_token), (34_560, 25_800.0));
        assert!(six.bits_per_element <= 6.0);
        let wide = find(&gqa, CacheDtype::Bf16);
        assert_eq!((wide.elements_per_token, wide.bytes_per_token), (194_560, 389_120.0));
        let Reduction { architecture, bits, together, at_exactly_6_bits } = reduction(&mla, &gqa);
        let rounded = [architecture, bits, together, at_exactly_6_bits]
            .map(|share| (10_000.0 * share).round());
        assert_eq!(rounded, [8224.0, 6267.0, 9337.0, 9334.0]);
        // What is lost grows as the bits shrink, and f32 loses nothing.
        let errors: Vec<f64> = mla.iter().map(|kept| kept.relative_error).collect();
        assert!(
            errors[0] == 0.0 && errors[1] < 0.003 && errors[2] < 0.03 && errors[3] < 0.05,
            "{errors:?}"
        );
        assert!(errors.is_sorted());
    }
}
