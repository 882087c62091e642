//! The answer as a stream: the first token the moment it is there, then what the decoder sends, rewritten so that the
//! client sees one stream of one server.

use super::answer::{FirstToken, Usage};
use super::error::ApiError;
use super::full::{shifted_logprobs, text_length};
use super::leg::Leg;
use super::object::{Object, array, elements, string};
use super::request::{Endpoint, Request};
use super::sse::{Event, write_event};
use super::{DONE, Identity, chat};

/// How far a leg's stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegProgress {
    /// More is to come.
    Open,
    /// The engine has said that it is done.
    Done,
}

/// Joins the streams of a request's legs. Legs may take turns in any order; what is written goes to the client as is.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are the request's own, each a field of it")]
pub struct StreamJoin {
    chat: bool,
    id: String,
    created: String,
    include_usage: bool,
    continuous_usage: bool,
    return_token_ids: bool,
    n: usize,
    legs: Vec<State>,
    /// The engine's last chunk without choices, kept for its fields.
    usage_chunk: Option<String>,
    /// The model's name as an engine says it, raw.
    model: String,
    fingerprint: Option<String>,
}

/// What is known about one leg.
#[derive(Debug, Default)]
struct State {
    /// There was a first token, so what comes from the decoder is a completion's rest.
    continued: bool,
    /// Tokens of the prompt as the prefiller counted them.
    prompt_tokens: u64,
    prompt_details: Option<String>,
    /// Characters of the first token, for offsets.
    first_chars: usize,
    /// Pieces sent, one token each as a rule.
    pieces: u64,
    usage: Option<Usage>,
    done: bool,
}

impl StreamJoin {
    /// A join for all legs of a request.
    pub fn new(request: &Request, identity: &Identity) -> Self {
        let view = &request.view;
        Self {
            chat: request.endpoint() == Endpoint::Chat,
            id: string(&identity.id),
            created: identity.created.to_string(),
            include_usage: view.include_usage,
            continuous_usage: view.continuous_usage,
            return_token_ids: view.return_token_ids,
            n: view.n,
            legs: (0..request.prompts()).map(|_| State::default()).collect(),
            usage_chunk: None,
            model: string(request.model().unwrap_or("")),
            fingerprint: None,
        }
    }

    /// Pieces of text sent so far over all legs; a piece is a token as a rule.
    pub fn pieces(&self) -> u64 {
        self.legs.iter().map(|leg| leg.pieces).sum()
    }

    /// Whether every leg is done, so that [`finish`](Self::finish) is next.
    pub fn is_done(&self) -> bool {
        self.legs.iter().all(|leg| leg.done)
    }

    /// The prefiller's token, behind which the decoder will continue.
    pub fn first(&mut self, leg: &Leg, first: &FirstToken, out: &mut Vec<u8>) {
        self.write_first(leg, first, false, out);
    }

    /// The prefiller's token with which the answer ends.
    pub fn finished(&mut self, leg: &Leg, first: &FirstToken, out: &mut Vec<u8>) {
        self.write_first(leg, first, true, out);
        let state = &mut self.legs[leg.index()];
        state.usage = Some(first.usage);
        state.done = true;
    }

