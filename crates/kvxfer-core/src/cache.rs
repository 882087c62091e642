//! Where kvxfer keeps what it fetched or made once: `$XDG_CACHE_HOME/kvxfer`, or `~/.cache/kvxfer`.

use std::path::PathBuf;

/// The folder; `None` where the environment names neither. It may not exist yet.
pub(crate) fn folder() -> Option<PathBuf> {
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("kvxfer"))
}

/// A path in an environment variable; an empty one counts as not set.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}
