//! Tests of the rules: what real tokenizers hold is accepted and linear, everything else is refused.

use super::*;
use crate::data::Tokenizer;
use crate::data::tokenizer_json::untrained;
use serde_json::json;

/// A file with the 256 bytes, one merge and an end token.
fn valid() -> Value {
    let mut value = untrained("gpt-2").unwrap();
    for (i, c) in ByteLevel::alphabet().into_iter().enumerate() {
        value["model"]["vocab"][c.to_string()] = json!(i);
    }
    value["model"]["vocab"]["aa"] = json!(256);
    value["model"]["merges"] = json!([["a", "a"]]);
    value["added_tokens"] = json!([{"id": 257, "content": "<|end|>", "special": true}]);
    value
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn bytes() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false})
}

fn with_splits(patterns: &[&str]) -> Value {
    let mut value = valid();
    let mut steps: Vec<Value> = patterns.iter().map(|pattern| split(pattern)).collect();
    steps.push(bytes());
    value["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
    value
}

fn made(value: &Value) -> Result<Tokenizer, String> {
    Tokenizer::from_json(&value.to_string(), None)
}

/// The parts of published files, as they stand there.
fn published_files() -> Vec<(&'static str, Value)> {
    let edit = |parts: Value| {
        let mut value = valid();
        for (key, part) in parts.as_object().unwrap() {
            value[key] = part.clone();
        }
        value
    };
    let byte_level = r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false,
        "use_regex": true}"#;
    let v3 = r##"{"normalizer": {"type": "Sequence", "normalizers": []}, "pre_tokenizer": {"type": "Sequence",
        "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
        {"type": "Split", "pattern": {"Regex": "[一-龥぀-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": false},
        {"type": "Split", "pattern": {"Regex": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}}"##;
    let llama = r#"{"normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
         "behavior": "Removed", "invert": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "Sequence", "processors": [BYTES, {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [257], "tokens": ["<|end|>"]}}}]}}"#;
    let qwen = r#"{"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
         "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
        "post_processor": BYTES}"#;
    let gpt = r#"{"pre_tokenizer": BYTES, "post_processor": BYTES, "decoder": BYTES}"#;
    let falcon = r#"{"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"}, PLAIN,
        {"type": "Digits", "individual_digits": false},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": false}]}}"#;
    let plain = bytes().to_string();
    let parse = |text: &str| {
        let text = text.replace("BYTES", byte_level).replace("PLAIN", &plain);
        serde_json::from_str(&text).unwrap()
    };
    let mut files: Vec<(&str, Value)> = [
        ("deepseek-v3", v3),
        ("llama-3", llama),
        ("qwen2", qwen),
        ("gpt-2", gpt),
        ("falcon", falcon),
    ]
    .map(|(name, text)| (name, edit(parse(text))))
    .to_vec();
    for own in ["deepseek-llm", "deepseek-coder"] {
        files.push((own, edit(json!({"pre_tokenizer": untrained(own).unwrap()["pre_tokenizer"]}))));
    }
    let bloom = with_splits(&[" ?[^(\\s|[.,!?…。，、।۔،])]+"]);
    assert!(made(&bloom).is_err(), "a class in a class is no single class");
    files.push(("bloom", with_splits(&[r" ?[^(\s|.,!?…。，、।۔،)]+"])));
    files.push(("tekken", with_splits(&[PUBLISHED[6].pattern])));
    files
}

#[test]
fn published_tokenizers_are_accepted_and_give_texts_back() {
    for (name, value) in published_files() {
        let tokenizer = made(&value).unwrap_or_else(|why| panic!("{name}: {why}"));
        let text = "It's 12345 cats,\n\n  一二三 und 4 Öfen!\u{7}\t\tx  ";
        let back = tokenizer.decode(&tokenizer.encode_content(text));
        // One of them adds a blank, as the file asks.
        assert_eq!(back.trim_start(), text, "{name}");
        let bos = (name == "llama-3").then_some(257);
        assert_eq!(tokenizer.added_bos(), bos, "{name}");
    }
}

