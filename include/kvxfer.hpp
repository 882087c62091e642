// SPDX-License-Identifier: Apache-2.0
//
// kvxfer for C++17: a thin layer over kvxfer.h. Header only; link against libkvxfer.
//
//  - Every class owns one handle, is moved but not copied, and frees it when it goes.
//  - A failed call throws kvxfer::Error, which carries the number, the text and whether a retry makes sense. Answers that are no
//    failures are no exceptions: "still under way" is `false`, "nothing there" an empty std::optional.
//  - Time-outs are std::chrono durations; texts are std::string (they need their NUL).
//  - Threads, forks, ownership of memory: as in kvxfer.h.
#ifndef KVXFER_HPP
#define KVXFER_HPP

#include "kvxfer.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvxfer {

using Milliseconds = std::chrono::milliseconds;

/// A call failed.
class Error : public std::runtime_error {
 public:
  Error(kvxfer_result_t code, const std::string &text) : std::runtime_error(text), code_(code) {}
  /// `KVXFER_...`.
  kvxfer_result_t code() const noexcept { return code_; }
  /// Short name of the code.
  const char *name() const noexcept { return kvxfer_result_name(code_); }
  /// True when the same call may succeed later.
  bool retryable() const noexcept { return kvxfer_result_is_retryable(code_); }

 private:
  kvxfer_result_t code_;
};

/// Throws unless `result` is `KVXFER_OK`.
inline void check(kvxfer_result_t result) {
  if (result != KVXFER_OK) throw Error(result, kvxfer_last_error());
}

namespace detail {

inline std::uint64_t ms(Milliseconds timeout) {
  return timeout.count() < 0 ? 0 : static_cast<std::uint64_t>(timeout.count());
}

/// False for "still under way"; throws for failures.
inline bool ended(kvxfer_result_t result) {
  if (result == KVXFER_IN_PROGRESS) return false;
  check(result);
  return true;
}

/// Calls `f(buffer, capacity, &length)` until the text fits.
template <class F>
std::string text(F f) {
  std::string out(256, '\0');
  for (;;) {
    std::size_t length = 0;
    kvxfer_result_t result = f(&out[0], out.size(), &length);
    if (result == KVXFER_TOO_LARGE) {
      out.resize(length + length / 8 + 64);
      continue;
    }
    check(result);
    out.resize(length);
    return out;
  }
}

/// One handle, owned.
template <class T, kvxfer_result_t (*Free)(T *)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T *raw) : raw_(raw) {}
  Handle(Handle &&other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  Handle &operator=(Handle &&other) noexcept {
    if (this != &other) {
      reset();
      raw_ = std::exchange(other.raw_, nullptr);
    }
    return *this;
  }
  Handle(const Handle &) = delete;
  Handle &operator=(const Handle &) = delete;
  ~Handle() { reset(); }

  /// The handle, for calls of kvxfer.h; still owned by this object.
  T *get() const noexcept { return raw_; }
  /// Gives the handle away.
  T *release() noexcept { return std::exchange(raw_, nullptr); }
  explicit operator bool() const noexcept { return raw_ != nullptr; }
  /// Frees now and tells how it went; the handle stays when the answer is `KVXFER_BUSY` (see kvxfer_region_free).
  kvxfer_result_t free() noexcept {
    kvxfer_result_t result = Free(raw_);
    if (result != KVXFER_BUSY) raw_ = nullptr;
    return result;
  }

 protected:
  void reset() noexcept {
    Free(raw_);
    raw_ = nullptr;
  }
  T *raw_ = nullptr;
};

template <class C>
C sized() {
  C value{};
  value.struct_size = sizeof(C);
  return value;
}

inline std::vector<const char *> pointers(const std::vector<std::string> &texts) {
  std::vector<const char *> out;
  for (const std::string &text : texts) out.push_back(text.c_str());
  return out;
}

}  // namespace detail

/// Settings of an agent; see kvxfer_config_t.
struct Config {
  std::string name;
  std::vector<std::string> listen, allow, forbid, require;
  std::string auth_key;
  std::uint32_t integrity = KVXFER_INTEGRITY_DEFAULT;
  bool environment = false;
  Milliseconds connect_timeout{0}, transfer_timeout{0}, peer_timeout{0};
};

