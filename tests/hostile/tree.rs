//! JSON as a tree of raw texts: it can hold what no JSON library writes (a key twice, `NaN`, half of
//! a surrogate pair, a number beyond every range).

use serde_json::Value;

/// A JSON value; the text of a scalar and of a key is taken as it is, quotes included.
#[derive(Clone, Debug)]
pub enum Tree {
    /// A scalar, or anything else that is to be written as it is.
    Raw(String),
    /// A list.
    List(Vec<Tree>),
    /// An object.
    Object(Vec<(String, Tree)>),
}

impl Tree {
    /// A value as a tree.
    pub fn of(value: &Value) -> Tree {
        match value {
            Value::Array(items) => Tree::List(items.iter().map(Tree::of).collect()),
            Value::Object(entries) => Tree::Object(
                entries
                    .iter()
                    .map(|(key, value)| (Value::from(key.as_str()).to_string(), Tree::of(value)))
                    .collect(),
            ),
            scalar => Tree::Raw(scalar.to_string()),
        }
    }

    /// A text as a tree, if it is JSON.
    pub fn parse(text: &[u8]) -> Option<Tree> {
        serde_json::from_slice(text).ok().map(|value: Value| Tree::of(&value))
    }

    /// The text.
    pub fn text(&self) -> Vec<u8> {
        let mut out = String::new();
        self.write(&mut out);
        out.into_bytes()
    }

    fn write(&self, out: &mut String) {
        match self {
            Tree::Raw(text) => out.push_str(text),
            Tree::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    out.push_str(if i > 0 { "," } else { "" });
                    item.write(out);
                }
                out.push(']');
            }
            Tree::Object(entries) => {
                out.push('{');
                for (i, (key, value)) in entries.iter().enumerate() {
                    out.push_str(if i > 0 { "," } else { "" });
                    out.push_str(key);
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
        }
    }

    /// Children of a container.
    pub fn len(&self) -> usize {
        match self {
            Tree::Raw(_) => 0,
            Tree::List(items) => items.len(),
            Tree::Object(entries) => entries.len(),
        }
    }

    /// The child at `index`.
    pub fn child(&mut self, index: usize) -> &mut Tree {
        match self {
            Tree::Raw(_) => unreachable!("a scalar has no children"),
            Tree::List(items) => &mut items[index],
            Tree::Object(entries) => &mut entries[index].1,
        }
    }
}