#[test]
fn whatever_else_a_file_holds_is_refused_by_its_name() {
    let two =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let template = |id: Value| {
        json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [], "special_tokens": {"x": {"id": "x", "ids": [id], "tokens": ["x"]}}})
    };
    for (path, part, wanted) in [
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "\"FixedLength\""),
        ("/pre_tokenizer", two(json!({"type": "WhitespaceSplit"}), bytes()), "\"WhitespaceSplit\""),
        ("/pre_tokenizer", two(bytes(), bytes()), "not ByteLevel once"),
        ("/pre_tokenizer", Value::Null, "not ByteLevel once"),
        ("/pre_tokenizer", json!({"Regex": "(a+)+$"}), "type \"?\""),
        (
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "\"Precompiled\"",
        ),
        (
            "/normalizer",
            json!({"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}),
            "\"Replace\"",
        ),
        ("/decoder", json!({"type": "CTC"}), "\"CTC\""),
        ("/decoder", Value::Null, "only byte-level BPE"),
        ("/post_processor", json!({"type": "Nope"}), "\"Nope\""),
        ("/post_processor", template(json!(-1)), "a token without an id"),
        ("/post_processor", template(json!(9)), "begins a text with 9"),
        ("/model/type", json!("WordLevel"), "only BPE"),
        ("/model/vocab", Value::Null, "model.vocab is missing"),
        ("/model/vocab/a", json!(1u64 << 32), "token \"a\" has the id 4294967296"),
        ("/model/merges", Value::Null, "model.merges is missing"),
        // The library would copy both parts into a buffer of the longest token.
        ("/model/merges", json!([["aa", "aa"]]), "does not join two tokens"),
        ("/model/merges", json!(["a  a"]), "does not join two tokens"),
        ("/model/continuing_subword_prefix", json!("####"), "continuing_subword_prefix"),
        ("/model/end_of_word_suffix", json!("</w>"), "end_of_word_suffix"),
        ("/model/dropout", json!(0.5), "dropout"),
        ("/model/unk_token", json!("<unk>"), "unk_token"),
        ("/added_tokens", json!([{"id": 1, "content": ""}]), "no content or id"),
    ] {
        let mut value = valid();
        value["model"]["continuing_subword_prefix"] = Value::Null;
        *value.pointer_mut(path).unwrap() = part;
        let why = made(&value).expect_err(wanted);
        assert!(why.contains(wanted), "{why}");
    }
    for text in ["[]", "null", "3"] {
        assert!(Tokenizer::from_json(text, None).unwrap_err().contains("no JSON object"));
    }
    // Neither is done here, and the second would allocate what the file says.
    let mut value = valid();
    value["truncation"] = json!({"max_length": 1, "stride": 9, "strategy": "LongestFirst"});
    value["padding"] =
        json!({"strategy": {"Fixed": 1u64 << 60}, "direction": "Right", "pad_id": 0});
    assert_eq!(made(&value).unwrap().encode_content("ab").len(), 2);
}

#[test]
fn a_key_that_stands_twice_hides_nothing_from_the_check() {
    let text = valid().to_string();
    let evil = r#"{"pre_tokenizer":{"type":"FixedLength","length":0},"#;
    Tokenizer::from_json(&text.replacen('{', evil, 1), None).unwrap();
    let last = format!("{},{}", &text[..text.len() - 1], &evil[1..evil.len() - 1]);
    let why = Tokenizer::from_json(&format!("{last}}}"), None).unwrap_err();
    assert!(why.contains("FixedLength"), "{why}");
}