/// What a transfer may be told beside its pieces; see kvxfer_transfer_options_t.
struct TransferOptions {
  Milliseconds timeout{0};
  std::optional<std::string> notify;
  std::uint32_t integrity = KVXFER_INTEGRITY_DEFAULT;
  std::uint32_t transport = KVXFER_TRANSPORT_ANY;
};

/// A notification that arrived.
struct Notification {
  std::string peer, payload;
};

/// A transfer under way or finished. Letting it go does not cancel it.
class Transfer : public detail::Handle<kvxfer_transfer_t, kvxfer_transfer_free> {
 public:
  using Handle::Handle;
  /// False while under way; throws when it failed.
  bool poll() const { return detail::ended(kvxfer_transfer_poll(raw_)); }
  /// False when the time is over and it is still under way; throws when it failed.
  bool wait(Milliseconds timeout) const { return detail::ended(kvxfer_transfer_wait(raw_, detail::ms(timeout))); }
  /// True: it has ended and no byte changes any more. False: not yet.
  bool cancel() { return detail::ended(kvxfer_transfer_cancel(raw_)); }
  /// Outcomes of `count` pieces from `first` on.
  std::vector<kvxfer_result_t> outcomes(std::size_t first, std::size_t count) const {
    std::vector<kvxfer_result_t> out(count);
    check(kvxfer_transfer_outcomes(raw_, first, count, out.data()));
    return out;
  }
  /// How it went; empty while under way.
  std::optional<kvxfer_transfer_report_t> report() const {
    auto out = detail::sized<kvxfer_transfer_report_t>();
    if (!detail::ended(kvxfer_transfer_report(raw_, &out))) return std::nullopt;
    return out;
  }
};

/// Registered memory. For memory of the caller's own, end the transfers on it first, or call free() until it does not answer
/// `KVXFER_BUSY`: a destructor cannot wait, so a busy region stays registered.
class Region : public detail::Handle<kvxfer_region_t, kvxfer_region_free> {
 public:
  using Handle::Handle;
  /// First byte.
  unsigned char *data() const {
    void *base = nullptr;
    check(kvxfer_region_memory(raw_, &base, nullptr));
    return static_cast<unsigned char *>(base);
  }
  /// Length in bytes.
  std::uint64_t size() const {
    void *base = nullptr;
    std::uint64_t length = 0;
    check(kvxfer_region_memory(raw_, &base, &length));
    return length;
  }
  /// Makes it reachable for peers.
  void export_as(const std::string &name, std::uint32_t access) {
    check(kvxfer_region_export(raw_, name.c_str(), access));
  }
};

/// A peer's exported region.
class RemoteRegion : public detail::Handle<kvxfer_remote_region_t, kvxfer_remote_region_free> {
 public:
  using Handle::Handle;
  /// Length in bytes.
  std::uint64_t size() const {
    std::uint64_t length = 0;
    check(kvxfer_remote_region_length(raw_, &length));
    return length;
  }
  /// Transports that reach it, best first, one a line.
  std::string transports() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_remote_region_transports(raw_, b, c, l); });
  }
};

