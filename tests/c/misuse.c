/* What a careless program does: each is refused with a code and words, and the library goes on working. */
#include "fixture.h"

/* Freed, doubly freed, mistyped and invented handles. */
static void handles(void) {
  fixture_t gone;
  fixture_new(&gone);
  fixture_free(&gone);
  REFUSED(kvxfer_agent_free(gone.server));
  SAYS("freed already");
  REFUSED(kvxfer_region_free(gone.local));
  REFUSED(kvxfer_peer_free(gone.peer));
  REFUSED(kvxfer_remote_region_free(gone.remote));
  REFUSED(kvxfer_transfer_free(gone.transfer));
  REFUSED(kvxfer_receiver_free(gone.receiver));
  REFUSED(kvxfer_chunk_free(gone.chunk));
  REFUSED(kvxfer_sender_free(gone.sender));
  REFUSED(kvxfer_reservation_free(gone.reservation));
  REFUSED(kvxfer_delivery_free(gone.delivery));
  REFUSED(kvxfer_found_free(gone.found));

  fixture_t fx;
  fixture_connect(&fx); /* takes the freed ones' slots */
  uint64_t value;
  REFUSED(kvxfer_agent_epoch(gone.server, &value));
  REFUSED(kvxfer_agent_epoch(gone.client, &value));
  REFUSED(kvxfer_region_id(gone.local, &value));
  REFUSED(kvxfer_agent_epoch((kvxfer_agent_t *)fx.local, &value));
  SAYS("type region");
  REFUSED(kvxfer_agent_free((kvxfer_agent_t *)fx.peer));
  REFUSED(kvxfer_agent_epoch((kvxfer_agent_t *)&fx, &value)); /* an address */
  REFUSED(kvxfer_agent_free((kvxfer_agent_t *)&fx));
  REFUSED(kvxfer_agent_free((kvxfer_agent_t *)(uintptr_t)1));
  REFUSED(kvxfer_agent_free((kvxfer_agent_t *)UINTPTR_MAX));
  OK(kvxfer_agent_epoch(fx.server, &value));

  /* Parents first: children answer, and are still to be freed. */
  OK(kvxfer_agent_free(fx.client));
  REFUSED(kvxfer_agent_free(fx.client));
  kvxfer_transfer_t *transfer = NULL;
  kvxfer_piece_t piece = {0, 0, 16};
  kvxfer_result_t result = kvxfer_peer_write(fx.peer, fx.local, fx.remote, &piece, 1, NULL, &transfer);
  TRUE(result == KVXFER_CLOSED || result == KVXFER_PEER_GONE);
  TRUE(transfer == NULL); /* outputs are written on success only */
  OK(kvxfer_peer_free(fx.peer));
  OK(kvxfer_remote_region_free(fx.remote));
  OK(kvxfer_region_free(fx.local));
  OK(kvxfer_region_free(fx.target));
  OK(kvxfer_agent_free(fx.server));
}

