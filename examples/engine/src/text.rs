//! Text to tokens and back: a model's own tokenizer, or one token per byte; chat templates; text that grows token by token.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Begin and end of a text in the byte vocabulary; the 256 bytes come first.
const BYTE_BOS: u32 = 256;
pub(crate) const BYTE_EOS: u32 = 257;
/// Tokens of the byte vocabulary.
pub(crate) const BYTE_VOCAB: usize = 258;
/// Used where the model brings no template.
const PLAIN_TEMPLATE: &str = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
/// Tokens of context that a piece of text needs so that it decodes as it would in the whole.
const CONTEXT: usize = 6;

/// A tokenizer with its chat template.
pub(crate) struct Text {
    kind: Kind,
    template: Environment<'static>,
    bos: String,
    eos: String,
}

enum Kind {
    Bytes,
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Text {
    /// One token per byte.
    pub(crate) fn bytes() -> Result<Self, String> {
        Ok(Self {
            kind: Kind::Bytes,
            template: environment(PLAIN_TEMPLATE)?,
            bos: String::new(),
            eos: String::new(),
        })
    }

    /// `tokenizer.json` of a model's folder, with `chat_template.jinja` or the template of `tokenizer_config.json`.
    pub(crate) fn from_folder(folder: &Path) -> Result<Self, String> {
        let path = folder.join("tokenizer.json");
        let tokenizer =
            tokenizers::Tokenizer::from_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let config: Value = std::fs::read_to_string(folder.join("tokenizer_config.json"))
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let template = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let template = template.or_else(|| match config.get("chat_template") {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Array(named)) => named
                .iter()
                .find(|t| t["name"] == "default")
                .and_then(|t| t["template"].as_str())
                .map(str::to_owned),
            _ => None,
        });
        let special = |name: &str| match &config[name] {
            Value::String(text) => text.clone(),
            other => other["content"].as_str().unwrap_or_default().to_owned(),
        };
        Ok(Self {
            kind: Kind::HuggingFace(Box::new(tokenizer)),
            template: environment(template.as_deref().unwrap_or(PLAIN_TEMPLATE))
                .map_err(|e| format!("chat template of {}: {e}", folder.display()))?,
            bos: special("bos_token"),
            eos: special("eos_token"),
        })
    }

    /// Tokens of a text.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, String> {
        match &self.kind {
            Kind::Bytes => {
                Ok(add_special.then_some(BYTE_BOS).into_iter().chain(text.bytes().map(u32::from)).collect())
            }
            Kind::HuggingFace(t) => {
                let encoding = t.encode_fast(text, add_special).map_err(|e| e.to_string())?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// Text of tokens; bytes that are no UTF-8 read as the replacement character.
    pub(crate) fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        match &self.kind {
            Kind::Bytes => {
                let mut bytes = Vec::with_capacity(tokens.len());
                for &token in tokens {
                    match u8::try_from(token) {
                        Ok(byte) => bytes.push(byte),
                        Err(_) if skip_special => {}
                        Err(_) => bytes.extend_from_slice(if token == BYTE_BOS { b"<s>" } else { b"</s>" }),
                    }
                }
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Kind::HuggingFace(t) => t.decode(tokens, skip_special).unwrap_or_default(),
        }
    }

    /// The name of a token in the vocabulary.
    pub(crate) fn name(&self, token: u32) -> String {
        match &self.kind {
            Kind::Bytes => self.decode(&[token], false),
            Kind::HuggingFace(t) => t.id_to_token(token).unwrap_or_default(),
        }
    }

    /// The prompt of a conversation.
    pub(crate) fn chat(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        tools: Option<&Value>,
        more: Option<&Map<String, Value>>,
    ) -> Result<String, String> {
        let messages =
            messages.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err("messages is empty; at least one is needed".into());
        }
        let mut context = more.cloned().unwrap_or_default();
        context.insert("messages".into(), messages.into());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("bos_token".into(), json!(self.bos));
        context.insert("eos_token".into(), json!(self.eos));
        if let Some(tools) = tools {
            context.insert("tools".into(), tools.clone());
        }
        let template = self.template.get_template("chat").map_err(|e| e.to_string())?;
        template.render(Serde(context)).map_err(|e| format!("the chat template failed: {e:#}"))
    }
}

/// As Hugging Face sets its templates up.
fn environment(template: &str) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| e.to_string())?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
    });
    env.add_template_owned("chat", template.to_owned()).map_err(|e| e.to_string())?;
    Ok(env)
}