/// A connected remote agent.
class Peer : public detail::Handle<kvxfer_peer_t, kvxfer_peer_free> {
 public:
  using Handle::Handle;
  std::string name() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_peer_name(raw_, b, c, l); });
  }
  std::uint64_t epoch() const {
    std::uint64_t epoch = 0;
    check(kvxfer_peer_epoch(raw_, &epoch));
    return epoch;
  }
  /// `KVXFER_OK` while connected, the reason once gone.
  kvxfer_result_t state() const {
    kvxfer_result_t state = KVXFER_OK;
    check(kvxfer_peer_state(raw_, &state));
    return state;
  }
  /// Connected transports, best first, one a line: name, tab, description.
  std::string paths() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_peer_paths(raw_, b, c, l); });
  }
  /// What has been moved over one transport, or over all.
  kvxfer_path_stats_t stats(std::uint32_t transport = KVXFER_TRANSPORT_ANY) const {
    auto stats = detail::sized<kvxfer_path_stats_t>();
    check(kvxfer_peer_stats(raw_, transport, &stats));
    return stats;
  }
  RemoteRegion region(const std::string &name, Milliseconds timeout) const {
    kvxfer_remote_region_t *out = nullptr;
    check(kvxfer_peer_region(raw_, name.c_str(), detail::ms(timeout), &out));
    return RemoteRegion(out);
  }
  void notify(const std::string &payload) const { check(kvxfer_peer_notify(raw_, payload.data(), payload.size())); }
  void disconnect() { check(kvxfer_peer_disconnect(raw_)); }

  /// Starts moving local bytes to the peer.
  Transfer write(const Region &local, const RemoteRegion &remote, const std::vector<kvxfer_piece_t> &pieces,
                 const TransferOptions &options = {}) const {
    return submit(kvxfer_peer_write, local, remote, pieces, options);
  }
  /// Starts moving the peer's bytes here.
  Transfer read(const Region &local, const RemoteRegion &remote, const std::vector<kvxfer_piece_t> &pieces,
                const TransferOptions &options = {}) const {
    return submit(kvxfer_peer_read, local, remote, pieces, options);
  }

 private:
  template <class F>
  Transfer submit(F call, const Region &local, const RemoteRegion &remote, const std::vector<kvxfer_piece_t> &pieces,
                  const TransferOptions &options) const {
    auto o = detail::sized<kvxfer_transfer_options_t>();
    o.timeout_ms = detail::ms(options.timeout);
    o.notify = options.notify ? options.notify->data() : nullptr;
    o.notify_length = options.notify ? options.notify->size() : 0;
    o.integrity = options.integrity;
    o.transport = options.transport;
    kvxfer_transfer_t *out = nullptr;
    check(call(raw_, local.get(), remote.get(), pieces.data(), pieces.size(), &o, &out));
    return Transfer(out);
  }
};

/// One endpoint of this process.
class Agent : public detail::Handle<kvxfer_agent_t, kvxfer_agent_free> {
 public:
  using Handle::Handle;
  explicit Agent(const Config &config) {
    auto c = detail::sized<kvxfer_config_t>();
    auto listen = detail::pointers(config.listen), allow = detail::pointers(config.allow);
    auto forbid = detail::pointers(config.forbid), require = detail::pointers(config.require);
    c.name = config.name.c_str();
    c.listen = listen.data();
    c.listen_count = listen.size();
    c.auth_key = reinterpret_cast<const std::uint8_t *>(config.auth_key.data());
    c.auth_key_length = config.auth_key.size();
    c.allow = allow.data();
    c.allow_count = allow.size();
    c.forbid = forbid.data();
    c.forbid_count = forbid.size();
    c.require = require.data();
    c.require_count = require.size();
    c.integrity = config.integrity;
    c.flags = config.environment ? KVXFER_CONFIG_ENVIRONMENT : 0;
    c.connect_timeout_ms = detail::ms(config.connect_timeout);
    c.transfer_timeout_ms = detail::ms(config.transfer_timeout);
    c.peer_timeout_ms = detail::ms(config.peer_timeout);
    check(kvxfer_agent_new(&c, &raw_));
  }
  static Agent from_yaml(const std::string &yaml, std::uint32_t flags = 0) {
    kvxfer_agent_t *out = nullptr;
    check(kvxfer_agent_new_from_yaml(yaml.c_str(), flags, &out));
    return Agent(out);
  }
  void shutdown(Milliseconds timeout) { check(kvxfer_agent_shutdown(raw_, detail::ms(timeout))); }

