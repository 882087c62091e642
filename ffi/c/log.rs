//! Log messages to a callback of the caller's.
//!
//! The library logs through `tracing`; what is installed here is a small subscriber of our own that renders
//! each event with the fields of the spans around it (the request, say) and hands over one line of text.

use super::args::invalid;
use super::panic::guard;
use super::result::{KVXFER_OK, kvxfer_result_t};
use kvxfer_core::{Error, ErrorCode};
use parking_lot::Mutex;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Something failed that somebody must know.
pub const KVXFER_LOG_ERROR: u32 = 1;
/// Something is odd; work goes on.
pub const KVXFER_LOG_WARN: u32 = 2;
/// Connections, pools, requests.
pub const KVXFER_LOG_INFO: u32 = 3;
/// Steps of each.
pub const KVXFER_LOG_DEBUG: u32 = 4;
/// Every message.
pub const KVXFER_LOG_TRACE: u32 = 5;

/// Receives one message: its level (`KVXFER_LOG_...`), the module it came from, the text, and the `context`
/// given when it was installed. Called from any thread, also from kvxfer's own, and from several at once. The
/// texts are valid during the call only. It must not block for long, throw or unwind; messages that kvxfer
/// would log because of calls made inside it are dropped.
pub type kvxfer_log_callback_t = Option<
    unsafe extern "C" fn(level: u32, target: *const c_char, message: *const c_char, context: *mut c_void),
>;

/// Installs the callback for messages up to `max_level` (`KVXFER_LOG_...`). Once per process: a second call
/// answers `KVXFER_BUSY`. The callback and what `context` points at must stay for the rest of the process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_log_set_callback(
    max_level: u32,
    callback: kvxfer_log_callback_t,
    context: *mut c_void,
) -> kvxfer_result_t {
    guard("kvxfer_log_set_callback", || {
        let max = match max_level {
            KVXFER_LOG_ERROR => Level::ERROR,
            KVXFER_LOG_WARN => Level::WARN,
            KVXFER_LOG_INFO => Level::INFO,
            KVXFER_LOG_DEBUG => Level::DEBUG,
            KVXFER_LOG_TRACE => Level::TRACE,
            n => return Err(invalid("max_level", format!("{n} is none of the KVXFER_LOG_ values 1 to 5"))),
        };
        let callback = callback.ok_or_else(|| invalid("callback", "is NULL"))?;
        let sink = Sink(Box::new(move |level, target, message| {
            let context = context;
            // SAFETY: the caller keeps function and context usable for the rest of the process, from any thread.
            unsafe { callback(level, target.as_ptr(), message.as_ptr(), context) }
        }));
        tracing::subscriber::set_global_default(Lines::new(max, sink)).map_err(|_| {
            Error::failed(ErrorCode::Busy, "a log callback or subscriber is installed already")
        })?;
        Ok(KVXFER_OK)
    })
}

/// Where lines go.
struct Sink(Box<Receive>);
type Receive = dyn Fn(u32, &CString, &CString);

// SAFETY: the only thing in it that is not `Send` and `Sync` by itself is the caller's context pointer, which is passed on
// and never used here; the header says that the callback is called from any thread, several at once.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

/// A subscriber that renders events as lines.
struct Lines {
    max: Level,
    sink: Sink,
    next: AtomicU64,
    spans: Mutex<HashMap<u64, SpanText>>,
}

struct SpanText {
    text: String,
    handles: usize,
}

thread_local! {
    static ENTERED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Lines {
    fn new(max: Level, sink: Sink) -> Self {
        Self { max, sink, next: AtomicU64::new(1), spans: Mutex::default() }
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.max
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.max.into())
    }
    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut text = attributes.metadata().name().to_owned();
        attributes.record(&mut Fields(&mut text));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.spans.lock().insert(id, SpanText { text, handles: 1 });
        Id::from_u64(id)
    }
    fn record(&self, span: &Id, values: &Record<'_>) {
        if let Some(span) = self.spans.lock().get_mut(&span.into_u64()) {
            values.record(&mut Fields(&mut span.text));
        }
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        if INSIDE.try_with(|inside| inside.replace(true)).unwrap_or(true) {
            return;
        }
        let mut line = String::new();
        event.record(&mut Fields(&mut line));
        let _ = ENTERED.try_with(|entered| {
            let spans = self.spans.lock();
            for span in entered.borrow().iter().rev().filter_map(|id| spans.get(id)) {
                let _ = write!(line, " in {}", span.text);
            }
        });
        let metadata = event.metadata();
        let level = match *metadata.level() {
            Level::ERROR => KVXFER_LOG_ERROR,
            Level::WARN => KVXFER_LOG_WARN,
            Level::INFO => KVXFER_LOG_INFO,
            Level::DEBUG => KVXFER_LOG_DEBUG,
            _ => KVXFER_LOG_TRACE,
        };
        let line = CString::new(line.trim_start().replace('\0', "\u{2400}")).unwrap_or_default();
        (self.sink.0)(level, &CString::new(metadata.target()).unwrap_or_default(), &line);
        let _ = INSIDE.try_with(|inside| inside.set(false));
    }
    fn enter(&self, span: &Id) {
        let _ = ENTERED.try_with(|entered| entered.borrow_mut().push(span.into_u64()));
    }
    fn exit(&self, span: &Id) {
        let _ = ENTERED.try_with(|entered| {
            let mut entered = entered.borrow_mut();
            if let Some(at) = entered.iter().rposition(|&id| id == span.into_u64()) {
                entered.remove(at);
            }
        });
    }
    fn clone_span(&self, span: &Id) -> Id {
        if let Some(span) = self.spans.lock().get_mut(&span.into_u64()) {
            span.handles += 1;
        }
        span.clone()
    }
    fn try_close(&self, span: Id) -> bool {
        let mut spans = self.spans.lock();
        let Some(text) = spans.get_mut(&span.into_u64()) else { return false };
        text.handles -= 1;
        let last = text.handles == 0;
        if last {
            spans.remove(&span.into_u64());
        }
        last
    }
}

/// Appends fields to a line: the message as it is, others as `name=value`.
struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value}"),
            name => write!(self.0, " {name}={value}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn lines_carry_fields_and_spans_up_to_the_level() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let to = lines.clone();
        let sink = Sink(Box::new(move |level, _target, line| {
            tracing::error!("from inside the callback: dropped");
            to.lock().push((level, line.to_str().unwrap_or_default().to_owned()));
        }));
        let subscriber = Lines::new(Level::INFO, sink);
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("request", id = "r1", more = tracing::field::Empty);
            span.record("more", 2);
            let _in = span.enter();
            tracing::info!(bytes = 7, "published");
            tracing::debug!("not shown");
            tracing::warn!("odd");
        });
        assert_eq!(
            *lines.lock(),
            [
                (KVXFER_LOG_INFO, "published bytes=7 in request id=r1 more=2".to_owned()),
                (KVXFER_LOG_WARN, "odd in request id=r1 more=2".to_owned())
            ]
        );
    }
}
