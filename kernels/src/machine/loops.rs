//! The loops that are timed: nothing but products, or nothing but reads, on each instruction set.
//!
//! A product's sums are as many independent chains as hide its latency. What a loop computes does not matter, only that
//! none of it can be left out.

use crate::ops::lanes::{LANES, add_lanes};
use crate::ops::{Isa, Lanes, OnLanes};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;

/// Floats of one round of reading: small enough to time, large enough that the loop around it is nothing.
pub(super) const BLOCK: usize = 4096;

/// Most chains: 512-bit registers have room for them, and 256-bit ones for 12.
const CHAINS: usize = 14;

/// A loop of products.
pub(super) struct Product {
    /// The instructions.
    pub name: &'static str,
    /// Operations of a round: a multiplication and an addition for each product.
    pub operations: f64,
    /// Runs so many rounds. It is made only for a set that the processor has.
    pub run: Box<dyn Fn(usize) + Sync>,
}

impl Product {
    fn new(
        name: &'static str,
        operations: usize,
        run: impl Fn(usize) + Sync + 'static,
    ) -> Option<Product> {
        Some(Product { name, operations: operations as f64, run: Box::new(run) })
    }
}

/// Fused multiply-adds of f32.
pub(super) fn f32(isa: Isa) -> Product {
    // SAFETY: the caller's set is one of this processor's.
    let chains = unsafe { isa.run(CountChains) };
    let run = move |rounds| {
        // SAFETY: as above.
        black_box(unsafe { f32_sum(isa, rounds) });
    };
    Product::new(isa.name(), 2 * LANES * chains, run).expect("every set has f32")
}

/// The sum of all lanes of all chains, to each of which a round adds 1 x 1.
///
/// # Safety
/// The processor has the set.
pub(super) unsafe fn f32_sum(isa: Isa, rounds: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { isa.run(FusedSums(rounds)) }
}

/// Products of 8-bit integers, with the best that the set and the processor have.
pub(super) fn int8(isa: Isa) -> Product {
    #[cfg(target_arch = "x86_64")]
    {
        let found = match isa {
            Isa::Avx512 if is_x86_feature_detected!("avx512vnni") => {
                Product::new("vpdpbusd zmm", 2 * 64 * CHAINS, |rounds| {
                    // SAFETY: the processor was asked.
                    black_box(unsafe { int8_vnni_512(rounds) });
                })
            }
            Isa::Avx2 if is_x86_feature_detected!("avxvnni") => {
                Product::new("vpdpbusd ymm", 2 * 32 * 12, |rounds| {
                    // SAFETY: the processor was asked.
                    black_box(unsafe { int8_vnni_256(rounds) });
                })
            }
            Isa::Avx512 | Isa::Avx2 => {
                Product::new("vpmaddubsw + vpmaddwd ymm", 2 * 32 * 8, |rounds| {
                    // SAFETY: the processor was asked.
                    black_box(unsafe { int8_maddubs(rounds) });
                })
            }
            Isa::Portable => None,
        };
        if let Some(product) = found {
            return product;
        }
    }
    let _ = isa;
    let run = |rounds| {
        black_box(int8_plain(rounds));
    };
    Product::new("plain", 2 * CODES, run).expect("every processor multiplies integers")
}

/// Fused multiply-adds of 16-bit floats, where the set has them.
pub(super) fn fp16(isa: Isa) -> Option<Product> {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && is_x86_feature_detected!("avx512fp16") {
        // SAFETY: the processor was asked.
        return Product::new("vfmadd231ph zmm", 2 * 32 * 12, |rounds| unsafe { fp16_512(rounds) });
    }
    let _ = isa;
    None
}

/// Dot products of pairs of brain floats, where the set has them.
pub(super) fn bf16(isa: Isa) -> Option<Product> {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16") {
        return Product::new("vdpbf16ps zmm", 2 * 32 * CHAINS, |rounds| {
            // SAFETY: the processor was asked.
            black_box(unsafe { bf16_512(rounds) });
        });
    }
    let _ = isa;
    None
}

/// How many chains [`FusedSums`] has on a set.
struct CountChains;

impl OnLanes for CountChains {
    type Out = usize;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> usize {
        L::TILE_ROWS
    }
}

/// So many rounds of one fused multiply-add for every chain.
struct FusedSums(usize);

impl OnLanes for FusedSums {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: the features are on, and `lanes` has room for a vector.
        unsafe {
            let one = L::splat(black_box(1.0));
            let mut sums = [L::splat(0.0); CHAINS];
            for _ in 0..self.0 {
                for sum in sums.iter_mut().take(L::TILE_ROWS) {
                    *sum = L::fma(one, one, *sum);
                }
            }
            let mut all = sums[0];
            for sum in &sums[1..] {
                all = L::fma(*sum, one, all);
            }
            L::store(lanes.as_mut_ptr(), all);
        }
        add_lanes(lanes)
    }
}

