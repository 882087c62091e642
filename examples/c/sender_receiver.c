/* SPDX-License-Identifier: Apache-2.0
 *
 * A prefiller hands the KV cache of a prompt to a decoder: sender and receiver in two processes.
 *
 * The receiver opens a pool of pages. The sender reserves all chunks of a request at once, writes each as soon as it is
 * "computed", and waits until the receiver has checked and published them. The receiver acquires the chunks, compares every
 * byte, and gives the pages back.
 *
 *   cc -std=c11 -Wall sender_receiver.c -o sender_receiver $(pkg-config --cflags --libs kvxfer)
 *   ./sender_receiver receiver          # prints: ADDRESS tcp://127.0.0.1:PORT
 *   ./sender_receiver sender ADDRESS    # in another terminal
 */
#include <kvxfer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_BYTES (256 * 1024)
#define CHUNKS 6
#define TAIL_BYTES 100000 /* the last chunk is partial: only its valid bytes travel */
#define WAIT_MS 20000

/* Ends the program with the library's own words when a call fails. */
#define CHECK(call)                                                                           \
  do {                                                                                        \
    kvxfer_result_t result_ = (call);                                                         \
    if (result_ != KVXFER_OK) {                                                               \
      fprintf(stderr, "%s: %s\n", kvxfer_result_name(result_), kvxfer_last_error());          \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

static uint64_t chunk_bytes(int chunk) { return chunk == CHUNKS - 1 ? TAIL_BYTES : PAGE_BYTES; }
static unsigned char expected(int chunk, uint64_t i) { return (unsigned char)(i * 7 + i / 4096 + (uint64_t)chunk * 53); }
static void key_of(int chunk, char *key, size_t capacity) { snprintf(key, capacity, "example@1@0@%08x@bfloat16", chunk); }

/* Both sides state what the pages hold; a difference is an error at connect, not garbage later. */
static kvxfer_geometry_t geometry(void) {
  kvxfer_geometry_t g = {.struct_size = sizeof g};
  g.model = "example/tiny-llama";
  g.dtype = "bfloat16";
  g.layout = "KV_2LTD";
  g.page_bytes = PAGE_BYTES;
  g.chunk_tokens = 256;
  g.layers = 4;
  g.kv_heads = 2;
  g.head_dim = 32;
  g.tp_size = 1;
  return g;
}

static int receiver(void) {
  const char *listen[] = {"tcp://127.0.0.1:0"};
  kvxfer_config_t config = {.struct_size = sizeof config, .name = "decoder", .listen = listen, .listen_count = 1};
  kvxfer_agent_t *agent = NULL;
  CHECK(kvxfer_agent_new(&config, &agent));

  kvxfer_geometry_t shape = geometry();
  kvxfer_receiver_config_t pool = {.struct_size = sizeof pool, .pool = "kv", .geometry = &shape, .pages = 8};
  kvxfer_receiver_t *receiver = NULL;
  CHECK(kvxfer_receiver_new(agent, &pool, &receiver));

  char address[256];
  size_t length;
  CHECK(kvxfer_agent_address(agent, 0, address, sizeof address, &length));
  printf("ADDRESS %s\n", address);
  fflush(stdout);

  kvxfer_receiver_event_t event = {.struct_size = sizeof event};
  CHECK(kvxfer_receiver_next_event(receiver, WAIT_MS, &event));
  if (event.kind != KVXFER_EVENT_READY) {
    fprintf(stderr, "request %s failed: %s: %s\n", event.request, kvxfer_result_name(event.result), event.text);
    return 1;
  }
  printf("request %s of %s is ready\n", event.request, event.sender);

  for (int c = 0; c < CHUNKS; c++) {
    char key[128];
    key_of(c, key, sizeof key);
    kvxfer_chunk_t *chunk = NULL;
    const void *data = NULL;
    uint64_t bytes = 0;
    CHECK(kvxfer_receiver_acquire(receiver, key, &chunk)); /* pinned until freed */
    CHECK(kvxfer_chunk_data(chunk, &data, &bytes));
    if (bytes != chunk_bytes(c)) {
      fprintf(stderr, "chunk %d has %llu bytes\n", c, (unsigned long long)bytes);
      return 1;
    }
    for (uint64_t i = 0; i < bytes; i++) {
      if (((const unsigned char *)data)[i] != expected(c, i)) {
        fprintf(stderr, "chunk %d differs at byte %llu\n", c, (unsigned long long)i);
        return 1;
      }
    }
    CHECK(kvxfer_chunk_free(chunk));
    CHECK(kvxfer_receiver_remove(receiver, key)); /* loaded into the engine: the page may be used again */
  }

  kvxfer_pool_stats_t stats = {.struct_size = sizeof stats};
  CHECK(kvxfer_receiver_stats(receiver, &stats));
  if (stats.free_pages != stats.pages) {
    fprintf(stderr, "%u of %u pages are free\n", stats.free_pages, stats.pages);
    return 1;
  }
  CHECK(kvxfer_receiver_close(receiver, WAIT_MS));
  CHECK(kvxfer_receiver_free(receiver));
  CHECK(kvxfer_agent_free(agent));
  printf("OK receiver: %d chunks as expected, all pages free\n", CHUNKS);
  return 0;
}

static int sender(const char *address) {
  kvxfer_config_t config = {.struct_size = sizeof config, .name = "prefiller"};
  kvxfer_agent_t *agent = NULL;
  CHECK(kvxfer_agent_new(&config, &agent));

  kvxfer_region_t *region = NULL;
  void *base = NULL;
  CHECK(kvxfer_region_allocate(agent, (uint64_t)CHUNKS * PAGE_BYTES, &region));
  CHECK(kvxfer_region_memory(region, &base, NULL));

  kvxfer_geometry_t shape = geometry();
  kvxfer_sender_config_t channel = {.struct_size = sizeof channel, .pool = "kv", .geometry = &shape};
  kvxfer_sender_t *sender = NULL;
  CHECK(kvxfer_sender_connect(agent, address, &channel, WAIT_MS, &sender));

  char keys[CHUNKS][128];
  kvxfer_chunk_spec_t chunks[CHUNKS];
  for (int c = 0; c < CHUNKS; c++) {
    key_of(c, keys[c], sizeof keys[c]);
    chunks[c].key = keys[c];
    chunks[c].length = chunk_bytes(c);
  }
  kvxfer_reservation_t *reservation = NULL;
  CHECK(kvxfer_sender_reserve(sender, "request-1", chunks, CHUNKS, WAIT_MS, &reservation));
  CHECK(kvxfer_reservation_wait_admitted(reservation, WAIT_MS));

  for (int c = 0; c < CHUNKS; c++) {
    /* "Prefill": the chunk's bytes come into being, in two runs whose order in memory is swapped. */
    uint64_t start = (uint64_t)c * PAGE_BYTES, bytes = chunk_bytes(c), half = bytes / 2;
    unsigned char *at = (unsigned char *)base + start;
    for (uint64_t i = 0; i < bytes; i++) {
      at[i < half ? i + (bytes - half) : i - half] = expected(c, i);
    }
    kvxfer_run_t runs[] = {{start + (bytes - half), half}, {start, bytes - half}};
    CHECK(kvxfer_reservation_write(reservation, (size_t)c, region, runs, 2));
  }

  kvxfer_delivery_t *delivery = NULL;
  CHECK(kvxfer_reservation_finish(reservation, &delivery));
  kvxfer_delivery_report_t report = {.struct_size = sizeof report};
  CHECK(kvxfer_delivery_wait(delivery, WAIT_MS, &report));
  printf("%llu bytes in %u chunks over %s in %.1f us\n", (unsigned long long)report.bytes, report.written,
         kvxfer_transport_name(report.transport), report.moved_ns / 1e3);

  CHECK(kvxfer_delivery_free(delivery));
  CHECK(kvxfer_reservation_free(reservation));
  CHECK(kvxfer_sender_free(sender));
  CHECK(kvxfer_region_free(region));
  CHECK(kvxfer_agent_free(agent));
  printf("OK sender: published at the receiver\n");
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && strcmp(argv[1], "receiver") == 0) return receiver();
  if (argc == 3 && strcmp(argv[1], "sender") == 0) return sender(argv[2]);
  fprintf(stderr, "usage: %s receiver | sender ADDRESS\n", argv[0]);
  return 2;
}