  std::string name() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_agent_name(raw_, b, c, l); });
  }
  /// Addresses it listens on, with real ports.
  std::vector<std::string> addresses() const {
    std::vector<std::string> out;
    for (;;) {
      try {
        out.push_back(detail::text([&](char *b, std::size_t c, std::size_t *l) {
          return kvxfer_agent_address(raw_, out.size(), b, c, l);
        }));
      } catch (const Error &e) {
        if (e.code() != KVXFER_NOT_FOUND) throw;
        return out;
      }
    }
  }
  /// Transports and whether they can be used, one a line: name, tab, `ok` or the reason.
  std::string transports() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_agent_transports(raw_, b, c, l); });
  }
  /// Metrics in Prometheus text format.
  std::string metrics() const {
    return detail::text([&](char *b, std::size_t c, std::size_t *l) { return kvxfer_agent_metrics(raw_, b, c, l); });
  }

  /// Shareable memory, registered.
  Region allocate(std::uint64_t length) const {
    kvxfer_region_t *out = nullptr;
    check(kvxfer_region_allocate(raw_, length, &out));
    return Region(out);
  }
  /// The caller's memory, registered; it must outlive the region (see kvxfer_region_register).
  Region register_memory(void *base, std::uint64_t length) const {
    kvxfer_region_t *out = nullptr;
    check(kvxfer_region_register(raw_, base, length, &out));
    return Region(out);
  }
  Peer connect(const std::string &address, Milliseconds timeout) const {
    kvxfer_peer_t *out = nullptr;
    check(kvxfer_agent_connect(raw_, address.c_str(), detail::ms(timeout), &out));
    return Peer(out);
  }
  /// The connected peer of that name.
  Peer peer(const std::string &name) const {
    kvxfer_peer_t *out = nullptr;
    check(kvxfer_agent_peer(raw_, name.c_str(), &out));
    return Peer(out);
  }
  /// The next notification; empty when none came in time.
  std::optional<Notification> notification(Milliseconds timeout) const {
    char peer[KVXFER_MAX_NAME + 1];
    std::string payload(KVXFER_MAX_NOTIFICATION, '\0');
    std::size_t length = 0;
    kvxfer_result_t result = kvxfer_agent_wait_notification(raw_, detail::ms(timeout), peer, sizeof peer, &payload[0],
                                                            payload.size(), &length);
    if (result == KVXFER_TIMED_OUT) return std::nullopt;
    check(result);
    payload.resize(length);
    return Notification{peer, payload};
  }
  /// Readable while something has happened; see kvxfer_agent_event_fd.
  int event_fd() const {
    int fd = -1;
    check(kvxfer_agent_event_fd(raw_, &fd));
    return fd;
  }
  void clear_event() const { check(kvxfer_agent_clear_event(raw_)); }
};

/// What both sides of a pool agree on; see kvxfer_geometry_t.
struct Geometry {
  std::string model, dtype, layout, hash_seed;
  std::uint64_t page_bytes = 0;
  std::uint32_t chunk_tokens = 0, layers = 0, kv_heads = 0, head_dim = 0, tp_rank = 0, tp_size = 0;

  /// For calls of kvxfer.h; valid while this object stays as it is.
  kvxfer_geometry_t raw() const {
    auto g = detail::sized<kvxfer_geometry_t>();
    g.model = model.c_str();
    g.dtype = dtype.c_str();
    g.layout = layout.c_str();
    g.hash_seed = hash_seed.c_str();
    g.page_bytes = page_bytes;
    g.chunk_tokens = chunk_tokens;
    g.layers = layers;
    g.kv_heads = kv_heads;
    g.head_dim = head_dim;
    g.tp_rank = tp_rank;
    g.tp_size = tp_size;
    return g;
  }
};

/// A published chunk, pinned while this object lives.
class Chunk : public detail::Handle<kvxfer_chunk_t, kvxfer_chunk_free> {
 public:
  using Handle::Handle;
  const unsigned char *data() const { return view().first; }
  std::uint64_t size() const { return view().second; }

 private:
  std::pair<const unsigned char *, std::uint64_t> view() const {
    const void *data = nullptr;
    std::uint64_t length = 0;
    check(kvxfer_chunk_data(raw_, &data, &length));
    return {static_cast<const unsigned char *>(data), length};
  }
};

