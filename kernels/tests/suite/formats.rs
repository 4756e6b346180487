//! Formats of weights and cache rows: what is left of a number, and that whoever reads it sees the same.
//!
//! The values that a packed weight has are read by a product with the unit matrix, which rounds nothing.

use crate::bench::{Bench, check_close, check_same_bits, inner, normals};
use rehearsal_kernels::{
    Arena, AttentionShape, Buffer, CacheFormat, CacheLayout, CacheSpec, CpuKernels, DType,
    DecodeBatch, HeadColumns, Kernels, Kind, Pack, Packed, Product, ReferenceKernels, Store,
    WeightFormat,
};

/// Rows and columns that end inside blocks of 128 and panels of 32.
const ROWS: usize = 300;
const COLS: usize = 170;

/// Runs `test` on the CPU and on the reference.
fn on_each(test: impl Fn(&Bench<'_>)) {
    let cpu = CpuKernels::new(2, Arena::new(None));
    let reference = ReferenceKernels::new(Arena::new(None));
    for kernels in [&cpu as &dyn Kernels, &reference] {
        test(&Bench::new(kernels));
    }
}

/// A weight whose rows and columns differ in size, one row of zeros among them.
fn weight(bench: &Bench<'_>) -> Buffer {
    let sized = |(i, x): (usize, f64)| {
        let (row, col) = (i / COLS, i % COLS);
        let size = 2f64.powi((row % 7) as i32 - 12 + (col % 5) as i32);
        if row == 77 { 0.0 } else { f64::from((x * size) as f32) }
    };
    let numbers: Vec<f64> = normals(5, ROWS * COLS).into_iter().enumerate().map(sized).collect();
    bench.floats(ROWS, COLS, &numbers)
}

/// The values of a packed weight's first group, `[inputs, outputs]`.
fn values(bench: &Bench<'_>, packed: &Packed) -> Vec<f64> {
    let mut unit = vec![0.0; packed.inputs * packed.inputs];
    unit.iter_mut().step_by(packed.inputs + 1).for_each(|x| *x = 1.0);
    let unit = bench.floats(packed.inputs, packed.inputs, &unit);
    let mut y = bench.unset(packed.inputs, packed.outputs);
    bench.kernels.linear(&unit, packed, &mut y, Store::Set);
    bench.read(&y)
}

/// The values of a whole weight, in its own rows.
fn kept(bench: &Bench<'_>, weight: &Buffer, format: WeightFormat) -> Vec<f64> {
    values(bench, &bench.kept(weight, Pack::whole(Product::Plain, weight), format))
}

#[test]
fn every_format_keeps_the_values_that_the_reference_defines() {
    let cpu = CpuKernels::new(2, Arena::new(None));
    let reference = ReferenceKernels::new(Arena::new(None));
    for format in WeightFormat::ALL {
        let of = |kernels: &dyn Kernels| {
            let bench = Bench::new(kernels);
            kept(&bench, &weight(&bench), format)
        };
        check_same_bits(&format!("{format:?}"), &of(&cpu), &of(&reference));
    }
}

#[test]
fn fp8_keeps_the_normal_numbers_of_every_block_within_a_sixteenth() {
    on_each(|bench| {
        let weight = weight(bench);
        let numbers = bench.read(&weight);
        for (format, rows, cols) in
            [(WeightFormat::Fp8Channel, 1, COLS), (WeightFormat::Fp8Block, 128, 128)]
        {
            let kept = kept(bench, &weight, format);
            let block = |i: usize| (i / COLS / rows, i % COLS / cols);
            let mut most = std::collections::BTreeMap::new();
            for (i, x) in numbers.iter().enumerate() {
                let most = most.entry(block(i)).or_insert(0.0f64);
                *most = most.max(x.abs());
            }
            let mut normal = 0;
            for (i, (kept, x)) in kept.iter().zip(&numbers).enumerate() {
                let scale = most[&block(i)] / 448.0;
                let error = (kept - x).abs();
                if x.abs() >= scale / 64.0 && *x != 0.0 {
                    normal += 1;
                    assert!(error <= x.abs() / 16.0, "{format:?} {i}: {x} is kept as {kept}");
                } else {
                    assert!(error <= scale / 1024.0 * 1.001, "{format:?} {i}: {x}, {kept}");
                }
            }
            assert!(normal > numbers.len() * 9 / 10, "{normal}");
        }
    });
}

#[test]
fn weights_of_any_size_stay_finite_and_one_that_is_not_a_number_shows() {
    on_each(|bench| {
        for format in WeightFormat::ALL {
            let mut numbers = vec![0.0; 6];
            for large in [f64::from(f32::MAX / 2.0), 1e-30, -1e30] {
                numbers[3] = large;
                let weight = bench.floats(2, 3, &numbers);
                let kept = kept(bench, &weight, format);
                let error = (kept[3] - large).abs() / large.abs();
                assert!(kept.iter().all(|x| x.is_finite()) && error < 0.01, "{format:?} {kept:?}");
                assert_eq!(kept[..3], [0.0; 3]);
            }
        }
    });
    // The reference defines numbers only.
    let cpu = CpuKernels::new(1, Arena::new(None));
    let bench = Bench::new(&cpu);
    for format in WeightFormat::ALL {
        let weight = bench.floats(1, 3, &[1.0, f64::NAN, -2.0]);
        assert!(kept(&bench, &weight, format).iter().any(|x| x.is_nan()), "{format:?}");
    }
}

#[test]
fn products_with_codes_have_the_bits_of_products_with_the_values_they_stand_for() {
    on_each(|bench| {
        let weight = weight(bench);
        for format in WeightFormat::ALL {
            let values = bench.floats(ROWS, COLS, &kept(bench, &weight, format));
            for product in [Product::Transposed, Product::Plain] {
                // Products of integers are another thing: `agreement` and `ops::int8` test them.
                if (format, product) == (WeightFormat::Int8, Product::Transposed) {
                    continue;
                }
                let codes = bench.kept(&weight, Pack::whole(product, &weight), format);
                let floats = bench.packed(&values, Pack::whole(product, &values));
                // Few rows, one block of rows, and several.
                for rows in [1, 3, 4, 40, 200] {
                    for store in [Store::Set, Store::Add] {
                        let x = bench.random(rows as u64, rows, codes.inputs);
                        let y = |weight: &Packed| {
                            let mut y = bench.random(9, rows, weight.outputs);
                            bench.kernels.linear(&x, weight, &mut y, store);
                            bench.read(&y)
                        };
                        let label = format!("{format:?}, {product:?}, {rows} rows");
                        check_same_bits(&label, &y(&codes), &y(&floats));
                    }
                }
            }
        }
    });
}

#[test]
fn a_head_s_keys_and_values_are_those_of_the_whole_weight_in_every_packing() {
    // Heads of 60 key rows and 40 value rows: no block of 128 rows ends between them.
    let (heads, key, value) = (3, 60, 40);
    on_each(|bench| {
        let weight = weight(bench);
        for format in WeightFormat::ALL.into_iter().filter(|f| *f != WeightFormat::Int8) {
            let whole = kept(bench, &weight, format);
            let rows = |product, first_row, rows| Pack {
                product,
                groups: heads,
                group_stride: key + value,
                first_row,
                rows,
            };
            // Absorbed: q W_UK per head, and W_UV z. Both read their own rows of the weight.
            let keys = bench.kept(&weight, rows(Product::Plain, 0, key), format);
            let values = bench.kept(&weight, rows(Product::Transposed, key, value), format);
            for (packed, first, count) in [(&keys, 0, key), (&values, key, value)] {
                let columns = HeadColumns {
                    input_first: 0,
                    input_stride: 0,
                    output_first: 0,
                    output_stride: packed.outputs,
                };
                let mut unit = vec![0.0; packed.inputs * packed.inputs];
                unit.iter_mut().step_by(packed.inputs + 1).for_each(|x| *x = 1.0);
                let unit = bench.floats(packed.inputs, packed.inputs, &unit);
                let mut y = bench.unset(packed.inputs, heads * packed.outputs);
                bench.kernels.linear_heads(&unit, packed, columns, &mut y, Store::Set);
                let found = bench.read(&y);
                for (head, row, col) in (0..heads)
                    .flat_map(|h| (0..count).map(move |r| (h, r)))
                    .flat_map(|(h, r)| (0..COLS).map(move |c| (h, r, c)))
                {
                    let (input, output) = match packed.product {
                        Product::Plain => (row, col),
                        Product::Transposed => (col, row),
                    };
                    let at = input * heads * packed.outputs + head * packed.outputs + output;
                    let wanted = whole[(head * (key + value) + first + row) * COLS + col];
                    assert_eq!(
                        found[at], wanted,
                        "{format:?}, head {head}, row {row}, column {col}"
                    );
                }
            }
        }
    });
}

#[test]
fn a_packed_weight_holds_the_bytes_of_its_format_and_of_its_scales() {
    let cpu = CpuKernels::new(1, Arena::new(None));
    let bench = Bench::new(&cpu);
    // Whole panels and blocks, and a multiple of the arena's pages.
    let (rows, cols) = (1024, 512);
    let source = cpu.arena().buffer(bench.owner, DType::F32, rows, cols).unwrap();
    let owner = cpu.arena().owner("policy", Kind::Packed);
    let (codes, page) = ((rows * cols) as u64, 4096u64);
    for (format, bytes, scales) in [
        (WeightFormat::F32, 4, 0u64),
        (WeightFormat::Bf16, 2, 0),
        (WeightFormat::Fp8Channel, 1, 4 * rows as u64),
        (WeightFormat::Fp8Block, 1, 4 * 8 * 4),
        // The scales lie in the panels: 4 KiB more take the arena's next size class.
        (WeightFormat::Int8, 1, 65_536),
    ] {
        let pack = Pack::whole(Product::Transposed, &source);
        let packed = cpu.pack(owner, &source, pack, format, 1).unwrap();
        let held = cpu.arena().held_by(Kind::Packed);
        assert_eq!(held, bytes * codes + scales.next_multiple_of(page), "{format:?}");
        drop(packed);
        cpu.arena().trim();
    }
}

/// A matrix times a row.
fn times(matrix: &[f64], row: &[f64]) -> Vec<f64> {
    matrix.chunks(row.len()).map(|line| inner(line, row)).collect()
}

/// Three heads of a layer whose keys and values are made of a latent, and one row's queries.
struct Layer {
    w_uk: Vec<f64>,
    w_uv: Vec<f64>,
    q_nope: Vec<f64>,
    q_rope: Vec<f64>,
}

const HEADS: usize = 3;
const NOPE: usize = 16;
const ROPE: usize = 8;
const VALUE: usize = 12;
const LATENT: usize = 40;
const TOKENS: usize = 37;

impl Layer {
    fn shape() -> AttentionShape {
        AttentionShape {
            heads: HEADS,
            sharing: HEADS,
            key_width: LATENT,
            rope_width: ROPE,
            value_width: LATENT,
            head_stride: 0,
            value_offset: 0,
            scale: 0.2,
        }
    }

    /// Per head q W_UK, then its rope part.
    fn absorbed(&self) -> Vec<f64> {
        let mut q = Vec::new();
        for head in 0..HEADS {
            let w = |i: usize, col: usize| self.w_uk[(head * NOPE + i) * LATENT + col];
            let sum = |col| (0..NOPE).map(|i| self.q_nope[head * NOPE + i] * w(i, col)).sum();
            q.extend((0..LATENT).map(sum).collect::<Vec<f64>>());
            q.extend(&self.q_rope[head * ROPE..][..ROPE]);
        }
        q
    }

    fn w_uv(&self, head: usize) -> &[f64] {
        &self.w_uv[head * VALUE * LATENT..][..VALUE * LATENT]
    }

    /// A head's output over all rows `[latent | rope key]`: each key and value is made, as the definition says.
    fn naive(&self, head: usize, rows: &[f64]) -> Vec<f64> {
        let w_uk = &self.w_uk[head * NOPE * LATENT..][..NOPE * LATENT];
        let exp = |row: &[f64]| {
            let (latent, rope) = row.split_at(LATENT);
            let key = inner(&self.q_nope[head * NOPE..][..NOPE], &times(w_uk, latent));
            (0.2 * (key + inner(&self.q_rope[head * ROPE..][..ROPE], rope))).exp()
        };
        let weights: Vec<f64> = rows.chunks(LATENT + ROPE).map(exp).collect();
        let sum: f64 = weights.iter().sum();
        let mut output = vec![0.0; VALUE];
        for (row, weight) in rows.chunks(LATENT + ROPE).zip(weights) {
            let values = times(self.w_uv(head), &row[..LATENT]);
            output.iter_mut().zip(values).for_each(|(o, v)| *o += weight / sum * v);
        }
        output
    }
}

#[test]
fn absorbed_attention_to_every_cache_equals_naive_attention_to_what_is_read_from_it() {
    let layer = Layer {
        w_uk: normals(1, HEADS * NOPE * LATENT),
        w_uv: normals(2, HEADS * VALUE * LATENT),
        q_nope: normals(3, HEADS * NOPE),
        q_rope: normals(4, HEADS * ROPE),
    };
    on_each(|bench| {
        for format in CacheFormat::ALL {
            let layout = CacheLayout { format, latent: LATENT, rope: ROPE };
            let channels = bench.random(5, 1, LATENT);
            let spec = CacheSpec { layout, channels: Some(&channels) };
            let numbers: Vec<u32> = (0..TOKENS as u32).map(|t| t * 11 % TOKENS as u32).collect();
            let slots = bench.indices(TOKENS, 1, &numbers);
            let mut cache = bench.cache(&layout, TOKENS);
            let (latent, rope) = (bench.random(6, TOKENS, LATENT), bench.random(7, TOKENS, ROPE));
            bench.kernels.write_cache(&spec, &latent, &rope, &slots, &mut cache);
            let mut rows = bench.unset(TOKENS, LATENT + ROPE);
            bench.kernels.read_cache(&spec, &cache, &slots, &mut rows);
            let rows = bench.read(&rows);

            let batch = DecodeBatch {
                tables: &bench.indices(1, TOKENS, &numbers),
                sequence: &bench.indices(1, 1, &[0]),
                length: &bench.indices(1, 1, &[TOKENS as u32]),
                page_tokens: 1,
            };
            let q = layer.absorbed();
            let (q, mut z) = (bench.floats(1, q.len(), &q), bench.unset(1, HEADS * LATENT));
            bench.kernels.mla_decode(&Layer::shape(), &q, &spec, &cache, &batch, &mut z).unwrap();
            let z = bench.read(&z);
            for head in 0..HEADS {
                let found = times(layer.w_uv(head), &z[head * LATENT..][..LATENT]);
                check_close(
                    &format!("{format:?}, {head}"),
                    &found,
                    &layer.naive(head, &rows),
                    1e-3,
                );
            }
        }
    });
}

#[test]
fn one_more_token_takes_the_bytes_of_its_format_from_the_allocator() {
    let cpu = CpuKernels::new(1, Arena::new(None));
    let owner = cpu.arena().owner("policy", Kind::Cache);
    // DeepSeek-V2's widths; 4096 tokens fill whole pages of the arena in every format.
    for (format, bytes) in CacheFormat::ALL.into_iter().zip([2304, 1152, 648, 430]) {
        let layout = CacheLayout { format, latent: 512, rope: 64 };
        let held = |tokens| {
            let (dtype, cols) = cpu.cache_shape(&layout);
            let _cache = cpu.arena().buffer(owner, dtype, tokens, cols).unwrap();
            cpu.arena().held_by(Kind::Cache)
        };
        assert_eq!(held(8192) - held(4096), 4096 * bytes, "{format:?}");
    }
}
