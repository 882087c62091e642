/* What the C tests share: checks that say what they found, and two connected agents with one object of every type. */
#ifndef FIXTURE_H
#define FIXTURE_H

#include <kvxfer.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WAIT_MS 20000
#define PAGE_BYTES 16384
#define REGION_BYTES 65536

/* The call must answer `expected`. */
#define EXPECT(expected, call)                                                                         \
  do {                                                                                                 \
    kvxfer_result_t expected_ = (expected), result_ = (call);                                          \
    if (result_ != expected_) {                                                                        \
      fprintf(stderr, "%s:%d: %s\n  answered %s, not %s; last error: %s\n", __FILE__, __LINE__, #call, \
              kvxfer_result_name(result_), kvxfer_result_name(expected_), kvxfer_last_error());        \
      exit(1);                                                                                         \
    }                                                                                                  \
  } while (0)
#define OK(call) EXPECT(KVXFER_OK, call)
#define REFUSED(call) EXPECT(KVXFER_INVALID_ARGUMENT, call)

/* The condition must hold. */
#define TRUE(condition)                                                                                \
  do {                                                                                                 \
    if (!(condition)) {                                                                                \
      fprintf(stderr, "%s:%d: does not hold: %s; last error: %s\n", __FILE__, __LINE__, #condition,    \
              kvxfer_last_error());                                                                    \
      exit(1);                                                                                         \
    }                                                                                                  \
  } while (0)

/* The last error of this thread must speak of `what`. */
#define SAYS(what) TRUE(strstr(kvxfer_last_error(), what) != NULL)

typedef struct {
  kvxfer_agent_t *server, *client; /* the client is connected to the server */
  kvxfer_region_t *target, *local; /* of the server, exported as "inbox"; of the client */
  kvxfer_peer_t *peer;             /* the server, seen from the client */
  kvxfer_remote_region_t *remote;  /* "inbox", seen from the client */
  kvxfer_transfer_t *transfer;     /* a finished one */
  kvxfer_receiver_t *receiver;     /* pool "kv" of the server, four pages */
  kvxfer_sender_t *sender;         /* attached to it */
  kvxfer_reservation_t *reservation;
  kvxfer_delivery_t *delivery;     /* of chunk "chunk-a", finished */
  kvxfer_chunk_t *chunk;           /* "chunk-a", pinned */
  kvxfer_outbox_t *outbox;         /* of the client; nothing put into it yet */
  kvxfer_memory_t *memory;
  kvxfer_found_t *found;           /* "chunk-a", held for the sender */
  kvxfer_fence_t *fence;           /* NULL: there is no driver in most places */
  kvxfer_view_t from, to;          /* eight bytes of the client's region, and eight others */
  uint64_t layers[2];
  kvxfer_gather_t *gather;         /* of these, not started */
  unsigned char *local_base, *target_base;
  char address[256];
} fixture_t;

static inline kvxfer_geometry_t fixture_geometry(void) {
  kvxfer_geometry_t g;
  memset(&g, 0, sizeof g);
  g.struct_size = sizeof g;
  g.model = "test/model";
  g.dtype = "bfloat16";
  g.page_bytes = PAGE_BYTES;
  g.chunk_tokens = 16;
  return g;
}

static inline kvxfer_agent_t *fixture_agent(const char *name, int listen) {
  const char *addresses[] = {"tcp://127.0.0.1:0"};
  kvxfer_config_t config;
  memset(&config, 0, sizeof config);
  config.struct_size = sizeof config;
  config.name = name;
  config.listen = addresses;
  config.listen_count = listen ? 1 : 0;
  kvxfer_agent_t *agent = NULL;
  OK(kvxfer_agent_new(&config, &agent));
  return agent;
}

/* Two connected agents and their regions. */
static inline void fixture_connect(fixture_t *fx) {
  memset(fx, 0, sizeof *fx);
  fx->server = fixture_agent("server", 1);
  fx->client = fixture_agent("client", 0);
  void *base = NULL;
  size_t length = 0;
  uint64_t bytes = 0;
  OK(kvxfer_agent_address(fx->server, 0, fx->address, sizeof fx->address, &length));
  OK(kvxfer_region_allocate(fx->server, REGION_BYTES, &fx->target));
  OK(kvxfer_region_memory(fx->target, &base, &bytes));
  TRUE(bytes == REGION_BYTES);
  fx->target_base = base;
  OK(kvxfer_region_export(fx->target, "inbox", KVXFER_ACCESS_READ_WRITE));
  OK(kvxfer_region_allocate(fx->client, REGION_BYTES, &fx->local));
  OK(kvxfer_region_memory(fx->local, &base, NULL));
  fx->local_base = base;
  for (int i = 0; i < REGION_BYTES; i++) fx->local_base[i] = (unsigned char)(i * 13 + i / 251);
  OK(kvxfer_agent_connect(fx->client, fx->address, WAIT_MS, &fx->peer));
  OK(kvxfer_peer_region(fx->peer, "inbox", WAIT_MS, &fx->remote));
}

