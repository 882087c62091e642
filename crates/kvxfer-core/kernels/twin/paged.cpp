// The CPU twins of paged.cu.
#include "../paged.cu"

#include "../../../kvxfer-cuda-standin/standin/twin.h"

// What the library fills in; it checks the same numbers.
static_assert(sizeof(Side) == 568 && sizeof(Paged) == 1184, "gather/params.rs has these structures too");

static const size_t parameters[] = {sizeof(Paged), 0};
static const standin_twin wide("kvx_paged16", parameters, [](const Grid &g, void **p) {
  const Paged &paged = *static_cast<Paged *>(p[0]);
  return every_thread(g.grid, g.block, [&] { kvx_paged16(paged); });
});
static const standin_twin narrow("kvx_paged8", parameters, [](const Grid &g, void **p) {
  const Paged &paged = *static_cast<Paged *>(p[0]);
  return every_thread(g.grid, g.block, [&] { kvx_paged8(paged); });
});
