//! A document as a tree in which every key and value knows its place.
//!
//! TOML, a model's JSON and `--set` all become the same [`Node`]s, so that one reader serves them and
//! a fault names the place it really came from. Knows no table of ours.
//!
//! Invariant: a table's keys are unique; their order is that of the source.

use super::limited::read_limited;
use serde_json::Value as Json;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where a key or value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a byte of a text; line and column are counted when it is shown.
    In(Arc<Text>, usize),
    /// In a file; line and column count from 1.
    At {
        /// The file as the user named it.
        file: Arc<str>,
        /// Line.
        line: usize,
        /// Column, in characters.
        column: usize,
    },
    /// A file that could not be read at all.
    File(Arc<str>),
    /// On the command line: the whole assignment of a `--set`.
    Set(Arc<str>),
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::In(text, offset) => {
                let (line, column) = text.line_column(*offset);
                write!(out, "{}:{line}:{column}", text.file)
            }
            Place::At { file, line, column } => write!(out, "{file}:{line}:{column}"),
            Place::File(file) => write!(out, "{file}"),
            Place::Set(assignment) => write!(out, "--set {assignment}"),
        }
    }
}

/// A wrong key or value, or a file that is no document at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {message}")]
pub struct ConfigError {
    /// Where.
    pub place: Place,
    /// What, which value, and what to do.
    pub message: String,
}

/// A value with its place.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where the value was written.
    pub place: Place,
    /// What it is.
    pub value: Value,
    /// True if unknown keys in here are carried over unread (a published config.json).
    pub lenient: bool,
}

/// What a node holds.
#[derive(Clone, Debug)]
pub enum Value {
    /// JSON's null: the same as an absent key.
    Null,
    /// true or false.
    Boolean(bool),
    /// A whole number.
    Integer(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A table.
    Table(Vec<Entry>),
}

/// A key of a table and its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key was written.
    pub place: Place,
    /// Its value.
    pub node: Node,
}

impl Node {
    /// The value of `key`, if this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// The entries of a table; none of anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Table(entries) => entries,
            _ => &[],
        }
    }

    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Removes a key and returns its entry.
    pub fn take(&mut self, key: &str) -> Option<Entry> {
        match &mut self.value {
            Value::Table(entries) => {
                let index = entries.iter().position(|entry| entry.key == key)?;
                Some(entries.remove(index))
            }
            _ => None,
        }
    }

    /// Sets a key, in place of an earlier value. Only for tables.
    pub fn put(&mut self, entry: Entry) {
        let Value::Table(entries) = &mut self.value else {
            unreachable!("put is called on tables")
        };
        match entries.iter_mut().find(|old| old.key == entry.key) {
            Some(old) => *old = entry,
            None => entries.push(entry),
        }
    }

    /// The value as a person wrote it, shortened.
    pub fn shown(&self) -> String {
        match &self.value {
            Value::Null => "null".to_string(),
            Value::Boolean(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Float(value) => format!("{value:?}"),
            Value::Text(text) => format!("{text:?}"),
            Value::List(_) => "[...]".to_string(),
            Value::Table(_) => "{...}".to_string(),
        }
    }

    /// What kind of value it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "null",
            Value::Boolean(_) => "a boolean",
            Value::Integer(_) => "a whole number",
            Value::Float(_) => "a number",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
        }
    }

    /// Place of the key at `path` (keys, or indices of lists), or of the nearest part of it that was written.
    pub fn place_of(&self, path: &[&str]) -> Place {
        let Some((first, rest)) = path.split_first() else { return self.place.clone() };
        match &self.value {
            Value::Table(entries) => match entries.iter().find(|entry| entry.key == *first) {
                // A key with a plain value is pointed at itself; a table's inside may say more.
                Some(entry) if rest.is_empty() => entry.place.clone(),
                Some(entry) => match entry.node.value {
                    Value::Table(_) | Value::List(_) => entry.node.place_of(rest),
                    _ => entry.place.clone(),
                },
                None => self.place.clone(),
            },
            Value::List(items) => {
                match first.parse::<usize>().ok().and_then(|index| items.get(index)) {
                    Some(item) => item.place_of(rest),
                    None => self.place.clone(),
                }
            }
            _ => self.place.clone(),
        }
    }
}

/// A file's text under the name that the user gave it.
#[derive(Debug, PartialEq, Eq)]
pub struct Text {
    file: Arc<str>,
    text: String,
}