    /// An event of the decoder. An error means that the whole answer ends with [`fail`](Self::fail).
    pub fn event(&mut self, leg: &Leg, event: &Event, out: &mut Vec<u8>) -> Result<LegProgress, ApiError> {
        if event.data == DONE {
            self.legs[leg.index()].done = true;
            return Ok(LegProgress::Done);
        }
        let text =
            std::str::from_utf8(&event.data).map_err(|_| ApiError::garbled("the decoder", "not UTF-8"))?;
        let chunk = Object::parse(text).map_err(|e| ApiError::garbled("the decoder", e))?;
        if chunk.present("error").is_some() {
            return Err(ApiError {
                verbatim: Some(event.data.clone()),
                ..ApiError::upstream("the decoder", 500, text.as_bytes())
            });
        }
        let choices = chunk.get("choices").unwrap_or("[]");
        if choices == "[]" {
            self.keep_usage(leg, text, &chunk);
            return Ok(LegProgress::Open);
        }
        let state = &mut self.legs[leg.index()];
        state.pieces += 1;
        let base = leg.index() * self.n;
        // A leg that answers the request as it is, and the only one, has nothing to be changed but its name.
        let choices = if state.continued || base > 0 {
            let rewritten: Result<Vec<_>, _> =
                elements(choices).into_iter().map(|raw| rewrite(state, self.chat, base, raw)).collect();
            Some(array(&rewritten?))
        } else {
            None
        };
        let usage = chunk.present("usage").filter(|_| state.continued).map(|raw| {
            let completion_tokens = Usage::read(raw).completion_tokens + 1;
            Usage { prompt_tokens: state.prompt_tokens, completion_tokens }.write(raw, None)
        });
        let mut patches = vec![("id", Some(self.id.as_str())), ("created", Some(self.created.as_str()))];
        patches.extend(choices.as_ref().map(|raw| ("choices", Some(raw.as_str()))));
        patches.extend(usage.as_ref().map(|raw| ("usage", Some(raw.as_str()))));
        if self.chat {
            patches.push(("object", Some(chat::CHUNK)));
        }
        out.extend_from_slice(b"data: ");
        chunk.write(out, &patches);
        out.extend_from_slice(b"\n\n");
        Ok(LegProgress::Open)
    }

