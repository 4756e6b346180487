//! Tests of products and row-wise operations: against `ReferenceKernels`, and bit against bit.
//!
//! A job is a function of kernels and of made-up numbers. It runs on the reference, and on the CPU with
//! every instruction set of this processor and with 1, 2 and 4 threads. All CPU results must be equal to
//! the bit, and close to the reference. Matrices lie inside wider buffers, which are compared whole, so
//! that a read or a write beside a view shows.

use super::Isa;
use crate::arena::Arena;
use crate::buffer::{Buffer, DType, View, ViewMut};
use crate::cpu::CpuKernels;
use crate::format::WeightFormat;
use crate::kernels::{
    AdamW, AttentionShape, HeadColumns, Kernels, Pack, Packed, Pairing, Product, RopeTable, Store,
};
use crate::random::{Draws, Stream};
use crate::reference::ReferenceKernels;
use crate::routing::Routes;

/// What stands beside a view: a sum that takes it in is far off any tolerance.
const BESIDE: f64 = 1_048_576.0;

/// A job's draws: the same for every device.
struct Made(Draws);

impl Made {
    fn new(seed: u64, case: u64) -> Made {
        Made(Draws::new(seed, Stream::Data, [case, 0, 0]))
    }

    /// From 1 to `most`.
    fn size(&mut self, most: u64) -> usize {
        self.0.below(most) as usize + 1
    }

    /// In [-1, 1), exact in f32, so that all devices get the same number.
    fn number(&mut self) -> f64 {
        self.0.below(1 << 20) as f64 / f64::from(1 << 19) - 1.0
    }

    fn store(&mut self) -> Store {
        if self.size(2) == 1 { Store::Set } else { Store::Add }
    }

    fn product(&mut self) -> Product {
        if self.size(2) == 1 { Product::Transposed } else { Product::Plain }
    }
}

/// A matrix inside a wider buffer.
struct Inner {
    whole: Buffer,
    first: usize,
    cols: usize,
}

impl Inner {
    fn new(kernels: &dyn Kernels, made: &mut Made, rows: usize, cols: usize) -> Inner {
        // One in three lies close, without gaps between its rows.
        let (first, after) = match made.size(3) {
            1 => (0, 0),
            _ => (made.size(4) - 1, made.size(20)),
        };
        let width = first + cols + after;
        let mut numbers = vec![BESIDE; rows * width];
        for row in numbers.chunks_mut(width) {
            row[first..][..cols].fill_with(|| made.number());
        }
        let dtype = kernels.float();
        let mut whole = kernels.arena().buffer(kernels.scratch(), dtype, rows, width).unwrap();
        kernels.upload_f64(&numbers, &mut whole);
        Inner { whole, first, cols }
    }

    fn get(&self) -> View<'_> {
        self.whole.cols_of(self.first..self.first + self.cols)
    }

    fn set(&mut self) -> ViewMut<'_> {
        self.whole.cols_of_mut(self.first..self.first + self.cols)
    }
}

fn indices(kernels: &dyn Kernels, cols: usize, numbers: &[u32]) -> Buffer {
    let rows = numbers.len() / cols;
    let mut buffer = kernels.arena().buffer(kernels.scratch(), DType::U32, rows, cols).unwrap();
    kernels.upload_indices(numbers, &mut buffer);
    buffer
}

/// A weight packed in a format that the job draws.
fn packed(kernels: &dyn Kernels, made: &mut Made, weight: &Buffer, pack: Pack) -> Packed {
    let format = WeightFormat::ALL[made.size(5) - 1];
    kernels.pack(kernels.scratch(), weight, pack, format, 3).unwrap()
}

type Job = fn(&dyn Kernels, &mut Made) -> Vec<f64>;

/// Runs `cases` cases of a job on all devices; see the head of the file.
fn check(name: &str, cases: u64, tolerance: f64, job: Job) {
    let variants: Vec<CpuKernels> = Isa::available()
        .into_iter()
        .flat_map(|isa| [1, 2, 4].map(|n| CpuKernels::with_isa(isa, n, Arena::new(None))))
        .collect();
    let reference = ReferenceKernels::new(Arena::new(None));
    for case in 0..cases {
        let made = || Made::new(11, case);
        let expected = job(&reference, &mut made());
        let first = job(&variants[0], &mut made());
        compare(&format!("{name} case {case}"), &first, &expected, tolerance);
        for other in &variants[1..] {
            let found = job(other, &mut made());
            let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let who = format!("{} with {} threads", other.name(), other.threads());
            assert!(bits(&found) == bits(&first), "{name} case {case}: {who} has other bits");
        }
    }
}

