//! Makes a C program from the header that calls every function with NULL, a freed handle and a handle of another type in every place
//! where a pointer belongs, and everything else in order. Each must answer `KVXFER_INVALID_ARGUMENT`.

use super::header::{Function, Header};
use std::fmt::Write as _;

/// Parameters that may be NULL, as their functions' documentation says.
const NULLABLE: [(&str, &str); 23] = [
    ("kvxfer_agent_new", "config"),
    ("kvxfer_peer_write", "options"),
    ("kvxfer_peer_read", "options"),
    ("kvxfer_region_memory", "length_out"),
    ("kvxfer_receiver_memory", "length_out"),
    ("kvxfer_receiver_lookup", "length_out"),
    ("kvxfer_delivery_wait", "report_out"),
    ("kvxfer_found_count", "lease_ms_out"),
    ("kvxfer_found_read", "report_out"),
    ("kvxfer_chunk_page", "page_out"),
    ("kvxfer_chunk_page", "offset_out"),
    ("kvxfer_agent_try_notification", "peer_out"),
    ("kvxfer_agent_wait_notification", "peer_out"),
    ("kvxfer_reservation_write_after", "after"),
    ("kvxfer_outbox_give_up", "after"),
    ("kvxfer_outbox_put_placed", "after"),
    ("kvxfer_gather_start", "after"),
    ("kvxfer_gather_wait", "bytes_out"),
    ("kvxfer_gather_wait", "digest_out"),
    ("kvxfer_log_set_callback", "context"),
    ("kvxfer_receiver_config_t", "memory"),
    ("kvxfer_transfer_options_t", "notify"),
    ("kvxfer_config_t", "auth_key"),
];

/// Calls made for one function.
pub(crate) struct Program {
    /// The C text.
    pub(crate) text: String,
    /// Number of calls in it.
    pub(crate) calls: usize,
}

/// Writes the program.
pub(crate) fn generate(header: &Header) -> Program {
    let mut body = String::new();
    let mut calls = 0;
    for f in header.functions.iter().filter(|f| f.returns == "kvxfer_result_t") {
        let is_free = f.name.ends_with("_free");
        // Everything NULL or zero.
        if f.parameters.iter().any(|(t, _)| is_pointer(header, t)) {
            let arguments: Vec<_> = f.parameters.iter().map(|(t, _)| zero(header, t)).collect();
            let expected = if is_free { "KVXFER_OK" } else { "KVXFER_INVALID_ARGUMENT" };
            let _ = writeln!(body, "  EXPECT({expected}, {}({}));", f.name, arguments.join(", "));
            calls += 1;
        }
        for (i, (kind, name)) in f.parameters.iter().enumerate() {
            if !is_pointer(header, kind) || is_free || NULLABLE.contains(&(f.name.as_str(), name.as_str())) {
                continue;
            }
            let mut wrong = vec![zero(header, kind)];
            if let Some(handle) = handle(header, kind) {
                wrong.push(format!("gone.{}", field(handle)));
                let other = if handle == "kvxfer_chunk_t" { "server" } else { "chunk" };
                wrong.push(format!("({kind})fx.{other}"));
            }
            for bad in wrong {
                let arguments: Vec<_> = f
                    .parameters
                    .iter()
                    .enumerate()
                    .map(|(j, (t, n))| if i == j { bad.clone() } else { valid(header, f, t, n) })
                    .collect();
                let _ = writeln!(body, "  REFUSED({}({}));", f.name, arguments.join(", "));
                calls += 1;
            }
        }
    }
    Program { text: format!("{PROLOGUE}{body}{EPILOGUE}"), calls }
}

fn is_pointer(header: &Header, kind: &str) -> bool {
    kind.ends_with('*') || kind == "kvxfer_log_callback_t" || handle(header, kind).is_some()
}

/// The handle a parameter takes, if it takes one.
fn handle<'a>(header: &'a Header, kind: &str) -> Option<&'a str> {
    let base = kind.strip_prefix("const ").unwrap_or(kind).strip_suffix('*')?.trim();
    header.handles.iter().map(String::as_str).find(|h| *h == base)
}

