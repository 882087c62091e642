// kvx_copy against memcpy.
#include "harness.h"

namespace {

u64 length(Random &random) {
  switch (random.below(6)) {
    case 0: return random.below(17);
    case 1: return 64;
    case 2: return random.below(300);
    case 3: return random.from_to(PART - 20, PART + 20);
    case 4: return random.below((64 << 10) + 1);
    default: return 64 << 10;
  }
}

int run(const Buffer &pieces, u32 count, u32 grid, u32 block) {
  return launch(grid, block, [&] { kvx_copy(pieces.at(), count); });
}

void random_pieces(Random &random) {
  const u32 count = u32(random.below(12));
  std::vector<Buffer> sources;
  Buffer table(count * sizeof(Piece), 8 * random.below(2));
  std::vector<Piece> pieces;
  u64 end = random.below(64);
  for (u32 i = 0; i < count; ++i) {
    const u64 len = length(random);
    sources.emplace_back(len, random.below(16));
    random.fill(sources.back());
    // Alike modulo 16, 8 or 4 now and then, else as it comes.
    u64 dst = end + random.below(40);
    const u64 alike = u64(1) << random.below(5), src = sources.back().at();
    dst += (src - dst) & (alike - 1);
    pieces.push_back({src, dst, len});
    end = dst + len;
  }
  Buffer target(end + random.below(64));
  random.fill(target);
  std::vector<u8> expected = target.copy();
  for (u32 i = 0; i < count; ++i) {
    // Up to here the target's own alignment is 64, so offsets are as good as addresses.
    std::memcpy(expected.data() + pieces[i].dst, sources[i].data(), pieces[i].len);
    pieces[i].dst += target.at();
  }
  if (count) std::memcpy(table.data(), pieces.data(), count * sizeof(Piece));
  CHECK(run(table, count, u32(random.from_to(1, 5)), 32 * u32(random.from_to(1, 8))) == 0, "%u pieces", count);
  CHECK(target.copy() == expected, "%u pieces: the bytes, or those around them", count);
}

// Whatever the size of the pieces, no warp has more to do than it must.
void all_warps_work(Random &random, u64 len) {
  const u32 grid = 4, block = 256, there = grid * block / 32, count = 4 * there;
  Buffer source(count * len), target(count * len), table(count * sizeof(Piece));
  random.fill(source);
  std::vector<Piece> pieces;
  for (u32 i = 0; i < count; ++i) pieces.push_back({source.at(i * len), target.at(i * len), len});
  std::memcpy(table.data(), pieces.data(), table.size());
  tally = {&source, {}, {}};
  CHECK(run(table, count, grid, block) == 0, "%llu bytes each", len);
  CHECK(target.copy() == source.copy(), "%llu bytes each", len);
  CHECK(tally.warps.size() == there, "%zu of %u warps work on pieces of %llu bytes", tally.warps.size(), there, len);
  for (auto &[warp, bytes] : tally.warps) CHECK(bytes == count / there * len, "warp %u moves %llu bytes", warp, bytes);
  tally = {};
}

void what_is_not_there() {
  Buffer source(64), target(64), table(sizeof(Piece));
  const Piece beyond{source.at(), target.at(8), 64};
  std::memcpy(table.data(), &beyond, sizeof beyond);
  CHECK(run(table, 1, 1, 32) == 700, "a piece that ends outside its memory");
}

}  // namespace

void copies(Random &random, int rounds) {
  for (int i = 0; i < rounds; ++i) random_pieces(random);
  for (u64 len : {u64(64), u64(4096), u64(PART), u64(64 << 10)}) all_warps_work(random, len);
  what_is_not_there();
}
