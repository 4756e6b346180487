//! Records of a data set: JSONL in four schemas, or plain text cut into documents.
//!
//! Knows no tokens. Reads one line at a time; a set of any size costs one record of memory.
//!
//! Invariants:
//!   * every line that belongs to the set is valid or the reading ends with its file and line
//!   * a record's index is its line's (or document's) in the whole file, also under a split

use crate::config::data::{FieldMap, Schema, SetConfig, Split};
use crate::config::fault::Fault;
use crate::data::chat::{Message, Role};
use crate::data::lines::{Line, Lines, fault_at};
use anyhow::Result;
use serde_json::{Map, Value};
use std::path::Path;

/// What one line of a set says.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A document.
    Text(String),
    /// A conversation.
    Messages(Vec<Message>),
    /// A prompt with a better and a worse reply.
    Preference {
        /// What is answered.
        prompt: PromptText,
        /// The better reply.
        chosen: String,
        /// The other one.
        rejected: String,
    },
    /// A prompt with what a verifier compares with.
    Prompt {
        /// What is answered.
        prompt: PromptText,
        /// Absent where no rule applies.
        answer: Option<String>,
    },
}

/// A prompt as it stands in a file.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptText {
    /// Taken as it is, special tokens included.
    Raw(String),
    /// Rendered through the chat template.
    Chat(Vec<Message>),
}

/// A record and its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// Line (or document) of the file, from 0.
    pub index: u64,
    /// What it says.
    pub record: Record,
}

/// An iterator over the records of a set.
pub struct Records {
    lines: Lines,
    set: SetConfig,
    next_document: u64,
    /// The `chosen` of the line before, under `rejected_from_previous_line`.
    previous: Option<String>,
}

impl Records {
    /// Opens the set's file at `path`.
    pub fn open(path: &Path, set: &SetConfig) -> Result<Records> {
        Ok(Records {
            lines: Lines::open(path)?,
            set: set.clone(),
            next_document: 0,
            previous: None,
        })
    }

    fn belongs(&self, index: u64) -> bool {
        within(self.set.split, index)
    }

    fn next_line(&mut self) -> Option<Result<Located>> {
        loop {
            let line = match self.lines.next()? {
                Ok(line) => line,
                Err(error) => return Some(Err(error)),
            };
            let belongs = self.belongs(line.index);
            if self.set.rejected_from_previous_line {
                match self.pair(&line) {
                    Ok(None) => {}
                    Ok(Some(located)) if belongs => return Some(Ok(located)),
                    Ok(Some(_)) => {}
                    Err(error) => return Some(Err(error)),
                }
            } else if belongs {
                return Some(parse(self.lines.path(), &self.set, &line));
            }
        }
    }

    /// The line's reply as the chosen one, the reply of the line before as the rejected one.
    fn pair(&mut self, line: &Line) -> Result<Option<Located>> {
        let located = parse(self.lines.path(), &self.set, line)?;
        let Record::Preference { prompt, chosen, .. } = located.record else {
            unreachable!("validation allows it for preferences only")
        };
        let record = self.previous.replace(chosen.clone()).map(|rejected| Record::Preference {
            prompt,
            chosen,
            rejected,
        });
        Ok(record.map(|record| Located { index: located.index, record }))
    }

    /// Paragraphs are gathered until they hold the wanted bytes; a paragraph is never cut.
    fn next_text(&mut self) -> Option<Result<Located>> {
        loop {
            let mut text = String::new();
            let mut ended = true;
            for line in self.lines.by_ref() {
                let line = match line {
                    Ok(line) => line,
                    Err(error) => return Some(Err(error)),
                };
                let blank = line.text.trim().is_empty();
                if blank && text.len() >= self.set.plain_text_bytes {
                    ended = false;
                    break;
                }
                if !(blank && text.is_empty()) {
                    text.push_str(&line.text);
                    text.push('\n');
                }
            }
            if ended && text.trim().is_empty() {
                return None;
            }
            let index = self.next_document;
            self.next_document += 1;
            if self.belongs(index) {
                return Some(Ok(Located { index, record: Record::Text(text) }));
            }
        }
    }
}

impl Iterator for Records {
    type Item = Result<Located>;

