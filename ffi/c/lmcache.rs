//! `LMCache`'s configuration files in today's words, for its Python side.

use super::args::{Buffer, text};
use super::panic::guard;
use super::result::kvxfer_result_t;
use kvxfer_core::{Error, ErrorCode};
use kvxfer_lmcache::config::translate;
use std::ffi::c_char;

/// Translates an `LMCache` configuration file, YAML text, into today's words: a JSON object with `config` (keys and
/// values), `notices` (what became of a key: `key`, `today`, `text`), `problems` (`keys`, `text`, `contradiction`) and
/// `changed`. A text that is no such file is `KVXFER_INVALID_ARGUMENT`; two lines that contradict each other are
/// `KVXFER_MISMATCH`, and the error's text names both. The buffer is used as in `kvxfer_agent_name`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvxfer_lmcache_config_translate(
    yaml: *const c_char,
    buffer: *mut c_char,
    capacity: usize,
    length_out: *mut usize,
) -> kvxfer_result_t {
    // SAFETY: pointer arguments are as the header asks.
    guard("kvxfer_lmcache_config_translate", || unsafe {
        let yaml = text("yaml", yaml)?;
        let out = Buffer::new("buffer", buffer.cast(), capacity, length_out)?;
        let wrong = |problem: String| Error::InvalidArgument { argument: "yaml", problem };
        let translation = translate(yaml).map_err(|e| wrong(e.to_string()))?;
        if let Some(problem) = translation.contradiction() {
            return Err(Error::failed(ErrorCode::Mismatch, problem.text.clone()));
        }
        out.set_text(&serde_json::to_string(&translation).map_err(|e| wrong(e.to_string()))?)
    })
}
