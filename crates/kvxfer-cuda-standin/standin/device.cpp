// Initialisation, devices, contexts, and the names of errors.
#include "standin.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

using namespace standin;

namespace standin {
namespace {

std::atomic<bool> initialised{false};
thread_local std::vector<Context *> stack;
std::set<void *> contexts;

struct Primary {
  Context *context = nullptr;
  int users = 0;
};
Primary primaries[MAX_DEVICES];
std::set<std::pair<Context *, Context *>> reach;

const std::map<CUresult, std::pair<const char *, const char *>> names = {
    {SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {DEINITIALIZED, {"CUDA_ERROR_DEINITIALIZED", "driver shutting down"}},
    {NO_DEVICE, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {CANNOT_MAP, {"CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"}},
    {PEER_ACCESS_UNSUPPORTED, {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"}},
    {INVALID_PTX, {"CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"}},
    {NO_BINARY_FOR_GPU, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {JIT_COMPILER_NOT_FOUND, {"CUDA_ERROR_JIT_COMPILER_NOT_FOUND", "PTX JIT compiler library not found"}},
    {UNSUPPORTED_PTX_VERSION, {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."}},
    {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {PEER_ACCESS_ALREADY_ENABLED, {"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"}},
    {CONTEXT_IS_DESTROYED, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {HOST_MEMORY_ALREADY_REGISTERED, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"}},
    {HOST_MEMORY_NOT_REGISTERED, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"}},
    {NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {UNKNOWN, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

Context *make(int device, bool primary) {
  Context *c = new Context;  // Kept for good: a stale handle must be told from a wild one.
  c->device = device;
  c->primary = primary;
  contexts.insert(c);
  live("contexts", 1);
  return c;
}

void destroy(Context *c) {
  c->alive = false;
  if (c->standard) c->standard->drain();
  forget_context(c);
  live("contexts", -1);
}

}  // namespace

std::mutex &world() {
  static std::mutex *m = new std::mutex;
  return *m;
}

int devices() {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  int n = knob("KVXSTANDIN_DEVICES", 1);
  if (n > MAX_DEVICES) n = MAX_DEVICES;
  if (!visible) return n;
  if (!*visible || !strcmp(visible, "-1")) return 0;
  int listed = 1;
  for (const char *p = visible; *p; ++p) listed += *p == ',';
  return listed < n ? listed : n;
}

// The n-th visible device is the physical one that the variable names.
static int physical(int ordinal) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) return ordinal;
  for (int i = 0; i < ordinal; ++i) {
    visible = strchr(visible, ',');
    if (!visible) return ordinal;
    ++visible;
  }
  return atoi(visible);
}

CUresult ready() { return initialised ? SUCCESS : NOT_INITIALIZED; }

bool is_context(void *handle) {
  std::lock_guard<std::mutex> hold(world());
  return contexts.count(handle);
}

CUresult current(Context **out) {
  if (stack.empty() || !stack.back()) return INVALID_CONTEXT;
  Context *c = stack.back();
  if (!c->alive) return CONTEXT_IS_DESTROYED;
  if (c->sticky) return c->sticky;
  *out = c;
  return SUCCESS;
}

}  // namespace standin

API CUresult cuInit(unsigned flags) {
  CALL(cuInit);
  if (flags) return INVALID_VALUE;
  if (devices() == 0) return NO_DEVICE;
  initialised = true;
  return SUCCESS;
}
API CUresult cuDriverGetVersion(int *version) {
  CALL(cuDriverGetVersion);
  if (!version) return INVALID_VALUE;
#ifdef STANDIN_OLD
  const int own = 12040;
#else
  const int own = 12080;
#endif
  *version = knob("KVXSTANDIN_VERSION", own);
  return SUCCESS;
}
API CUresult cuGetErrorName(CUresult r, const char **out) {
  auto it = names.find(r);
  if (!out || it == names.end()) {
    if (out) *out = nullptr;
    return INVALID_VALUE;
  }
  *out = it->second.first;
  return SUCCESS;
}
API CUresult cuGetErrorString(CUresult r, const char **out) {
  auto it = names.find(r);
  if (!out || it == names.end()) {
    if (out) *out = nullptr;
    return INVALID_VALUE;
  }
  *out = it->second.second;
  return SUCCESS;
}
API CUresult cuDeviceGetCount(int *n) {
  READY(cuDeviceGetCount);
  if (!n) return INVALID_VALUE;
  *n = devices();
  return SUCCESS;
}
API CUresult cuDeviceGet(CUdevice *d, int ordinal) {
  READY(cuDeviceGet);
  if (!d) return INVALID_VALUE;
  if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
  *d = ordinal;
  return SUCCESS;
}
static bool bad(CUdevice d) { return d < 0 || d >= devices(); }
API CUresult cuDeviceGetName(char *name, int len, CUdevice d) {
  READY(cuDeviceGetName);
  if (bad(d)) return INVALID_DEVICE;
  if (!name || len < 1) return INVALID_VALUE;
  snprintf(name, size_t(len), "kvxfer stand-in %d", physical(d));
  return SUCCESS;
}
API CUresult cuDeviceGetUuid_v2(char *uuid, CUdevice d) {
  READY(cuDeviceGetUuid_v2);
  if (bad(d)) return INVALID_DEVICE;
  if (!uuid) return INVALID_VALUE;
  memcpy(uuid, "kvxfer-stand-in", 15);
  uuid[15] = char(physical(d));
  return SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice d) {
  READY(cuDeviceGetAttribute);
  if (bad(d)) return INVALID_DEVICE;
  if (!value) return INVALID_VALUE;
  switch (attribute) {
    case 16: *value = 4; break;   // multiprocessors
    case 75: *value = 9; break;   // compute capability, major
    case 76: *value = 0; break;
    case 102: case 103: *value = 1; break;  // virtual memory, POSIX descriptors
    default: *value = 0;
  }
  return SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice d) {
  READY(cuDeviceTotalMem_v2);
  if (bad(d)) return INVALID_DEVICE;
  if (!bytes) return INVALID_VALUE;
  *bytes = size_t(knob64("KVXSTANDIN_MEMORY", int64_t(2) << 30));
  return SUCCESS;
}
API CUresult cuDeviceGetPCIBusId(char *id, int len, CUdevice d) {
  READY(cuDeviceGetPCIBusId);
  if (bad(d)) return INVALID_DEVICE;
  if (!id || len < 13) return INVALID_VALUE;
  snprintf(id, size_t(len), "0000:%02X:00.0", 0xE0 + physical(d));
  return SUCCESS;
}
API CUresult cuDeviceCanAccessPeer(int *can, CUdevice a, CUdevice b) {
  READY(cuDeviceCanAccessPeer);
  if (bad(a) || bad(b)) return INVALID_DEVICE;
  if (!can) return INVALID_VALUE;
  *can = a != b && !knob("KVXSTANDIN_NO_PEER", 0);
  return SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(Context **out, CUdevice d) {
  READY(cuDevicePrimaryCtxRetain);
  if (bad(d)) return INVALID_DEVICE;
  if (!out) return INVALID_VALUE;
  std::lock_guard<std::mutex> hold(world());
  Primary &p = primaries[d];
  if (!p.context || !p.context->alive) p.context = make(d, true);
  ++p.users;
  live("primary contexts retained", 1);
  *out = p.context;
  return SUCCESS;
}
static CUresult end_primary(CUdevice d, bool all) {
  Context *gone = nullptr;
  {
    std::lock_guard<std::mutex> hold(world());
    Primary &p = primaries[d];
    if (!p.context || p.users == 0) return all ? SUCCESS : INVALID_CONTEXT;
    if (all || --p.users == 0) gone = p.context, p.context = nullptr;
    live("primary contexts retained", all ? -p.users : -1);
    if (all) p.users = 0;
  }
  if (gone) destroy(gone);
  return SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) {
  READY(cuDevicePrimaryCtxRelease_v2);
  return bad(d) ? INVALID_DEVICE : end_primary(d, false);
}
// Destroys it under whoever has retained it; their releases are errors then.
API CUresult cuDevicePrimaryCtxReset_v2(CUdevice d) {
  READY(cuDevicePrimaryCtxReset_v2);
  return bad(d) ? INVALID_DEVICE : end_primary(d, true);
}
API CUresult cuCtxCreate_v2(Context **out, unsigned, CUdevice d) {
  READY(cuCtxCreate_v2);
  if (bad(d)) return INVALID_DEVICE;
  if (!out) return INVALID_VALUE;
  std::lock_guard<std::mutex> hold(world());
  *out = make(d, false);
  stack.push_back(*out);
  return SUCCESS;
}
API CUresult cuCtxDestroy_v2(Context *c) {
  READY(cuCtxDestroy_v2);
  if (!is_context(c)) return INVALID_CONTEXT;
  if (!c->alive) return CONTEXT_IS_DESTROYED;
  if (!stack.empty() && stack.back() == c) stack.pop_back();
  destroy(c);
  return SUCCESS;
}
API CUresult cuCtxPushCurrent_v2(Context *c) {
  READY(cuCtxPushCurrent_v2);
  if (!is_context(c)) return INVALID_CONTEXT;
  if (!c->alive) return CONTEXT_IS_DESTROYED;
  stack.push_back(c);
  return SUCCESS;
}
API CUresult cuCtxPopCurrent_v2(Context **out) {
  READY(cuCtxPopCurrent_v2);
  if (stack.empty()) return INVALID_CONTEXT;
  if (out) *out = stack.back();
  stack.pop_back();
  return SUCCESS;
}
API CUresult cuCtxSetCurrent(Context *c) {
  READY(cuCtxSetCurrent);
  if (c && !is_context(c)) return INVALID_CONTEXT;
  if (!stack.empty()) stack.pop_back();
  if (c) stack.push_back(c);
  return SUCCESS;
}
API CUresult cuCtxGetCurrent(Context **out) {
  READY(cuCtxGetCurrent);
  if (!out) return INVALID_VALUE;
  *out = stack.empty() ? nullptr : stack.back();
  return SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *d) {
  CONTEXT(cuCtxGetDevice, c);
  if (!d) return INVALID_VALUE;
  *d = c->device;
  return SUCCESS;
}
API CUresult cuCtxEnablePeerAccess(Context *other, unsigned flags) {
  CONTEXT(cuCtxEnablePeerAccess, c);
  if (flags) return INVALID_VALUE;
  if (!is_context(other)) return INVALID_CONTEXT;
  if (knob("KVXSTANDIN_NO_PEER", 0)) return PEER_ACCESS_UNSUPPORTED;
  std::lock_guard<std::mutex> hold(world());
  return reach.insert({c, other}).second ? SUCCESS : PEER_ACCESS_ALREADY_ENABLED;
}
API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  CONTEXT(cuCtxGetStreamPriorityRange, c);
  (void)c;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