/// The field of the fixture that holds a handle of this type.
fn field(handle: &str) -> &'static str {
    match handle {
        "kvxfer_agent_t" => "server",
        "kvxfer_region_t" => "local",
        "kvxfer_peer_t" => "peer",
        "kvxfer_remote_region_t" => "remote",
        "kvxfer_transfer_t" => "transfer",
        "kvxfer_receiver_t" => "receiver",
        "kvxfer_chunk_t" => "chunk",
        "kvxfer_sender_t" => "sender",
        "kvxfer_reservation_t" => "reservation",
        "kvxfer_delivery_t" => "delivery",
        "kvxfer_outbox_t" => "outbox",
        "kvxfer_memory_t" => "memory",
        "kvxfer_found_t" => "found",
        "kvxfer_fence_t" => "fence",
        "kvxfer_gather_t" => "gather",
        other => panic!("add {other} to tests/support/nulls.rs and tests/c/fixture.h"),
    }
}

fn zero(header: &Header, kind: &str) -> String {
    if is_pointer(header, kind) { "NULL" } else { "0" }.to_owned()
}

/// An argument that is in order.
fn valid(header: &Header, function: &Function, kind: &str, name: &str) -> String {
    if let Some(handle) = handle(header, kind) {
        return format!("fx.{}", field(handle));
    }
    if kind.ends_with("**") {
        let base = kind.trim_start_matches("const ").trim_end_matches(['*', ' ']);
        return match base {
            "void" if kind.starts_with("const") => "&out_const".into(),
            "void" => "&out_void".into(),
            handle => format!("&out_{}", handle.trim_start_matches("kvxfer_").trim_end_matches("_t")),
        };
    }
    match (kind, name) {
        ("const char *", "address") => "fx.address".into(),
        ("const char *", "yaml" | "json") => "\"{}\"".into(),
        ("const char *", "key") => "\"chunk-a\"".into(),
        ("const char *", _) => "\"inbox\"".into(),
        ("char *", _) | ("void *", "payload_out") => "buffer".into(),
        ("void *" | "const void *", _) => "memory".into(),
        ("size_t *" | "uint64_t *" | "uint32_t *" | "int32_t *" | "int *" | "kvxfer_result_t *", _) => {
            format!("({kind})&number")
        }
        ("size_t", "capacity" | "peer_capacity") => "sizeof buffer".into(),
        ("size_t", "index" | "first") | ("uint32_t", "flags" | "transport") | ("int32_t", _) => "0".into(),
        ("uint64_t", "length") => "sizeof memory".into(),
        ("uint32_t" | "size_t" | "uint64_t" | "kvxfer_result_t", _) => "1".into(),
        ("kvxfer_log_callback_t" | "const kvxfer_transfer_options_t *" | "const kvxfer_config_t *", _) => {
            "NULL".into()
        }
        ("const kvxfer_piece_t *" | "kvxfer_piece_t *", _) => "&piece".into(),
        ("const kvxfer_view_t *", "from") => "&fx.from".into(),
        ("const kvxfer_view_t *", _) => "&fx.to".into(),
        ("const kvxfer_run_t *", _) => "&run".into(),
        ("const kvxfer_chunk_spec_t *", _) => "&spec".into(),
        ("const kvxfer_chunk_source_t *", _) => "&source".into(),
        ("const char *const *", _) => "keys".into(),
        ("const kvxfer_found_target_t *", _) => "&target".into(),
        ("kvxfer_place_t *", _) => "&place".into(),
        ("kvxfer_found_chunk_t *", _) => "&found_chunk".into(),
        ("kvxfer_read_report_t *", _) => "&read_report".into(),
        ("const kvxfer_receiver_config_t *", _) => "&pool".into(),
        ("const kvxfer_sender_config_t *", _) => "&channel".into(),
        ("const kvxfer_outbox_config_t *", _) => "&outbox".into(),
        ("const kvxfer_batch_t *", _) => "&batch".into(),
        ("const kvxfer_paged_t *", _) => "&paged".into(),
        ("const kvxfer_paged_chunk_t *", _) => "&paged_chunk".into(),
        ("kvxfer_outbox_event_t *", _) => "&outbox_event".into(),
        ("kvxfer_transfer_report_t *", _) => "&transfer_report".into(),
        ("kvxfer_delivery_report_t *", _) => "&delivery_report".into(),
        ("kvxfer_receiver_event_t *", _) => "&event".into(),
        ("kvxfer_pool_stats_t *", _) => "&stats".into(),
        ("kvxfer_path_stats_t *", _) => "&path_stats".into(),
        _ => panic!("{}: add `{kind} {name}` to tests/support/nulls.rs", function.name),
    }
}

