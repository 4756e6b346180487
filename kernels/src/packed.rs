//! Packed weights: which rows of a weight are packed, for which product, and which columns a product per head touches.
//!
//! Knows no arithmetic; what lies inside a [`Packed`] is its device's own business.

use crate::buffer::Buffer;
use crate::format::WeightFormat;

/// Which product a packed weight W `[n, k]` is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `y[m, n] = x[m, k] Wᵀ`: a forward pass.
    Transposed,
    /// `y[m, k] = x[m, n] W`: an input gradient, or W_UK's absorption into the query.
    Plain,
}

/// How to pack a weight matrix that holds one block of rows per group (head or expert).
#[derive(Clone, Copy, Debug)]
pub struct Pack {
    /// The product it is packed for.
    pub product: Product,
    /// Number of groups; 1 for a plain linear layer.
    pub groups: usize,
    /// Rows from one group's first row to the next one's.
    pub group_stride: usize,
    /// First row of group 0.
    pub first_row: usize,
    /// Rows of each group that are packed (n).
    pub rows: usize,
}

impl Pack {
    /// A plain linear layer over all rows of `weight`.
    pub fn whole(product: Product, weight: &Buffer) -> Pack {
        Pack { product, groups: 1, group_stride: weight.rows(), first_row: 0, rows: weight.rows() }
    }

    /// `groups` equal blocks of rows.
    pub fn blocks(product: Product, weight: &Buffer, groups: usize) -> Pack {
        let rows = weight.rows() / groups;
        Pack { product, groups, group_stride: rows, first_row: 0, rows }
    }
}

/// A weight in a device's favourite order, stamped with the policy version it was packed from.
pub struct Packed {
    /// The product it is packed for.
    pub product: Product,
    /// Number of groups.
    pub groups: usize,
    /// Input width of the product (k for `Transposed`, n for `Plain`).
    pub inputs: usize,
    /// Output width of the product.
    pub outputs: usize,
    /// What its numbers are kept as.
    pub format: WeightFormat,
    /// Policy version of the weights it was made from.
    pub version: u64,
    /// The device's own layout; opaque outside the kernels.
    pub(crate) data: Buffer,
    /// Scales of the whole weight's blocks, if the format has any.
    pub(crate) scales: Option<Buffer>,
    /// First packed row of group 0, and rows between groups: where a group's scales lie.
    pub(crate) rows: (usize, usize),
}

impl Packed {
    /// Bytes that it is kept in, scales and padding included.
    pub fn bytes(&self) -> usize {
        let bytes = |buffer: &Buffer| buffer.len() * buffer.dtype().size();
        bytes(&self.data) + self.scales.as_ref().map_or(0, bytes)
    }
}

/// Column blocks of x and y for a product per head: head h reads `x[:, input_first + h * input_stride ..][..inputs]`
/// and writes `y[:, output_first + h * output_stride ..][..outputs]`.
#[derive(Clone, Copy, Debug)]
pub struct HeadColumns {
    /// First input column of head 0.
    pub input_first: usize,
    /// Columns between heads in x.
    pub input_stride: usize,
    /// First output column of head 0.
    pub output_first: usize,
    /// Columns between heads in y.
    pub output_stride: usize,
}
