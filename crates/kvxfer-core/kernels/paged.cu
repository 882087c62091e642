// Between paged caches and contiguous chunks, or from pages to pages: every token of every layer, from where one side's layout has it
// to where the other's wants it, in one pass. The other side may be a peer's memory or pinned memory of the host.
//
// A token's bytes in one layer and plane (keys or values) are `units` runs of `unit` bytes, `head` apart: all heads at once where both sides
// keep them together, else one head each. Warps of a persistent grid take groups of tokens of one layer and plane; the lanes of a warp share a
// group's bytes without regard to where a token ends, so that all have work however short a token's bytes are.
#include "access.h"

static const u32 LAYERS = 64;

enum Mode : u32 { STRAIGHT = 0, BLOCKS = 1, SLOTS = 2 };

struct Side {
  u64 table;         // BLOCKS: u32 block ids; SLOTS: i64 slots; device-visible
  u64 plane, block, token, head;  // strides, bytes
  u32 mode, block_tokens, blocks, first;
  u64 layers[LAYERS];
};

struct Paged {
  Side from, to;
  u64 digest;        // where to add the digest; 0: none
  u64 skipped;       // where to count tokens whose block does not exist
  u32 layers, planes, tokens, group;
  u32 unit, units;   // bytes of a run, runs of a token
  u32 first_layer, all_layers;  // for the digest: this launch's layers among all
};

// First byte of a token in a plane of a layer, or 0 when its block does not exist.
INSIDE u64 place(const Side &s, u32 layer, u32 plane, u32 token) {
  const u64 base = s.layers[layer] + plane * s.plane;
  const u64 at = u64(s.first) + token;
  if (s.mode == STRAIGHT) return base + at * s.token;
  u64 block, within;
  if (s.mode == BLOCKS) {
    block = fixed32(near(s.table + at / s.block_tokens * 4, 4));
    within = at % s.block_tokens;
  } else {
    const i64 slot = i64(fixed64(near(s.table + at * 8, 8)));
    if (slot < 0) return 0;
    block = u64(slot) / s.block_tokens;
    within = u64(slot) % s.block_tokens;
  }
  return block < s.blocks ? base + block * s.block + within * s.token : 0;
}

// Final mixing of MurmurHash3's 64-bit variant (Appleby, public domain).
INSIDE u64 mix(u64 x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}
INSIDE u64 mixed(u64 word, u64 position) { return mix(word ^ (position + 1) * 0x9e3779b97f4a7c15ull); }
INSIDE u64 digest_of(Wide v, u64 position) {
  return mixed(u64(v.x) | u64(v.y) << 32, position) + mixed(u64(v.z) | u64(v.w) << 32, position + 1);
}
INSIDE u64 digest_of(u64 v, u64 position) { return mixed(v, position); }

// Groups of tokens. The number of tokens may be as large as 32 bits hold.
INSIDE u32 groups_of(const Paged &p) { return p.tokens / p.group + (p.tokens % p.group != 0); }

template <class T> INSIDE void paged(const Paged &p) {
  const u32 DEEP = 4;  // loads of a lane under way
  const u32 me = lane(), per_unit = p.unit / u32(sizeof(T)), per_token = per_unit * p.units;
  const u32 groups = groups_of(p);
  const u64 items = u64(p.layers) * p.planes * groups;
  const u32 words = u32(sizeof(T) / 8);
  u64 sum = 0, skipped = 0;
  for (u64 item = first_warp(); item < items; item += warps()) {
    const u32 group = u32(item % groups), plane = u32(item / groups % p.planes), layer = u32(item / groups / p.planes);
    const u32 begin = group * p.group, end = p.tokens - begin < p.group ? p.tokens : begin + p.group;
    const u32 count = (end - begin) * per_token;
    // Of the group's first word among those of the whole cache in KV_2LTD order, in words of 8 bytes.
    const u64 position = ((u64(plane) * p.all_layers + p.first_layer + layer) * p.tokens + begin) * per_token * words;
    // The token a lane is at.
    u32 token = end;
    u64 src = 0, dst = 0;
    for (u32 i = me; i < count; i += 32 * DEEP) {
      T v[DEEP];
      u64 to[DEEP];
#pragma unroll
      for (u32 k = 0; k < DEEP; ++k) {
        const u32 at = i + 32 * k, now = begin + at / per_token, w = at % per_token;
        v[k] = T();
        to[k] = 0;
        if (at >= count) continue;
        if (now != token) {
          token = now;
          src = place(p.from, layer, plane, token);
          dst = place(p.to, layer, plane, token);
        }
        if (!src || !dst) {
          // Once a token: at its first word in the first layer and plane.
          skipped += w == 0 && plane == 0 && p.first_layer + layer == 0;
          continue;
        }
        const u32 unit = p.units == 1 ? 0 : w / per_unit;
        const u64 off = u64(w - unit * per_unit) * sizeof(T);
        to[k] = near(dst + unit * p.to.head + off, sizeof(T));
        v[k] = Memory<T>::load(near(src + unit * p.from.head + off, sizeof(T)));
      }
#pragma unroll
      for (u32 k = 0; k < DEEP; ++k) {
        if (!to[k]) continue;
        Memory<T>::store(to[k], v[k]);
        if (p.digest) sum += digest_of(v[k], position + u64(i + 32 * k) * words);
      }
    }
  }
  // One lane of a warp adds: what all add to the same place goes one after the other.
  if (p.digest) sum = of_warp(sum);
  skipped = of_warp(skipped);
  if (sum) add(near(p.digest, 8), sum);
  if (skipped) add(near(p.skipped, 8), skipped);
}

KERNEL kvx_paged16(GRID_CONSTANT Paged p) { paged<Wide>(p); }
KERNEL kvx_paged8(GRID_CONSTANT Paged p) { paged<u64>(p); }
