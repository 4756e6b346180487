//! `--set table.key=value`: assignments from the command line, laid over the document before it is typed.
//!
//! `stage.NAME.key` and `stage.N.key` address a stage; so do names and numbers in every other list of
//! tables. The value is TOML; a bare word is a text. What was set here is at fault as `--set ...`.

use super::document::{ConfigError, Entry, Node, Place, Value, parse_value};
use super::nearest::{hint, listed};

/// Lays one assignment over the document.
pub fn apply(document: &mut Node, assignment: &str) -> Result<(), ConfigError> {
    let place = Place::Set(assignment.into());
    let wrong = |message: String| ConfigError { place: place.clone(), message };
    let Some((path, value)) = assignment.split_once('=') else {
        return Err(wrong("has no `=`; write it as table.key=value".to_string()));
    };
    let path: Vec<&str> = path.trim().split('.').collect();
    if path.iter().any(|key| key.is_empty()) {
        return Err(wrong("has an empty key; write it as table.key=value".to_string()));
    }
    let value = parse_value(value.trim(), &place)?;
    put(document, &path, value, &place)
}

fn put(node: &mut Node, path: &[&str], value: Node, place: &Place) -> Result<(), ConfigError> {
    let (first, rest) = path.split_first().expect("a path has a key");
    match &mut node.value {
        Value::Table(entries) if rest.is_empty() => {
            entries.retain(|entry| entry.key != *first);
            entries.push(Entry { key: (*first).to_string(), place: place.clone(), node: value });
            Ok(())
        }
        Value::Table(entries) => {
            if !entries.iter().any(|entry| entry.key == *first) {
                let node =
                    Node { place: place.clone(), value: Value::Table(Vec::new()), lenient: false };
                entries.push(Entry { key: (*first).to_string(), place: place.clone(), node });
            }
            let entry =
                entries.iter_mut().find(|entry| entry.key == *first).expect("it was just added");
            put(&mut entry.node, rest, value, place)
        }
        Value::List(items) => {
            let index = find(items, first)
                .map_err(|message| ConfigError { place: place.clone(), message })?;
            match rest.is_empty() {
                true => items[index] = value,
                false => return put(&mut items[index], rest, value, place),
            }
            Ok(())
        }
        _ => Err(ConfigError {
            place: place.clone(),
            message: format!(
                "`{first}` is set inside {}, which is {}, not a table",
                node.shown(),
                node.kind()
            ),
        }),
    }
}

/// The item that a name or number means.
fn find(items: &[Node], word: &str) -> Result<usize, String> {
    let names: Vec<&str> =
        items.iter().filter_map(|item| item.get("name").and_then(Node::text)).collect();
    if let Some(index) =
        items.iter().position(|item| item.get("name").and_then(Node::text) == Some(word))
    {
        return Ok(index);
    }
    match word.parse::<usize>() {
        Ok(index) if index < items.len() => Ok(index),
        Ok(index) => {
            Err(format!("there is no entry {index}: the list has {}, counted from 0", items.len()))
        }
        Err(_) if names.is_empty() => Err(format!(
            "`{word}` is no number, and the list's {} entries have no names; count from 0",
            items.len()
        )),
        Err(_) => Err(format!(
            "no entry is named `{word}`{} (the names are {})",
            hint(word, &names),
            listed(&names)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::{Source, parse_toml};
    use super::*;

    fn document() -> Node {
        let text = "seed = 1\n[[stage]]\nname = \"base\"\n[[stage]]\nname = \"align\"\nreward = [{ weight = 1.0 }]\n";
        parse_toml(&Source::new("run.toml", text.to_string())).unwrap()
    }

    fn check_set(assignment: &str, path: &[&str], shown: &str) {
        let mut node = document();
        apply(&mut node, assignment).unwrap();
        let mut at = &node;
        for key in path {
            at = match &at.value {
                Value::List(items) => &items[key.parse::<usize>().unwrap()],
                _ => at.get(key).unwrap(),
            };
        }
        assert_eq!(at.shown(), shown);
        assert_eq!(at.place.to_string(), format!("--set {assignment}"));
    }

    #[test]
    fn a_stage_is_addressed_by_name_and_by_number() {
        check_set("stage.align.steps=5", &["stage", "1", "steps"], "5");
        check_set("stage.0.steps=5", &["stage", "0", "steps"], "5");
        check_set("stage.align.reward.0.weight=0", &["stage", "1", "reward", "0", "weight"], "0");
        check_set("engine.threads = 2", &["engine", "threads"], "2");
        check_set("console.mode=plain", &["console", "mode"], "\"plain\"");
        check_set("engine.offload=[\"reference\"]", &["engine", "offload"], "[...]");
    }

    #[test]
    fn a_wrong_assignment_says_what_is_wrong_with_it() {
        for (assignment, message) in [
            ("seed", "--set seed: has no `=`; write it as table.key=value"),
            ("a..b=1", "--set a..b=1: has an empty key; write it as table.key=value"),
            (
                "stage.algin.x=1",
                "--set stage.algin.x=1: no entry is named `algin`; did you mean `align`? (the names are `base` and `align`)",
            ),
            (
                "stage.7.x=1",
                "--set stage.7.x=1: there is no entry 7: the list has 2, counted from 0",
            ),
            (
                "seed.x=1",
                "--set seed.x=1: `x` is set inside 1, which is a whole number, not a table",
            ),
        ] {
            assert_eq!(apply(&mut document(), assignment).unwrap_err().to_string(), message);
        }
        let fault = apply(&mut document(), "a=[1").unwrap_err().to_string();
        assert!(fault.starts_with("--set a=[1: [1 is not a valid TOML value"), "{fault}");
    }
}
