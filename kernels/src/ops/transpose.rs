//! Turning rows into the columns of a panel, eight at a time in registers: how keys, values and weights come to lie as
//! products read them.

use super::tile::PANEL;
use super::{Isa, Lanes, OnLanes};

/// Writes up to PANEL rows as the columns of a panel; missing columns become zero.
pub(crate) fn transpose(isa: Isa, rows: &[&[f32]], panel: &mut [f32]) {
    let width = panel.len() / PANEL;
    assert!(rows.len() <= PANEL && rows.iter().all(|row| row.len() == width), "rows of a panel");
    // SAFETY: `isa` was detected.
    unsafe { isa.run(Transpose { rows, panel }) }
}

struct Transpose<'a> {
    rows: &'a [&'a [f32]],
    panel: &'a mut [f32],
}

impl OnLanes for Transpose<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Transpose { rows, panel } = self;
        let whole = panel.len() / PANEL / 4 * 4;
        for first in (0..PANEL).step_by(8) {
            let some = &rows[first.min(rows.len())..rows.len().min(first + 8)];
            if let Some(last) = some.last() {
                // The last row stands in for missing ones.
                let eight = std::array::from_fn(|i| some.get(i).unwrap_or(last).as_ptr());
                for column in (0..whole).step_by(4) {
                    // SAFETY: the rows have `whole` elements at least, and the panel as many rows of PANEL.
                    unsafe {
                        let to = panel.as_mut_ptr().add(column * PANEL + first);
                        L::turn(eight.map(|row: *const f32| row.add(column)), to, PANEL);
                    }
                }
            }
            let columns = panel.as_chunks_mut::<PANEL>().0;
            for (column, to) in columns.iter_mut().enumerate().skip(whole) {
                to[first..].iter_mut().zip(some).for_each(|(to, row)| *to = row[column]);
            }
            if some.len() < 8 {
                for to in columns {
                    for i in 0..8 {
                        to[first + i] = if i < some.len() { to[first + i] } else { 0.0 };
                    }
                }
            }
        }
    }
}