fn compare(name: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let error = |i: usize| (found[i] - expected[i]).abs() / (1.0 + expected[i].abs());
    let worst = (0..found.len()).max_by(|i, j| error(*i).total_cmp(&error(*j))).unwrap();
    let (got, want) = (found[worst], expected[worst]);
    assert!(error(worst) <= tolerance, "{name}: element {worst} is {got:e}, reference {want:e}");
}

/// Sizes around tiles, panels and blocks; in one case of four large enough for several threads.
fn shape(made: &mut Made) -> [usize; 3] {
    match made.size(4) {
        1 => [made.size(6), made.size(200), made.size(700)],
        2 => [made.size(150), made.size(300), made.size(100)],
        _ => [made.size(70), made.size(80), made.size(90)],
    }
}

#[test]
fn linear_layers_agree_with_the_reference() {
    check("linear", 60, 3e-5, |kernels, made| {
        let [m, n, k] = shape(made);
        let (product, store) = (made.product(), made.store());
        let weight = match product {
            Product::Transposed => Inner::new(kernels, made, n, k),
            Product::Plain => Inner::new(kernels, made, k, n),
        };
        let x = Inner::new(kernels, made, m, k);
        let mut y = Inner::new(kernels, made, m, n);
        let packed = packed(kernels, made, &weight.get(), Pack::whole(product, &weight.get()));
        assert_eq!((packed.inputs, packed.outputs, packed.version), (k, n, 3));
        kernels.linear(&x.get(), &packed, &mut y.set(), store);
        kernels.download_f64(&y.whole)
    });
}

#[test]
fn weight_gradients_agree_with_the_reference() {
    check("linear_backward_weight", 60, 3e-5, |kernels, made| {
        let [n, k, m] = shape(made);
        let dy = Inner::new(kernels, made, m, n);
        let x = Inner::new(kernels, made, m, k);
        let mut dw = Inner::new(kernels, made, n, k);
        kernels.linear_backward_weight(&dy.get(), &x.get(), &mut dw.set());
        kernels.download_f64(&dw.whole)
    });
}

#[test]
fn head_products_and_their_gradients_agree_with_the_reference() {
    check("linear_heads", 60, 3e-5, |kernels, made| {
        let (heads, m) = (made.size(6), made.size(90));
        let (product, store) = (made.product(), made.store());
        let (rows, cols) = (made.size(50), made.size(50));
        let (inputs, outputs) = match product {
            Product::Transposed => (cols, rows),
            Product::Plain => (rows, cols),
        };
        let (group_stride, first_row) = (rows + made.size(9) - 1, made.size(5) - 1);
        let pack = Pack { product, groups: heads, group_stride, first_row, rows };
        let columns = HeadColumns {
            input_first: made.size(5) - 1,
            // A stride of 0 lets all heads read the same columns.
            input_stride: (inputs + made.size(9) - 1) * (made.size(4) - 1).min(1),
            output_first: made.size(5) - 1,
            output_stride: outputs + made.size(9) - 1,
        };
        let weight_rows = first_row + (heads - 1) * group_stride + rows;
        let x_cols = columns.input_first + (heads - 1) * columns.input_stride + inputs;
        let y_cols = columns.output_first + (heads - 1) * columns.output_stride + outputs;
        let weight = Inner::new(kernels, made, weight_rows, cols);
        let x = Inner::new(kernels, made, m, x_cols);
        let mut y = Inner::new(kernels, made, m, y_cols);
        let mut dw = Inner::new(kernels, made, weight_rows, cols);
        kernels.linear_heads_backward_weight(&y.get(), &x.get(), columns, pack, &mut dw.set());
        let packed = packed(kernels, made, &weight.get(), pack);
        kernels.linear_heads(&x.get(), &packed, columns, &mut y.set(), store);
        let mut all = kernels.download_f64(&y.whole);
        all.extend(kernels.download_f64(&dw.whole));
        all
    });
}