    /// The end, when every leg is done.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            self.write_usage(out);
        }
        write_event(out, DONE.as_bytes());
    }

    /// The end, when something went wrong after the stream had begun.
    pub fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        error.write_events(out);
    }

    fn write_first(&mut self, leg: &Leg, first: &FirstToken, ends: bool, out: &mut Vec<u8>) {
        let tokens =
            if self.return_token_ids { serde_json::json!(leg.tokens()).to_string() } else { "null".into() };
        let ids = if self.return_token_ids { first.token_ids() } else { "null".into() };
        let (finish, stop) = if ends {
            (string(&first.finish_reason), first.stop_reason.as_str())
        } else {
            ("null".into(), "null")
        };
        let state = &mut self.legs[leg.index()];
        state.continued = true;
        state.prompt_tokens = first.usage.prompt_tokens;
        state.prompt_details.clone_from(&first.prompt_details);
        state.pieces += 1;
        if let Some(logprobs) = &first.logprobs {
            state.first_chars =
                Object::parse(logprobs).map(|object| text_length(&object)).unwrap_or_default();
        }
        self.model = string(&first.model);
        self.fingerprint.clone_from(&first.fingerprint);

        let index = leg.index() * self.n;
        let text = string(&first.text);
        let prompt_tokens = first.usage.prompt_tokens;
        if self.chat {
            let extra = format!(",\"prompt_token_ids\":{tokens},\"prompt_text\":null");
            self.write_chunk(&chat::role(index), Usage { prompt_tokens, completion_tokens: 0 }, &extra, out);
            let choice = chat::delta(index, &text, &finish, stop, &ids);
            self.write_chunk(&choice, Usage { prompt_tokens, completion_tokens: 1 }, &self.stamp(ends), out);
        } else {
            let logprobs = first.logprobs.as_deref().unwrap_or("null");
            let choice = format!(
                "{{\"index\":{index},\"text\":{text},\"logprobs\":{logprobs},\"finish_reason\":{finish},\
                 \"stop_reason\":{stop},\"prompt_token_ids\":{tokens},\"token_ids\":{ids}}}"
            );
            self.write_chunk(&choice, Usage { prompt_tokens, completion_tokens: 1 }, &self.stamp(ends), out);
        }
    }

    /// The fingerprint stands on the last chunk, which is this one when no usage follows.
    fn stamp(&self, ends: bool) -> String {
        match &self.fingerprint {
            Some(fingerprint) if ends && !self.include_usage => {
                format!(",\"system_fingerprint\":{fingerprint}")
            }
            _ => String::new(),
        }
    }

    fn write_chunk(&self, choice: &str, usage: Usage, extra: &str, out: &mut Vec<u8>) {
        let usage = if self.continuous_usage {
            format!(",\"usage\":{}", usage.write("{}", None))
        } else {
            String::new()
        };
        // vLLM writes a chat's first chunk with the usage before the prompt, and every fingerprint behind it.
        let data = format!("{},\"choices\":[{choice}]{usage}{extra}}}", self.head());
        write_event(out, data.as_bytes());
    }

    /// The beginning of a chunk of our own, up to the choices.
    fn head(&self) -> String {
        let object = if self.chat { chat::CHUNK } else { "\"text_completion\"" };
        format!(
            "{{\"id\":{},\"object\":{object},\"created\":{},\"model\":{}",
            self.id, self.created, self.model
        )
    }

    fn keep_usage(&mut self, leg: &Leg, text: &str, chunk: &Object<'_>) {
        let Some(raw) = chunk.present("usage") else { return };
        let mut usage = Usage::read(raw);
        let state = &mut self.legs[leg.index()];
        if state.continued {
            usage =
                Usage { prompt_tokens: state.prompt_tokens, completion_tokens: usage.completion_tokens + 1 };
        } else {
            let details =
                Object::parse(raw).ok().and_then(|o| o.present("prompt_tokens_details").map(str::to_owned));
            state.prompt_details = details;
        }
        state.usage = Some(usage);
        self.usage_chunk = Some(text.to_owned());
    }

    fn write_usage(&self, out: &mut Vec<u8>) {
        let mut sum = Usage::default();
        for leg in &self.legs {
            // An engine that sends no usage although it was asked to is counted by its pieces.
            sum.add(
                leg.usage
                    .unwrap_or(Usage { prompt_tokens: leg.prompt_tokens, completion_tokens: leg.pieces }),
            );
        }
        let details = self.legs.iter().find_map(|leg| leg.prompt_details.as_deref());
        if let Some(text) = &self.usage_chunk
            && let Ok(chunk) = Object::parse(text)
        {
            let usage = sum.write(chunk.get("usage").unwrap_or("{}"), details);
            let mut patches = vec![
                ("id", Some(self.id.as_str())),
                ("created", Some(self.created.as_str())),
                ("usage", Some(usage.as_str())),
            ];
            if self.chat {
                patches.push(("object", Some(chat::CHUNK)));
            }
            out.extend_from_slice(b"data: ");
            chunk.write(out, &patches);
            out.extend_from_slice(b"\n\n");
            return;
        }
        let usage = sum.write("{}", details);
        let stamp =
            self.fingerprint.as_ref().map_or(String::new(), |raw| format!(",\"system_fingerprint\":{raw}"));
        let data = format!("{},\"choices\":[],\"usage\":{usage}{stamp}}}", self.head());
        write_event(out, data.as_bytes());
    }
}

/// A choice of the decoder as the client gets it.
fn rewrite(state: &State, chat: bool, base: usize, raw: &str) -> Result<String, ApiError> {
    let choice = Object::parse(raw).map_err(|e| ApiError::garbled("the decoder", e))?;
    let index = base + choice.get("index").and_then(|raw| raw.parse::<usize>().ok()).unwrap_or(0);
    if state.continued && chat {
        return Ok(chat::delta_of(&choice, index));
    }
    let index = index.to_string();
    let mut patches = vec![("index", Some(index.as_str()))];
    let mut moved = None;
    if state.continued {
        if choice.present("prompt_token_ids").is_some() {
            // The client had them with the first token.
            patches.push(("prompt_token_ids", Some("null")));
        }
        if let Some(logprobs) = choice.present("logprobs") {
            moved = shifted_logprobs(logprobs, state.first_chars);
        }
    }
    patches.extend(moved.as_ref().map(|raw| ("logprobs", Some(raw.as_str()))));
    let mut out = Vec::with_capacity(raw.len() + 8);
    choice.write(&mut out, &patches);
    String::from_utf8(out).map_err(|_| ApiError::garbled("the decoder", "not UTF-8"))
}