#[test]
fn a_step_that_drops_text_is_refused() {
    let digits = json!({"type": "Split", "pattern": {"String": "1"}, "behavior": "Removed", "invert": false});
    let some = json!({"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Removed", "invert": true});
    let marks = json!({"type": "Punctuation", "behavior": "Removed"});
    for step in [digits, some, marks] {
        let mut value = valid();
        value["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [step, bytes()]});
        let why = made(&value).unwrap_err();
        assert!(why.contains("removes text"), "{why}");
    }
}

#[test]
fn a_pattern_that_can_run_away_is_refused_with_its_text() {
    for pattern in [
        "(a+)+$",
        r"(a+)+(?!b)c",
        r"(?<=a)b",
        r"(a+)\1",
        r".*.*=.*",
        r"[ab]+[bc]+",
        r"\s+(?!\S)",
        r"[a-c]{1,99}",
    ] {
        let why = made(&with_splits(&[pattern])).unwrap_err();
        assert!(why.contains(&format!("{pattern:?}")) && why.contains("linear time"), "{why}");
    }
    for pattern in
        ["[\r\n]", r"[\r\n]+", r"\s?[!-/:-~]+", r"\p{N}{1,3}", r"[^\s\p{L}]+", r" ?\p{L}+"]
    {
        made(&with_splits(&[pattern])).unwrap();
    }
}

/// Texts that make a pattern scan as far as it can, or fail as late as it can.
fn adversaries(length: usize) -> Vec<String> {
    let parts = [
        "a",
        " ",
        "\t",
        "\n",
        " \n",
        "'",
        "'l",
        "A",
        "Aa",
        "一",
        "9",
        "!",
        "! ",
        "!\n",
        "\u{7}",
        "é\u{301}",
        " a",
        "ˆ",
    ];
    let mut texts: Vec<String> =
        parts.iter().map(|part| part.repeat(length / part.len())).collect();
    texts.push(" ".repeat(length) + "a");
    texts.push("\n".repeat(length / 2) + &" ".repeat(length / 2) + "\u{7}");
    texts.push(format!("{}!", " ".repeat(60)).repeat(length / 61));
    texts
}

/// The engine's own count of the steps it takes back, for one match.
#[test]
fn no_published_pattern_goes_back_more_than_some_steps_a_match() {
    let longest = |pattern: &str, limit: usize| {
        let engine =
            fancy_regex::RegexBuilder::new(pattern).backtrack_limit(limit).build().unwrap();
        adversaries(2000)
            .into_iter()
            .find(|text| engine.find_iter(text).any(|found| found.is_err()))
    };
    for known in PUBLISHED.iter().filter(|known| known.covers) {
        assert_eq!(longest(known.pattern, 16), None, "{}", known.name);
    }
    // What no branch takes is passed over, one step a character.
    for known in PUBLISHED.iter().filter(|known| !known.covers) {
        assert_eq!(longest(known.pattern, 16 * 2000), None, "{}", known.name);
    }
    assert!(longest(r"(a+)+(?!b)c", 1_000_000).is_some(), "the count counts");
}

#[test]
fn ten_times_the_text_takes_about_ten_times_the_time() {
    use rustix::time::{ClockId, clock_gettime};
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
    };
    let own = ["deepseek-llm", "deepseek-coder"].map(|own| (own, untrained(own).unwrap()));
    let patterns = PUBLISHED.iter().map(|known| (known.name, with_splits(&[known.pattern])));
    let own = own.map(|(name, parts)| {
        let mut value = valid();
        value["pre_tokenizer"] = parts["pre_tokenizer"].clone();
        (name, value)
    });
    for (name, value) in patterns.chain(own) {
        let tokenizer = made(&value).unwrap();
        let time = |text: &str| {
            let start = now();
            assert!(!tokenizer.encode_content(text).is_empty());
            now() - start
        };
        for (small, large) in adversaries(2000).iter().zip(adversaries(20_000)) {
            time(&large[..large.floor_char_boundary(200)]);
            let (short, long) = (time(small), time(&large));
            // Quadratic would be 100 times; the rest is room for noise.
            assert!(
                long < 30.0 * short + 0.05,
                "{name}: {short} s, then {long} s for {:?}",
                &small[..4]
            );
        }
    }
}
