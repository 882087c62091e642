// The C++ wrapper: chunks that are asked for and read back, and a paged cache.
#include <kvxfer.hpp>

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

}  // namespace

int main() {
  found();
  paged();
  std::puts("OK");
  return 0;
}
