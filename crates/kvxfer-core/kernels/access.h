// How the kernels reach memory; the one place where a device and the host (for the tests' CPU twins) differ.
#pragma once

#ifdef __CUDACC__

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct __align__(16) Wide {
  u32 x, y, z, w;
};
// Blocks of 256 threads, as the host launches them, four at a time on a multiprocessor: 64 registers a thread, which hold what is under way.
#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)
#define INSIDE static __device__ __forceinline__
// Parameters stay where the driver put them, in constant memory.
#define GRID_CONSTANT const __grid_constant__
// Threads of a warp, and which one this is.
INSIDE u32 lane() { return threadIdx.x & 31u; }
INSIDE u32 first_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) >> 5; }
INSIDE u32 warps() { return (gridDim.x * blockDim.x) >> 5; }
INSIDE void add(u64 at, u64 value) { atomicAdd(reinterpret_cast<u64 *>(at), value); }
// The sum over a warp, all of whose lanes are here, for lane 0; the others get 0.
INSIDE u64 of_warp(u64 value) {
#pragma unroll
  for (u32 step = 16; step; step >>= 1) value += __shfl_down_sync(0xffffffffu, value, step);
  return lane() == 0 ? value : 0;
}
// What nobody changes while the kernel runs, and many threads read: by way of the first-level cache.
INSIDE u32 fixed32(u64 at) { return __ldg(reinterpret_cast<const u32 *>(at)); }
INSIDE u64 fixed64(u64 at) { return __ldg(reinterpret_cast<const u64 *>(at)); }
// Addresses are used as they are.
INSIDE u64 near(u64 at, u64) { return at; }

// Each byte is read once and written once: neither is worth room in a cache. Loads are coherent ones: what is copied may have been
// written a moment ago by another process or device.
template <class T> struct Memory;
template <> struct Memory<Wide> {
  INSIDE Wide load(u64 at) {
    Wide v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
  }
  INSIDE void store(u64 at, Wide v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  }
};
template <> struct Memory<u64> {
  INSIDE u64 load(u64 at) {
    u64 v;
    asm volatile("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return v;
  }
  INSIDE void store(u64 at, u64 v) { asm volatile("st.global.cs.u64 [%0], %1;" ::"l"(at), "l"(v) : "memory"); }
};
template <> struct Memory<u32> {
  INSIDE u32 load(u64 at) { return *reinterpret_cast<const volatile u32 *>(at); }
  INSIDE void store(u64 at, u32 v) { *reinterpret_cast<u32 *>(at) = v; }
};
template <> struct Memory<u8> {
  INSIDE u8 load(u64 at) { return *reinterpret_cast<const volatile u8 *>(at); }
  INSIDE void store(u64 at, u8 v) { *reinterpret_cast<u8 *>(at) = v; }
};

#else  // The twin: one thread after the other, addresses translated by whoever runs it.

#include "twin/host.h"

#endif
