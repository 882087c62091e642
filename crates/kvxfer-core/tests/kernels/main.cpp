// kernels SEED ROUNDS: the kernels against models that know nothing of them. Exit code 0: all held.
#include "harness.h"

Tally tally;
static std::map<u64, u64> &live() {
  static std::map<u64, u64> ranges;
  return ranges;
}

Buffer::Buffer(size_t size, size_t off) : off_(off), size_(size) {
  void *p = nullptr;
  if (posix_memalign(&p, 64, off + size + (off + size == 0))) std::abort();
  base_ = static_cast<u8 *>(p);
  live()[at()] = size;
}
Buffer::~Buffer() {
  if (!base_) return;
  live().erase(at());
  std::free(base_);
}

extern "C" void *standin_translate(uint64_t at, size_t size) {
  auto range = live().upper_bound(at);
  if (range == live().begin()) return nullptr;
  --range;
  if (at - range->first > range->second || size > range->second - (at - range->first)) return nullptr;
  if (tally.of && range->first == tally.of->at()) {
    tally.lanes[lane()] += size;
    if (lane() == 0) tally.warps[first_warp()] += size;
  }
  return reinterpret_cast<void *>(at);
}

int main(int argc, char **argv) {
  Random random{argc > 1 ? std::strtoull(argv[1], nullptr, 10) | 1 : 1};
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 100;
  copies(random, rounds);
  paged_moves(random, rounds);
  std::puts("the kernels do what the models do");
}
