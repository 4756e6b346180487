//! What is left of numbers that are kept in few bits: the definition of every format, as values.
//!
//! No codes: a number becomes the nearest of the format's values, found by looking at all of them.

use super::movement;
use crate::buffer::{Buffer, Mat};
use crate::format::{CacheFormat, CacheLayout, CacheSpec, WeightFormat};

/// A row of activations as integers of at most 127 times a scale that 16 neighbours share, an f32; a number becomes the
/// integer that is nearest to its f32 product with the f32 `127 / most`.
pub fn row_of_integers(row: &[f64]) -> Vec<f64> {
    row.chunks(16).flat_map(integers).collect()
}

/// Numbers that share a scale.
fn integers(block: &[f64]) -> Vec<f64> {
    let most = block.iter().fold(0.0f64, |most, x| most.max(x.abs())) as f32;
    if most < 1e-36 {
        return vec![0.0; block.len()];
    }
    let (scale, inverse) = (most / 127.0, 127.0 / most);
    let kept = |x: &f64| f64::from(*x as f32 * inverse).round_ties_even() * f64::from(scale);
    block.iter().map(kept).collect()
}

/// The rows of `weight` as `format` keeps them.
pub fn kept(weight: &Buffer, format: WeightFormat) -> Vec<Vec<f64>> {
    let weight = weight.host::<f64>();
    let values = match format {
        WeightFormat::F32 => return (0..weight.rows).map(|row| weight.row(row).to_vec()).collect(),
        WeightFormat::Bf16 => {
            let kept = |row: usize| weight.row(row).iter().map(|x| bf16(*x)).collect();
            return (0..weight.rows).map(kept).collect();
        }
        WeightFormat::Fp8Channel | WeightFormat::Fp8Block => e4m3_values(),
        WeightFormat::Int8 => (0..=127).map(f64::from).collect(),
    };
    let (rows, cols) = match format {
        WeightFormat::Fp8Block => (128, 128),
        _ => (1, weight.cols),
    };
    let mut kept: Vec<Vec<f64>> = (0..weight.rows).map(|row| weight.row(row).to_vec()).collect();
    for (row, kept) in kept.iter_mut().enumerate() {
        for (block, kept) in kept.chunks_mut(cols).enumerate() {
            let scale = scale(&weight, (row / rows * rows, rows), (block * cols, cols), &values);
            kept.iter_mut().for_each(|x| *x = from_nearest(*x, scale, &values));
        }
    }
    kept
}

/// The scale, an f32, that maps the largest magnitude of a block of rows and columns (first, count) to the largest value.
fn scale(weight: &Mat<'_, f64>, rows: (usize, usize), cols: (usize, usize), values: &[f64]) -> f64 {
    let mut most = 0.0f64;
    for row in rows.0..weight.rows.min(rows.0 + rows.1) {
        for x in &weight.row(row)[cols.0..weight.cols.min(cols.0 + cols.1)] {
            most = most.max(x.abs());
        }
    }
    f64::from(most as f32 / values[values.len() - 1] as f32)
}

/// `x`, as the nearest of ascending `values` to the f32 quotient x / scale; both the product and the quotient are f32.
fn from_nearest(x: f64, scale: f64, values: &[f64]) -> f64 {
    let quotient = if scale == 0.0 { 0.0 } else { f64::from(x as f32 / scale as f32) };
    let magnitude = f64::from((nearest(quotient.abs(), values) as f32) * (scale as f32));
    if quotient < 0.0 { -magnitude } else { magnitude }
}

/// The nearest of ascending `values`; of two as near, the one with the even number.
fn nearest(x: f64, values: &[f64]) -> f64 {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        let (distance, least) = ((value - x).abs(), (values[best] - x).abs());
        if distance < least || (distance == least && i % 2 == 0) {
            best = i;
        }
    }
    values[best]
}

/// The magnitudes of FP8 E4M3: m / 8 * 2^-6, then (1 + m / 8) 2^(e - 7), without the NaN at the end.
fn e4m3_values() -> Vec<f64> {
    let value = |code: i32| {
        let mantissa = f64::from(code % 8) / 8.0;
        match code / 8 {
            0 => mantissa * 2f64.powi(-6),
            exponent => (1.0 + mantissa) * 2f64.powi(exponent - 7),
        }
    };
    (0..127).map(value).collect()
}

/// The nearest number with 8 significant bits; of two as near, the one whose last bit is 0.
fn bf16(x: f64) -> f64 {
    if x == 0.0 {
        return x;
    }
    // The distance of neighbours; below 2^-126 it does not shrink any more.
    let unit = 2f64.powi((x.abs().log2().floor() as i32).max(-126) - 7);
    (x / unit).round_ties_even() * unit
}

/// A cache row's numbers, the rope key last, as `layout` keeps them; `channels` are the sizes of those before it.
fn kept_row(layout: &CacheLayout, row: &[f64], channels: Option<&[f64]>) -> Vec<f64> {
    let (latent, rope) = row.split_at(layout.latent);
    let integers = |largest: i32| (0..=largest).map(f64::from).collect::<Vec<_>>();
    match layout.format {
        CacheFormat::F32 => row.to_vec(),
        CacheFormat::Bf16 => row.iter().map(|x| bf16(*x)).collect(),
        CacheFormat::Fp8 => {
            let rope = rope.iter().map(|x| bf16(*x)).collect();
            [kept_groups(latent, 128, &e4m3_values()), rope].concat()
        }
        CacheFormat::SixBit => {
            let ones = vec![1.0; latent.len()];
            let channels = channels.unwrap_or(&ones);
            let divide = |(x, size): (&f64, &f64)| match *size {
                0.0 => 0.0,
                size => f64::from(*x as f32 / size as f32),
            };
            let divided: Vec<f64> = latent.iter().zip(channels).map(divide).collect();
            let mut latent = kept_groups(&divided, 24, &integers(15));
            latent
                .iter_mut()
                .zip(channels)
                .for_each(|(x, size)| *x = f64::from((*x * size) as f32));
            [latent, kept_groups(rope, 64, &integers(127))].concat()
        }
    }
}

/// The cache rows of `slots` become what is kept of latent and rope key.
pub fn write_cache(
    spec: &CacheSpec<'_>,
    latent: &Buffer,
    rope: &Buffer,
    slots: &Buffer,
    cache: &mut Buffer,
) {
    let slots = movement::read::<u32>(slots);
    let channels = spec.channels.map(movement::read::<f64>);
    let (latent, rope, mut cache) = (latent.host::<f64>(), rope.host::<f64>(), cache.host_mut());
    for (i, slot) in slots.into_iter().enumerate() {
        let row = [latent.row(i), rope.row(i)].concat();
        let kept = kept_row(&spec.layout, &row, channels.as_deref());
        cache.row_mut(slot as usize).copy_from_slice(&kept);
    }
}

/// Numbers of which each group shares a bf16 scale, as the nearest of ascending `values` times the scale.
fn kept_groups(numbers: &[f64], group: usize, values: &[f64]) -> Vec<f64> {
    let kept = |group: &[f64]| -> Vec<f64> {
        let most = group.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let scale = bf16(f64::from(most as f32 / values[values.len() - 1] as f32));
        group.iter().map(|x| from_nearest(*x, scale, values)).collect()
    };
    numbers.chunks(group).flat_map(kept).collect()
}