static void structs(fixture_t *fx) {
  kvxfer_agent_t *agent = NULL;
  kvxfer_config_t config;
  memset(&config, 0, sizeof config);
  REFUSED(kvxfer_agent_new(&config, &agent)); /* struct_size forgotten */
  SAYS("struct_size");
  config.struct_size = sizeof config - 1;
  REFUSED(kvxfer_agent_new(&config, &agent));
  config.struct_size = SIZE_MAX;
  REFUSED(kvxfer_agent_new(&config, &agent));

  /* A program of tomorrow: its struct is longer. Zeros in what is not known are fine, anything else is not ignored. */
  struct {
    kvxfer_config_t known;
    uint64_t later;
  } newer;
  memset(&newer, 0, sizeof newer);
  newer.known.struct_size = sizeof newer;
  OK(kvxfer_agent_new(&newer.known, &agent));
  OK(kvxfer_agent_free(agent));
  newer.later = 1;
  EXPECT(KVXFER_UNSUPPORTED, kvxfer_agent_new(&newer.known, &agent));
  SAYS("newer kvxfer");

  memset(&config, 0, sizeof config);
  config.struct_size = sizeof config;
  config.flags = 0x80;
  REFUSED(kvxfer_agent_new(&config, &agent));
  config.flags = 0;
  config.integrity = 9;
  REFUSED(kvxfer_agent_new(&config, &agent));
  config.integrity = 0;
  config.connect_timeout_ms = UINT64_MAX;
  REFUSED(kvxfer_agent_new(&config, &agent));
  SAYS("KVXFER_MAX_TIMEOUT_MS");
  config.connect_timeout_ms = 0;
  config.listen_count = 1; /* without a list */
  REFUSED(kvxfer_agent_new(&config, &agent));
  config.listen_count = SIZE_MAX / 2;
  const char *listen[] = {"tcp://127.0.0.1:0"};
  config.listen = listen;
  REFUSED(kvxfer_agent_new(&config, &agent));
  config.listen_count = 1;
  listen[0] = NULL;
  REFUSED(kvxfer_agent_new(&config, &agent));
  listen[0] = "ftp://nowhere";
  REFUSED(kvxfer_agent_new(&config, &agent));
  SAYS("ftp");
  config.listen_count = 0;
  const char *kinds[] = {"pigeon"};
  config.allow = kinds;
  config.allow_count = 1;
  REFUSED(kvxfer_agent_new(&config, &agent));
  SAYS("pigeon");
  REFUSED(kvxfer_agent_new_from_yaml("no_such_key: 1", 0, &agent));
  SAYS("no_such_key");
  REFUSED(kvxfer_agent_new_from_yaml("name: [", 0, &agent));
  REFUSED(kvxfer_agent_new_from_json("{", 0, &agent));
  REFUSED(kvxfer_agent_new_from_yaml("{}", 2, &agent));

  kvxfer_transfer_report_t report;
  memset(&report, 0xee, sizeof report);
  report.struct_size = 8;
  REFUSED(kvxfer_transfer_report(fx->transfer, &report));
  TRUE(report.bytes == 0xeeeeeeeeeeeeeeeeu);
  struct {
    kvxfer_transfer_report_t known;
    uint64_t later;
  } longer;
  memset(&longer, 0xee, sizeof longer);
  longer.known.struct_size = sizeof longer;
  OK(kvxfer_transfer_report(fx->transfer, &longer.known));
  TRUE(longer.later == 0 && longer.known.struct_size == sizeof longer && longer.known.bytes == REGION_BYTES);
}

static void texts(fixture_t *fx) {
  kvxfer_agent_t *agent = NULL;
  kvxfer_peer_t *peer = NULL;
  kvxfer_remote_region_t *remote = NULL;
  REFUSED(kvxfer_agent_new_from_yaml("name: \xff\xfe", 0, &agent));
  SAYS("not UTF-8");
  REFUSED(kvxfer_agent_connect(fx->client, "tcp://\xc3\x28", WAIT_MS, &peer));
  REFUSED(kvxfer_agent_connect(fx->client, "", WAIT_MS, &peer));
  REFUSED(kvxfer_agent_connect(fx->client, "nonsense", WAIT_MS, &peer));
  REFUSED(kvxfer_region_export(fx->local, "", KVXFER_ACCESS_READ));
  REFUSED(kvxfer_region_export(fx->local, "x\x01y", KVXFER_ACCESS_READ));
  char name[KVXFER_MAX_NAME + 2];
  memset(name, 'n', sizeof name);
  name[sizeof name - 1] = 0;
  REFUSED(kvxfer_region_export(fx->local, name, KVXFER_ACCESS_READ));
  REFUSED(kvxfer_region_export(fx->local, "fine", 0));
  REFUSED(kvxfer_region_export(fx->local, "fine", 4));
  EXPECT(KVXFER_NOT_FOUND, kvxfer_peer_region(fx->peer, "no-such-region", WAIT_MS, &remote));
  SAYS("no-such-region");
  uint32_t state = 7;
  REFUSED(kvxfer_receiver_lookup(fx->receiver, "", &state, NULL));
  REFUSED(kvxfer_receiver_lookup(fx->receiver, "\xff", &state, NULL));
  TRUE(state == 7);
  char *key = malloc(2 << 20);
  memset(key, 'k', 2 << 20);
  key[(2 << 20) - 1] = 0;
  REFUSED(kvxfer_receiver_lookup(fx->receiver, key, &state, NULL));
  key[600] = 0;
  REFUSED(kvxfer_receiver_lookup(fx->receiver, key, &state, NULL));
  free(key);
}

