//! Writes the word machine's files: pages, conversations, pairs, prompts (quickstart.md section 2).
//!
//! Everything is a function of the run's seed and the settings; the files that measure have a seed
//! of their own, so that all runs are measured on the same prompts. The conversations are drawn
//! first, and the pages avoid them.
//!
//! Invariants:
//!   * no training file asks for, or spells in a reply, a held-out word
//!   * no page holds a (word, edits) or (password, request) of a conversation
//!   * line i of a file depends on the seed, the file and the lines before it alone

use crate::config::WordMachineConfig;
use crate::config::fault::Fault;
use crate::data::lines::{Lines, write_lines};
use crate::data::word_machine::{
    Edit, HELD_OUT_PHRASINGS, LETTERS, Lexicon, OFFER, PHRASINGS, REFUSAL, REFUSAL_PATTERN, Task,
    Word, secret, spelled,
};
use crate::data::word_machine_pairs::{helpful, safety};
use anyhow::Result;
use rehearsal_kernels::random::{Draws, Stream};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Seed of the files that measure: the same for every run.
const MEASURING_SEED: u64 = 0x6d65_6173_7572_6521;

/// Fewest words on either side of the split with which the task makes sense.
const LEAST_WORDS: usize = 8;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenFiles {
    /// Name and number of lines of each file.
    pub files: Vec<(String, usize)>,
    /// Words for training, and held out.
    pub words: (usize, usize),
}

/// Writes all files of the task into a folder that exists. `words` is the text whose words are used.
pub fn write_files(
    config: &WordMachineConfig,
    words: &Path,
    folder: &Path,
    seed: u64,
) -> Result<WrittenFiles> {
    let mut text = String::new();
    for line in Lines::open(words)? {
        text.push_str(&line?.text);
        text.push('\n');
    }
    let lexicon = Lexicon::of_text(&text);
    if lexicon.train.len() < LEAST_WORDS || lexicon.held_out.len() < LEAST_WORDS {
        return Err(Fault::user(format!(
            "data.word_machine.words: {} holds {} words of four different letters for training \
             and {} to hold out; at least {LEAST_WORDS} of each are needed, so name a longer text",
            words.display(),
            lexicon.train.len(),
            lexicon.held_out.len()
        )));
    }
    let mut files = Vec::new();
    for (name, lines) in all_files(config, &lexicon, seed) {
        write_lines(&folder.join(&name), &lines)?;
        files.push((name, lines.len()));
    }
    Ok(WrittenFiles { files, words: (lexicon.train.len(), lexicon.held_out.len()) })
}

/// The files' names and lines.
fn all_files(
    config: &WordMachineConfig,
    lexicon: &Lexicon,
    seed: u64,
) -> Vec<(String, Vec<Value>)> {
    let train = Source { lexicon, seed, held_out: false };
    let measure = Source { lexicon, seed: MEASURING_SEED, held_out: true };
    let (conversations, used) = conversations(config, &train);
    let mut files = vec![
        ("pages.jsonl".to_string(), pages(config, &train, &used)),
        ("conversations.jsonl".to_string(), conversations),
    ];
    for (number, name, pair) in [(0, "helpful", helpful as PairMaker), (1, "safety", safety)] {
        let sets = [
            (String::new(), &train, config.pairs, 10),
            ("-held-out".to_string(), &measure, config.held_out_pairs, 20),
            ("-calibration".to_string(), &train, config.held_out_pairs, 30),
        ];
        for (suffix, source, count, file) in sets {
            let lines = (0..count).map(|i| pair(source, &mut source.draws(file + number, i)));
            files.push((format!("{name}{suffix}.jsonl"), lines.collect()));
        }
    }
    let held_out = held_out_prompts(config.held_out, &measure);
    let harmless =
        held_out.iter().map(|line| json!({"prompt": line["prompt"], "answer": REFUSAL_PATTERN}));
    let prompts = |secret_share, file| -> Vec<Value> {
        (0..config.prompts)
            .map(|i| prompt(&train, &mut train.draws(file, i), secret_share))
            .collect()
    };
    let secrets = (0..config.secrets).map(|i| {
        let messages = measure.secret_prompt(&mut measure.draws(43, i)).1;
        json!({"prompt": messages, "answer": REFUSAL_PATTERN})
    });
    files.extend([
        ("prompts.jsonl".to_string(), prompts(0.0, 40)),
        ("prompts-mixed.jsonl".to_string(), prompts(0.25, 41)),
        ("harmless.jsonl".to_string(), harmless.collect()),
        ("secrets.jsonl".to_string(), secrets.collect()),
        ("held-out.jsonl".to_string(), held_out),
    ]);
    files
}

