//! The exponential function of an f32, the same bits on every instruction set.
//!
//! exp(x) = 2^n * p(r) with n = round(x / ln 2) and r = x - n ln 2 in two steps; p is a polynomial of
//! degree 6. No branch and no table, so that a loop over it vectorises. At most 2 units in the last
//! place off; 0 below -87.3 (no subnormal results), infinite above 88.72, NaN for NaN.

use super::lanes::{Isa, Lanes, OnLanes};

/// 1.5 * 2^23: adding it rounds a small number to an integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;
const LOWEST: f32 = -87.3;
const HIGHEST: f32 = 88.722_83;
/// ln 2 in two parts; the first has few bits, so that n times it is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// exp(x). Vectorises inside a loop that [`Isa::run`] compiles.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    // Minimax on [-ln 2 / 2, ln 2 / 2]: 1 + r + r² (1/2 + ...).
    let p = 1.387_37e-3_f32;
    let p = p.mul_add(r, 8.368_13e-3);
    let p = p.mul_add(r, 4.166_799_7e-2);
    let p = p.mul_add(r, 1.666_641_3e-1);
    let p = p.mul_add(r, 0.499_999_94);
    let p = (r * r).mul_add(p, r) + 1.0;
    // The integer n is in the low bits of `shifted`; moved up it is n steps of the exponent.
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    let bounded = if x < HIGHEST { scaled } else { x + f32::INFINITY };
    if x < LOWEST { 0.0 } else { bounded }
}

/// Replaces every element by its exponential.
pub(crate) fn exp_slice(isa: Isa, x: &mut [f32]) {
    // SAFETY: `isa` was detected; the loop is safe code.
    unsafe { isa.run(ExpSlice(x)) }
}

struct ExpSlice<'a>(&'a mut [f32]);

impl OnLanes for ExpSlice<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for x in self.0 {
            *x = exp(*x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_and_the_same_on_every_set() {
        let mut inputs: Vec<f32> =
            (0..400_003).map(|i| -87.3 + i as f32 * (176.0 / 400_003.0)).collect();
        inputs.extend([0.0, -0.0, 1e-30, -1e-7, 88.72]);
        let mut results = Vec::new();
        for isa in Isa::available() {
            let mut found = inputs.clone();
            exp_slice(isa, &mut found);
            results.push(found);
        }
        for other in &results[1..] {
            assert!(other.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        for (x, y) in inputs.iter().zip(&results[0]) {
            let exact = f64::from(*x).exp();
            let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            let off = (f64::from(*y) - exact).abs() / unit;
            assert!(off <= 2.0, "exp({x}) = {y}, off by {off} units");
        }
    }

    #[test]
    fn exp_of_the_far_and_the_undefined() {
        for isa in Isa::available() {
            let mut x = [-1e9, f32::NEG_INFINITY, -87.31, 88.73, f32::INFINITY, f32::NAN, f32::MAX];
            exp_slice(isa, &mut x);
            assert_eq!(x[..5], [0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY], "{isa:?}");
            assert!(x[5].is_nan() && x[6] == f32::INFINITY, "{isa:?} {x:?}");
        }
    }
}
