//! Rows of the cache in every format: written by the sampler, read back as floats.
//!
//! Knows slots but no pages, and no attention. A row in codes is its scales, then its codes, part after part; eight
//! integers of b bits fill b bytes, the first in the lowest bits.
//!
//! Invariants:
//!   * what is read depends on the row that was written alone, not on slots, neighbours or threads
//!   * zeros come back as zeros

use super::quantize::{from_bf16, from_e4m3, larger, quotient, to_bf16, to_e4m3};
use super::{Cx, Isa, Lanes, OnLanes, rows, work};
use crate::buffer::{Buffer, DType, Mat};
use crate::format::{CacheFormat, CacheLayout, CacheSpec, Code, Part};

/// Operations that one number counts as.
const COST: usize = 10;

/// See [`Kernels::cache_shape`](crate::Kernels::cache_shape).
pub(crate) fn cache_shape(layout: &CacheLayout) -> (DType, usize) {
    match layout.format {
        CacheFormat::F32 => (DType::F32, layout.width()),
        _ => (DType::U8, layout.row_bytes()),
    }
}

/// See [`Kernels::write_cache`](crate::Kernels::write_cache).
pub(crate) fn write_cache(
    cx: &Cx,
    spec: &CacheSpec<'_>,
    latent: &Buffer,
    rope: &Buffer,
    slots: &Buffer,
    cache: &mut Buffer,
) {
    let layout = &spec.layout;
    assert_eq!(
        (latent.cols(), rope.cols()),
        (layout.latent, layout.rope),
        "numbers of a cache row"
    );
    assert_eq!((latent.rows(), rope.rows()), (slots.rows(), slots.rows()), "one slot per row");
    assert_eq!((cache.dtype(), cache.cols()), cache_shape(layout), "shape of a cache row");
    if layout.format == CacheFormat::F32 {
        rows::scatter_rows(cx, latent, slots, &mut cache.cols_of_mut(0..layout.latent));
        rows::scatter_rows(cx, rope, slots, &mut cache.cols_of_mut(layout.latent..layout.width()));
        return;
    }
    let (latent, rope, slots) = (latent.host::<f32>(), rope.host::<f32>(), slots.host::<u32>());
    let channels = channels(spec);
    let cache = cache.host_mut::<u8>();
    work::split(cx, latent.rows, 1, COST * layout.width(), &|range| {
        for row in range {
            // SAFETY: the slots are distinct, so that a cache row is written by one piece.
            let to = unsafe { cache.shared_row_mut(slots.row(row)[0] as usize) };
            let row =
                WriteRow { layout, channels, latent: latent.row(row), rope: rope.row(row), to };
            // SAFETY: `isa` was detected; the job is safe code.
            unsafe { cx.isa.run(row) };
        }
    });
}

/// See [`Kernels::read_cache`](crate::Kernels::read_cache).
pub(crate) fn read_cache(
    cx: &Cx,
    spec: &CacheSpec<'_>,
    cache: &Buffer,
    slots: &Buffer,
    to: &mut Buffer,
) {
    let layout = &spec.layout;
    assert_eq!((to.rows(), to.cols()), (slots.rows(), layout.width()), "shape of read rows");
    if layout.format == CacheFormat::F32 {
        return rows::gather_rows(cx, cache, slots, to);
    }
    let (cache, slots, to) = (Coded::new(spec, cache), slots.host::<u32>(), to.host_mut::<f32>());
    work::split(cx, slots.rows, 1, COST * layout.width(), &|range| {
        for row in range {
            // SAFETY: a row is read by one piece.
            let to = unsafe { to.shared_row_mut(row) };
            cache.read(cx.isa, slots.row(row)[0] as usize, to);
        }
    });
}

/// A cache in codes, to read from.
pub(crate) struct Coded<'a> {
    layout: CacheLayout,
    channels: Option<&'a [f32]>,
    rows: Mat<'a, u8>,
}

impl<'a> Coded<'a> {
    /// The rows of `cache`, which are kept as `spec` says: not as floats.
    pub fn new(spec: &CacheSpec<'a>, cache: &'a Buffer) -> Coded<'a> {
        assert_eq!(
            (cache.dtype(), cache.cols()),
            cache_shape(&spec.layout),
            "shape of a cache row"
        );
        Coded { layout: spec.layout, channels: channels(spec), rows: cache.host() }
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.layout.width()
    }

    /// The row in `slot` as floats.
    pub fn read(&self, isa: Isa, slot: usize, to: &mut [f32]) {
        let Coded { layout, channels, .. } = self;
        let row = ReadRow { layout, channels: *channels, from: self.rows.row(slot), to };
        // SAFETY: `isa` was detected; the job is safe code.
        unsafe { isa.run(row) }
    }
}

/// What a format of few bits divides the latent by.
fn channels<'a>(spec: &CacheSpec<'a>) -> Option<&'a [f32]> {
    let channels = spec.channels.filter(|_| spec.layout.format == CacheFormat::SixBit)?;
    assert_eq!((channels.rows(), channels.cols()), (1, spec.layout.latent), "a size per number");
    Some(channels.host::<f32>().row(0))
}

struct WriteRow<'a> {
    layout: &'a CacheLayout,
    channels: Option<&'a [f32]>,
    latent: &'a [f32],
    rope: &'a [f32],
    to: &'a mut [u8],
}

