//! Codes at every offset, rows of any width, and what folded sizes are for.

use super::*;
use crate::ops::check::{floats, indices, normal, read, with};

fn layout(format: CacheFormat, latent: usize, rope: usize) -> CacheLayout {
    CacheLayout { format, latent, rope }
}

/// Writes rows to scattered slots of a cache full of ones and reads them back.
fn there_and_back(cx: &Cx, spec: &CacheSpec<'_>, latent: &Buffer, rope: &Buffer) -> Vec<f32> {
    let (count, layout) = (latent.rows(), &spec.layout);
    let (dtype, cols) = cache_shape(layout);
    let mut cache = cx.arena.buffer(cx.scratch, dtype, 2 * count + 1, cols).unwrap();
    let slots: Vec<u32> = (0..count as u32).map(|i| 2 * i + 1).rev().collect();
    let slots = indices(cx, count, 1, &slots);
    write_cache(cx, spec, latent, rope, &slots, &mut cache);
    let mut rows = floats(cx, count, layout.width(), &vec![f32::NAN; count * layout.width()]);
    read_cache(cx, spec, &cache, &slots, &mut rows);
    read(&rows)
}

#[test]
fn integers_of_5_and_8_bits_come_back_from_every_place_of_a_unit() {
    fn check<const BITS: usize>() {
        for place in 0..8 {
            for code in 0..1u64 << BITS {
                // The other places hold the code's complement: what leaks across shows.
                let other = !code & ((1 << BITS) - 1);
                let codes: [u64; 8] =
                    std::array::from_fn(|i| if i == place { code } else { other });
                let unit = codes.iter().enumerate().fold(0, |unit, (i, c)| unit | c << (i * BITS));
                let bytes: [u8; BITS] = unit.to_le_bytes()[..BITS].try_into().unwrap();
                assert_eq!(unpack::<BITS>(&bytes).map(u64::from), codes);
            }
        }
    }
    check::<5>();
    check::<8>();
}

#[test]
fn every_integer_comes_back_from_every_place_of_a_row() {
    let cx = with(1, Isa::detect());
    let (width, rope) = (41, 11);
    let spec = CacheSpec { layout: layout(CacheFormat::SixBit, width, rope), channels: None };
    let number = |i: usize, most: i32| (i as i32 * 7 % (2 * most + 1) - most) as f32;
    let rows = 255;
    let mut latent: Vec<f32> = (0..rows * width).map(|i| number(i, 15)).collect();
    let mut keys: Vec<f32> = (0..rows * rope).map(|i| number(i, 127)).collect();
    // The largest integer in every group makes its scale 1.
    for row in latent.chunks_mut(width) {
        (row[0], row[width - 1]) = (15.0, -15.0);
    }
    keys.chunks_mut(rope).for_each(|row| row[rope - 1] = -127.0);
    let (l, k) = (floats(&cx, rows, width, &latent), floats(&cx, rows, rope, &keys));
    let wanted: Vec<f32> = latent
        .chunks(width)
        .zip(keys.chunks(rope))
        .flat_map(|(latent, key)| [latent, key].concat())
        .collect();
    assert_eq!(there_and_back(&cx, &spec, &l, &k), wanted);
}

#[test]
fn rows_have_the_same_bits_on_all_instruction_sets_and_threads_and_zeros_stay() {
    for format in CacheFormat::ALL {
        for (width, rope) in [(512, 64), (48, 16), (20, 6), (300, 0), (1, 1)] {
            let rows = |isa, threads| {
                let cx = with(threads, isa);
                let (latent, key) = (normal(&cx, 37, width, 1), normal(&cx, 37, rope, 2));
                let channels = normal(&cx, 1, width, 3);
                let spec =
                    CacheSpec { layout: layout(format, width, rope), channels: Some(&channels) };
                let kept = there_and_back(&cx, &spec, &latent, &key);
                let zeros = floats(&cx, 2, width, &vec![0.0; 2 * width]);
                let none = floats(&cx, 2, rope, &vec![0.0; 2 * rope]);
                let zeros = there_and_back(&cx, &spec, &zeros, &none);
                assert!(zeros.iter().all(|x| *x == 0.0), "{format:?}: {zeros:?}");
                kept.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let first = rows(Isa::Portable, 1);
            for isa in Isa::available() {
                assert_eq!(rows(isa, 3), first, "{format:?} {width} {rope} {}", isa.name());
            }
        }
    }
}

/// Root of the mean squared relative error of a latent that came back, channel by channel.
fn error(found: &[f32], wanted: &[f32], sizes: &[f32]) -> f64 {
    let of =
        |(i, (a, b)): (usize, (&f32, &f32))| f64::from((a - b) / sizes[i % sizes.len()]).powi(2);
    (found.iter().zip(wanted).enumerate().map(of).sum::<f64>() / wanted.len() as f64).sqrt()
}

#[test]
fn sizes_folded_out_of_a_latent_with_outlier_channels_lessen_its_error() {
    let cx = with(1, Isa::detect());
    let (rows, width) = (64, 512);
    // The weight of a norm with a few large channels; the latent is a normed row times it.
    let sizes: Vec<f32> =
        (0..width).map(|i| if i % 19 == 5 { 30.0 } else { 1.0 + (i % 7) as f32 / 7.0 }).collect();
    let normed = read(&normal(&cx, rows, width, 8));
    let latent: Vec<f32> = normed.iter().enumerate().map(|(i, x)| x * sizes[i % width]).collect();
    let (l, none) = (floats(&cx, rows, width, &latent), floats(&cx, rows, 0, &[]));
    let channels = floats(&cx, 1, width, &sizes);
    let layout = layout(CacheFormat::SixBit, width, 0);
    let kept = |channels| there_and_back(&cx, &CacheSpec { layout, channels }, &l, &none);
    let folded = error(&kept(Some(&channels)), &latent, &sizes);
    let unfolded = error(&kept(None), &latent, &sizes);
    // Relative to its channel, a number of a normal row is off by 0.043; without folding by several times that.
    assert!(folded < 0.05 && unfolded > 4.0 * folded, "{folded} folded, {unfolded} not");
}
