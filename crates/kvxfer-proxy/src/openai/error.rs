//! Errors as an `OpenAI` client expects them: `{"error": {"message", "type", "param", "code"}}`, worded as vLLM words
//! them, with an engine's own error body passed on untouched.

use bytes::Bytes;
use serde_json::json;

use super::object::Object;
use super::sse::write_event;

/// How much of an upstream's unreadable body is quoted.
const QUOTED: usize = 300;

/// An error with the status and the body the client gets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// `error.type`, e.g. `BadRequestError`.
    pub kind: String,
    /// `error.message`: what is wrong and what to do.
    pub message: String,
    /// `error.param`: the field at fault.
    pub param: Option<String>,
    /// The engine's own error body, passed on as it came.
    pub verbatim: Option<Bytes>,
    /// Seconds after which trying again makes sense, for `Retry-After`.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// An error of a status, with vLLM's name for that status.
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        let kind = match status {
            400 => "BadRequestError",
            401 => "AuthenticationError",
            403 => "PermissionDeniedError",
            404 => "NotFoundError",
            405 => "MethodNotAllowedError",
            408 => "RequestTimeoutError",
            413 => "RequestEntityTooLargeError",
            422 => "UnprocessableEntityError",
            429 => "RateLimitError",
            502 => "BadGatewayError",
            503 => "ServiceUnavailableError",
            504 => "GatewayTimeoutError",
            _ => "InternalServerError",
        };
        Self {
            status,
            kind: kind.into(),
            message: message.into(),
            param: None,
            verbatim: None,
            retry_after: None,
        }
    }

    /// A request that is wrong in the field `param`.
    pub fn bad(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(400, message) }
    }

    /// What an engine answered instead of 200. An error body in `OpenAI`'s form is passed on as it is, also from an
    /// engine's 4xx; anything else is quoted in part. `who` names the engine for the reader.
    pub fn upstream(who: &str, status: u16, body: &[u8]) -> Self {
        let is_error = std::str::from_utf8(body)
            .ok()
            .and_then(|text| Object::parse(text).ok())
            .is_some_and(|o| o.get("error").is_some_and(|e| e.starts_with('{')));
        let mut error = if is_error {
            let mut error = Self::new(status, error_message(body).unwrap_or_default());
            error.verbatim = Some(Bytes::copy_from_slice(body));
            error
        } else {
            let text = String::from_utf8_lossy(&body[..body.len().min(QUOTED)]);
            Self::new(
                if status >= 500 { 502 } else { status },
                format!("{who} answered {status}: {}", text.trim()),
            )
        };
        // A redirect or an odd 2xx is not something a client can act on.
        if error.status < 400 {
            error.status = 502;
        }
        error
    }

    /// An answer of an engine that cannot be understood.
    pub fn garbled(who: &str, what: impl std::fmt::Display) -> Self {
        Self::new(502, format!("{who} sent an answer that cannot be read: {what}"))
    }

    /// Whether the fault is the request's own, so that another engine would refuse it as well.
    pub fn is_clients_fault(&self) -> bool {
        (400..500).contains(&self.status) && !matches!(self.status, 401 | 403 | 408 | 429)
    }

    /// The JSON body.
    pub fn to_json(&self) -> Bytes {
        if let Some(body) = &self.verbatim {
            return body.clone();
        }
        let body = json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status,
        }});
        Bytes::from(body.to_string())
    }

    /// The two events that end a stream which had already begun.
    pub fn write_events(&self, out: &mut Vec<u8>) {
        write_event(out, &self.to_json());
        write_event(out, super::DONE.as_bytes());
    }
}

/// `error.message` of a body.
fn error_message(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(value.get("error")?.get("message")?.as_str()?.to_owned())
}
