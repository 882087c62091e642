/* SPDX-License-Identifier: Apache-2.0
 *
 * kvxfer: moves LLM key/value caches between inference engines.
 *
 * Two layers. One-sided: an agent, its regions, a connected peer, and transfers of (local offset, remote offset, length)
 * pieces with an outcome each. Sender and receiver: a request's chunks are reserved, written and committed by the sender, and
 * looked up, acquired and released at the receiver.
 *
 * Conventions, the same for every function (docs/c-abi.md has the reasons):
 *
 *  - Every call that can fail returns a kvxfer_result_t; kvxfer_last_error() has the text of this thread's last failure.
 *  - Inputs come before outputs. Outputs are written on KVXFER_OK only; the exception is the length of a buffer that was
 *    too small (KVXFER_TOO_LARGE).
 *  - Handles (kvxfer_..._t pointers) are opaque numbers, not addresses. Each is freed exactly once by its own _free
 *    function; freeing NULL does nothing. A freed, doubly freed or mistyped handle is refused with
 *    KVXFER_INVALID_ARGUMENT. Handles may be freed in any order.
 *  - NULL is refused with KVXFER_INVALID_ARGUMENT unless the function says that it may be NULL.
 *  - Texts are NUL-terminated UTF-8. What a call points at is only read during the call and may go afterwards, save for
 *    registered memory.
 *  - Structs that the caller fills or has filled begin with size_t struct_size: set it to sizeof the struct, and everything
 *    else to zero. Programs built against older and newer headers keep working.
 *  - Time-outs are milliseconds, at most KVXFER_MAX_TIMEOUT_MS; UINT64_MAX is refused, because everything ends. 0 asks
 *    without waiting, or means "as configured" where the function says so.
 *  - Every function may be called from any thread at any time, on the same handle too.
 *  - After fork(), a child of a process that has made a handle gets KVXFER_CLOSED from every call; its parent is not affected.
 *  - No panic and no exception crosses this interface (KVXFER_PANIC reports a bug); no signal handler is installed.
 */


#ifndef KVXFER_H
#define KVXFER_H

