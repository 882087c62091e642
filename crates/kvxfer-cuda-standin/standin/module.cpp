// Modules and launches: a module is PTX text or machine code (an ELF file), a launch runs the CPU twin of the kernel that it names.
#include "memory.h"
#include "twin.h"

#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

using namespace standin;

static const standin_twin *&twins() {
  static const standin_twin *first = nullptr;
  return first;
}
standin_twin::standin_twin(const char *n, const size_t *p, int (*r)(const Grid &, void **))
    : name(n), parameters(p), run(r), next(twins()) {
  twins() = this;
}
// Accesses of kernels that would cross the bus.
static std::atomic<int64_t> host_accesses{0};
extern "C" void *standin_translate(uint64_t at, size_t size) {
  if (is_device(at)) return translate(at, size);
  ++host_accesses;
  return reinterpret_cast<void *>(at);
}
API int64_t kvxstandin_kernel_host_accesses() { return host_accesses; }

// What a launch finds changed: a stray write of somebody else's.
struct Poke {
  size_t word, offset;
  uint32_t value;
};
static std::vector<Poke> pokes;
static std::mutex poking;
// Before each later launch, 4 bytes at `offset` from the address that is the first parameter's 8-byte word number `word`.
API void kvxstandin_poke(size_t word, size_t offset, uint32_t value) {
  std::lock_guard<std::mutex> hold(poking);
  pokes.push_back({word, offset, value});
}
API void kvxstandin_poke_no_more() {
  std::lock_guard<std::mutex> hold(poking);
  pokes.clear();
}
static void poke(const std::string &parameter) {
  std::lock_guard<std::mutex> hold(poking);
  for (const Poke &p : pokes) {
    uint64_t at;
    memcpy(&at, parameter.data() + 8 * p.word, 8);
    at += p.offset;
    if (void *to = is_device(at) ? translate(at, 4) : reinterpret_cast<void *>(at)) memcpy(to, &p.value, 4);
  }
}

namespace {

struct Function {
  const standin_twin *twin;
  Context *context;
};
struct Module {
  std::string text;
  Context *context;
  std::map<std::string, Function> functions;
};
std::set<Module *> modules;

void complain(unsigned n, const int *options, void **values, const char *text) {
  char *buffer = nullptr;
  size_t size = 0;
  for (unsigned i = 0; options && values && i < n; ++i) {
    if (options[i] == 5) buffer = static_cast<char *>(values[i]);
    if (options[i] == 6) size = size_t(values[i]);
  }
  if (buffer && size) snprintf(buffer, size, "%s", text);
}

bool is_elf(const void *image) { return !memcmp(image, ELFMAG, SELFMAG); }

// A text ends with a NUL; an ELF file with the last thing that its headers name.
std::string bytes_of(const void *image) {
  const char *at = static_cast<const char *>(image);
  if (!is_elf(image)) return at;
  Elf64_Ehdr head;
  memcpy(&head, image, sizeof head);
  uint64_t end = std::max(head.e_shoff + uint64_t(head.e_shnum) * head.e_shentsize,
                          head.e_phoff + uint64_t(head.e_phnum) * head.e_phentsize);
  for (unsigned i = 0; i < head.e_shnum; ++i) {
    Elf64_Shdr s;
    memcpy(&s, at + head.e_shoff + i * head.e_shentsize, sizeof s);
    if (s.sh_type != SHT_NOBITS) end = std::max<uint64_t>(end, s.sh_offset + s.sh_size);
  }
  return {at, end};
}

CUresult load(Module **out, const void *image, unsigned n, const int *options, void **values) {
  Context *c;
  if (CUresult r = current(&c)) return r;
  if (!out || !image) return INVALID_VALUE;
  std::string text = bytes_of(image);
  if (is_elf(image)) {
    // Its kernels are among its names.
  } else if (text.find(".version") == std::string::npos || text.find(".target") == std::string::npos) {
    complain(n, options, values, "ptxas fatal: Missing .version directive at start of file");
    return INVALID_PTX;
  }
  Module *m = new Module{std::move(text), c, {}};
  std::lock_guard<std::mutex> hold(world());
  modules.insert(m);
  live("modules", 1);
  *out = m;
  return SUCCESS;
}

}  // namespace

API CUresult cuModuleLoadData(Module **out, const void *image) {
  READY(cuModuleLoadData);
  return load(out, image, 0, nullptr, nullptr);
}
API CUresult cuModuleLoadDataEx(Module **out, const void *image, unsigned n, const int *options, void **values) {
  READY(cuModuleLoadDataEx);
  return load(out, image, n, options, values);
}
API CUresult cuModuleUnload(Module *m) {
  READY(cuModuleUnload);
  std::lock_guard<std::mutex> hold(world());
  if (!modules.erase(m)) return INVALID_HANDLE;
  delete m;
  live("modules", -1);
  return SUCCESS;
}
API CUresult cuModuleGetFunction(Function **out, Module *m, const char *name) {
  READY(cuModuleGetFunction);
  std::lock_guard<std::mutex> hold(world());
  if (!out || !name) return INVALID_VALUE;
  if (!modules.count(m)) return INVALID_HANDLE;
  std::string entry = is_elf(m->text.data()) ? std::string(1, '\0') + name + '\0' : std::string(".entry ") + name + "(";
  if (m->text.find(entry) == std::string::npos) return NOT_FOUND;
  for (const standin_twin *t = twins(); t; t = t->next)
    if (!strcmp(t->name, name)) {
      *out = &(m->functions[name] = Function{t, m->context});
      return SUCCESS;
    }
  fprintf(stderr, "kvxfer stand-in: the kernel %s has no CPU twin\n", name);
  return NOT_FOUND;
}
API CUresult cuFuncGetAttribute(int *out, int, Function *f) {
  READY(cuFuncGetAttribute);
  if (!out || !f) return INVALID_VALUE;
  *out = 0;
  return SUCCESS;
}
API CUresult cuFuncSetAttribute(Function *f, int, int) {
  READY(cuFuncSetAttribute);
  return f ? SUCCESS : INVALID_HANDLE;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, Function *f, int block, size_t) {
  READY(cuOccupancyMaxActiveBlocksPerMultiprocessor);
  if (!out || !f || block < 1) return INVALID_VALUE;
  *out = 2048 / block;
  return SUCCESS;
}
API CUresult cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, void *handle, void **parameters, void **extra) {
  READY(cuLaunchKernel);
  std::shared_ptr<Stream> s;
  if (CUresult r = stream_of(handle, &s)) return r;
  if (!f || !parameters || !gx || !gy || !gz || !bx || !by || !bz || uint64_t(bx) * by * bz > 1024 || extra || shared > 227 << 10)
    return INVALID_VALUE;
  const standin_twin *twin = f->twin;
  auto copy = std::make_shared<std::vector<std::string>>();
  for (size_t i = 0; twin->parameters[i]; ++i)
    copy->emplace_back(static_cast<const char *>(parameters[i]), twin->parameters[i]);
  Grid grid{{gx, gy, gz}, {bx, by, bz}};
  s->push([=]() -> CUresult {
    std::vector<void *> at;
    for (auto &p : *copy) at.push_back(p.data());
    std::shared_lock<std::shared_mutex> hold(mapping());
    poke(copy->front());
    return twin->run(grid, at.data());
  });
  return SUCCESS;
}
