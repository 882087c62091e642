// kvx_paged16 and kvx_paged8 against a model that knows each layout by the formula of its shape's indices, and nothing of strides.
#include "harness.h"

namespace {

enum Kind { KV_NHD, B2_NHD, KV_HND, B2_HND, LATENT, CHUNK_2LTD, LAYER_T2D, CHUNK_LATENT, KINDS };

u64 flat(std::initializer_list<std::pair<u64, u64>> index_of_size) {
  u64 at = 0;
  for (auto [index, size] : index_of_size) {
    CHECK(index < size, "%llu of %llu", index, size);
    at = at * size + index;
  }
  return at;
}

// One side: a cache with more heads, layers and blocks than are meant.
struct Cache {
  Kind kind;
  u64 layers, blocks, block, heads, head;
  std::vector<Buffer> memory;

  u64 planes() const { return kind == LATENT || kind == CHUNK_LATENT ? 1 : 2; }
  bool straight() const { return kind >= CHUNK_2LTD; }
  bool one_memory() const { return kind == CHUNK_2LTD || kind == CHUNK_LATENT; }
  // Of straight ones: `block` tokens in one block.
  u64 index(u64 l, u64 p, u64 b, u64 t, u64 h) const {
    const std::pair<u64, u64> L{l, layers}, P{p, 2}, B{b, blocks}, T{t, block}, H{h, heads};
    switch (kind) {
      case KV_NHD: return head * flat({P, B, T, H});
      case B2_NHD: return head * flat({B, P, T, H});
      case KV_HND: return head * flat({P, B, H, T});
      case B2_HND: return head * flat({B, P, H, T});
      case LATENT: return head * flat({B, T, H});
      case CHUNK_2LTD: return head * flat({P, L, T, H});
      case LAYER_T2D: return head * flat({T, P, H});
      default: return head * flat({L, T, H});
    }
  }
  u64 size() const { return planes() * blocks * block * heads * head * (one_memory() ? layers : 1); }
  const Buffer &of(u64 l) const { return memory[one_memory() ? 0 : l]; }
  void make(Random &random, u64 step) {
    for (u64 l = 0; l < (one_memory() ? 1 : layers); ++l) {
      memory.emplace_back(size(), step * random.below(3));
      random.fill(memory.back());
    }
  }
};

// Which part of a cache is meant.
struct Part {
  Cache *cache;
  std::vector<u64> layers;
  u64 first_head, first, heads;
  u32 mode;
  std::vector<u32> blocks;
  std::vector<i64> slots;
  std::unique_ptr<Buffer> table;

