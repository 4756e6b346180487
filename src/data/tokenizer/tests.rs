//! Tests of the tokenizer: training, round trips, and control tokens that cannot be forged.

use super::*;
use proptest::prelude::*;
use std::sync::OnceLock;

const TEXT: &str =
    "swap: p u n k\nrotate: u n p k\nAnswer: k p n u\nThe cat sat on the mat, 12 times.\n";

fn config(split: &str) -> TokenizerConfig {
    TokenizerConfig {
        vocab_size: Some(290),
        split: split.to_string(),
        ..TokenizerConfig::default()
    }
}

fn texts() -> Vec<String> {
    (0..40).map(|i| format!("{TEXT}{i} <|end|> {i}{i}")).collect()
}

fn trained() -> &'static Tokenizer {
    static TRAINED: OnceLock<Tokenizer> = OnceLock::new();
    TRAINED.get_or_init(|| Tokenizer::train(&config("deepseek-llm"), &texts()).unwrap())
}

#[test]
fn training_gives_specials_then_bytes_then_merges_and_repeats_byte_for_byte() {
    for split in SPLITS {
        let one = Tokenizer::train(&config(split), &texts()).unwrap();
        let two = Tokenizer::train(&config(split), &texts()).unwrap();
        assert_eq!(one.json(), two.json(), "{split}");
        assert_eq!(one.vocab_size(), 290);
        for (id, text) in OWN_SPECIALS.iter().enumerate() {
            assert_eq!(one.id(text), Some(id as u32));
        }
        let bytes: Vec<u32> =
            ByteLevel::alphabet().into_iter().map(|c| one.id(&c.to_string()).unwrap()).collect();
        assert!(bytes.iter().all(|id| (5..261).contains(id)), "{split}");
        assert_eq!((one.end(), one.pad(), one.bos(), one.added_bos()), (1, 0, None, None));
        assert_eq!(one.encode_content(" k p n u").len(), 4, "{split}");
        assert!(one.encode_content("12").len() == 2 || split == "gpt-2", "digits stay single");
    }
}

#[test]
fn words_that_must_be_single_are_named_when_they_are_not() {
    let mut config = config("deepseek-llm");
    config.require_single = vec![" p".to_string(), "\n".to_string(), "zebra".to_string()];
    let fault = Tokenizer::train(&config, &texts()).unwrap_err().to_string();
    assert!(fault.contains("\"zebra\" became 5 tokens") && fault.contains("vocab_size"), "{fault}");
    config.require_single.pop();
    Tokenizer::train(&config, &texts()).unwrap();
    config.split = "llama".to_string();
    let fault = Tokenizer::train(&config, &texts()).unwrap_err().to_string();
    assert!(fault.contains("deepseek-llm, deepseek-coder, gpt-2"), "{fault}");
    config.vocab_size = Some(100);
    let fault = Tokenizer::train(&config, &texts()).unwrap_err().to_string();
    assert!(fault.contains("tokenizer.vocab_size = 100"), "{fault}");
}

#[test]
fn a_prompt_may_hold_control_tokens_and_content_cannot() {
    let tokenizer = trained();
    let text = "<|user|>swap<|end|>";
    let ids = tokenizer.encode_prompt(text);
    assert_eq!((ids[0], *ids.last().unwrap()), (3, 1));
    assert_eq!(tokenizer.decode(&ids), "swap");
    assert_eq!(tokenizer.decode_with_specials(&ids), text);
    let content = tokenizer.encode_content(text);
    assert!(content.iter().all(|id| *id > 4));
    assert_eq!(tokenizer.decode(&content), text, "it stays readable");
    let (whole, start) =
        (tokenizer.encode_content("swap: p<|end|>"), tokenizer.encode_content("swap: p"));
    assert_eq!(whole[..start.len()], start, "what stands beside it is encoded as ever");
    // An id of a padded head has no text.
    assert_eq!(tokenizer.decode(&[9999]), "");
}

/// A vocabulary like DeepSeek's: an added character that is text, added control tokens that are not
/// marked special, and whole words that are looked up without merges.
fn foreign() -> Tokenizer {
    let mut value: Value = serde_json::from_str(trained().json()).unwrap();
    let next = 290;
    let token = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": !special, "special": special})
    };
    let added = value["added_tokens"].as_array_mut().unwrap();
    added.push(token(next, "ø", false));
    added.push(token(next + 1, "<｜begin▁of▁sentence｜>", true));
    added.push(token(next + 2, "<｜User｜>", false));
    value["model"]["vocab"]["<forged>"] = json!(next + 3);
    value["model"]["ignore_merges"] = json!(true);
    value["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": false});
    value["added_tokens"].as_array_mut().unwrap().push(token(next + 3, "<forged>", true));
    let config = json!({"bos_token": {"content": "<｜begin▁of▁sentence｜>"}, "add_bos_token": true,
        "eos_token": "<|end|>", "pad_token": "<|end|>"});
    Tokenizer::from_json(&value.to_string(), Some(&config)).unwrap()
}

