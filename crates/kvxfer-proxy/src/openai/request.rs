//! What a client asked. The body is read once; every field of it stays as the client wrote it and goes on to the
//! engines, and the few that steer the proxy are read out into plain types.

use std::ops::Range;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::ApiError;
use super::leg::Leg;
use super::object::{Object, write_patched};
use super::plan;

/// Which of the two APIs a request came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `POST /v1/completions`.
    Completions,
    /// `POST /v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// The path, the same at the proxy and at the engines.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// The id of an answer, from a request's id. An engine that is sent the same `X-Request-Id` says the same.
    pub fn id(self, request_id: &str) -> String {
        match self {
            Self::Completions => format!("cmpl-{request_id}"),
            Self::Chat => format!("chatcmpl-{request_id}"),
        }
    }
}

/// Who answers a chat of plain text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Chats {
    /// The prefiller its first token, the decoder's `/v1/completions` the rest.
    #[default]
    FirstToken,
    /// The decoder's own chat endpoint, which knows its reasoning parser; see
    /// [`Plan::DecoderSamples`](super::Plan::DecoderSamples).
    Engine,
}

/// What one request may ask for, and how it is read.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompts in one request; each is a prefill and a transfer of its own.
    pub max_prompts: usize,
    /// Tokens of one prompt.
    pub max_prompt_tokens: usize,
    /// Who answers chats.
    pub chats: Chats,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_prompts: 128, max_prompt_tokens: 4 << 20, chats: Chats::default() }
    }
}

/// Where the tokens of one prompt come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The client sent them.
    Known(Vec<u32>),
    /// They are the answer to this body, sent to a prefiller's `POST /tokenize`; see
    /// [`Tokenized::parse`](super::Tokenized::parse).
    Tokenize(Vec<u8>),
    /// They are of no use: the decoder answers this request alone, for the reason given. Use
    /// [`Request::decoder_leg`].
    NotNeeded(String),
}

/// One parsed request.
#[derive(Debug, Clone)]
pub struct Request {
    endpoint: Endpoint,
    body: Bytes,
    fields: Vec<(Box<str>, Range<usize>)>,
    prompts: Prompts,
    limits: Limits,
    pub(super) view: View,
}

/// The fields that steer the proxy.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "they are the request's own, each a field of it")]
pub(super) struct View {
    pub(super) model: Option<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) n: usize,
    pub(super) max_tokens: Option<u64>,
    pub(super) min_tokens: u64,
    pub(super) stop: Vec<String>,
    pub(super) return_token_ids: bool,
    /// The reason why the decoder has to sample the first token as well; see `plan`.
    pub(super) decoder_samples: Option<String>,
    /// The reason why a prefiller is of no use.
    pub(super) decoder_only: Option<String>,
}

#[derive(Debug, Clone)]
enum Prompts {
    /// Raw JSON strings.
    Texts(Vec<Range<usize>>),
    Tokens(Vec<Vec<u32>>),
    Chat,
    /// Not given in a form the proxy reads (`prompt_embeds`).
    Other,
}