/* Generated from ffi/c by cbindgen; `make header` writes it again. Do not edit. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Major version of this header; the library's is `kvxfer_version()`.
#define KVXFER_VERSION_MAJOR 0

// Minor version of this header.
#define KVXFER_VERSION_MINOR 1

// Patch version of this header.
#define KVXFER_VERSION_PATCH 0

// Version of the binary interface: the number in the SONAME, `libkvxfer.so.0`. Compare with
// `kvxfer_abi_version()`.
#define KVXFER_ABI_VERSION 0

// Largest time-out or deadline, in milliseconds: one year. `UINT64_MAX` ("for ever") is refused like anything
// above.
#define KVXFER_MAX_TIMEOUT_MS 31536000000

// Level of checking as configured, by default by transport.
#define KVXFER_INTEGRITY_DEFAULT 0

// Nothing beside the protocol's own bookkeeping.
#define KVXFER_INTEGRITY_OFF 1

// Request, key, length and page generation, plus sampled cache lines.
#define KVXFER_INTEGRITY_BOUND 2

// Every byte.
#define KVXFER_INTEGRITY_FULL 3

// Flag: overlay the `KVXFER_*` environment variables over the configuration given.
#define KVXFER_CONFIG_ENVIRONMENT 1

// Peers may read an exported region.
#define KVXFER_ACCESS_READ 1

// Peers may write an exported region.
#define KVXFER_ACCESS_WRITE 2

// Peers may do both.
#define KVXFER_ACCESS_READ_WRITE 3

// The best transport that reaches both regions.
#define KVXFER_TRANSPORT_ANY 0

// Inside one process.
#define KVXFER_TRANSPORT_INPROC 1

// Shared memory on one host.
#define KVXFER_TRANSPORT_SHM 2

// `process_vm_writev` on one host.
#define KVXFER_TRANSPORT_CMA 3

// Sockets.
#define KVXFER_TRANSPORT_TCP 4

// NIXL's plug-ins.
#define KVXFER_TRANSPORT_NIXL 5

// GPU to GPU on one host.
#define KVXFER_TRANSPORT_CUDA_IPC 6

// Longest payload of a notification, bytes: a buffer of this size always suffices.
#define KVXFER_MAX_NOTIFICATION 4096

// Longest name of an agent, region or pool, bytes without the NUL.
#define KVXFER_MAX_NAME 128

// Nothing is known of the key.
#define KVXFER_LOOKUP_ABSENT 0

// The chunk is on its way.
#define KVXFER_LOOKUP_PENDING 1

// The chunk is published: complete and checked.
#define KVXFER_LOOKUP_PRESENT 2

// Every chunk of the request is published.
#define KVXFER_EVENT_READY 1

// The request ended otherwise.
#define KVXFER_EVENT_FAILED 2

// Most keys in one query.
#define KVXFER_MAX_QUERY 4096

// Nothing reads the batch's bytes any more.
#define KVXFER_OUTBOX_RELEASED 1

// A request has ended.
#define KVXFER_OUTBOX_ENDED 2

// vLLM's `vec` and `vec16` kernels. In a (block, head): keys `[head_size][block_size]`, values
// `[block_size][head_size]`.
#define KVXFER_PAGED_VEC 1

// vLLM's `amx` kernels, elements of 2 bytes. In a (block, head): keys `[block_size / 16][head_size / 2][16][2]`,
// values `[head_size / 16][block_size / 2][16][2]`.
#define KVXFER_PAGED_AMX 2

// Something failed that somebody must know.
#define KVXFER_LOG_ERROR 1

// Something is odd; work goes on.
#define KVXFER_LOG_WARN 2

// Connections, pools, requests.
#define KVXFER_LOG_INFO 3

// Steps of each.
#define KVXFER_LOG_DEBUG 4

// Every message.
#define KVXFER_LOG_TRACE 5

// One endpoint of this process: its regions, its peers and one progress thread. Usable from any thread.
typedef struct kvxfer_agent_t kvxfer_agent_t;

// A published chunk, pinned: its bytes stay as they are until the handle is freed.
typedef struct kvxfer_chunk_t kvxfer_chunk_t;

// A request whose chunks have all been handed over. Usable from any thread.
typedef struct kvxfer_delivery_t kvxfer_delivery_t;

// A point in a CUDA stream. Usable from any thread.
typedef struct kvxfer_fence_t kvxfer_fence_t;

// Chunks that a receiver has, held for reading until they are read or the handle is freed. Usable from any thread.
typedef struct kvxfer_found_t kvxfer_found_t;

// A gather: two views of a cache that fit each other. Usable from any thread.
typedef struct kvxfer_gather_t kvxfer_gather_t;

// Memory that peers on the same host can map. Usable from any thread.
typedef struct kvxfer_memory_t kvxfer_memory_t;

// Sends requests to receivers that it connects to by itself. Usable from any thread.
typedef struct kvxfer_outbox_t kvxfer_outbox_t;

// A connected remote agent of one epoch. Stays valid, and answers with errors, after the peer is gone.
typedef struct kvxfer_peer_t kvxfer_peer_t;

// A pool of pages open to senders. Usable from any thread.
typedef struct kvxfer_receiver_t kvxfer_receiver_t;

// Registered memory. Usable from any thread.
typedef struct kvxfer_region_t kvxfer_region_t;

// A peer's exported region.
typedef struct kvxfer_remote_region_t kvxfer_remote_region_t;

// A request under way: declared, then admitted, then written chunk by chunk.
typedef struct kvxfer_reservation_t kvxfer_reservation_t;

// A channel to one receiver's pool; reconnects by itself when the receiver was restarted. Usable from any
// thread.
typedef struct kvxfer_sender_t kvxfer_sender_t;

// A transfer under way or finished. Usable from any thread.
typedef struct kvxfer_transfer_t kvxfer_transfer_t;

// Outcome of a call: `KVXFER_OK` or the reason for the failure. Numbers are never reused; a newer library may
// answer with a number this header does not name, so treat an unknown one as a failure.
typedef uint32_t kvxfer_result_t;

// Settings of an agent. Set everything to zero and `struct_size` to `sizeof(kvxfer_config_t)`; then zero or
// NULL in a field means its default. For the settings not listed here see `kvxfer_agent_new_from_yaml`.
typedef struct kvxfer_config_t {
  // `sizeof(kvxfer_config_t)`.
  size_t struct_size;
  // Name of the agent, stable over restarts; default `host-pid`.
  const char *name;
  // Addresses to listen on, `tcp://127.0.0.1:7300` (port 0 picks one) or `unix:///run/kvxfer.sock`; default
  // none.
  const char *const *listen;
  // Number of addresses in `listen`.
  size_t listen_count;
  // Pre-shared key: bytes; when set, every control connection must prove that it holds the same.
  const uint8_t *auth_key;
  // Length of `auth_key` in bytes.
  size_t auth_key_length;
  // Allow only these transports, in this order (`inproc`, `shm`, `cma`, `tcp`, `nixl`, `cuda_ipc`); default
  // all.
  const char *const *allow;
  // Number of names in `allow`.
  size_t allow_count;
  // Never use these transports.
  const char *const *forbid;
  // Number of names in `forbid`.
  size_t forbid_count;
  // At least one of these must carry a peer's bytes or connecting fails: transports, `nvlink`, `rdma` or
  // `same_host`.
  const char *const *require;
  // Number of names in `require`.
  size_t require_count;
  // `KVXFER_INTEGRITY_...`.
  uint32_t integrity;
  // `KVXFER_CONFIG_...` flags, or 0.
  uint32_t flags;
  // Deadline of a connection attempt with its handshake, milliseconds.
  uint64_t connect_timeout_ms;
  // Deadline of a transfer that states none, milliseconds.
  uint64_t transfer_timeout_ms;
  // A peer silent for this long is gone, milliseconds.
  uint64_t peer_timeout_ms;
} kvxfer_config_t;

// What has been exchanged with a peer over one transport, or over all, since the connection came up. Set
// `struct_size` before the call.
typedef struct kvxfer_path_stats_t {
  // `sizeof(kvxfer_path_stats_t)`, set by the caller.
  size_t struct_size;
  // Bytes moved to the peer.
  uint64_t write_bytes;
  // Transfers to the peer that ended, failed ones included.
  uint64_t write_transfers;
  // Those that failed.
  uint64_t write_failed;
  // Sum of their durations, nanoseconds; those that overlapped count twice.
  uint64_t write_busy_ns;
  // Bytes moved from the peer.
  uint64_t read_bytes;
  // Transfers from the peer that ended, failed ones included.
  uint64_t read_transfers;
  // Those that failed.
  uint64_t read_failed;
  // Sum of their durations, nanoseconds.
  uint64_t read_busy_ns;
  // Transfers under way, over any transport.
  uint64_t in_flight;
} kvxfer_path_stats_t;

// One contiguous run of bytes to move.
typedef struct kvxfer_piece_t {
  // Offset in the local region, bytes.
  uint64_t local_offset;
  // Offset in the remote region, bytes.
  uint64_t remote_offset;
  // Length, bytes; not zero.
  uint64_t length;
} kvxfer_piece_t;

// What a transfer may be told beside its pieces. Zero or NULL in a field means its default.
typedef struct kvxfer_transfer_options_t {
  // `sizeof(kvxfer_transfer_options_t)`.
  size_t struct_size;
  // Ends the transfer with `KVXFER_TIMED_OUT`; milliseconds, 0: as configured.
  uint64_t timeout_ms;
  // Sent to the peer once every byte has landed, and only then; at most `KVXFER_MAX_NOTIFICATION` bytes.
  const void *notify;
  // Length of `notify` in bytes; 0 with a pointer that is not NULL sends an empty notification.
  size_t notify_length;
  // `KVXFER_INTEGRITY_...`.
  uint32_t integrity;
  // `KVXFER_TRANSPORT_...`; `KVXFER_UNSUPPORTED` when that one does not reach both regions.
  uint32_t transport;
  // Nothing is read or written before this point of a CUDA stream; NULL: at once.
  const struct kvxfer_fence_t *after;
} kvxfer_transfer_options_t;

// How a transfer went. Set `struct_size` before the call.
typedef struct kvxfer_transfer_report_t {
  // `sizeof(kvxfer_transfer_report_t)`, set by the caller.
  size_t struct_size;
  // `KVXFER_OK`, or the first failure.
  kvxfer_result_t result;
  // `KVXFER_TRANSPORT_...`: what carried the bytes.
  uint32_t transport;
  // Bytes moved.
  uint64_t bytes;
  // Pieces in all.
  uint64_t pieces;
  // Pieces that failed.
  uint64_t failed;
  // From submission to the last outcome, nanoseconds.
  uint64_t duration_ns;
} kvxfer_transfer_report_t;

// What the two sides of a pool must agree on; compared field by field when a sender connects. Zero or NULL
// means "not stated" and is compared like any other value.
typedef struct kvxfer_geometry_t {
  // `sizeof(kvxfer_geometry_t)`.
  size_t struct_size;
  // Fingerprint or name of the model.
  const char *model;
  // Element type, e.g. `bfloat16`.
  const char *dtype;
  // Layout of a chunk, e.g. `KV_2LTD`.
  const char *layout;
  // What the engine's content hashes depend on beside the content (Python: `PYTHONHASHSEED`).
  const char *hash_seed;
  // Bytes of one page: a full chunk's keys and values of this rank. Not zero.
  uint64_t page_bytes;
  // Tokens of a full chunk.
  uint32_t chunk_tokens;
  // Transformer layers held by this rank.
  uint32_t layers;
  // KV heads held by this rank.
  uint32_t kv_heads;
  // Elements per head.
  uint32_t head_dim;
  // Tensor-parallel rank.
  uint32_t tp_rank;
  // Tensor-parallel size.
  uint32_t tp_size;
} kvxfer_geometry_t;

// Settings of a pool. Zero or NULL in a field means its default, where there is one.
typedef struct kvxfer_receiver_config_t {
  // `sizeof(kvxfer_receiver_config_t)`.
  size_t struct_size;
  // Name senders attach to; default `kv`.
  const char *pool;
  // What the pages hold; needed.
  const struct kvxfer_geometry_t *geometry;
  // Number of pages; needed.
  uint32_t pages;
  // Longest queue of requests that wait for pages.
  uint32_t max_queue;
  // A sender that neither commits nor renews for this long loses its lease, milliseconds.
  uint64_t lease_ms;
  // A request not admitted for this long is refused, milliseconds.
  uint64_t admission_timeout_ms;
  // A published chunk nobody has acquired is dropped after this long, milliseconds.
  uint64_t retention_ms;
  // Memory of the caller's own for the pages, the host's or a GPU's; NULL: host memory allocated by kvxfer, which peers on the same
  // host reach fastest. It must stay until `kvxfer_receiver_free` has answered `KVXFER_OK`.
  void *memory;
  // Length of `memory`, at least `pages * page_bytes`.
  uint64_t memory_length;
} kvxfer_receiver_config_t;

// What happened to a request. Set `struct_size` before the call.
typedef struct kvxfer_receiver_event_t {
  // `sizeof(kvxfer_receiver_event_t)`, set by the caller.
  size_t struct_size;
  // `KVXFER_EVENT_...`.
  uint32_t kind;
  // `KVXFER_OK`, or why the request failed.
  kvxfer_result_t result;
  // Name of the sender's agent, NUL-terminated.
  char sender[136];
  // The request's id, NUL-terminated.
  char request[264];
  // The failure in words, NUL-terminated, cut when longer.
  char text[512];
} kvxfer_receiver_event_t;

// Pages by state, and the queue. Set `struct_size` before the call.
typedef struct kvxfer_pool_stats_t {
  // `sizeof(kvxfer_pool_stats_t)`, set by the caller.
  size_t struct_size;
  // All pages.
  uint32_t pages;
  // Free pages.
  uint32_t free_pages;
  // Granted and being written.
  uint32_t writing;
  // Published.
  uint32_t published;
  // Published and pinned.
  uint32_t pinned;
  // Waiting until no write can land any more.
  uint32_t quarantined;
  // Requests waiting for pages.
  uint32_t queued;
  // Requests admitted and not ended.
  uint32_t active;
  // In the hands of senders, for requests to come; they return them when others wait.
  uint32_t advanced;
  // Pages a new request could have: free ones, and published ones whose consumers have come and gone.
  uint32_t available;
} kvxfer_pool_stats_t;

// Settings of a sender. Zero or NULL in a field means its default, where there is one.
typedef struct kvxfer_sender_config_t {
  // `sizeof(kvxfer_sender_config_t)`.
  size_t struct_size;
  // The receiver's pool; default `kv`.
  const char *pool;
  // Must equal the receiver's; needed.
  const struct kvxfer_geometry_t *geometry;
  // Deadline of a request that states none, admission included, milliseconds.
  uint64_t request_timeout_ms;
  // `KVXFER_INTEGRITY_...`.
  uint32_t integrity;
  // Zero.
  uint32_t reserved;
} kvxfer_sender_config_t;

// One chunk of a request.
typedef struct kvxfer_chunk_spec_t {
  // Content key, made by the engine; equal keys mean equal bytes.
  const char *key;
  // Valid bytes; at most a page.
  uint64_t length;
} kvxfer_chunk_spec_t;

// A run of bytes of a region.
typedef struct kvxfer_run_t {
  // Offset in the region, bytes.
  uint64_t offset;
  // Length, bytes; not zero.
  uint64_t length;
} kvxfer_run_t;

// One chunk of a request with the place of its bytes: runs of a region, concatenated. Their sum is the
// chunk's length.
typedef struct kvxfer_chunk_source_t {
  // Content key.
  const char *key;
  // The region.
  const struct kvxfer_region_t *region;
  // The runs, in the order of the chunk's bytes.
  const struct kvxfer_run_t *runs;
  // Number of runs.
  size_t run_count;
} kvxfer_chunk_source_t;

// How a request went. Set `struct_size` before the call.
typedef struct kvxfer_delivery_report_t {
  // `sizeof(kvxfer_delivery_report_t)`, set by the caller.
  size_t struct_size;
  // Bytes that crossed; chunks already present do not.
  uint64_t bytes;
  // Wait for admission, nanoseconds.
  uint64_t queued_ns;
  // From admission to the receiver's word that all is published, nanoseconds.
  uint64_t moved_ns;
  // Chunks written.
  uint32_t written;
  // Chunks that were there already.
  uint32_t present;
  // `KVXFER_TRANSPORT_...`: what carried the bytes.
  uint32_t transport;
  // Zero.
  uint32_t reserved;
} kvxfer_delivery_report_t;

// One chunk that was found. Set `struct_size` before the call.
typedef struct kvxfer_found_chunk_t {
  // `sizeof(kvxfer_found_chunk_t)`, set by the caller.
  size_t struct_size;
  // Valid bytes.
  uint64_t length;
  // Generation of its page.
  uint64_t generation;
  // Place of its key in the query.
  uint32_t index;
  // Its page in the receiver's pool.
  uint32_t page;
} kvxfer_found_chunk_t;

// Where a chunk that was found is read to: runs of a region, in the order of the chunk's bytes. Their sum is the
// chunk's length.
typedef struct kvxfer_found_target_t {
  // The region.
  const struct kvxfer_region_t *region;
  // The runs.
  const struct kvxfer_run_t *runs;
  // Number of runs.
  size_t run_count;
  // Place of the chunk's key in the query.
  uint32_t index;
  // Zero.
  uint32_t reserved;
} kvxfer_found_target_t;

// How reading went. Set `struct_size` before the call.
typedef struct kvxfer_read_report_t {
  // `sizeof(kvxfer_read_report_t)`, set by the caller.
  size_t struct_size;
  // Bytes read.
  uint64_t bytes;
  // From the call to the certainty that they are good, nanoseconds.
  uint64_t took_ns;
  // Chunks read.
  uint32_t chunks;
  // `KVXFER_TRANSPORT_...`: what carried the bytes.
  uint32_t transport;
} kvxfer_read_report_t;

// Settings of an outbox.
typedef struct kvxfer_outbox_config_t {
  // `sizeof(kvxfer_outbox_config_t)`.
  size_t struct_size;
  // Pool, geometry, integrity and request time-out towards every receiver; needed.
  const struct kvxfer_sender_config_t *sender;
  // Notification socket of the proxy, `tcp://host:port`; NULL: nobody is told. One that is not kvxfer's hears
  // of successes only, in `LMCache`'s words.
  const char *proxy;
  // How long a receiver that cannot be reached is waited for, milliseconds; 0: 10 seconds.
  uint64_t patience_ms;
} kvxfer_outbox_config_t;

// Part of a request. Its bytes must stay as they are until the batch is released.
typedef struct kvxfer_batch_t {
  // `sizeof(kvxfer_batch_t)`.
  size_t struct_size;
  // The request, as the proxy knows it.
  const char *request;
  // Where its chunks go, `tcp://host:port`.
  const char *receiver;
  // The chunks; a NULL region: in the place that `kvxfer_outbox_place` gave, and one run `{0, length}`.
  const struct kvxfer_chunk_source_t *chunks;
  // Number of chunks; 0 is possible in the last batch.
  size_t count;
  // Chunks of the whole request, in the first batch: pages for all of them are asked for at once. 0: only these.
  uint32_t total;
  // 1 in the first batch of a request: an earlier request of that name is over.
  uint32_t first;
  // 1 in the last batch.
  uint32_t last;
  // Zero.
  uint32_t reserved;
  // The chunks' bytes are complete at this point of a CUDA stream; NULL: now.
  const struct kvxfer_fence_t *after;
} kvxfer_batch_t;

// Where a chunk's bytes are to be produced; see `kvxfer_outbox_place`.
typedef struct kvxfer_place_t {
  // First byte of its page, in this process or on the device; NULL: it has no place here.
  void *address;
  // Its bytes.
  uint64_t length;
} kvxfer_place_t;

// What happened. Set `struct_size` before the call.
typedef struct kvxfer_outbox_event_t {
  // `sizeof(kvxfer_outbox_event_t)`, set by the caller.
  size_t struct_size;
  // `KVXFER_OUTBOX_...`.
  uint32_t kind;
  // Of a request: `KVXFER_OK` when every chunk is published, or why it failed.
  kvxfer_result_t result;
  // Of a release: number of the batch.
  uint64_t batch;
  // Bytes that crossed; chunks that were there already do not.
  uint64_t bytes;
  // Wait for admission, nanoseconds.
  uint64_t queued_ns;
  // From admission to the end, nanoseconds.
  uint64_t moved_ns;
  // From the first batch to the end, nanoseconds.
  uint64_t took_ns;
  // From the last batch to the end, nanoseconds; 0 where the last one had not come.
  uint64_t after_last_ns;
  // Chunks written.
  uint32_t written;
  // Chunks that were there already.
  uint32_t present;
  // `KVXFER_TRANSPORT_...`: what carried the bytes.
  uint32_t transport;
  // Events that waited after this one: while there are any, the next call takes one at once.
  uint32_t more;
  // The request's id, NUL-terminated.
  char request[264];
  // A failure in words, NUL-terminated, cut when longer.
  char text[512];
} kvxfer_outbox_event_t;

// A paged cache in host memory. Each layer is contiguous, `[blocks, heads, 2, block_size * head_size]` elements:
// of each block and head first the keys, then the values, in the order that `layout` names.
typedef struct kvxfer_paged_t {
  // `sizeof(kvxfer_paged_t)`.
  size_t struct_size;
  // First byte of each layer; the memory stays the caller's.
  void *const *layers;
  // Number of layers in `layers`.
  size_t layer_count;
  // Bytes of each layer; must be what the sizes below come to.
  uint64_t layer_bytes;
  // Blocks.
  uint64_t blocks;
  // Heads of keys and of values.
  uint32_t heads;
  // Tokens in a block.
  uint32_t block_size;
  // Elements of a head.
  uint32_t head_size;
  // Bytes of an element: 2 or 4.
  uint32_t element_bytes;
  // `KVXFER_PAGED_...`.
  uint32_t layout;
  // Threads that copy; 0: as many as the calling thread has processors, eight at most.
  uint32_t threads;
} kvxfer_paged_t;

// A contiguous chunk, `[2, layers, tokens, heads * head_size]` elements: keys of all layers, then values.
typedef struct kvxfer_paged_chunk_t {
  // Slot of each token, `block * block_size + place in the block`; in any order.
  const int64_t *slots;
  // Number of tokens.
  size_t tokens;
  // So many tokens at the chunk's start are left alone on both sides; their slots are not looked at.
  size_t skip;
  // First byte of the chunk; the memory stays the caller's.
  void *data;
  // Bytes of the chunk; must be what its tokens, skipped ones too, come to.
  uint64_t length;
} kvxfer_paged_chunk_t;

// Layers of a cache in a region, and which of their tokens are meant. All numbers but counts are bytes.
//
// A layer `[2, blocks, block, heads, head]` has a `plane` of `blocks * block`, a `block` of `block_tokens * token`, a `token` of
// `heads * head_bytes` and a `head` of `head_bytes`. Other orders differ in the strides alone. A contiguous chunk is one block of all its tokens.
// Tokens are named by a table of blocks (`table`, `first`), by slots, or, with neither, one after the other from `first` on.
typedef struct kvxfer_view_t {
  // `sizeof(kvxfer_view_t)`.
  size_t struct_size;
  // Where the layers are: a GPU's memory, or pinned host memory.
  const struct kvxfer_region_t *region;
  // Offset of each layer in the region; any subset, in any order.
  const uint64_t *layers;
  // Number of layers.
  size_t layer_count;
  // From a token's keys to its values.
  uint64_t plane;
  // From block to block.
  uint64_t block;
  // From token to token in a block.
  uint64_t token;
  // From head to head.
  uint64_t head;
  // Bytes of a head of one token, a multiple of 8; of 16 for full speed.
  uint64_t head_bytes;
  // 2: keys and values; 1: one of something (multi-head latent attention).
  uint32_t planes;
  // Blocks.
  uint32_t blocks;
  // Tokens of a block.
  uint32_t block_tokens;
  // Heads that are meant, from the layers' offsets on.
  uint32_t heads;
  // Block of each `block_tokens` tokens; NULL: none.
  const uint32_t *table;
  // Entries of `table`.
  size_t table_count;
  // Slot of each token, `block * block_tokens + place in the block`; NULL: none.
  const int64_t *slots;
  // Entries of `slots`.
  size_t slot_count;
  // Tokens of the first block of the table that are left out, or the first of consecutive tokens.
  uint32_t first;
  // Zero.
  uint32_t reserved;
} kvxfer_view_t;

// Receives one message: its level (`KVXFER_LOG_...`), the module it came from, the text, and the `context`
// given when it was installed. Called from any thread, also from kvxfer's own, and from several at once. The
// texts are valid during the call only. It must not block for long, throw or unwind; messages that kvxfer
// would log because of calls made inside it are dropped.
typedef void (*kvxfer_log_callback_t)(uint32_t level, const char *target, const char *message, void *context);

// The operation succeeded.
#define KVXFER_OK 0

// An argument is malformed: NULL, a freed handle, empty, too long, or self-contradictory.
#define KVXFER_INVALID_ARGUMENT 1

// Nothing of that name or key exists here (now). Retryable.
#define KVXFER_NOT_FOUND 2

// The deadline passed first. Retryable.
#define KVXFER_TIMED_OUT 3

// Cancelled by the caller or by the peer. Retryable.
#define KVXFER_CANCELLED 4

// The peer ended or was replaced by a newer epoch while the operation was under way. Retryable.
#define KVXFER_PEER_GONE 5

// The peer cannot be reached: refused, no route, name not resolved. Retryable.
#define KVXFER_UNREACHABLE 6

// Both sides differ in version, geometry, page size, model or dtype.
#define KVXFER_MISMATCH 7

// The peer did not prove that it holds the pre-shared key.
#define KVXFER_UNAUTHENTICATED 8

// An offset and length do not lie inside the region or page.
#define KVXFER_OUT_OF_RANGE 9

// No capacity now: pool, queue or window is full. Retryable.
#define KVXFER_NO_CAPACITY 10

// It can never fit: larger than the pool, the frame limit, the page, or the caller's buffer.
#define KVXFER_TOO_LARGE 11

// Bytes arrived damaged; nothing was published. Retryable.
#define KVXFER_CORRUPT 12

// A library, driver or kernel feature is absent or of another version.
#define KVXFER_NOT_AVAILABLE 13

// The transport failed underneath. Retryable.
#define KVXFER_TRANSPORT 14

// The peer sent something that the protocol does not allow.
#define KVXFER_PROTOCOL 15

// The address or port is in use. Retryable.
#define KVXFER_ADDRESS_IN_USE 16

// The operating system refused; the text carries its errno. Retryable.
#define KVXFER_SYSTEM 17

// The agent or channel is shut down, or this process was forked from the one that made the handle.
#define KVXFER_CLOSED 18

// A panic was caught at the C boundary: a bug in kvxfer, please report it.
#define KVXFER_PANIC 19

// The handle is in use and cannot be freed or changed now. Retryable.
#define KVXFER_BUSY 20

// This transport, memory kind, option or struct version cannot do that.
#define KVXFER_UNSUPPORTED 21

// The page, grant or lease is of an earlier generation. Retryable.
#define KVXFER_STALE 22

// Still under way. Retryable.
#define KVXFER_IN_PROGRESS 23

// A configured transport requirement is not met.
#define KVXFER_REQUIREMENT 24

// A peer answered with a number that this version does not know.
#define KVXFER_UNKNOWN 65535

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the loaded library, e.g. `"0.1.0"`. Static: never to be freed.
const char *kvxfer_version(void);

// Version of the loaded library's binary interface. A program that loads the library by hand compares it with
// `KVXFER_ABI_VERSION`; a linked one is protected by the SONAME.
uint32_t kvxfer_abi_version(void);

// True when the library was **built** with that feature: `"nixl"` or `"cuda"`. Whether the machine offers it
// is a question for run time (`kvxfer doctor`). False for NULL and unknown names.
bool kvxfer_has_feature(const char *name);

// Number of handles this process has been given and has not freed, of all types: 0 after a clean shutdown.
// For leak checks in tests.
uint64_t kvxfer_live_handles(void);

// Short name of a result, e.g. `"timed_out"`, for logs and metrics. Never NULL, never to be freed; a number
// this version does not know is `"unknown"`.
const char *kvxfer_result_name(kvxfer_result_t result);

// True when the same call may succeed later or with another peer; false when repeating it cannot help (and for
// `KVXFER_OK`).
bool kvxfer_result_is_retryable(kvxfer_result_t result);

// Text for humans of the last call that failed **on this thread**: which function, which argument, which
// value and what to do about it. Never NULL; empty when nothing has failed yet. Calls that succeed leave it
// as it is. The pointer is valid until the next call that fails on this thread.
const char *kvxfer_last_error(void);

// Starts an agent: its listeners are bound and its progress thread runs when this returns.
//
// `config` may be NULL for the defaults (no listener, every transport). Free it with `kvxfer_agent_free`.
kvxfer_result_t kvxfer_agent_new(const struct kvxfer_config_t *config, struct kvxfer_agent_t **agent_out);

// Starts an agent from YAML text, in which every setting can be stated (`docs/c-abi.md` lists them); unknown
// keys are errors. `flags` is 0 or `KVXFER_CONFIG_ENVIRONMENT`.
kvxfer_result_t kvxfer_agent_new_from_yaml(const char *yaml,
                                           uint32_t flags,
                                           struct kvxfer_agent_t **agent_out);

// Starts an agent from JSON text; as `kvxfer_agent_new_from_yaml`.
kvxfer_result_t kvxfer_agent_new_from_json(const char *json,
                                           uint32_t flags,
                                           struct kvxfer_agent_t **agent_out);

// Starts an agent from the defaults and the `KVXFER_*` environment variables.
kvxfer_result_t kvxfer_agent_new_from_env(struct kvxfer_agent_t **agent_out);

// Shuts the agent down (waiting at most 5 s for its transfers to end) and frees the handle, whatever the
// result, unless that is `KVXFER_INVALID_ARGUMENT`. NULL is fine. Handles made from this agent stay valid,
// answer `KVXFER_CLOSED`, and are still to be freed.
kvxfer_result_t kvxfer_agent_free(struct kvxfer_agent_t *agent);

// Ends everything in order: transfers are cancelled, peers told, the thread joined. Further calls on the
// agent and on what was made from it answer `KVXFER_CLOSED`; the handle is still to be freed.
kvxfer_result_t kvxfer_agent_shutdown(struct kvxfer_agent_t *agent, uint64_t timeout_ms);

// The agent's name as NUL-terminated text; `KVXFER_MAX_NAME + 1` bytes are enough. `*length_out` is its
// length without the NUL, also when the answer is `KVXFER_TOO_LARGE`; with `buffer` NULL and `capacity` 0
// only the length is told.
kvxfer_result_t kvxfer_agent_name(const struct kvxfer_agent_t *agent,
                                  char *buffer,
                                  size_t capacity,
                                  size_t *length_out);

// The agent's epoch: new at each start, and larger than the one before.
kvxfer_result_t kvxfer_agent_epoch(const struct kvxfer_agent_t *agent, uint64_t *epoch_out);

// Address number `index` the agent listens on, with the real port where 0 was asked for; `KVXFER_NOT_FOUND`
// past the last. The buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_agent_address(const struct kvxfer_agent_t *agent,
                                     size_t index,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *length_out);

// Names of the connected peers, one a line. The buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_agent_peers(const struct kvxfer_agent_t *agent,
                                   char *buffer,
                                   size_t capacity,
                                   size_t *length_out);

// Every transport this library knows, one a line: name, tab, `ok` or why it cannot be used by this agent. The
// buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_agent_transports(const struct kvxfer_agent_t *agent,
                                        char *buffer,
                                        size_t capacity,
                                        size_t *length_out);

// Takes back the export of a region; peers' later transfers on it fail.
kvxfer_result_t kvxfer_agent_unexport(struct kvxfer_agent_t *agent, const char *name);

// Allocates `length` bytes of shareable memory (zeroed, huge pages where available) and registers them. Peers
// on the same host reach such memory fastest. The memory lives until the region and every transfer on it are
// gone.
kvxfer_result_t kvxfer_region_allocate(struct kvxfer_agent_t *agent,
                                       uint64_t length,
                                       struct kvxfer_region_t **region_out);

// Registers memory of the caller's own, `length` bytes from `base` on, readable and writable: host memory, or a GPU's (a
// `CUdeviceptr` as a pointer, a torch tensor's `data_ptr()`), which is recognised. It must stay as it is until `kvxfer_region_free` has answered `KVXFER_OK`; and peers that were allowed to reach it must be
// disconnected, or must have ended their transfers, before it goes.
kvxfer_result_t kvxfer_region_register(struct kvxfer_agent_t *agent,
                                       void *base,
                                       uint64_t length,
                                       struct kvxfer_region_t **region_out);

// Takes the region's exports back, deregisters it and frees the handle. NULL is fine.
//
// For memory of the caller's own the answer is `KVXFER_BUSY` while a transfer still uses it: the handle then
// stays, and is to be freed again once the transfer has ended; only after `KVXFER_OK` may the memory go.
kvxfer_result_t kvxfer_region_free(struct kvxfer_region_t *region);

// Allocates `length` zeroed bytes on CUDA device `device` (its number among the visible ones) and registers them. With
// `shareable` 1 they come from the driver's virtual memory management (in pages of 2 MiB), which also reaches peers that no
// CUDA IPC handle reaches; 0 is the ordinary way. `KVXFER_NOT_AVAILABLE` without a driver or device, `KVXFER_NO_CAPACITY` when
// the device is full.
kvxfer_result_t kvxfer_region_allocate_device(struct kvxfer_agent_t *agent,
                                              int32_t device,
                                              uint64_t length,
                                              uint32_t shareable,
                                              struct kvxfer_region_t **region_out);

// A peer's region as a region of this agent, where it lies in this process's address space (`shm`, `cuda_ipc`): host memory for a
// `device` of -1, else that device's. Copies and kernels work on it as on memory of one's own; a gather to it is a gather and a write
// in one pass. Nobody tells the peer when that has ended: notify it then, and stop before it takes its export back.
// `KVXFER_NOT_AVAILABLE` when it is not there.
kvxfer_result_t kvxfer_region_map(struct kvxfer_agent_t *agent,
                                  const struct kvxfer_peer_t *peer,
                                  const struct kvxfer_remote_region_t *remote,
                                  int32_t device,
                                  struct kvxfer_region_t **region_out);

// Pins the region's host memory for CUDA devices, so that transfers between it and device memory need no copy in between. Takes
// about a third of a second a gibibyte; again, or on device memory, it does nothing. Transfers do it themselves at first use: this
// is for a moment when nobody waits.
kvxfer_result_t kvxfer_region_pin(struct kvxfer_region_t *region);

// First byte and length of the region's memory, valid while the region lives; of a GPU's memory the address is the device's, which
// the host cannot touch. `length_out` may be NULL.
kvxfer_result_t kvxfer_region_memory(const struct kvxfer_region_t *region,
                                     void **base_out,
                                     uint64_t *length_out);

// Number of the CUDA device whose memory the region is, among the visible ones; -1 for host memory.
kvxfer_result_t kvxfer_region_device(const struct kvxfer_region_t *region, int32_t *device_out);

// Copies `length` bytes from `offset` of the region to `data`, also from a GPU's memory, and waits for it. For looking at bytes, not
// for moving caches.
kvxfer_result_t kvxfer_region_read(const struct kvxfer_region_t *region,
                                   uint64_t offset,
                                   size_t length,
                                   void *data);

// Copies `length` bytes from `data` to `offset` of the region, also to a GPU's memory, and waits for it.
kvxfer_result_t kvxfer_region_write(struct kvxfer_region_t *region,
                                    uint64_t offset,
                                    const void *data,
                                    size_t length);

// The region's id, unique within its agent.
kvxfer_result_t kvxfer_region_id(const struct kvxfer_region_t *region, uint64_t *id_out);

// Makes the region reachable for every authenticated peer under `name`; `access` is a `KVXFER_ACCESS_...`
// value.
kvxfer_result_t kvxfer_region_export(struct kvxfer_region_t *region, const char *name, uint32_t access);

// Marks what `stream` has been given so far; a transfer or chunk that carries the fence is not read or written before that has been
// done. `stream` is a `CUstream` or `cudaStream_t` of device `device`'s primary context as a number (torch:
// `stream.cuda_stream`), 0 for its default stream; it must be live. The call does not wait. The fence may be used any
// number of times and freed as soon as it has been handed over.
kvxfer_result_t kvxfer_fence_new(int32_t device,
                                 uint64_t stream,
                                 struct kvxfer_fence_t **fence_out);

// `KVXFER_OK` once the stream has come past the fence, `KVXFER_IN_PROGRESS` before.
kvxfer_result_t kvxfer_fence_poll(const struct kvxfer_fence_t *fence);

// Frees the handle. What carries the fence keeps it. NULL is fine.
kvxfer_result_t kvxfer_fence_free(struct kvxfer_fence_t *fence);

// Connects to a listening agent, `tcp://host:port` or `unix:///path`. A peer that is connected already under
// the same address and still up is returned as it is, with a handle of its own. `KVXFER_MISMATCH`,
// `KVXFER_UNAUTHENTICATED`, `KVXFER_UNREACHABLE`, `KVXFER_REQUIREMENT` and `KVXFER_TIMED_OUT` are the usual
// failures.
kvxfer_result_t kvxfer_agent_connect(struct kvxfer_agent_t *agent,
                                     const char *address,
                                     uint64_t timeout_ms,
                                     struct kvxfer_peer_t **peer_out);

// The connected peer of that name, whichever side opened the connection; `KVXFER_NOT_FOUND` when there is
// none.
kvxfer_result_t kvxfer_agent_peer(const struct kvxfer_agent_t *agent,
                                  const char *name,
                                  struct kvxfer_peer_t **peer_out);

// Frees the handle; the connection stays (see `kvxfer_peer_disconnect`). NULL is fine.
kvxfer_result_t kvxfer_peer_free(struct kvxfer_peer_t *peer);

// Removes the peer: the connection is closed and transfers under way end with `KVXFER_PEER_GONE`. The handle
// is still to be freed.
kvxfer_result_t kvxfer_peer_disconnect(struct kvxfer_peer_t *peer);

// The peer's name. The buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_peer_name(const struct kvxfer_peer_t *peer,
                                 char *buffer,
                                 size_t capacity,
                                 size_t *length_out);

// The peer's epoch; another one means another process.
kvxfer_result_t kvxfer_peer_epoch(const struct kvxfer_peer_t *peer, uint64_t *epoch_out);

// `*state_out` becomes `KVXFER_OK` while the peer is connected, and the reason once it is gone.
kvxfer_result_t kvxfer_peer_state(const struct kvxfer_peer_t *peer, kvxfer_result_t *state_out);

// Transports connected to the peer, best first, one a line: name, tab, description (address, streams,
// protocol underneath). The buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_peer_paths(const struct kvxfer_peer_t *peer,
                                  char *buffer,
                                  size_t capacity,
                                  size_t *length_out);

// What this agent has moved to and from the peer: over one transport (`KVXFER_TRANSPORT_...`;
// `KVXFER_NOT_FOUND` when it is not connected), or over all of them with `KVXFER_TRANSPORT_ANY`.
kvxfer_result_t kvxfer_peer_stats(const struct kvxfer_peer_t *peer,
                                  uint32_t transport,
                                  struct kvxfer_path_stats_t *stats_out);

// Sends a notification without data, at most `KVXFER_MAX_NOTIFICATION` bytes. Does not block.
kvxfer_result_t kvxfer_peer_notify(struct kvxfer_peer_t *peer, const void *payload, size_t length);

// Looks up a region the peer exports; `KVXFER_NOT_FOUND` when there is none of that name. Free it with
// `kvxfer_remote_region_free`.
kvxfer_result_t kvxfer_peer_region(struct kvxfer_peer_t *peer,
                                   const char *name,
                                   uint64_t timeout_ms,
                                   struct kvxfer_remote_region_t **remote_region_out);

// Frees the handle; transfers under way keep what they need. NULL is fine.
kvxfer_result_t kvxfer_remote_region_free(struct kvxfer_remote_region_t *remote_region);

// Length of the remote region in bytes.
kvxfer_result_t kvxfer_remote_region_length(const struct kvxfer_remote_region_t *remote_region,
                                            uint64_t *length_out);

// Names of the transports that reach the remote region, best first, one a line. The buffer is used as in
// `kvxfer_agent_name`.
kvxfer_result_t kvxfer_remote_region_transports(const struct kvxfer_remote_region_t *remote_region,
                                                char *buffer,
                                                size_t capacity,
                                                size_t *length_out);

// Starts moving `count` pieces from the local region to the peer's. Does not block; a small transfer may be
// finished on return. `options` may be NULL. Ranges are checked before anything moves: `KVXFER_OUT_OF_RANGE`
// names the piece. Free the transfer with `kvxfer_transfer_free`.
kvxfer_result_t kvxfer_peer_write(struct kvxfer_peer_t *peer,
                                  const struct kvxfer_region_t *local,
                                  const struct kvxfer_remote_region_t *remote,
                                  const struct kvxfer_piece_t *pieces,
                                  size_t count,
                                  const struct kvxfer_transfer_options_t *options,
                                  struct kvxfer_transfer_t **transfer_out);

// Starts moving `count` pieces from the peer's region to the local one; otherwise as `kvxfer_peer_write`.
kvxfer_result_t kvxfer_peer_read(struct kvxfer_peer_t *peer,
                                 const struct kvxfer_region_t *local,
                                 const struct kvxfer_remote_region_t *remote,
                                 const struct kvxfer_piece_t *pieces,
                                 size_t count,
                                 const struct kvxfer_transfer_options_t *options,
                                 struct kvxfer_transfer_t **transfer_out);

// How the transfer stands: `KVXFER_IN_PROGRESS`, or once it has ended `KVXFER_OK` or its first failure. Never
// blocks.
kvxfer_result_t kvxfer_transfer_poll(const struct kvxfer_transfer_t *transfer);

// Waits for the end and answers as `kvxfer_transfer_poll`; `KVXFER_IN_PROGRESS` when `timeout_ms` passes
// first: the transfer then goes on until its own deadline, which is what `KVXFER_TIMED_OUT` stands for.
kvxfer_result_t kvxfer_transfer_wait(const struct kvxfer_transfer_t *transfer, uint64_t timeout_ms);

// Asks the transfer to end. `KVXFER_OK`: it has ended, and no byte changes any more. `KVXFER_IN_PROGRESS`:
// not yet; wait for it.
kvxfer_result_t kvxfer_transfer_cancel(struct kvxfer_transfer_t *transfer);

// Outcomes of `count` pieces from number `first` on: `KVXFER_OK`, `KVXFER_IN_PROGRESS` or why the piece
// failed. `KVXFER_OUT_OF_RANGE` when the transfer has fewer pieces.
kvxfer_result_t kvxfer_transfer_outcomes(const struct kvxfer_transfer_t *transfer,
                                         size_t first,
                                         size_t count,
                                         kvxfer_result_t *outcomes_out);

// How the transfer went, once it has ended; `KVXFER_IN_PROGRESS` before.
kvxfer_result_t kvxfer_transfer_report(const struct kvxfer_transfer_t *transfer,
                                       struct kvxfer_transfer_report_t *report_out);

// The transfer's id, unique within its agent, as logs show it.
kvxfer_result_t kvxfer_transfer_id(const struct kvxfer_transfer_t *transfer, uint64_t *id_out);

// Frees the handle. A transfer still under way goes on by itself: it is not cancelled. NULL is fine.
kvxfer_result_t kvxfer_transfer_free(struct kvxfer_transfer_t *transfer);

// Name of a `KVXFER_TRANSPORT_...` number, e.g. `"shm"`; `"any"` for 0 and `"unknown"` for others. Static,
// never NULL.
const char *kvxfer_transport_name(uint32_t transport);

// Takes the next notification, if one is there; `KVXFER_NOT_FOUND` otherwise. Never blocks.
//
// `peer_out` (may be NULL) becomes the sender's name, NUL-terminated; it holds at least `KVXFER_MAX_NAME + 1`
// bytes. A payload longer than `capacity` is kept: the answer is `KVXFER_TOO_LARGE`, and `*length_out` tells
// its length.
kvxfer_result_t kvxfer_agent_try_notification(struct kvxfer_agent_t *agent,
                                              char *peer_out,
                                              size_t peer_capacity,
                                              void *payload_out,
                                              size_t capacity,
                                              size_t *length_out);

// Waits for the next notification; `KVXFER_TIMED_OUT` when none came in `timeout_ms`. Otherwise as
// `kvxfer_agent_try_notification`.
kvxfer_result_t kvxfer_agent_wait_notification(struct kvxfer_agent_t *agent,
                                               uint64_t timeout_ms,
                                               char *peer_out,
                                               size_t peer_capacity,
                                               void *payload_out,
                                               size_t capacity,
                                               size_t *length_out);

// A descriptor that is readable while something has happened since `kvxfer_agent_clear_event`: a transfer
// ended or a notification came. It belongs to the agent: poll it, do not read or close it, and take it out of
// your epoll set before freeing the agent.
kvxfer_result_t kvxfer_agent_event_fd(const struct kvxfer_agent_t *agent, int *fd_out);

// Makes the event descriptor unreadable until the next event. Call it **before** looking at transfers and
// notifications, so that nothing is missed in between.
kvxfer_result_t kvxfer_agent_clear_event(struct kvxfer_agent_t *agent);

// The agent's metrics in Prometheus text format. The buffer is used as in `kvxfer_agent_name`; the text may
// grow between two calls, so ask for some more room than the length told.
kvxfer_result_t kvxfer_agent_metrics(const struct kvxfer_agent_t *agent,
                                     char *buffer,
                                     size_t capacity,
                                     size_t *length_out);

// Opens a pool to senders, in memory allocated by kvxfer or in the caller's (`config->memory`). Free it with
// `kvxfer_receiver_free`.
kvxfer_result_t kvxfer_receiver_new(struct kvxfer_agent_t *agent,
                                    const struct kvxfer_receiver_config_t *config,
                                    struct kvxfer_receiver_t **receiver_out);

// Refuses new requests, ends the ones under way and waits until the pages are quiet. The handle is still to
// be freed.
kvxfer_result_t kvxfer_receiver_close(struct kvxfer_receiver_t *receiver, uint64_t timeout_ms);

// Frees the handle; senders are told. Chunks acquired before stay valid. NULL is fine. For memory of the
// caller's own the answer is `KVXFER_BUSY` while something still uses it, as for `kvxfer_region_free`: close
// the pool, free its chunks, and free it again.
kvxfer_result_t kvxfer_receiver_free(struct kvxfer_receiver_t *receiver);

// What is known of a key now: `*state_out` becomes a `KVXFER_LOOKUP_...` value, and `*length_out` (may be
// NULL) the chunk's valid bytes, 0 unless it is present.
kvxfer_result_t kvxfer_receiver_lookup(const struct kvxfer_receiver_t *receiver,
                                       const char *key,
                                       uint32_t *state_out,
                                       uint64_t *length_out);

// Pins a published chunk; `KVXFER_IN_PROGRESS` while it is being written, `KVXFER_NOT_FOUND` when unknown.
// Free the chunk with `kvxfer_chunk_free` soon: its page cannot be used for another until then.
kvxfer_result_t kvxfer_receiver_acquire(struct kvxfer_receiver_t *receiver,
                                        const char *key,
                                        struct kvxfer_chunk_t **chunk_out);

// Drops a published chunk; its page is free once the last pin is gone. `KVXFER_NOT_FOUND` when there was none.
kvxfer_result_t kvxfer_receiver_remove(struct kvxfer_receiver_t *receiver,
                                       const char *key);

// Waits until the request has ended: `KVXFER_OK` when every chunk is published, its failure otherwise;
// `KVXFER_TIMED_OUT` when `timeout_ms` passes first.
kvxfer_result_t kvxfer_receiver_wait_request(const struct kvxfer_receiver_t *receiver,
                                             const char *request,
                                             uint64_t timeout_ms);

// Takes the next event; `KVXFER_TIMED_OUT` when none came in `timeout_ms`.
kvxfer_result_t kvxfer_receiver_next_event(struct kvxfer_receiver_t *receiver,
                                           uint64_t timeout_ms,
                                           struct kvxfer_receiver_event_t *event_out);

// Pages by state, and the queue.
kvxfer_result_t kvxfer_receiver_stats(const struct kvxfer_receiver_t *receiver,
                                      struct kvxfer_pool_stats_t *stats_out);

// First byte and length of the pool's memory, valid while the receiver lives; page `i` begins at `i *
// page_bytes`. Read a page only while you hold its chunk. `length_out` may be NULL.
kvxfer_result_t kvxfer_receiver_memory(const struct kvxfer_receiver_t *receiver,
                                       void **base_out,
                                       uint64_t *length_out);

// First byte and number of valid bytes of the chunk; they stay as they are until `kvxfer_chunk_free`. Where the pool is a GPU's memory
// the address is the device's.
kvxfer_result_t kvxfer_chunk_data(const struct kvxfer_chunk_t *chunk,
                                  const void **data_out,
                                  uint64_t *length_out);

// Copies `length` bytes from `offset` of the chunk to `data`, also where the pool is a GPU's memory, and waits for it.
kvxfer_result_t kvxfer_chunk_read(const struct kvxfer_chunk_t *chunk,
                                  uint64_t offset,
                                  size_t length,
                                  void *data);

// Number of the chunk's page, and the offset of its first byte in the pool's memory (either may be NULL).
kvxfer_result_t kvxfer_chunk_page(const struct kvxfer_chunk_t *chunk,
                                  uint32_t *page_out,
                                  uint64_t *offset_out);

// Unpins the chunk and frees the handle; its bytes must not be looked at any more. NULL is fine.
kvxfer_result_t kvxfer_chunk_free(struct kvxfer_chunk_t *chunk);

// Connects to the receiver's agent, `tcp://host:port` or `unix:///path`, attaches to its pool and compares
// geometries (`KVXFER_MISMATCH` names both values). Free it with `kvxfer_sender_free`.
kvxfer_result_t kvxfer_sender_connect(struct kvxfer_agent_t *agent,
                                      const char *address,
                                      const struct kvxfer_sender_config_t *config,
                                      uint64_t timeout_ms,
                                      struct kvxfer_sender_t **sender_out);

// Frees the handle; requests under way go on. NULL is fine.
kvxfer_result_t kvxfer_sender_free(struct kvxfer_sender_t *sender);

// The receiver's agent as a peer; free it with `kvxfer_peer_free`.
kvxfer_result_t kvxfer_sender_peer(const struct kvxfer_sender_t *sender, struct kvxfer_peer_t **peer_out);

// Declares a request of which only the first chunks are known, as in a prefill that is cut into steps: pages for
// up to `more` further ones are granted with them; `kvxfer_reservation_extend` names those. Otherwise as
// `kvxfer_sender_reserve`.
kvxfer_result_t kvxfer_sender_reserve_more(struct kvxfer_sender_t *sender,
                                           const char *request,
                                           const struct kvxfer_chunk_spec_t *chunks,
                                           size_t count,
                                           uint32_t more,
                                           uint64_t timeout_ms,
                                           struct kvxfer_reservation_t **reservation_out);

// Declares a request with all its chunks. Returns at once; wait for its pages with
// `kvxfer_reservation_wait_admitted`. `timeout_ms` is the deadline of the whole request, 0 for the sender's.
// Free it with `kvxfer_reservation_free`.
kvxfer_result_t kvxfer_sender_reserve(struct kvxfer_sender_t *sender,
                                      const char *request,
                                      const struct kvxfer_chunk_spec_t *chunks,
                                      size_t count,
                                      uint64_t timeout_ms,
                                      struct kvxfer_reservation_t **reservation_out);

// Reserves, writes and commits a request in one go. Returns at once: the bytes must stay until the delivery
// has ended. `timeout_ms` as for `kvxfer_sender_reserve`. Free the delivery with `kvxfer_delivery_free`.
kvxfer_result_t kvxfer_sender_send(struct kvxfer_sender_t *sender,
                                   const char *request,
                                   const struct kvxfer_chunk_source_t *chunks,
                                   size_t count,
                                   uint64_t timeout_ms,
                                   struct kvxfer_delivery_t **delivery_out);

// Waits until the request is admitted: all its pages at once. A refusal is the answer (`KVXFER_TOO_LARGE`,
// `KVXFER_NO_CAPACITY`, ...); `KVXFER_TIMED_OUT` when `timeout_ms` passes first: the request then goes on
// waiting until its own deadline.
kvxfer_result_t kvxfer_reservation_wait_admitted(const struct kvxfer_reservation_t *reservation,
                                                 uint64_t timeout_ms);

// Names further chunks of a request, at most as many as `kvxfer_sender_reserve_more` announced; `last`, 0 or 1,
// says that none will follow and gives pages that were kept for more back (`count` may be 0 then).
// `first_out` gets the index of the first, for `kvxfer_reservation_write`.
kvxfer_result_t kvxfer_reservation_extend(struct kvxfer_reservation_t *reservation,
                                          const struct kvxfer_chunk_spec_t *chunks,
                                          size_t count,
                                          uint32_t last,
                                          size_t *first_out);

// Writes and commits chunk number `index` from runs of `region`, whose sum is the chunk's declared length.
// Returns at once: the bytes must stay until the delivery has ended. Call it as soon as the chunk's bytes are
// final, while the prefill goes on; a chunk that the receiver has already costs nothing.
kvxfer_result_t kvxfer_reservation_write(struct kvxfer_reservation_t *reservation,
                                         size_t index,
                                         const struct kvxfer_region_t *region,
                                         const struct kvxfer_run_t *runs,
                                         size_t run_count);

// The same, for bytes that a CUDA stream is still producing: they are read once `after` has been passed. NULL: at once.
kvxfer_result_t kvxfer_reservation_write_after(struct kvxfer_reservation_t *reservation,
                                               size_t index,
                                               const struct kvxfer_region_t *region,
                                               const struct kvxfer_run_t *runs,
                                               size_t run_count,
                                               const struct kvxfer_fence_t *after);

// States that every chunk has been given to `kvxfer_reservation_write`; the rest can be waited for with the
// delivery (free it with `kvxfer_delivery_free`). Further calls on the reservation answer `KVXFER_CLOSED`; it
// is still to be freed.
kvxfer_result_t kvxfer_reservation_finish(struct kvxfer_reservation_t *reservation,
                                          struct kvxfer_delivery_t **delivery_out);

// Gives the request up for the reason `why` (`KVXFER_CANCELLED`, usually). Its pages are used again once no
// write can land. Further calls on the reservation answer `KVXFER_CLOSED`; it is still to be freed.
kvxfer_result_t kvxfer_reservation_abort(struct kvxfer_reservation_t *reservation, kvxfer_result_t why);

// Frees the handle; a reservation neither finished nor aborted is aborted. NULL is fine.
kvxfer_result_t kvxfer_reservation_free(struct kvxfer_reservation_t *reservation);

// How the request stands: `KVXFER_IN_PROGRESS`, or once it has ended `KVXFER_OK` or why it failed. Never
// blocks.
kvxfer_result_t kvxfer_delivery_poll(const struct kvxfer_delivery_t *delivery);

// Waits for the end: `KVXFER_OK` when every chunk is published at the receiver, the reason when the request
// failed, `KVXFER_IN_PROGRESS` when `timeout_ms` passes first. `report_out` may be NULL; it is written on
// `KVXFER_OK` only.
kvxfer_result_t kvxfer_delivery_wait(const struct kvxfer_delivery_t *delivery,
                                     uint64_t timeout_ms,
                                     struct kvxfer_delivery_report_t *report_out);

// Frees the handle; a request under way goes on by itself. NULL is fine.
kvxfer_result_t kvxfer_delivery_free(struct kvxfer_delivery_t *delivery);

// Asks which of `count` chunks, at most `KVXFER_MAX_QUERY`, the receiver has published. Their pages are held for `lease_ms`, at most
// the receiver's own lease, so that `kvxfer_found_read` can read them; with a lease of 0 the call only asks, and
// nothing is held. A chunk that the receiver does not have is simply not found. Free the answer with
// `kvxfer_found_free`.
kvxfer_result_t kvxfer_sender_query(struct kvxfer_sender_t *sender,
                                    const char *const *keys,
                                    size_t count,
                                    uint64_t lease_ms,
                                    uint64_t timeout_ms,
                                    struct kvxfer_found_t **found_out);

// How many chunks were found, and for how long their pages are held (`lease_ms_out` may be NULL), counted from the
// receiver's answer; 0 when nothing is held.
kvxfer_result_t kvxfer_found_count(const struct kvxfer_found_t *found,
                                   size_t *count_out,
                                   uint64_t *lease_ms_out);

// Chunk number `index` of those that were found, in the order of the query; `KVXFER_OUT_OF_RANGE` when there are not
// so many.
kvxfer_result_t kvxfer_found_chunk(const struct kvxfer_found_t *found,
                                   size_t index,
                                   struct kvxfer_found_chunk_t *chunk_out);

// Reads chunks back, waits at most `timeout_ms`, and gives everything that was found back to the receiver; further
// calls answer `KVXFER_CLOSED`. On `KVXFER_OK` every byte is there and fits the digest its writer committed.
// `KVXFER_STALE`: the lease ended first; `KVXFER_CORRUPT`: the bytes do not fit; `KVXFER_PEER_GONE`: the receiver is
// gone. After a failure the targets may hold anything, and nothing changes them any more. `report_out` may be NULL.
kvxfer_result_t kvxfer_found_read(struct kvxfer_found_t *found,
                                  const struct kvxfer_found_target_t *targets,
                                  size_t count,
                                  uint64_t timeout_ms,
                                  struct kvxfer_read_report_t *report_out);

// Frees the handle; what is still held is given back to the receiver. NULL is fine.
kvxfer_result_t kvxfer_found_free(struct kvxfer_found_t *found);

// Makes an outbox on an agent. Nothing is connected before the first batch. Free it with `kvxfer_outbox_free`.
kvxfer_result_t kvxfer_outbox_new(struct kvxfer_agent_t *agent,
                                  const struct kvxfer_outbox_config_t *config,
                                  struct kvxfer_outbox_t **outbox_out);

// Takes a batch; never waits for anything. `batch_out` gets its number, which its release will name; 0 when nothing of it is
// read, because its bytes are all in their places, and then no release follows. What is wrong with the batch itself is the
// answer, and then nothing was taken; what happens to its request is an event.
kvxfer_result_t kvxfer_outbox_put(struct kvxfer_outbox_t *outbox,
                                  const struct kvxfer_batch_t *batch,
                                  uint64_t *batch_out);

// Asks for the chunks of a batch to be produced where they are to be: names them at the receiver and gives the pages that they got,
// as addresses of this process, where the receiver's pool is mapped in it (`shm`; `cuda_ipc` for a GPU's). Fill them, then put the
// same batch, with a NULL `region` for each chunk that was filled there. A chunk whose `address` is NULL, or whose place was not used, is put
// from a region.
//
// A chunk in `batch` needs no `region`, and has one run `{0, length}` then; what regions hold and `after` are not looked at. `device` is -1 for host memory, or
// the CUDA device whose memory is wanted. `places` has room for `batch.count`. Waits for admission at most `patience_ms`; whatever
// prevents places gives NULLs, loses nothing, and is no error. Addresses are the caller's until the batch is put or given up with
// `kvxfer_outbox_give_up`, also when the request fails meanwhile; afterwards nothing may be written there.
kvxfer_result_t kvxfer_outbox_place(struct kvxfer_outbox_t *outbox,
                                    const struct kvxfer_batch_t *batch,
                                    int32_t device,
                                    uint64_t patience_ms,
                                    struct kvxfer_place_t *places);

// Puts the batch for which `kvxfer_outbox_place` has given places, each of its chunks one, and which is as it was named: all of its
// bytes are there, or will be when a CUDA stream has passed `after`; NULL: they are. Never waits; no release follows.
// `KVXFER_NOT_FOUND` when the request has no places; `KVXFER_INVALID_ARGUMENT` when one of its chunks has none, and then
// the request is given up.
kvxfer_result_t kvxfer_outbox_put_placed(struct kvxfer_outbox_t *outbox,
                                         const char *request,
                                         const struct kvxfer_fence_t *after);

// Gives up the places of a batch that is not put after all, and its request: once a CUDA stream that may still write there has passed
// `after`; NULL: nobody does. `KVXFER_NOT_FOUND` when the request has none.
kvxfer_result_t kvxfer_outbox_give_up(struct kvxfer_outbox_t *outbox,
                                      const char *request,
                                      const struct kvxfer_fence_t *after);

// Gives a request up for the reason `why` (`KVXFER_CANCELLED`, usually); `KVXFER_NOT_FOUND` when none of that
// name is under way.
kvxfer_result_t kvxfer_outbox_abort(struct kvxfer_outbox_t *outbox, const char *request, kvxfer_result_t why);

// Gives up the youngest request that its receiver has not admitted yet, to have the memory of its batches back:
// for an engine that has none left for the next step of another one. `KVXFER_NOT_FOUND` when all are admitted.
kvxfer_result_t kvxfer_outbox_shed(struct kvxfer_outbox_t *outbox);

// Takes the next event; `KVXFER_TIMED_OUT` when none came in `timeout_ms`. Of several threads that wait here the one that came
// last is woken first.
kvxfer_result_t kvxfer_outbox_next_event(struct kvxfer_outbox_t *outbox,
                                         uint64_t timeout_ms,
                                         struct kvxfer_outbox_event_t *event_out);

// The next event for a thread that has nothing to do but wait for it: it looks after the receivers' answers itself, for at most
// `max_us` microseconds, which spares the time until other threads have been woken for them. `KVXFER_TIMED_OUT` when there is
// none yet. No other thread is woken for events that come meanwhile: take them with `kvxfer_outbox_next_event` until there are none.
kvxfer_result_t kvxfer_outbox_attend(struct kvxfer_outbox_t *outbox,
                                     uint64_t max_us,
                                     struct kvxfer_outbox_event_t *event_out);

// Gives everything up and waits until no batch's bytes are read any more and the proxy has been told, at most
// `timeout_ms`. Events that are left can still be taken.
kvxfer_result_t kvxfer_outbox_close(struct kvxfer_outbox_t *outbox, uint64_t timeout_ms);

// Gives up what is under way and frees the handle. NULL is fine.
kvxfer_result_t kvxfer_outbox_free(struct kvxfer_outbox_t *outbox);

// Allocates `length` bytes, zeroed, on huge pages where there are any. An agent that is given exactly this range
// (`kvxfer_region_register`, a receiver's `memory`) recognises it, and peers on the same host reach it as
// fast as memory that kvxfer allocated for a region. It stays until the handle is freed and nothing uses it.
kvxfer_result_t kvxfer_memory_new(uint64_t length,
                                  struct kvxfer_memory_t **memory_out);

// First byte of the memory, valid until the handle is freed.
kvxfer_result_t kvxfer_memory_base(const struct kvxfer_memory_t *memory, void **base_out);

// Frees the handle; regions and pools over the memory keep it until they are gone. NULL is fine.
kvxfer_result_t kvxfer_memory_free(struct kvxfer_memory_t *memory);

// Copies tokens out of the cache: each chunk is filled from its slots. Several threads, and large copies go past
// the processor's cache; returns when all is done. The slots' bytes must not change meanwhile. Everything is
// checked first; on `KVXFER_INVALID_ARGUMENT` (a slot outside the blocks, a length that does not fit the sizes,
// an unknown layout, memory that overlaps) nothing was copied. The chunks are disjoint.
kvxfer_result_t kvxfer_paged_gather(const struct kvxfer_paged_t *cache,
                                    const struct kvxfer_paged_chunk_t *chunks,
                                    size_t chunk_count);

// Copies tokens into the cache: each chunk's tokens go to its slots, and nothing else of the cache changes. Of a
// slot that is named twice, the later token stays. The layers are disjoint; otherwise as `kvxfer_paged_gather`.
kvxfer_result_t kvxfer_paged_scatter(const struct kvxfer_paged_t *cache,
                                     const struct kvxfer_paged_chunk_t *chunks,
                                     size_t chunk_count);

// Checks `tokens` tokens from one view to another: equal layers, planes, heads and bytes of a head, everything within its region. Tables
// and slots are copied. The views must not overlap. Nothing moves yet.
kvxfer_result_t kvxfer_gather_new(const struct kvxfer_view_t *from,
                                  const struct kvxfer_view_t *to,
                                  uint32_t tokens,
                                  struct kvxfer_gather_t **gather_out);

// Starts it by a kernel on the GPU that one of the views lies on, after `after` (NULL: at once); does not wait. `digest` 1 takes the digest
// of docs/kernels.md on the way. `KVXFER_BUSY` while an earlier start has not ended.
kvxfer_result_t kvxfer_gather_start(struct kvxfer_gather_t *gather,
                                    const struct kvxfer_fence_t *after,
                                    uint32_t digest);

// Waits for the end of a start, `timeout_ms` at most (0: asks, and answers `KVXFER_IN_PROGRESS`). On `KVXFER_OK` the bytes are where they belong.
// `bytes_out` and `digest_out` may be NULL; the digest is 0 where none was asked for.
kvxfer_result_t kvxfer_gather_wait(struct kvxfer_gather_t *gather,
                                   uint64_t timeout_ms,
                                   uint64_t *bytes_out,
                                   uint64_t *digest_out);

// The same as pieces for `kvxfer_peer_write`: local offsets in `from`'s region, remote ones in `to`'s, neighbours joined.
// `count_out` gets their number; `KVXFER_TOO_LARGE` when `capacity` is less, and nothing is written.
kvxfer_result_t kvxfer_gather_pieces(const struct kvxfer_gather_t *gather,
                                     struct kvxfer_piece_t *pieces,
                                     size_t capacity,
                                     size_t *count_out);

// Frees the handle, after the end of what is under way. NULL is fine.
kvxfer_result_t kvxfer_gather_free(struct kvxfer_gather_t *gather);

// Translates an `LMCache` configuration file, YAML text, into today's words: a JSON object with `config` (keys and
// values), `notices` (what became of a key: `key`, `today`, `text`), `problems` (`keys`, `text`, `contradiction`) and
// `changed`. A text that is no such file is `KVXFER_INVALID_ARGUMENT`; two lines that contradict each other are
// `KVXFER_MISMATCH`, and the error's text names both. The buffer is used as in `kvxfer_agent_name`.
kvxfer_result_t kvxfer_lmcache_config_translate(const char *yaml,
                                                char *buffer,
                                                size_t capacity,
                                                size_t *length_out);

// Installs the callback for messages up to `max_level` (`KVXFER_LOG_...`). Once per process: a second call
// answers `KVXFER_BUSY`. The callback and what `context` points at must stay for the rest of the process.
kvxfer_result_t kvxfer_log_set_callback(uint32_t max_level, kvxfer_log_callback_t callback, void *context);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVXFER_H */
