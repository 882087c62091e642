//! The answer in one piece: what the prefiller and the decoder said about each prompt, as one server's answer.

use super::answer::{FirstToken, Usage};
use super::chat;
use super::error::ApiError;
use super::leg::Leg;
use super::object::{Object, array, elements};
use super::request::{Endpoint, Request};
use super::{Identity, plan::Plan};

/// What was answered about one prompt.
#[derive(Debug, Clone, Copy)]
pub struct LegAnswer<'a> {
    /// The leg.
    pub leg: &'a Leg,
    /// The first token, where the prefiller sampled it.
    pub first: Option<&'a FirstToken>,
    /// The decoder's answer: what follows the first token, or the whole where there is none. `None` when the answer
    /// ended with the first token.
    pub decoder: Option<&'a [u8]>,
}

/// Joins the answers about all prompts of a request, which must be in the request's order.
pub fn join_full(
    request: &Request,
    identity: &Identity,
    answers: &[LegAnswer<'_>],
) -> Result<Vec<u8>, ApiError> {
    let parts = answers.iter().map(|answer| Part::new(request, answer)).collect::<Result<Vec<_>, _>>()?;
    let Some(base) = parts.first() else {
        return Err(ApiError::new(500, "The request had no prompt to answer."));
    };
    let mut usage = Usage::default();
    for part in &parts {
        usage.add(part.usage);
    }
    // The details of a sum are the last prompt's, as vLLM has it.
    let details = parts.last().and_then(|part| part.details.as_deref());
    let usage = usage.write(base.object.present("usage").unwrap_or("{}"), details);
    let choices: Vec<&String> = parts.iter().flat_map(|part| &part.choices).collect();
    let choices = array(&choices);
    let (id, created) = (super::object::string(&identity.id), identity.created.to_string());

    let mut patches = vec![
        ("id", Some(id.as_str())),
        ("created", Some(created.as_str())),
        ("choices", Some(choices.as_str())),
        ("usage", Some(usage.as_str())),
    ];
    if base.object.get("kv_transfer_params").is_some() {
        patches.push(("kv_transfer_params", Some("null")));
    }
    if parts.len() > 1 && base.object.get("metrics").is_some() {
        patches.push(("metrics", Some("null")));
    }
    if base.converted {
        patches.push(("object", Some("\"chat.completion\"")));
        patches.push(("prompt_logprobs", Some("null")));
        let tokens = if request.view.return_token_ids { base.prompt_token_ids.as_str() } else { "null" };
        patches.push(("prompt_token_ids", Some(tokens)));
        patches.push(("prompt_text", Some("null")));
    }
    let mut out = Vec::with_capacity(choices.len() + 512);
    base.object.write(&mut out, &patches);
    Ok(out)
}

/// One prompt's share.
struct Part<'a> {
    object: Object<'a>,
    choices: Vec<String>,
    usage: Usage,
    /// Raw `usage.prompt_tokens_details`.
    details: Option<String>,
    prompt_token_ids: String,
    /// A completion that has to become a chat's answer.
    converted: bool,
}

impl<'a> Part<'a> {
    fn new(request: &Request, answer: &LegAnswer<'a>) -> Result<Self, ApiError> {
        let text = match (answer.decoder, answer.first) {
            (Some(body), _) => {
                std::str::from_utf8(body).map_err(|_| ApiError::garbled("the decoder", "not UTF-8"))?
            }
            (None, Some(first)) => &first.body,
            (None, None) => return Err(ApiError::new(500, "The request ended without an answer.")),
        };
        let object = Object::parse(text).map_err(|e| ApiError::garbled("the decoder", e))?;
        if object.present("error").is_some() {
            return Err(ApiError::upstream("the decoder", 500, text.as_bytes()));
        }
        let raw = object.get("choices").map(elements).unwrap_or_default();
        if raw.is_empty() {
            return Err(ApiError::garbled("the decoder", "no choice in it"));
        }
        let mut part = Self {
            usage: Usage::read(object.get("usage").unwrap_or("{}")),
            details: object
                .present("usage")
                .and_then(|raw| Object::parse(raw).ok()?.present("prompt_tokens_details").map(str::to_owned)),
            prompt_token_ids: serde_json::json!(answer.leg.tokens()).to_string(),
            converted: answer.first.is_some() && request.endpoint() == Endpoint::Chat,
            choices: Vec::with_capacity(raw.len()),
            object,
        };
        if let (Some(first), Some(_)) = (answer.first, answer.decoder) {
            part.usage = Usage {
                prompt_tokens: first.usage.prompt_tokens,
                completion_tokens: part.usage.completion_tokens + 1,
            };
            part.details.clone_from(&first.prompt_details);
        }
        let base = answer.leg.index() * request.n();
        for (i, raw) in raw.into_iter().enumerate() {
            let written = part.choice(request, answer, base + i, raw)?;
            part.choices.push(written);
        }
        Ok(part)
    }

