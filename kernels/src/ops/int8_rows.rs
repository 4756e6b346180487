//! Rows of activations become codes for products of integers, on each level, with the same bits.
//!
//! A row is blocks of [`SHARE`] inputs; a block is its codes, a byte each, then what the sum of a product starts from, an i32,
//! and the scale, an f32. Inputs beyond the row have code 0.

use super::int8::{ABOVE, QUAD};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Inputs of a row that share a scale.
pub(super) const SHARE: usize = 16;
/// Largest magnitude of a code.
const LARGEST: f32 = 127.0;
/// Below this a block counts as zeros: its inverse scale would not be a number.
const LEAST: f32 = 1e-36;
/// The bits of a number but its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = SHARE + 8;

/// Bytes of a row for a product of so many quads.
pub(super) const fn row_bytes(quads: usize) -> usize {
    (quads * QUAD).div_ceil(SHARE) * BLOCK_BYTES
}

/// The scale of a block whose largest magnitude has these bits, and what a number of it is multiplied by to become a code. Both
/// are 0 if all numbers are about 0; the scale is NaN if one of them is not finite: as integers, magnitudes are ordered as
/// they are as numbers, and what is not finite comes last.
#[inline(always)]
pub(super) fn scale(most: u32) -> (f32, f32) {
    let most = f32::from_bits(most);
    if !most.is_finite() {
        (f32::NAN, 0.0)
    } else if most < LEAST {
        (0.0, 0.0)
    } else {
        (most / LARGEST, LARGEST / most)
    }
}

/// Calls `quantise` for every block of a row and the place of its codes; the last one is filled with zeros. It returns the sum
/// of the codes and the scale.
///
/// # Safety
/// The row has `inputs` numbers, and `to` room for its blocks.
#[inline(always)]
unsafe fn each_block(
    row: *const f32,
    inputs: usize,
    to: *mut u8,
    quantise: impl Fn(&[f32; SHARE], *mut u8) -> (i32, f32),
) {
    let block = |numbers: &[f32; SHARE], i: usize| {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.add(i * BLOCK_BYTES);
            let (sum, scale) = quantise(numbers, to);
            to.add(SHARE).cast::<i32>().write_unaligned(-i32::from(ABOVE) * sum);
            to.add(SHARE + 4).cast::<f32>().write_unaligned(scale);
        }
    };
    // SAFETY: the caller's promise.
    let (whole, rest) = unsafe { std::slice::from_raw_parts(row, inputs) }.as_chunks::<SHARE>();
    for (i, numbers) in whole.iter().enumerate() {
        block(numbers, i);
    }
    if !rest.is_empty() {
        let mut numbers = [0.0; SHARE];
        numbers[..rest.len()].copy_from_slice(rest);
        block(&numbers, whole.len());
    }
}

/// A row with what the compiler makes of plain Rust.
///
/// # Safety
/// The row has `inputs` numbers, and `to` room for its blocks.
pub(super) unsafe fn plain(row: *const f32, inputs: usize, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        each_block(row, inputs, to, |numbers, to| {
            let bits = |most: u32, x: &f32| most.max(x.to_bits() & MAGNITUDE);
            let (scale, inverse) = scale(numbers.iter().fold(0, bits));
            let codes = numbers.map(|x| (x * inverse).round_ties_even() as i8);
            to.cast::<[i8; SHARE]>().write_unaligned(codes);
            (codes.iter().map(|code| i32::from(*code)).sum(), scale)
        });
    }
}

/// A row with 256-bit vectors.
///
/// # Safety
/// As for [`plain`]; the processor has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(row: *const f32, inputs: usize, to: *mut u8) {
    // SAFETY: the caller's promise; a block is two vectors.
    unsafe {
        each_block(row, inputs, to, |numbers, to| {
            let at = numbers.as_ptr();
            let (low, high) = (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)));
            let mask = _mm256_set1_epi32(MAGNITUDE.cast_signed());
            let [a, b] = [low, high].map(|x| _mm256_and_si256(_mm256_castps_si256(x), mask));
            let most = _mm256_max_epu32(a, b);
            let (a, b) = (_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
            let most = _mm_max_epu32(a, b);
            let most = _mm_max_epu32(most, _mm_shuffle_epi32::<0x4e>(most));
            let most = _mm_max_epu32(most, _mm_shuffle_epi32::<0xb1>(most));
            let (scale, inverse) = scale(_mm_cvtsi128_si32(most).cast_unsigned());
            let inverse = _mm256_set1_ps(inverse);
            let [a, b] = [low, high].map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
            let wide = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(a, b));
            let (low, high) = (_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storeu_si128(to.cast(), _mm_packs_epi16(low, high));
            let sum = _mm256_add_epi32(a, b);
            let (a, b) = (_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(a, b);
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0x4e>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0xb1>(sum));
            (_mm_cvtsi128_si32(sum), scale)
        });
    }
}

/// A row with 512-bit vectors.
///
/// # Safety
/// As for [`plain`]; the processor has the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn avx512(row: *const f32, inputs: usize, to: *mut u8) {
    // SAFETY: the caller's promise; a block is a vector.
    unsafe {
        each_block(row, inputs, to, |numbers, to| {
            let x = _mm512_loadu_ps(numbers.as_ptr());
            let mask = _mm512_set1_epi32(MAGNITUDE.cast_signed());
            let most = _mm512_reduce_max_epu32(_mm512_and_si512(_mm512_castps_si512(x), mask));
            let (scale, inverse) = scale(most);
            let codes = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(codes));
            (_mm512_reduce_add_epi32(codes), scale)
        });
    }
}