/// Routes of `tokens` tokens to 2 of `experts` experts; about a third of the experts stays idle.
fn routes(kernels: &dyn Kernels, made: &mut Made, tokens: usize, experts: usize) -> Routes {
    let busy: Vec<u32> = (0..experts as u32).filter(|e| e % 3 != 1).collect();
    let mut chosen = Vec::new();
    for _ in 0..tokens {
        let first = made.size(busy.len() as u64) - 1;
        chosen.extend([busy[first], busy[(first + 1) % busy.len()]]);
    }
    kernels.routes(&indices(kernels, 2, &chosen), experts).unwrap()
}

#[test]
fn expert_products_and_their_gradients_agree_with_the_reference() {
    check("linear_experts", 40, 3e-5, |kernels, made| {
        let (tokens, experts) = (made.size(150), made.size(9) + 2);
        let (n, k) = (made.size(60), made.size(60));
        let routes = routes(kernels, made, tokens, experts);
        let x = Inner::new(kernels, made, 2 * tokens, k);
        let weight = Inner::new(kernels, made, experts * n, k);
        let packed_weight = packed(
            kernels,
            made,
            &weight.get(),
            Pack::blocks(Product::Transposed, &weight.get(), experts),
        );
        let mut y = Inner::new(kernels, made, 2 * tokens, n);
        kernels.linear_experts(&x.get(), &packed_weight, &routes, &mut y.set());
        let plain = packed(
            kernels,
            made,
            &weight.get(),
            Pack::blocks(Product::Plain, &weight.get(), experts),
        );
        let dy = Inner::new(kernels, made, 2 * tokens, n);
        let mut dx = Inner::new(kernels, made, 2 * tokens, k);
        kernels.linear_experts(&dy.get(), &plain, &routes, &mut dx.set());
        let mut dw = Inner::new(kernels, made, experts * n, k);
        kernels.linear_experts_backward_weight(&dy.get(), &x.get(), &routes, &mut dw.set());
        [&y, &dx, &dw].map(|b| kernels.download_f64(&b.whole)).concat()
    });
}

#[test]
fn norms_and_their_gradients_agree_with_the_reference() {
    check("rms_norm", 40, 1e-5, |kernels, made| {
        let (rows, cols, store) = (made.size(200), made.size(300), made.store());
        let x = Inner::new(kernels, made, rows, cols);
        let weight = Inner::new(kernels, made, 1, cols);
        let mut y = Inner::new(kernels, made, rows, cols);
        let mut inverse = Inner::new(kernels, made, rows, 1);
        kernels.rms_norm(&x.get(), &weight.get(), 1e-3, &mut y.set(), &mut inverse.set());
        let dy = Inner::new(kernels, made, rows, cols);
        let mut dx = Inner::new(kernels, made, rows, cols);
        let (w, inv) = (weight.get(), inverse.get());
        kernels.rms_norm_backward_input(&dy.get(), &x.get(), &w, &inv, &mut dx.set(), store);
        let mut dw = Inner::new(kernels, made, 1, cols);
        kernels.rms_norm_backward_weight(&dy.get(), &x.get(), &inv, &mut dw.set());
        [&y, &inverse, &dx, &dw].map(|b| kernels.download_f64(&b.whole)).concat()
    });
}

#[test]
fn rotations_agree_with_the_reference_and_the_inverse_undoes_them() {
    check("rope", 40, 1e-6, |kernels, made| {
        let (rows, heads, half) = (made.size(200), made.size(5), made.size(20));
        let (first, stride) = (made.size(7) - 1, 2 * half + made.size(9) - 1);
        let (sin, cos) =
            (0..50 * half).map(|i| (i as f64 * 0.37).sin_cos()).unzip::<_, _, Vec<_>, Vec<_>>();
        let buffer = |numbers: &[f64]| {
            let mut table =
                kernels.arena().buffer(kernels.scratch(), kernels.float(), 50, half).unwrap();
            kernels.upload_f64(numbers, &mut table);
            table
        };
        let pairing = [Pairing::Interleaved, Pairing::Halves][made.size(2) - 1];
        let table = RopeTable { pairing, cos: buffer(&cos), sin: buffer(&sin) };
        let positions: Vec<u32> = (0..rows).map(|_| made.size(50) as u32 - 1).collect();
        let positions = indices(kernels, 1, &positions);
        let mut x = Inner::new(kernels, made, rows, first + heads * stride);
        let before = kernels.download_f64(&x.whole);
        kernels.rope(&mut x.set(), &positions, &table, heads, first, stride, false);
        let mut all = kernels.download_f64(&x.whole);
        kernels.rope(&mut x.set(), &positions, &table, heads, first, stride, true);
        let after = kernels.download_f64(&x.whole);
        compare("back again", &after, &before, 1e-6);
        all.extend(after);
        all
    });
}