/* Nothing moves, and nothing is written, when a range is wrong. */
static void ranges(fixture_t *fx) {
  memset(fx->target_base, 0x11, REGION_BYTES);
  kvxfer_transfer_t *transfer = NULL;
  kvxfer_piece_t bad[] = {
      {REGION_BYTES, 0, 1},          {0, REGION_BYTES, 1},           {REGION_BYTES - 8, 0, 9},
      {0, REGION_BYTES - 8, 9},      {0, 0, REGION_BYTES + 1},       {UINT64_MAX, 0, 2},
      {0, UINT64_MAX, 2},            {UINT64_MAX - 7, 0, 8},         {0, UINT64_MAX - 7, 8},
      {8, 0, UINT64_MAX},            {0, 8, UINT64_MAX - 7},         {0, 0, UINT64_MAX},
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    kvxfer_piece_t pieces[] = {{0, 0, 64}, bad[i]};
    EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_peer_write(fx->peer, fx->local, fx->remote, pieces, 2, NULL, &transfer));
    EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_peer_read(fx->peer, fx->local, fx->remote, pieces, 2, NULL, &transfer));
  }
  kvxfer_piece_t zero[] = {{0, 0, 64}, {0, 0, 0}};
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, zero, 2, NULL, &transfer));
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, zero, 0, NULL, &transfer));
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, zero, SIZE_MAX / 16, NULL, &transfer));
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, (kvxfer_piece_t *)((char *)zero + 1), 1, NULL, &transfer));
  SAYS("aligned");
  /* A region of another agent. */
  kvxfer_piece_t fine = {0, 0, 64};
  REFUSED(kvxfer_peer_write(fx->peer, fx->target, fx->remote, &fine, 1, NULL, &transfer));
  TRUE(transfer == NULL);
  for (int i = 0; i < REGION_BYTES; i++) TRUE(fx->target_base[i] == 0x11);

  kvxfer_transfer_options_t options;
  memset(&options, 0, sizeof options);
  options.struct_size = sizeof options;
  options.timeout_ms = UINT64_MAX;
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &fine, 1, &options, &transfer));
  options.timeout_ms = 0;
  options.transport = 77;
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &fine, 1, &options, &transfer));
  options.transport = 0;
  options.integrity = 77;
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &fine, 1, &options, &transfer));
  options.integrity = 0;
  static char payload[KVXFER_MAX_NOTIFICATION + 1];
  options.notify = payload;
  options.notify_length = sizeof payload;
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &fine, 1, &options, &transfer));
  SAYS("4097");
  REFUSED(kvxfer_peer_notify(fx->peer, payload, sizeof payload));
  options.notify = NULL;
  REFUSED(kvxfer_peer_write(fx->peer, fx->local, fx->remote, &fine, 1, &options, &transfer));

  kvxfer_result_t outcomes[4] = {99, 99, 99, 99};
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_transfer_outcomes(fx->transfer, 0, 2, outcomes));
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_transfer_outcomes(fx->transfer, 1, 1, outcomes));
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_transfer_outcomes(fx->transfer, 0, 0, outcomes));
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_transfer_outcomes(fx->transfer, SIZE_MAX, 2, outcomes));
  TRUE(outcomes[0] == 99);
}

static void sizes(fixture_t *fx) {
  kvxfer_region_t *region = NULL;
  static char memory[64];
  REFUSED(kvxfer_region_allocate(fx->client, 0, &region));
  REFUSED(kvxfer_region_allocate(fx->client, UINT64_MAX, &region));
  EXPECT(KVXFER_SYSTEM, kvxfer_region_allocate(fx->client, (uint64_t)1 << 52, &region));
  REFUSED(kvxfer_region_register(fx->client, memory, 0, &region));
  REFUSED(kvxfer_region_register(fx->client, memory, UINT64_MAX, &region));
  TRUE(region == NULL);
  REFUSED(kvxfer_agent_shutdown(fx->client, UINT64_MAX));
  REFUSED(kvxfer_transfer_wait(fx->transfer, UINT64_MAX));
  REFUSED(kvxfer_transfer_wait(fx->transfer, KVXFER_MAX_TIMEOUT_MS + 1));
  char payload[8], name[8];
  size_t length = 0;
  REFUSED(kvxfer_agent_try_notification(fx->server, name, sizeof name, payload, sizeof payload, &length));
  SAYS("peer_capacity");
  REFUSED(kvxfer_agent_name(fx->server, NULL, 5, &length));
}

