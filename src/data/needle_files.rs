//! Writes the files of the needle task: pages to pretrain on, and prompts that measure.
//!
//! Before there is a tokenizer a length is counted in words and marks, which are tokens if each has one: a run makes
//! sure of that with `tokenizer.require_single`. The files that measure have a seed of their own, so that all runs are
//! measured on the same prompts.
//!
//! Invariants:
//!   * a page has at most its file's length, a prompt with its answer and the end token exactly its file's length
//!   * line i of a file depends on the seed, the file and i alone

use crate::config::NeedleConfig;
use crate::data::lines::write_lines;
use crate::data::needle::{Needle, haystack};
use anyhow::Result;
use rehearsal_kernels::random::{Draws, Stream};
use serde_json::{Value, json};
use std::path::Path;

/// Seed of the files that measure: the same for every run.
const MEASURING_SEED: u64 = 0x6e65_6564_6c65_2121;

/// Words and marks of a fact, of a question, and of an answer with the end token.
const FACT: usize = 5;
const QUESTION: usize = 6;
const ANSWER: usize = 2;

/// Depths of the prompts that measure, one after the other.
const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Writes all files of the task into a folder; gives name and number of lines of each.
pub fn write_needle_files(
    config: &NeedleConfig,
    folder: &Path,
    seed: u64,
) -> Result<Vec<(String, usize)>> {
    let lines = |count: usize, make: &dyn Fn(usize) -> Value| (0..count).map(make).collect();
    let (short, long) = (config.length, config.long_length);
    let pages = |file, longest| move |i| page(longest, config.facts, &mut draws(seed, file, i));
    let asked = |file, length| move |i| prompt(length, i, &mut draws(MEASURING_SEED, file, i));
    let files: [(&str, Vec<Value>); 4] = [
        ("needle-pages.jsonl", lines(config.pages, &pages(0, short))),
        ("needle-long-pages.jsonl", lines(config.long_pages, &pages(1, long))),
        ("needle.jsonl", lines(config.held_out, &asked(2, short))),
        ("needle-long.jsonl", lines(config.held_out, &asked(3, long))),
    ];
    let mut written = Vec::new();
    for (name, lines) in files {
        write_lines(&folder.join(name), &lines)?;
        written.push((name.to_string(), lines.len()));
    }
    Ok(written)
}

fn draws(seed: u64, file: u64, line: usize) -> Draws {
    // Another first counter than the word machine's files have.
    Draws::new(seed, Stream::Data, [100 + file, line as u64, 0])
}

/// A page of any length up to `longest`, with one to `facts` facts, one of which is asked for.
fn page(longest: usize, facts: usize, draws: &mut Draws) -> Value {
    let count = 1 + draws.below(facts as u64) as usize;
    let least = count * FACT + QUESTION + ANSWER;
    let length = least + draws.below((longest - least + 1) as u64) as usize;
    let needles = Needle::draw(count, draws);
    let depth = draws.uniform();
    let text = written(&needles, length, depth, draws);
    json!({"text": text + &needles[0].answer()})
}

/// A prompt that is `length` long with its answer and the end token.
fn prompt(length: usize, line: usize, draws: &mut Draws) -> Value {
    let needles = Needle::draw(1, draws);
    let text = written(&needles, length, DEPTHS[line % DEPTHS.len()], draws);
    json!({"prompt": text, "answer": needles[0].thing})
}

fn written(needles: &[Needle], length: usize, depth: f64, draws: &mut Draws) -> String {
    let stack = haystack(&words_and_marks, needles, length - ANSWER, depth, draws);
    stack.expect("the config's lengths hold the needles").units.concat()
}

