//! What the demo found, as text and as JSON, and whether all of it held.

use super::prompt::Prompt;
use super::protocol::{Checked, Connected, Pool, Stored};
use crate::machine::Machine;
use crate::table::{Paint, Table, Tone, number, text};
use crate::units::thousands;
use kvxfer_core::{Integrity, TransportKind};
use serde::Serialize;
use serde_json::json;

/// One transport's transfer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub transport: String,
    #[serde(skip)]
    pub kind: Option<TransportKind>,
    pub available: bool,
    pub path: String,
    pub integrity: Option<Integrity>,
    pub takes_ms: Option<f64>,
    pub gbps: Option<f64>,
    pub offload_ms: Option<f64>,
    pub put_ms: Option<f64>,
    pub bytes_verified: u64,
    pub correct: bool,
    pub note: String,
}

/// A sender killed in the middle, and what came after.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Kill {
    pub pid: u32,
    pub chunks_handed_over: usize,
    pub fenced_ms: f64,
    /// Descriptors that a library may keep open.
    pub spare: usize,
    pub before: Pool,
    pub during: Pool,
    pub after: Pool,
    pub end: Pool,
    pub survivors: Checked,
    pub epochs: (u64, u64),
    pub stored: Stored,
    pub checked: Checked,
    pub bytes: u64,
}

/// Everything.
pub(super) struct Demo {
    prompt: Prompt,
    shortened: Option<String>,
    forced: Option<TransportKind>,
    pub rows: Vec<Row>,
    pub kill: Option<Kill>,
}

/// The level a channel uses when none is configured (Contract line 1).
pub(super) fn default_integrity(kind: TransportKind) -> Integrity {
    match kind {
        TransportKind::Tcp | TransportKind::Nixl => Integrity::Full,
        _ => Integrity::Bound,
    }
}

impl Row {
    pub(super) fn measured(
        prompt: Prompt,
        connected: &Connected,
        stored: &Stored,
        checked: &Checked,
    ) -> Self {
        let kind = stored.transport;
        let path =
            connected.paths.iter().find(|(k, _)| *k == kind).map(|(_, p)| p.clone()).unwrap_or_default();
        let correct =
            checked.wrong.is_none() && checked.bytes == prompt.bytes() && stored.bytes == prompt.bytes();
        let note = match &checked.wrong {
            Some(wrong) => wrong.clone(),
            None if correct => String::new(),
            None => format!(
                "{} bytes were reported as moved and {} arrived, of {}",
                stored.bytes,
                checked.bytes,
                prompt.bytes()
            ),
        };
        Self {
            transport: kind.to_string(),
            kind: Some(kind),
            available: true,
            path,
            integrity: Some(default_integrity(kind)),
            takes_ms: Some(stored.takes_ms),
            gbps: Some(prompt.bytes() as f64 / stored.takes_ms / 1e6),
            offload_ms: Some(stored.offload_ms),
            put_ms: Some(stored.put_ms),
            bytes_verified: checked.bytes,
            correct,
            note,
        }
    }

    pub(super) fn unavailable(kind: TransportKind, why: &str) -> Self {
        Self {
            transport: kind.to_string(),
            kind: Some(kind),
            available: false,
            path: String::new(),
            integrity: None,
            takes_ms: None,
            gbps: None,
            offload_ms: None,
            put_ms: None,
            bytes_verified: 0,
            correct: true,
            note: why.to_owned(),
        }
    }
}

impl Demo {
    pub(super) fn new(prompt: Prompt, shortened: Option<String>, forced: Option<TransportKind>) -> Self {
        Self { prompt, shortened, forced, rows: Vec::new(), kill: None }
    }

    /// The line of `LMCache`'s log, then what carried the bytes and how much of them was checked.
    pub(super) fn store_line(&self, row: &Row) -> String {
        let ms = |v: Option<f64>| v.unwrap_or(0.0);
        let checked = format!(
            "{} of {} bytes checked at the receiver",
            thousands(row.bytes_verified),
            thousands(self.prompt.bytes())
        );
        format!(
            "Store {} tokens takes: {:.4} ms, throughput: {:.4} GB/s; offload_time: {:.4} ms, put_time: {:.4} ms\n  over {} ({}), integrity {}; {}{}",
            self.prompt.tokens,
            ms(row.takes_ms),
            ms(row.gbps),
            ms(row.offload_ms),
            ms(row.put_ms),
            row.transport,
            row.path,
            level(row.integrity),
            checked,
            if row.correct { ", all as sent".to_owned() } else { format!(": {}", row.note) }
        )
    }

