//! Instruction sets, and sixteen floats as one value on each of them.
//!
//! A loop is written once as an [`OnLanes`] value; [`Isa::run`] compiles it with AVX-512, with AVX2 and
//! FMA, and plainly. Inside, ordinary Rust loops are vectorised by the compiler with that set's features
//! (`f32::mul_add` becomes one instruction); [`Lanes`] is for the loops whose registers matter.
//!
//! Invariants:
//!   * a vector has 16 lanes on every set, so that partial sums and their bits are the same on all
//!   * every function here is `inline(always)`: only `Lanes::call` sets features, and only `Isa::run`
//!     enters it, after the processor was asked

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ffi::OsString;

/// The environment variable that forces an instruction set; it changes no result.
pub(crate) const ISA_VARIABLE: &str = "REHEARSAL_ISA";

/// Floats in one vector.
pub(crate) const LANES: usize = 16;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only the plain one is there"))]
pub(crate) enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// What the compiler makes of plain Rust.
    Portable,
}

/// A loop that is compiled for each instruction set.
pub(crate) trait OnLanes {
    /// What the loop returns.
    type Out;
    /// The loop; implementations are `#[inline(always)]`, so that it takes on the caller's features.
    ///
    /// # Safety
    /// Called inside `L::call`; an implementation adds its own conditions.
    unsafe fn run<L: Lanes>(self) -> Self::Out;
}

impl Isa {
    /// The set that [`ISA_VARIABLE`] names, else the best that this processor has.
    ///
    /// # Panics
    /// If the variable names none; a program asks [`Isa::chosen`] first.
    pub fn detect() -> Isa {
        Isa::chosen(std::env::var_os(ISA_VARIABLE)).unwrap_or_else(|fault| panic!("{fault}"))
    }

    /// The set of this name, the best one without a name; a fault tells what there is.
    pub fn chosen(name: Option<OsString>) -> Result<Isa, String> {
        let available = Isa::available();
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(available[0]) };
        available.iter().copied().find(|isa| name == isa.name()).ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
            format!(
                "{ISA_VARIABLE} = {name:?} is no instruction set of this processor, which has {}; name one of these, \
                 or leave the variable out for the first",
                names.join(", ")
            )
        })
    }

    /// All sets that this processor has, best first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                found.push(Isa::Avx512);
            }
            if avx2 {
                found.push(Isa::Avx2);
            }
        }
        found.push(Isa::Portable);
        found
    }

    /// The name that a person reads.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }

    /// Runs `job` compiled for this set.
    ///
    /// # Safety
    /// The conditions of the job, and the set is one of [`Isa::available`].
    pub unsafe fn run<J: OnLanes>(self, job: J) -> J::Out {
        // SAFETY: the processor has the set's features and the caller keeps the job's conditions.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => Avx512::call(job),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => Avx2::call(job),
                _ => Portable::call(job),
            }
        }
    }
}

/// Sixteen floats and the few operations that register tiles and reductions need.
///
/// # Safety
/// All functions: the processor has the features; pointers are good for the floats that are moved.
pub(crate) trait Lanes: Copy {
    /// Sixteen floats.
    type V: Copy;
    /// Most rows of a register tile two vectors (or one) wide.
    const TILE_ROWS: usize;
    /// Vectors across a tile of one, two, three and more rows.
    const TILE_VECTORS: [usize; 4];
    /// Most query heads, and vectors of keys, whose scores stay in registers beside four columns of keys.
    const HEADS: usize;
    const KEYS: usize;

