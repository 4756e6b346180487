//! Pieces: tensors of which a file has all, or several files some elements each, as a rank answers for them.
//!
//! A piece says by its own name where it belongs: `NAME.at.4096` begins at that element of NAME in row order; what has no
//! such ending is the whole. Whoever reads says which elements it wants and gets those, from whichever pieces have them.
//!
//! Invariant: nothing is given out of a tensor whose pieces do not tile it.

use super::shards::index_name;
use super::tensors::TensorFolder;
use crate::cluster::{Work, made};
use crate::config::Fault;
use anyhow::Result;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Numbers that are held at once.
const AT_ONCE: usize = 1 << 20;
const AT: &str = ".at.";

/// The name of the piece of a tensor that begins at an element.
pub fn piece_name(tensor: &str, first: usize) -> String {
    format!("{tensor}{AT}{first}")
}

/// The tensor that a piece is of, and its first element there.
fn whole_of(piece: &str) -> (&str, usize) {
    let cut = piece.rsplit_once(AT);
    let cut = cut.and_then(|(tensor, first)| Some((tensor, first.parse().ok()?)));
    cut.unwrap_or((piece, 0))
}

/// See the module.
pub struct Pieces {
    tensors: TensorFolder,
    at: String,
    of: HashMap<String, Vec<Piece>>,
}

struct Piece {
    elements: Range<usize>,
    name: String,
}

impl Pieces {
    /// Those of the file, or of the shards of it if the folder has their index. Compares nothing with a manifest.
    pub fn open(folder: &Path, file: &str) -> Result<Pieces> {
        let (index, whole) = (folder.join(index_name(file)), folder.join(file));
        let is_sharded = index.exists();
        let tensors = match is_sharded {
            true => TensorFolder::open_sharded(folder, &index)?,
            false => TensorFolder::open_file(&whole)?,
        };
        let mut of: HashMap<String, Vec<Piece>> = HashMap::new();
        for name in tensors.names() {
            let shape = tensors.shape(name).expect("a listed tensor has a shape");
            let ((tensor, first), count) = (whole_of(name), shape.iter().product::<usize>());
            let end = first.saturating_add(count);
            let piece = Piece { elements: first..end, name: name.clone() };
            of.entry(tensor.to_string()).or_default().push(piece);
        }
        of.values_mut()
            .for_each(|pieces| pieces.sort_by_key(|p| (p.elements.start, p.elements.end)));
        let at = if is_sharded { index } else { whole };
        Ok(Pieces { tensors, at: at.display().to_string(), of })
    }

    /// Gives `wanted` of the `count` elements of a tensor, part by part, each with its place in `wanted`.
    pub fn read(
        &self,
        tensor: &str,
        count: usize,
        wanted: Range<usize>,
        take: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        for Piece { elements, name } in self.tiles(tensor, count)? {
            let from = wanted.start.max(elements.start);
            let end = wanted.end.min(elements.end);
            for from in (from..end).step_by(AT_ONCE) {
                let to = end.min(from + AT_ONCE);
                let inside = from - elements.start..to - elements.start;
                take(from - wanted.start, &self.tensors.read_f32_range(name, inside)?);
                made(Work::Read);
            }
        }
        Ok(())
    }