    fn next(&mut self) -> Option<Result<Located>> {
        if self.set.plain_text_bytes > 0 { self.next_text() } else { self.next_line() }
    }
}

/// Reads every line of a set's file and counts the set's examples; the first fault ends it.
pub fn check_set(path: &Path, set: &SetConfig) -> Result<u64> {
    let whole = SetConfig { split: None, ..set.clone() };
    let mut count = 0;
    for located in Records::open(path, &whole)? {
        count += u64::from(within(set.split, located?.index));
    }
    if count == 0 {
        let reason = if set.split.is_some() { "no example in its split" } else { "no example" };
        return Err(Fault::user(format!("{}: holds {reason}", path.display())));
    }
    Ok(count)
}

fn within(split: Option<Split>, index: u64) -> bool {
    split.is_none_or(|split| {
        let residue = index % split.of.max(1) as u64;
        (split.from as u64..split.to as u64).contains(&residue)
    })
}

/// Every string that a record holds, for training a tokenizer.
pub fn strings(record: Record) -> Vec<String> {
    let of_prompt = |prompt| match prompt {
        PromptText::Raw(text) => vec![text],
        PromptText::Chat(messages) => messages.into_iter().map(|m| m.content).collect(),
    };
    match record {
        Record::Text(text) => vec![text],
        Record::Messages(messages) => of_prompt(PromptText::Chat(messages)),
        Record::Preference { prompt, chosen, rejected } => {
            let mut all = of_prompt(prompt);
            all.extend([chosen, rejected]);
            all
        }
        Record::Prompt { prompt, answer } => {
            let mut all = of_prompt(prompt);
            all.extend(answer);
            all
        }
    }
}

/// Parses one line of a JSONL file.
pub fn parse(path: &Path, set: &SetConfig, line: &Line) -> Result<Located> {
    if line.text.trim().is_empty() {
        let reason = "the line is empty; every line must hold one JSON object";
        return Err(fault_at(path, line.index, reason));
    }
    let value: Value = serde_json::from_str(&line.text).map_err(|error| {
        // The line of a JSONL file is one JSON text, so that only the column means something.
        let text = error.to_string();
        let cause = text.split(" at line ").next().unwrap_or(&text).to_string();
        let place = format!("{}:{}:{}", path.display(), line.index + 1, error.column().max(1));
        Fault::user(format!("{place}: malformed JSON: {cause}"))
    })?;
    let Value::Object(object) = value else {
        let reason = format!("expected a JSON object, found {}", kind(&value));
        return Err(fault_at(path, line.index, &reason));
    };
    let record = Fields { object, map: &set.fields, set }
        .record()
        .map_err(|reason| fault_at(path, line.index, &reason))?;
    Ok(Located { index: line.index, record })
}

/// One JSON object under the set's names.
struct Fields<'a> {
    object: Map<String, Value>,
    map: &'a FieldMap,
    set: &'a SetConfig,
}