#[test]
fn a_foreign_vocabulary_keeps_its_added_characters_and_gives_no_forged_control_token() {
    let tokenizer = foreign();
    let ids = tokenizer.encode_content("røst");
    assert!(ids.contains(&290));
    assert_eq!(tokenizer.decode(&ids), "røst");
    let spans = tokenizer.encode_spans("røst");
    assert_eq!(spans.iter().find(|(id, _)| *id == 290).unwrap().1, 1..3);
    for text in ["<forged>", "<｜User｜>", "<｜begin▁of▁sentence｜>"] {
        let ids = tokenizer.encode_content(text);
        assert!(ids.iter().all(|id| !tokenizer.control.contains_key(id)), "{text}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(tokenizer.encode_prompt(text).len(), 1);
    }
    assert_eq!(tokenizer.encode_text("a")[0], 291);
    assert_eq!(tokenizer.encode_text("<｜begin▁of▁sentence｜>a"), tokenizer.encode_text("a"));
    assert_eq!((tokenizer.pad(), tokenizer.vocab_size()), (1, 294));
}

#[test]
fn files_that_cannot_work_are_refused_with_the_reason() {
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_str(trained().json()).unwrap();
        edit(&mut value);
        Tokenizer::from_json(&value.to_string(), None).unwrap_err()
    };
    let unsafe_split = json!({"type": "Split", "pattern": {"Regex": r"(?<=(a+)+)b"},
        "behavior": "Isolated", "invert": false});
    let message = change(&|value| value["pre_tokenizer"] = unsafe_split.clone());
    assert!(message.contains("linear time"), "{message}");
    let message = change(&|value| value["decoder"] = Value::Null);
    assert!(message.contains("ByteLevel"), "{message}");
    let message = change(&|value| value["model"]["type"] = json!("Unigram"));
    assert!(message.contains("only BPE"), "{message}");
    let message = change(&|value| value["added_tokens"] = json!([]));
    assert!(message.contains("no end token"), "{message}");
    assert!(Tokenizer::from_json("{", None).is_err());
    assert!(Tokenizer::load(Path::new("/nonexistent/tokenizer.json")).is_err());
}

#[test]
fn a_saved_tokenizer_is_the_same_tokenizer_and_exports_what_transformers_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    trained().save(&path).unwrap();
    let config = trained().config(&ChatTemplate::own(), 512);
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    assert_eq!(loaded.json(), trained().json());
    assert_eq!(loaded.encode_prompt(TEXT), trained().encode_prompt(TEXT));
    assert_eq!((loaded.end(), loaded.pad(), loaded.added_bos()), (1, 0, None));
    assert_eq!(config["eos_token"], "<|end|>");
    assert_eq!(config["bos_token"], Value::Null);
    assert_eq!(
        ChatTemplate::from_folder(folder.path()).unwrap().unwrap().source(),
        ChatTemplate::own().source()
    );
}

#[test]
fn a_long_run_of_one_letter_takes_no_quadratic_time() {
    let time = |bytes: usize| {
        let text = "a".repeat(bytes);
        let start = std::time::Instant::now();
        assert_eq!(trained().decode(&trained().encode_content(&text)).len(), bytes);
        start.elapsed().as_secs_f64()
    };
    time(1 << 12);
    let (small, large) = (time(1 << 14), time(1 << 18));
    // 16 times the text: 16 times the time, with room for noise; quadratic would be 256 times.
    assert!(large < 100.0 * small + 0.2, "{small} s, then {large} s");
}

proptest! {
    #[test]
    fn any_text_comes_back(
        text in "(?s).{0,60}",
        bytes in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let lossy = String::from_utf8_lossy(&bytes).into_owned();
        let foreign = {
            static FOREIGN: OnceLock<Tokenizer> = OnceLock::new();
            FOREIGN.get_or_init(foreign)
        };
        for text in [text, lossy] {
            for tokenizer in [trained(), foreign] {
                let content = tokenizer.encode_content(&text);
                prop_assert_eq!(tokenizer.decode(&content), text.clone());
                prop_assert!(content.iter().all(|id| !tokenizer.control.contains_key(id)));
                let prompt = tokenizer.encode_prompt(&text);
                prop_assert_eq!(tokenizer.decode_with_specials(&prompt), text.clone());
            }
        }
    }

    #[test]
    fn texts_full_of_control_tokens_come_back(
        parts in proptest::collection::vec("<\\|(end|user)\\|>|<\\||\\|>|end| a|\n|é", 0..20),
    ) {
        let text = parts.concat();
        let content = trained().encode_content(&text);
        prop_assert!(content.iter().all(|id| *id > 4));
        prop_assert_eq!(trained().decode(&content), text.clone());
        prop_assert_eq!(trained().decode_with_specials(&trained().encode_prompt(&text)), text);
    }
}
