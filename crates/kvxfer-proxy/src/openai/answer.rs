//! What the engines' answers say, read into plain types: tokens from `/tokenize`, the first token from a prefiller.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::ApiError;
use super::object::Object;

/// The answer of `POST /tokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Tokenized {
    /// The prompt's tokens.
    pub tokens: Vec<u32>,
    /// The engine's context length.
    #[serde(default)]
    pub max_model_len: Option<u64>,
}

impl Tokenized {
    /// Reads it. `who` names the engine in errors.
    pub fn parse(who: &str, body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|e| ApiError::garbled(who, format_args!("/tokenize: {e}")))
    }
}

/// Token counts of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all completions.
    pub completion_tokens: u64,
}

impl Usage {
    /// Reads a `usage` object; what is missing counts as zero.
    pub(super) fn read(raw: &str) -> Self {
        let object = Object::parse(raw).unwrap_or_default();
        let number = |key| object.get(key).and_then(|raw| raw.parse().ok()).unwrap_or(0);
        Self { prompt_tokens: number("prompt_tokens"), completion_tokens: number("completion_tokens") }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
    }

    /// `template`, a `usage` object, with these counts; `details` replaces what it says about the prompt.
    pub(super) fn write(self, template: &str, details: Option<&str>) -> String {
        let (prompt, completion) = (self.prompt_tokens.to_string(), self.completion_tokens.to_string());
        let total = (self.prompt_tokens + self.completion_tokens).to_string();
        let mut patches = vec![
            ("prompt_tokens", Some(prompt.as_str())),
            ("total_tokens", Some(total.as_str())),
            ("completion_tokens", Some(completion.as_str())),
        ];
        let object = Object::parse(template).unwrap_or_default();
        if object.get("prompt_tokens_details").is_some() || details.is_some() {
            patches.push(("prompt_tokens_details", Some(details.unwrap_or("null"))));
        }
        let mut out = Vec::with_capacity(96);
        object.write(&mut out, &patches);
        String::from_utf8(out).unwrap_or_default()
    }
}

/// The first token of an answer, as a prefiller gave it.
#[derive(Debug, Clone)]
pub struct FirstToken {
    /// The token, when the engine says which (`kv_transfer_params.first_tok`, or `token_ids`).
    pub token: Option<u32>,
    /// Its text; empty for a token without text of its own.
    pub text: String,
    /// Why the answer ended there; `length` means no more than that one token was asked for.
    pub finish_reason: String,
    /// Tokens of the prompt, and one.
    pub usage: Usage,
    pub(super) model: String,
    /// Raw values, `null` where the engine gave none.
    pub(super) stop_reason: String,
    pub(super) logprobs: Option<String>,
    pub(super) fingerprint: Option<String>,
    pub(super) prompt_details: Option<String>,
    /// The whole answer, for the case that nothing follows.
    pub(super) body: String,
}

impl FirstToken {
    /// Reads a prefiller's answer. `who` names it in errors.
    pub fn parse(who: &str, body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|_| ApiError::garbled(who, "not UTF-8"))?;
        let answer: Answer<'_> = serde_json::from_str(text).map_err(|e| ApiError::garbled(who, e))?;
        let choice = answer.choices.first().ok_or_else(|| ApiError::garbled(who, "no choice in it"))?;
        let raw_usage = answer.usage.map_or("{}", RawValue::get);
        let mut usage = Usage::read(raw_usage);
        usage.completion_tokens = usage.completion_tokens.max(1);
        let token = answer
            .kv_transfer_params
            .and_then(|params| params.first_tok)
            .or_else(|| choice.token_ids.as_ref().and_then(|ids| ids.first().copied()));
        let details =
            Object::parse(raw_usage).ok().and_then(|o| o.present("prompt_tokens_details").map(str::to_owned));
        Ok(Self {
            token,
            text: choice.text.clone(),
            finish_reason: choice.finish_reason.clone().unwrap_or_else(|| "length".into()),
            usage,
            model: answer.model.unwrap_or_default(),
            stop_reason: choice.stop_reason.map_or("null", RawValue::get).to_owned(),
            logprobs: present(choice.logprobs),
            fingerprint: present(answer.system_fingerprint),
            prompt_details: details,
            body: text.to_owned(),
        })
    }

    /// `[token]`, or `[]` when it is not known.
    pub(super) fn token_ids(&self) -> String {
        self.token.map_or_else(|| "[]".into(), |token| format!("[{token}]"))
    }
}

fn present(raw: Option<&RawValue>) -> Option<String> {
    raw.map(|raw| raw.get().to_owned()).filter(|raw| raw != "null")
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(default)]
    model: Option<String>,
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    system_fingerprint: Option<&'a RawValue>,
    #[serde(default)]
    kv_transfer_params: Option<KvParams>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    text: String,
    #[serde(borrow, default)]
    logprobs: Option<&'a RawValue>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(borrow, default)]
    stop_reason: Option<&'a RawValue>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct KvParams {
    #[serde(default)]
    first_tok: Option<u32>,
}
