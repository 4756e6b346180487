//! What attention is told: the shape of its heads, and which cached tokens a sampler's rows see.
//!
//! Knows no numbers; the operations are in [`Kernels`](crate::Kernels).

use crate::buffer::Buffer;

/// Shape of causal attention, one form for MLA expanded, MLA absorbed and GQA.
///
/// Head h has query columns `q[:, h * (key_width + rope_width) ..]` = [key part | rope part]. Its keys are
/// `kv[:, (h / sharing) * head_stride ..][..key_width]`, its values
/// `kv[:, (h / sharing) * head_stride + value_offset ..][..value_width]`, and `k_rope [T, rope_width]` serves all
/// heads. score = scale * (q_key . key + q_rope . k_rope), softmax over the tokens of the row's segment up
/// to the row itself.
///   * expanded: sharing 1, head_stride d_nope + d_v, value_offset d_nope
///   * absorbed: sharing H, head_stride 0, value_offset 0, key_width = value_width = d_c (kv is the latent)
///   * GQA: sharing H / groups, rope_width 0
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads H.
    pub heads: usize,
    /// Query heads that share one key and value.
    pub sharing: usize,
    /// Width of the key part.
    pub key_width: usize,
    /// Width of the shared rope part (0 if there is none).
    pub rope_width: usize,
    /// Width of the value and of one head's output.
    pub value_width: usize,
    /// Columns between key-value heads in kv.
    pub head_stride: usize,
    /// Columns from a head's key to its value in kv.
    pub value_offset: usize,
    /// Softmax scale, YaRN's m² included.
    pub scale: f64,
}

impl AttentionShape {
    /// Query columns of one head.
    pub fn query_width(&self) -> usize {
        self.key_width + self.rope_width
    }

    /// Columns of kv: all keys and values of a token.
    pub fn kv_width(&self) -> usize {
        let last = (self.heads / self.sharing - 1) * self.head_stride;
        last + self.key_width.max(self.value_offset + self.value_width)
    }
}

/// Rows of a sampler's batch against the paged cache. All buffers are `U32`.
pub struct DecodeBatch<'a> {
    /// Page numbers of each sequence: `[sequences, pages at most]`.
    pub tables: &'a Buffer,
    /// Which sequence row r belongs to: `[rows, 1]`.
    pub sequence: &'a Buffer,
    /// Number of cached tokens row r sees, itself included: `[rows, 1]`.
    pub length: &'a Buffer,
    /// Tokens of one page.
    pub page_tokens: usize,
}
