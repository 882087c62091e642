//! What `LMCache` or kvxfer would refuse about a configuration for disaggregated prefill, said before anything is started.

use super::{Notice, Problem, show, truth};
use serde_yaml_ng::{Mapping, Value};

pub(super) fn check(config: &Mapping, notices: &mut Vec<Notice>, problems: &mut Vec<Problem>) {
    if config.get("enable_pd").and_then(truth) != Some(true) {
        return;
    }
    let mut problem = |keys: &[&str], text: String| {
        let keys = keys.iter().map(|k| (*k).to_owned()).collect();
        problems.push(Problem { keys, text, contradiction: false });
    };
    let stated = |key: &str| config.get(key).filter(|v| !v.is_null());

    let role = stated("pd_role").and_then(Value::as_str);
    if !matches!(role, Some("sender" | "receiver" | "both")) {
        let found = stated("pd_role").map_or("is missing".into(), |v| format!("is {}", show(v)));
        problem(&["pd_role"], format!("pd_role {found}: \"sender\" on prefillers, \"receiver\" on decoders"));
    }
    match stated("pd_buffer_size").map(|v| (v, v.as_u64().or_else(|| v.as_str()?.trim().parse().ok()))) {
        None => problem(
            &["pd_buffer_size"],
            "pd_buffer_size is missing: bytes of the buffer, e.g. 1073741824".into(),
        ),
        Some((_, Some(n))) if n > 0 => {}
        Some((v, _)) => {
            problem(&["pd_buffer_size"], format!("pd_buffer_size is {}: bytes, more than 0", show(v)));
        }
    }
    match stated("pd_buffer_device").and_then(Value::as_str) {
        Some(device) if ["cpu", "cuda"].contains(&device.split(':').next().unwrap_or_default()) => {}
        Some(device) => {
            problem(
                &["pd_buffer_device"],
                format!("pd_buffer_device is {device:?}: \"cpu\" and \"cuda\" are possible"),
            );
        }
        None => problem(&["pd_buffer_device"], "pd_buffer_device is missing: \"cuda\", or \"cpu\"".into()),
    }
    for key in ["pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_query_port", "pd_proxy_port"] {
        let Some(value) = stated(key) else { continue };
        let ports = match value {
            Value::Sequence(ports) => ports.clone(),
            Value::String(text) => text.split(',').map(|t| t.trim().into()).collect(),
            other => vec![other.clone()],
        };
        let port = |v: &Value| v.as_u64().or_else(|| v.as_str()?.parse().ok());
        if ports.is_empty() || !ports.iter().all(|p| port(p).is_some_and(|p| (1..=65_535).contains(&p))) {
            problem(
                &[key],
                format!("{key} is {}: a port from 1 to 65535, or one for each rank", show(value)),
            );
        }
    }
    if role == Some("receiver") {
        for key in ["pd_peer_host", "pd_peer_init_port"] {
            if stated(key).is_none() {
                problem(&[key], format!("{key} is missing: a decoder listens there"));
            }
        }
    }
    if role == Some("sender")
        && stated("pd_skip_proxy_notification").and_then(truth) != Some(true)
        && stated("pd_proxy_port").is_none()
    {
        let text = "pd_proxy_port is missing: the prefiller tells the proxy there when a cache has arrived; \
             pd_skip_proxy_notification: True where nobody is to be told";
        problem(&["pd_proxy_port"], text.into());
    }
    match stated("transfer_channel").and_then(Value::as_str) {
        Some("kvxfer") => {}
        Some("nixl") => {
            let text = "transfer_channel: \"nixl\" is LMCache's own channel and stays that; \"kvxfer\" is the one word to change";
            notices.push(Notice {
                key: "transfer_channel".into(),
                today: "transfer_channel".into(),
                text: text.into(),
            });
        }
        other => {
            let found = other.map_or("is missing".into(), |v| format!("is {v:?}"));
            problem(
                &["transfer_channel"],
                format!("transfer_channel {found}: \"kvxfer\", or \"nixl\" for LMCache's own"),
            );
        }
    }
    if let Some(mode) = stated("pd_backend_mode")
        && !matches!(mode.as_str(), Some("sync" | "async"))
    {
        let text = format!(
            "pd_backend_mode is {}: \"sync\" and \"async\" are LMCache's own backends; leave it out for kvxfer's",
            show(mode)
        );
        problem(&["pd_backend_mode"], text);
    }
}