    fn choice(
        &self,
        request: &Request,
        answer: &LegAnswer<'a>,
        index: usize,
        raw: &'a str,
    ) -> Result<String, ApiError> {
        let Some(first) = answer.first else {
            if index == 0 || answer.leg.index() == 0 {
                return Ok(raw.to_owned());
            }
            let choice = Object::parse(raw).map_err(|e| ApiError::garbled("the decoder", e))?;
            return Ok(patched(&choice, &[("index", Some(&index.to_string()))]));
        };
        debug_assert!(*answer.leg.plan() == Plan::FirstToken, "only this plan has a first token");
        let choice = Object::parse(raw).map_err(|e| ApiError::garbled("the decoder", e))?;
        let follows = answer.decoder.is_some();
        let rest = choice.get("text").unwrap_or("\"\"");
        let text = if follows { chat::joined_text(&first.text, rest) } else { rest.to_owned() };
        let token_ids = if request.view.return_token_ids {
            let mut ids = elements(choice.get("token_ids").unwrap_or("[]"));
            let first_id = first.token.map(|token| token.to_string());
            if follows {
                ids.splice(0..0, first_id.as_deref());
            }
            array(&ids)
        } else {
            choice.get("token_ids").unwrap_or("null").to_owned()
        };
        if self.converted {
            return Ok(chat::message(index, &text, &choice, &token_ids));
        }
        let index = index.to_string();
        let mut patches = vec![("index", Some(index.as_str())), ("text", Some(text.as_str()))];
        let logprobs = match (&first.logprobs, choice.present("logprobs")) {
            (Some(before), Some(after)) if follows => Some(joined_logprobs(before, after)),
            _ => None,
        };
        if let Some(logprobs) = &logprobs {
            patches.push(("logprobs", Some(logprobs)));
        }
        if request.view.return_token_ids {
            patches.push(("token_ids", Some(&token_ids)));
            patches.push(("prompt_token_ids", Some(&self.prompt_token_ids)));
        }
        Ok(patched(&choice, &patches))
    }
}

fn patched(object: &Object<'_>, patches: &[(&str, Option<&str>)]) -> String {
    let mut out = Vec::new();
    object.write(&mut out, patches);
    String::from_utf8(out).unwrap_or_default()
}

/// The log probabilities of the first token and of those that follow it.
fn joined_logprobs(first: &str, rest: &str) -> String {
    let (Ok(before), Ok(after)) = (Object::parse(first), Object::parse(rest)) else { return rest.to_owned() };
    let shifted = shifted_offsets(&after, text_length(&before));
    let mut values: Vec<(&str, String)> = Vec::new();
    for (key, raw) in after.iter() {
        let mut all = elements(before.get(key).unwrap_or("[]"));
        if key == "text_offset" {
            all.extend(shifted.iter().map(String::as_str));
        } else if raw.starts_with('[') {
            all.extend(elements(raw));
        } else {
            continue;
        }
        values.push((key, array(&all)));
    }
    let patches: Vec<_> = values.iter().map(|(key, value)| (*key, Some(value.as_str()))).collect();
    patched(&after, &patches)
}

/// Raw log probabilities with their offsets moved behind the first token; `None` when there is nothing to move.
pub(super) fn shifted_logprobs(rest: &str, by: usize) -> Option<String> {
    let object = Object::parse(rest).ok()?;
    let offsets = array(&shifted_offsets(&object, by));
    object.get("text_offset").map(|_| patched(&object, &[("text_offset", Some(&offsets))]))
}

fn shifted_offsets(object: &Object<'_>, by: usize) -> Vec<String> {
    let offsets: Vec<usize> =
        object.get("text_offset").and_then(|raw| serde_json::from_str(raw).ok()).unwrap_or_default();
    offsets.into_iter().map(|offset| (offset + by).to_string()).collect()
}

/// Characters of the tokens that raw log probabilities speak of; offsets are counted in these.
pub(super) fn text_length(logprobs: &Object<'_>) -> usize {
    let tokens: Vec<String> =
        logprobs.get("tokens").and_then(|raw| serde_json::from_str(raw).ok()).unwrap_or_default();
    tokens.iter().map(|token| token.chars().count()).sum()
}