    /// Calls a job with this set's features on.
    unsafe fn call<J: OnLanes>(job: J) -> J::Out;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// Sixteen floats from memory.
    unsafe fn load(from: *const f32) -> Self::V;
    /// The first `count < 16` floats from memory, then zeros.
    unsafe fn load_some(from: *const f32, count: usize) -> Self::V;
    /// Sixteen floats to memory.
    unsafe fn store(to: *mut f32, x: Self::V);
    /// The first `count < 16` floats to memory.
    unsafe fn store_some(to: *mut f32, count: usize, x: Self::V);
    /// Asks for the cache line at `at`, which need not be good, to be brought to the second cache.
    unsafe fn prefetch(at: *const f32);
    /// Four floats of each of eight rows as columns: float p of row i goes to `to + p * stride + i`.
    unsafe fn turn(rows: [*const f32; 8], to: *mut f32, stride: usize);
    /// Eight floats of each of sixteen rows, `stride` apart, as columns: float p of all rows is vector p.
    unsafe fn turned(row: *const f32, stride: usize) -> [Self::V; 8];
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

/// Σ a[i] b[i]: lane j sums the elements j, j + 16, ... with fused multiply-adds, then the lanes are added
/// in a fixed tree. The same bits on every set.
///
/// # Safety
/// Called inside `L::call`.
#[inline(always)]
pub(crate) unsafe fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let whole = a.len() / LANES * LANES;
    let mut lanes = [0.0; LANES];
    // SAFETY: all addresses lie inside the slices; the features are on.
    unsafe {
        let mut sum = L::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            sum = L::fma(L::load(a.as_ptr().add(i)), L::load(b.as_ptr().add(i)), sum);
        }
        if whole < a.len() {
            let rest = a.len() - whole;
            let x = L::load_some(a.as_ptr().add(whole), rest);
            sum = L::fma(x, L::load_some(b.as_ptr().add(whole), rest), sum);
        }
        L::store(lanes.as_mut_ptr(), sum);
    }
    add_lanes(lanes)
}

