//! Shards: a model that several ranks write at once, each its own file, and the index that makes them one.
//!
//! The index is Hugging Face's, so that a checkpoint of many ranks loads wherever one of theirs does. Every shard and the
//! index carry the name of the save that they belong to: a file of another one is found even where no manifest is.
//! What the ranks wrote, with its hashes, is handed to the commit in a file of its own, so that nobody reads a whole
//! model again to hash it.

use super::disk::{disk_fault, is_plain_name, read_limited, write_synced};
use super::manifest::FileRecord;
use crate::config::Fault;
use anyhow::Result;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::Path;

/// An index beyond this is an attack or a mistake; DeepSeek-V2's own index has 2.5 MB.
const INDEX_LIMIT: u64 = 16 << 20;

/// What ranks wrote, until the commit takes it into the manifest.
const WRITTEN_FILE: &str = "written.json";
const WRITTEN_LIMIT: u64 = 16 << 20;

/// The key of a save's name in the metadata of a shard and of an index.
pub(super) const SAVE_KEY: &str = "save";

/// A file that one rank wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    /// Its name.
    pub file: String,
    /// Its length and content.
    pub record: FileRecord,
    /// Its tensors and their bytes.
    pub tensors: BTreeMap<String, u64>,
}

/// Name of the shard that the writer of this number, from 0 on, writes instead of `whole`.
pub fn shard_name(whole: &str, number: usize, of: usize) -> String {
    let stem = whole.strip_suffix(".safetensors").expect("shards are of a .safetensors file");
    format!("{stem}-{:05}-of-{of:05}.safetensors", number + 1)
}

/// Whether a file is a shard of `whole`.
pub(super) fn is_shard_of(whole: &str, name: &str) -> bool {
    let stem = whole.strip_suffix(".safetensors").expect("shards are of a .safetensors file");
    let rest = name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".safetensors"));
    rest.is_some_and(|rest| rest.starts_with('-') && rest.contains("-of-"))
}

/// Name of the index of the shards of `whole`.
pub fn index_name(whole: &str) -> String {
    format!("{whole}.index.json")
}

/// Who does which of some pieces of work, each given as its bytes and those who can do it: spread evenly by bytes.
///
/// What few can do is given away first, and the largest first, each to who has least; so ranks that can do the same differ
/// by one piece at most. All ranks find the same.
pub fn spread(work: &[(u64, Vec<usize>)], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..work.len()).collect();
    order.sort_by_key(|index| (work[*index].1.len(), std::cmp::Reverse(work[*index].0)));
    let (mut given, mut doer) = (vec![0; ranks], vec![0; work.len()]);
    for index in order {
        let (bytes, able) = &work[index];
        let least = able.iter().min_by_key(|rank| (given[**rank], **rank));
        doer[index] = *least.expect("somebody can do it");
        given[doer[index]] += bytes;
    }
    doer
}

/// Writes the index of the shards of `whole`.
pub fn write_index(folder: &Path, whole: &str, shards: &[&Shard], save: &str) -> Result<()> {
    let (mut map, mut total) = (Map::new(), 0);
    for shard in shards {
        for (tensor, bytes) in &shard.tensors {
            total += bytes;
            let other = map.insert(tensor.clone(), json!(shard.file));
            assert!(other.is_none(), "{tensor} is in {} and in {other:?}", shard.file);
        }
    }
    let metadata = json!({"total_size": total, SAVE_KEY: save});
    let index = json!({"metadata": metadata, "weight_map": Value::Object(map)});
    let mut bytes = serde_json::to_vec_pretty(&index).expect("JSON values can be written");
    bytes.push(b'\n');
    write_synced(&folder.join(index_name(whole)), &bytes)
}

/// An index as it was read.
pub(super) struct Index {
    /// Tensors and their files.
    pub files: BTreeMap<String, String>,
    /// The save that it is of, if it says so.
    pub save: Option<String>,
}

