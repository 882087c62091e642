// How a kernel's CPU twin is found: the sources in kvxfer-core/kernels/twin define one `standin_twin` object for each kernel.
#pragma once
#include <cstddef>
#include <cstdint>

struct Grid {
  unsigned grid[3], block[3];
};
// Turns a device address into one the host can use; null when nothing is allocated there.
extern "C" void *standin_translate(uint64_t at, size_t size);

struct standin_twin {
  const char *name;
  // Bytes of each parameter, ended by a zero: they are copied at the launch, as the driver does.
  const size_t *parameters;
  // Non-zero is a CUDA error.
  int (*run)(const Grid &grid, void **parameters);
  const standin_twin *next;
  standin_twin(const char *n, const size_t *p, int (*r)(const Grid &, void **));
};