/// The decoder's pool of pages.
class Receiver : public detail::Handle<kvxfer_receiver_t, kvxfer_receiver_free> {
 public:
  using Handle::Handle;
  /// A pool of `pages` pages in memory allocated by kvxfer; for every other setting use kvxfer_receiver_new.
  Receiver(const Agent &agent, const std::string &pool, const Geometry &geometry, std::uint32_t pages) {
    auto shape = geometry.raw();
    auto c = detail::sized<kvxfer_receiver_config_t>();
    c.pool = pool.c_str();
    c.geometry = &shape;
    c.pages = pages;
    check(kvxfer_receiver_new(agent.get(), &c, &raw_));
  }
  /// `KVXFER_LOOKUP_...`.
  std::uint32_t lookup(const std::string &key) const {
    std::uint32_t state = KVXFER_LOOKUP_ABSENT;
    check(kvxfer_receiver_lookup(raw_, key.c_str(), &state, nullptr));
    return state;
  }
  Chunk acquire(const std::string &key) const {
    kvxfer_chunk_t *out = nullptr;
    check(kvxfer_receiver_acquire(raw_, key.c_str(), &out));
    return Chunk(out);
  }
  /// False when there was none.
  bool remove(const std::string &key) {
    kvxfer_result_t result = kvxfer_receiver_remove(raw_, key.c_str());
    if (result == KVXFER_NOT_FOUND) return false;
    check(result);
    return true;
  }
  /// Returns when every chunk of the request is published; throws its failure.
  void wait_request(const std::string &request, Milliseconds timeout) const {
    check(kvxfer_receiver_wait_request(raw_, request.c_str(), detail::ms(timeout)));
  }
  /// The next event; empty when none came in time.
  std::optional<kvxfer_receiver_event_t> next_event(Milliseconds timeout) const {
    auto event = detail::sized<kvxfer_receiver_event_t>();
    kvxfer_result_t result = kvxfer_receiver_next_event(raw_, detail::ms(timeout), &event);
    if (result == KVXFER_TIMED_OUT) return std::nullopt;
    check(result);
    return event;
  }
  kvxfer_pool_stats_t stats() const {
    auto stats = detail::sized<kvxfer_pool_stats_t>();
    check(kvxfer_receiver_stats(raw_, &stats));
    return stats;
  }
  void close(Milliseconds timeout) { check(kvxfer_receiver_close(raw_, detail::ms(timeout))); }
};

/// A request whose end can be waited for.
class Delivery : public detail::Handle<kvxfer_delivery_t, kvxfer_delivery_free> {
 public:
  using Handle::Handle;
  /// False while under way; throws when it failed.
  bool poll() const { return detail::ended(kvxfer_delivery_poll(raw_)); }
  /// How it went; empty when the time is over and it is still under way; throws when it failed.
  std::optional<kvxfer_delivery_report_t> wait(Milliseconds timeout) const {
    auto report = detail::sized<kvxfer_delivery_report_t>();
    if (!detail::ended(kvxfer_delivery_wait(raw_, detail::ms(timeout), &report))) return std::nullopt;
    return report;
  }
};

/// A request under way. Letting it go before finish() aborts it.
class Reservation : public detail::Handle<kvxfer_reservation_t, kvxfer_reservation_free> {
 public:
  using Handle::Handle;
  /// Returns when all pages are granted; throws a refusal.
  void wait_admitted(Milliseconds timeout) const {
    check(kvxfer_reservation_wait_admitted(raw_, detail::ms(timeout)));
  }
  /// Writes and commits chunk `index`; the bytes must stay until the delivery has ended.
  void write(std::size_t index, const Region &region, const std::vector<kvxfer_run_t> &runs) {
    check(kvxfer_reservation_write(raw_, index, region.get(), runs.data(), runs.size()));
  }
  /// Every chunk has been written.
  Delivery finish() {
    kvxfer_delivery_t *out = nullptr;
    check(kvxfer_reservation_finish(raw_, &out));
    return Delivery(out);
  }
  void abort(kvxfer_result_t why = KVXFER_CANCELLED) { check(kvxfer_reservation_abort(raw_, why)); }
};

/// One chunk of a request.
struct ChunkSpec {
  std::string key;
  std::uint64_t length;
};

/// Where a chunk that was found is read to: runs of a region, in the order of the chunk's bytes.
struct FoundTarget {
  /// Place of the chunk's key in the query.
  std::uint32_t index;
  const Region *region;
  std::vector<kvxfer_run_t> runs;
};

/// Chunks that a receiver has, held for reading until they are read or this object goes.
class Found : public detail::Handle<kvxfer_found_t, kvxfer_found_free> {
 public:
  using Handle::Handle;
  /// How many of the chunks that were asked for the receiver has.
  std::size_t size() const { return count().first; }
  /// For how long they are held, counted from the receiver's answer; zero when nothing is.
  Milliseconds lease() const { return count().second; }
  /// Number `i` of those that were found, in the order of the query.
  kvxfer_found_chunk_t chunk(std::size_t i) const {
    auto chunk = detail::sized<kvxfer_found_chunk_t>();
    check(kvxfer_found_chunk(raw_, i, &chunk));
    return chunk;
  }
  /// Reads chunks back and gives everything that was found back to the receiver. When it returns every byte is there and fits the
  /// digest its writer committed; after an exception the targets may hold anything, and nothing changes them any more.
  kvxfer_read_report_t read(const std::vector<FoundTarget> &targets, Milliseconds timeout) {
    std::vector<kvxfer_found_target_t> raw;
    for (const FoundTarget &t : targets) {
      raw.push_back({t.region ? t.region->get() : nullptr, t.runs.data(), t.runs.size(), t.index, 0});
    }
    auto report = detail::sized<kvxfer_read_report_t>();
    check(kvxfer_found_read(raw_, raw.data(), raw.size(), detail::ms(timeout), &report));
    return report;
  }

