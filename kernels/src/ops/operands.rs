//! Where the operands of a product lie: addresses and strides, no lengths.
//!
//! Whoever multiplies promises that they are good for the product's shape.

use super::tile::PANEL;

/// A: element (i, p) is at `at + i * row + p * col`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub at: *const f32,
    pub row: usize,
    pub col: usize,
}

/// B: element (p, j) is at `at + j / 32 * panel + p * row + j % 32`.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub at: *const f32,
    pub row: usize,
    pub panel: usize,
    pub next: Next,
}

/// What is brought to the second cache while a product reads its last panel; before it, that is its next one.
#[derive(Clone, Copy)]
pub(crate) enum Next {
    /// Nothing, and no panel either: B lies in a cache, or not in panels.
    Nothing,
    /// What lies behind B: another group of a packed weight.
    Behind,
    /// As many floats as a panel has from here on; the address need not be good.
    At(*const f32),
}

/// What is brought to the second cache while a block multiplies.
#[derive(Clone, Copy)]
pub(super) enum Bring {
    /// Nothing, and no panel either.
    Nothing,
    /// Panel after panel of B; behind the last one, what lies here.
    Panel(*const f32),
    /// A block of a transposed A: its first element, and floats from a step to the next.
    Rows(*const f32, usize),
}

/// C: element (i, j) is at `at + i * row + j`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub at: *mut f32,
    pub row: usize,
}

impl Left {
    /// A from row `i` on.
    pub fn at_row(self, i: usize) -> Left {
        Left { at: self.at.wrapping_add(i * self.row), ..self }
    }
}

impl Right {
    /// B from column `j` on, a multiple of [`PANEL`].
    pub fn at_column(self, j: usize) -> Right {
        debug_assert!(j.is_multiple_of(PANEL));
        Right { at: self.at.wrapping_add(j / PANEL * self.panel), ..self }
    }
}

impl Out {
    /// C from element (i, j) on.
    pub fn from(self, i: usize, j: usize) -> Out {
        Out { at: self.at.wrapping_add(i * self.row + j), ..self }
    }
}