impl Text {
    /// Line and column of a byte, both from 1.
    fn line_column(&self, offset: usize) -> (usize, usize) {
        let before = &self.text[..self.text.floor_char_boundary(offset)];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

/// A larger text is no config: DeepSeek-V2's config.json has 2 KB.
const TEXT_LIMIT: u64 = 1 << 20;

/// A source text, shared by the places in it.
pub struct Source(Arc<Text>);

impl Source {
    /// A text that is said to be from `file`.
    #[cfg(test)]
    pub fn new(file: &str, text: String) -> Source {
        Source(Arc::new(Text { file: file.into(), text }))
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Source, ConfigError> {
        let file: Arc<str> = path.display().to_string().into();
        let bytes = read_limited(path, TEXT_LIMIT).map_err(|unread| ConfigError {
            place: Place::File(file.clone()),
            message: unread.to_string(),
        })?;
        let fault = match String::from_utf8(bytes) {
            Ok(text) => return Ok(Source(Arc::new(Text { file, text }))),
            Err(fault) => fault,
        };
        // What stands before the first wrong byte is text, and tells its line and column.
        let valid = fault.utf8_error().valid_up_to();
        let text = String::from_utf8_lossy(&fault.as_bytes()[..valid]).into_owned();
        let source = Source(Arc::new(Text { file, text }));
        Err(source.fault(valid, "is not UTF-8 from here on; convert the file"))
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// The place of a byte offset.
    pub fn place(&self, offset: usize) -> Place {
        Place::In(self.0.clone(), offset)
    }

    /// The place of a line and column that both count from 1.
    pub fn line_column(&self, line: usize, column: usize) -> Place {
        Place::At { file: self.0.file.clone(), line: line.max(1), column: column.max(1) }
    }

    /// A fault at a byte offset.
    pub fn fault(&self, offset: usize, message: impl Into<String>) -> ConfigError {
        ConfigError { place: self.place(offset), message: message.into() }
    }
}

/// Parses a TOML document.
pub fn parse_toml(source: &Source) -> Result<Node, ConfigError> {
    let table = DeTable::parse(source.text()).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        source.fault(offset, format!("not valid TOML: {}", error.message().trim()))
    })?;
    let place = source.place(0);
    from_table(table.into_inner(), place, &|offset| source.place(offset))
}

/// Parses the value of a `--set`; every part of it has the same place.
pub fn parse_value(text: &str, place: &Place) -> Result<Node, ConfigError> {
    match DeValue::parse(text) {
        Ok(value) => from_value(value, &|_| place.clone()),
        // A bare word is a text; something that starts like a list, table or quoted text is a slip.
        Err(error) if text.starts_with(['[', '{', '"', '\'']) => Err(ConfigError {
            place: place.clone(),
            message: format!("{text} is not a valid TOML value: {}", error.message().trim()),
        }),
        Err(_) => {
            Ok(Node { place: place.clone(), value: Value::Text(text.to_string()), lenient: false })
        }
    }
}

fn from_table(
    table: DeTable<'_>,
    place: Place,
    at: &dyn Fn(usize) -> Place,
) -> Result<Node, ConfigError> {
    let mut entries = Vec::new();
    for (key, value) in table {
        let place = at(key.span().start);
        entries.push((
            key.span().start,
            Entry { key: key.into_inner().into_owned(), place, node: from_value(value, at)? },
        ));
    }
    // The parser sorts keys; the order of the source is the order in which faults are reported.
    entries.sort_by_key(|(offset, _)| *offset);
    let entries = entries.into_iter().map(|(_, entry)| entry).collect();
    Ok(Node { place, value: Value::Table(entries), lenient: false })
}

fn from_value(
    value: Spanned<DeValue<'_>>,
    at: &dyn Fn(usize) -> Place,
) -> Result<Node, ConfigError> {
    let place = at(value.span().start);
    let wrong = |message: String| ConfigError { place: place.clone(), message };
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Boolean(value) => Value::Boolean(value),
        DeValue::Integer(number) => {
            Value::Integer(i64::from_str_radix(number.as_str(), number.radix()).map_err(|_| {
                wrong(format!("{number} is too large a number; the largest is {}", i64::MAX))
            })?)
        }
        DeValue::Float(number) => {
            let value = number
                .as_str()
                .parse::<f64>()
                .map_err(|_| wrong(format!("{number} is not a number")))?;
            if !value.is_finite() {
                return Err(wrong(format!("{number} is not a finite number")));
            }
            Value::Float(value)
        }
        DeValue::Datetime(date) => {
            return Err(wrong(format!("{date} is a date, and no key takes one; quote it")));
        }
        DeValue::Array(items) => Value::List(
            items.into_iter().map(|item| from_value(item, at)).collect::<Result<_, _>>()?,
        ),
        DeValue::Table(table) => return from_table(table, place, at),
    };
    Ok(Node { place, value, lenient: false })
}

/// A JSON scalar as a value; `None` for lists and objects.
pub fn scalar(json: &Json) -> Option<Value> {
    Some(match json {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Boolean(*value),
        Json::String(text) => Value::Text(text.clone()),
        Json::Number(number) => match number.as_i64() {
            Some(whole) => Value::Integer(whole),
            None => Value::Float(number.as_f64()?),
        },
        Json::Array(_) | Json::Object(_) => return None,
    })
}