  // Place of a token among the cache's: false where its block does not exist.
  bool find(u64 token, u64 *b, u64 *t) const {
    const Cache &c = *cache;
    u64 at = first + token;
    if (mode == SLOTS) {
      if (slots[at] < 0) return false;
      at = u64(slots[at]);
    }
    *b = at / c.block;
    *t = at % c.block;
    if (mode == BLOCKS) *b = blocks[*b];
    return *b < c.blocks;
  }
  u64 step(u64 p, u64 b, u64 t, u64 h) const {
    const Cache &c = *cache;
    const bool there = p < c.planes() && b < c.blocks && t < c.block && h < c.heads;
    return there ? c.index(0, p, b, t, h) - c.index(0, 0, 0, 0, 0) : 0;
  }
  Side side(u64 from_layer, u64 count) const {
    Side s{};
    s.table = table ? table->at() : 0;
    s.plane = step(1, 0, 0, 0);
    s.block = step(0, 1, 0, 0);
    s.token = step(0, 0, 1, 0);
    s.head = step(0, 0, 0, 1);
    s.mode = mode;
    s.block_tokens = u32(cache->block);
    s.blocks = u32(cache->blocks);
    s.first = u32(first);
    for (u64 i = 0; i < count; ++i) {
      const u64 l = layers[from_layer + i];
      s.layers[i] = cache->of(l).at(cache->index(l, 0, 0, 0, first_head));
    }
    return s;
  }
  bool whole() const { return heads == 1 || step(0, 0, 0, 1) == cache->head; }
};

std::unique_ptr<Buffer> words(const void *bytes, size_t size) {
  auto b = std::make_unique<Buffer>(size);
  if (size) std::memcpy(b->data(), bytes, size);
  return b;
}

Part part(Random &random, Cache &c, u64 tokens, u64 layers, u64 heads, bool damaged) {
  Part p{};
  p.cache = &c;
  p.heads = heads;
  p.first_head = random.below(c.heads - heads + 1);
  for (u64 l = 0; l < c.layers; ++l) p.layers.push_back(l);
  random.shuffle(p.layers);
  p.layers.resize(layers);
  const u64 room = c.blocks * c.block;
  if (c.straight()) {
    p.mode = STRAIGHT;
    p.first = random.below(room - tokens + 1);
    return p;
  }
  p.mode = random.coin() ? BLOCKS : SLOTS;
  if (p.mode == BLOCKS) {
    p.first = random.below(std::min(c.block, room - tokens + 1));
    for (u64 b = 0; b < c.blocks; ++b) p.blocks.push_back(u32(b));
    random.shuffle(p.blocks);
    p.blocks.resize((p.first + tokens + c.block - 1) / c.block);
    for (u32 &b : p.blocks)
      if (damaged && random.below(3) == 0) b = random.coin() ? u32(c.blocks) : u32(random.next()) | 1u << 31;
    p.table = words(p.blocks.data(), p.blocks.size() * 4);
  } else {
    for (u64 s = 0; s < room; ++s) p.slots.push_back(i64(s));
    random.shuffle(p.slots);
    p.slots.resize(tokens);
    for (i64 &s : p.slots)
      if (damaged && random.below(3) == 0) s = random.coin() ? i64(room) : random.coin() ? -1 : i64(random.next());
    p.table = words(p.slots.data(), p.slots.size() * 8);
  }
  return p;
}

u64 model_mix(u64 x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

struct Outcome {
  u64 digest = 0, skipped = 0;
};

// Token by token, head by head, to `target`: what each memory of `to` should hold afterwards.
Outcome model(const Part &from, const Part &to, u64 tokens, std::vector<std::vector<u8>> &target) {
  Outcome out;
  const Cache &a = *from.cache, &b = *to.cache;
  u64 position = 0;
  for (u64 p = 0; p < a.planes(); ++p)
    for (u64 l = 0; l < from.layers.size(); ++l)
      for (u64 t = 0; t < tokens; ++t) {
        u64 ab, at, bb, bt;
        const bool there = from.find(t, &ab, &at) && to.find(t, &bb, &bt);
        out.skipped += !there && p == 0 && l == 0;
        for (u64 h = 0; h < from.heads; ++h) {
          if (!there) {
            position += a.head / 8;
            continue;
          }
          const u8 *src = a.of(from.layers[l]).data() + a.index(from.layers[l], p, ab, at, from.first_head + h);
          auto &memory = target[b.one_memory() ? 0 : to.layers[l]];
          std::memcpy(memory.data() + b.index(to.layers[l], p, bb, bt, to.first_head + h), src, a.head);
          for (u64 w = 0; w < a.head; w += 8) {
            u64 word;
            std::memcpy(&word, src + w, 8);
            out.digest += model_mix(word ^ ++position * 0x9e3779b97f4a7c15ull);
          }
        }
      }
  return out;
}

Cache cache(Random &random, bool latent, u64 tokens, u64 layers, u64 heads, u64 head, u64 step) {
  static const Kind pairs[] = {KV_NHD, B2_NHD, KV_HND, B2_HND, CHUNK_2LTD, LAYER_T2D}, rows[] = {LATENT, CHUNK_LATENT};
  Cache c{};
  c.kind = latent ? rows[random.below(2)] : pairs[random.below(6)];
  c.layers = layers + random.below(3);
  c.heads = latent ? heads : heads + random.below(4);
  c.head = head;
  if (c.straight()) {
    c.blocks = 1;
    c.block = tokens + random.below(5);
  } else {
    c.block = random.from_to(1, 20);
    c.blocks = (tokens + c.block - 1) / c.block + random.below(4);
  }
  c.make(random, step);
  return c;
}

void random_move(Random &random) {
  const bool wide = random.coin(), latent = random.below(4) == 0, damaged = random.below(3) == 0, digest = random.coin();
  const u64 step = wide ? 16 : 8, head = step * random.from_to(1, wide ? 9 : 18), heads = latent ? 1 : random.from_to(1, 5);
  const u64 tokens = random.from_to(1, 60), layers = random.from_to(1, 4);
  Cache a = cache(random, latent, tokens, layers, heads, head, step), b = cache(random, latent, tokens, layers, heads, head, step);
  const Part from = part(random, a, tokens, layers, heads, damaged && random.coin()), to = part(random, b, tokens, layers, heads, damaged);

  std::vector<std::vector<u8>> expected, sources;
  for (const Buffer &m : b.memory) expected.push_back(m.copy());
  for (const Buffer &m : a.memory) sources.push_back(m.copy());
  const Outcome wanted = model(from, to, tokens, expected);

  Buffer sum(8), skipped(8);
  std::memset(sum.data(), 0, 8);
  std::memset(skipped.data(), 0, 8);
  const bool rows = from.whole() && to.whole() && random.below(4);
  // In one launch or two.
  const u64 cut = random.below(layers + 1);
  for (auto [first, end] : {std::pair<u64, u64>{0, cut}, {cut, layers}}) {
    Paged p{};
    p.from = from.side(first, end - first);
    p.to = to.side(first, end - first);
    p.digest = digest ? sum.at() : 0;
    p.skipped = skipped.at();
    p.layers = u32(end - first);
    p.planes = u32(a.planes());
    p.tokens = u32(tokens);
    p.group = u32(random.from_to(1, 70));
    p.unit = u32(rows ? head * heads : head);
    p.units = u32(rows ? 1 : heads);
    p.first_layer = u32(first);
    p.all_layers = u32(layers);
    const int result = launch(u32(random.from_to(1, 3)), 32 * u32(random.from_to(1, 8)), [&] {
      if (wide) kvx_paged16(p);
      else kvx_paged8(p);
    });
    CHECK(result == 0, "kind %d to %d: error %d", a.kind, b.kind, result);
  }
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK(b.memory[i].copy() == expected[i], "kind %d to %d, memory %zu: the bytes, or those around them", a.kind, b.kind, i);
  for (size_t i = 0; i < sources.size(); ++i) CHECK(a.memory[i].copy() == sources[i], "the source changed");
  u64 got;
  std::memcpy(&got, skipped.data(), 8);
  CHECK(got == wanted.skipped, "kind %d to %d: %llu tokens skipped, %llu expected", a.kind, b.kind, got, wanted.skipped);
  std::memcpy(&got, sum.data(), 8);
  CHECK(got == (digest ? wanted.digest : 0), "kind %d to %d: digest %llx, %llx expected", a.kind, b.kind, got, wanted.digest);
}

// Tokens of few bytes, as a rank with one head has them, keep every lane of a warp busy.
void all_lanes_work(Random &random, u64 head) {
  Cache a{CHUNK_2LTD, 1, 1, 64, 1, head, {}}, b{CHUNK_2LTD, 1, 1, 64, 1, head, {}};
  a.make(random, 0);
  b.make(random, 0);
  const Part from = part(random, a, 64, 1, 1, false), to = part(random, b, 64, 1, 1, false);
  Buffer skipped(8);
  std::memset(skipped.data(), 0, 8);
  Paged p{};
  p.from = from.side(0, 1);
  p.to = to.side(0, 1);
  p.skipped = skipped.at();
  p.layers = p.units = p.all_layers = 1;
  p.planes = 2;
  p.tokens = 64;
  p.group = 32;
  p.unit = u32(head);
  tally = {&a.memory[0], {}, {}};
  CHECK(launch(1, 32, [&] { kvx_paged16(p); }) == 0, "a head of %llu bytes", head);
  CHECK(a.memory[0].copy() == b.memory[0].copy(), "a head of %llu bytes", head);
  CHECK(tally.lanes.size() == 32, "%zu of 32 lanes work on tokens of %llu bytes", tally.lanes.size(), head);
  for (auto &[lane, bytes] : tally.lanes) CHECK(bytes == 2 * 64 * head / 32, "lane %u reads %llu bytes", lane, bytes);
  tally = {};
}

// The most tokens that a launch can name.
void groups_do_not_wrap() {
  Paged p{};
  p.tokens = 0xffffffffu;
  p.group = 1024;
  CHECK(groups_of(p) == 1u << 22, "%u groups", groups_of(p));
  p.group = 1;
  CHECK(groups_of(p) == 0xffffffffu, "%u groups", groups_of(p));
}

}  // namespace

void paged_moves(Random &random, int rounds) {
  for (int i = 0; i < rounds; ++i) random_move(random);
  for (u64 head : {u64(16), u64(64), u64(256), u64(1024)}) all_lanes_work(random, head);
  groups_do_not_wrap();
}