impl Fields<'_> {
    fn record(&self) -> Result<Record, String> {
        let name =
            |mapped: &Option<String>, own: &str| mapped.clone().unwrap_or_else(|| own.to_string());
        Ok(match self.set.schema {
            Schema::Text => Record::Text(self.string(&name(&self.map.text, "text"))?),
            Schema::Messages => {
                Record::Messages(self.messages(&name(&self.map.messages, "messages"))?)
            }
            Schema::Preferences => Record::Preference {
                prompt: self.prompt(&name(&self.map.prompt, "prompt"))?,
                chosen: self.string(&name(&self.map.chosen, "chosen"))?,
                rejected: match self.set.rejected_from_previous_line {
                    true => String::new(),
                    false => self.string(&name(&self.map.rejected, "rejected"))?,
                },
            },
            Schema::Prompts => {
                let answer = name(&self.map.answer, "answer");
                Record::Prompt {
                    prompt: self.prompt(&name(&self.map.prompt, "prompt"))?,
                    answer: match self.object.get(&answer) {
                        None | Some(Value::Null) => None,
                        Some(_) => Some(self.string(&answer)?),
                    },
                }
            }
        })
    }

    fn get(&self, name: &str) -> Result<&Value, String> {
        self.object.get(name).ok_or_else(|| {
            let found: Vec<String> = self.object.keys().map(|key| format!("`{key}`")).collect();
            let found = if found.is_empty() { "nothing".to_string() } else { found.join(", ") };
            format!(
                "field `{name}` is missing (the line has {found}); rename it in the file, or in a run's TOML name the \
                 other one in `fields` of the set"
            )
        })
    }

    fn string(&self, name: &str) -> Result<String, String> {
        match self.get(name)? {
            Value::String(text) => Ok(text.clone()),
            other => Err(format!("field `{name}` must be a string, found {}", kind(other))),
        }
    }

    fn prompt(&self, name: &str) -> Result<PromptText, String> {
        match self.get(name)? {
            Value::String(text) if self.set.chat => {
                Ok(PromptText::Chat(vec![Message::new(Role::User, text)]))
            }
            Value::String(text) => Ok(PromptText::Raw(text.clone())),
            Value::Array(_) => self.messages(name).map(PromptText::Chat),
            other => Err(format!(
                "field `{name}` must be a string or a list of messages, found {}",
                kind(other)
            )),
        }
    }

    fn messages(&self, name: &str) -> Result<Vec<Message>, String> {
        let Value::Array(items) = self.get(name)? else {
            let found = kind(&self.object[name]);
            return Err(format!("field `{name}` must be a list of messages, found {found}"));
        };
        if items.is_empty() {
            return Err(format!("field `{name}` holds no message"));
        }
        items
            .iter()
            .enumerate()
            .map(|(i, item)| message(item).map_err(|reason| format!("{name}[{i}]: {reason}")))
            .collect()
    }
}