/// A message whose content is plain text: parts of type `text` are joined by line ends.
fn message(i: usize, given: &Value) -> Result<Value, String> {
    let mut message = given.as_object().cloned().ok_or_else(|| format!("messages[{i}] is not an object"))?;
    if !message.get("role").is_some_and(Value::is_string) {
        return Err(format!("messages[{i}] has no role"));
    }
    let content = match message.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Option<Vec<_>> = parts.iter().map(|p| p["text"].as_str()).collect();
            texts.ok_or_else(|| format!("messages[{i}].content has parts that are not text"))?.join("\n")
        }
        Some(_) => return Err(format!("messages[{i}].content is neither a string nor a list of parts")),
    };
    message.insert("content".into(), content.into());
    Ok(Value::Object(message))
}

/// Text that grows with every token: only whole characters come out.
#[derive(Clone)]
pub(crate) struct Growing {
    tokens: Vec<u32>,
    /// Where decoding starts, and up to where text has come out.
    context: usize,
    read: usize,
    skip_special: bool,
}

impl Growing {
    /// Starts behind a prompt.
    pub(crate) fn new(prompt: &[u32], skip_special: bool) -> Self {
        let tokens = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        let read = tokens.len();
        Self { tokens, context: 0, read, skip_special }
    }

    /// The text that `token` completes; empty while a character is incomplete.
    pub(crate) fn push(&mut self, text: &Text, token: u32) -> String {
        self.tokens.push(token);
        let before = text.decode(&self.tokens[self.context..self.read], self.skip_special);
        let now = text.decode(&self.tokens[self.context..], self.skip_special);
        if now.ends_with('\u{fffd}') {
            return String::new();
        }
        let fresh = now.get(before.len()..).unwrap_or_default().to_owned();
        if !fresh.is_empty() {
            self.context = self.read;
            self.read = self.tokens.len();
        }
        fresh
    }
}

/// Text that comes out once it can no longer become a stop string.
#[derive(Clone)]
pub(crate) struct Stopping {
    stops: Vec<String>,
    /// Keep the stop string.
    include: bool,
    held: String,
    longest: usize,
}

impl Stopping {
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or_default();
        Self { stops, include, held: String::new(), longest }
    }

    /// Adds `text`; returns what may come out, and the stop string when one is complete.
    pub(crate) fn push(&mut self, text: &str) -> (String, Option<String>) {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(at, stop)| (*at + stop.len(), *at));
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(if self.include { at + stop.len() } else { at });
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.longest.saturating_sub(1).min(self.held.len());
        let mut cut = self.held.len() - keep;
        while !self.held.is_char_boundary(cut) {
            cut -= 1;
        }
        let rest = self.held.split_off(cut);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Whatever was held back.
    pub(crate) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_out_whole() {
        let text = Text::bytes().unwrap();
        let mut growing = Growing::new(&text.encode("prompt", true).unwrap(), true);
        let out: Vec<String> = "aé€b".bytes().map(|b| growing.push(&text, b.into())).collect();
        assert_eq!(out, ["a", "", "é", "", "", "€", "b"]);
    }

    #[test]
    fn a_stop_string_never_comes_out() {
        let mut stopping = Stopping::new(vec!["END".into(), "xy".into()], false);
        let out: Vec<_> = ["abE", "N", "Ex", "EN", "Dzz"].iter().map(|t| stopping.push(t)).collect();
        let text: String = out.iter().map(|(t, _)| t.as_str()).collect();
        assert_eq!(text, "abENEx");
        assert_eq!(out[4].1.as_deref(), Some("END"));
    }

    #[test]
    fn the_plain_template_and_its_refusals() {
        let text = Text::bytes().unwrap();
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        let prompt =
            text.chat(&[json!({"role": "system", "content": "s"}), parts], true, None, None).unwrap();
        assert_eq!(prompt, "system: s\nuser: a\nb\nassistant:");
        for bad in [json!("text"), json!({"content": "no role"}), json!({"role": "user", "content": 7})] {
            assert!(text.chat(&[bad], true, None, None).is_err());
        }
        assert!(text.chat(&[], true, None, None).is_err());
    }
}
