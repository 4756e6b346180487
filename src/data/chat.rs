//! The chat template: messages to one text, and to tokens in which no content can forge a special
//! one.
//!
//! A template is Jinja, ours or that of a Hugging Face folder. It is rendered with a marker in the
//! place of every message's content; the text between the markers is the template's own and may
//! hold special tokens, the contents may not. Text between two special tokens is encoded in one
//! piece, so that the ids are those of the usual tokenizers wherever no content spells a special
//! token.
//!
//! A template is foreign code: it is stopped after `FUEL` steps and `OUTPUT_LIMIT` bytes of output, and a rendered
//! conversation may not exceed `TEXT_LIMIT`.
//!
//! Not supported: templates that look inside a content (trim it, cut it); they see the marker, and
//! a marker that does not come back whole is refused.

use crate::config::fault::Fault;
use crate::config::limited::{Unread, read_limited_text};
use crate::data::chat_json::to_json;
use crate::data::example::Sequence;
use crate::data::tokenizer::{Part, Tokenizer};
use anyhow::Result;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers; its messages are what SFT trains on.
    Assistant,
    /// The output of a tool.
    Tool,
}

impl Role {
    /// The role's name in files and templates.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    /// Reads a role's name. Only known names pass, because a template may print the role.
    pub fn parse(name: &str) -> Result<Role, String> {
        match name {
            "system" => Ok(Role::System),
            "user" => Ok(Role::User),
            "assistant" => Ok(Role::Assistant),
            "tool" => Ok(Role::Tool),
            _ => Err(format!(
                "role {name:?} is unknown; use system, user or assistant (or tool, if the chat template knows it)"
            )),
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: Role, content: impl Into<String>) -> Message {
        Message { role, content: content.into() }
    }
}

/// Our own template: `<|system|>S<|user|>U<|assistant|>A<|end|>`.
pub const OWN_TEMPLATE: &str = "{% for message in messages %}\
    {% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}\
    {% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}\
    {% elif message['role'] == 'system' %}{{ '<|system|>' + message['content'] }}\
    {% else %}{{ raise_exception('only system, user and assistant messages are known') }}\
    {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// Steps that a template may take; published ones take some hundred a message.
const FUEL: u64 = 1_000_000;
/// Bytes that it may write itself.
const OUTPUT_LIMIT: usize = 1 << 20;
/// Bytes of a conversation with its contents, which a template may repeat.
const TEXT_LIMIT: usize = 64 << 20;

const CONFIG_FILE: &str = "tokenizer_config.json";
/// Most bytes of it, and of a template in a file of its own.
const FILE_LIMIT: u64 = 16 << 20;

const OPEN: char = '\u{10fffc}';
const CLOSE: char = '\u{10fffd}';

/// A chat template and the tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    /// What faults call it: with its file, if it has one.
    named: String,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// A piece of a rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// The message whose content it is; `None` for the template's own text.
    pub message: Option<usize>,
}

impl ChatTemplate {
    /// Our own template.
    pub fn own() -> ChatTemplate {
        ChatTemplate::new(OWN_TEMPLATE, "", "<|end|>").expect("our own template is valid")
    }

