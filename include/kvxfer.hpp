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

/// A point in a CUDA stream: what carries it reads and writes nothing before the stream has come past it. It may go as soon as it has been
/// handed over, and be used any number of times.
class Fence : public detail::Handle<kvxfer_fence_t, kvxfer_fence_free> {
 public:
  using Handle::Handle;
  /// Marks what `stream` has been given so far: a live `CUstream` or `cudaStream_t` of the device's primary context (the one of the CUDA
  /// runtime), or its default stream. Does not wait.
  explicit Fence(std::int32_t device, void *stream = nullptr) {
    check(kvxfer_fence_new(device, static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(stream)), &raw_));
  }
  /// False while the stream has not come there; throws when its work failed.
  bool poll() const { return detail::ended(kvxfer_fence_poll(raw_)); }
};

/// What a transfer may be told beside its pieces; see kvxfer_transfer_options_t.
struct TransferOptions {
  Milliseconds timeout{0};
  std::optional<std::string> notify;
  std::uint32_t integrity = KVXFER_INTEGRITY_DEFAULT;
  std::uint32_t transport = KVXFER_TRANSPORT_ANY;
  /// Nothing is read or written before; none: at once. Looked at by the call alone.
  const Fence *after = nullptr;
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
  /// First byte; of a GPU's memory the address on the device, which the host cannot touch.
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
  /// Number of the CUDA device it lies on, among the visible ones; empty for host memory.
  std::optional<std::int32_t> device() const {
    std::int32_t device = -1;
    check(kvxfer_region_device(raw_, &device));
    if (device < 0) return std::nullopt;
    return device;
  }
  /// Pins host memory for CUDA devices, which transfers otherwise do at their first use of it; a GPU's memory stays as it is.
  void pin() { check(kvxfer_region_pin(raw_)); }
  /// Copies bytes out, also of a GPU's memory, and waits for it.
  void read(std::uint64_t offset, void *data, std::size_t length) const {
    check(kvxfer_region_read(raw_, offset, length, data));
  }
  /// Copies bytes in, also to a GPU's memory, and waits for it.
  void write(std::uint64_t offset, const void *data, std::size_t length) {
    check(kvxfer_region_write(raw_, offset, data, length));
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
    o.after = options.after ? options.after->get() : nullptr;
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
  /// Zeroed memory of a CUDA device, registered. `shareable`: of a kind that also reaches peers that no CUDA IPC handle reaches (see
  /// kvxfer_region_allocate_device).
  Region allocate_device(std::int32_t device, std::uint64_t length, bool shareable = false) const {
    kvxfer_region_t *out = nullptr;
    check(kvxfer_region_allocate_device(raw_, device, length, shareable ? 1 : 0, &out));
    return Region(out);
  }
  /// The caller's memory, the host's or a GPU's (cudaMalloc), registered; it must outlive the region (see kvxfer_region_register).
  Region register_memory(void *base, std::uint64_t length) const {
    kvxfer_region_t *out = nullptr;
    check(kvxfer_region_register(raw_, base, length, &out));
    return Region(out);
  }
  /// The same for an address of the driver's interface, a `CUdeviceptr`.
  Region register_device(std::uint64_t address, std::uint64_t length) const {
    return register_memory(reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)), length);
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
  /// Writes and commits chunk `index`; the bytes must stay until the delivery has ended. With `after` they are read once its stream
  /// has come past it.
  void write(std::size_t index, const Region &region, const std::vector<kvxfer_run_t> &runs, const Fence *after = nullptr) {
    const kvxfer_fence_t *fence = after ? after->get() : nullptr;
    check(kvxfer_reservation_write_after(raw_, index, region.get(), runs.data(), runs.size(), fence));
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

/// Whether keys and values, or blocks, come first in a paged layer.
enum class Order { kv_first, blocks_first };

/// How one layer of a cache lies in memory. All numbers but counts are bytes; docs/kernels.md has the shapes of engines.
struct Layout {
  /// 2: keys and values; 1: one of something (multi-head latent attention).
  std::uint32_t planes = 2, blocks = 1, block_tokens = 0, heads = 0;
  /// From a token's keys to its values, from block to block, from token to token, from head to head.
  std::uint64_t plane = 0, block = 0, token = 0, head = 0;
  /// Of one head of one token: a multiple of 8, of 16 for full speed.
  std::uint64_t head_bytes = 0;

  /// `[2, blocks, block, heads, head]` or `[blocks, 2, block, heads, head]`; with `heads_first` heads come before a block's tokens.
  static Layout paged(Order order, bool heads_first, std::uint32_t blocks, std::uint32_t block_tokens, std::uint32_t heads,
                      std::uint64_t head_bytes) {
    const std::uint64_t row = heads * head_bytes, half = block_tokens * row;
    const bool kv = order == Order::kv_first;
    Layout l = rows(2, blocks, block_tokens, heads, head_bytes);
    l.plane = kv ? blocks * half : half;
    l.block = kv ? half : 2 * half;
    l.token = heads_first ? head_bytes : row;
    l.head = heads_first ? block_tokens * head_bytes : head_bytes;
    return l;
  }
  /// `[blocks, block, row]`, multi-head latent attention.
  static Layout latent(std::uint32_t blocks, std::uint32_t block_tokens, std::uint64_t row_bytes) {
    Layout l = rows(1, blocks, block_tokens, 1, row_bytes);
    l.block = block_tokens * row_bytes;
    return l;
  }
  /// A layer of a chunk `[2, layers, tokens, heads * head]` (KV_2LTD); layer i begins `i * tokens * heads * head_bytes` after the chunk.
  static Layout chunk(std::uint32_t layers, std::uint32_t tokens, std::uint32_t heads, std::uint64_t head_bytes) {
    Layout l = rows(2, 1, tokens, heads, head_bytes);
    l.plane = std::uint64_t{layers} * tokens * l.token;
    return l;
  }
  /// A layer of a chunk `[layers, tokens, row]`, multi-head latent attention.
  static Layout latent_chunk(std::uint32_t tokens, std::uint64_t row_bytes) { return latent(1, tokens, row_bytes); }
  /// A layer's own chunk `[tokens, 2, heads * head]`.
  static Layout layer_chunk(std::uint32_t tokens, std::uint32_t heads, std::uint64_t head_bytes) {
    Layout l = rows(2, 1, tokens, heads, head_bytes);
    l.plane = l.token;
    l.token *= 2;
    return l;
  }
  /// Some heads only: as many, from the layers' offsets on.
  Layout with_heads(std::uint32_t count) const {
    Layout l = *this;
    l.heads = count;
    return l;
  }

 private:
  /// All heads of a token together, token after token.
  static Layout rows(std::uint32_t planes, std::uint32_t blocks, std::uint32_t block_tokens, std::uint32_t heads,
                     std::uint64_t head_bytes) {
    Layout l;
    l.planes = planes;
    l.blocks = blocks;
    l.block_tokens = block_tokens;
    l.heads = heads;
    l.token = heads * head_bytes;
    l.head = l.head_bytes = head_bytes;
    return l;
  }
};

/// Layers in a region, and which of their tokens: of a table of blocks (from token `first` of the first on), by slots, or, with neither, one
/// after the other from `first` on.
struct View {
  /// A GPU's memory, or pinned memory of the host.
  const Region *region = nullptr;
  Layout layout;
  /// Offset of each layer in the region; any subset, in any order.
  std::vector<std::uint64_t> layers;
  std::vector<std::uint32_t> table;
  std::vector<std::int64_t> slots;
  std::uint32_t first = 0;

  /// All tokens of a chunk `[2, layers, tokens, heads * head]` at `offset`.
  static View chunk(const Region &region, std::uint64_t offset, std::uint32_t layers, std::uint32_t tokens, std::uint32_t heads,
                    std::uint64_t head_bytes) {
    View v;
    v.region = &region;
    v.layout = Layout::chunk(layers, tokens, heads, head_bytes);
    for (std::uint64_t i = 0; i < layers; i++) v.layers.push_back(offset + i * tokens * heads * head_bytes);
    return v;
  }

  /// For calls of kvxfer.h; valid while this object stays as it is.
  kvxfer_view_t raw() const {
    auto v = detail::sized<kvxfer_view_t>();
    v.region = region ? region->get() : nullptr;
    v.layers = layers.data();
    v.layer_count = layers.size();
    v.plane = layout.plane;
    v.block = layout.block;
    v.token = layout.token;
    v.head = layout.head;
    v.head_bytes = layout.head_bytes;
    v.planes = layout.planes;
    v.blocks = layout.blocks;
    v.block_tokens = layout.block_tokens;
    v.heads = layout.heads;
    v.table = table.empty() ? nullptr : table.data();
    v.table_count = table.size();
    v.slots = slots.empty() ? nullptr : slots.data();
    v.slot_count = slots.size();
    v.first = first;
    return v;
  }
};

/// How a gather went.
struct Gathered {
  std::uint64_t bytes;
  /// Of docs/kernels.md; 0 where none was asked for.
  std::uint64_t digest;
};

/// Tokens from one view to another, between paged caches and chunks of any two layouts: checked when it is made, started as often as
/// wanted. It keeps the regions' memory in use, which of the caller's own must stay until this object is gone.
class Gather : public detail::Handle<kvxfer_gather_t, kvxfer_gather_free> {
 public:
  using Handle::Handle;
  /// Equal layers, planes, heads and bytes of a head, everything within its region; the views do not overlap.
  Gather(const View &from, const View &to, std::uint32_t tokens) {
    kvxfer_view_t one = from.raw(), other = to.raw();
    check(kvxfer_gather_new(&one, &other, tokens, &raw_));
  }
  /// Starts it on the GPU that one of the views lies on, once a stream has come past `after`; does not wait. `digest` takes one on the way.
  void start(const Fence *after = nullptr, bool digest = false) {
    check(kvxfer_gather_start(raw_, after ? after->get() : nullptr, digest ? 1 : 0));
  }
  /// How it went; empty when the time is over and it is still under way, and it can be waited for again; throws when it failed.
  std::optional<Gathered> wait(Milliseconds timeout) {
    Gathered out{0, 0};
    kvxfer_result_t result = kvxfer_gather_wait(raw_, detail::ms(timeout), &out.bytes, &out.digest);
    if (result == KVXFER_TIMED_OUT || !detail::ended(result)) return std::nullopt;
    return out;
  }
  /// The same as pieces for Peer::write: local offsets in `from`'s region, remote ones in `to`'s, neighbours joined.
  std::vector<kvxfer_piece_t> pieces() const {
    std::size_t count = 0;
    kvxfer_result_t result = kvxfer_gather_pieces(raw_, nullptr, 0, &count);
    if (result != KVXFER_TOO_LARGE) check(result);
    std::vector<kvxfer_piece_t> out(count);
    check(kvxfer_gather_pieces(raw_, out.data(), out.size(), &count));
    return out;
  }
};

}  // namespace kvxfer

#endif  // KVXFER_HPP
