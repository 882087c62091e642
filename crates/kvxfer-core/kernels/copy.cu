// Copies many pieces at once: the cost of a piece is that of its bytes.
//
// A piece is at most 64 KiB long (the host cuts longer ones). Its parts of 8 KiB are taken by the warps of a persistent grid; no thread
// waits for another. All first parts come before all second ones: neighbouring warps take different pieces, so that all
// have work where pieces are shorter than a part. Accesses are as wide as source and destination allow: 16 bytes where both lie alike to a
// multiple of 16, with single bytes before and after.
#include "access.h"

struct Piece {
  u64 src, dst, len;
};

static const u32 PART = 8 << 10, PARTS = 8;

// Whole units of a run by the lanes of a warp, several loads of each under way.
template <class T> INSIDE void units(u64 src, u64 dst, u32 count, u32 me) {
  const u32 DEEP = 8;
  u32 i = me;
  for (; i + 32 * (DEEP - 1) < count; i += 32 * DEEP) {
    T v[DEEP];
#pragma unroll
    for (u32 k = 0; k < DEEP; ++k) v[k] = Memory<T>::load(src + u64(i + 32 * k) * sizeof(T));
#pragma unroll
    for (u32 k = 0; k < DEEP; ++k) Memory<T>::store(dst + u64(i + 32 * k) * sizeof(T), v[k]);
  }
  for (; i < count; i += 32) Memory<T>::store(dst + u64(i) * sizeof(T), Memory<T>::load(src + u64(i) * sizeof(T)));
}

// A run whose sides lie alike modulo the unit: what comes before and after the whole units goes byte by byte.
template <class T> INSIDE void run(u64 src, u64 dst, u32 len, u32 me) {
  u32 head = u32(-i64(src)) & u32(sizeof(T) - 1);
  if (head > len) head = len;
  const u32 count = (len - head) / u32(sizeof(T)), tail = len - head - count * u32(sizeof(T));
  units<u8>(src, dst, head, me);
  units<T>(src + head, dst + head, count, me);
  units<u8>(src + len - tail, dst + len - tail, tail, me);
}

KERNEL kvx_copy(u64 pieces, u32 count) {
  const u64 items = u64(count) * PARTS;
  const u32 me = lane();
  for (u64 item = first_warp(); item < items; item += warps()) {
    const u64 at = near(pieces + (item % count) * sizeof(Piece), sizeof(Piece));
    const u64 len = Memory<u64>::load(at + 16), start = (item / count) * PART;
    if (start >= len) continue;
    const u32 n = u32(len - start < PART ? len - start : PART);
    const u64 src = near(Memory<u64>::load(at) + start, n), dst = near(Memory<u64>::load(at + 8) + start, n);
    const u64 apart = src ^ dst;
    if (!(apart & 15)) run<Wide>(src, dst, n, me);
    else if (!(apart & 7)) run<u64>(src, dst, n, me);
    else if (!(apart & 3)) run<u32>(src, dst, n, me);
    else units<u8>(src, dst, n, me);
  }
}