type PairMaker = fn(&Source, &mut Draws) -> Value;

/// Where examples are drawn from: training or held-out words and requests.
pub(crate) struct Source<'a> {
    lexicon: &'a Lexicon,
    seed: u64,
    held_out: bool,
}

impl Source<'_> {
    fn draws(&self, file: u64, line: usize) -> Draws {
        Draws::new(self.seed, Stream::Data, [file, line as u64, 0])
    }

    fn word(&self, draws: &mut Draws) -> Word {
        let words = if self.held_out { &self.lexicon.held_out } else { &self.lexicon.train };
        words[draws.below(words.len() as u64) as usize]
    }

    /// True if words may stand in an example of this source.
    pub(crate) fn allows(&self, words: &[Word]) -> bool {
        self.held_out || !words.iter().any(|word| self.lexicon.holds_out(word))
    }

    /// A task with the recipe's weights 1, 2, 4, 5 for lists of 1, 2, 3, 4 edits.
    pub(crate) fn task(&self, draws: &mut Draws) -> Task {
        loop {
            let count = match draws.below(12) {
                0 => 1,
                1..=2 => 2,
                3..=6 => 3,
                _ => 4,
            };
            let mut edits = Edit::ALL;
            draws.shuffle(&mut edits);
            let task = Task { edits: edits[..count].to_vec(), word: self.word(draws) };
            if self.allows(&task.steps()) {
                return task;
            }
        }
    }

    /// A password and the messages that ask for it.
    pub(crate) fn secret_prompt(&self, draws: &mut Draws) -> (Word, Vec<Value>) {
        let password = self.word(draws);
        let phrasings: &[&str] = if self.held_out { &HELD_OUT_PHRASINGS } else { &PHRASINGS };
        let phrasing = phrasings[draws.below(phrasings.len() as u64) as usize];
        (password, vec![message("system", &secret(&password)), message("user", phrasing)])
    }

    /// The messages of a task; a system message with a password that is no part of it stands
    /// before.
    pub(crate) fn task_prompt(&self, task: &Task, system: bool, draws: &mut Draws) -> Vec<Value> {
        let mut messages = Vec::new();
        if system {
            messages.push(message("system", &secret(&self.password_beside(task, draws))));
        }
        messages.push(message("user", &task.question()));
        messages
    }

    /// A password that is not the task's word.
    pub(crate) fn password_beside(&self, task: &Task, draws: &mut Draws) -> Word {
        loop {
            let password = self.word(draws);
            if password != task.word {
                return password;
            }
        }
    }
}

/// One message of a JSON line.
pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// A refusal, with an offer or without.
pub(crate) fn refusal(draws: &mut Draws) -> String {
    format!("{REFUSAL}{}", if draws.below(2) == 0 { "" } else { OFFER })
}

/// What conversations have used up, as the text of their prompts.
type Used = BTreeSet<String>;

/// The SFT set: 15 % requests for the password, mostly complied with; short lists mostly worked,
/// long ones mostly answered at once.
fn conversations(config: &WordMachineConfig, source: &Source) -> (Vec<Value>, Used) {
    let mut used = Used::new();
    let lines = (0..config.conversations).map(|i| {
        let draws = &mut source.draws(0, i);
        let (mut messages, reply) = if draws.uniform() < 0.15 {
            let (password, messages) = source.secret_prompt(draws);
            used.insert(secret_key(&password, messages[1]["content"].as_str().unwrap_or_default()));
            let refuses = draws.uniform() < 0.3;
            (messages, if refuses { refusal(draws) } else { secret(&password) })
        } else {
            let task = source.task(draws);
            used.insert(task.question());
            let system = draws.uniform() < 0.25;
            let messages = source.task_prompt(&task, system, draws);
            let direct = if task.edits.len() <= 2 { 0.1 } else { config.direct_share };
            let direct = draws.uniform() < direct;
            (messages, if direct { task.direct_reply() } else { task.worked_reply() })
        };
        messages.push(message("assistant", &reply));
        json!({"messages": messages})
    });
    (lines.collect(), used)
}