    /// The pieces of a tensor, which have each of its elements once.
    fn tiles(&self, tensor: &str, count: usize) -> Result<&[Piece]> {
        const WAY_OUT: &str = "use another checkpoint, or check [model] against this one";
        let fault = |what: String| Err(Fault::user(format!("{}: {what}; {WAY_OUT}", self.at)));
        let Some(pieces) = self.of.get(tensor) else {
            return fault(format!("has no tensor {tensor}"));
        };
        let mut end = 0;
        for Piece { elements, name } in pieces {
            if elements.start != end {
                let what = if elements.start < end { "are there twice" } else { "are missing" };
                let between = end.min(elements.start)..end.max(elements.start);
                return fault(format!("elements {between:?} of {tensor} {what} (before {name})"));
            }
            end = elements.end;
        }
        match end == count {
            true => Ok(pieces),
            false => fault(format!("{tensor} has {end} elements, the config wants {count}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shards::{Shard, shard_name, write_index};
    use super::super::tensor_writer::{TensorEntry, write_shard, write_tensors};
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "optimizer.safetensors";

    /// Writes elements `cuts[i]..cuts[i + 1]` of 0, 1, 2, ... as shard i.
    fn write_cut(folder: &Path, cuts: &[usize], name: impl Fn(usize) -> String) {
        let (mut shards, count) = (Vec::new(), cuts.len() - 1);
        for (i, cut) in cuts.windows(2).enumerate() {
            let entry = TensorEntry { name: name(cut[0]), shape: vec![cut[1] - cut[0]] };
            let file = shard_name(FILE, i, count);
            let mut fetch = |_| Ok((cut[0]..cut[1]).map(|x| x as f32).collect());
            let tensors = [(entry.name.clone(), 4 * (cut[1] - cut[0]) as u64)].into();
            let record = write_shard(&folder.join(&file), &[entry], "s", &mut fetch).unwrap();
            shards.push(Shard { file, record, tensors });
        }
        write_index(folder, FILE, &shards.iter().collect::<Vec<_>>(), "s").unwrap();
    }

    fn read(folder: &Path, count: usize, wanted: Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![f32::NAN; wanted.len()];
        Pieces::open(folder, FILE)?.read("m.x", count, wanted, &mut |first, part| {
            values[first..first + part.len()].copy_from_slice(part);
        })?;
        Ok(values)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]
        #[test]
        fn any_elements_come_from_any_pieces(
            sizes in prop::collection::vec(1usize..9, 1..6), from in 0usize..40, length in 0usize..40,
        ) {
            let mut cuts = vec![0];
            sizes.iter().for_each(|size| cuts.push(cuts[cuts.len() - 1] + size));
            let count = cuts[cuts.len() - 1];
            let folder = tempfile::tempdir().unwrap();
            write_cut(folder.path(), &cuts, |first| piece_name("m.x", first));
            let from = from.min(count);
            let wanted = from..(from + length).min(count);
            let expected: Vec<f32> = wanted.clone().map(|x| x as f32).collect();
            prop_assert_eq!(read(folder.path(), count, wanted).unwrap(), expected);
        }
    }

    #[test]
    fn a_whole_tensor_of_one_file_is_one_piece_and_large_ones_come_in_parts() {
        let folder = tempfile::tempdir().unwrap();
        let count = 2 * AT_ONCE + 7;
        let shapes = [TensorEntry { name: "m.x".into(), shape: vec![1, count] }];
        let numbers: Vec<f32> = (0..count).map(|x| x as f32).collect();
        write_tensors(&folder.path().join(FILE), &shapes, &mut |_| Ok(numbers.clone())).unwrap();
        assert_eq!(read(folder.path(), count, 5..count - 1).unwrap(), numbers[5..count - 1]);
    }

    #[test]
    fn pieces_that_do_not_tile_are_refused() {
        let told = |cuts: &[usize], shift: usize, count| {
            let folder = tempfile::tempdir().unwrap();
            // All pieces but the first begin later than they say.
            let name = |first| piece_name("m.x", if first == 0 { 0 } else { first - shift });
            write_cut(folder.path(), cuts, name);
            format!("{:#}", read(folder.path(), count, 0..1).unwrap_err())
        };
        let twice = told(&[0, 4, 8], 1, 8);
        assert!(twice.contains("elements 3..4 of m.x are there twice"), "{twice}");
        let folder = tempfile::tempdir().unwrap();
        write_cut(folder.path(), &[2, 5], |first| piece_name("m.x", first));
        let missing = format!("{:#}", read(folder.path(), 5, 3..4).unwrap_err());
        assert!(missing.contains("elements 0..2 of m.x are missing"), "{missing}");
        let short = told(&[0, 4, 8], 0, 9);
        assert!(short.contains("m.x has 8 elements, the config wants 9"), "{short}");
        assert!(short.contains("optimizer.safetensors.index.json"), "{short}");
    }
}
