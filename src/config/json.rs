//! A model's config.json as a tree with places.
//!
//! serde_json checks the syntax first; the walk after it only has to find where each value starts.
//! Unknown keys in such a file are carried over unread, because published configs hold many.

use super::document::{ConfigError, Entry, Node, Source, Value, scalar};
use serde_json::Value as Json;
use std::collections::HashMap;

/// Parses a JSON document.
pub fn parse_json(source: &Source) -> Result<Node, ConfigError> {
    if let Err(error) = serde_json::from_str::<Json>(source.text()) {
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or(&text);
        return Err(ConfigError {
            place: source.line_column(error.line(), error.column()),
            message: format!("not valid JSON: {what}"),
        });
    }
    let mut walk = Walk { source, offset: 0 };
    Ok(walk.node())
}

/// Reads a text that is known to be valid JSON.
struct Walk<'a> {
    source: &'a Source,
    offset: usize,
}

impl Walk<'_> {
    fn node(&mut self) -> Node {
        self.skip_space();
        let place = self.source.place(self.offset);
        let value = match self.rest().as_bytes().first() {
            Some(b'{') => self.object(),
            Some(b'[') => self.list(),
            _ => scalar(&self.scalar()).expect("a value that opens no bracket is a scalar"),
        };
        Node { place, value, lenient: true }
    }

    fn object(&mut self) -> Value {
        let mut entries: Vec<Entry> = Vec::new();
        self.offset += 1;
        while !self.closes(b'}') {
            let place = self.source.place(self.offset);
            let Json::String(key) = self.scalar() else {
                unreachable!("a key of valid JSON is a string")
            };
            self.skip_space();
            self.offset += 1; // The colon.
            let node = self.node();
            entries.push(Entry { key, place, node });
        }
        // As everywhere in JSON, the last of two equal keys counts.
        let mut last = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            last.insert(entry.key.clone(), index);
        }
        let mut index = 0..;
        entries.retain(|entry| index.next() == last.get(&entry.key).copied());
        Value::Table(entries)
    }

    fn list(&mut self) -> Value {
        let mut items = Vec::new();
        self.offset += 1;
        while !self.closes(b']') {
            items.push(self.node());
        }
        Value::List(items)
    }

    /// Skips a comma, or the closing bracket and says so.
    fn closes(&mut self, bracket: u8) -> bool {
        self.skip_space();
        match self.rest().as_bytes().first() {
            Some(b',') => {
                self.offset += 1;
                self.skip_space();
                false
            }
            Some(byte) if *byte == bracket => {
                self.offset += 1;
                true
            }
            _ => false,
        }
    }

    fn scalar(&mut self) -> Json {
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<Json>();
        let value = stream.next().and_then(Result::ok).expect("the text was parsed as JSON before");
        self.offset += stream.byte_offset();
        value
    }

    fn rest(&self) -> &str {
        &self.source.text()[self.offset..]
    }

    fn skip_space(&mut self) {
        self.offset += self.rest().len() - self.rest().trim_start().len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_a_json_document_knows_its_line_and_column() {
        let text = "{\n  \"a\": 1, \"b\": {\"c\": [true, null, \"x,}\"]},\n  \"d\": -2.5e3\n}\n";
        let node = parse_json(&Source::new("m.json", text.to_string())).unwrap();
        assert_eq!(node.place_of(&["a"]).to_string(), "m.json:2:3");
        assert_eq!(node.get("a").unwrap().place.to_string(), "m.json:2:8");
        assert_eq!(node.place_of(&["b", "c"]).to_string(), "m.json:2:17");
        assert_eq!(node.place_of(&["b", "c", "2"]).to_string(), "m.json:2:35");
        assert_eq!(node.get("d").unwrap().shown(), "-2500.0");
    }

    #[test]
    fn of_equal_keys_the_last_counts_and_many_keys_take_no_quadratic_time() {
        let text = "{\"a\": 1, \"b\": 2, \"a\": 3, \"c\": 4, \"a\": 5}";
        let node = parse_json(&Source::new("m.json", text.to_string())).unwrap();
        let keys: Vec<&str> = node.entries().iter().map(|entry| entry.key.as_str()).collect();
        assert_eq!(keys, ["b", "c", "a"]);
        assert_eq!(node.get("a").unwrap().shown(), "5");
        // A place that counted its line for every key, or a key that was looked for among all others, would take
        // minutes.
        let keys: Vec<String> = (0..60_000).map(|i| format!("\"{i:06}\":[0]")).collect();
        let text = format!("{{{}}}", keys.join(","));
        let start = std::time::Instant::now();
        let node = parse_json(&Source::new("m.json", text)).unwrap();
        assert_eq!(node.entries().len(), 60_000);
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    #[test]
    fn broken_json_is_named_with_its_place() {
        let fault = parse_json(&Source::new("m.json", "{\n\"a\": }".to_string())).unwrap_err();
        assert_eq!(fault.to_string(), "m.json:2:6: not valid JSON: expected value");
    }
}
