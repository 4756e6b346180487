//! The engine of mutations: an input is a function of the target's valid files and of its number.
//!
//! Half of the inputs are changed as bytes, half as what they are (JSON, lines of JSON, a header
//! before data, TOML), so that they get past the first check.

use super::tree::Tree;
use rehearsal::checkpoint::Manifest;
use rehearsal_kernels::random::{Draws, Stream};
use serde_json::json;

/// What a target's files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON text.
    Json,
    /// A JSON text a line.
    JsonLines,
    /// The length of a JSON header in eight bytes, the header, and data.
    Safetensors,
    /// The manifest of a checkpoint, sealed with its digest.
    Manifest,
    /// TOML.
    Toml,
    /// Bytes with lengths in them.
    Binary,
}

/// JSON texts at which readers have been seen to fail.
const EXTREMES: &[&str] = &[
    "null",
    "true",
    "false",
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "255",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
    "-0.0",
    "1e-9",
    "1e308",
    "-1e308",
    "1e309",
    "1e999",
    "1e-400",
    "NaN",
    "Infinity",
    "1e",
    "\"\"",
    "\"a\"",
    "\" \"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"\\ud83d\\ude00\"",
    "\"\\udfff\\ud800\"",
    "\"é\u{301}\u{10fffc}0\u{10fffd}\"",
    "\"../../x\"",
    "\"/dev/full\"",
    "\"a/b\"",
    "[]",
    "[0]",
    "[null]",
    "[[]]",
    "{}",
    "{\"\":0}",
    "{\"a\":{}}",
    "\"",
    "\"NaN\"",
    "\"0\"",
    "\"-1\"",
    "\u{feff}0",
];

/// Integers at which lengths have been seen to fail.
const LENGTHS: &[u64] = &[
    0,
    1,
    2,
    7,
    8,
    9,
    255,
    256,
    65535,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 8,
    u64::MAX - 1,
    u64::MAX,
];

const TOML_VALUES: &[&str] = &[
    "-1",
    "0",
    "1",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "1e-300",
    "9223372036854775807",
    "9223372036854775808",
    "\"\"",
    "\"a\"",
    "\"../x\"",
    "[]",
    "[[]]",
    "{}",
    "true",
    "1979-05-27",
    "0x7fffffffffffffff",
    "'''",
    "[1, \"a\"]",
    "{ a = {} }",
    "4294967296",
    "65536",
    "1_000_000_000_000",
    "\"\\ud800\"",
    "\"10 TiB\"",
];

/// A valid file, and what it is made of.
#[derive(Clone, Debug)]
struct Seed {
    bytes: Vec<u8>,
    /// The JSON in it.
    tree: Option<Tree>,
    /// What follows the JSON.
    rest: Vec<u8>,
}

/// The valid files of a target.
#[derive(Clone, Debug)]
pub struct Corpus {
    format: Format,
    seeds: Vec<Seed>,
    /// JSON texts that mean something to the target.
    words: &'static [&'static str],
}

