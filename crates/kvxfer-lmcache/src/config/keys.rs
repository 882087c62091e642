//! The keys: what the older ones are called today, what became of those that are gone, and what today's are.

/// What became of an older key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It has another name.
    Renamed(&'static str),
    /// It has another name and holds one port; today's holds one per rank.
    RenamedPort(&'static str),
    /// It means nothing any more, and why.
    Gone(&'static str),
}
use Fate::{Gone, Renamed, RenamedPort};

/// Older keys. Those of the buffer are left alone where `LMCache`'s NIXL *storage* uses them, see [`STORAGE`].
pub(super) const OLDER: &[(&str, Fate)] = &[
    ("enable_nixl", Renamed("enable_pd")),
    ("enable_xpyd", Renamed("enable_pd")),
    ("nixl_role", Renamed("pd_role")),
    ("nixl_peer_host", Renamed("pd_peer_host")),
    ("nixl_receiver_host", Renamed("pd_peer_host")),
    ("nixl_peer_port", RenamedPort("pd_peer_init_port")),
    ("nixl_receiver_port", RenamedPort("pd_peer_init_port")),
    ("nixl_peer_init_port", RenamedPort("pd_peer_init_port")),
    ("nixl_peer_alloc_port", RenamedPort("pd_peer_alloc_port")),
    ("nixl_proxy_host", Renamed("pd_proxy_host")),
    ("nixl_proxy_port", Renamed("pd_proxy_port")),
    ("nixl_buffer_size", Renamed("pd_buffer_size")),
    ("nixl_buffer_device", Renamed("pd_buffer_device")),
    ("nixl_enable_gc", Gone("pages that nobody needs any more are always given back")),
];

/// Keys that are today's own where `extra_config.enable_nixl_storage` is on.
pub(super) const STORAGE: &[&str] = &["nixl_buffer_size", "nixl_buffer_device"];

/// Today's keys that a file for disaggregated prefill is likely to have; for the hint after a misspelt one.
pub(super) const KNOWN: &[&str] = &[
    "blend_check_layers",
    "blend_min_tokens",
    "blend_recompute_ratios",
    "blend_special_str",
    "cache_policy",
    "chunk_size",
    "controller_pull_url",
    "controller_reply_url",
    "enable_async_loading",
    "enable_blending",
    "enable_controller",
    "enable_kv_events",
    "enable_lazy_memory_allocator",
    "enable_p2p",
    "enable_pd",
    "enable_scheduler_bypass_lookup",
    "extra_config",
    "gds_path",
    "internal_api_server_enabled",
    "internal_api_server_host",
    "internal_api_server_port_start",
    "lmcache_instance_id",
    "lmcache_worker_ports",
    "local_cpu",
    "local_cpu_use_hugepages",
    "local_disk",
    "lookup_timeout_ms",
    "max_local_cpu_size",
    "max_local_disk_size",
    "min_retrieve_tokens",
    "nixl_backends",
    "nixl_buffer_device",
    "nixl_buffer_size",
    "numa_mode",
    "p2p_host",
    "p2p_init_ports",
    "p2p_lookup_ports",
    "pd_allocation_timeout_sec",
    "pd_backend_mode",
    "pd_bidirectional",
    "pd_buffer_device",
    "pd_buffer_size",
    "pd_condition_poll_interval_sec",
    "pd_max_prefill_len",
    "pd_peer_alloc_port",
    "pd_peer_host",
    "pd_peer_init_port",
    "pd_peer_query_port",
    "pd_proxy_host",
    "pd_proxy_port",
    "pd_role",
    "pd_shutdown_timeout_sec",
    "pd_skip_proxy_notification",
    "pre_caching_hash_algorithm",
    "priority_limit",
    "remote_serde",
    "remote_storage_plugins",
    "remote_url",
    "reserve_local_cpu_size",
    "retrieve_locations",
    "runtime_plugin_locations",
    "save_chunk_meta",
    "save_decode_cache",
    "save_unfull_chunk",
    "storage_plugins",
    "store_location",
    "transfer_channel",
    "use_gpu_connector_v3",
    "use_layerwise",
];

/// The known key nearest to an unknown one, if any is near.
pub(super) fn nearest(key: &str) -> Option<&'static str> {
    let limit = (key.len() / 3).clamp(1, 4);
    let older = OLDER.iter().map(|(name, _)| *name);
    KNOWN
        .iter()
        .copied()
        .chain(older)
        .map(|k| (distance(key, k), k))
        .filter(|(d, _)| *d <= limit)
        .min()
        .map(|(_, k)| k)
}

/// Letters to insert, drop or change to get from one to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_keys_find_what_was_meant() {
        assert_eq!(nearest("pd_bufer_size"), Some("pd_buffer_size"));
        assert_eq!(nearest("transfer_chanel"), Some("transfer_channel"));
        assert_eq!(nearest("nixl_rolle"), Some("nixl_role"));
        assert_eq!(nearest("something_else_entirely"), None);
    }

    #[test]
    fn every_older_key_leads_to_one_of_today() {
        for (key, fate) in OLDER {
            if let Renamed(today) | RenamedPort(today) = fate {
                assert!(KNOWN.contains(today), "{key} leads to {today}");
            }
        }
    }
}