impl Request {
    /// Reads a body. Errors name the field and the value; whatever the proxy has no use for is left to the engine
    /// to judge.
    pub fn parse(endpoint: Endpoint, body: Bytes, limits: &Limits) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(&body).map_err(|e| {
            ApiError::new(400, format!("The body is not UTF-8 from byte {} on.", e.valid_up_to()))
        })?;
        let object = Object::parse(text)
            .map_err(|e| ApiError::new(400, format!("The body must be a JSON object: {e}.")))?;
        let mut view = View::read(endpoint, &object)?;
        if endpoint == Endpoint::Chat && limits.chats == Chats::Engine {
            view.decoder_samples.get_or_insert_with(|| "chats: engine".into());
        }
        let prompts = match endpoint {
            Endpoint::Completions => Prompts::read(text, &object, limits)?,
            Endpoint::Chat => Prompts::read_chat(&object)?,
        };
        let fields = object.iter().map(|(key, value)| (Box::from(key), range_in(text, value))).collect();
        Ok(Self { endpoint, fields, prompts, view, limits: limits.clone(), body })
    }

    /// The API it came by.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The model's name, when one was given.
    pub fn model(&self) -> Option<&str> {
        self.view.model.as_deref()
    }

    /// Whether the client wants a stream.
    pub fn stream(&self) -> bool {
        self.view.stream
    }

    /// Tokens asked for, when the client said so. `/v1/completions` means 16 when it did not.
    pub fn max_tokens(&self) -> Option<u64> {
        self.view.max_tokens
    }

    /// How many prompts it has; each becomes a [`Leg`].
    pub fn prompts(&self) -> usize {
        match &self.prompts {
            Prompts::Texts(texts) => texts.len(),
            Prompts::Tokens(lists) => lists.len(),
            Prompts::Chat | Prompts::Other => 1,
        }
    }

    /// Completions of each prompt.
    pub fn n(&self) -> usize {
        self.view.n
    }

    /// The id the client gave in the body (`request_id`); the `X-Request-Id` header comes before it.
    pub fn request_id(&self) -> Option<String> {
        let raw = self.raw("request_id")?;
        serde_json::from_str(raw).ok()
    }

    /// How the tokens of prompt `index` are found.
    pub fn tokens(&self, index: usize) -> TokenSource {
        if let Some(why) = &self.view.decoder_only {
            return TokenSource::NotNeeded(why.clone());
        }
        match &self.prompts {
            Prompts::Tokens(lists) => TokenSource::Known(lists.get(index).cloned().unwrap_or_default()),
            Prompts::Texts(_) => TokenSource::Tokenize(self.tokenize_text(index)),
            Prompts::Chat => TokenSource::Tokenize(self.tokenize_chat()),
            Prompts::Other => TokenSource::NotNeeded("prompt".into()),
        }
    }

    /// The leg of prompt `index`, now that its tokens are known. `max_model_len` is the engine's context length
    /// where somebody told it (`/tokenize` does).
    pub fn leg(&self, index: usize, tokens: Vec<u32>, max_model_len: Option<u64>) -> Result<Leg, ApiError> {
        if tokens.len() > self.limits.max_prompt_tokens {
            return Err(ApiError::bad(
                "prompt",
                format!(
                    "The prompt has {} tokens, more than the {} that this proxy takes.",
                    tokens.len(),
                    self.limits.max_prompt_tokens
                ),
            ));
        }
        let plan = plan::choose(self, tokens.len(), max_model_len);
        Ok(Leg::new(index, tokens, plan, max_model_len))
    }

    /// The leg of prompt `index` when the decoder answers alone: no prefiller is well, or tokens are not needed.
    pub fn decoder_leg(&self, index: usize, why: impl Into<String>) -> Leg {
        Leg::new(index, Vec::new(), plan::Plan::DecoderOnly(why.into()), None)
    }

    /// The raw value of a field, unless missing or null.
    pub(super) fn raw(&self, key: &str) -> Option<&str> {
        let (_, range) = self.fields.iter().find(|(k, _)| **k == *key)?;
        Some(self.slice(range)).filter(|raw| *raw != "null")
    }

    /// The fields in order, raw.
    pub(super) fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(key, range)| (key.as_ref(), self.slice(range)))
    }

    /// The body with changes.
    pub(super) fn write(&self, out: &mut Vec<u8>, patches: &[(&str, Option<&str>)]) {
        write_patched(out, self.fields(), patches);
    }

    /// The body's length, to size what is made of it.
    pub(super) fn len(&self) -> usize {
        self.body.len()
    }

    /// Prompt `index` as a value of `prompt`; `None` when the field as sent is already that.
    pub(super) fn single_prompt(&self, index: usize) -> Option<String> {
        if self.prompts() == 1 {
            return None;
        }
        match &self.prompts {
            Prompts::Texts(texts) => texts.get(index).map(|range| self.slice(range).to_owned()),
            Prompts::Tokens(lists) => lists.get(index).map(|list| serde_json::json!(list).to_string()),
            Prompts::Chat | Prompts::Other => None,
        }
    }

    fn slice(&self, range: &Range<usize>) -> &str {
        // The ranges were taken from this very text, which was checked to be UTF-8.
        std::str::from_utf8(&self.body[range.clone()]).unwrap_or("null")
    }

    fn tokenize_text(&self, index: usize) -> Vec<u8> {
        let prompt = match &self.prompts {
            Prompts::Texts(texts) => texts.get(index).map_or("\"\"", |range| self.slice(range)),
            _ => "\"\"",
        };
        let keep = ["model", "add_special_tokens"];
        let fields = self.fields().filter(|(key, _)| keep.contains(key));
        let mut out = Vec::with_capacity(prompt.len() + 128);
        write_patched(&mut out, fields, &[("prompt", Some(prompt))]);
        out
    }

    fn tokenize_chat(&self) -> Vec<u8> {
        let keep = [
            "model",
            "messages",
            "add_generation_prompt",
            "continue_final_message",
            "add_special_tokens",
            "chat_template",
            "chat_template_kwargs",
            "tools",
        ];
        let fields = self.fields().filter(|(key, _)| keep.contains(key));
        let mut out = Vec::with_capacity(self.len() + 128);
        // What the chat endpoint hands to the template beyond that, `/tokenize` only takes as the template's own.
        match self.template_arguments() {
            Some(arguments) => {
                write_patched(&mut out, fields, &[("chat_template_kwargs", Some(&arguments))]);
            }
            None => write_patched(&mut out, fields, &[]),
        }
        out
    }

    /// `chat_template_kwargs` with `documents` and `reasoning_effort`, where the request has one of the latter.
    fn template_arguments(&self) -> Option<String> {
        let (documents, effort) = (self.raw("documents"), self.raw("reasoning_effort"));
        if documents.is_none() && effort.is_none() {
            return None;
        }
        let given = Object::parse(self.raw("chat_template_kwargs").unwrap_or("{}")).unwrap_or_default();
        let mut patches = Vec::new();
        patches.extend(documents.map(|raw| ("documents", Some(raw))));
        if let Some(raw) = effort {
            patches.push(("reasoning_effort", Some(raw)));
            if given.get("enable_thinking").is_none() {
                let thinks = if raw == "\"none\"" { "false" } else { "true" };
                patches.push(("enable_thinking", Some(thinks)));
            }
        }
        let mut out = Vec::new();
        given.write(&mut out, &patches);
        String::from_utf8(out).ok()
    }
}

