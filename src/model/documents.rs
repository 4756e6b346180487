//! The token rows of a training or scoring pass.
//!
//! Knows no weights. Documents lie one after another without gaps or padding, each seeing only itself; or families: a stem,
//! as the prompt of a group, that goes through the model once, and branches that each see the stem and themselves.
//!
//! Invariants:
//!   * a branch's rows have the positions and see the keys that they would have behind a stem of their own, in the same
//!     order, so that their numbers have the same bits

use super::pass::indices;
use rehearsal_kernels::{Buffer, DType, Kernels, OutOfMemory};

/// Tokens, and what may follow them.
#[derive(Clone, Debug, Default)]
pub struct Family<'a> {
    /// Tokens that all branches see; not empty.
    pub stem: &'a [u32],
    /// What follows the stem; may be empty.
    pub branches: Vec<&'a [u32]>,
}

impl<'a> Family<'a> {
    /// A document that nothing follows.
    pub fn alone(stem: &'a [u32]) -> Family<'a> {
        Family { stem, branches: Vec::new() }
    }
}

/// Where a branch lies among the rows of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Row of the stem's last token.
    stem_end: u32,
    /// Row of the branch's first token.
    first: u32,
}

impl Place {
    /// The row before the branch's token number `index`, from 0: the one that predicts it.
    pub fn before(self, index: usize) -> u32 {
        match index as u32 {
            0 => self.stem_end,
            index => self.first + index - 1,
        }
    }
}

/// The places of all branches, in order, as [`Documents::pack_families`] lays them out.
pub fn places(families: &[Family<'_>]) -> Vec<Place> {
    let (mut places, mut end) = (Vec::new(), 0);
    for Family { stem, branches } in families {
        end += stem.len() as u32;
        let stem_end = end - 1;
        for branch in branches {
            places.push(Place { stem_end, first: end });
            end += branch.len() as u32;
        }
    }
    places
}

/// The rows of a pass.
pub struct Documents {
    /// Token ids `[T, 1]`.
    pub tokens: Buffer,
    /// Position of each row in its document, stem included `[T, 1]`.
    pub positions: Buffer,
    /// First row of each row's own segment; where there are branches `[T, 2]`, with the first row of its stem.
    pub start: Buffer,
    /// Number of each row's document `[T, 1]`: a stem is one with its first branch.
    pub segment: Buffer,
    /// Number of documents.
    pub count: usize,
}

/// Rows while they are laid out.
#[derive(Default)]
struct Columns {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    starts: Vec<[u32; 2]>,
    segment: Vec<u32>,
}

impl Columns {
    /// Adds the rows of `tokens`, which continue the `before` rows from row `stem`.
    fn push(&mut self, tokens: &[u32], stem: usize, before: usize, number: u32) {
        let first = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((before..before + tokens.len()).map(|position| position as u32));
        self.starts.extend(tokens.iter().map(|_| [first as u32, stem as u32]));
        self.segment.extend(tokens.iter().map(|_| number));
    }
}

impl Documents {
    /// Packs documents of their own. None may be empty.
    pub fn pack(kernels: &dyn Kernels, documents: &[&[u32]]) -> Result<Documents, OutOfMemory> {
        let families: Vec<_> = documents.iter().map(|document| Family::alone(document)).collect();
        Documents::pack_families(kernels, &families)
    }

    /// Packs each family's stem, then its branches.
    pub fn pack_families(
        kernels: &dyn Kernels,
        families: &[Family<'_>],
    ) -> Result<Documents, OutOfMemory> {
        let (mut columns, mut count) = (Columns::default(), 0);
        for Family { stem, branches } in families {
            let first = columns.tokens.len();
            columns.push(stem, first, 0, count);
            for (index, branch) in branches.iter().filter(|branch| !branch.is_empty()).enumerate() {
                count += u32::from(index > 0);
                columns.push(branch, first, stem.len(), count);
            }
            count += 1;
        }
        let is_plain = families.iter().all(|family| family.branches.is_empty());
        let width = if is_plain { 1 } else { 2 };
        let starts: Vec<u32> =
            columns.starts.iter().flat_map(|places| &places[..width]).copied().collect();
        let mut start =
            kernels.arena().buffer(kernels.scratch(), DType::U32, columns.tokens.len(), width)?;
        kernels.upload_indices(&starts, &mut start);
        Ok(Documents {
            tokens: indices(kernels, &columns.tokens)?,
            positions: indices(kernels, &columns.positions)?,
            start,
            segment: indices(kernels, &columns.segment)?,
            count: count as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::{Arena, CpuKernels};

    #[test]
    fn branches_go_on_where_their_stem_ends() {
        let kernels = CpuKernels::new(1, Arena::new(None));
        let read = |buffer: &Buffer| kernels.download_indices(buffer);
        let family =
            |stem, branches: &[&'static [u32]]| Family { stem, branches: branches.to_vec() };
        let families = [family(&[7, 8][..], &[&[1], &[], &[2, 3]]), family(&[9], &[])];
        let documents = Documents::pack_families(&kernels, &families).unwrap();
        assert_eq!(read(&documents.tokens), [7, 8, 1, 2, 3, 9]);
        assert_eq!(read(&documents.positions), [0, 1, 2, 2, 3, 0]);
        assert_eq!(read(&documents.start), [0, 0, 0, 0, 2, 0, 3, 0, 3, 0, 5, 5]);
        assert_eq!(read(&documents.segment), [0, 0, 0, 1, 1, 2]);
        assert_eq!(documents.count, 3);
        let before = |branch: usize, index| places(&families)[branch].before(index);
        assert_eq!([before(0, 0), before(0, 1), before(1, 0), before(2, 0)], [1, 2, 1, 1]);
        assert_eq!([before(2, 1), before(2, 2)], [3, 4]);
        let plain = Documents::pack(&kernels, &[&[7, 8], &[9]]).unwrap();
        assert_eq!((read(&plain.start), plain.count), (vec![0, 0, 2], 2));
    }
}
