//! Routes: which slot of the experts' batch each (token, choice) pair has, and the sums over slots.
//!
//! Knows no products; between `routes` and `combine` the experts work on rows in slot order, so
//! that the rows of one expert lie together.
//!
//! Invariants:
//!   * slot order is expert, then token, then choice: one order for any number of threads
//!   * each (token, choice) pair that was not dropped has exactly one slot, and each slot one pair
//!   * a dropped pair has no slot, adds nothing to a sum and gets a weight's gradient of 0
//!   * an expert that nobody chose has an empty range

use super::Cx;
use super::lanes::{self, Lanes, OnLanes};
use super::work::split;
use crate::buffer::{Buffer, DType, Mat, MatMut};
use crate::kernels::Result;
use crate::routing::{DROPPED, RouteCounts, Routes};
use std::ops::Range;

/// Operations that one added element counts as: its row is one of many.
const COST: usize = 12;

/// See [`Kernels::routes`](crate::Kernels::routes).
pub(crate) fn routes(cx: &Cx, experts: &Buffer, count: usize) -> Result<Routes> {
    let (rows, choices) = (experts.rows(), experts.cols());
    let experts = experts.host::<u32>();
    let mut next = cx.arena.buffer(cx.scratch, DType::U32, 1, count + 1)?;
    let mut next = next.host_mut::<u32>();
    let next = next.row_mut(0);
    starts(experts, next);
    let mut routes = Routes {
        experts: count,
        offsets: cx.arena.buffer(cx.scratch, DType::U32, count + 1, 1)?,
        token: cx.arena.buffer(cx.scratch, DType::U32, next[count] as usize, 1)?,
        slot: cx.arena.buffer(cx.scratch, DType::U32, rows, choices)?,
    };
    let mut offsets = routes.offsets.host_mut::<u32>();
    for (expert, start) in next.iter().enumerate() {
        offsets.row_mut(expert)[0] = *start;
    }
    let (mut token, mut slot) = (routes.token.host_mut::<u32>(), routes.slot.host_mut::<u32>());
    for row in 0..rows {
        for (choice, &expert) in experts.row(row).iter().enumerate() {
            if expert == DROPPED {
                slot.row_mut(row)[choice] = DROPPED;
                continue;
            }
            let free = next[expert as usize];
            next[expert as usize] += 1;
            token.row_mut(free as usize)[0] = row as u32;
            slot.row_mut(row)[choice] = free;
        }
    }
    Ok(routes)
}

/// First slot of each expert, and the total.
fn starts(experts: Mat<'_, u32>, starts: &mut [u32]) {
    let count = starts.len() - 1;
    starts.fill(0);
    for row in 0..experts.rows {
        for &expert in experts.row(row).iter().filter(|expert| **expert != DROPPED) {
            assert!((expert as usize) < count, "routes: expert {expert} of {count}");
            starts[expert as usize + 1] += 1;
        }
    }
    for expert in 0..count {
        starts[expert + 1] += starts[expert];
    }
}

/// See [`Kernels::count_routes`](crate::Kernels::count_routes).
pub(crate) fn count_routes(_cx: &Cx, experts: &Buffer, count: usize, groups: usize) -> RouteCounts {
    assert!(
        groups >= 1 && count.is_multiple_of(groups),
        "routes: {count} experts, {groups} groups"
    );
    let experts = experts.host::<u32>();
    let mut counts = RouteCounts { experts: vec![0; count], devices: 0 };
    // The last token, from 1, that went to each group.
    let mut last = vec![0; groups];
    for row in 0..experts.rows {
        for &expert in experts.row(row) {
            counts.experts[expert as usize] += 1;
            let group = &mut last[expert as usize / (count / groups)];
            counts.devices += u64::from(*group != row + 1);
            *group = row + 1;
        }
    }
    counts
}

/// See [`Kernels::combine`](crate::Kernels::combine).
pub(crate) fn combine(cx: &Cx, x: &Buffer, routes: &Routes, weights: &Buffer, y: &mut Buffer) {
    check(x, routes, y);
    check_weights(routes, weights);
    let cost = COST * y.cols() * routes.slot.cols();
    let (x, slot, weights) = (x.host(), routes.slot.host(), weights.host());
    let y = y.host_mut();
    split(cx, y.rows, 1, cost, &|rows| {
        // SAFETY: a row belongs to one piece, and `isa` was detected.
        unsafe { cx.isa.run(Combine { x, slot, weights, y: &y, rows }) }
    });
}

