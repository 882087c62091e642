//! One file, translated: what it says today, what became of each key, and what contradicts.

mod check;
mod keys;

use keys::{Fate, OLDER, STORAGE};
use serde::Serialize;
use serde_yaml_ng::{Mapping, Value};
use std::fmt::Write as _;

/// Largest file that is read, in bytes.
pub const MAX_FILE: usize = 1 << 20;
/// Where the guide's proxy listens for notifications.
const PROXY: (&str, u64) = ("localhost", 7500);

/// What a file comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Translation {
    /// The file in today's words, in the order of the original.
    pub config: Mapping,
    /// What became of keys, and what was added; one sentence each.
    pub notices: Vec<Notice>,
    /// What `LMCache` or kvxfer would refuse, or do otherwise than meant.
    pub problems: Vec<Problem>,
    /// True when `config` says something else than the file did.
    pub changed: bool,
}

/// What became of one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// The key as written.
    pub key: String,
    /// Its name today; empty for one that is gone.
    pub today: String,
    /// The sentence.
    pub text: String,
}

/// Something that will not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The keys concerned.
    pub keys: Vec<String>,
    /// The sentence: the value, and what to do.
    pub text: String,
    /// Two keys contradict each other: no translation can be right.
    pub contradiction: bool,
}

/// A text that is no configuration file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// Too long.
    #[error("{len} bytes; a configuration file has at most {MAX_FILE}")]
    TooLarge {
        /// Its length.
        len: usize,
    },
    /// Not YAML.
    #[error("not YAML: {problem}")]
    Yaml {
        /// What and where.
        problem: String,
    },
    /// YAML, but not keys and values.
    #[error("{found} instead of `key: value` lines")]
    NotAMapping {
        /// What it is.
        found: &'static str,
    },
    /// A key that is no text.
    #[error("the key {key} is no text")]
    Key {
        /// The key, as YAML.
        key: String,
    },
}

/// Translates a file.
pub fn translate(yaml: &str) -> Result<Translation, FileError> {
    if yaml.len() > MAX_FILE {
        return Err(FileError::TooLarge { len: yaml.len() });
    }
    let value: Value =
        serde_yaml_ng::from_str(yaml).map_err(|e| FileError::Yaml { problem: e.to_string() })?;
    let mapping = match value {
        Value::Mapping(mapping) => mapping,
        Value::Null => Mapping::new(),
        Value::Sequence(_) => return Err(FileError::NotAMapping { found: "a list" }),
        _ => return Err(FileError::NotAMapping { found: "a single value" }),
    };
    let mut t = Translator::default();
    let storage = mapping
        .get("extra_config")
        .and_then(|e| e.get("enable_nixl_storage"))
        .is_some_and(|v| truth(v) == Some(true));
    for (key, value) in mapping {
        let Value::String(key) = key else {
            let key = serde_yaml_ng::to_string(&key).unwrap_or_default().trim().to_owned();
            return Err(FileError::Key { key });
        };
        t.take(key, value, storage);
    }
    t.complete();
    check::check(&t.config, &mut t.notices, &mut t.problems);
    Ok(Translation { config: t.config, notices: t.notices, problems: t.problems, changed: t.changed })
}

impl Translation {
    /// The file in today's words, as YAML, with a line of comment for everything that was changed.
    pub fn to_yaml(&self) -> String {
        let mut out = String::from("# LMCache configuration; written by `kvxfer config check --migrate`.\n");
        for notice in self.notices.iter().filter(|n| n.today.is_empty()) {
            let _ = writeln!(out, "# {}: {}", notice.key, notice.text);
        }
        for (key, value) in &self.config {
            let name = key.as_str().unwrap_or_default();
            for notice in self.notices.iter().filter(|n| n.today == name) {
                let _ = writeln!(out, "# {}", notice.text);
            }
            let one: Mapping = [(key.clone(), value.clone())].into_iter().collect();
            out += &serde_yaml_ng::to_string(&one).unwrap_or_default();
        }
        out
    }

    /// The first contradiction, if there is one.
    pub fn contradiction(&self) -> Option<&Problem> {
        self.problems.iter().find(|p| p.contradiction)
    }
}

/// A YAML or environment value that means yes or no.
fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(b) => Some(*b),
        Value::Number(n) => Some(n.as_i64() != Some(0)),
        Value::String(s) => match s.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Some(true),
            "false" | "no" | "off" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A value as one would write it in a line.
fn show(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::String(s) => format!("{s:?}"),
        other => serde_json::to_string(other).unwrap_or_else(|_| "?".into()),
    }
}

