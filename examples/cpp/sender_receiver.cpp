// SPDX-License-Identifier: Apache-2.0
//
// The C example sender_receiver.c again, with the RAII wrapper: handles free themselves, failures are exceptions.
//
//   c++ -std=c++17 -Wall sender_receiver.cpp -o sender_receiver $(pkg-config --cflags --libs kvxfer)
//   ./sender_receiver receiver          # prints: ADDRESS tcp://127.0.0.1:PORT
//   ./sender_receiver sender ADDRESS    # in another terminal
#include <kvxfer.hpp>

#include <iostream>
#include <string>
#include <vector>

namespace {

constexpr std::uint64_t page_bytes = 256 * 1024, tail_bytes = 100000;
constexpr std::size_t chunks = 6;
constexpr kvxfer::Milliseconds wait{20000};

std::uint64_t length_of(std::size_t chunk) { return chunk + 1 == chunks ? tail_bytes : page_bytes; }
std::string key_of(std::size_t chunk) { return "example@1@0@" + std::to_string(chunk) + "@bfloat16"; }
unsigned char expected(std::size_t chunk, std::uint64_t i) {
  return static_cast<unsigned char>(i * 7 + i / 4096 + chunk * 53);
}

kvxfer::Geometry geometry() {
  kvxfer::Geometry g;
  g.model = "example/tiny-llama";
  g.dtype = "bfloat16";
  g.layout = "KV_2LTD";
  g.page_bytes = page_bytes;
  g.chunk_tokens = 256;
  g.tp_size = 1;
  return g;
}

int receiver() {
  kvxfer::Config config;
  config.name = "decoder";
  config.listen = {"tcp://127.0.0.1:0"};
  kvxfer::Agent agent(config);
  kvxfer::Receiver pool(agent, "kv", geometry(), 8);
  std::cout << "ADDRESS " << agent.addresses().at(0) << std::endl;

  pool.wait_request("request-1", wait);  // may be called before the sender has even connected
  for (std::size_t c = 0; c < chunks; c++) {
    kvxfer::Chunk chunk = pool.acquire(key_of(c));
    if (chunk.size() != length_of(c)) throw std::runtime_error("chunk has a wrong length");
    const unsigned char *data = chunk.data();
    for (std::uint64_t i = 0; i < chunk.size(); i++) {
      if (data[i] != expected(c, i)) throw std::runtime_error("chunk differs");
    }
    pool.remove(key_of(c));
  }
  auto stats = pool.stats();
  if (stats.free_pages != stats.pages) throw std::runtime_error("a page is missing");
  pool.close(wait);
  std::cout << "OK receiver: " << chunks << " chunks as expected" << std::endl;
  return 0;
}

int sender(const std::string &address) {
  kvxfer::Config config;
  config.name = "prefiller";
  kvxfer::Agent agent(config);
  kvxfer::Region region = agent.allocate(chunks * page_bytes);
  kvxfer::Sender sender(agent, address, "kv", geometry(), wait);

  std::vector<kvxfer::ChunkSpec> specs;
  for (std::size_t c = 0; c < chunks; c++) specs.push_back({key_of(c), length_of(c)});
  kvxfer::Reservation reservation = sender.reserve("request-1", specs);
  reservation.wait_admitted(wait);
  unsigned char *base = region.data();
  for (std::size_t c = 0; c < chunks; c++) {
    for (std::uint64_t i = 0; i < length_of(c); i++) base[c * page_bytes + i] = expected(c, i);
    reservation.write(c, region, {{c * page_bytes, length_of(c)}});
  }
  auto report = reservation.finish().wait(wait);
  if (!report) throw std::runtime_error("not delivered in time");
  std::cout << report->bytes << " bytes over " << kvxfer_transport_name(report->transport) << "\nOK sender" << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char **argv) {
  try {
    if (argc == 2 && argv[1] == std::string("receiver")) return receiver();
    if (argc == 3 && argv[1] == std::string("sender")) return sender(argv[2]);
    std::cerr << "usage: " << argv[0] << " receiver | sender ADDRESS\n";
    return 2;
  } catch (const kvxfer::Error &e) {
    std::cerr << e.name() << ": " << e.what() << (e.retryable() ? " (retryable)" : "") << "\n";
  } catch (const std::exception &e) {
    std::cerr << e.what() << "\n";
  }
  return 1;
}
