//! Codes: numbers to bf16, FP8 E4M3 and small integers and back, and the scales that blocks of a weight share.
//!
//! Knows no layout: `pack` and `cache_rows` say where a code lies. Decoding is branch-free, so that loops over it
//! become vector code.
//!
//! Invariants:
//!   * a number is worth `value(code) * scale`, one rounding; its code is that of the f32 quotient `number / scale`
//!   * a finite number never becomes a NaN or an infinity; a NaN or an infinity in a block makes its scale show it

use super::{Cx, work};
use crate::arena::Owner;
use crate::buffer::{Buffer, DType};
use crate::format::WeightFormat;
use crate::kernels::Result;

/// f32 to bf16, to nearest even.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    // What would round up to infinity stays the largest finite number.
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    let is_infinite = x.is_infinite();
    if rounded & 0x7fff == 0x7f80 && !is_infinite { rounded as u16 - 1 } else { rounded as u16 }
}

/// bf16 to f32, exactly.
#[inline(always)]
pub(crate) fn from_bf16(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// f32 to FP8 E4M3 (sign, 4 bits of exponent with bias 7, 3 of mantissa), to nearest even; beyond 448 it saturates.
#[inline(always)]
pub(crate) fn to_e4m3(x: f32) -> u8 {
    let (sign, magnitude) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs());
    let code = if magnitude < 1.0 / 64.0 {
        // Subnormal: steps of 2^-9; the eighth is the smallest normal number.
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    sign | code.min(0x7e) as u8
}

/// FP8 E4M3 to f32, exactly. The NaN codes are never written and not recognised.
#[inline(always)]
pub(crate) fn from_e4m3(code: u8) -> f32 {
    let bits = u32::from(code & 0x80) << 24 | u32::from(code & 0x7f) << 20;
    // The exponent was read with the bias of f32; subnormal codes come right too.
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

/// f32 to an integer from -127 to 127, to nearest even.
#[inline(always)]
pub(crate) fn to_int8(x: f32) -> i8 {
    x.round_ties_even().clamp(-127.0, 127.0) as i8
}

/// number / scale, or 0 where the scale is: of a block of zeros.
#[inline(always)]
pub(crate) fn quotient(number: f32, scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { number / scale }
}

/// The larger of a magnitude so far and |x|; NaN once one of them is.
#[inline(always)]
pub(crate) fn larger(most: f32, x: f32) -> f32 {
    if x.abs() > most || x.is_nan() { x.abs() } else { most }
}

/// The scale of every block of `weight`, `[row blocks, column blocks]`; `None` if the format has none.
pub(crate) fn scales(
    cx: &Cx,
    owner: Owner,
    weight: &Buffer,
    format: WeightFormat,
) -> Result<Option<Buffer>> {
    let Some((block_rows, block_cols)) = format.block(weight.cols()) else { return Ok(None) };
    let (down, across) = (weight.rows().div_ceil(block_rows), weight.cols().div_ceil(block_cols));
    let mut scales = cx.arena.buffer(owner, DType::F32, down, across)?;
    let (from, to) = (weight.host::<f32>(), scales.host_mut::<f32>());
    work::split(cx, down, 1, 4 * block_rows * weight.cols(), &|range| {
        for block in range {
            // SAFETY: a row of scales is written by one piece.
            let scales = unsafe { to.shared_row_mut(block) };
            scales.fill(0.0);
            for row in block * block_rows..from.rows.min((block + 1) * block_rows) {
                for (scale, numbers) in scales.iter_mut().zip(from.row(row).chunks(block_cols)) {
                    *scale = numbers.iter().fold(*scale, |most, x| larger(most, *x));
                }
            }
            scales.iter_mut().for_each(|scale| *scale /= format.largest());
        }
    });
    Ok(Some(scales))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value of an E4M3 code, from its definition.
    fn defined(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f64.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_e4m3_code_comes_back_and_has_its_defined_value() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(f64::from(from_e4m3(code)), defined(code), "{code:#x}");
            assert_eq!(to_e4m3(from_e4m3(code)), code);
        }
        assert_eq!(defined(0x7e), f64::from(crate::format::E4M3_LARGEST));
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_code_and_ties_to_the_even_one() {
        for code in 0..0x7eu8 {
            let (low, high) = (defined(code), defined(code + 1));
            let middle = ((low + high) / 2.0) as f32;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(to_e4m3(middle), even, "{middle}");
            assert_eq!(to_e4m3(f32::from_bits(middle.to_bits() - 1)), code);
            assert_eq!(to_e4m3(f32::from_bits(middle.to_bits() + 1)), code + 1);
            assert_eq!(to_e4m3(-middle), even | 0x80);
        }
    }

    #[test]
    fn e4m3_keeps_normal_numbers_within_a_sixteenth_and_saturates() {
        let mut worst = 0.0f64;
        for step in 0..200_000u32 {
            // From 2^-6 to 448 in even steps of the exponent.
            let x = 2f64.powf(-6.0 + f64::from(step) / 200_000.0 * (448f64.log2() + 6.0)) as f32;
            let kept = f64::from(from_e4m3(to_e4m3(x)));
            worst = worst.max((kept - f64::from(x)).abs() / f64::from(x));
        }
        assert!(worst <= 1.0 / 16.0 && worst > 1.0 / 18.0, "{worst}");
        for x in [449.0, 464.0, 465.0, 1e9, f32::MAX] {
            assert_eq!((from_e4m3(to_e4m3(x)), from_e4m3(to_e4m3(-x))), (448.0, -448.0));
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_finite_numbers_finite() {
        for (x, kept) in [
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (1.0 + 1.01 / 256.0, 1.0 + 2.0 / 256.0),
            (-0.1, -0.100_097_656),
        ] {
            assert_eq!(from_bf16(to_bf16(x)), kept);
        }
        assert!(from_bf16(to_bf16(f32::MAX)).is_finite());
        assert!(from_bf16(to_bf16(f32::NAN)).is_nan());
        assert_eq!(from_bf16(to_bf16(f32::NEG_INFINITY)), f32::NEG_INFINITY);
    }

    #[test]
    fn small_integers_round_to_even_and_end_at_127() {
        assert_eq!([0.5, 1.5, -2.5, 126.6, 127.0, -400.0].map(to_int8), [0, 2, -2, 127, 127, -127]);
    }
}