/// Reads an index; every file that it names is in its own folder, every tensor is in one file.
pub(super) fn read_index(path: &Path) -> Result<Index> {
    #[derive(Deserialize)]
    struct Read {
        #[serde(default)]
        metadata: Value,
        weight_map: Pairs<String>,
    }
    let at = path.display();
    let Read { metadata, weight_map } =
        serde_json::from_slice(&read_limited(path, INDEX_LIMIT)?)
            .map_err(|e| Fault::user(format!("{at}:{}:{}: {e}", e.line(), e.column())))?;
    let mut files = BTreeMap::new();
    for (tensor, file) in weight_map.0 {
        if !is_plain_name(&file) || !file.ends_with(".safetensors") {
            return Err(Fault::user(format!(
                "{at}: weight_map.{tensor} = {file:?} is no name of a .safetensors file in the \
                 same folder"
            )));
        }
        if let Some(other) = files.insert(tensor.clone(), file.clone()) {
            return Err(Fault::user(format!(
                "{at}: names {tensor} twice, in {other} and in {file}; take the index of the \
                 folder that these files come from"
            )));
        }
    }
    Ok(Index { files, save: metadata[SAVE_KEY].as_str().map(str::to_string) })
}

/// Hands what ranks wrote into a folder to its commit.
pub fn write_written(folder: &Path, shards: &[&Shard]) -> Result<()> {
    let records: BTreeMap<&str, &FileRecord> =
        shards.iter().map(|shard| (shard.file.as_str(), &shard.record)).collect();
    let bytes = serde_json::to_vec(&records).expect("string keys and plain values");
    write_synced(&folder.join(WRITTEN_FILE), &bytes)
}

/// Takes it out of the folder; nothing if one rank wrote all.
pub(super) fn take_written(folder: &Path) -> Result<BTreeMap<String, FileRecord>> {
    let path = folder.join(WRITTEN_FILE);
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let records = serde_json::from_slice(&read_limited(&path, WRITTEN_LIMIT)?)
        .map_err(|e| Fault::user(format!("{}: {e}; save again", path.display())))?;
    std::fs::remove_file(&path).map_err(|e| disk_fault("remove", &path, e))?;
    Ok(records)
}

/// A JSON object as written, names that stand twice included: a map type would drop them silently.
pub(super) struct Pairs<T>(pub Vec<(String, T)>);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for Entries<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
        #[test]
        fn work_goes_to_who_can_do_it_and_is_spread_evenly(
            shared in prop::collection::vec(1u64..100, 0..30),
            of_two in prop::collection::vec(1u64..100, 0..30),
            alone in 0u64..50,
        ) {
            // Ranks 0 to 3 can do the shared work, 1 and 2 also what is theirs, 4 its own.
            let all = shared.iter().map(|bytes| (*bytes, vec![0, 1, 2, 3]));
            let two = of_two.iter().map(|bytes| (*bytes, vec![1, 2]));
            let work: Vec<_> = all.chain(two).chain([(alone, vec![4])]).collect();
            let doer = spread(&work, 5);
            let mut given = [0; 5];
            for ((bytes, able), rank) in work.iter().zip(&doer) {
                prop_assert!(able.contains(rank));
                given[*rank] += bytes;
            }
            prop_assert_eq!(given[4], alone);
            let largest = shared.iter().chain(&of_two).copied().max().unwrap_or(0);
            prop_assert!(given[1].abs_diff(given[2]) <= largest, "{given:?}");
            prop_assert!(given[0].abs_diff(given[3]) <= largest, "{given:?}");
            // Who had work of its own gets shared work only while it has least.
            prop_assert!(given[0].max(given[3]) <= given[1].min(given[2]) + largest, "{given:?}");
        }
    }

    #[test]
    fn shards_are_named_as_others_name_them() {
        let name = shard_name("model.safetensors", 1, 4);
        assert_eq!(name, "model-00002-of-00004.safetensors");
        assert!(is_shard_of("model.safetensors", &name));
        assert!(!is_shard_of("optimizer.safetensors", &name));
        assert!(!is_shard_of("model.safetensors", "model.safetensors"));
    }

    #[test]
    fn what_ranks_wrote_is_handed_over_once() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(take_written(folder.path()).unwrap(), BTreeMap::new());
        let record = FileRecord { bytes: 3, blake3: "abc".to_string() };
        let shard =
            Shard { file: "x".to_string(), record: record.clone(), tensors: BTreeMap::new() };
        write_written(folder.path(), &[&shard]).unwrap();
        let records = BTreeMap::from([("x".to_string(), record)]);
        assert_eq!(take_written(folder.path()).unwrap(), records);
        assert_eq!(take_written(folder.path()).unwrap(), BTreeMap::new());
    }
}
