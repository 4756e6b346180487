//! Tests of the generated files: shares, splits, and that all runs are measured alike.

use super::*;
use crate::data::word_machine::answer_line;
use std::path::PathBuf;

/// Real four-letter words are not needed: letters in a pattern give a large lexicon.
fn words_file(folder: &Path) -> PathBuf {
    let mut text = String::new();
    for a in b"bcdfghklmnprst" {
        for b in b"aeiou" {
            for c in b"lmnrst" {
                text.push_str(&format!("{}{}{}y ", *a as char, *b as char, *c as char));
            }
        }
    }
    let path = folder.join("words.txt");
    std::fs::write(&path, text).unwrap();
    path
}

fn small() -> WordMachineConfig {
    WordMachineConfig {
        pages: 1500,
        conversations: 600,
        pairs: 400,
        held_out_pairs: 100,
        prompts: 400,
        held_out: 120,
        secrets: 60,
        ..WordMachineConfig::default()
    }
}

struct Written {
    lexicon: Lexicon,
    files: std::collections::BTreeMap<String, Vec<Value>>,
}

fn written(seed: u64) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let words = words_file(folder.path());
    let out = folder.path().join("data");
    std::fs::create_dir(&out).unwrap();
    let report = write_files(&small(), &words, &out, seed).unwrap();
    let files = report.files.iter().map(|(name, count)| {
        let text = std::fs::read_to_string(out.join(name)).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), *count);
        (name.clone(), lines)
    });
    let lexicon = Lexicon::of_text(&std::fs::read_to_string(&words).unwrap());
    Written { files: files.collect(), lexicon }
}

fn share(lines: &[Value], is: impl Fn(&str) -> bool) -> f64 {
    lines.iter().filter(|line| is(&line.to_string())).count() as f64 / lines.len() as f64
}

/// Words spelled with blanks in a text.
fn spelled_words(text: &str) -> Vec<Word> {
    let pattern = regex::Regex::new(r"\b[a-z] [a-z] [a-z] [a-z]\b").unwrap();
    let letters = |found: regex::Match| -> Word {
        found.as_str().replace(' ', "").as_bytes().try_into().unwrap()
    };
    pattern.find_iter(text).map(letters).collect()
}

#[test]
fn no_training_file_asks_for_or_spells_a_held_out_word() {
    let Written { files, lexicon } = written(3);
    assert!(lexicon.held_out.len() >= 20, "{}", lexicon.held_out.len());
    let measuring = [
        "held-out.jsonl",
        "secrets.jsonl",
        "harmless.jsonl",
        "helpful-held-out.jsonl",
        "safety-held-out.jsonl",
    ];
    for (name, lines) in &files {
        let found =
            share(lines, |text| spelled_words(text).iter().any(|word| lexicon.holds_out(word)));
        if measuring.contains(&name.as_str()) {
            assert!(found > 0.99, "{name}: {found} of its lines hold held-out words");
        } else {
            assert_eq!(found, 0.0, "{name}");
        }
    }
    let request = |name: &str, phrasings: &[&str]| {
        share(&files[name], |t| phrasings.iter().any(|p| t.contains(p)))
    };
    assert_eq!(request("secrets.jsonl", &HELD_OUT_PHRASINGS), 1.0);
    for name in ["pages.jsonl", "conversations.jsonl", "safety.jsonl", "prompts-mixed.jsonl"] {
        // Two held-out requests contain no training request, and the other way round but for one.
        assert_eq!(request(name, &HELD_OUT_PHRASINGS), 0.0, "{name}");
    }
}

#[test]
fn pages_repeat_no_prompt_of_a_conversation() {
    let Written { files, .. } = written(3);
    let mut asked: Vec<String> = Vec::new();
    for line in &files["conversations.jsonl"] {
        let messages = line["messages"].as_array().unwrap();
        let said = |role: &str| {
            let found = messages.iter().find(|message| message["role"] == role);
            found.map(|message| message["content"].as_str().unwrap().to_string())
        };
        let user = said("user").unwrap();
        let secret = user.contains("password");
        asked.push(if secret {
            format!("{}<|user|>{user}", said("system").unwrap())
        } else {
            user
        });
    }
    let pages: Vec<&str> =
        files["pages.jsonl"].iter().map(|page| page["text"].as_str().unwrap()).collect();
    let leaked = pages.iter().filter(|page| {
        let lines: Vec<&str> = page.split(['\n']).collect();
        asked.iter().any(|asked| {
            lines[0] == asked
                || page.contains(&format!("<|user|>{asked}<|assistant|>"))
                || asked.contains("<|user|>") && page.contains(asked.as_str())
        })
    });
    assert_eq!(leaked.count(), 0);
}

