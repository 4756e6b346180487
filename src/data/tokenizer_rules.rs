//! What a foreign tokenizer.json must keep to before anything is made of it.
//!
//! An allow-list by type and by the text of every pattern: the library that runs the file backtracks
//! in regular expressions, panics on some files and allocates what they ask for. A part, a pattern
//! or a model that is not listed here is refused by name.
//!
//! Invariants:
//!   * every pattern of an accepted file runs in linear time: it is one class of characters, perhaps
//!     repeated and after a blank, or one of the published patterns below
//!   * every byte has a token and every merge its parts, so that any text can be encoded
//!   * no accepted part drops text

use serde_json::Value;
use std::sync::LazyLock;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A published pattern of more than one class.
struct Published {
    /// Whose it is.
    name: &'static str,
    /// Its text, line breaks in escapes.
    pattern: &'static str,
    /// True if every character is matched by some branch.
    covers: bool,
}

/// Their only look-ahead, `\s+(?!\S)`, costs one step back; every other branch is one scan of the
/// run of characters that it, or the branch after it, takes.
const PUBLISHED: [Published; 9] = [
    Published {
        name: "gpt-2",
        pattern: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        covers: true,
    },
    Published {
        name: "llama-3",
        pattern: concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: true,
    },
    Published {
        name: "qwen2",
        pattern: concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: true,
    },
    Published {
        name: "qwen3.5",
        pattern: concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|",
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: true,
    },
    Published {
        name: "deepseek-v3",
        pattern: concat!(
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"##,
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|",
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: false,
    },
    Published {
        name: "gpt-4o",
        pattern: concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: true,
    },
    Published {
        name: "tekken",
        pattern: concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        covers: true,
    },
    Published { name: "deepseek-llm", pattern: r"\s+$", covers: false },
    Published { name: "falcon", pattern: "[0-9][0-9][0-9]", covers: false },
];

/// Types that may stand in each part, and the key of a Sequence's list in it.
const PARTS: [(&str, &str, &[&str]); 4] = [
    ("normalizer", "normalizers", &["NFC", "NFD", "NFKC", "NFKD"]),
    ("pre_tokenizer", "pretokenizers", &["ByteLevel", "Split", "Digits", "Punctuation"]),
    (
        "post_processor",
        "processors",
        &["ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"],
    ),
    ("decoder", "decoders", &["ByteLevel", "Fuse"]),
];

/// Says why a tokenizer.json is not accepted.
pub fn check(value: &Value) -> Result<(), String> {
    check_model(&value["model"])?;
    for (part, list, allowed) in PARTS {
        for step in steps(&value[part], list) {
            let kind = step["type"].as_str().unwrap_or("?");
            if !allowed.contains(&kind) {
                return Err(format!(
                    "the {part} has a step of type {kind:?}, which is not supported; it may have {}",
                    allowed.join(", ")
                ));
            }
            if part == "pre_tokenizer" {
                check_step(step)?;
            }
        }
    }
    for (part, list) in [("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")] {
        let steps = steps(&value[part], list);
        if steps.iter().filter(|step| step["type"] == "ByteLevel").count() != 1 {
            return Err(format!(
                "the {part} is not ByteLevel once; only byte-level BPE is supported"
            ));
        }
    }
    Ok(())
}

/// The token that the file's post-processor puts before a text.
pub fn leading_token(value: &Value) -> Result<Option<u32>, String> {
    let id = |id: &Value| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| "the post_processor names a token without an id".to_string())
    };
    let mut leading = None;
    for step in steps(&value["post_processor"], "processors") {
        leading = match step["type"].as_str() {
            Some("TemplateProcessing") => match step["single"][0]["SpecialToken"]["id"].as_str() {
                Some(name) => id(&step["special_tokens"][name]["ids"][0])?,
                None => leading,
            },
            Some("RobertaProcessing" | "BertProcessing") => id(&step["cls"][1])?,
            _ => leading,
        };
    }
    Ok(leading)
}

/// The steps of a part, Sequences unrolled.
fn steps<'a>(part: &'a Value, list: &str) -> Vec<&'a Value> {
    if part.is_null() {
        return Vec::new();
    }
    match (part["type"] == "Sequence", part[list].as_array()) {
        (true, Some(steps_of)) => steps_of.iter().flat_map(|step| steps(step, list)).collect(),
        _ => vec![part],
    }
}