static void requests(fixture_t *fx) {
  kvxfer_geometry_t geometry = fixture_geometry();
  kvxfer_sender_config_t channel;
  memset(&channel, 0, sizeof channel);
  channel.struct_size = sizeof channel;
  channel.geometry = &geometry;
  kvxfer_sender_t *sender = NULL;
  geometry.page_bytes *= 2;
  EXPECT(KVXFER_MISMATCH, kvxfer_sender_connect(fx->client, fx->address, &channel, WAIT_MS, &sender));
  SAYS("page_bytes");
  SAYS("32768");
  SAYS("16384");
  geometry = fixture_geometry();
  channel.pool = "no-such-pool";
  EXPECT(KVXFER_NOT_FOUND, kvxfer_sender_connect(fx->client, fx->address, &channel, WAIT_MS, &sender));
  channel.pool = NULL;
  channel.reserved = 1;
  REFUSED(kvxfer_sender_connect(fx->client, fx->address, &channel, WAIT_MS, &sender));

  kvxfer_reservation_t *reservation = NULL;
  kvxfer_chunk_spec_t five[5] = {{"a", 10}, {"b", 10}, {"c", 10}, {"d", 10}, {"e", 10}};
  REFUSED(kvxfer_sender_reserve(fx->sender, "none", five, 0, WAIT_MS, &reservation));
  REFUSED(kvxfer_sender_reserve(fx->sender, "", five, 1, WAIT_MS, &reservation));
  REFUSED(kvxfer_sender_reserve(fx->sender, "forever", five, 1, UINT64_MAX, &reservation));
  kvxfer_result_t result = kvxfer_sender_reserve(fx->sender, "too many", five, 5, WAIT_MS, &reservation);
  if (result == KVXFER_OK) { /* refused by the receiver instead */
    EXPECT(KVXFER_TOO_LARGE, kvxfer_reservation_wait_admitted(reservation, WAIT_MS));
    OK(kvxfer_reservation_free(reservation));
  } else {
    EXPECT(KVXFER_TOO_LARGE, result);
  }
  kvxfer_chunk_spec_t huge = {"huge", PAGE_BYTES + 1}, empty = {"empty", 0};
  reservation = NULL;
  result = kvxfer_sender_reserve(fx->sender, "huge", &huge, 1, WAIT_MS, &reservation);
  TRUE(result == KVXFER_TOO_LARGE || result == KVXFER_OUT_OF_RANGE || result == KVXFER_INVALID_ARGUMENT);
  result = kvxfer_sender_reserve(fx->sender, "empty", &empty, 1, WAIT_MS, &reservation);
  TRUE(result == KVXFER_INVALID_ARGUMENT);
  TRUE(reservation == NULL);

  OK(kvxfer_sender_reserve(fx->sender, "sizes", five, 1, WAIT_MS, &reservation));
  OK(kvxfer_reservation_wait_admitted(reservation, WAIT_MS));
  kvxfer_run_t runs[] = {{0, 5}, {REGION_BYTES - 4, 5}}, wrap[] = {{0, UINT64_MAX}, {0, 11}}, fine = {0, 10};
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_reservation_write(reservation, 0, fx->local, runs, 2));
  REFUSED(kvxfer_reservation_write(reservation, 0, fx->local, runs, 1)); /* 5 bytes, 10 declared */
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_reservation_write(reservation, 0, fx->local, wrap, 2));
  REFUSED(kvxfer_reservation_write(reservation, 0, fx->local, runs, 0));
  result = kvxfer_reservation_write(reservation, 1, fx->local, &fine, 1);
  TRUE(result == KVXFER_OUT_OF_RANGE || result == KVXFER_INVALID_ARGUMENT);
  REFUSED(kvxfer_reservation_write(reservation, 0, fx->target, &fine, 1)); /* the receiver's region */
  OK(kvxfer_reservation_write(reservation, 0, fx->local, &fine, 1));
  kvxfer_delivery_t *delivery = NULL;
  OK(kvxfer_reservation_finish(reservation, &delivery));
  OK(kvxfer_delivery_wait(delivery, WAIT_MS, NULL));
  OK(kvxfer_delivery_free(delivery));
  OK(kvxfer_reservation_free(reservation));

  kvxfer_chunk_t *chunk = NULL;
  EXPECT(KVXFER_NOT_FOUND, kvxfer_receiver_acquire(fx->receiver, "unknown", &chunk));
  kvxfer_receiver_t *receiver = NULL;
  kvxfer_receiver_config_t pool;
  memset(&pool, 0, sizeof pool);
  pool.struct_size = sizeof pool;
  REFUSED(kvxfer_receiver_new(fx->server, &pool, &receiver)); /* no geometry */
  pool.geometry = &geometry;
  pool.pool = "second";
  REFUSED(kvxfer_receiver_new(fx->server, &pool, &receiver)); /* no pages */
  pool.pages = 1;
  geometry.page_bytes = 0;
  REFUSED(kvxfer_receiver_new(fx->server, &pool, &receiver));
  geometry = fixture_geometry();
  static char memory[PAGE_BYTES];
  pool.memory = memory;
  pool.memory_length = PAGE_BYTES - 1; /* too little for a page */
  result = kvxfer_receiver_new(fx->server, &pool, &receiver);
  TRUE(result == KVXFER_INVALID_ARGUMENT || result == KVXFER_OUT_OF_RANGE || result == KVXFER_TOO_LARGE);
  pool.memory_length = PAGE_BYTES;
  OK(kvxfer_receiver_new(fx->server, &pool, &receiver));
  OK(kvxfer_receiver_close(receiver, WAIT_MS));
  OK(kvxfer_receiver_free(receiver));
  REFUSED(kvxfer_receiver_free(receiver));
}

