//! The filter `tojson` of chat templates, as transformers has it: no escapes for HTML.
//!
//! Invariant: it stops at [`LIMIT`] bytes. The engine's own filter writes as many blanks as it is
//! told to and walks lists that are repeated without end before it looks at its fuel.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Most bytes of a text.
const LIMIT: usize = 1 << 20;
const MOST_INDENT: usize = 16;
const MOST_DEPTH: usize = 64;

/// A value as JSON, on one line or indented.
pub fn to_json(value: &Value, indent: Option<Value>, arguments: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => arguments.get("indent")?,
    };
    arguments.assert_all_used()?;
    let width = match indent {
        None => None,
        Some(indent) => match bool::try_from(indent.clone()) {
            Ok(yes) => yes.then_some(2),
            Err(_) => Some(usize::try_from(indent)?),
        },
    };
    if width.is_some_and(|width| width > MOST_INDENT) {
        return Err(fault(format!("tojson indents by at most {MOST_INDENT}")));
    }
    let mut json = Json { text: String::new(), width };
    json.value(value, 0)?;
    Ok(Value::from(json.text))
}

fn fault(text: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, text)
}

/// The text so far.
struct Json {
    text: String,
    width: Option<usize>,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                // JSON has no infinite numbers.
                let number = value.to_string();
                let known = number.parse::<serde_json::Number>().is_ok();
                self.push(if known { &number } else { "null" })
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                self.push("{")?;
                for (index, key) in value.try_iter()?.enumerate() {
                    self.separate(index, depth)?;
                    self.string(&key.to_string())?;
                    self.push(": ")?;
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close("}", depth)
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.push("[")?;
                for (index, item) in value.try_iter()?.enumerate() {
                    self.separate(index, depth)?;
                    self.value(&item, depth + 1)?;
                }
                self.close("]", depth)
            }
            other => Err(fault(format!("tojson fails: {other} is nothing that JSON has"))),
        }
    }

    /// What stands before an item: Python's comma and blank, or a line of its own.
    fn separate(&mut self, index: usize, depth: usize) -> Result<(), Error> {
        if depth == MOST_DEPTH {
            return Err(fault(format!("tojson goes {MOST_DEPTH} levels deep at most")));
        }
        match self.width {
            None => self.push(if index > 0 { ", " } else { "" }),
            Some(width) => {
                self.push(if index > 0 { ",\n" } else { "\n" })?;
                self.push(&" ".repeat(width * (depth + 1)))
            }
        }
    }

    fn close(&mut self, bracket: &str, depth: usize) -> Result<(), Error> {
        if let Some(width) = self.width.filter(|_| !self.text.ends_with(['[', '{'])) {
            self.push("\n")?;
            self.push(&" ".repeat(width * depth))?;
        }
        self.push(bracket)
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.room(text.len())?;
        self.push(&serde_json::Value::from(text).to_string())
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.room(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    fn room(&self, bytes: usize) -> Result<(), Error> {
        match self.text.len() + bytes > LIMIT {
            true => Err(fault(format!("tojson writes more than {LIMIT} bytes"))),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    fn rendered(template: &str) -> Result<String, String> {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::to_json);
        let messages = vec![context! { role => "user", content => "<é>" }];
        let rendered = environment.render_str(template, context! { messages });
        rendered.map_err(|error| error.to_string())
    }

    #[test]
    fn json_is_written_as_transformers_writes_it() {
        let line = rendered("{{ messages | tojson }}").unwrap();
        assert_eq!(line, r#"[{"role": "user", "content": "<é>"}]"#);
        let lines = rendered("{{ messages[0] | tojson(indent=1) }}").unwrap();
        assert_eq!(lines, "{\n \"role\": \"user\",\n \"content\": \"<é>\"\n}");
    }

    #[test]
    fn what_would_fill_the_memory_is_refused() {
        for (template, wanted) in [
            ("{{ messages | tojson(indent=99999999) }}", "indents by at most 16"),
            ("{{ messages | tojson(99999999) }}", "indents by at most 16"),
            ("{{ (messages * 99999999) | tojson }}", "writes more than 1048576 bytes"),
            ("{{ messages | tojson(x=1) }}", "x"),
        ] {
            let told = rendered(template).unwrap_err();
            assert!(told.contains(wanted), "{told}");
        }
    }
}