impl Corpus {
    /// The valid files, and JSON texts that mean something to the target.
    pub fn new(format: Format, files: Vec<Vec<u8>>, words: &'static [&'static str]) -> Corpus {
        let seed = |bytes: Vec<u8>| {
            let (tree, rest) = match format {
                Format::Json | Format::Manifest => (Tree::parse(&bytes), Vec::new()),
                Format::Safetensors => {
                    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                    (Tree::parse(&bytes[8..8 + length]), bytes[8 + length..].to_vec())
                }
                Format::JsonLines | Format::Toml | Format::Binary => (None, Vec::new()),
            };
            Seed { bytes, tree, rest }
        };
        Corpus { format, seeds: files.into_iter().map(seed).collect(), words }
    }

    /// The valid files as they are.
    pub fn files(&self) -> impl Iterator<Item = &[u8]> {
        self.seeds.iter().map(|seed| seed.bytes.as_slice())
    }

    /// Input number `index` of a campaign.
    pub fn input(&self, campaign: u64, index: u64) -> Vec<u8> {
        let mut chance = Chance(Draws::new(campaign, Stream::Data, [index, 0, 0]));
        let seed = chance.of(&self.seeds);
        if chance.one_in(3) {
            return self.changed_bytes(seed.bytes.clone(), &mut chance);
        }
        let bytes = self.changed_parts(seed, &mut chance);
        match chance.one_in(8) {
            true => self.changed_bytes(bytes, &mut chance),
            false => bytes,
        }
    }

    fn changed_parts(&self, seed: &Seed, chance: &mut Chance) -> Vec<u8> {
        match self.format {
            Format::Json => self.changed_json(seed, chance),
            Format::Manifest => {
                let text = self.changed_json(seed, chance);
                if chance.one_in(4) { text } else { sealed(&text).unwrap_or(text) }
            }
            Format::Safetensors => {
                let header = self.changed_json(seed, chance);
                let true_length = header.len() as u64;
                let length =
                    if chance.one_in(12) { chance.length(true_length) } else { true_length };
                [&length.to_le_bytes()[..], &header, &seed.rest].concat()
            }
            Format::JsonLines => self.changed_lines(seed, chance, |line, chance| {
                let tree = Tree::parse(line)?;
                let whole = Seed { bytes: line.to_vec(), tree: Some(tree), rest: Vec::new() };
                Some(self.changed_json(&whole, chance))
            }),
            Format::Toml => self.changed_lines(seed, chance, |line, chance| {
                let line = std::str::from_utf8(line).ok()?;
                let (key, _) = line.split_once('=')?;
                let value = match chance.one_in(6) {
                    true => "[".repeat(200),
                    false => chance.of(TOML_VALUES).to_string(),
                };
                Some(format!("{key}= {value}").into_bytes())
            }),
            Format::Binary => self.changed_bytes(seed.bytes.clone(), chance),
        }
    }

    fn changed_json(&self, seed: &Seed, chance: &mut Chance) -> Vec<u8> {
        let Some(mut tree) = seed.tree.clone() else { return seed.bytes.clone() };
        for _ in 0..=chance.below(3) {
            self.change_somewhere(&mut tree, seed.bytes.len() as u64, chance);
        }
        tree.text()
    }

    /// Goes down at random, stopping now and then, and changes what is found.
    fn change_somewhere(&self, tree: &mut Tree, length: u64, chance: &mut Chance) {
        if tree.len() == 0 {
            *tree = self.extreme(length, chance);
            return;
        }
        let index = chance.below(tree.len());
        if !chance.one_in(4) {
            return self.change_somewhere(tree.child(index), length, chance);
        }
        let other = chance.below(tree.len());
        match (chance.below(6), &mut *tree) {
            (0, Tree::List(items)) => drop(items.remove(index)),
            (0, Tree::Object(entries)) => drop(entries.remove(index)),
            (1, Tree::List(items)) => items.insert(other, items[index].clone()),
            (1, Tree::Object(entries)) => entries.insert(other, entries[index].clone()),
            (2, Tree::List(items)) => items.swap(index, other),
            (2, Tree::Object(entries)) => entries[index].0 = entries[other].0.clone(),
            (3, Tree::Object(entries)) => {
                let key = self.extreme(length, chance).text();
                entries[index].0 = String::from_utf8_lossy(&key).into_owned();
            }
            (4, tree) => *tree.child(index) = self.part_of_another(chance),
            (_, tree) => *tree.child(index) = self.extreme(length, chance),
        }
    }

    fn part_of_another(&self, chance: &mut Chance) -> Tree {
        let mut tree = chance.of(&self.seeds).tree.clone().unwrap_or(Tree::Raw("0".to_string()));
        while tree.len() > 0 && !chance.one_in(4) {
            let index = chance.below(tree.len());
            tree = tree.child(index).clone();
        }
        tree
    }

    fn extreme(&self, length: u64, chance: &mut Chance) -> Tree {
        let text = match chance.below(16) {
            0..5 if !self.words.is_empty() => chance.of(self.words).to_string(),
            0 | 5 => format!("\"{}\"", "a".repeat(1 << chance.below(14))),
            6 => "[".repeat(200),
            7 => format!("{}0{}", "[".repeat(100), "]".repeat(100)),
            8 => format!("{}0{}", "{\"a\":".repeat(60), "}".repeat(60)),
            9 => chance.length(length).to_string(),
            _ => chance.of(EXTREMES).to_string(),
        };
        Tree::Raw(text)
    }

    fn changed_lines(
        &self,
        seed: &Seed,
        chance: &mut Chance,
        change: impl Fn(&[u8], &mut Chance) -> Option<Vec<u8>>,
    ) -> Vec<u8> {
        let mut lines: Vec<Vec<u8>> =
            seed.bytes.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        for _ in 0..=chance.below(3) {
            let (index, other) = (chance.below(lines.len()), chance.below(lines.len()));
            match chance.below(8) {
                0 if lines.len() > 1 => drop(lines.remove(index)),
                1 => lines.insert(other, lines[index].clone()),
                2 => lines.swap(index, other),
                _ => {
                    if let Some(changed) = change(&lines[index], chance) {
                        lines[index] = changed;
                    }
                }
            }
        }
        lines.join(&b'\n')
    }

    fn changed_bytes(&self, mut bytes: Vec<u8>, chance: &mut Chance) -> Vec<u8> {
        for _ in 0..=chance.below(4) {
            let at = chance.below(bytes.len() + 1);
            let most = 1 << chance.below(7);
            let end = (at + 1 + chance.below(most)).min(bytes.len());
            match chance.below(9) {
                0 if at < end => bytes[at] ^= 1 << chance.below(8),
                1 if at < end => bytes[at] = chance.below(256) as u8,
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at.min(end)..end)),
                4 => {
                    let piece = bytes[at.min(end)..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                5 => {
                    let other = &chance.of(&self.seeds).bytes;
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[chance.below(other.len() + 1)..]);
                }
                6 => replace_a_number(&mut bytes, at, chance),
                7 => {
                    let word = chance.length(bytes.len() as u64).to_le_bytes();
                    // The first words of a binary file are its lengths.
                    let at = if chance.one_in(3) { 4 * chance.below(6) } else { at };
                    let width = if chance.one_in(2) { 4 } else { 8 };
                    let end = (at + width).min(bytes.len());
                    if at < end {
                        bytes[at..end].copy_from_slice(&word[..end - at]);
                    }
                }
                _ => {
                    let piece = chance.of(EXTREMES).as_bytes().to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
        bytes
    }
}

/// Writes another number in the place of the first one after `from`.
fn replace_a_number(bytes: &mut Vec<u8>, from: usize, chance: &mut Chance) {
    let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|i| from + i) else {
        return;
    };
    let digits = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let number = chance.length(bytes.len() as u64).to_string().into_bytes();
    bytes.splice(start..start + digits, number);
}

/// The manifest of a changed file under its right digest, if it still is one.
fn sealed(text: &[u8]) -> Option<Vec<u8>> {
    let value: serde_json::Value = serde_json::from_slice(text).ok()?;
    let manifest: Manifest = serde_json::from_value(value.get("manifest")?.clone()).ok()?;
    let compact = serde_json::to_vec(&manifest).unwrap();
    let seal = json!({"blake3": blake3::hash(&compact).to_hex().to_string(), "manifest": manifest});
    let mut bytes = serde_json::to_vec_pretty(&seal).unwrap();
    bytes.push(b'\n');
    Some(bytes)
}

/// Draws for one input.
struct Chance(Draws);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A length that hurts: an extreme, or one beside `near`.
    fn length(&mut self, near: u64) -> u64 {
        match self.one_in(3) {
            true => near.wrapping_add(self.below(17) as u64).wrapping_sub(8),
            false => *self.of(LENGTHS),
        }
    }
}