#[test]
fn gates_and_their_gradients_agree_with_the_reference() {
    check("swiglu", 40, 2e-6, |kernels, made| {
        let (rows, width) = (made.size(100), made.size(200));
        let mut gate_up = Inner::new(kernels, made, rows, 2 * width);
        // Far into both tails of the sigmoid.
        for _ in 0..made.size(7) - 1 {
            let copy = Inner { whole: duplicate(kernels, &gate_up.whole), ..gate_up };
            kernels.add(&copy.get(), &mut gate_up.set());
        }
        let dy = Inner::new(kernels, made, rows, width);
        let mut y = Inner::new(kernels, made, rows, width);
        let mut d_gate_up = Inner::new(kernels, made, rows, 2 * width);
        kernels.swiglu(&gate_up.get(), &mut y.set());
        kernels.swiglu_backward(&dy.get(), &gate_up.get(), &mut d_gate_up.set());
        [&y, &d_gate_up].map(|b| kernels.download_f64(&b.whole)).concat()
    });
}

fn duplicate(kernels: &dyn Kernels, src: &Buffer) -> Buffer {
    let (arena, owner) = (kernels.arena(), kernels.scratch());
    let mut copy = arena.buffer(owner, src.dtype(), src.rows(), src.cols()).unwrap();
    kernels.copy(src, &mut copy);
    copy
}

#[test]
fn attention_to_ranges_of_a_prompt_agrees_with_the_reference() {
    check("mla_prefill", 40, 1e-5, |kernels, made| {
        let (groups, sharing, key_width, value_width) =
            (made.size(4), made.size(2), made.size(20), made.size(20));
        let (rope_width, heads) = (made.size(9), groups * sharing);
        let shape = AttentionShape {
            heads,
            sharing,
            key_width,
            rope_width,
            value_width,
            head_stride: key_width + value_width + made.size(4) - 1,
            value_offset: key_width,
            scale: 0.5,
        };
        let (rows, tokens) = (made.size(80), made.size(200));
        let q = Inner::new(kernels, made, rows, heads * shape.query_width());
        let mut o = Inner::new(kernels, made, rows, heads * value_width);
        let mut lse = Inner::new(kernels, made, rows, heads);
        let lengths: Vec<u32> = (0..rows).map(|_| made.size(tokens as u64) as u32).collect();
        let length = indices(kernels, 1, &lengths);
        let mut first = 0;
        while first < tokens {
            let count = made.size((tokens - first) as u64);
            let kv = Inner::new(kernels, made, count, groups * shape.head_stride);
            let k_rope = Inner::new(kernels, made, count, rope_width);
            let store = if first == 0 { Store::Set } else { Store::Add };
            let (q, kv, k_rope) = (q.get(), kv.get(), k_rope.get());
            let (mut o, mut lse) = (o.set(), lse.set());
            kernels
                .mla_prefill(&shape, &q, &kv, &k_rope, first, &length, &mut o, &mut lse, store)
                .unwrap();
            first += count;
        }
        [&o, &lse].map(|b| kernels.download_f64(&b.whole)).concat()
    });
}