 private:
  std::pair<std::size_t, Milliseconds> count() const {
    std::size_t count = 0;
    std::uint64_t lease = 0;
    check(kvxfer_found_count(raw_, &count, &lease));
    return {count, Milliseconds(lease)};
  }
};

/// A channel to one receiver's pool.
class Sender : public detail::Handle<kvxfer_sender_t, kvxfer_sender_free> {
 public:
  using Handle::Handle;
  Sender(const Agent &agent, const std::string &address, const std::string &pool, const Geometry &geometry,
         Milliseconds timeout, std::uint32_t integrity = KVXFER_INTEGRITY_DEFAULT) {
    auto shape = geometry.raw();
    auto c = detail::sized<kvxfer_sender_config_t>();
    c.pool = pool.c_str();
    c.geometry = &shape;
    c.integrity = integrity;
    check(kvxfer_sender_connect(agent.get(), address.c_str(), &c, detail::ms(timeout), &raw_));
  }
  /// Declares a request with all its chunks; a zero time-out is the sender's default.
  Reservation reserve(const std::string &request, const std::vector<ChunkSpec> &chunks,
                      Milliseconds timeout = Milliseconds{0}) const {
    std::vector<kvxfer_chunk_spec_t> raw;
    for (const ChunkSpec &chunk : chunks) raw.push_back({chunk.key.c_str(), chunk.length});
    kvxfer_reservation_t *out = nullptr;
    check(kvxfer_sender_reserve(raw_, request.c_str(), raw.data(), raw.size(), detail::ms(timeout), &out));
    return Reservation(out);
  }
  /// Asks which of `keys` the receiver has published, and has them held for `lease`; with a lease of zero it only asks.
  Found query(const std::vector<std::string> &keys, Milliseconds lease, Milliseconds timeout) const {
    auto raw = detail::pointers(keys);
    kvxfer_found_t *out = nullptr;
    check(kvxfer_sender_query(raw_, raw.data(), raw.size(), detail::ms(lease), detail::ms(timeout), &out));
    return Found(out);
  }
  /// The receiver's agent.
  Peer peer() const {
    kvxfer_peer_t *out = nullptr;
    check(kvxfer_sender_peer(raw_, &out));
    return Peer(out);
  }
};

/// An engine's paged cache in host memory, by the addresses of its layers; see kvxfer_paged_t. The memory stays the engine's.
struct PagedCache {
  std::vector<void *> layers;
  std::uint64_t layer_bytes = 0, blocks = 0;
  std::uint32_t heads = 0, block_size = 0, head_size = 0, element_bytes = 2;
  std::uint32_t layout = KVXFER_PAGED_VEC;
  /// That copy; zero takes as many as the calling thread has processors, eight at most.
  std::uint32_t threads = 0;

  /// Fills each chunk from its slots; when an argument is wrong nothing has been copied.
  void gather(const std::vector<kvxfer_paged_chunk_t> &chunks) const { copy(kvxfer_paged_gather, chunks); }
  /// Puts each chunk's tokens into their slots; nothing else of the cache changes.
  void scatter(const std::vector<kvxfer_paged_chunk_t> &chunks) const { copy(kvxfer_paged_scatter, chunks); }

 private:
  template <class F>
  void copy(F call, const std::vector<kvxfer_paged_chunk_t> &chunks) const {
    auto p = detail::sized<kvxfer_paged_t>();
    p.layers = layers.data();
    p.layer_count = layers.size();
    p.layer_bytes = layer_bytes;
    p.blocks = blocks;
    p.heads = heads;
    p.block_size = block_size;
    p.head_size = head_size;
    p.element_bytes = element_bytes;
    p.layout = layout;
    p.threads = threads;
    check(call(&p, chunks.data(), chunks.size()));
  }
};

}  // namespace kvxfer

#endif  // KVXFER_HPP