struct Combine<'a> {
    x: Mat<'a, f32>,
    slot: Mat<'a, u32>,
    weights: Mat<'a, f32>,
    y: &'a MatMut<'a, f32>,
    rows: Range<usize>,
}

impl OnLanes for Combine<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for row in self.rows {
            // SAFETY: the rows of this job are its own.
            let y = unsafe { self.y.shared_row_mut(row) };
            for (&slot, &weight) in self.slot.row(row).iter().zip(self.weights.row(row)) {
                if slot == DROPPED {
                    continue;
                }
                for (y, x) in y.iter_mut().zip(self.x.row(slot as usize)) {
                    *y = weight.mul_add(*x, *y);
                }
            }
        }
    }
}

/// See [`Kernels::combine_backward`](crate::Kernels::combine_backward).
pub(crate) fn combine_backward(
    cx: &Cx,
    dy: &Buffer,
    x: &Buffer,
    routes: &Routes,
    weights: &Buffer,
    dx: &mut Buffer,
    d_weights: &mut Buffer,
) {
    check(x, routes, dy);
    check(dx, routes, dy);
    check_weights(routes, weights);
    check_weights(routes, d_weights);
    let cost = 3 * dy.cols() * routes.slot.cols();
    let (dy, x, slot, weights) = (dy.host(), x.host(), routes.slot.host(), weights.host());
    let (dx, d_weights) = (dx.host_mut(), d_weights.host_mut());
    split(cx, dy.rows, 1, cost, &|rows| {
        let job = CombineBackward { dy, x, slot, weights, dx: &dx, d_weights: &d_weights, rows };
        // SAFETY: a token belongs to one piece, a slot to one token, and `isa` was detected.
        unsafe { cx.isa.run(job) }
    });
}

struct CombineBackward<'a> {
    dy: Mat<'a, f32>,
    x: Mat<'a, f32>,
    slot: Mat<'a, u32>,
    weights: Mat<'a, f32>,
    dx: &'a MatMut<'a, f32>,
    d_weights: &'a MatMut<'a, f32>,
    rows: Range<usize>,
}

impl OnLanes for CombineBackward<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for row in self.rows {
            let dy = self.dy.row(row);
            for (choice, &slot) in self.slot.row(row).iter().enumerate() {
                if slot == DROPPED {
                    // SAFETY: the tokens of this job are its own.
                    unsafe { self.d_weights.shared_row_mut(row)[choice] = 0.0 };
                    continue;
                }
                let weight = self.weights.row(row)[choice];
                // SAFETY: the tokens of this job, and so their slots, are its own; the features are
                // on.
                unsafe {
                    let x = self.x.row(slot as usize);
                    self.d_weights.shared_row_mut(row)[choice] = lanes::dot::<L>(dy, x);
                    for (dx, dy) in self.dx.shared_row_mut(slot as usize).iter_mut().zip(dy) {
                        *dx = weight * dy;
                    }
                }
            }
        }
    }
}

/// See [`Kernels::sum_slots`](crate::Kernels::sum_slots).
pub(crate) fn sum_slots(cx: &Cx, x: &Buffer, routes: &Routes, y: &mut Buffer) {
    check(x, routes, y);
    let cost = y.cols() * routes.slot.cols();
    let (x, slot) = (x.host::<f32>(), routes.slot.host::<u32>());
    let y = y.host_mut::<f32>();
    split(cx, y.rows, 1, cost, &|rows| {
        for row in rows {
            // SAFETY: a row belongs to one piece.
            let y = unsafe { y.shared_row_mut(row) };
            for &slot in slot.row(row).iter().filter(|slot| **slot != DROPPED) {
                for (y, x) in y.iter_mut().zip(x.row(slot as usize)) {
                    *y += x;
                }
            }
        }
    });
}