    /// A template from its source.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<ChatTemplate> {
        if source.contains([OPEN, CLOSE]) {
            return Err(Fault::user("the chat template holds U+10FFFC or U+10FFFD; remove them"));
        }
        let mut environment = Environment::new();
        // Published templates are written for these two settings.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_fuel(Some(FUEL));
        environment.set_syntax(syntax.expect("only the treatment of white space is changed"));
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment
            .add_template_owned("chat", source.to_string())
            .map_err(|error| Fault::user(format!("the chat template is no Jinja: {error}")))?;
        Ok(ChatTemplate {
            source: source.to_string(),
            named: "the chat template".to_string(),
            environment,
            bos_token: bos_token.to_string(),
            eos_token: eos_token.to_string(),
        })
    }

    /// The template of a Hugging Face folder; `None` if the folder has none.
    pub fn from_folder(folder: &Path) -> Result<Option<ChatTemplate>> {
        let config = folder.join(CONFIG_FILE);
        let fault = |reason: String| Fault::user(format!("{}: {reason}", config.display()));
        let Some(value) = read_tokenizer_config(folder)? else { return Ok(None) };
        let source = match &value["chat_template"] {
            serde_json::Value::String(source) => Some(source.clone()),
            // Several named templates: the one called "default".
            serde_json::Value::Array(named) => named
                .iter()
                .find(|entry| entry["name"] == "default")
                .and_then(|entry| entry["template"].as_str())
                .map(str::to_string),
            _ => read_if_there(&folder.join("chat_template.jinja"))?,
        };
        let Some(source) = source else { return Ok(None) };
        let bos = token_text(&value["bos_token"]).unwrap_or_default();
        let eos = token_text(&value["eos_token"]).unwrap_or_default();
        let template = ChatTemplate::new(&source, &bos, &eos);
        let mut template = template.map_err(|error| fault(error.to_string()))?;
        template.named = format!("{}: the chat template", config.display());
        Ok(Some(template))
    }

    /// The Jinja source, as it is exported.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The pieces of a conversation; `generation_prompt` ends it where the assistant's reply
    /// begins.
    pub fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<Vec<Piece>> {
        let fault = |reason: String| Fault::user(format!("{} fails: {reason}", self.named));
        let marked: Vec<Value> = messages
            .iter()
            .enumerate()
            .map(|(i, message)| {
                // An empty content stays empty: templates test for it.
                let empty = message.content.is_empty();
                let content = if empty { String::new() } else { format!("{OPEN}{i}{CLOSE}") };
                context! { role => message.role.name(), content => content }
            })
            .collect();
        let template = self.environment.get_template("chat").expect("added when it was made");
        let mut output = Limited(Vec::new());
        let rendered = template.render_captured_to(
            context! {
                messages => marked,
                add_generation_prompt => generation_prompt,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
            },
            &mut output,
        );
        rendered.map_err(|error| fault(reason(&error)))?;
        let text = String::from_utf8(output.0).expect("a template writes text");
        pieces(&text, messages).map_err(fault)
    }

    /// The tokens of a prompt: the conversation, ended where the reply begins.
    pub fn encode_prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        let pieces = self.render(messages, true)?;
        Ok(encode_pieces(tokenizer, &pieces, &[]).tokens)
    }

    /// The tokens of a whole conversation; targets are the assistant's replies and their end
    /// tokens.
    pub fn encode_conversation(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
    ) -> Result<Sequence> {
        let pieces = self.render(messages, false)?;
        let replies: Vec<bool> = messages.iter().map(|m| m.role == Role::Assistant).collect();
        Ok(encode_pieces(tokenizer, &pieces, &replies))
    }

    /// The text of a rendered prompt, special tokens included.
    pub fn prompt_text(&self, messages: &[Message]) -> Result<String> {
        Ok(self.render(messages, true)?.iter().map(|piece| piece.text.as_str()).collect())
    }
}

/// Takes [`OUTPUT_LIMIT`] bytes and no more.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a template's error means.
fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => format!("it takes more than {FUEL} steps"),
        ErrorKind::WriteFailure => format!("it writes more than {OUTPUT_LIMIT} bytes"),
        _ => error.detail().unwrap_or(&error.to_string()).to_string(),
    }
}

/// Encodes pieces; a token that touches the content of message i is a target if `replies[i]`, and
/// so is the first end token after it.
fn encode_pieces(tokenizer: &Tokenizer, pieces: &[Piece], replies: &[bool]) -> Sequence {
    let mut encoded = Sequence { tokens: Vec::new(), target: Vec::new() };
    let mut run = Run::default();
    let mut after_reply = false;
    for piece in pieces {
        if let Some(message) = piece.message {
            after_reply = replies.get(message).copied().unwrap_or(false);
            run.push(&piece.text, after_reply);
            continue;
        }
        for part in tokenizer.parts(&piece.text) {
            match part {
                Part::Plain(text) => run.push(text, false),
                Part::Special(id) => {
                    run.flush(tokenizer, &mut encoded);
                    let ends_reply = after_reply && id == tokenizer.end();
                    after_reply &= !ends_reply;
                    encoded.tokens.push(id);
                    encoded.target.push(ends_reply);
                }
            }
        }
    }
    run.flush(tokenizer, &mut encoded);
    if let Some(first) = encoded.target.first_mut() {
        *first = false;
    }
    encoded
}