fn message(item: &Value) -> Result<Message, String> {
    let text = |key: &str| match item.get(key) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("`{key}` must be a string, found {}", kind(other))),
        None => Err(format!("`{key}` is missing; a message is {{\"role\", \"content\"}}")),
    };
    let role = Role::parse(text("role")?)?;
    Ok(Message::new(role, text("content")?))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(schema: Schema) -> SetConfig {
        SetConfig {
            file: String::new(),
            schema,
            fields: FieldMap::default(),
            chat: false,
            plain_text_bytes: 0,
            rejected_from_previous_line: false,
            split: None,
        }
    }

    fn read(text: &str, set: &SetConfig) -> Result<Vec<Located>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.jsonl");
        std::fs::write(&path, text).unwrap();
        let records: Result<Vec<Located>> = Records::open(&path, set)?.collect();
        let counted = check_set(&path, set);
        match &records {
            Ok(records) if !records.is_empty() => {
                assert_eq!(counted.unwrap(), records.len() as u64)
            }
            _ => assert!(counted.is_err()),
        }
        records
    }

    #[test]
    fn every_schema_is_read_under_its_own_and_under_mapped_names() {
        let text = read("{\"text\": \"a\"}\n", &set(Schema::Text)).unwrap();
        assert_eq!(text[0].record, Record::Text("a".to_string()));
        let line = r#"{"messages": [{"role": "user", "content": "q"},
            {"role": "assistant", "content": "r", "x": 1}]}"#
            .replace('\n', " ");
        let talk = read(&line, &set(Schema::Messages)).unwrap();
        let expected = vec![Message::new(Role::User, "q"), Message::new(Role::Assistant, "r")];
        assert_eq!(talk[0].record, Record::Messages(expected));
        let mut mapped = set(Schema::Prompts);
        mapped.fields.prompt = Some("question".to_string());
        mapped.fields.answer = Some("solution".to_string());
        let lines = "{\"question\": \"1+1\", \"solution\": \"2\"}\n\
            {\"question\": \"?\", \"solution\": null}\n";
        let prompts = read(lines, &mapped).unwrap();
        let raw = |text: &str| PromptText::Raw(text.to_string());
        assert_eq!(
            prompts[0].record,
            Record::Prompt { prompt: raw("1+1"), answer: Some("2".to_string()) }
        );
        assert_eq!(prompts[1].record, Record::Prompt { prompt: raw("?"), answer: None });
        mapped.chat = true;
        let user = PromptText::Chat(vec![Message::new(Role::User, "1+1")]);
        let prompts = read(lines, &mapped).unwrap();
        assert_eq!(prompts[0].record, Record::Prompt { prompt: user, answer: Some("2".into()) });
        let pair = read(
            "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}",
            &set(Schema::Preferences),
        );
        assert_eq!(strings(pair.unwrap().remove(0).record), ["p", "c", "r"]);
    }

    #[test]
    fn a_reply_is_preferred_to_the_one_of_the_line_before() {
        let text: String =
            (0..5).map(|i| format!("{{\"prompt\": \"p{i}\", \"chosen\": \"c{i}\"}}\n")).collect();
        let split = Some(Split { of: 2, from: 0, to: 1 });
        let with = |split| SetConfig {
            rejected_from_previous_line: true,
            split,
            ..set(Schema::Preferences)
        };
        let pairs = |split| {
            let found = read(&text, &with(split)).unwrap();
            found.into_iter().map(|l| strings(l.record).join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(pairs(None), ["p1 c1 c0", "p2 c2 c1", "p3 c3 c2", "p4 c4 c3"]);
        assert_eq!(pairs(split), ["p2 c2 c1", "p4 c4 c3"]);
    }

    #[test]
    fn a_fault_names_file_line_and_reason() {
        let cases = [
            (Schema::Text, "{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n", ":2: the line is empty"),
            (Schema::Text, "{\"text\": \"a\"}\n{\"text\": \n", ":2:9: malformed JSON: EOF"),
            (Schema::Text, "[1]\n", ":1: expected a JSON object, found a list"),
            (
                Schema::Text,
                "{\"txt\": \"a\"}\n",
                ":1: field `text` is missing (the line has `txt`)",
            ),
            (Schema::Text, "{\"text\": 3}\n", ":1: field `text` must be a string, found a number"),
            (Schema::Messages, "{\"messages\": []}\n", ":1: field `messages` holds no message"),
            (
                Schema::Messages,
                "{\"messages\": [{\"role\": \"usr\", \"content\": \"\"}]}\n",
                ":1: messages[0]: role \"usr\" is unknown",
            ),
            (
                Schema::Messages,
                "{\"messages\": [{\"role\": \"user\"}]}\n",
                ":1: messages[0]: `content` is missing",
            ),
            (Schema::Prompts, "{\"prompt\": 7}\n", ":1: field `prompt` must be a string or a list"),
            (
                Schema::Prompts,
                "{\"prompt\": \"a\", \"answer\": 4}\n",
                ":1: field `answer` must be a string, found a number",
            ),
        ];
        for (schema, text, expected) in cases {
            let found = read(text, &set(schema)).unwrap_err().to_string();
            assert!(found.contains("set.jsonl") && found.contains(expected), "{expected}: {found}");
        }
    }

    #[test]
    fn splits_of_one_file_are_disjoint_and_keep_the_line_numbers() {
        let text: String = (0..10).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
        let part = |from, to| {
            let split = Some(Split { of: 4, from, to });
            let found = read(&text, &SetConfig { split, ..set(Schema::Text) }).unwrap();
            assert!(found.iter().all(|l| l.record == Record::Text(l.index.to_string())));
            found.iter().map(|l| l.index).collect::<Vec<_>>()
        };
        assert_eq!(part(0, 3), [0, 1, 2, 4, 5, 6, 8, 9]);
        assert_eq!(part(3, 4), [3, 7]);
        let empty =
            SetConfig { split: Some(Split { of: 40, from: 30, to: 40 }), ..set(Schema::Text) };
        assert!(read(&text, &empty).unwrap().is_empty());
    }

    #[test]
    fn plain_text_is_cut_at_blank_lines_and_loses_nothing_but_them() {
        let text = "one\nline\n\ntwo\n\n\nthree is longer\n\nfour";
        let documents = |bytes| {
            let plain = SetConfig { plain_text_bytes: bytes, ..set(Schema::Text) };
            let records = read(text, &plain).unwrap();
            records.into_iter().flat_map(|l| strings(l.record)).collect::<Vec<_>>()
        };
        assert_eq!(documents(1), ["one\nline\n", "two\n", "three is longer\n", "four\n"]);
        assert_eq!(documents(10), ["one\nline\n\ntwo\n", "three is longer\n", "four\n"]);
        assert_eq!(documents(1000), ["one\nline\n\ntwo\n\n\nthree is longer\n\nfour\n"]);
    }
}
