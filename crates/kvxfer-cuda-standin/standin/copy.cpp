// Copies and fills, checked against what is allocated when they are asked for and again when they run.
#include "memory.h"

#include <cstring>

using namespace standin;

namespace {

void *reachable(uint64_t at, size_t size) { return is_device(at) ? translate(at, size) : reinterpret_cast<void *>(at); }

CUresult move(uint64_t dst, uint64_t src, size_t size) {
  std::shared_lock<std::shared_mutex> hold(mapping());
  void *to = reachable(dst, size), *from = reachable(src, size);
  if (!to || !from) return ILLEGAL_ADDRESS;  // Freed in the meantime.
  memmove(to, from, size);
  return SUCCESS;
}

CUresult fill(uint64_t at, unsigned value, size_t n, size_t width) {
  std::shared_lock<std::shared_mutex> hold(mapping());
  char *to = static_cast<char *>(reachable(at, n * width));
  if (!to) return ILLEGAL_ADDRESS;
  for (size_t i = 0; i < n; ++i) memcpy(to + i * width, &value, width);
  return SUCCESS;
}

CUresult queue(uint64_t dst, uint64_t src, size_t size, void *handle) {
  std::shared_ptr<Stream> s;
  if (CUresult r = stream_of(handle, &s)) return r;
  if (size == 0) return SUCCESS;
  if (!dst || !src) return INVALID_VALUE;
  Place to = place(dst, size), from = place(src, size);
  if (to == Place::nowhere || from == Place::nowhere) return INVALID_VALUE;
  if (from == Place::pageable && to == Place::device) {
    // Staged before the call returns, as the driver does with pageable memory.
    auto staged = std::make_shared<std::string>(reinterpret_cast<const char *>(src), size);
    s->push([=] { return move(dst, uint64_t(staged->data()), staged->size()); });
    return SUCCESS;
  }
  s->push([=] { return move(dst, src, size); });
  if (to == Place::pageable) s->drain();
  return SUCCESS;
}

CUresult at_once(uint64_t dst, uint64_t src, size_t size) {
  std::shared_ptr<Stream> s;
  if (CUresult r = queue(dst, src, size, nullptr)) return r;
  if (CUresult r = stream_of(nullptr, &s)) return r;
  s->drain();
  return s->context->sticky;
}

}  // namespace

#define COPY(name, To, From)                                                  \
  API CUresult name(To dst, From src, size_t size) {                          \
    CONTEXT(name, c);                                                         \
    (void)c;                                                                  \
    return at_once(uint64_t(dst), uint64_t(src), size);                       \
  }
#define COPY_ASYNC(name, To, From)                                            \
  API CUresult name(To dst, From src, size_t size, void *stream) {            \
    READY(name);                                                              \
    return queue(uint64_t(dst), uint64_t(src), size, stream);                 \
  }
COPY(cuMemcpy, CUdeviceptr, CUdeviceptr)
COPY(cuMemcpyDtoD_v2, CUdeviceptr, CUdeviceptr)
COPY(cuMemcpyHtoD_v2, CUdeviceptr, const void *)
COPY(cuMemcpyDtoH_v2, void *, CUdeviceptr)
COPY_ASYNC(cuMemcpyAsync, CUdeviceptr, CUdeviceptr)
COPY_ASYNC(cuMemcpyDtoDAsync_v2, CUdeviceptr, CUdeviceptr)
COPY_ASYNC(cuMemcpyHtoDAsync_v2, CUdeviceptr, const void *)
COPY_ASYNC(cuMemcpyDtoHAsync_v2, void *, CUdeviceptr)

#ifndef STANDIN_OLD
API CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t n, const int *attributes,
                                size_t *indices, size_t sets, size_t *failed, void *handle) {
  READY(cuMemcpyBatchAsync);
  if (failed) *failed = SIZE_MAX;
  if (!dsts || !srcs || !sizes || !n || !attributes || !indices || sets != 1 || indices[0] != 0) return INVALID_VALUE;
  if (attributes[0] < 1 || attributes[0] > 3) return INVALID_VALUE;
  if (uintptr_t(handle) <= 2) return INVALID_VALUE;  // Not on the default streams.
  for (size_t i = 0; i < n; ++i)
    if (!sizes[i] || place(dsts[i], sizes[i]) == Place::nowhere || place(srcs[i], sizes[i]) == Place::nowhere) {
      if (failed) *failed = i;
      return INVALID_VALUE;
    }
  for (size_t i = 0; i < n; ++i)
    if (CUresult r = queue(dsts[i], srcs[i], sizes[i], handle)) return r;
  return SUCCESS;
}
#endif

#define FILL(name, type)                                                                       \
  API CUresult name##_v2(CUdeviceptr at, type value, size_t n) {                               \
    CONTEXT(name##_v2, c);                                                                     \
    (void)c;                                                                                   \
    return n && place(at, n * sizeof value) != Place::device ? INVALID_VALUE : fill(at, value, n, sizeof value); \
  }                                                                                            \
  API CUresult name##Async(CUdeviceptr at, type value, size_t n, void *handle) {               \
    READY(name##Async);                                                                        \
    std::shared_ptr<Stream> s;                                                                 \
    if (CUresult r = stream_of(handle, &s)) return r;                                          \
    if (n && place(at, n * sizeof value) != Place::device) return INVALID_VALUE;               \
    s->push([=] { return fill(at, value, n, sizeof value); });                                 \
    return SUCCESS;                                                                            \
  }
FILL(cuMemsetD8, unsigned char)
FILL(cuMemsetD32, unsigned)