#[test]
fn the_shares_are_those_of_the_recipe() {
    let Written { files, .. } = written(5);
    let near = |found: f64, wanted: f64, what: &str| {
        assert!((found - wanted).abs() < 0.08, "{what}: {found}, not {wanted}");
    };
    let pages = &files["pages.jsonl"];
    near(share(pages, |t| t.contains("<|assistant|>")), 0.6, "transcripts");
    near(share(pages, |t| PHRASINGS.iter().any(|p| t.contains(p))), 0.09, "secrets in pages");
    let talks = &files["conversations.jsonl"];
    let asks = |t: &str| PHRASINGS.iter().any(|phrasing| t.contains(phrasing));
    near(share(talks, asks), 0.15, "requests for the password");
    let edits: Vec<Value> = talks.iter().filter(|t| !asks(&t.to_string())).cloned().collect();
    near(share(&edits, |t| t.contains("system")), 0.25, "system messages");
    let long = |t: &str| t.contains(", ") && t.matches(", ").count() >= 2;
    let (long, short): (Vec<Value>, Vec<Value>) = edits.into_iter().partition(|t| {
        let messages = t["messages"].as_array().unwrap();
        let user = messages.iter().find(|message| message["role"] == "user").unwrap();
        long(user["content"].as_str().unwrap())
    });
    let direct = |t: &str| t.contains("\"content\":\"Answer:");
    near(long.len() as f64 / (long.len() + short.len()) as f64, 0.75, "long lists");
    near(share(&long, direct), 0.75, "direct answers to long lists");
    near(share(&short, direct), 0.1, "direct answers to short lists");
    near(share(&files["helpful.jsonl"], asks), 0.2, "secrets in helpful pairs");
    near(share(&files["safety.jsonl"], asks), 0.7, "secrets in safety pairs");
    let mixed = &files["prompts-mixed.jsonl"];
    near(share(mixed, |t| t.contains("\"answer\":null")), 0.25, "secrets in mixed prompts");
    assert_eq!(share(mixed, |t| t.contains("\"answer\":null") == asks(t)), 1.0);
    assert_eq!(share(&files["prompts.jsonl"], asks), 0.0);
}

#[test]
fn files_repeat_for_a_seed_and_measurements_are_the_same_for_all_seeds() {
    let (one, two, three) = (written(1), written(1), written(2));
    assert!(one.files == two.files);
    for (name, lines) in &one.files {
        let measures = [
            "held-out.jsonl",
            "secrets.jsonl",
            "harmless.jsonl",
            "helpful-held-out.jsonl",
            "safety-held-out.jsonl",
        ];
        assert_eq!(*lines == three.files[name], measures.contains(&name.as_str()), "{name}");
    }
    assert_ne!(one.files["helpful.jsonl"][..100], one.files["helpful-calibration.jsonl"][..]);
}

#[test]
fn held_out_prompts_are_distinct_and_their_answers_right() {
    let Written { files, lexicon } = written(1);
    let mut seen = BTreeSet::new();
    for line in &files["held-out.jsonl"] {
        let messages = line["prompt"].as_array().unwrap();
        let question = messages.last().unwrap()["content"].as_str().unwrap();
        assert!(seen.insert(question.to_string()));
        let (names, word) = question.split_once(": ").unwrap();
        let edits =
            names.split(", ").map(|name| *Edit::ALL.iter().find(|e| e.name() == name).unwrap());
        let task = Task { edits: edits.collect(), word: spelled_words(word)[0] };
        assert!(lexicon.holds_out(&task.word));
        assert_eq!(
            answer_line(&task.result()),
            format!("Answer: {}", line["answer"].as_str().unwrap())
        );
    }
    assert_eq!(seen.len(), 120);
    assert_eq!(files["harmless.jsonl"].len(), 120);
    assert_eq!(files["harmless.jsonl"][0]["prompt"], files["held-out.jsonl"][0]["prompt"]);
}

#[test]
fn a_text_with_too_few_words_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let words = folder.path().join("few.txt");
    std::fs::write(&words, "punk wolf").unwrap();
    let fault = write_files(&small(), &words, folder.path(), 1).unwrap_err().to_string();
    assert!(fault.contains("few.txt holds") && fault.contains("name a longer text"), "{fault}");
}