/// Text between two special tokens, and the byte ranges of it that are replies.
#[derive(Default)]
struct Run {
    text: String,
    replies: Vec<std::ops::Range<usize>>,
}

impl Run {
    fn push(&mut self, text: &str, reply: bool) {
        if reply {
            self.replies.push(self.text.len()..self.text.len() + text.len());
        }
        self.text.push_str(text);
    }

    fn flush(&mut self, tokenizer: &Tokenizer, encoded: &mut Sequence) {
        for (token, span) in tokenizer.encode_spans(&self.text) {
            let touches = |r: &std::ops::Range<usize>| span.start < r.end && r.start < span.end;
            encoded.tokens.push(token);
            encoded.target.push(self.replies.iter().any(touches));
        }
        *self = Run::default();
    }
}

/// Splits a rendered text at its markers, each of which must be whole.
fn pieces(text: &str, messages: &[Message]) -> Result<Vec<Piece>, String> {
    let changed = || "it changes the contents of messages, which is not supported".to_string();
    let contents: usize = messages.iter().map(|message| message.content.len()).sum();
    let most = TEXT_LIMIT.max(2 * contents);
    let (mut pieces, mut bytes) = (Vec::new(), text.len());
    for (i, part) in text.split(OPEN).enumerate() {
        // Every part but the first begins with the number and the end of a marker.
        let own = if i == 0 {
            part
        } else {
            let (number, rest) = part.split_once(CLOSE).ok_or_else(changed)?;
            let message: usize = number.parse().map_err(|_| changed())?;
            let text = &messages.get(message).ok_or_else(changed)?.content;
            bytes += text.len();
            if bytes > most {
                return Err(format!("it repeats contents to more than {most} bytes"));
            }
            pieces.push(Piece { text: text.clone(), message: Some(message) });
            rest
        };
        if own.contains(CLOSE) {
            return Err(changed());
        }
        if !own.is_empty() {
            pieces.push(Piece { text: own.to_string(), message: None });
        }
    }
    Ok(pieces)
}

/// The tokenizer_config.json of a folder, if it has one.
pub(crate) fn read_tokenizer_config(folder: &Path) -> Result<Option<serde_json::Value>> {
    let path = folder.join(CONFIG_FILE);
    let parse = |text: String| {
        let malformed = |error| Fault::user(format!("{}: malformed: {error}", path.display()));
        serde_json::from_str(&text).map_err(malformed)
    };
    read_if_there(&path)?.map(parse).transpose()
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match read_limited_text(path, FILE_LIMIT) {
        Ok(text) => Ok(Some(text)),
        Err(Unread::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(unread) => Err(Fault::user(format!("{}: {unread}", path.display()))),
    }
}

/// A token of tokenizer_config.json: a string, or an object with `content`.
pub(crate) fn token_text(value: &serde_json::Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// The methods of Python's str and dict that published templates call.
fn python_method(
    _state: &mut minijinja::State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("no method {method}"));
    if value.kind() == ValueKind::Map && method == "get" {
        let [key, fallback @ ..] = arguments else { return Err(unknown()) };
        let found = value.get_item(key)?;
        let fallback = fallback.first().cloned().unwrap_or(Value::from(()));
        return Ok(if found.is_undefined() { fallback } else { found });
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let argument = arguments.first().and_then(|argument| argument.as_str());
    Ok(match (method, argument) {
        ("strip", None) => Value::from(text.trim()),
        ("lstrip", None) => Value::from(text.trim_start()),
        ("rstrip", None) => Value::from(text.trim_end()),
        ("startswith", Some(start)) => Value::from(text.starts_with(start)),
        ("endswith", Some(end)) => Value::from(text.ends_with(end)),
        ("split", Some(at)) => text.split(at).map(Value::from).collect(),
        ("upper", None) => Value::from(text.to_uppercase()),
        ("lower", None) => Value::from(text.to_lowercase()),
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests;
