//! From a tree with places to a typed table: a serde deserializer whose every error has a place.
//!
//! The structs in this folder derive `Deserialize` and know nothing of places; what serde says of a
//! wrong type, an unknown key, a missing key or an unknown word is caught at the node where it
//! happened and told with the key's full path, the value, and what was expected.
//!
//! A key whose value is null counts as absent. Unknown keys are refused unless they come from a
//! published config.json.

use super::document::{ConfigError, Entry, Node, Value};
use super::nearest::{hint, one_slip};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};
use std::fmt::{self, Display};

/// Reads a table as `T`. `elsewhere` are keys of the same table that others read.
pub fn read<T: DeserializeOwned>(
    node: &Node,
    path: &str,
    elsewhere: &[&'static str],
) -> Result<T, ConfigError> {
    let reader = Reader { node, path: path.to_string(), elsewhere };
    T::deserialize(reader).map_err(|fault| fault.at(node, path).into_inner())
}

/// Refuses keys of a table that are not in `known`.
pub fn refuse_unknown(node: &Node, path: &str, known: &[&str]) -> Result<(), ConfigError> {
    match node
        .entries()
        .iter()
        .find(|entry| !entry.node.lenient && !known.contains(&entry.key.as_str()))
    {
        Some(entry) => Err(unknown_key(entry, path, known)),
        None => Ok(()),
    }
}

/// Refuses a key of a published config.json that is one slip away from a known one which is not there. Such files carry
/// many keys that are not ours, so that nothing further away is looked at.
fn refuse_slips(node: &Node, path: &str, known: &[&str]) -> Result<(), ConfigError> {
    let absent: Vec<&str> = known.iter().filter(|key| node.get(key).is_none()).copied().collect();
    let foreign = |entry: &&Entry| entry.node.lenient && !known.contains(&entry.key.as_str());
    let slip =
        node.entries().iter().filter(foreign).find_map(|entry| {
            one_slip(&entry.key, absent.iter().copied()).map(|meant| (entry, meant))
        });
    match slip {
        Some((entry, meant)) => Err(unknown_key(entry, path, &[meant])),
        None => Ok(()),
    }
}

fn unknown_key(entry: &Entry, path: &str, known: &[&str]) -> ConfigError {
    let table = match path {
        "" => String::new(),
        path => format!(" in `{path}`"),
    };
    ConfigError {
        place: entry.place.clone(),
        message: format!("unknown key `{}`{table}{}", entry.key, hint(&entry.key, known)),
    }
}

/// One node with the path that led to it.
struct Reader<'a> {
    node: &'a Node,
    path: String,
    elsewhere: &'a [&'static str],
}

/// What went wrong: first without a place, then, from the node where it is caught, with one.
#[derive(Debug)]
enum ReadFault {
    /// A value of another type, or out of the type's range.
    Expected(String),
    /// A key that must be there.
    Missing(&'static str),
    /// A word that is none of a list.
    Word(String, &'static [&'static str]),
    /// Anything else a `Deserialize` says.
    Said(String),
    /// With a place.
    Placed(Box<ConfigError>),
}

impl ReadFault {
    /// Gives the fault the place of `node`, unless it has one.
    fn at(self, node: &Node, path: &str) -> ReadFault {
        let message = match self {
            ReadFault::Placed(fault) => return ReadFault::Placed(fault),
            ReadFault::Expected(what) => {
                format!("{path} = {} is {}; expected {what}", node.shown(), node.kind())
            }
            ReadFault::Missing(key) => {
                format!("`{path}` has no key `{key}`, which has no default; add it")
            }
            ReadFault::Word(word, known) => {
                format!("{path} = {word:?} is not known{}", hint(&word, known))
            }
            ReadFault::Said(text) => format!("{path} = {}: {text}", node.shown()),
        };
        ReadFault::Placed(Box::new(ConfigError { place: node.place.clone(), message }))
    }

    fn into_inner(self) -> ConfigError {
        match self {
            ReadFault::Placed(fault) => *fault,
            _ => unreachable!("`at` was called before"),
        }
    }
}

