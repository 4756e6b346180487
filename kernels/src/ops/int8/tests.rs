//! Every level of this processor against integers summed one by one, at the ends of codes, tiles, pairs and panels.

use super::*;
use crate::arena::{Arena, Kind};
use crate::buffer::{Buffer, DType};
use crate::format::WeightFormat;
use crate::kernels::{Pack, Product};
use crate::ops::int8_rows::{SHARE, scale};
use crate::ops::linear::linear;
use crate::ops::pack::pack;
use crate::ops::tile::Out;
use crate::pool::Pool;
use crate::random::{self, Stream};

fn context(isa: Isa) -> Cx {
    let arena = Arena::new(None);
    let scratch = arena.owner("test", Kind::Activations);
    Cx { pool: Pool::new(1), isa, arena, scratch }
}

fn buffer(cx: &Cx, rows: usize, cols: usize, number: impl Fn(usize, usize) -> f32) -> Buffer {
    let mut buffer = cx.arena.buffer(cx.scratch, DType::F32, rows, cols).unwrap();
    let mut to = buffer.host_mut::<f32>();
    for row in 0..rows {
        for (col, x) in to.row_mut(row).iter_mut().enumerate() {
            *x = number(row, col);
        }
    }
    buffer
}

/// A level's block, from the same packed weight and rows as `linear`'s.
fn on_level(cx: &Cx, level: Level, x: &Buffer, w: &Buffer, start: f32) -> Vec<u32> {
    let whole = Pack::whole(Product::Transposed, w);
    let packed = pack(cx, cx.scratch, w, whole, WeightFormat::Int8, 1).unwrap();
    let right = super::super::int8_pack::integers(&packed, 0);
    let stride = row_bytes(right.quads);
    let mut codes = vec![0; x.rows() * stride];
    for i in 0..x.rows() {
        let row = x.host::<f32>().row(i).as_ptr();
        let to = codes[i * stride..].as_mut_ptr();
        // SAFETY: row and codes have the widths of the product.
        unsafe { level.quantise(row, x.cols(), to) };
    }
    // One column more, which nobody may touch.
    let stride = w.rows() + 1;
    let mut y = vec![start; x.rows() * stride];
    let out = Out { at: y.as_mut_ptr(), row: stride };
    let (rows, columns) = (x.rows(), w.rows());
    let block =
        Block { rows, columns, left: codes.as_ptr(), right, out, add: start.to_bits() != 0 };
    // SAFETY: the operands have the block's shape; the level is available.
    unsafe { level.run(block) };
    for row in y.chunks(stride) {
        assert_eq!(row[columns].to_bits(), start.to_bits(), "a column beyond the block");
    }
    y.chunks(stride).flat_map(|row| &row[..columns]).map(|y| y.to_bits()).collect()
}

/// The same, one product after another.
fn defined(x: &Buffer, w: &Buffer, start: f32) -> Vec<u32> {
    let most = |row: &[f32]| row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let mut y = Vec::new();
    for i in 0..x.rows() {
        let row = x.host::<f32>().row(i).to_vec();
        for j in 0..w.rows() {
            let column = w.host::<f32>().row(j).to_vec();
            let scale = most(&column) / 127.0;
            let mut value = 0.0f32;
            for (numbers, weights) in row.chunks(16).zip(column.chunks(16)) {
                let inverse = 127.0 / most(numbers);
                // Blocks and columns of zeros have quotients that are no numbers, and codes of 0.
                let a = numbers.iter().map(|x| (x * inverse).round_ties_even() as i64);
                let b = weights.iter().map(|w| (w / scale).round_ties_even() as i64);
                let sum: i64 = a.zip(b).map(|(a, b)| a * b).sum();
                value = (sum as f32).mul_add(most(numbers) / 127.0, value);
            }
            let value = value * scale;
            y.push((if start.to_bits() != 0 { start + value } else { value }).to_bits());
        }
    }
    y
}

fn levels() -> Vec<(Cx, Level)> {
    let each = |isa| Level::available(isa).map(move |level| (context(isa), level));
    Isa::available().into_iter().flat_map(each).collect()
}

#[test]
fn every_level_has_the_bits_of_integers_summed_one_by_one() {
    let number = |key, i: usize, j: usize| {
        random::normal(3, Stream::Data, [key, i as u64, j as u64, 0]) as f32
    };
    for (case, [m, n, k]) in
        [[1, 33, 1], [2, 64, 127], [3, 47, 130], [7, 16, 64], [13, 100, 257], [40, 31, 1030]]
            .into_iter()
            .enumerate()
    {
        for start in [0.0, 0.75] {
            for (cx, level) in levels() {
                // Blocks of different sizes, and one of zeros.
                let size = |j: usize| [1.0, 0.0, 30.0, 1e-3][j / SHARE % 4];
                let x = buffer(&cx, m, k, |i, j| size(j) * number(case as u64, i, j));
                let w = buffer(&cx, n, k, |i, j| if i == 5 { 0.0 } else { number(9, i, j) });
                let found = on_level(&cx, level, &x, &w, start);
                assert!(found == defined(&x, &w, start), "{level:?}, {m} x {n} x {k}, {start}");
            }
        }
    }
}

#[test]
fn codes_at_their_ends_overflow_no_sum() {
    for (cx, level) in levels() {
        for (a, b) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0)] {
            let x = buffer(&cx, 3, 1 << 15, |_, _| a);
            let w = buffer(&cx, 2, 1 << 15, |_, _| b);
            assert!(on_level(&cx, level, &x, &w, 0.0) == defined(&x, &w, 0.0), "{level:?}");
        }
    }
}

#[test]
fn a_number_that_is_not_finite_shows_in_its_row_or_column_and_nowhere_else() {
    for (cx, _) in levels() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let x = buffer(&cx, 4, 9, |i, j| if (i, j) == (2, 7) { bad } else { 1.0 + j as f32 });
            let w = buffer(&cx, 5, 9, |i, j| if (i, j) == (3, 0) { bad } else { i as f32 });
            let whole = Pack::whole(Product::Transposed, &w);
            let packed = pack(&cx, cx.scratch, &w, whole, WeightFormat::Int8, 1).unwrap();
            let mut y = buffer(&cx, 4, 5, |_, _| 0.0);
            linear(&cx, &x, &packed, &mut y, Store::Set);
            for i in 0..4 {
                for j in 0..5 {
                    let y = y.host::<f32>().row(i)[j];
                    assert_eq!(y.is_nan(), i == 2 || j == 3, "{bad}: row {i}, column {j} is {y}");
                }
            }
        }
    }
}

#[test]
fn numbers_of_any_size_become_codes() {
    for most in [f32::MAX, 1e30, 1e-30, 1e-35] {
        let row = [0.0, most, -most / 4.0, -most];
        for (_, level) in levels() {
            let mut to = [0xaa; row_bytes(1)];
            // SAFETY: the row has four numbers, a quad.
            unsafe { level.quantise(row.as_ptr(), 4, to.as_mut_ptr()) };
            let codes = to.map(u8::cast_signed);
            assert_eq!(codes[..5], [0, 127, -32, -127, 0], "{level:?}, {most}");
            assert!(codes[5..SHARE].iter().all(|code| *code == 0), "{level:?}");
            assert_eq!(to[SHARE..][..4], (128 * 32i32).to_ne_bytes(), "{level:?}");
            assert_eq!(to[SHARE + 4..], (most / 127.0).to_ne_bytes(), "{level:?}");
        }
    }
    assert_eq!(scale(1e-40f32.to_bits()), (0.0, 0.0));
}
