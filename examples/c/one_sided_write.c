/* SPDX-License-Identifier: Apache-2.0
 *
 * One-sided write and read between two processes.
 *
 * The target exports memory and waits; the writer moves scattered pieces into it, with a notification that arrives after the
 * last byte, reads them back, and both compare every byte.
 *
 *   cc -std=c11 -Wall one_sided_write.c -o one_sided_write $(pkg-config --cflags --libs kvxfer)
 *   ./one_sided_write target            # prints: ADDRESS tcp://127.0.0.1:PORT
 *   ./one_sided_write writer ADDRESS    # in another terminal
 */
#include <kvxfer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECES 64
#define PIECE_BYTES (16 * 1024)
#define REGION_BYTES ((uint64_t)PIECES * PIECE_BYTES)
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

/* What byte `i` of the target's region must be in the end. */
static unsigned char expected(uint64_t i) { return (unsigned char)(i * 31 + i / PIECE_BYTES); }

static void compare(const unsigned char *bytes, const char *where) {
  for (uint64_t i = 0; i < REGION_BYTES; i++) {
    if (bytes[i] != expected(i)) {
      fprintf(stderr, "%s: byte %llu is %u, not %u\n", where, (unsigned long long)i, bytes[i], expected(i));
      exit(1);
    }
  }
}

/* Piece `n` travels to place `n` from another place: the pieces are in shuffled order at the writer. */
static uint64_t place_at_writer(uint64_t n) { return (n * 37 + 11) % PIECES; }

static int target(void) {
  const char *listen[] = {"tcp://127.0.0.1:0"};
  kvxfer_config_t config = {.struct_size = sizeof config, .name = "target", .listen = listen, .listen_count = 1};
  kvxfer_agent_t *agent = NULL;
  CHECK(kvxfer_agent_new(&config, &agent));

  kvxfer_region_t *region = NULL;
  void *base = NULL;
  CHECK(kvxfer_region_allocate(agent, REGION_BYTES, &region));
  CHECK(kvxfer_region_memory(region, &base, NULL));
  CHECK(kvxfer_region_export(region, "inbox", KVXFER_ACCESS_READ_WRITE));

  char address[256];
  size_t length;
  CHECK(kvxfer_agent_address(agent, 0, address, sizeof address, &length));
  printf("ADDRESS %s\n", address);
  fflush(stdout);

  /* The notification arrives after every byte it belongs to. */
  char from[KVXFER_MAX_NAME + 1], text[KVXFER_MAX_NOTIFICATION];
  CHECK(kvxfer_agent_wait_notification(agent, WAIT_MS, from, sizeof from, text, sizeof text, &length));
  printf("%.*s from %s\n", (int)length, text, from);
  compare(base, "target");

  /* Answer, and wait until the writer has read everything back. */
  kvxfer_peer_t *writer = NULL;
  CHECK(kvxfer_agent_peer(agent, from, &writer));
  CHECK(kvxfer_peer_notify(writer, "checked", 7));
  CHECK(kvxfer_agent_wait_notification(agent, WAIT_MS, NULL, 0, text, sizeof text, &length));

  CHECK(kvxfer_peer_free(writer));
  CHECK(kvxfer_region_free(region));
  CHECK(kvxfer_agent_free(agent));
  printf("OK target: %llu bytes as expected\n", (unsigned long long)REGION_BYTES);
  return 0;
}

static int writer(const char *address) {
  kvxfer_config_t config = {.struct_size = sizeof config, .name = "writer"};
  kvxfer_agent_t *agent = NULL;
  CHECK(kvxfer_agent_new(&config, &agent));

  /* The caller's own memory may be registered; memory from kvxfer_region_allocate() is faster to reach on one host. */
  unsigned char *mine = malloc(REGION_BYTES);
  if (mine == NULL) return 1;
  kvxfer_region_t *region = NULL;
  CHECK(kvxfer_region_register(agent, mine, REGION_BYTES, &region));

  kvxfer_piece_t pieces[PIECES];
  for (uint64_t n = 0; n < PIECES; n++) {
    pieces[n].local_offset = place_at_writer(n) * PIECE_BYTES;
    pieces[n].remote_offset = n * PIECE_BYTES;
    pieces[n].length = PIECE_BYTES;
    for (uint64_t i = 0; i < PIECE_BYTES; i++) {
      mine[pieces[n].local_offset + i] = expected(pieces[n].remote_offset + i);
    }
  }

  kvxfer_peer_t *peer = NULL;
  kvxfer_remote_region_t *inbox = NULL;
  CHECK(kvxfer_agent_connect(agent, address, WAIT_MS, &peer));
  CHECK(kvxfer_peer_region(peer, "inbox", WAIT_MS, &inbox));

  kvxfer_transfer_options_t options = {.struct_size = sizeof options, .timeout_ms = WAIT_MS};
  options.notify = "all pieces written";
  options.notify_length = strlen("all pieces written");
  kvxfer_transfer_t *write = NULL;
  CHECK(kvxfer_peer_write(peer, region, inbox, pieces, PIECES, &options, &write));
  CHECK(kvxfer_transfer_wait(write, WAIT_MS));

  kvxfer_result_t outcomes[PIECES];
  CHECK(kvxfer_transfer_outcomes(write, 0, PIECES, outcomes));
  for (int n = 0; n < PIECES; n++) CHECK(outcomes[n]);

  kvxfer_transfer_report_t report = {.struct_size = sizeof report};
  CHECK(kvxfer_transfer_report(write, &report));
  printf("wrote %llu bytes in %llu pieces over %s in %.1f us\n", (unsigned long long)report.bytes,
         (unsigned long long)report.pieces, kvxfer_transport_name(report.transport), report.duration_ns / 1e3);
  CHECK(kvxfer_transfer_free(write));

  /* Read everything back, in order this time. */
  char text[KVXFER_MAX_NOTIFICATION];
  size_t length;
  CHECK(kvxfer_agent_wait_notification(agent, WAIT_MS, NULL, 0, text, sizeof text, &length));
  memset(mine, 0, REGION_BYTES);
  kvxfer_piece_t all = {.local_offset = 0, .remote_offset = 0, .length = REGION_BYTES};
  kvxfer_transfer_t *read = NULL;
  CHECK(kvxfer_peer_read(peer, region, inbox, &all, 1, NULL, &read));
  CHECK(kvxfer_transfer_wait(read, WAIT_MS));
  compare(mine, "writer, read back");
  CHECK(kvxfer_peer_notify(peer, "done", 4));

  /* Any order of freeing is fine; only the memory must outlive its region. */
  CHECK(kvxfer_transfer_free(read));
  CHECK(kvxfer_remote_region_free(inbox));
  CHECK(kvxfer_peer_free(peer));
  CHECK(kvxfer_region_free(region));
  free(mine);
  CHECK(kvxfer_agent_free(agent));
  printf("OK writer: %llu bytes read back as expected\n", (unsigned long long)REGION_BYTES);
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && strcmp(argv[1], "target") == 0) return target();
  if (argc == 3 && strcmp(argv[1], "writer") == 0) return writer(argv[2]);
  fprintf(stderr, "usage: %s target | writer ADDRESS\n", argv[0]);
  return 2;
}