/// The sum of sixteen lanes in a fixed tree.
#[inline(always)]
pub(crate) fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// 512-bit vectors.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY (all blocks below): the trait's contract gives the features and good pointers.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    type V = __m512;
    const TILE_ROWS: usize = 14;
    const TILE_VECTORS: [usize; 4] = [8, 4, 4, 2];
    const HEADS: usize = 4;
    const KEYS: usize = 2;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn call<J: OnLanes>(job: J) -> J::Out {
        unsafe { job.run::<Avx512>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps((1u16 << count) - 1, from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, count: usize, x: __m512) {
        unsafe { _mm512_mask_storeu_ps(to, (1u16 << count) - 1, x) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn turn(rows: [*const f32; 8], to: *mut f32, stride: usize) {
        unsafe { turn_avx(rows, to, stride) }
    }
    #[inline(always)]
    unsafe fn turned(row: *const f32, stride: usize) -> [__m512; 8] {
        unsafe {
            let mut quarters = [[_mm512_setzero_ps(); 4]; 2];
            for (i, quarters) in quarters.iter_mut().enumerate() {
                // Rows r and r + 4 side by side; quarters 0 and 2 of a vector become four rows of column c, 1 and 3
                // of column c + 4.
                let mut x = [_mm512_setzero_ps(); 4];
                for (r, x) in x.iter_mut().enumerate() {
                    let at = row.add((8 * i + r) * stride);
                    let low = _mm512_castps256_ps512(_mm256_loadu_ps(at));
                    *x = _mm512_insertf32x8::<1>(low, _mm256_loadu_ps(at.add(4 * stride)));
                }
                let [a, b, c, d] = x;
                let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (low_next, high_next) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                *quarters = [
                    _mm512_shuffle_ps::<0x44>(low, low_next),
                    _mm512_shuffle_ps::<0xee>(low, low_next),
                    _mm512_shuffle_ps::<0x44>(high, high_next),
                    _mm512_shuffle_ps::<0xee>(high, high_next),
                ];
            }
            let mut columns = [_mm512_setzero_ps(); 8];
            for c in 0..4 {
                let (a, b) = (quarters[0][c], quarters[1][c]);
                columns[c] = _mm512_shuffle_f32x4::<0x88>(a, b);
                columns[c + 4] = _mm512_shuffle_f32x4::<0xdd>(a, b);
            }
            columns
        }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

/// [`Lanes::turn`] on both sets of vectors.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn turn_avx(rows: [*const f32; 8], to: *mut f32, stride: usize) {
    unsafe {
        for (p, x) in turned_avx(rows).into_iter().enumerate() {
            _mm256_storeu_ps(to.add(p * stride), x);
        }
    }
}

/// Four floats of eight rows as columns.
///
/// # Safety
/// As for [`Lanes::turn`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn turned_avx(rows: [*const f32; 8]) -> [__m256; 4] {
    unsafe {
        // Rows i and i + 4 side by side, so that pairs, then fours, of rows meet without crossing the halves.
        let pair = |i: usize| _mm256_loadu2_m128(rows[i + 4], rows[i]);
        let (a, b, c, d) = (pair(0), pair(1), pair(2), pair(3));
        let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (low_next, high_next) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0x44>(low, low_next),
            _mm256_shuffle_ps::<0xee>(low, low_next),
            _mm256_shuffle_ps::<0x44>(high, high_next),
            _mm256_shuffle_ps::<0xee>(high, high_next),
        ]
    }
}

/// Two 256-bit vectors.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// Eight set words, then eight clear ones: a mask of `count` lanes starts `count` words before the middle.
#[cfg(target_arch = "x86_64")]
static MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn mask(count: usize) -> __m256i {
    // SAFETY: 8 words from 8 - min(count, 8) lie inside the table.
    unsafe { _mm256_loadu_si256(MASK.as_ptr().add(8 - count.min(8)).cast()) }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    type V = [__m256; 2];
    const TILE_ROWS: usize = 6;
    // Three rows of two vectors need a register more than there are.
    const TILE_VECTORS: [usize; 4] = [4, 2, 1, 1];
    const HEADS: usize = 2;
    const KEYS: usize = 1;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn call<J: OnLanes>(job: J) -> J::Out {
        unsafe { job.run::<Avx2>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> [__m256; 2] {
        unsafe {
            let high = mask(count.saturating_sub(8));
            [_mm256_maskload_ps(from, mask(count)), _mm256_maskload_ps(from.wrapping_add(8), high)]
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [__m256; 2]) {
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, count: usize, x: [__m256; 2]) {
        unsafe {
            _mm256_maskstore_ps(to, mask(count), x[0]);
            _mm256_maskstore_ps(to.wrapping_add(8), mask(count.saturating_sub(8)), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn turn(rows: [*const f32; 8], to: *mut f32, stride: usize) {
        unsafe { turn_avx(rows, to, stride) }
    }
    #[inline(always)]
    unsafe fn turned(row: *const f32, stride: usize) -> [[__m256; 2]; 8] {
        unsafe {
            let mut columns = [[_mm256_setzero_ps(); 2]; 8];
            for part in 0..4 {
                let (half, first) = (part / 2, part % 2 * 4);
                let mut rows = [row; 8];
                for (i, to) in rows.iter_mut().enumerate() {
                    *to = row.add((8 * half + i) * stride + first);
                }
                let turned = turned_avx(rows);
                for p in 0..4 {
                    columns[first + p][half] = turned[p];
                }
            }
            columns
        }
    }
    #[inline(always)]
    unsafe fn fma(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}

/// An array.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Portable {
    type V = [f32; LANES];
    const TILE_ROWS: usize = 4;
    const TILE_VECTORS: [usize; 4] = [1, 1, 1, 1];
    const HEADS: usize = 2;
    const KEYS: usize = 1;

    unsafe fn call<J: OnLanes>(job: J) -> J::Out {
        unsafe { job.run::<Portable>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; LANES] {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; LANES] {
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> [f32; LANES] {
        let mut x = [0.0; LANES];
        unsafe { std::ptr::copy_nonoverlapping(from, x.as_mut_ptr(), count) };
        x
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [f32; LANES]) {
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, count: usize, x: [f32; LANES]) {
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), to, count) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn turn(rows: [*const f32; 8], to: *mut f32, stride: usize) {
        for p in 0..4 {
            for (i, row) in rows.iter().enumerate() {
                unsafe { *to.add(p * stride + i) = *row.add(p) }
            }
        }
    }
    #[inline(always)]
    unsafe fn turned(row: *const f32, stride: usize) -> [[f32; LANES]; 8] {
        let at = |p: usize| std::array::from_fn(|i| unsafe { *row.add(i * stride + p) });
        std::array::from_fn(at)
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        let mut y = c;
        for i in 0..LANES {
            y[i] = a[i].mul_add(b[i], c[i]);
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_names_a_set_or_the_fault_names_what_there_is() {
        let chosen = |name: &str| Isa::chosen(Some(name.into()));
        assert_eq!(chosen("portable"), Ok(Isa::Portable));
        assert_eq!(Isa::chosen(None), Ok(Isa::available()[0]));
        assert_eq!(chosen(""), Isa::chosen(None));
        for isa in Isa::available() {
            assert_eq!(chosen(isa.name()), Ok(isa));
        }
        let fault = chosen("sse9").unwrap_err();
        assert!(
            fault.contains("REHEARSAL_ISA = \"sse9\"") && fault.contains("portable"),
            "{fault}"
        );
    }
}