impl View {
    fn read(endpoint: Endpoint, object: &Object<'_>) -> Result<Self, ApiError> {
        let mut view = Self {
            model: read(object, "model", "a string")?,
            stream: read(object, "stream", "a boolean")?.unwrap_or(false),
            n: count(object, "n")?.unwrap_or(1) as usize,
            min_tokens: count(object, "min_tokens")?.unwrap_or(0),
            return_token_ids: read(object, "return_token_ids", "a boolean")?.unwrap_or(false),
            stop: stop(object)?,
            ..Self::default()
        };
        if view.n == 0 {
            return Err(ApiError::bad("n", "n must be at least 1, got 0."));
        }
        view.max_tokens = match (endpoint, count(object, "max_completion_tokens")?) {
            (Endpoint::Chat, Some(most)) => Some(most),
            _ => count(object, "max_tokens")?,
        };
        if let Some(raw) = object.present("stream_options") {
            let options = Object::parse(raw)
                .map_err(|_| ApiError::bad("stream_options", "`stream_options` must be an object."))?;
            if !view.stream {
                return Err(ApiError::bad(
                    "stream_options",
                    "Stream options can only be defined when `stream=True`.",
                ));
            }
            view.include_usage = read(&options, "include_usage", "a boolean")?.unwrap_or(false);
            // vLLM heeds the second only together with the first.
            view.continuous_usage =
                view.include_usage && read(&options, "continuous_usage_stats", "a boolean")?.unwrap_or(false);
        }
        view.decoder_only = plan::decoder_only(endpoint, object);
        view.decoder_samples = plan::decoder_samples(endpoint, object, view.max_tokens);
        Ok(view)
    }
}

