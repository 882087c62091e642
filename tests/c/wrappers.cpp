// The C++ wrapper: chunks that are asked for and read back, and a paged cache; with the argument `device`, in a process that has a CUDA
// driver, what concerns a GPU.
#include <kvxfer.hpp>

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define TRUE(condition)                                                                  \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

namespace {

constexpr kvxfer::Milliseconds wait{20000};
constexpr std::uint64_t page_bytes = 16384, length = 1000;

/// The code that `call` fails with.
template <class F>
kvxfer_result_t failure(F call) {
  try {
    call();
  } catch (const kvxfer::Error &e) {
    TRUE(std::strlen(e.what()) > 0);
    return e.code();
  }
  return KVXFER_OK;
}

kvxfer::Geometry geometry() {
  kvxfer::Geometry g;
  g.model = "test/model";
  g.dtype = "bfloat16";
  g.page_bytes = page_bytes;
  g.chunk_tokens = 16;
  return g;
}

void found() {
  kvxfer::Config there, here;
  there.name = "decoder";
  there.listen = {"tcp://127.0.0.1:0"};
  here.name = "prefiller";
  kvxfer::Agent decoder(there), prefiller(here);
  kvxfer::Receiver pool(decoder, "kv", geometry(), 4);
  kvxfer::Region source = prefiller.allocate(page_bytes), target = prefiller.allocate(page_bytes);
  for (std::uint64_t i = 0; i < page_bytes; i++) source.data()[i] = static_cast<unsigned char>(i * 13 + i / 251);

  kvxfer::Sender sender(prefiller, decoder.addresses().at(0), "kv", geometry(), wait);
  kvxfer::Reservation request = sender.reserve("request", {{"a", length}, {"b", length}});
  request.wait_admitted(wait);
  request.write(0, source, {{0, length}});
  request.write(1, source, {{4000, length}});
  TRUE(request.finish().wait(wait));

  // A lease of zero asks and holds nothing.
  kvxfer::Found asked = sender.query({"a", "nobody's", "b"}, kvxfer::Milliseconds{0}, wait);
  TRUE(asked.size() == 2 && asked.lease().count() == 0);
  TRUE(asked.chunk(0).index == 0 && asked.chunk(1).index == 2 && asked.chunk(1).length == length);
  TRUE(failure([&] { asked.chunk(2); }) == KVXFER_OUT_OF_RANGE);
  TRUE(pool.stats().pinned == 0);

  kvxfer::Found held = sender.query({"nobody's", "b"}, wait, wait);
  TRUE(held.size() == 1 && held.lease().count() > 0 && pool.stats().pinned == 1);
  // Two runs, the second half first in memory.
  kvxfer_read_report_t report = held.read({{1, &target, {{500, 600}, {100, 400}}}}, wait);
  TRUE(report.bytes == length && report.chunks == 1 && report.took_ns > 0);
  TRUE(std::memcmp(target.data() + 500, source.data() + 4000, 600) == 0);
  TRUE(std::memcmp(target.data() + 100, source.data() + 4600, 400) == 0);
  TRUE(failure([&] { held.read({{1, &target, {{0, length}}}}, wait); }) == KVXFER_CLOSED);

  // What has moved goes on, and what goes gives back.
  static_assert(!std::is_copy_constructible<kvxfer::Found>::value, "one owner");
  kvxfer::Found first = sender.query({"a"}, wait, wait), moved(std::move(first));
  TRUE(!first && moved.size() == 1);
  TRUE(failure([&] { moved.read({{0, nullptr, {{0, length}}}}, wait); }) == KVXFER_INVALID_ARGUMENT);
  TRUE(failure([&] { first.size(); }) == KVXFER_INVALID_ARGUMENT);
}

void paged() {
  constexpr std::uint64_t blocks = 3;
  constexpr std::uint32_t heads = 2, block_size = 4, head_size = 6;
  constexpr std::size_t elements = blocks * heads * 2 * block_size * head_size;
  std::vector<std::vector<std::uint16_t>> layers(2, std::vector<std::uint16_t>(elements));
  for (std::size_t l = 0; l < layers.size(); l++) {
    for (std::size_t i = 0; i < elements; i++) layers[l][i] = static_cast<std::uint16_t>(1 + i + l * 20000);
  }
  kvxfer::PagedCache cache;
  cache.layers = {layers[0].data(), layers[1].data()};
  cache.layer_bytes = elements * 2;
  cache.blocks = blocks;
  cache.heads = heads;
  cache.block_size = block_size;
  cache.head_size = head_size;

  std::vector<std::int64_t> slots{9, 10, 2};
  std::vector<std::uint16_t> out(2 * layers.size() * slots.size() * heads * head_size);
  std::vector<kvxfer_paged_chunk_t> chunks{{slots.data(), slots.size(), 0, out.data(), out.size() * 2}};
  cache.gather(chunks);
  std::size_t at = 0;
  for (std::size_t value = 0; value < 2; value++) {
    for (const auto &layer : layers) {
      for (std::int64_t slot : slots) {
        std::size_t block = static_cast<std::size_t>(slot) / block_size, place = static_cast<std::size_t>(slot) % block_size;
        for (std::size_t head = 0; head < heads; head++) {
          std::size_t half = ((block * heads + head) * 2 + value) * block_size * head_size;
          for (std::size_t i = 0; i < head_size; i++) {
            TRUE(out[at++] == layer[half + (value ? place * head_size + i : i * block_size + place)]);
          }
        }
      }
    }
  }
  auto before = layers;
  for (auto &layer : layers) layer.assign(elements, 0);
  cache.scatter(chunks);
  std::size_t written = 0;
  for (std::size_t l = 0; l < layers.size(); l++) {
    for (std::size_t i = 0; i < elements; i++) {
      TRUE(layers[l][i] == 0 || layers[l][i] == before[l][i]);
      written += layers[l][i] != 0;
    }
  }
  TRUE(written == out.size());

  slots[1] = blocks * block_size;
  TRUE(failure([&] { cache.gather(chunks); }) == KVXFER_INVALID_ARGUMENT);
  cache.element_bytes = 3;
  TRUE(failure([&] { cache.gather({}); }) == KVXFER_INVALID_ARGUMENT);
}

/// The driver as an engine uses it, by hand: the wrapper needs nothing of it.
struct Cuda {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  void *context = nullptr, *stream = nullptr;

