//! Tests of chat templates: goldens, masks, and contents that try to forge control tokens.

use super::*;
use crate::config::TokenizerConfig;
use proptest::prelude::*;
use serde_json::json;
use std::sync::OnceLock;

/// The template that DeepSeek-V2's chat models are published with.
const DEEPSEEK_V2: &str = concat!(
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}",
    "{% endif %}",
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}",
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}",
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}",
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
);

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn own() -> &'static Tokenizer {
    static OWN: OnceLock<Tokenizer> = OnceLock::new();
    OWN.get_or_init(|| {
        let config = TokenizerConfig { vocab_size: Some(320), ..TokenizerConfig::default() };
        let text = "Assistant: Sure User: Hello the cat swap: p u n k\n".repeat(20);
        Tokenizer::train(&config, &[text]).unwrap()
    })
}

/// Our vocabulary with DeepSeek's BOS and EOS, which adds a BOS to texts.
fn deepseek() -> Tokenizer {
    let mut value: serde_json::Value = serde_json::from_str(own().json()).unwrap();
    let next = own().vocab_size();
    let added = [(BOS, next), (EOS, next + 1)].map(|(content, id)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    });
    value["added_tokens"] = json!(added);
    let config = json!({"bos_token": BOS, "eos_token": EOS, "add_bos_token": true});
    Tokenizer::from_json(&value.to_string(), Some(&config)).unwrap()
}

fn talk() -> Vec<Message> {
    vec![
        Message::new(Role::System, "Be brief."),
        Message::new(Role::User, "Hello"),
        Message::new(Role::Assistant, "Sure"),
        Message::new(Role::User, "the cat"),
    ]
}

#[test]
fn our_template_is_control_tokens_and_contents_alone() {
    let chat = ChatTemplate::own();
    let text = chat.prompt_text(&talk()).unwrap();
    assert_eq!(
        text,
        "<|system|>Be brief.<|user|>Hello<|assistant|>Sure<|end|><|user|>the cat<|assistant|>"
    );
    let tokens = chat.encode_prompt(own(), &talk()).unwrap();
    assert_eq!(tokens, own().encode_prompt(&text));
    assert_eq!(*tokens.last().unwrap(), 4);
    let tool = [Message::new(Role::Tool, "x")];
    let fault = chat.prompt_text(&tool).unwrap_err().to_string();
    assert!(fault.contains("only system, user and assistant"), "{fault}");
}

#[test]
fn deepseeks_prompt_ends_with_assistant_colon_and_has_one_bos() {
    let chat = ChatTemplate::new(DEEPSEEK_V2, BOS, EOS).unwrap();
    let text = chat.prompt_text(&talk()).unwrap();
    let golden =
        format!("{BOS}Be brief.\n\nUser: Hello\n\nAssistant: Sure{EOS}User: the cat\n\nAssistant:");
    assert_eq!(text, golden);
    let tokenizer = deepseek();
    let tokens = chat.encode_prompt(&tokenizer, &talk()).unwrap();
    let bos = tokenizer.bos().unwrap();
    assert_eq!(tokens.iter().filter(|id| **id == bos).count(), 1, "one BOS");
    assert_eq!(tokens[0], bos);
    // Encoding the rendered text gives the same ids, and no second BOS.
    assert_eq!(tokens, tokenizer.encode_prompt(&text));
    assert_eq!(tokens, tokenizer.encode_text(&text));
    assert!(tokenizer.decode(&tokens).ends_with("Assistant:"));
}

#[test]
fn targets_are_the_replies_and_their_end_tokens_in_any_template() {
    let mut messages = talk();
    messages.push(Message::new(Role::Assistant, "Sure"));
    let deepseek = deepseek();
    let templates = [
        (ChatTemplate::own(), own(), "Sure<|end|>Sure<|end|>".to_string()),
        // The blank before a reply belongs to the reply's first token.
        (
            ChatTemplate::new(DEEPSEEK_V2, BOS, EOS).unwrap(),
            &deepseek,
            format!(" Sure{EOS} Sure{EOS}"),
        ),
    ];
    for (chat, tokenizer, expected) in templates {
        let sequence = chat.encode_conversation(tokenizer, &messages).unwrap();
        let zipped = sequence.tokens.iter().zip(&sequence.target);
        let targets: Vec<u32> = zipped.filter(|(_, target)| **target).map(|(id, _)| *id).collect();
        assert_eq!(tokenizer.decode_with_specials(&targets), expected);
        // What precedes the last reply's targets is exactly the generation prompt.
        let prompt = chat.encode_prompt(tokenizer, &messages[..4]).unwrap();
        assert_eq!(sequence.tokens[..prompt.len()], prompt);
        assert!(!sequence.target[prompt.len() - 1] && sequence.target[prompt.len()]);
    }
}