impl Display for ReadFault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{self:?}")
    }
}

impl std::error::Error for ReadFault {}

impl de::Error for ReadFault {
    fn custom<T: Display>(text: T) -> Self {
        ReadFault::Said(text.to_string())
    }

    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        ReadFault::Expected(in_words(&expected.to_string()))
    }

    fn invalid_value(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        ReadFault::Expected(in_words(&expected.to_string()))
    }

    fn missing_field(key: &'static str) -> Self {
        ReadFault::Missing(key)
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        ReadFault::Word(word.to_string(), known)
    }
}

/// What serde expects, as a person would say it.
fn in_words(expected: &str) -> String {
    match expected {
        "usize" | "u64" | "u32" => "a whole number of at least 0".to_string(),
        "f64" => "a number".to_string(),
        "a string" => "a text in quotes".to_string(),
        "a boolean" => "true or false".to_string(),
        "a sequence" => "a list".to_string(),
        "a map" => "a table".to_string(),
        other if other.starts_with("struct ") => "a table".to_string(),
        other => other.to_string(),
    }
}

impl<'de> de::Deserializer<'de> for Reader<'_> {
    type Error = ReadFault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadFault> {
        let result = match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Boolean(value) => visitor.visit_bool(*value),
            // A negative number is refused by unsigned visitors only if it is shown as signed.
            Value::Integer(value) => match u64::try_from(*value) {
                Ok(value) => visitor.visit_u64(value),
                Err(_) => visitor.visit_i64(*value),
            },
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_str(text),
            Value::List(items) => visitor.visit_seq(Items { items, next: 0, path: &self.path }),
            Value::Table(entries) => {
                visitor.visit_map(Entries { entries, next: 0, path: &self.path })
            }
        };
        result.map_err(|fault| fault.at(self.node, &self.path))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadFault> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadFault> {
        let Value::Table(entries) = &self.node.value else {
            return Err(ReadFault::Expected("a table".to_string()).at(self.node, &self.path));
        };
        let known: Vec<&str> = fields.iter().chain(self.elsewhere).copied().collect();
        refuse_unknown(self.node, &self.path, &known)
            .and_then(|()| refuse_slips(self.node, &self.path, &known))
            .map_err(|fault| ReadFault::Placed(Box::new(fault)))?;
        let own: Vec<Entry> =
            entries.iter().filter(|entry| fields.contains(&entry.key.as_str())).cloned().collect();
        visitor
            .visit_map(Entries { entries: &own, next: 0, path: &self.path })
            .map_err(|fault| fault.at(self.node, &self.path))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadFault> {
        let result = match &self.node.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => Err(ReadFault::Expected(format!("one of {}", super::nearest::listed(known)))),
        };
        result.map_err(|fault| fault.at(self.node, &self.path))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map identifier ignored_any
    }
}

/// The items of a list.
struct Items<'a> {
    items: &'a [Node],
    next: usize,
    path: &'a str,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = ReadFault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ReadFault> {
        let Some(node) = self.items.get(self.next) else { return Ok(None) };
        let path = format!("{}.{}", self.path, self.next);
        self.next += 1;
        seed.deserialize(Reader { node, path, elsewhere: &[] }).map(Some)
    }
}

/// The entries of a table.
struct Entries<'a> {
    entries: &'a [Entry],
    next: usize,
    path: &'a str,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = ReadFault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ReadFault> {
        while self
            .entries
            .get(self.next)
            .is_some_and(|entry| matches!(entry.node.value, Value::Null))
        {
            self.next += 1;
        }
        match self.entries.get(self.next) {
            Some(entry) => seed.deserialize(entry.key.as_str().into_deserializer()).map(Some),
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadFault> {
        let entry = &self.entries[self.next];
        self.next += 1;
        let path = match self.path {
            "" => entry.key.clone(),
            path => format!("{path}.{}", entry.key),
        };
        seed.deserialize(Reader { node: &entry.node, path, elsewhere: &[] })
    }
}