/* Eight bytes at an offset of a region, as one head of one token in one layer. */
static inline kvxfer_view_t fixture_view(kvxfer_region_t *region, const uint64_t *layer) {
  kvxfer_view_t view;
  memset(&view, 0, sizeof view);
  view.struct_size = sizeof view;
  view.region = region;
  view.layers = layer;
  view.layer_count = 1;
  view.planes = view.blocks = view.block_tokens = view.heads = 1;
  view.block = view.token = view.head = view.head_bytes = 8;
  return view;
}

/* One object of every other type as well. */
static inline void fixture_new(fixture_t *fx) {
  fixture_connect(fx);
  kvxfer_piece_t piece = {0, 0, REGION_BYTES};
  OK(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &piece, 1, NULL, &fx->transfer));
  OK(kvxfer_transfer_wait(fx->transfer, WAIT_MS));
  TRUE(memcmp(fx->local_base, fx->target_base, REGION_BYTES) == 0);

  kvxfer_geometry_t geometry = fixture_geometry();
  kvxfer_receiver_config_t pool;
  memset(&pool, 0, sizeof pool);
  pool.struct_size = sizeof pool;
  pool.geometry = &geometry;
  pool.pages = 4;
  OK(kvxfer_receiver_new(fx->server, &pool, &fx->receiver));
  kvxfer_sender_config_t channel;
  memset(&channel, 0, sizeof channel);
  channel.struct_size = sizeof channel;
  channel.geometry = &geometry;
  OK(kvxfer_sender_connect(fx->client, fx->address, &channel, WAIT_MS, &fx->sender));

  kvxfer_chunk_spec_t spec = {"chunk-a", 1000};
  kvxfer_run_t runs[] = {{100, 600}, {5000, 400}};
  OK(kvxfer_sender_reserve(fx->sender, "request-a", &spec, 1, WAIT_MS, &fx->reservation));
  OK(kvxfer_reservation_wait_admitted(fx->reservation, WAIT_MS));
  OK(kvxfer_reservation_write(fx->reservation, 0, fx->local, runs, 2));
  OK(kvxfer_reservation_finish(fx->reservation, &fx->delivery));
  OK(kvxfer_delivery_wait(fx->delivery, WAIT_MS, NULL));
  OK(kvxfer_receiver_acquire(fx->receiver, "chunk-a", &fx->chunk));

  kvxfer_outbox_config_t outbox;
  memset(&outbox, 0, sizeof outbox);
  outbox.struct_size = sizeof outbox;
  outbox.sender = &channel;
  OK(kvxfer_outbox_new(fx->client, &outbox, &fx->outbox));
  OK(kvxfer_memory_new(PAGE_BYTES, &fx->memory));
  const char *keys[] = {"chunk-b", "chunk-a"};
  OK(kvxfer_sender_query(fx->sender, keys, 2, WAIT_MS, WAIT_MS, &fx->found));
  fx->layers[0] = 64;
  fx->layers[1] = 128;
  fx->from = fixture_view(fx->local, &fx->layers[0]);
  fx->to = fixture_view(fx->local, &fx->layers[1]);
  OK(kvxfer_gather_new(&fx->from, &fx->to, 1, &fx->gather));
}

/* Frees everything, parents first to show that any order will do. */
static inline void fixture_free(fixture_t *fx) {
  OK(kvxfer_chunk_free(fx->chunk));
  OK(kvxfer_agent_free(fx->client));
  OK(kvxfer_sender_free(fx->sender));
  OK(kvxfer_outbox_free(fx->outbox));
  OK(kvxfer_agent_free(fx->server));
  OK(kvxfer_receiver_free(fx->receiver));
  OK(kvxfer_reservation_free(fx->reservation));
  OK(kvxfer_delivery_free(fx->delivery));
  OK(kvxfer_transfer_free(fx->transfer));
  OK(kvxfer_remote_region_free(fx->remote));
  OK(kvxfer_peer_free(fx->peer));
  OK(kvxfer_region_free(fx->local));
  OK(kvxfer_region_free(fx->target));
  OK(kvxfer_memory_free(fx->memory));
  OK(kvxfer_found_free(fx->found));
  OK(kvxfer_fence_free(fx->fence));
  OK(kvxfer_gather_free(fx->gather));
}

#endif