fn check_model(model: &Value) -> Result<(), String> {
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return Err(format!("model type {} is not supported; only BPE is", model["type"]));
    }
    let Some(vocabulary) = model["vocab"].as_object() else {
        return Err("model.vocab is missing".to_string());
    };
    let is_id = |id: &Value| id.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
    if let Some((token, id)) = vocabulary.iter().find(|(_, id)| !is_id(id)) {
        return Err(format!("model.vocab: token {token:?} has the id {id}, which is none"));
    }
    let has = |text: &str| vocabulary.contains_key(text);
    let absent = ByteLevel::alphabet().into_iter().filter(|c| !has(c.encode_utf8(&mut [0; 4])));
    let absent = absent.count();
    if absent > 0 {
        return Err(format!(
            "{absent} of the 256 bytes have no token, so that some texts cannot be encoded"
        ));
    }
    // What the bytes become, or drop out of, in other kinds of BPE.
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if !model[key].is_null() && model[key] != "" {
            return Err(format!("model.{key} = {} is not supported; leave it out", model[key]));
        }
    }
    if !model["dropout"].is_null() && model["dropout"] != 0.0 {
        return Err(format!(
            "model.dropout = {} would encode a text differently each time; set it to null",
            model["dropout"]
        ));
    }
    let unknown = &model["unk_token"];
    if !unknown.is_null() && !unknown.as_str().is_some_and(has) {
        return Err(format!("model.unk_token = {unknown} is not in model.vocab"));
    }
    let merges = model["merges"].as_array().ok_or("model.merges is missing")?;
    merges.iter().try_for_each(|merge| check_merge(merge, &has))
}

/// Both parts and the whole must be tokens.
fn check_merge(merge: &Value, has: &dyn Fn(&str) -> bool) -> Result<(), String> {
    let pair = match merge {
        Value::String(text) if text.starts_with("#version") => return Ok(()),
        Value::String(text) => text.split_once(' ').filter(|(_, second)| !second.contains(' ')),
        Value::Array(pair) => match pair.as_slice() {
            [first, second] => first.as_str().zip(second.as_str()),
            _ => None,
        },
        _ => None,
    };
    match pair {
        Some((first, second)) if has(first) && has(second) && has(&[first, second].concat()) => {
            Ok(())
        }
        _ => {
            Err(format!("model.merges: {merge} does not join two tokens of model.vocab to a third"))
        }
    }
}

fn check_step(step: &Value) -> Result<(), String> {
    // What a step takes away never comes back when its tokens are decoded.
    let removes = step["behavior"] == "Removed";
    if step["type"] != "Split" {
        return match removes {
            true => Err(format!("a pre_tokenizer of type {} removes text", step["type"])),
            false => Ok(()),
        };
    }
    let covers = match (&step["pattern"]["Regex"], &step["pattern"]["String"]) {
        (Value::String(pattern), Value::Null) => {
            let pattern = pattern.replace('\r', r"\r").replace('\n', r"\n");
            let published = PUBLISHED.iter().find(|known| known.pattern == pattern);
            if published.is_none() && !is_one_class(&pattern) {
                let known: Vec<&str> = PUBLISHED.iter().map(|known| known.name).collect();
                return Err(format!(
                    "the regular expression {pattern:?} of the pre_tokenizer is not known to run in linear time; \
                     known are those of {}, and any single class of characters; use a tokenizer that splits with these, \
                     or train one ([tokenizer] vocab_size)",
                    known.join(", ")
                ));
            }
            published.is_some_and(|known| known.covers)
        }
        (Value::Null, Value::String(text)) if !text.is_empty() => false,
        _ => return Err("a Split of the pre_tokenizer has no pattern".to_string()),
    };
    match removes && !(covers && step["invert"] == true) {
        true => Err("a Split of the pre_tokenizer removes text; use \"Isolated\"".to_string()),
        false => Ok(()),
    }
}

/// One class of characters, perhaps after a blank, perhaps repeated: a scan of the text, whatever
/// the class is.
fn is_one_class(pattern: &str) -> bool {
    static SHAPE: LazyLock<regex::Regex> = LazyLock::new(|| {
        let class = r"\[(?:[^\[\]\\]|\\[rntsSdDpP\[\]\\.-])+\]|\\[pP]\{\w+\}";
        regex::Regex::new(&format!(r"^(?: \?|\\s\?)?(?:{class})(?:\+|\{{1,\d\}})?$"))
            .expect("the shape is a valid expression")
    });
    SHAPE.is_match(pattern) && regex::Regex::new(pattern).is_ok()
}

#[cfg(test)]
mod tests;