impl OnLanes for WriteRow<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let WriteRow { layout, channels, latent, rope, mut to } = self;
        let numbers = [(latent, channels), (rope, None)];
        for ((part, count), (numbers, channels)) in layout.parts().into_iter().zip(numbers) {
            let (own, rest) = to.split_at_mut(part.bytes(count));
            write_part(part, numbers, channels, own);
            to = rest;
        }
    }
}

/// Writes a part: its scales, then its codes.
#[inline(always)]
fn write_part(part: Part, numbers: &[f32], channels: Option<&[f32]>, to: &mut [u8]) {
    if part.code == Code::Bf16 {
        for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(numbers) {
            *to = to_bf16(*x).to_le_bytes();
        }
        return;
    }
    let (scales, mut codes) = to.split_at_mut(2 * numbers.len().div_ceil(part.group));
    let number = |i: usize| match channels {
        Some(channels) => quotient(numbers[i], channels[i]),
        None => numbers[i],
    };
    for (first, to) in (0..numbers.len()).step_by(part.group).zip(scales.as_chunks_mut::<2>().0) {
        let group = first..numbers.len().min(first + part.group);
        let most = group.clone().fold(0.0, |most, i| larger(most, number(i)));
        let code = to_bf16(most / part.largest());
        *to = code.to_le_bytes();
        let scaled = |i: usize| quotient(number(i), from_bf16(code));
        let (own, rest) = codes.split_at_mut(part.bytes(group.len()) - 2);
        match part.code {
            Code::Integer(bits) => {
                for (unit, first) in own.chunks_exact_mut(bits).zip(group.clone().step_by(8)) {
                    let ends = group.end.min(first + 8);
                    let code = |i: usize| to_integer(part, bits, scaled(i)) << ((i - first) * bits);
                    let word = (first..ends).fold(0, |word, i| word | code(i));
                    unit.copy_from_slice(&word.to_le_bytes()[..bits]);
                }
            }
            _ => own.iter_mut().zip(group).for_each(|(to, i)| *to = to_e4m3(scaled(i))),
        }
        codes = rest;
    }
}

/// The code of a quotient: an integer counted from the middle of the codes.
#[inline(always)]
fn to_integer(part: Part, bits: usize, x: f32) -> u64 {
    let largest = part.largest();
    (x.round_ties_even().clamp(-largest, largest) as i64 + (1 << (bits - 1))) as u64
}

struct ReadRow<'a> {
    layout: &'a CacheLayout,
    channels: Option<&'a [f32]>,
    from: &'a [u8],
    to: &'a mut [f32],
}

impl OnLanes for ReadRow<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let ReadRow { layout, channels, mut from, to } = self;
        let (latent, rope) = to.split_at_mut(layout.latent);
        for ((part, count), to) in layout.parts().into_iter().zip([&mut *latent, rope]) {
            let (own, rest) = from.split_at(part.bytes(count));
            match part.code {
                Code::Bf16 => {
                    for (to, code) in to.iter_mut().zip(own.as_chunks::<2>().0) {
                        *to = from_bf16(u16::from_le_bytes(*code));
                    }
                }
                Code::E4m3 => read_e4m3(part, own, to),
                Code::Integer(5) => read_integers::<5>(part, own, to),
                Code::Integer(8) => read_integers::<8>(part, own, to),
                Code::Integer(bits) => unreachable!("no part has integers of {bits} bits"),
            }
            from = rest;
        }
        if let Some(channels) = channels {
            latent.iter_mut().zip(channels).for_each(|(x, channel)| *x *= channel);
        }
    }
}

/// The groups of a part: floats to set, their scale, and all codes behind the scales.
#[inline(always)]
fn groups<'a>(
    part: Part,
    from: &'a [u8],
    to: &'a mut [f32],
) -> (impl Iterator<Item = (&'a mut [f32], f32)>, &'a [u8]) {
    let (scales, codes) = from.split_at(2 * to.len().div_ceil(part.group));
    let scales = scales.as_chunks::<2>().0.iter();
    let scales = scales.map(|scale| from_bf16(u16::from_le_bytes(*scale)));
    (to.chunks_mut(part.group).zip(scales), codes)
}

#[inline(always)]
fn read_e4m3(part: Part, from: &[u8], to: &mut [f32]) {
    let (groups, mut codes) = groups(part, from, to);
    for (to, scale) in groups {
        let (own, rest) = codes.split_at(to.len());
        to.iter_mut().zip(own).for_each(|(to, code)| *to = from_e4m3(*code) * scale);
        codes = rest;
    }
}

#[inline(always)]
fn read_integers<const BITS: usize>(part: Part, from: &[u8], to: &mut [f32]) {
    let (groups, codes) = groups(part, from, to);
    let mut units = codes.as_chunks::<BITS>().0.iter();
    for (to, scale) in groups {
        for (to, unit) in to.chunks_mut(8).zip(&mut units) {
            for (to, code) in to.iter_mut().zip(unpack::<BITS>(unit)) {
                *to = (code as i32 - (1 << (BITS - 1))) as f32 * scale;
            }
        }
    }
}

/// Eight codes of `BITS` bits.
#[inline(always)]
fn unpack<const BITS: usize>(bytes: &[u8; BITS]) -> [u32; 8] {
    let mut word = [0; 8];
    word[..BITS].copy_from_slice(bytes);
    let word = u64::from_le_bytes(word);
    std::array::from_fn(|i| (word >> (i * BITS)) as u32 & ((1 << BITS) - 1))
}

#[cfg(test)]
mod tests;
