//! Spellings of published configs, brought to the one that is read: YaRN as `rope_scaling` with `type`, the base as
//! `rope_theta`.
//!
//! Newer configs hold both in `rope_parameters`; some write `rope_type` for `type`, some both. What would be computed
//! otherwise than the file says is refused by key: another kind of scaling, a ramp that is not rounded.

use super::document::{ConfigError, Entry, Node, Value};

/// Rewrites the keys of a model.
pub(super) fn unify_rope(model: &mut Node) -> Result<(), ConfigError> {
    let newer = model.take("rope_parameters").filter(|entry| !is_null(&entry.node));
    if let Some(mut entry) = newer {
        entry.key = "rope_scaling".to_string();
        if kind_key(&entry.node).is_none() && entry.node.get("factor").is_none() {
            // Without a kind it is the base alone.
            put_base(model, &mut entry);
            return Ok(());
        }
        model.put(entry);
    }
    let Some(mut entry) = model.take("rope_scaling") else { return Ok(()) };
    let kind = one_kind(&mut entry.node)?;
    put_base(model, &mut entry);
    match kind.as_deref() {
        Some("default") => return Ok(()),
        Some("yarn") | None => {}
        Some(other) => {
            let message = format!(
                "model.rope_scaling.type = {other:?} is not built; use \"yarn\" or leave rope_scaling out"
            );
            return Err(ConfigError { place: entry.node.place_of(&["type"]), message });
        }
    }
    if let Some(found) = entry.node.take("truncate")
        && !matches!(found.node.value, Value::Null | Value::Boolean(true))
    {
        let message = format!(
            "model.rope_scaling.truncate = {} is not built: the ramp's ends are rounded to whole pairs; leave it out",
            found.node.shown()
        );
        return Err(ConfigError { place: found.place, message });
    }
    model.put(entry);
    Ok(())
}

fn is_null(node: &Node) -> bool {
    matches!(node.value, Value::Null)
}

fn kind_key(node: &Node) -> Option<&'static str> {
    ["type", "rope_type"].into_iter().find(|key| node.get(key).is_some_and(|n| !is_null(n)))
}

/// Leaves the kind under `type` alone, and gives it if it is a text.
fn one_kind(scaling: &mut Node) -> Result<Option<String>, ConfigError> {
    let Some(key) = kind_key(scaling) else { return Ok(None) };
    let mut kind = scaling.take(key).expect("the key was found");
    if let Some(other) = scaling.take("rope_type").filter(|other| !is_null(&other.node))
        && other.node.text() != kind.node.text()
    {
        let message = format!(
            "model.rope_scaling has type = {} and rope_type = {}; keep one of them",
            kind.node.shown(),
            other.node.shown()
        );
        return Err(ConfigError { place: other.place, message });
    }
    let text = kind.node.text().map(str::to_string);
    kind.key = "type".to_string();
    scaling.put(kind);
    Ok(text)
}

/// Moves the base out of the table.
fn put_base(model: &mut Node, scaling: &mut Entry) {
    if let Some(theta) = scaling.node.take("rope_theta") {
        model.put(theta);
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Source;
    use super::super::json::parse_json;
    use super::*;

    fn unified(text: &str) -> Result<Node, String> {
        let mut node = parse_json(&Source::new("m.json", text.to_string())).unwrap();
        unify_rope(&mut node).map(|()| node).map_err(|fault| fault.to_string())
    }

    #[test]
    fn every_spelling_of_yarn_becomes_one() {
        for text in [
            r#"{"rope_theta": 5.0, "rope_scaling": {"type": "yarn", "factor": 4}}"#,
            r#"{"rope_theta": 5.0, "rope_scaling": {"rope_type": "yarn", "factor": 4}}"#,
            r#"{"rope_theta": 5.0, "rope_scaling": {"rope_type": "yarn", "factor": 4, "type": "yarn"}}"#,
            r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4, "rope_theta": 5.0}}"#,
            r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 5.0, "truncate": true}}"#,
            r#"{"rope_scaling": null, "rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 5.0}}"#,
        ] {
            let node = unified(text).unwrap();
            let yarn = node.get("rope_scaling").unwrap_or_else(|| panic!("{text}"));
            let keys: Vec<&str> = yarn.entries().iter().map(|e| e.key.as_str()).collect();
            assert!(keys.contains(&"type") && keys.len() == 2, "{text}: {keys:?}");
            assert_eq!(node.get("rope_theta").unwrap().shown(), "5.0", "{text}");
        }
    }

    #[test]
    fn the_default_kind_is_no_scaling() {
        for text in [
            r#"{"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}"#,
            r#"{"rope_parameters": {"rope_theta": 5.0}}"#,
            r#"{"rope_theta": 5.0, "rope_scaling": {"type": "default"}}"#,
            r#"{"rope_theta": 5.0, "rope_parameters": null}"#,
        ] {
            let node = unified(text).unwrap();
            assert!(node.get("rope_scaling").is_none(), "{text}");
            assert_eq!(node.get("rope_theta").unwrap().shown(), "5.0", "{text}");
        }
    }

    #[test]
    fn what_would_be_computed_otherwise_is_refused_by_key_and_place() {
        for (text, told) in [
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 2}}"#,
                "type = \"linear\" is not built",
            ),
            (
                r#"{"rope_parameters": {"rope_type": "llama3", "factor": 2}}"#,
                "\"llama3\" is not built",
            ),
            (r#"{"rope_scaling": {"type": "yarn", "rope_type": "linear"}}"#, "keep one of them"),
            (r#"{"rope_scaling": {"type": "yarn", "truncate": false}}"#, "truncate = false"),
        ] {
            let fault = unified(text).expect_err(text);
            assert!(fault.starts_with("m.json:1:") && fault.contains(told), "{fault}");
        }
    }
}