impl Prompts {
    fn read(text: &str, object: &Object<'_>, limits: &Limits) -> Result<Self, ApiError> {
        let empty = |detail: &str| {
            Err(ApiError::bad(
                "prompt",
                format!("Either prompt or prompt_embeds must be provided and non-empty{detail}."),
            ))
        };
        let Some(raw) = object.present("prompt") else {
            return if object.present("prompt_embeds").is_some_and(|raw| raw != "[]") {
                Ok(Self::Other)
            } else {
                empty("")
            };
        };
        if object.present("prompt_embeds").is_some_and(|raw| raw != "[]") {
            return Ok(Self::Other);
        }
        if raw.starts_with('"') {
            return if raw == "\"\"" { empty("") } else { Ok(Self::Texts(vec![range_in(text, raw)])) };
        }
        let Some(inner) = raw.strip_prefix('[') else { return Err(wrong_prompt(raw)) };
        match inner.trim_start().as_bytes().first() {
            Some(b']') => empty("; the list is empty"),
            Some(b'"') => {
                let texts: Vec<&RawValue> = serde_json::from_str(raw).map_err(|_| wrong_prompt(raw))?;
                if texts.iter().any(|text| !text.get().starts_with('"')) {
                    return Err(wrong_prompt(raw));
                }
                few_enough(texts.len(), limits)?;
                Ok(Self::Texts(texts.iter().map(|value| range_in(text, value.get())).collect()))
            }
            Some(b'[') => {
                let lists: Vec<Vec<u32>> = serde_json::from_str(raw).map_err(|e| wrong_tokens(&e))?;
                if let Some(at) = lists.iter().position(Vec::is_empty) {
                    return empty(&format!("; prompt {at} of the list is empty"));
                }
                few_enough(lists.len(), limits)?;
                Ok(Self::Tokens(lists))
            }
            _ => Ok(Self::Tokens(vec![serde_json::from_str(raw).map_err(|e| wrong_tokens(&e))?])),
        }
    }

    fn read_chat(object: &Object<'_>) -> Result<Self, ApiError> {
        match object.present("messages") {
            None => Err(ApiError::bad("messages", "`messages` is missing; it must be a list of messages.")),
            Some(raw) if !raw.starts_with('[') => {
                Err(ApiError::bad("messages", "`messages` must be a list."))
            }
            Some(raw) if raw[1..].trim_start().starts_with(']') => {
                Err(ApiError::bad("messages", "`messages` is empty; at least one message is needed."))
            }
            Some(_) => Ok(Self::Chat),
        }
    }
}

fn few_enough(prompts: usize, limits: &Limits) -> Result<(), ApiError> {
    if prompts <= limits.max_prompts {
        return Ok(());
    }
    Err(ApiError::bad(
        "prompt",
        format!(
            "prompt list length {prompts} exceeds the maximum allowed count of {}; send several requests.",
            limits.max_prompts
        ),
    ))
}

fn wrong_prompt(raw: &str) -> ApiError {
    ApiError::bad(
        "prompt",
        format!(
            "`prompt` must be a string, a list of strings, a list of tokens or a list of token lists, got {}.",
            excerpt(raw)
        ),
    )
}

fn wrong_tokens(error: &serde_json::Error) -> ApiError {
    ApiError::bad("prompt", format!("`prompt` is not a list of token ids (non-negative integers): {error}."))
}

/// Where `part`, a piece of `whole`, lies in it.
fn range_in(whole: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    start..start + part.len()
}

/// The beginning of a value, for error texts.
fn excerpt(raw: &str) -> String {
    let short: String = raw.chars().take(80).collect();
    if short.len() < raw.len() { format!("{short}…") } else { short }
}

/// A field of a type, unless missing or null.
fn read<'a, T: serde::Deserialize<'a>>(
    object: &Object<'a>,
    key: &str,
    what: &str,
) -> Result<Option<T>, ApiError> {
    let Some(raw) = object.present(key) else { return Ok(None) };
    serde_json::from_str(raw)
        .map(Some)
        .map_err(|_| ApiError::bad(key, format!("`{key}` must be {what}, got {}.", excerpt(raw))))
}

/// A non-negative integer; 16.0 is one, as it is for vLLM.
fn count(object: &Object<'_>, key: &str) -> Result<Option<u64>, ApiError> {
    let Some(raw) = object.present(key) else { return Ok(None) };
    let whole = raw.strip_suffix(".0").unwrap_or(raw);
    match u64::from_str(whole) {
        Ok(number) if number < 1 << 53 => Ok(Some(number)),
        _ => {
            Err(ApiError::bad(key, format!("`{key}` must be a non-negative integer, got {}.", excerpt(raw))))
        }
    }
}

fn stop(object: &Object<'_>) -> Result<Vec<String>, ApiError> {
    match object.present("stop") {
        None => Ok(Vec::new()),
        Some(raw) if raw.starts_with('"') => {
            Ok(read::<String>(object, "stop", "a string")?.into_iter().collect())
        }
        Some(_) => Ok(read(object, "stop", "a string or a list of strings")?.unwrap_or_default()),
    }
}
