//! Which rows see which: segments of neighbouring rows, of which some continue a stem.
//!
//! Knows no numbers, only places. A sequence's keys are its stem's rows, then its own; they are counted from the stem's
//! first row, so that blocks of keys lie as in a sequence that has a copy of the stem.
//!
//! Invariants:
//!   * a stem is a whole segment before the ones that continue it, and continues none itself

use crate::buffer::Buffer;
use std::ops::Range;

/// Neighbouring rows of one sequence, and the rows before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Its rows; each has its own key.
    pub rows: Range<usize>,
    /// The rows that all of them see first; empty for a sequence that begins here.
    pub stem: Range<usize>,
    /// The stem's place among the segments.
    pub stem_index: Option<usize>,
}

impl Segment {
    /// A sequence of its own.
    pub fn alone(rows: Range<usize>) -> Segment {
        Segment { rows, stem: 0..0, stem_index: None }
    }

    /// Keys that a row sees, itself included.
    pub fn seen(&self, row: usize) -> usize {
        self.stem.len() + row + 1 - self.rows.start
    }

    /// The rows of the sequence's keys.
    pub fn keys(&self) -> impl Iterator<Item = usize> {
        self.stem.clone().chain(self.rows.clone())
    }

    /// The first `seen` keys as neighbouring rows: the number of the first key, and the rows.
    pub fn stretches(&self, seen: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let stem = self.stem.len();
        let own = self.rows.start..self.rows.start + seen - stem;
        [(0, self.stem.clone()), (stem, own)].into_iter().filter(|(_, rows)| !rows.is_empty())
    }
}

/// The segments that `start` describes (see [`Kernels::mla_train`](crate::Kernels::mla_train)) of as many rows as there
/// are keys.
pub(super) fn read(start: &Buffer, rows: usize, keys: usize) -> Vec<Segment> {
    assert_eq!(keys, rows, "attention: a key and a value for each row");
    let shape = (start.rows(), start.cols());
    assert!(shape == (rows, 1) || shape == (rows, 2), "attention: shape of start");
    let start = start.host::<u32>();
    let begins = (0..rows).filter(|row| start.row(*row)[0] as usize == *row);
    let mut segments: Vec<Segment> = Vec::with_capacity(begins.count());
    for row in 0..rows {
        let places = start.row(row);
        let (first, stem) = (places[0] as usize, places[places.len() - 1] as usize);
        if first == row {
            let mut segment = Segment::alone(row..row + 1);
            if stem != first {
                let is_stem = |s: &Segment| s.rows.start == stem && s.stem_index.is_none();
                let index = segments.iter().rposition(is_stem);
                let index = index.expect("attention: a stem is an earlier segment without a stem");
                segment.stem = segments[index].rows.clone();
                segment.stem_index = Some(index);
            }
            segments.push(segment);
            continue;
        }
        let segment = segments.last_mut().expect("row 0 starts at 0");
        let own = (segment.rows.start, segment.stem_index.map_or(first, |_| segment.stem.start));
        assert_eq!(own, (first, stem), "attention: row {row} starts inside another segment");
        segment.rows.end = row + 1;
    }
    segments
}

/// Segments by what they share: a stem with those that continue it, in order.
pub(super) fn families(segments: &[Segment]) -> Vec<Vec<usize>> {
    let mut families: Vec<Vec<usize>> = Vec::new();
    let mut of_stem = vec![0; segments.len()];
    for (index, segment) in segments.iter().enumerate() {
        match segment.stem_index {
            Some(stem) => families[of_stem[stem]].push(index),
            None => {
                of_stem[index] = families.len();
                families.push(vec![index]);
            }
        }
    }
    families
}
