//! A completion's choice in the form of a chat's. Only plain text passes here: requests whose answers need more
//! (tools, log probabilities) go to the decoder's own chat endpoint, see `plan`.

use super::object::{Object, string};

/// The `object` of a chat's stream.
pub(super) const CHUNK: &str = "\"chat.completion.chunk\"";

/// The choice of one streamed piece. All values are raw JSON. `stop_reason` is told only where the answer ends, as
/// vLLM does.
pub(super) fn delta(
    index: usize,
    text: &str,
    finish_reason: &str,
    stop_reason: &str,
    token_ids: &str,
) -> String {
    let stop =
        if finish_reason == "null" { String::new() } else { format!(",\"stop_reason\":{stop_reason}") };
    format!(
        "{{\"index\":{index},\"delta\":{{\"content\":{text}}},\"logprobs\":null,\
         \"finish_reason\":{finish_reason}{stop},\"token_ids\":{token_ids}}}"
    )
}

/// The same, from a completion's choice.
pub(super) fn delta_of(choice: &Object<'_>, index: usize) -> String {
    delta(
        index,
        choice.get("text").unwrap_or("\"\""),
        choice.get("finish_reason").unwrap_or("null"),
        choice.get("stop_reason").unwrap_or("null"),
        choice.get("token_ids").unwrap_or("null"),
    )
}

/// The choice that opens every chat stream.
pub(super) fn role(index: usize) -> String {
    format!(
        "{{\"index\":{index},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\
         \"logprobs\":null,\"finish_reason\":null}}"
    )
}

/// The choice of a whole answer. `text`, `stop_reason` and `token_ids` are raw JSON.
pub(super) fn message(index: usize, text: &str, choice: &Object<'_>, token_ids: &str) -> String {
    // A chat that ended for no stated reason has stopped.
    let finish = choice.present("finish_reason").unwrap_or("\"stop\"");
    let stop = choice.get("stop_reason").unwrap_or("null");
    let experts = choice.get("routed_experts").unwrap_or("null");
    format!(
        "{{\"index\":{index},\"message\":{{\"role\":\"assistant\",\"content\":{text},\"refusal\":null,\
         \"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":null}},\"logprobs\":null,\
         \"finish_reason\":{finish},\"stop_reason\":{stop},\"token_ids\":{token_ids},\"routed_experts\":{experts}}}"
    )
}

/// Two JSON strings as one; the first is plain text.
pub(super) fn joined_text(first: &str, rest: &str) -> String {
    let mut out = string(first);
    match rest.strip_prefix('"') {
        Some(rest) => {
            out.pop();
            out.push_str(rest);
        }
        None => debug_assert!(rest == "null", "a text is a string or null"),
    }
    out
}