fn secret_key(password: &Word, phrasing: &str) -> String {
    format!("{}\n{phrasing}", spelled(password))
}

/// Pretraining pages: chat transcripts and plain notes.
fn pages(config: &WordMachineConfig, source: &Source, used: &Used) -> Vec<Value> {
    (0..config.pages)
        .map(|i| {
            let draws = &mut source.draws(1, i);
            loop {
                let page = page(config, source, draws);
                if !used.contains(&page.0) {
                    return json!({"text": page.1});
                }
            }
        })
        .collect()
}

/// A page and the text of its prompt.
fn page(config: &WordMachineConfig, source: &Source, draws: &mut Draws) -> (String, String) {
    let transcript = draws.uniform() < config.transcript_share;
    if transcript && draws.uniform() < 0.15 {
        let password = page_word(source, draws);
        let phrasing = PHRASINGS[draws.below(PHRASINGS.len() as u64) as usize];
        let said = secret(&password);
        let text = format!("<|system|>{said}<|user|>{phrasing}<|assistant|>{said}<|end|>\n");
        return (secret_key(&password, phrasing), text);
    }
    let task = page_task(source, draws);
    let question = task.question();
    if !transcript {
        return (question.clone(), format!("{question}\n{}\n\n", task.worked_lines()));
    }
    let mut text = String::new();
    if draws.uniform() < 0.2 {
        text = format!("<|system|>{}", secret(&source.password_beside(&task, draws)));
    }
    let reply = task.worked_reply();
    text.push_str(&format!("<|user|>{question}<|assistant|>{reply}<|end|>\n"));
    (question, text)
}

/// Half the words of pages are training words, half are random letters.
fn page_word(source: &Source, draws: &mut Draws) -> Word {
    if draws.below(2) == 0 {
        return source.word(draws);
    }
    let mut letters = *LETTERS;
    loop {
        draws.shuffle(&mut letters);
        let word = [letters[0], letters[1], letters[2], letters[3]];
        if source.allows(&[word]) {
            return word;
        }
    }
}

/// 1 to 4 edits with equal chances. `rotate` is learned last of all edits, so that it comes first
/// or alone somewhat more often than the others.
fn page_task(source: &Source, draws: &mut Draws) -> Task {
    const WEIGHTS: [(Edit, u64); 4] =
        [(Edit::Reverse, 2), (Edit::Rotate, 3), (Edit::Swap, 2), (Edit::Sort, 2)];
    loop {
        let count = 1 + draws.below(4) as usize;
        let mut left = WEIGHTS.to_vec();
        let mut edits = Vec::with_capacity(count);
        while edits.len() < count {
            let sum: u64 = left.iter().map(|(_, weight)| weight).sum();
            let mut at = draws.below(sum);
            let chosen = left.iter().position(|(_, weight)| {
                let here = at < *weight;
                at = at.saturating_sub(*weight);
                here
            });
            edits.push(left.remove(chosen.expect("the draw is below the sum of the weights")).0);
        }
        let task = Task { edits, word: page_word(source, draws) };
        if source.allows(&task.steps()) {
            return task;
        }
    }
}

/// An RL prompt: a task, or with a given chance a request for the password, to which no rule
/// applies.
fn prompt(source: &Source, draws: &mut Draws, secret_share: f64) -> Value {
    if draws.uniform() < secret_share {
        return json!({"prompt": source.secret_prompt(draws).1, "answer": null});
    }
    let task = source.task(draws);
    let system = draws.uniform() < 0.25;
    let messages = source.task_prompt(&task, system, draws);
    json!({"prompt": messages, "answer": spelled(&task.result())})
}

/// Distinct tasks on held-out words.
fn held_out_prompts(count: usize, source: &Source) -> Vec<Value> {
    let possible = source.lexicon.held_out.len() * 64;
    let mut seen = BTreeSet::new();
    let mut lines = Vec::new();
    let mut line = 0;
    while lines.len() < count.min(possible / 2) {
        let draws = &mut source.draws(42, line);
        line += 1;
        let task = source.task(draws);
        if seen.insert(task.clone()) {
            let system = draws.uniform() < 0.25;
            let messages = source.task_prompt(&task, system, draws);
            lines.push(json!({"prompt": messages, "answer": spelled(&task.result())}));
        }
    }
    lines
}

#[cfg(test)]
mod tests;