fn check(x: &Buffer, routes: &Routes, y: &Buffer) {
    assert_eq!(x.rows(), routes.slots(), "routes: rows in slot order");
    assert_eq!((y.rows(), y.cols()), (routes.slot.rows(), x.cols()), "routes: rows in token order");
}

fn check_weights(routes: &Routes, weights: &Buffer) {
    let shape = (routes.slot.rows(), routes.slot.cols());
    assert_eq!((weights.rows(), weights.cols()), shape, "routes: one weight per choice");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Isa;
    use crate::ops::check::{cx, floats, indices, normal, read, with};

    #[test]
    fn slots_are_sorted_by_expert_then_token_and_idle_experts_are_empty() {
        let cx = cx(1);
        let routes = routes(&cx, &indices(&cx, 3, 2, &[3, 0, 0, 1, 3, 1]), 5).unwrap();
        let column =
            |b: &Buffer| (0..b.rows()).map(|row| b.host::<u32>().row(row)[0]).collect::<Vec<_>>();
        assert_eq!(column(&routes.offsets), [0, 2, 4, 4, 6, 6]);
        assert_eq!(column(&routes.token), [0, 1, 1, 2, 0, 2]);
        let slot = routes.slot.host::<u32>();
        assert_eq!([slot.row(0), slot.row(1), slot.row(2)], [[4, 0], [1, 2], [5, 3]]);
    }

    /// combine, d_x, d_weights and sum_slots of made-up rows; y starts at `start`.
    fn all(cx: &Cx, start: f32) -> [Vec<f32>; 4] {
        let (rows, choices, width) = (500, 3, 37);
        let experts: Vec<u32> = (0..rows as u32)
            .flat_map(|t| [t * 7 % 11, (t * 7 + 1) % 11, (t * 7 + 5) % 11])
            .collect();
        let routes = routes(cx, &indices(cx, rows, choices, &experts), 11).unwrap();
        let (x, weights, dy) = (
            normal(cx, rows * choices, width, 1),
            normal(cx, rows, choices, 2),
            normal(cx, rows, width, 3),
        );
        let filled = |rows, cols, value| floats(cx, rows, cols, &vec![value; rows * cols]);
        let (mut y, mut sum) = (filled(rows, width, start), filled(rows, width, start));
        let (mut dx, mut dw) =
            (filled(rows * choices, width, f32::NAN), filled(rows, choices, f32::NAN));
        combine(cx, &x, &routes, &weights, &mut y);
        combine_backward(cx, &dy, &x, &routes, &weights, &mut dx, &mut dw);
        sum_slots(cx, &x, &routes, &mut sum);
        let (x, weights, dy, slot) =
            (x.host::<f32>(), weights.host::<f32>(), dy.host::<f32>(), routes.slot.host::<u32>());
        let at = |b: &Buffer, row: usize, col: usize| f64::from(b.host::<f32>().row(row)[col]);
        for row in 0..rows {
            let slots: Vec<usize> = slot.row(row).iter().map(|&s| s as usize).collect();
            for col in 0..width {
                let terms = slots.iter().map(|&s| f64::from(x.row(s)[col]));
                let weighted: f64 =
                    terms.clone().zip(weights.row(row)).map(|(x, &w)| x * f64::from(w)).sum();
                assert!((at(&y, row, col) - f64::from(start) - weighted).abs() < 2e-6);
                assert!((at(&sum, row, col) - f64::from(start) - terms.sum::<f64>()).abs() < 2e-6);
            }
            for (choice, &s) in slots.iter().enumerate() {
                let products =
                    x.row(s).iter().zip(dy.row(row)).map(|(&x, &d)| f64::from(x) * f64::from(d));
                assert!((at(&dw, row, choice) - products.sum::<f64>()).abs() < 1e-5);
                let wanted = weights.row(row)[choice] * dy.row(row)[5];
                assert_eq!(dx.host::<f32>().row(s)[5], wanted);
            }
        }
        [read(&y), read(&dx), read(&dw), read(&sum)]
    }

    #[test]
    fn sums_over_slots_match_plain_f64_loops_with_the_same_bits_on_any_threads_and_set() {
        let wanted = all(&with(1, Isa::Portable), 0.5);
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                assert_eq!(all(&with(threads, isa), 0.5), wanted, "{isa:?} {threads}");
            }
        }
    }
}
