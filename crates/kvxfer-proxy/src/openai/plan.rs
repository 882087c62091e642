//! Who samples the first token of an answer, and whether a prefiller is of use at all.
//!
//! Handing the prefiller's token to the decoder as the last token of the prompt is exact only when nothing about the
//! request depends on where the answer began: a grammar would start over after the first token, a seeded generator
//! would draw its first number twice, `n` samples would all share their beginning. So the fast way is taken only
//! when every field of the request is known to be safe for it; in every other case the decoder is sent the request
//! as the client wrote it. That is right for any request, and costs one decoding step before the first token.

use serde_json::value::RawValue;

use super::object::Object;
use super::request::{Endpoint, Request};

/// How one prompt is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The prefiller computes the prompt and samples the first token, which goes to the client at once; the decoder
    /// continues behind it.
    FirstToken,
    /// The prefiller computes the prompt but for its last token; the decoder gets the request as it is, computes
    /// that one token and samples everything. The reason is the field that asks for it.
    DecoderSamples(String),
    /// The decoder does it all, for the reason given.
    DecoderOnly(String),
}

impl Plan {
    /// A word for logs and metrics: `first_token`, `decoder_samples`, `decoder_only`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::FirstToken => "first_token",
            Self::DecoderSamples(_) => "decoder_samples",
            Self::DecoderOnly(_) => "decoder_only",
        }
    }

    /// Why it is not [`Plan::FirstToken`]; empty when it is.
    pub fn reason(&self) -> &str {
        match self {
            Self::FirstToken => "",
            Self::DecoderSamples(why) | Self::DecoderOnly(why) => why,
        }
    }
}

/// Fields after which the answer's second token depends on no more than the tokens before it, whatever their value.
const SAFE: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "stream_interval",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    // Counts the prompt's tokens like the answer's, unlike its two sisters.
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "add_special_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "return_token_offsets",
    "logprob_token_ids",
    "length_penalty",
    "cache_salt",
    "priority",
    "request_id",
    "session_id",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "kv_transfer_params",
    "chat_template",
    "chat_template_kwargs",
    "parallel_tool_calls",
];

/// Chooses for one prompt of a request.
pub(super) fn choose(request: &Request, tokens: usize, max_model_len: Option<u64>) -> Plan {
    let view = &request.view;
    if let Some(why) = &view.decoder_only {
        return Plan::DecoderOnly(why.clone());
    }
    if tokens < 2 {
        return Plan::DecoderOnly(format!("a prompt of {tokens} tokens"));
    }
    if let Some(most) = max_model_len {
        // Where the context ends, the engine's own rules and words apply.
        if tokens as u64 + 2 > most || view.max_tokens.is_some_and(|asked| asked > most) {
            return Plan::DecoderOnly(format!("the model's context of {most} tokens"));
        }
    } else if request.endpoint() == Endpoint::Chat && view.max_tokens.is_none() {
        return Plan::DecoderSamples("max_tokens".into());
    }
    match &view.decoder_samples {
        Some(why) => Plan::DecoderSamples(why.clone()),
        None => Plan::FirstToken,
    }
}

/// The field that makes a prefiller useless: what the engines would compute there is not the tokens the proxy knows.
pub(super) fn decoder_only(endpoint: Endpoint, object: &Object<'_>) -> Option<String> {
    for key in ["prompt_embeds", "truncate_prompt_tokens", "mm_processor_kwargs", "ec_transfer_params"] {
        if object.get(key).is_some_and(|raw| !is_neutral(raw)) {
            return Some(key.into());
        }
    }
    if endpoint == Endpoint::Completions && object.get("max_tokens") == Some("0") {
        return Some("max_tokens".into());
    }
    (endpoint == Endpoint::Chat && has_media(object)).then(|| "messages (not only text)".into())
}

/// The field that makes the decoder sample the first token as well.
pub(super) fn decoder_samples(
    endpoint: Endpoint,
    object: &Object<'_>,
    max_tokens: Option<u64>,
) -> Option<String> {
    if max_tokens == Some(1) {
        return Some("max_tokens".into());
    }
    let greedy = object.present("temperature").and_then(|raw| raw.parse::<f64>().ok()) == Some(0.0);
    object
        .iter()
        .find(|(key, raw)| match *key {
            "n" | "best_of" => *raw != "1" && *raw != "null",
            "seed" => *raw != "null" && !greedy,
            // Zero asks for the log probabilities of the prompt's own tokens.
            "prompt_logprobs" => *raw != "null",
            "include_reasoning" | "add_generation_prompt" => *raw == "false",
            // Without tools there is nothing to choose from.
            "tool_choice" => !matches!(*raw, "\"none\"" | "\"auto\"" | "null"),
            "thinking_token_budget" => *raw != "-1" && *raw != "null",
            "response_format" => {
                !is_neutral(raw)
                    && !Object::parse(raw).is_ok_and(|format| format.get("type") == Some("\"text\""))
            }
            // The chat form of log probabilities cannot be made from the other form without loss.
            "logprobs" => endpoint == Endpoint::Chat && !is_neutral(raw),
            key => !SAFE.contains(&key) && !is_neutral(raw),
        })
        .map(|(key, _)| key.to_owned())
}

/// Values that ask for nothing, whatever the field.
fn is_neutral(raw: &str) -> bool {
    matches!(raw, "null" | "false" | "0" | "0.0" | "-0.0" | "\"\"")
        || matches!(raw.as_bytes(), [b'[', inner @ .., b']'] | [b'{', inner @ .., b'}']
            if inner.iter().all(u8::is_ascii_whitespace))
}

/// Whether a message has parts that are not text: pictures and sound become tokens only inside the engine.
fn has_media(object: &Object<'_>) -> bool {
    #[derive(serde::Deserialize)]
    struct Message<'a> {
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
    }
    let Some(raw) = object.present("messages") else { return false };
    if !raw.contains("\"type\"") {
        return false;
    }
    let Ok(messages) = serde_json::from_str::<Vec<Message<'_>>>(raw) else { return false };
    messages.iter().filter_map(|m| m.content).any(|content| {
        let Ok(parts) = serde_json::from_str::<Vec<Object<'_>>>(content.get()) else { return false };
        parts.iter().any(|part| part.get("type").is_some_and(|kind| kind != "\"text\""))
    })
}
