// The kernels' own sources on the host, and what the tests of this folder share.
#pragma once
#include "../../kernels/copy.cu"
#include "../../kernels/paged.cu"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#define CHECK(what, ...)                                                \
  do {                                                                  \
    if (!(what)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #what);   \
      std::fprintf(stderr, __VA_ARGS__);                                \
      std::fprintf(stderr, "\n");                                       \
      std::exit(1);                                                     \
    }                                                                   \
  } while (0)

// Memory that a "device" reaches, and nothing else: each buffer is an allocation of exactly its size, so that the address sanitizer sees a
// byte too far, and `near` refuses what lies in none.
class Buffer {
 public:
  // The bytes begin `off` after a multiple of 64.
  Buffer(size_t size, size_t off = 0);
  ~Buffer();
  Buffer(Buffer &&other) noexcept : base_(other.base_), off_(other.off_), size_(other.size_) { other.base_ = nullptr; }
  Buffer(const Buffer &) = delete;
  u8 *data() const { return base_ + off_; }
  u64 at(u64 offset = 0) const { return reinterpret_cast<u64>(data()) + offset; }
  size_t size() const { return size_; }
  std::vector<u8> copy() const { return {data(), data() + size_}; }

 private:
  u8 *base_;
  size_t off_, size_;
};

struct Random {
  u64 state;
  u64 next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  u64 below(u64 n) { return next() % n; }
  u64 from_to(u64 first, u64 last) { return first + below(last - first + 1); }
  bool coin() { return next() >> 32 & 1; }
  void fill(const Buffer &b) {
    for (size_t i = 0; i < b.size(); ++i) b.data()[i] = u8(next() >> 24);
  }
  template <class T> void shuffle(std::vector<T> &v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(i)]);
  }
};

// Bytes that each warp, and each lane of any warp, asked for within one buffer: how evenly work is spread.
struct Tally {
  const Buffer *of = nullptr;
  std::map<u32, u64> warps, lanes;
};
extern Tally tally;

// As a launch: every thread of the grid. What the driver would answer.
template <class Body> int launch(u32 grid, u32 block, Body body) {
  const unsigned g[3] = {grid, 1, 1}, b[3] = {block, 1, 1};
  return every_thread(g, b, body);
}

void copies(Random &random, int rounds);
void paged_moves(Random &random, int rounds);
