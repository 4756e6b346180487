//! tokenizer.json: the untrained one of each known split, and how two files differ.
//!
//! What a foreign file must keep to is in `tokenizer_rules`; what is made here keeps to it.

use serde_json::{Value, json};

/// Names of the pre-tokenizers that can be trained, as llama.cpp knows them.
pub const SPLITS: [&str; 3] = ["deepseek-llm", "deepseek-coder", "gpt-2"];

/// Letters of cased scripts, as the tokenizer.json of deepseek-llm lists them. In escapes, because
/// editors normalise some of these letters to others.
const CASED: &str = "A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\
    \u{1c4}-\u{293}\
    \u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\
    \u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\
    \u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\
    \u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\
    \u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\
    \u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\
    \u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\
    \u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\
    \u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\
    \u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\
    \u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\
    \u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\
    \u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\
    \u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\
    \u{1e900}-\u{1e943}";

/// Chinese, Japanese and Korean letters, as both DeepSeek tokenizers list them.
const EAST_ASIAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

/// Punctuation, half and full width, as the tokenizer.json of deepseek-llm lists it.
const PUNCTUATION: &str =
    "!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}";

/// A byte-level BPE without vocabulary that splits like `split`; `None` for an unknown name.
pub fn untrained(split: &str) -> Option<Value> {
    let isolated = |pattern: &str| {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": false})
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
            isolated(&format!(r"\s?[{PUNCTUATION}]+")),
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

/// The split that a tokenizer.json makes, if it is one of the known ones.
pub fn split_of(value: &Value) -> Option<&'static str> {
    let own = steps(&value["pre_tokenizer"]);
    SPLITS
        .into_iter()
        .find(|split| untrained(split).is_some_and(|known| steps(&known["pre_tokenizer"]) == own))
}

/// The steps of a pre-tokenizer, without what gives no other tokens.
fn steps(value: &Value) -> Vec<Value> {
    let mut steps = match value["pretokenizers"].as_array() {
        Some(steps) => steps.clone(),
        None => vec![value.clone()],
    };
    for step in steps.iter_mut().filter_map(Value::as_object_mut) {
        step.remove("trim_offsets");
    }
    steps
}

/// The first part in which two files give other tokens to a text.
pub fn differing_part(one: &Value, other: &Value) -> Option<&'static str> {
    let model =
        ["vocab", "merges"].into_iter().find(|part| one["model"][part] != other["model"][part]);
    let parts = ["added_tokens", "normalizer", "pre_tokenizer"];
    model.or_else(|| parts.into_iter().find(|part| one[part] != other[part]))
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer_rules::check;
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

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
    fn a_split_is_known_by_its_steps() {
        for split in SPLITS {
            let mut value = untrained(split).unwrap();
            assert_eq!(split_of(&value), Some(split));
            // A sequence of one step is that step, and offsets are no tokens.
            value["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap().iter_mut().for_each(
                |step| {
                    step["trim_offsets"] = json!(false);
                },
            );
            if split == "gpt-2" {
                value["pre_tokenizer"] = value["pre_tokenizer"]["pretokenizers"][0].clone();
            }
            assert_eq!(split_of(&value), Some(split));
            value["pre_tokenizer"] =
                json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true});
            assert_eq!(split_of(&value), None);
        }
    }

    #[test]
    fn files_that_give_other_tokens_differ_by_part() {
        let one = json!({"version": "1", "model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []});
        let mut other = one.clone();
        other["version"] = json!("2");
        other["model"]["vocab"] = json!({"b": 1, "a": 0});
        assert_eq!(differing_part(&one, &other), None);
        other["added_tokens"] = json!([{"id": 2, "content": "<|x|>"}]);
        assert_eq!(differing_part(&one, &other), Some("added_tokens"));
        other["model"]["vocab"] = json!({"b": 0, "a": 1});
        assert_eq!(differing_part(&one, &other), Some("vocab"));
    }
}