/* A paged cache of one layer: two blocks of 16 tokens with one head of 32 elements of 2 bytes. */
static void paged(void) {
  static uint16_t layer[2048], row[64];
  for (int i = 0; i < 2048; i++) layer[i] = (uint16_t)i;
  void *base = layer;
  int64_t slot = 16 + 5;
  kvxfer_paged_t cache;
  memset(&cache, 0, sizeof cache);
  cache.struct_size = sizeof cache;
  cache.layers = &base;
  cache.layer_count = 1;
  cache.layer_bytes = sizeof layer;
  cache.blocks = 2;
  cache.heads = 1;
  cache.block_size = 16;
  cache.head_size = 32;
  cache.element_bytes = 2;
  cache.layout = KVXFER_PAGED_VEC;
  kvxfer_paged_chunk_t chunk = {&slot, 1, 0, row, sizeof row};
  OK(kvxfer_paged_gather(&cache, &chunk, 1));
  for (int i = 0; i < 32; i++) {
    TRUE(row[i] == 1024 + i * 16 + 5);           /* keys: [32 elements][16 tokens] */
    TRUE(row[32 + i] == 1024 + 512 + 5 * 32 + i); /* values: [16 tokens][32 elements] */
  }
  memset(row, 0, sizeof row);
  OK(kvxfer_paged_scatter(&cache, &chunk, 1));
  for (int i = 0; i < 1024; i++) {
    int ours = i < 512 ? i % 16 == 5 : (i - 512) / 32 == 5;
    TRUE(layer[i] == i && layer[1024 + i] == (ours ? 0 : 1024 + i));
  }

  row[0] = 7;
  slot = 32;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("slot 32");
  slot = -1;
  REFUSED(kvxfer_paged_scatter(&cache, &chunk, 1));
  SAYS("slot -1");
  slot = 0;
  chunk.length--;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("127 bytes");
  chunk.length++;
  chunk.data = layer;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("share memory");
  chunk.data = row;
  cache.layer_bytes--;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("layer_bytes");
  cache.layer_bytes++;
  cache.layout = 77;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("layout: is 77");
  cache.layout = KVXFER_PAGED_AMX;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("multiples of 32");
  cache.layout = KVXFER_PAGED_VEC;
  base = NULL;
  REFUSED(kvxfer_paged_gather(&cache, &chunk, 1));
  SAYS("layer 0 is NULL");
  TRUE(row[0] == 7);
}

int main(void) {
  paged();
  handles();
  fixture_t fx;
  fixture_new(&fx);
  structs(&fx);
  texts(&fx);
  ranges(&fx);
  sizes(&fx);
  requests(&fx);
  fixture_free(&fx);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
