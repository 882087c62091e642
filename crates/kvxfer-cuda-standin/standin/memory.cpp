// Memory: device addresses are reserved and never accessible by the host; the bytes lie in memfds, mapped at a constant distance.
#include "memory.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <set>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

using namespace standin;

namespace standin {
namespace {

// Between two ranges nothing is allocated, so that a copy past an end is seen.
constexpr uint64_t ARENA = uint64_t(256) << 30, PAGE = 4096, HUGE = uint64_t(2) << 20, GAP = HUGE;

struct Arena {
  uint64_t base, shadow;
  Arena() {
    base = reserve();
    shadow = reserve();
  }
  static uint64_t reserve() {
    void *p = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return uint64_t(p);
  }
};
Arena &arena() {
  static Arena *a = new Arena;
  return *a;
}

enum class Kind { ordinary, opened, reserved, mapped };
struct Range {
  uint64_t size;  // As asked for; what is mapped is rounded up to pages.
  Kind kind;
  std::shared_ptr<Physical> physical;
  Context *context = nullptr;
  uint64_t id = 0;
  bool access = false;
  int users = 1;
};
struct VirtualHandle {
  std::shared_ptr<Physical> physical;
};
struct Host {
  size_t size;
  bool allocated;
  unsigned flags;
};

// The tables are never destroyed: threads of the process, and the report at its end, look at them to the last.
template <class T> T &kept() {
  static T *t = new T;
  return *t;
}
// Ranges that take room in the arena: allocations, opened handles, reservations.
struct Ranges : std::map<uint64_t, Range> {};
// Physical memory mapped into reservations.
struct Mapped : std::map<uint64_t, Range> {};
auto &ranges = kept<Ranges>();
auto &mapped = kept<Mapped>();
auto &hosts = kept<std::map<uint64_t, Host>>();
auto &handles = kept<std::set<VirtualHandle *>>();
auto &opened = kept<std::map<std::string, uint64_t>>();
uint64_t used[MAX_DEVICES];
std::atomic<uint64_t> next_id{1};

uint64_t up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

uint64_t place_for(uint64_t size, uint64_t unit) {
  uint64_t at = up(arena().base, unit);
  for (auto &[base, r] : ranges) {
    if (base >= at + size) break;
    at = up(base + r.size + 1, unit) + GAP;
  }
  return at + size <= arena().base + ARENA ? at : 0;
}

void *view(uint64_t at) { return reinterpret_cast<void *>(at - arena().base + arena().shadow); }

bool map_view(uint64_t at, const Physical &p, uint64_t offset, uint64_t size) {
  return mmap(view(at), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, p.fd, off_t(offset)) != MAP_FAILED;
}
void unmap_view(uint64_t at, uint64_t size) {
  mmap(view(at), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

int ordinal_of(const Physical &p) { return p.device; }

std::shared_ptr<Physical> allocate(int device, uint64_t size, uint64_t id, CUresult *why) {
  uint64_t limit = uint64_t(knob64("KVXSTANDIN_MEMORY", int64_t(2) << 30));
  if (size > limit - used[device]) {
    *why = OUT_OF_MEMORY;
    return nullptr;
  }
  char name[64];
  snprintf(name, sizeof name, "kvxstandin-%llx-%d", (unsigned long long)id, device);
  int fd = memfd_create(name, MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, off_t(size)) != 0) {
    if (fd >= 0) close(fd);
    *why = OUT_OF_MEMORY;
    return nullptr;
  }
  auto p = std::make_shared<Physical>(fd, size, device);
  p->counted = true;
  used[device] += size;
  live("device bytes", int64_t(size));
  *why = SUCCESS;
  return p;
}

// The range of `all` that holds `at`.
std::pair<uint64_t, Range *> find(std::map<uint64_t, Range> &all, uint64_t at) {
  auto it = all.upper_bound(at);
  if (it == all.begin()) return {0, nullptr};
  --it;
  if (at - it->first >= it->second.size) return {0, nullptr};
  return {it->first, &it->second};
}

// Memory behind an address: an allocation, an opened one, or a mapped one with access.
std::pair<uint64_t, Range *> behind(uint64_t at) {
  auto found = find(ranges, at);
  if (found.second && found.second->kind == Kind::reserved) found = find(mapped, at);
  return found;
}

uint64_t new_id() { return uint64_t(getpid()) << 32 | next_id++; }

}  // namespace

Physical::~Physical() {
  close(fd);
  if (counted) {
    used[device] -= size;
    live("device bytes", -int64_t(size));
  }
}

std::shared_mutex &mapping() {
  static std::shared_mutex *m = new std::shared_mutex;
  return *m;
}

bool is_device(uint64_t at) { return at >= arena().base && at < arena().base + ARENA; }

void *translate(uint64_t at, size_t size) {
  if (at + size < at) return nullptr;
  std::lock_guard<std::mutex> hold(world());
  for (uint64_t p = at; p < at + size || p == at;) {
    auto [base, r] = behind(p);
    if (!r || (r->kind == Kind::mapped && !r->access)) return nullptr;
    p = base + r->size;
    if (p >= at + size) break;
  }
  return view(at);
}

bool is_pinned(uint64_t at, size_t size) {
  if (at + size < at) return false;
  std::lock_guard<std::mutex> hold(world());
  auto it = hosts.upper_bound(at);
  if (it == hosts.begin()) return false;
  --it;
  return at + size <= it->first + it->second.size;
}

Place place(uint64_t at, size_t size) {
  if (is_device(at)) return translate(at, size) ? Place::device : Place::nowhere;
  return is_pinned(at, size) ? Place::pinned : Place::pageable;
}

// Allocations go with their context.
void forget_context(Context *c) {
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  for (auto it = ranges.begin(); it != ranges.end();) {
    if (it->second.context == c && it->second.kind == Kind::ordinary) {
      unmap_view(it->first, up(it->second.size, PAGE));
      live("allocations", -1);
      it = ranges.erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace standin

API CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
  CONTEXT(cuMemAlloc_v2, c);
  if (!out || size == 0) return INVALID_VALUE;
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  CUresult why;
  uint64_t bytes = up(size, PAGE), id = new_id();
  auto physical = allocate(c->device, bytes, id, &why);
  if (!physical) return why;
  uint64_t at = place_for(bytes, PAGE);
  if (!at || !map_view(at, *physical, 0, bytes)) return OUT_OF_MEMORY;
  memset(view(at), 0xA5, bytes);  // Whoever counts on zeros is wrong.
  ranges[at] = {size, Kind::ordinary, physical, c, id, true, 1};
  live("allocations", 1);
  *out = at;
  return SUCCESS;
}
API CUresult cuMemFree_v2(CUdeviceptr at) {
  CONTEXT(cuMemFree_v2, c);
  (void)c;
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  auto it = ranges.find(at);
  if (it == ranges.end() || it->second.kind != Kind::ordinary) return INVALID_VALUE;
  unmap_view(at, up(it->second.size, PAGE));
  ranges.erase(it);
  live("allocations", -1);
  return SUCCESS;
}
API CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
  CONTEXT(cuMemGetInfo_v2, c);
  std::lock_guard<std::mutex> hold(world());
  size_t all = size_t(knob64("KVXSTANDIN_MEMORY", int64_t(2) << 30));
  if (total) *total = all;
  if (free) *free = all - used[c->device];
  return SUCCESS;
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
  CONTEXT(cuMemGetAddressRange_v2, c);
  (void)c;
  std::lock_guard<std::mutex> hold(world());
  auto [start, r] = behind(at);
  if (!r) return NOT_FOUND;
  if (base) *base = start;
  if (size) *size = r->size;
  return SUCCESS;
}

API CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags) {
  CONTEXT(cuMemHostAlloc, c);
  (void)c;
  if (!out || size == 0) return INVALID_VALUE;
  void *p = mmap(nullptr, up(size, PAGE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return OUT_OF_MEMORY;
  std::lock_guard<std::mutex> hold(world());
  hosts[uint64_t(p)] = {up(size, PAGE), true, flags};
  live("pinned allocations", 1);
  *out = p;
  return SUCCESS;
}
API CUresult cuMemFreeHost(void *p) {
  CONTEXT(cuMemFreeHost, c);
  (void)c;
  std::lock_guard<std::mutex> hold(world());
  auto it = hosts.find(uint64_t(p));
  if (it == hosts.end() || !it->second.allocated) return INVALID_VALUE;
  munmap(p, it->second.size);
  hosts.erase(it);
  live("pinned allocations", -1);
  return SUCCESS;
}
API CUresult cuMemHostRegister_v2(void *p, size_t size, unsigned flags) {
  CONTEXT(cuMemHostRegister_v2, c);
  (void)c;
  if (!p || size == 0 || is_device(uint64_t(p))) return INVALID_VALUE;
  std::lock_guard<std::mutex> hold(world());
  for (auto &[base, h] : hosts)
    if (base < uint64_t(p) + size && uint64_t(p) < base + h.size) return HOST_MEMORY_ALREADY_REGISTERED;
  hosts[uint64_t(p)] = {size, false, flags};
  live("host registrations", 1);
  return SUCCESS;
}
API CUresult cuMemHostUnregister(void *p) {
  CONTEXT(cuMemHostUnregister, c);
  (void)c;
  std::lock_guard<std::mutex> hold(world());
  auto it = hosts.find(uint64_t(p));
  if (it == hosts.end() || it->second.allocated) return HOST_MEMORY_NOT_REGISTERED;
  hosts.erase(it);
  live("host registrations", -1);
  return SUCCESS;
}
API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *p, unsigned) {
  CONTEXT(cuMemHostGetDevicePointer_v2, c);
  (void)c;
  if (!out || !is_pinned(uint64_t(p), 1)) return INVALID_VALUE;
  *out = uint64_t(p);
  return SUCCESS;
}

static CUresult attribute(void *data, int which, uint64_t at, bool strict) {
  std::lock_guard<std::mutex> hold(world());
  auto [base, r] = behind(at);
  const Host *host = nullptr;
  auto it = hosts.upper_bound(at);
  if (it != hosts.begin()) {
    --it;
    if (at < it->first + it->second.size) host = &it->second;
  }
  bool known = r || host;
  if (!known && strict) return INVALID_VALUE;
  uint64_t start = r ? base : host ? it->first : 0, size = r ? r->size : host ? host->size : 0;
  switch (which) {
    case 1: *static_cast<void **>(data) = r ? r->context : nullptr; break;
    case 2: *static_cast<unsigned *>(data) = r ? 2 : host ? 1 : 0; break;
    case 3: *static_cast<uint64_t *>(data) = known ? at : 0; break;
    case 4: *static_cast<void **>(data) = host ? reinterpret_cast<void *>(at) : nullptr; break;
    case 6: *static_cast<bool *>(data) = false; break;
    case 7: *static_cast<uint64_t *>(data) = r ? r->id : 0; break;
    case 8: *static_cast<bool *>(data) = false; break;
    case 9: *static_cast<int *>(data) = r ? ordinal_of(*r->physical) : known ? 0 : -2; break;
    case 10: *static_cast<bool *>(data) = r && r->kind == Kind::ordinary; break;
    case 11: *static_cast<uint64_t *>(data) = start; break;
    case 12: *static_cast<uint64_t *>(data) = size; break;
    case 13: *static_cast<bool *>(data) = known; break;
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}
API CUresult cuPointerGetAttribute(void *data, int which, CUdeviceptr at) {
  READY(cuPointerGetAttribute);
  return data ? attribute(data, which, at, true) : INVALID_VALUE;
}
API CUresult cuPointerGetAttributes(unsigned n, int *which, void **data, CUdeviceptr at) {
  READY(cuPointerGetAttributes);
  if (!n || !which || !data) return INVALID_VALUE;
  for (unsigned i = 0; i < n; ++i)
    if (CUresult r = data[i] ? attribute(data[i], which[i], at, false) : INVALID_VALUE) return r;
  return SUCCESS;
}
API CUresult cuPointerSetAttribute(const void *, int which, CUdeviceptr at) {
  READY(cuPointerSetAttribute);
  std::lock_guard<std::mutex> hold(world());
  return which == 6 && behind(at).second ? SUCCESS : INVALID_VALUE;
}

// --- between processes ---

namespace {
struct Handle {
  char magic[8];
  int pid, fd;
  uint64_t size, id;
  char rest[32];
};
static_assert(sizeof(Handle) == 64);
struct Raw {
  char bytes[64];
};
}  // namespace

API CUresult cuIpcGetMemHandle(Raw *out, CUdeviceptr at) {
  CONTEXT(cuIpcGetMemHandle, c);
  (void)c;
  if (!out) return INVALID_VALUE;
  if (knob("KVXSTANDIN_NO_IPC", 0)) return NOT_SUPPORTED;
  std::lock_guard<std::mutex> hold(world());
  auto [base, r] = behind(at);
  (void)base;
  if (!r || r->kind != Kind::ordinary) return INVALID_VALUE;
  Handle h{};
  memcpy(h.magic, "kvxstand", 8);
  h.pid = getpid();
  h.fd = r->physical->fd;
  h.size = r->size;
  h.id = r->id;
  memcpy(out, &h, sizeof h);
  return SUCCESS;
}
API CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *out, Raw raw, unsigned flags) {
  CONTEXT(cuIpcOpenMemHandle_v2, c);
  Handle h;
  memcpy(&h, &raw, sizeof h);
  if (!out || flags > 1 || memcmp(h.magic, "kvxstand", 8)) return INVALID_VALUE;
  if (knob("KVXSTANDIN_NO_IPC", 0)) return NOT_SUPPORTED;
  if (h.pid == getpid()) return INVALID_CONTEXT;
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  std::string key(raw.bytes, sizeof raw);
  key += std::to_string(uint64_t(c));
  if (auto it = opened.find(key); it != opened.end()) {
    ++ranges[it->second].users;
    *out = it->second;
    return SUCCESS;
  }
  char path[64], target[96] = {}, name[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", h.pid, h.fd);
  // The descriptor may be another file by now, and its process another one.
  snprintf(name, sizeof name, "/memfd:kvxstandin-%llx-", (unsigned long long)h.id);
  if (readlink(path, target, sizeof target - 1) < 0 || strncmp(target, name, strlen(name))) return CANNOT_MAP;
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return CANNOT_MAP;
  int on = -1;
  sscanf(target + strlen(name), "%d", &on);
  // A device that is not reached cannot be mapped.
  if (on != c->device && knob("KVXSTANDIN_NO_PEER", 0)) return close(fd), PEER_ACCESS_UNSUPPORTED;
  auto physical = std::make_shared<Physical>(fd, h.size, on);
  uint64_t at = place_for(h.size, PAGE);
  if (!at || !map_view(at, *physical, 0, up(h.size, PAGE))) return CANNOT_MAP;
  ranges[at] = {h.size, Kind::opened, physical, c, h.id, true, 1};
  opened[key] = at;
  live("opened handles", 1);
  *out = at;
  return SUCCESS;
}
API CUresult cuIpcCloseMemHandle(CUdeviceptr at) {
  CONTEXT(cuIpcCloseMemHandle, c);
  (void)c;
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  auto it = ranges.find(at);
  if (it == ranges.end() || it->second.kind != Kind::opened) return INVALID_VALUE;
  if (--it->second.users) return SUCCESS;
  unmap_view(at, up(it->second.size, PAGE));
  ranges.erase(it);
  for (auto o = opened.begin(); o != opened.end();) o = o->second == at ? opened.erase(o) : std::next(o);
  live("opened handles", -1);
  return SUCCESS;
}

// --- virtual memory ---

namespace {
struct Location {
  int type, id;
};
struct Properties {
  int type, handle_types;
  Location location;
  void *win32;
  unsigned char flags[8];
};
struct Access {
  Location location;
  int flags;
};
bool good(const Properties *p) {
  return p && p->type == 1 && p->location.type == 1 && p->location.id >= 0 && p->location.id < devices();
}
}  // namespace

API CUresult cuMemGetAllocationGranularity(size_t *out, const Properties *p, int) {
  READY(cuMemGetAllocationGranularity);
  if (!out || !good(p)) return INVALID_VALUE;
  *out = HUGE;
  return SUCCESS;
}
API CUresult cuMemCreate(VirtualHandle **out, size_t size, const Properties *p, unsigned long long flags) {
  READY(cuMemCreate);
  if (!out || !good(p) || size == 0 || size % HUGE || flags) return INVALID_VALUE;
  std::lock_guard<std::mutex> hold(world());
  CUresult why;
  auto physical = allocate(p->location.id, size, new_id(), &why);
  if (!physical) return why;
  *out = new VirtualHandle{physical};
  handles.insert(*out);
  live("virtual memory handles", 1);
  return SUCCESS;
}
API CUresult cuMemRelease(VirtualHandle *h) {
  READY(cuMemRelease);
  std::lock_guard<std::mutex> hold(world());
  if (!handles.erase(h)) return INVALID_VALUE;
  delete h;
  live("virtual memory handles", -1);
  return SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t, CUdeviceptr, unsigned long long flags) {
  READY(cuMemAddressReserve);
  if (!out || size == 0 || size % HUGE || flags) return INVALID_VALUE;
  std::lock_guard<std::mutex> hold(world());
  uint64_t at = place_for(size, HUGE);
  if (!at) return OUT_OF_MEMORY;
  ranges[at] = {size, Kind::reserved, nullptr, nullptr, 0, false, 1};
  live("address reservations", 1);
  *out = at;
  return SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  READY(cuMemAddressFree);
  std::lock_guard<std::mutex> hold(world());
  auto it = ranges.find(at);
  if (it == ranges.end() || it->second.kind != Kind::reserved || it->second.size != size) return INVALID_VALUE;
  if (auto m = mapped.lower_bound(at); m != mapped.end() && m->first < at + size) return INVALID_VALUE;
  ranges.erase(it);
  live("address reservations", -1);
  return SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, VirtualHandle *h, unsigned long long flags) {
  READY(cuMemMap);
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  auto [base, r] = find(ranges, at);
  if (!handles.count(h) || offset || flags || size % HUGE || size > h->physical->size) return INVALID_VALUE;
  if (!r || r->kind != Kind::reserved || at + size > base + r->size || at % HUGE) return INVALID_VALUE;
  if (auto next = mapped.lower_bound(at); next != mapped.end() && next->first < at + size) return INVALID_VALUE;
  if (!map_view(at, *h->physical, 0, size)) return CANNOT_MAP;
  mapped[at] = {size, Kind::mapped, h->physical, nullptr, new_id(), false, 1};
  live("mappings", 1);
  return SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  READY(cuMemUnmap);
  std::unique_lock<std::shared_mutex> alone(mapping());
  std::lock_guard<std::mutex> hold(world());
  auto it = mapped.find(at);
  if (it == mapped.end() || it->second.size != size) return INVALID_VALUE;
  unmap_view(at, size);
  mapped.erase(it);
  live("mappings", -1);
  return SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const Access *a, size_t n) {
  READY(cuMemSetAccess);
  std::lock_guard<std::mutex> hold(world());
  auto it = mapped.find(at);
  if (it == mapped.end() || it->second.size != size || !a || n < 1) return INVALID_VALUE;
  it->second.access = a->flags == 3;
  return SUCCESS;
}
API CUresult cuMemRetainAllocationHandle(VirtualHandle **out, void *at) {
  READY(cuMemRetainAllocationHandle);
  std::lock_guard<std::mutex> hold(world());
  auto [base, r] = find(mapped, uint64_t(at));
  (void)base;
  if (!out || !r) return INVALID_VALUE;
  *out = new VirtualHandle{r->physical};
  handles.insert(*out);
  live("virtual memory handles", 1);
  return SUCCESS;
}
API CUresult cuMemExportToShareableHandle(void *out, VirtualHandle *h, int type, unsigned long long flags) {
  READY(cuMemExportToShareableHandle);
  std::lock_guard<std::mutex> hold(world());
  if (!out || type != 1 || flags || !handles.count(h)) return INVALID_VALUE;
  int fd = fcntl(h->physical->fd, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return UNKNOWN;
  *static_cast<int *>(out) = fd;
  return SUCCESS;
}
API CUresult cuMemImportFromShareableHandle(VirtualHandle **out, void *os, int type) {
  READY(cuMemImportFromShareableHandle);
  int theirs = int(intptr_t(os));
  char path[64], target[96] = {};
  snprintf(path, sizeof path, "/proc/self/fd/%d", theirs);
  if (!out || type != 1 || readlink(path, target, sizeof target - 1) < 0) return INVALID_VALUE;
  unsigned long long id;
  int device;
  struct stat s;
  if (sscanf(target, "/memfd:kvxstandin-%llx-%d", &id, &device) != 2 || fstat(theirs, &s)) return INVALID_VALUE;
  int fd = fcntl(theirs, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return UNKNOWN;
  std::lock_guard<std::mutex> hold(world());
  *out = new VirtualHandle{std::make_shared<Physical>(fd, size_t(s.st_size), device)};
  handles.insert(*out);
  live("virtual memory handles", 1);
  return SUCCESS;
}