#[test]
fn templates_that_touch_contents_or_run_into_errors_are_refused() {
    let render = |source: &str| {
        ChatTemplate::new(source, "", "<|end|>").and_then(|chat| chat.prompt_text(&talk()))
    };
    let fault = render("{{ messages[0].content[:1] }}").unwrap_err().to_string();
    assert!(fault.contains("changes the contents"), "{fault}");
    assert!(render("{% for %}").unwrap_err().to_string().contains("no Jinja"));
    assert!(
        render("{{ raise_exception('no tools') }}").unwrap_err().to_string().contains("no tools")
    );
    assert!(render("\u{10fffc}").is_err());
    let python = "{{ 'a b'.split(' ')[1].strip().upper() }}{{ messages[1].get('role') }}\n";
    assert_eq!(render(python).unwrap(), "Buser");
    assert!(render("{{ 'a'.quit() }}").unwrap_err().to_string().contains("quit"));
}

#[test]
fn a_folder_may_hold_one_template_several_or_a_file_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer_config.json");
    let source = |config: serde_json::Value| {
        std::fs::write(&path, config.to_string()).unwrap();
        ChatTemplate::from_folder(folder.path()).unwrap().map(|chat| chat.source().to_string())
    };
    assert_eq!(ChatTemplate::from_folder(folder.path()).unwrap().map(|_| ()), None);
    assert_eq!(source(json!({"chat_template": "a"})).as_deref(), Some("a"));
    let template = |name: &str, source: &str| json!({"name": name, "template": source});
    let named = json!({"chat_template": [template("tool_use", "b"), template("default", "c")]});
    assert_eq!(source(named).as_deref(), Some("c"));
    assert_eq!(source(json!({})), None);
    std::fs::write(folder.path().join("chat_template.jinja"), "d").unwrap();
    assert_eq!(source(json!({})).as_deref(), Some("d"));
}

/// Control tokens, our markers, Jinja, and any character.
const HOSTILE: &str = concat!(
    "<\\|(end|user|system|assistant|pad)\\|>|<\\||\u{10fffc}0\u{10fffd}|",
    "\\{\\{ eos_token \\}\\}| a|\\PC"
);

proptest! {
    #[test]
    fn no_content_forges_a_control_token(
        parts in proptest::collection::vec(HOSTILE, 0..8),
    ) {
        let content = parts.concat();
        let messages = vec![
            Message::new(Role::User, content.clone()),
            Message::new(Role::Assistant, content.clone()),
        ];
        let chat = ChatTemplate::own();
        let tokens = chat.encode_conversation(own(), &messages).unwrap().tokens;
        let specials: Vec<u32> = tokens.iter().copied().filter(|id| *id < 5).collect();
        prop_assert_eq!(specials, vec![3, 4, 1]);
        prop_assert_eq!(own().decode(&tokens), format!("{content}{content}"));
    }
}

#[test]
fn a_template_that_never_ends_or_never_stops_writing_is_stopped() {
    let render = |source: &str, content: &str| {
        let template = ChatTemplate::new(source, "", "").unwrap();
        template.render(&[Message::new(Role::User, content)], true).map_err(|e| e.to_string())
    };
    let nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(render(nested, "x").unwrap_err().ends_with("it takes more than 1000000 steps"));
    let long = "{{ 'abcdefgh' * 1000000 }}";
    assert!(render(long, "x").unwrap_err().ends_with("it writes more than 1048576 bytes"));
    let repeats = "{% for a in range(1000) %}{{ messages[0]['content'] }}{% endfor %}";
    let fault = render(repeats, &"y".repeat(1 << 20)).unwrap_err();
    assert!(fault.contains("repeats contents"), "{fault}");
    assert_eq!(render("{{ messages[0]['content'] }}", "x").unwrap().len(), 1);
}