#[test]
fn movement_agrees_with_the_reference() {
    check("rows", 40, 1e-6, |kernels, made| {
        let (rows, cols, count) = (made.size(300), made.size(150), made.size(300));
        let mut table = Inner::new(kernels, made, rows, cols);
        let mut taken = Inner::new(kernels, made, count, cols);
        let any: Vec<u32> = (0..count).map(|_| made.size(rows as u64) as u32 - 1).collect();
        let index = indices(kernels, 1, &any);
        let scatter = Inner::new(kernels, made, count, cols);
        kernels.scatter_add_rows(&scatter.get(), &index, &mut table.set());
        kernels.gather_rows(&table.get(), &index, &mut taken.set());
        let mut distinct: Vec<u32> = (0..rows as u32).collect();
        made.0.shuffle(&mut distinct);
        distinct.truncate(count.min(rows));
        let few = Inner::new(kernels, made, distinct.len(), cols);
        kernels.scatter_rows(&few.get(), &indices(kernels, 1, &distinct), &mut table.set());
        let mut filled = Inner::new(kernels, made, count, cols);
        kernels.fill(&mut filled.set(), 0.75);
        kernels.add(&taken.get(), &mut filled.set());
        kernels.scale(&filled.get(), 1.3, &mut taken.set());
        // Bytes go out and come back as they are, whatever lies between the rows.
        let bytes = kernels.download_bytes(&taken.get());
        assert_eq!(bytes.len(), taken.get().len() * kernels.float().size());
        kernels.fill(&mut taken.set(), 0.0);
        kernels.upload_bytes(&bytes, &mut taken.set());
        let mut order = duplicate(kernels, &index);
        kernels.fill(&mut order.rows_of_mut(0..1), 7.0);
        let order = kernels.download_indices(&order).into_iter().map(f64::from).collect();
        let floats = [&table, &taken, &filled].map(|b| kernels.download_f64(&b.whole)).concat();
        [floats, order].concat()
    });
}

#[test]
fn updates_and_squared_sums_agree_with_the_reference() {
    check("adamw", 20, 3e-6, |kernels, made| {
        let (rows, cols) = (made.size(40), made.size(3000));
        let mut inner = || Inner::new(kernels, made, rows, cols);
        let (g, mut w, mut m, mut v) = (inner(), inner(), inner(), inner());
        kernels.fill(&mut m.set(), 0.0);
        kernels.fill(&mut v.set(), 0.0);
        let mut all = Vec::new();
        for step in 1..4 {
            let update = AdamW {
                learning_rate: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.1,
                gradient_scale: 0.5,
                step,
            };
            kernels.adamw(&update, &g.get(), &mut w.set(), &mut m.set(), &mut v.set());
            all.extend([&w, &m, &v].map(|b| kernels.download_f64(&b.whole)).concat());
        }
        // Sums of the gradient's round numbers would be exact in any order; the second moment's are not.
        all.push(kernels.squared_sum(&v.get()) / (rows * cols) as f64);
        all
    });
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    for isa in Isa::available() {
        let kernels = CpuKernels::with_isa(isa, 2, Arena::new(None));
        let made = &mut Made::new(5, 0);
        for [m, n, k] in [[64, 96, 128], [70, 33, 300], [13, 200, 520]] {
            let weight = Inner::new(&kernels, made, n, k);
            let whole = Pack::whole(Product::Transposed, &weight.get());
            let packed = packed(&kernels, made, &weight.get(), whole);
            let x = Inner::new(&kernels, made, m, k);
            let mut together = Inner::new(&kernels, made, m, n);
            kernels.linear(&x.get(), &packed, &mut together.set(), Store::Set);
            let mut alone = Inner::new(&kernels, made, m, n);
            for row in 0..m {
                let (x, mut y) = (x.get(), alone.set());
                kernels.linear(
                    &x.rows_of(row..row + 1),
                    &packed,
                    &mut y.rows_of_mut(row..row + 1),
                    Store::Set,
                );
            }
            assert_eq!(
                kernels.download(&together.get()),
                kernels.download(&alone.get()),
                "{isa:?} {m}"
            );
        }
    }
}

#[test]
fn a_batch_in_pieces_gives_the_same_gradient_bits() {
    for isa in Isa::available() {
        let kernels = CpuKernels::with_isa(isa, 2, Arena::new(None));
        let made = &mut Made::new(6, 0);
        let (m, n, k) = (530, 70, 90);
        let (dy, x) = (Inner::new(&kernels, made, m, n), Inner::new(&kernels, made, m, k));
        let mut whole = Inner::new(&kernels, made, n, k);
        let mut pieces = Inner { whole: duplicate(&kernels, &whole.whole), ..whole };
        kernels.linear_backward_weight(&dy.get(), &x.get(), &mut whole.set());
        for range in [0..1, 1..40, 40..300, 300..530] {
            let (dy, x) = (dy.get(), x.get());
            kernels.linear_backward_weight(
                &dy.rows_of(range.clone()),
                &x.rows_of(range),
                &mut pieces.set(),
            );
        }
        assert_eq!(kernels.download(&whole.get()), kernels.download(&pieces.get()), "{isa:?}");
    }
}