const PROLOGUE: &str = r#"/* Generated by tests/support/nulls.rs from include/kvxfer.h. */
#include "fixture.h"

#define SIZED(type, name) type name; memset(&name, 0, sizeof name); name.struct_size = sizeof name

int main(void) {
  fixture_t gone, fx;
  fixture_new(&gone);
  fixture_free(&gone);
  fixture_new(&fx);
  kvxfer_agent_t *out_agent = NULL;
  kvxfer_region_t *out_region = NULL;
  kvxfer_peer_t *out_peer = NULL;
  kvxfer_remote_region_t *out_remote_region = NULL;
  kvxfer_transfer_t *out_transfer = NULL;
  kvxfer_receiver_t *out_receiver = NULL;
  kvxfer_chunk_t *out_chunk = NULL;
  kvxfer_sender_t *out_sender = NULL;
  kvxfer_reservation_t *out_reservation = NULL;
  kvxfer_delivery_t *out_delivery = NULL;
  kvxfer_outbox_t *out_outbox = NULL;
  kvxfer_memory_t *out_memory = NULL;
  kvxfer_found_t *out_found = NULL;
  kvxfer_fence_t *out_fence = NULL;
  kvxfer_gather_t *out_gather = NULL;
  void *out_void = NULL;
  const void *out_const = NULL;
  uint64_t number = 0;
  char buffer[4096];
  static char memory[4096];
  kvxfer_piece_t piece = {0, 0, 64};
  kvxfer_run_t run = {0, 64};
  kvxfer_chunk_spec_t spec = {"null-chunk", 64};
  kvxfer_place_t place = {NULL, 0};
  kvxfer_chunk_source_t source = {"null-chunk", fx.local, &run, 1};
  const char *keys[] = {"chunk-a"};
  kvxfer_found_target_t target = {fx.local, &run, 1, 0, 0};
  SIZED(kvxfer_found_chunk_t, found_chunk);
  SIZED(kvxfer_read_report_t, read_report);
  kvxfer_geometry_t geometry = fixture_geometry();
  SIZED(kvxfer_receiver_config_t, pool);
  pool.pool = "null-pool";
  pool.pages = 1;
  pool.geometry = &geometry;
  SIZED(kvxfer_sender_config_t, channel);
  channel.geometry = &geometry;
  SIZED(kvxfer_outbox_config_t, outbox);
  outbox.sender = &channel;
  SIZED(kvxfer_batch_t, batch);
  batch.request = "null-request";
  batch.receiver = fx.address;
  batch.chunks = &source;
  batch.count = 1;
  batch.first = 1;
  batch.last = 1;
  SIZED(kvxfer_outbox_event_t, outbox_event);
  SIZED(kvxfer_transfer_report_t, transfer_report);
  SIZED(kvxfer_delivery_report_t, delivery_report);
  SIZED(kvxfer_receiver_event_t, event);
  SIZED(kvxfer_pool_stats_t, stats);
  SIZED(kvxfer_path_stats_t, path_stats);
  void *layer = memory;
  SIZED(kvxfer_paged_t, paged);
  paged.layers = &layer;
  paged.layer_count = 1;
  paged.layer_bytes = 2048;
  paged.blocks = 1;
  paged.heads = 1;
  paged.block_size = 16;
  paged.head_size = 32;
  paged.element_bytes = 2;
  paged.layout = KVXFER_PAGED_VEC;
  int64_t slots[] = {3};
  kvxfer_paged_chunk_t paged_chunk = {slots, 1, 0, memory + 2048, 128};
  OK(kvxfer_paged_gather(&paged, &paged_chunk, 1));
  uint64_t live = kvxfer_live_handles();
"#;

const EPILOGUE: &str = r#"  /* No refused call has made, freed or written anything. */
  TRUE(kvxfer_live_handles() == live);
  TRUE(!out_agent && !out_region && !out_peer && !out_remote_region && !out_transfer && !out_receiver && !out_chunk);
  TRUE(!out_sender && !out_reservation && !out_delivery && !out_outbox && !out_memory && !out_found && !out_fence && !out_gather);
  TRUE(!out_void && !out_const && number == 0);
  fixture_free(&fx);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
"#;