  template <class... A>
  void call(const char *name, A... arguments) {
    auto f = reinterpret_cast<int (*)(A...)>(dlsym(library, name));
    TRUE(f != nullptr);
    int result = f(arguments...);
    if (result) std::fprintf(stderr, "%s: %d\n", name, result);
    TRUE(result == 0);
  }
  Cuda() {
    TRUE(library != nullptr);
    call("cuInit", 0u);
    call("cuDevicePrimaryCtxRetain", &context, 0);
    call("cuCtxPushCurrent_v2", context);
    call("cuStreamCreate", &stream, 1u);
  }
  ~Cuda() {
    void *popped = nullptr;
    call("cuStreamDestroy_v2", stream);
    call("cuCtxPopCurrent_v2", &popped);
    call("cuDevicePrimaryCtxRelease_v2", 0);
  }
  /// The stream does nothing for a while.
  void sleep(std::uintptr_t micros) {
    void (*nap)(void *) = [](void *us) { usleep(static_cast<useconds_t>(reinterpret_cast<std::uintptr_t>(us))); };
    call("cuLaunchHostFunc", stream, nap, reinterpret_cast<void *>(micros));
  }
  void fill(std::uint64_t at, unsigned char value, std::size_t n) { call("cuMemsetD8Async", at, value, n, stream); }
};

std::vector<unsigned char> bytes(const kvxfer::Region &region) {
  std::vector<unsigned char> out(region.size());
  region.read(0, out.data(), out.size());
  return out;
}

/// Every byte of `region` is `value`.
bool all(const kvxfer::Region &region, unsigned char value) {
  for (unsigned char b : bytes(region)) {
    if (b != value) return false;
  }
  return true;
}

void device_regions_and_fences(Cuda &cuda) {
  kvxfer::Config there, here;
  there.name = "decoder";
  there.listen = {"tcp://127.0.0.1:0"};
  here.name = "prefiller";
  kvxfer::Agent decoder(there), prefiller(here);

  kvxfer::Region target = decoder.allocate_device(0, length), source = prefiller.allocate_device(0, length, true);
  kvxfer::Region host = prefiller.allocate(length);
  TRUE(target.device() == 0 && source.device() == 0 && !host.device());
  TRUE(target.size() == length && all(target, 0));
  host.pin();
  target.pin();
  std::vector<unsigned char> some(100);
  for (std::size_t i = 0; i < some.size(); i++) some[i] = static_cast<unsigned char>(i + 1);
  source.write(50, some.data(), some.size());
  std::vector<unsigned char> back(some.size());
  source.read(50, back.data(), back.size());
  TRUE(back == some);
  TRUE(failure([&] { source.read(length - 99, back.data(), back.size()); }) == KVXFER_OUT_OF_RANGE);
  TRUE(failure([&] { prefiller.allocate_device(99, length); }) == KVXFER_NOT_AVAILABLE);

  // An address of the engine's own, as it is and as a pointer.
  std::uint64_t own = 0;
  cuda.call("cuMemAlloc_v2", &own, std::size_t{length});
  kvxfer::Region foreign = prefiller.register_device(own, length);
  TRUE(foreign.device() == 0 && foreign.data() == reinterpret_cast<unsigned char *>(own));
  TRUE(foreign.free() == KVXFER_OK);
  foreign = prefiller.register_memory(reinterpret_cast<void *>(own), length);
  TRUE(foreign.device() == 0);

  // Nothing leaves before the fence.
  target.export_as("target", KVXFER_ACCESS_WRITE);
  kvxfer::Peer peer = prefiller.connect(decoder.addresses().at(0), wait);
  kvxfer::RemoteRegion remote = peer.region("target", wait);
  cuda.fill(own, 1, length);
  cuda.sleep(100000);
  cuda.fill(own, 2, length);
  kvxfer::TransferOptions options;
  {
    kvxfer::Fence fence(0, cuda.stream);
    options.after = &fence;
    kvxfer::Transfer transfer = peer.write(foreign, remote, {{0, 0, length}}, options);
    TRUE(!fence.poll() && !transfer.poll());
    // The transfer has its own hold on it.
    TRUE(fence.free() == KVXFER_OK);
    TRUE(transfer.wait(wait) && all(target, 2));
    TRUE(transfer.report()->transport == KVXFER_TRANSPORT_CUDA_IPC);
  }
  kvxfer::Fence passed(0, cuda.stream);
  while (!passed.poll()) usleep(1000);
  TRUE(failure([] { kvxfer::Fence nowhere(99); }) == KVXFER_NOT_AVAILABLE);

  // Nor a chunk's bytes.
  kvxfer::Receiver pool(decoder, "kv", geometry(), 4);
  kvxfer::Sender sender(prefiller, decoder.addresses().at(0), "kv", geometry(), wait);
  kvxfer::Reservation request = sender.reserve("request", {{"a", length}});
  request.wait_admitted(wait);
  cuda.sleep(100000);
  cuda.fill(own, 3, length);
  kvxfer::Fence fence(0, cuda.stream);
  request.write(0, foreign, {{0, length}}, &fence);
  TRUE(!fence.poll() && pool.lookup("a") != KVXFER_LOOKUP_PRESENT);
  TRUE(request.finish().wait(wait));
  kvxfer::Chunk chunk = pool.acquire("a");
  TRUE(chunk.size() == length && chunk.data()[0] == 3 && chunk.data()[length - 1] == 3);

  while (foreign.free() == KVXFER_BUSY) usleep(1000);
  cuda.call("cuMemFree_v2", own);
}

void gathers(Cuda &cuda) {
  kvxfer::Config here;
  here.name = "engine";
  kvxfer::Agent engine(here);
  constexpr std::uint32_t layers = 3, blocks = 4, block_tokens = 8, heads = 2, tokens = 13;
  constexpr std::uint64_t head_bytes = 16, row = heads * head_bytes;
  kvxfer::View pages;
  pages.layout = kvxfer::Layout::paged(kvxfer::Order::blocks_first, true, blocks, block_tokens, heads, head_bytes);
  const std::uint64_t layer_bytes = 2 * blocks * block_tokens * row;
  kvxfer::Region cache = engine.allocate_device(0, layers * layer_bytes);
  std::vector<unsigned char> content(cache.size());
  for (std::size_t i = 0; i < content.size(); i++) content[i] = static_cast<unsigned char>(i * 31 + i / 253);
  cache.write(0, content.data(), content.size());
  pages.region = &cache;
  for (std::uint64_t l = 0; l < layers; l++) pages.layers.push_back(l * layer_bytes);
  pages.table = {3, 0, 2};
  pages.first = 5;

  // Into a chunk, against the formula of the shape [blocks, 2, heads, block, head].
  kvxfer::Region room = engine.allocate_device(0, 32 + 2 * layers * tokens * row);
  kvxfer::View chunk = kvxfer::View::chunk(room, 32, layers, tokens, heads, head_bytes);
  kvxfer::Gather gather(pages, chunk, tokens);
  TRUE(failure([&] { gather.wait(wait); }) == KVXFER_INVALID_ARGUMENT);
  // The last layer is still being made.
  cuda.sleep(100000);
  cuda.fill(reinterpret_cast<std::uintptr_t>(cache.data()) + 2 * layer_bytes, 7, layer_bytes);
  std::fill(content.begin() + 2 * layer_bytes, content.end(), static_cast<unsigned char>(7));
  kvxfer::Fence fence(0, cuda.stream);
  gather.start(&fence, true);
  TRUE(!gather.wait(kvxfer::Milliseconds{0}) && !gather.wait(kvxfer::Milliseconds{1}));
  TRUE(failure([&] { gather.start(); }) == KVXFER_BUSY);
  auto done = gather.wait(wait);
  TRUE(done && done->bytes == 2 * layers * tokens * row && done->digest != 0);
  std::vector<unsigned char> arrived = bytes(room);
  for (std::uint64_t p = 0; p < 2; p++) {
    for (std::uint64_t l = 0; l < layers; l++) {
      for (std::uint64_t t = 0; t < tokens; t++) {
        for (std::uint64_t h = 0; h < heads; h++) {
          const std::uint64_t b = pages.table[(t + 5) / block_tokens], at = (t + 5) % block_tokens;
          const std::uint64_t from = l * layer_bytes + (((b * 2 + p) * heads + h) * block_tokens + at) * head_bytes;
          const std::uint64_t to = 32 + ((p * layers + l) * tokens + t) * row + h * head_bytes;
          TRUE(std::memcmp(&arrived[to], &content[from], head_bytes) == 0);
        }
      }
    }
  }
  // The pieces come to the same, and there is one for each head of each token.
  std::vector<kvxfer_piece_t> pieces = gather.pieces();
  TRUE(!pieces.empty());
  for (const kvxfer_piece_t &p : pieces) {
    TRUE(std::memcmp(&arrived[p.remote_offset], &content[p.local_offset], p.length) == 0);
  }

  // Back by slots, some heads, other layouts; the digest of the same bytes is the same.
  kvxfer::View slots = pages;
  slots.table.clear();
  slots.first = 0;
  for (std::uint32_t t = 0; t < tokens; t++) slots.slots.push_back(pages.table[(t + 5) / block_tokens] * block_tokens + (t + 5) % block_tokens);
  kvxfer::Gather back(chunk, slots, tokens);
  back.start(nullptr, true);
  auto returned = back.wait(wait);
  TRUE(returned && returned->digest == done->digest && bytes(cache) == content);
  back.start();
  returned = back.wait(wait);
  TRUE(returned && returned->digest == 0);

  kvxfer::View one = pages;
  one.layout = pages.layout.with_heads(1);
  for (std::uint64_t &l : one.layers) l += pages.layout.head;
  kvxfer::Region rank = engine.allocate_device(0, 2 * layers * tokens * head_bytes);
  kvxfer::Gather part(one, kvxfer::View::chunk(rank, 0, layers, tokens, 1, head_bytes), tokens);
  part.start();
  TRUE(part.wait(wait));
  std::vector<unsigned char> second = bytes(rank);
  for (std::uint64_t i = 0; i < 2 * layers * tokens; i++) {
    TRUE(std::memcmp(&second[i * head_bytes], &arrived[32 + i * row + head_bytes], head_bytes) == 0);
  }

  // Multi-head latent attention, and a layer's own chunk, by their shapes.
  kvxfer::View latent, rows;
  latent.layout = kvxfer::Layout::latent(blocks, block_tokens, row);
  latent.region = &cache;
  latent.layers = {0, layer_bytes};
  latent.table = {2, 1};
  rows.layout = kvxfer::Layout::latent_chunk(tokens, row);
  rows.region = &room;
  rows.layers = {0, tokens * row};
  kvxfer::Gather attention(latent, rows, tokens);
  attention.start();
  TRUE(attention.wait(wait));
  arrived = bytes(room);
  TRUE(std::memcmp(&arrived[tokens * row], &content[layer_bytes + 2 * block_tokens * row], block_tokens * row) == 0);
  kvxfer::View side = chunk;
  side.layout = kvxfer::Layout::layer_chunk(tokens, heads, head_bytes);
  side.region = &room;
  side.layers = {0, 2 * tokens * row, 4 * tokens * row};
  kvxfer::Gather sided(pages, side, tokens);
  sided.start();
  TRUE(sided.wait(wait));
  arrived = bytes(room);
  // The first token's value, then the second one's key.
  TRUE(std::memcmp(&arrived[row], &content[((3 * 2 + 1) * heads * block_tokens + 5) * head_bytes], head_bytes) == 0);
  TRUE(std::memcmp(&arrived[2 * row], &content[(3 * 2 * heads * block_tokens + 6) * head_bytes], head_bytes) == 0);

  slots.slots[0] = blocks * block_tokens;
  TRUE(failure([&] { kvxfer::Gather wrong(chunk, slots, tokens); }) == KVXFER_INVALID_ARGUMENT);
  pages.slots = {1};
  TRUE(failure([&] { kvxfer::Gather both(pages, chunk, tokens); }) == KVXFER_INVALID_ARGUMENT);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc > 1 && !std::strcmp(argv[1], "device")) {
    Cuda cuda;
    device_regions_and_fences(cuda);
    gathers(cuda);
    std::puts("OK");
    return 0;
  }
  found();
  paged();
  std::puts("OK");
  return 0;
}
