// The kernels on the host: threads run one after the other, which these kernels allow (none waits for another, none shares a byte).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct alignas(16) Wide {
  u32 x, y, z, w;
};
struct Place {
  unsigned x;
};
inline thread_local Place threadIdx, blockIdx, blockDim, gridDim;
#define KERNEL static void
#define INSIDE static inline
#define GRID_CONSTANT const
inline u32 lane() { return threadIdx.x & 31u; }
inline u32 first_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) >> 5; }
inline u32 warps() { return (gridDim.x * blockDim.x) >> 5; }

// Turns a device address into the host's; null where nothing is.
extern "C" void *standin_translate(uint64_t at, size_t size);
struct BadAddress {};
inline u64 near(u64 at, u64 size) {
  void *p = standin_translate(at, size);
  if (!p && size) throw BadAddress{};
  // Alignment is judged by the address, so it must be the device's own: whole pages are mapped.
  return reinterpret_cast<u64>(p);
}

template <class T> struct Memory {
  // As strict as a device: an access that is not aligned is an error.
  static void check(u64 at) {
    if (at % sizeof(T)) throw BadAddress{};
  }
  static T load(u64 at) {
    check(at);
    T v;
    memcpy(&v, reinterpret_cast<const void *>(at), sizeof v);
    return v;
  }
  static void store(u64 at, T v) {
    check(at);
    memcpy(reinterpret_cast<void *>(at), &v, sizeof v);
  }
};

inline void add(u64 at, u64 value) {
  u64 now = Memory<u64>::load(at);
  Memory<u64>::store(at, now + value);
}

// Every lane keeps its own part; they are added up all the same.
inline u64 of_warp(u64 value) { return value; }

inline u32 fixed32(u64 at) { return Memory<u32>::load(at); }
inline u64 fixed64(u64 at) { return Memory<u64>::load(at); }

// Runs one thread after the other.
template <class Body> int every_thread(const unsigned grid[3], const unsigned block[3], Body body) {
  gridDim.x = grid[0];
  blockDim.x = block[0];
  try {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) body();
  } catch (const BadAddress &) {
    return 700;  // CUDA_ERROR_ILLEGAL_ADDRESS
  }
  return 0;
}
