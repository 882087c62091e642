// The CPU twin of copy.cu.
#include "../copy.cu"

#include "../../../kvxfer-cuda-standin/standin/twin.h"

static const size_t parameters[] = {8, 4, 0};
static const standin_twin twin("kvx_copy", parameters, [](const Grid &g, void **p) {
  const u64 pieces = *static_cast<u64 *>(p[0]);
  const u32 count = *static_cast<u32 *>(p[1]);
  return every_thread(g.grid, g.block, [=] { kvx_copy(pieces, count); });
});