#[derive(Default)]
struct Translator {
    config: Mapping,
    notices: Vec<Notice>,
    problems: Vec<Problem>,
    /// Name today, and the key it was written as.
    written: Vec<(String, String)>,
    changed: bool,
    /// Older keys for disaggregation were there.
    older: bool,
}

impl Translator {
    fn take(&mut self, key: String, value: Value, storage: bool) {
        let older = OLDER.iter().find(|(name, _)| *name == key).map(|(_, fate)| *fate);
        match older {
            Some(_) if storage && STORAGE.contains(&key.as_str()) => self.put(key.clone(), key, value),
            Some(Fate::Gone(why)) => {
                self.changed = true;
                self.older = true;
                let text = format!("{key} has no counterpart: {why}");
                self.notices.push(Notice { key, today: String::new(), text });
            }
            Some(Fate::Renamed(today)) => self.rename(key, today, value),
            Some(Fate::RenamedPort(today)) => {
                let value =
                    if value.is_sequence() || value.is_null() { value } else { Value::Sequence(vec![value]) };
                self.rename(key, today, value);
            }
            None => {
                if !keys::KNOWN.contains(&key.as_str())
                    && let Some(meant) = keys::nearest(&key)
                {
                    let text =
                        format!("{key} is not a setting of LMCache, which ignores it; was {meant} meant?");
                    self.notices.push(Notice { key: key.clone(), today: key.clone(), text });
                }
                self.put(key.clone(), key, value);
            }
        }
    }

    fn rename(&mut self, key: String, today: &str, value: Value) {
        self.changed = true;
        self.older = true;
        let text = format!("{key} is called {today} today");
        self.notices.push(Notice { key: key.clone(), today: today.to_owned(), text });
        self.put(today.to_owned(), key, value);
    }

    /// Sets a key of today, unless another one said otherwise.
    fn put(&mut self, today: String, key: String, value: Value) {
        if let Some(before) = self.config.get(today.as_str())
            && same(before) != same(&value)
        {
            let other =
                self.written.iter().find(|(t, _)| *t == today).map_or(today.as_str(), |(_, k)| k.as_str());
            let text = format!(
                "{other}: {} and {key}: {} are the same setting with two values; remove one of the lines",
                show(before),
                show(&value)
            );
            self.problems.push(Problem { keys: vec![other.to_owned(), key], text, contradiction: true });
            return;
        }
        self.written.push((today.clone(), key));
        self.config.insert(Value::String(today), value);
    }

    /// What an older file left to defaults that are others today.
    fn complete(&mut self) {
        let on = self.config.get("enable_pd").and_then(truth) == Some(true);
        if !self.older || !on {
            return;
        }
        if self.is_unset("transfer_channel") {
            self.add(
                "transfer_channel",
                "kvxfer".into(),
                "transfer_channel was not a choice then; kvxfer carries the caches",
            );
        }
        let sends = self.config.get("pd_role").and_then(Value::as_str) == Some("sender");
        let silent = self.config.get("pd_skip_proxy_notification").and_then(truth) == Some(true);
        if sends && !silent && self.is_unset("pd_proxy_port") {
            if self.is_unset("pd_proxy_host") {
                self.add(
                    "pd_proxy_host",
                    PROXY.0.into(),
                    "the proxy is told when a cache has arrived; the guide's runs here",
                );
            }
            self.add("pd_proxy_port", PROXY.1.into(), "where the guide's proxy listens for that");
        }
        if self.config.get("pd_role").and_then(Value::as_str) == Some("receiver")
            && self.is_unset("pd_peer_alloc_port")
            && let Some(port) =
                self.config.get("pd_peer_init_port").and_then(|p| p.get(0)).and_then(Value::as_u64)
        {
            self.add(
                "pd_peer_alloc_port",
                Value::Sequence(vec![(port + 1).into()]),
                "LMCache's own backends ask for pages there; kvxfer's uses pd_peer_init_port alone",
            );
        }
    }

    fn is_unset(&self, key: &str) -> bool {
        self.config.get(key).is_none_or(Value::is_null)
    }

    fn add(&mut self, key: &str, value: Value, why: &str) {
        self.changed = true;
        let text = format!("{key}: {} was added: {why}", show(&value));
        self.notices.push(Notice { key: key.to_owned(), today: key.to_owned(), text });
        self.config.insert(Value::String(key.to_owned()), value);
    }
}

/// Values that mean the same compare equal: `1` and `"1"`, `[1]` and `1`.
fn same(value: &Value) -> String {
    match value {
        Value::Sequence(s) if s.len() == 1 => same(&s[0]),
        Value::String(s) => s.trim().to_ascii_lowercase(),
        other => show(other).to_ascii_lowercase(),
    }
}
