//! Gradients of the products: plain, per head in both directions, per expert.

use super::on_reference;
use crate::bench::{Bench, check_close, check_gradients, inner, normals};
use rehearsal_kernels::{Buffer, HeadColumns, Pack, Product, Routes, Store};

const T: usize = 5;

#[test]
fn linear_has_its_input_gradient_in_the_plain_product() {
    on_reference(|bench| {
        let (n, k) = (4, 6);
        let (inputs, r) = ([normals(1, T * k), normals(2, n * k)], normals(3, T * n));
        let loss = |inputs: &[Vec<f64>]| {
            let weight = bench.pack(Product::Transposed, &bench.floats(n, k, &inputs[1]), 1);
            let mut y = bench.unset(T, n);
            bench.kernels.linear(&bench.floats(T, k, &inputs[0]), &weight, &mut y, Store::Set);
            inner(&r, &bench.read(&y))
        };
        let (dy, x) = (bench.floats(T, n, &r), bench.floats(T, k, &inputs[0]));
        let plain = bench.pack(Product::Plain, &bench.floats(n, k, &inputs[1]), 1);
        let (mut dx, mut dw) = (bench.unset(T, k), bench.filled(n, k, 0.0));
        bench.kernels.linear(&dy, &plain, &mut dx, Store::Set);
        bench.kernels.linear_backward_weight(&dy, &x, &mut dw);
        check_gradients("linear", &inputs, &[bench.read(&dx), bench.read(&dw)], loss);

        let once = bench.read(&dx);
        bench.kernels.linear(&dy, &plain, &mut dx, Store::Add);
        let twice: Vec<f64> = once.iter().map(|d| 2.0 * d).collect();
        check_close("linear, added", &bench.read(&dx), &twice, 1e-14);
    });
}

/// Three heads of 2 + 3 rows; the product takes the last 3 rows of each head, and the blocks of x and
/// y lie apart, with columns between them that no head owns.
struct Heads {
    product: Product,
    inputs: usize,
    outputs: usize,
}

const HEADS: usize = 3;
const WIDTH: usize = 4;

impl Heads {
    fn new(product: Product) -> Heads {
        let (inputs, outputs) =
            if product == Product::Transposed { (WIDTH, 3) } else { (3, WIDTH) };
        Heads { product, inputs, outputs }
    }

    fn columns(&self) -> HeadColumns {
        HeadColumns {
            input_first: 1,
            input_stride: self.inputs + 2,
            output_first: 2,
            output_stride: self.outputs + 1,
        }
    }

    fn x_cols(&self) -> usize {
        1 + HEADS * (self.inputs + 2)
    }

    fn y_cols(&self) -> usize {
        2 + HEADS * (self.outputs + 1)
    }

    fn pack(&self, product: Product) -> Pack {
        Pack { product, groups: HEADS, group_stride: 5, first_row: 2, rows: 3 }
    }

    fn forward(&self, bench: &Bench<'_>, inputs: &[Vec<f64>]) -> Buffer {
        let x = bench.floats(T, self.x_cols(), &inputs[0]);
        let weight = bench.floats(HEADS * 5, WIDTH, &inputs[1]);
        let weight = bench.packed(&weight, self.pack(self.product));
        let mut y = bench.filled(T, self.y_cols(), 0.5);
        bench.kernels.linear_heads(&x, &weight, self.columns(), &mut y, Store::Set);
        y
    }
}

fn check_heads(bench: &Bench<'_>, product: Product) {
    let heads = Heads::new(product);
    let inputs = [normals(1, T * heads.x_cols()), normals(2, HEADS * 5 * WIDTH)];
    let r = normals(3, T * heads.y_cols());
    let (dy, x) =
        (bench.floats(T, heads.y_cols(), &r), bench.floats(T, heads.x_cols(), &inputs[0]));
    let other = if product == Product::Plain { Product::Transposed } else { Product::Plain };
    let back = bench.packed(&bench.floats(HEADS * 5, WIDTH, &inputs[1]), heads.pack(other));
    let columns = heads.columns();
    let turned = HeadColumns {
        input_first: columns.output_first,
        input_stride: columns.output_stride,
        output_first: columns.input_first,
        output_stride: columns.input_stride,
    };
    let (mut dx, mut dw) =
        (bench.filled(T, heads.x_cols(), 0.0), bench.filled(HEADS * 5, WIDTH, 0.0));
    let k = bench.kernels;
    k.linear_heads(&dy, &back, turned, &mut dx, Store::Set);
    k.linear_heads_backward_weight(&dy, &x, columns, heads.pack(product), &mut dw);
    let gradients = [bench.read(&dx), bench.read(&dw)];
    check_gradients("linear_heads", &inputs, &gradients, |inputs| {
        inner(&r, &bench.read(&heads.forward(bench, inputs)))
    });
}

#[test]
fn a_product_per_head_has_its_gradients_in_both_directions() {
    on_reference(|bench| {
        check_heads(bench, Product::Transposed);
        check_heads(bench, Product::Plain);
    });
}

#[test]
fn linear_experts_has_its_gradients_and_idle_experts_get_none() {
    on_reference(|bench| {
        let (experts, n, k) = (4, 3, 5);
        // Expert 2 has no token.
        let chosen = bench.indices(T, 2, &[0, 3, 1, 0, 3, 1, 0, 1, 3, 0]);
        let routes: Routes = bench.kernels.routes(&chosen, experts).unwrap();
        let inputs = [normals(1, 2 * T * k), normals(2, experts * n * k)];
        let r = normals(3, 2 * T * n);
        let loss = |inputs: &[Vec<f64>]| {
            let weight = bench.floats(experts * n, k, &inputs[1]);
            let weight = bench.pack(Product::Transposed, &weight, experts);
            let (x, mut y) = (bench.floats(2 * T, k, &inputs[0]), bench.unset(2 * T, n));
            bench.kernels.linear_experts(&x, &weight, &routes, &mut y);
            inner(&r, &bench.read(&y))
        };
        let (dy, x) = (bench.floats(2 * T, n, &r), bench.floats(2 * T, k, &inputs[0]));
        let weight = bench.floats(experts * n, k, &inputs[1]);
        let plain = bench.pack(Product::Plain, &weight, experts);
        let (mut dx, mut dw) = (bench.unset(2 * T, k), bench.filled(experts * n, k, 0.0));
        bench.kernels.linear_experts(&dy, &plain, &routes, &mut dx);
        bench.kernels.linear_experts_backward_weight(&dy, &x, &routes, &mut dw);
        let dw = bench.read(&dw);
        assert!(
            dw[2 * n * k..3 * n * k].iter().all(|d| *d == 0.0),
            "an idle expert got a gradient"
        );
        check_gradients("linear_experts", &inputs, &[bench.read(&dx), dw], loss);
    });
}