/// A text in words, each with the blank before it, and marks.
fn words_and_marks(text: &str) -> Vec<String> {
    let mut units = Vec::new();
    for word in text.split_whitespace() {
        let bare = word.trim_end_matches(['.', '?']);
        units.push(format!(" {bare}"));
        units.extend(word[bare.len()..].chars().map(String::from));
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TokenizerConfig;
    use crate::data::needle::{HAY, NAMES, THINGS};
    use crate::data::tokenizer::Tokenizer;
    use std::collections::BTreeMap;

    fn config() -> NeedleConfig {
        NeedleConfig { pages: 3000, long_pages: 100, held_out: 50, ..NeedleConfig::default() }
    }

    fn files(seed: u64) -> BTreeMap<String, Vec<Value>> {
        let folder = tempfile::tempdir().unwrap();
        let written = write_needle_files(&config(), folder.path(), seed).unwrap();
        let read = |(name, count): (String, usize)| {
            let text = std::fs::read_to_string(folder.path().join(&name)).unwrap();
            let lines: Vec<Value> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(lines.len(), count);
            (name, lines)
        };
        written.into_iter().map(read).collect()
    }

    fn text<'a>(line: &'a Value, key: &str) -> &'a str {
        line[key].as_str().unwrap()
    }

    /// Every word with its blank, and every mark.
    fn vocabulary() -> Vec<String> {
        let needle = |name, thing| Needle { name, thing };
        let facts = THINGS.iter().map(|thing| needle(NAMES[0], thing).fact());
        let questions = NAMES.iter().map(|name| needle(name, THINGS[0]).question());
        let hay = HAY.iter().map(|sentence| sentence.to_string());
        let mut all: Vec<String> =
            facts.chain(questions).chain(hay).flat_map(|text| words_and_marks(&text)).collect();
        all.sort();
        all.dedup();
        all
    }

    #[test]
    fn lengths_are_those_of_tokens() {
        let files = files(1);
        let texts: Vec<String> =
            files["needle-pages.jsonl"].iter().map(|page| text(page, "text").to_string()).collect();
        let settings = TokenizerConfig {
            vocab_size: Some(576),
            require_single: vocabulary(),
            ..TokenizerConfig::default()
        };
        let tokenizer = Tokenizer::train(&settings, &texts).unwrap();
        let tokens = |text: &str| tokenizer.encode_text(text).len();
        let NeedleConfig { length, long_length, .. } = config();
        for (file, longest) in
            [("needle-pages.jsonl", length), ("needle-long-pages.jsonl", long_length)]
        {
            let counts: Vec<usize> =
                files[file].iter().map(|page| tokens(text(page, "text")) + 1).collect();
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(*most <= longest && *most + 16 > longest, "{file}: {most}");
            assert!(*least < longest / 2, "{file}: {least}");
        }
        for (file, length) in [("needle.jsonl", length), ("needle-long.jsonl", long_length)] {
            for line in &files[file] {
                let answer = format!(" {}", text(line, "answer"));
                assert_eq!(tokens(text(line, "prompt")) + tokens(&answer) + 1, length, "{file}");
            }
        }
    }

    #[test]
    fn every_page_answers_its_question_with_what_it_told_once() {
        for page in &files(1)["needle-pages.jsonl"] {
            let page = text(page, "text");
            let (told, asked) = page.split_once(" What did ").unwrap();
            let (name, thing) = asked.split_once(" hide? The ").unwrap();
            assert_eq!(told.matches(&format!(" {name} hid the {thing}.")).count(), 1, "{page}");
            assert_eq!(told.matches(&format!(" {name} ")).count(), 1, "{page}");
            assert!((1..=4).contains(&told.matches(" hid the ").count()), "{page}");
        }
    }

    #[test]
    fn prompts_have_one_fact_and_are_the_same_for_every_seed_and_pages_are_not() {
        let (one, other) = (files(1), files(2));
        for file in ["needle.jsonl", "needle-long.jsonl"] {
            assert_eq!(one[file], other[file]);
            assert!(
                one[file].iter().all(|line| text(line, "prompt").matches(" hid ").count() == 1)
            );
        }
        assert_eq!(one, files(1));
        assert_ne!(one["needle-pages.jsonl"], other["needle-pages.jsonl"]);
        assert_ne!(one["needle-pages.jsonl"][..100], one["needle-long-pages.jsonl"][..]);
    }

    #[test]
    fn the_shortest_length_is_the_one_that_the_config_asks_for() {
        let needles = Needle::draw(2, &mut draws(1, 0, 0));
        assert_eq!(words_and_marks(&needles[0].fact()).len(), FACT);
        assert_eq!(words_and_marks(&needles[0].question()).len(), QUESTION);
        assert_eq!(words_and_marks(&needles[0].answer()).len() + 1, ANSWER);
        let config = NeedleConfig { facts: 2, ..config() };
        assert_eq!(config.shortest(), 2 * FACT + QUESTION + ANSWER);
        assert_eq!(
            words_and_marks(&written(&needles, config.shortest(), 0.5, &mut draws(1, 0, 1))).len()
                + ANSWER,
            config.shortest()
        );
    }
}
