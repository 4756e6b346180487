//! tokenizer.json: the untrained one of each known split, and what a foreign one must keep to.
//!
//! Invariants:
//!   * every regular expression of an accepted file runs in linear time: it compiles in the engine
//!     without look-around, or is one of the two published ones whose single look-ahead is bounded
//!   * every byte has a token, so that any text can be encoded

use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Names of the pre-tokenizers that can be trained, as llama.cpp knows them.
pub const SPLITS: [&str; 3] = ["deepseek-llm", "deepseek-coder", "gpt-2"];

/// Letters of cased scripts, as the tokenizer.json of deepseek-llm lists them.
const CASED: &str = "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ\
    Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ\
    Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\
    \u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}";

/// Chinese, Japanese and Korean letters, as both DeepSeek tokenizers list them.
const EAST_ASIAN: &str = "[一-龥ࠀ-一가-퟿]+";

/// The published expressions with a look-ahead, `\s+(?!\S)`: it costs one step back at most.
const BOUNDED_LOOKAHEAD: [&str; 2] = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

/// A byte-level BPE without vocabulary that splits like `split`; `None` for an unknown name.
pub fn untrained(split: &str) -> Option<Value> {
    let isolated = |pattern: &str| {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    };
    let digits = json!({"type": "Digits", "individual_digits": true});
    let bytes = |own_split: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": own_split})
    };
    let steps = match split {
        "deepseek-llm" => vec![
            isolated("[\r\n]"),
            isolated(&format!(r"\s?[{CASED}]+")),
            isolated(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            isolated(r"\s+$"),
            isolated(EAST_ASIAN),
            digits,
            bytes(false),
        ],
        "deepseek-coder" => vec![
            isolated("[\r\n]"),
            isolated(r"\s?\p{L}+"),
            isolated(r"\s?\p{P}+"),
            isolated(EAST_ASIAN),
            digits,
            bytes(false),
        ],
        "gpt-2" => vec![bytes(true)],
        _ => return None,
    };
    Some(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": null,
        "decoder": bytes(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": {}, "merges": []}
    }))
}

/// Says why a tokenizer.json is not accepted.
pub fn check(value: &Value) -> Result<(), String> {
    if value["model"]["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return Err(format!("model type {} is not supported; only BPE is", value["model"]["type"]));
    }
    if !value["decoder"].to_string().contains("\"ByteLevel\"") {
        return Err("the decoder is not ByteLevel; only byte-level BPE is supported".to_string());
    }
    let Some(vocabulary) = value["model"]["vocab"].as_object() else {
        return Err("model.vocab is missing".to_string());
    };
    let absent = ByteLevel::alphabet().into_iter().filter(|c| !vocabulary.contains_key(&c.to_string()));
    let absent = absent.count();
    if absent > 0 {
        return Err(format!("{absent} of the 256 bytes have no token, so that some texts cannot be encoded"));
    }
    check_patterns(value)
}

fn check_patterns(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(pattern)) = object.get("Regex") {
                let linear = regex::Regex::new(pattern).is_ok();
                if !linear && !BOUNDED_LOOKAHEAD.contains(&pattern.as_str()) {
                    return Err(format!(
                        "the regular expression {pattern:?} may take more than linear time"
                    ));
                }
            }
            // Vocabularies hold no patterns and are large.
            let parts = object.iter().filter(|(key, _)| *key != "vocab" && *key != "merges");
            parts.map(|(_, part)| check_patterns(part)).collect()
        }
        Value::Array(items) => items.iter().map(check_patterns).collect(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_splits_keep_to_the_rules_once_they_have_their_bytes() {
        for split in SPLITS {
            let mut value = untrained(split).unwrap();
            assert!(check(&value).unwrap_err().contains("256 of the 256 bytes"));
            for (i, c) in ByteLevel::alphabet().into_iter().enumerate() {
                value["model"]["vocab"][c.to_string()] = json!(i);
            }
            check(&value).unwrap();
        }
        assert!(untrained("llama").is_none());
    }

    #[test]
    fn expressions_that_can_run_away_are_refused_wherever_they_stand() {
        let with = |pattern: &str| json!({"a": [{"b": {"Regex": pattern}}]});
        assert!(check_patterns(&with(r"(?<=a)b")).is_err());
        assert!(check_patterns(&with(r"(a+)\1")).is_err());
        assert!(check_patterns(&with(r"(a+)+$")).is_ok(), "linear in an automaton");
        assert!(check_patterns(&with(BOUNDED_LOOKAHEAD[1])).is_ok());
    }
}