/// Reads a block once and sums it.
pub(super) struct Reader<'a>(pub &'a [f32]);

impl OnLanes for Reader<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        const AT_ONCE: usize = 8;
        let mut lanes = [0.0; LANES];
        // SAFETY: every vector lies inside its chunk; the features are on.
        unsafe {
            let one = L::splat(1.0);
            let mut sums = [L::splat(0.0); AT_ONCE];
            for chunk in self.0.chunks_exact(AT_ONCE * LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = L::fma(L::load(chunk.as_ptr().add(i * LANES)), one, *sum);
                }
            }
            let mut all = sums[0];
            for sum in &sums[1..] {
                all = L::fma(*sum, one, all);
            }
            L::store(lanes.as_mut_ptr(), all);
        }
        add_lanes(lanes)
    }
}

/// Codes of a round of [`int8_plain`].
const CODES: usize = 512;

/// Products of 8-bit integers as the compiler makes them.
#[inline(never)]
fn int8_plain(rounds: usize) -> i32 {
    let (a, b) = (black_box([3_i8; CODES]), black_box([-5_i8; CODES]));
    let mut sum = 0_i32;
    for _ in 0..rounds {
        let dot: i32 = a.iter().zip(&b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
        sum = sum.wrapping_add(black_box(dot));
    }
    sum
}

/// 64 products an instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn int8_vnni_512(rounds: usize) -> i32 {
    let (a, b) = (_mm512_set1_epi32(black_box(0x0102_0304)), _mm512_set1_epi32(black_box(7)));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    let all = sums.into_iter().reduce(|a, b| _mm512_add_epi32(a, b));
    _mm512_reduce_add_epi32(all.expect("there are chains"))
}

/// 32 products an instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn int8_vnni_256(rounds: usize) -> i32 {
    let (a, b) = (_mm256_set1_epi32(black_box(0x0102_0304)), _mm256_set1_epi32(black_box(7)));
    let mut sums = [_mm256_setzero_si256(); 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    let all = sums.into_iter().reduce(|a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(all.expect("there are chains"))
}

/// 32 products in three instructions. One factor comes from memory, as a weight does, so that no product of a round
/// can be that of the round before.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn int8_maddubs(rounds: usize) -> i32 {
    let codes = black_box([5_i8; 32 * 16]);
    let (a, ones) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi16(1));
    let mut sums = [_mm256_setzero_si256(); 8];
    for round in 0..rounds {
        // SAFETY: 8 vectors from vector 0 to 7 on lie within 16.
        let from = unsafe { codes.as_ptr().add(32 * (round % 8)) };
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let b = unsafe { _mm256_loadu_si256(from.add(32 * i).cast()) };
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
        }
    }
    let all = sums.into_iter().reduce(|a, b| _mm256_add_epi32(a, b));
    _mm256_extract_epi32::<0>(all.expect("there are chains"))
}

/// 32 fused multiply-adds an instruction, by its name: the compiler has no stable function for it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512fp16")]
unsafe fn fp16_512(rounds: usize) {
    // 1.0 in every lane: sums of ones stay finite for as long as they are added.
    let one = _mm512_set1_epi16(black_box(0x3c00));
    for _ in 0..rounds {
        // SAFETY: registers alone are touched, and those that are written are named.
        unsafe {
            std::arch::asm!(
                "vfmadd231ph zmm4, {one}, {one}", "vfmadd231ph zmm5, {one}, {one}",
                "vfmadd231ph zmm6, {one}, {one}", "vfmadd231ph zmm7, {one}, {one}",
                "vfmadd231ph zmm8, {one}, {one}", "vfmadd231ph zmm9, {one}, {one}",
                "vfmadd231ph zmm10, {one}, {one}", "vfmadd231ph zmm11, {one}, {one}",
                "vfmadd231ph zmm12, {one}, {one}", "vfmadd231ph zmm13, {one}, {one}",
                "vfmadd231ph zmm14, {one}, {one}", "vfmadd231ph zmm15, {one}, {one}",
                one = in(zmm_reg) one,
                out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
                out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                options(nomem, nostack)
            );
        }
    }
}

/// 32 products an instruction, summed by pairs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_512(rounds: usize) -> f32 {
    // 1.0 in every lane.
    let bits = _mm512_set1_epi16(black_box(0x3f80));
    // SAFETY: two vectors of 512 bits.
    let one: __m512bh = unsafe { std::mem::transmute(bits) };
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, one, one);
        }
    }
    let all = sums.into_iter().reduce(|a, b| _mm512_add_ps(a, b));
    _mm512_reduce_add_ps(all.expect("there are chains"))
}