    pub(super) fn transport_table(&self, paint: Paint) -> String {
        let mut table =
            Table::new(["transport", "ms", "GB/s", "integrity", "bytes checked", "result", "path or reason"]);
        for row in &self.rows {
            let value = |v: Option<f64>, digits| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
            let (result, tone) = match (row.available, row.correct) {
                (false, _) => ("not here", Tone::Dim),
                (true, true) => ("correct", Tone::Good),
                (true, false) => ("WRONG", Tone::Bad),
            };
            table.row([
                text(row.transport.clone()),
                number(value(row.takes_ms, 1)),
                number(value(row.gbps, 2)),
                text(level(row.integrity)),
                number(if row.available { thousands(row.bytes_verified) } else { "-".into() }),
                text(result).tone(tone),
                text(if row.note.is_empty() { row.path.clone() } else { row.note.clone() }),
            ]);
        }
        table.render(paint)
    }

    /// The chosen path and every other available one carried every byte, and the kill left nothing behind.
    pub(super) fn held(&self) -> bool {
        self.rows.first().is_some_and(|r| r.available)
            && self.rows.iter().all(|r| r.correct)
            && self.kill.as_ref().is_none_or(Kill::held)
    }

    pub(super) fn conclusion(&self) -> String {
        let moved = self.rows.iter().filter(|r| r.available).count();
        if self.held() {
            format!(
                "All held: {moved} transport{} moved and checked every byte{}.",
                if moved == 1 { "" } else { "s" },
                if self.kill.is_some() { "; a killed sender left nothing behind" } else { "" }
            )
        } else {
            "NOT all held; see above.".into()
        }
    }

    pub(super) fn json(&self, machine: &Machine) -> String {
        let store = self.rows.first();
        let kill = self.kill.as_ref().map(|k| {
            let mut v = json!(k);
            v["held"] = json!(k.held());
            v
        });
        let value = json!({
            "kvxfer": env!("CARGO_PKG_VERSION"),
            "machine": machine,
            "tokens": self.prompt.tokens,
            "chunk_tokens": self.prompt.chunk_tokens,
            "chunks": self.prompt.chunks(),
            "bytes": self.prompt.bytes(),
            "shortened": self.shortened,
            "forced_transport": self.forced,
            "store": store,
            "transports": self.rows,
            "kill": kill,
            "held": self.held(),
        });
        format!("{value:#}")
    }
}

impl Kill {
    /// Nothing under way is left, what stayed published is right, the next sender delivered every byte, and at the end
    /// every page is free and no descriptor more is open than before, but for those a library may keep.
    pub(super) fn held(&self) -> bool {
        self.after.is_quiet()
            && self.survivors.wrong.is_none()
            && self.checked.wrong.is_none()
            && self.checked.bytes == self.bytes
            && self.epochs.0 != self.epochs.1
            && self.end.free == self.end.pages
            && self.end.is_quiet()
            && self.end.descriptors <= self.before.descriptors + self.spare
    }

    pub(super) fn text(&self, paint: Paint) -> String {
        let mut table = Table::new([
            "receiver's pool",
            "free",
            "writing",
            "published",
            "quarantined",
            "active requests",
            "descriptors",
        ]);
        for (when, pool) in [
            ("before", &self.before),
            ("at the kill", &self.during),
            ("after the kill", &self.after),
            ("after the next sender", &self.end),
        ] {
            table.row(
                std::iter::once(text(when)).chain(
                    [
                        pool.free.to_string(),
                        pool.writing.to_string(),
                        pool.published.to_string(),
                        pool.quarantined.to_string(),
                        pool.active.to_string(),
                        pool.descriptors.to_string(),
                    ]
                    .map(number),
                ),
            );
        }
        let verdict = if self.held() {
            paint.paint(Tone::Good, "nothing leaked")
        } else {
            paint.paint(Tone::Bad, "SOMETHING IS LEFT OR WRONG")
        };
        let survivors = match self.survivors.chunks {
            0 => "None of its chunks stayed visible".to_owned(),
            n => format!("{n} chunks it had completed stay published, all bytes right"),
        };
        format!(
            "Sender process {} killed (SIGKILL) after handing over {} chunks; pages were fenced within {:.1} ms: {verdict}.\n{}{survivors}; the next sender (a new epoch) wrote {} chunks and found {} present in {:.1} ms, {} of {} bytes checked.",
            self.pid,
            self.chunks_handed_over,
            self.fenced_ms,
            table.render(paint),
            self.stored.written,
            self.stored.present,
            self.stored.takes_ms,
            thousands(self.checked.bytes),
            thousands(self.bytes),
        )
    }
}

fn level(integrity: Option<Integrity>) -> &'static str {
    match integrity {
        Some(Integrity::Off) => "off",
        Some(Integrity::Bound) => "bound",
        Some(Integrity::Full) => "full",
        None => "-",
    }
}
