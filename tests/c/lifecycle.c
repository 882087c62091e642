/* Everything once, as a well-behaved program does it; nothing is left at the end. */
#include "fixture.h"

#include <poll.h>

static void basics(void) {
  TRUE(strcmp(kvxfer_version(), "") != 0);
  TRUE(kvxfer_abi_version() == KVXFER_ABI_VERSION);
  TRUE(!kvxfer_has_feature("no such feature") && !kvxfer_has_feature(NULL));
  TRUE(strcmp(kvxfer_result_name(KVXFER_TIMED_OUT), "timed_out") == 0);
  TRUE(strcmp(kvxfer_result_name(4711), "unknown") == 0);
  TRUE(kvxfer_result_is_retryable(KVXFER_NO_CAPACITY) && !kvxfer_result_is_retryable(KVXFER_MISMATCH));
  TRUE(strcmp(kvxfer_transport_name(KVXFER_TRANSPORT_SHM), "shm") == 0);
  TRUE(strcmp(kvxfer_transport_name(99), "unknown") == 0);
  TRUE(strcmp(kvxfer_last_error(), "") == 0);
}

static void configured(void) {
  kvxfer_agent_t *agent = NULL;
  char name[KVXFER_MAX_NAME + 1];
  size_t length;
  OK(kvxfer_agent_new_from_yaml("name: from-yaml\ntransports: { forbid: [tcp] }\n", 0, &agent));
  OK(kvxfer_agent_name(agent, name, sizeof name, &length));
  TRUE(strcmp(name, "from-yaml") == 0 && length == 9);
  OK(kvxfer_agent_free(agent));
  OK(kvxfer_agent_new_from_json("{\"name\": \"from-json\", \"transfer_timeout\": \"3s\"}", 0, &agent));
  OK(kvxfer_agent_free(agent));
  OK(kvxfer_agent_new_from_env(&agent));
  OK(kvxfer_agent_free(agent));
  OK(kvxfer_agent_new(NULL, &agent));
  OK(kvxfer_agent_free(agent));
}

static void texts(fixture_t *fx) {
  char small[4], text[4096];
  size_t length = 0;
  OK(kvxfer_agent_name(fx->server, NULL, 0, &length));
  TRUE(length == strlen("server"));
  length = 0;
  EXPECT(KVXFER_TOO_LARGE, kvxfer_agent_name(fx->server, small, sizeof small, &length));
  TRUE(length == strlen("server"));
  EXPECT(KVXFER_TOO_LARGE, kvxfer_agent_name(fx->server, text, 6, &length)); /* no room for the NUL */
  OK(kvxfer_agent_name(fx->server, text, 7, &length));
  TRUE(strcmp(text, "server") == 0);
  EXPECT(KVXFER_NOT_FOUND, kvxfer_agent_address(fx->server, 1, text, sizeof text, &length));
  OK(kvxfer_agent_peers(fx->server, text, sizeof text, &length));
  TRUE(strstr(text, "client") != NULL);
  OK(kvxfer_peer_name(fx->peer, text, sizeof text, &length));
  TRUE(strcmp(text, "server") == 0);
  OK(kvxfer_peer_paths(fx->peer, text, sizeof text, &length));
  TRUE(length > 0 && strchr(text, '\t') != NULL);
  OK(kvxfer_agent_transports(fx->client, text, sizeof text, &length));
  TRUE(strstr(text, "inproc\tok") != NULL);
  OK(kvxfer_remote_region_transports(fx->remote, text, sizeof text, &length));
  TRUE(length > 0);
  OK(kvxfer_agent_metrics(fx->client, NULL, 0, &length));
  char *metrics = malloc(length + 4096);
  OK(kvxfer_agent_metrics(fx->client, metrics, length + 4096, &length));
  TRUE(strstr(metrics, "kvxfer_") != NULL && strlen(metrics) == length);
  free(metrics);
}

static void one_sided(fixture_t *fx) {
  uint64_t bytes = 0, epoch = 0, other = 0, id = 0;
  OK(kvxfer_remote_region_length(fx->remote, &bytes));
  TRUE(bytes == REGION_BYTES);
  OK(kvxfer_agent_epoch(fx->server, &epoch));
  OK(kvxfer_peer_epoch(fx->peer, &other));
  TRUE(epoch == other && epoch != 0);
  OK(kvxfer_region_id(fx->local, &id));
  kvxfer_result_t state = KVXFER_UNKNOWN;
  OK(kvxfer_peer_state(fx->peer, &state));
  TRUE(state == KVXFER_OK);

  /* Pieces backwards, with a notification; completion from the event descriptor. */
  memset(fx->target_base, 0, REGION_BYTES);
  kvxfer_piece_t pieces[16];
  for (uint64_t i = 0; i < 16; i++) {
    pieces[i].local_offset = i * 4096;
    pieces[i].remote_offset = (15 - i) * 4096;
    pieces[i].length = 4096;
  }
  int fd = -1;
  OK(kvxfer_agent_event_fd(fx->client, &fd));
  TRUE(fd >= 0);
  kvxfer_transfer_options_t options;
  memset(&options, 0, sizeof options);
  options.struct_size = sizeof options;
  options.timeout_ms = WAIT_MS;
  options.notify = "landed";
  options.notify_length = 6;
  options.integrity = KVXFER_INTEGRITY_FULL;
  kvxfer_transfer_t *transfer = NULL;
  OK(kvxfer_agent_clear_event(fx->client));
  OK(kvxfer_peer_write(fx->peer, fx->local, fx->remote, pieces, 16, &options, &transfer));
  for (;;) {
    kvxfer_result_t result = kvxfer_transfer_poll(transfer);
    if (result != KVXFER_IN_PROGRESS) {
      OK(result);
      break;
    }
    struct pollfd p = {fd, POLLIN, 0};
    TRUE(poll(&p, 1, WAIT_MS) == 1);
    OK(kvxfer_agent_clear_event(fx->client));
  }
  OK(kvxfer_transfer_wait(transfer, 0));
  OK(kvxfer_transfer_cancel(transfer)); /* ended already: done */
  OK(kvxfer_transfer_id(transfer, &id));
  kvxfer_transfer_report_t report;
  memset(&report, 0, sizeof report);
  report.struct_size = sizeof report;
  OK(kvxfer_transfer_report(transfer, &report));
  TRUE(report.result == KVXFER_OK && report.bytes == REGION_BYTES && report.pieces == 16 && report.failed == 0);
  TRUE(report.transport != KVXFER_TRANSPORT_ANY && report.duration_ns > 0);
  kvxfer_result_t outcomes[16];
  OK(kvxfer_transfer_outcomes(transfer, 0, 16, outcomes));
  for (int i = 0; i < 16; i++) OK(outcomes[i]);
  for (int i = 0; i < 16; i++) {
    TRUE(memcmp(fx->local_base + i * 4096, fx->target_base + (15 - i) * 4096, 4096) == 0);
  }
  OK(kvxfer_transfer_free(transfer));

  kvxfer_path_stats_t all, one;
  memset(&all, 0, sizeof all);
  all.struct_size = sizeof all;
  one = all;
  OK(kvxfer_peer_stats(fx->peer, KVXFER_TRANSPORT_ANY, &all));
  TRUE(all.write_bytes >= REGION_BYTES && all.write_transfers >= 1 && all.write_failed == 0 && all.in_flight == 0);
  OK(kvxfer_peer_stats(fx->peer, report.transport, &one));
  TRUE(one.write_bytes >= REGION_BYTES && one.write_bytes <= all.write_bytes);
  EXPECT(KVXFER_NOT_FOUND, kvxfer_peer_stats(fx->peer, KVXFER_TRANSPORT_CUDA_IPC, &one));

  char from[KVXFER_MAX_NAME + 1], text[KVXFER_MAX_NOTIFICATION];
  size_t length = 0;
  EXPECT(KVXFER_TOO_LARGE, kvxfer_agent_wait_notification(fx->server, WAIT_MS, from, sizeof from, text, 3, &length));
  TRUE(length == 6);
  OK(kvxfer_agent_try_notification(fx->server, from, sizeof from, text, sizeof text, &length));
  TRUE(length == 6 && memcmp(text, "landed", 6) == 0 && strcmp(from, "client") == 0);
  EXPECT(KVXFER_NOT_FOUND, kvxfer_agent_try_notification(fx->server, from, sizeof from, text, sizeof text, &length));
  EXPECT(KVXFER_TIMED_OUT, kvxfer_agent_wait_notification(fx->server, 1, NULL, 0, text, sizeof text, &length));

  /* From the other side, and reading. */
  kvxfer_peer_t *client = NULL;
  OK(kvxfer_agent_peer(fx->server, "client", &client));
  OK(kvxfer_peer_notify(client, NULL, 0));
  OK(kvxfer_agent_wait_notification(fx->client, WAIT_MS, NULL, 0, text, sizeof text, &length));
  TRUE(length == 0);
  OK(kvxfer_peer_free(client));
  EXPECT(KVXFER_NOT_FOUND, kvxfer_agent_peer(fx->server, "nobody", &client));
  memset(fx->local_base, 0, 4096);
  OK(kvxfer_peer_read(fx->peer, fx->local, fx->remote, &pieces[0], 1, NULL, &transfer));
  OK(kvxfer_transfer_wait(transfer, WAIT_MS));
  TRUE(memcmp(fx->local_base, fx->target_base + 15 * 4096, 4096) == 0);
  OK(kvxfer_transfer_free(transfer));

  /* The caller's own memory. */
  unsigned char *mine = malloc(8192);
  memset(mine, 0x5a, 8192);
  kvxfer_region_t *region = NULL;
  OK(kvxfer_region_register(fx->client, mine, 8192, &region));
  kvxfer_piece_t piece = {1, 2, 8000};
  OK(kvxfer_peer_write(fx->peer, region, fx->remote, &piece, 1, NULL, &transfer));
  OK(kvxfer_transfer_wait(transfer, WAIT_MS));
  OK(kvxfer_transfer_free(transfer));
  OK(kvxfer_region_free(region));
  free(mine);
  TRUE(fx->target_base[2] == 0x5a && fx->target_base[8001] == 0x5a);

  OK(kvxfer_agent_unexport(fx->server, "inbox"));
  kvxfer_remote_region_t *remote = NULL;
  EXPECT(KVXFER_NOT_FOUND, kvxfer_peer_region(fx->peer, "inbox", WAIT_MS, &remote));
}

static void channel(fixture_t *fx) {
  uint32_t state = 99, page = 99;
  uint64_t bytes = 99, offset = 99;
  OK(kvxfer_receiver_lookup(fx->receiver, "chunk-a", &state, &bytes));
  TRUE(state == KVXFER_LOOKUP_PRESENT && bytes == 1000);
  OK(kvxfer_receiver_lookup(fx->receiver, "chunk-z", &state, NULL));
  TRUE(state == KVXFER_LOOKUP_ABSENT);
  const void *data = NULL;
  void *base = NULL;
  OK(kvxfer_chunk_data(fx->chunk, &data, &bytes));
  TRUE(bytes == 1000);
  OK(kvxfer_chunk_page(fx->chunk, &page, &offset));
  OK(kvxfer_receiver_memory(fx->receiver, &base, &bytes));
  TRUE(bytes >= 4 * PAGE_BYTES && data == (char *)base + offset && offset == (uint64_t)page * PAGE_BYTES);

  kvxfer_receiver_event_t event;
  memset(&event, 0, sizeof event);
  event.struct_size = sizeof event;
  OK(kvxfer_receiver_next_event(fx->receiver, WAIT_MS, &event));
  TRUE(event.kind == KVXFER_EVENT_READY && event.result == KVXFER_OK);
  TRUE(strcmp(event.sender, "client") == 0 && strcmp(event.request, "request-a") == 0);
  EXPECT(KVXFER_TIMED_OUT, kvxfer_receiver_next_event(fx->receiver, 1, &event));

  /* A request in one go; "chunk-a" is there already and does not travel. */
  kvxfer_run_t first = {0, 1000}, second[] = {{64, 500}, {8192, 12}};
  kvxfer_chunk_source_t sources[] = {{"chunk-a", fx->local, &first, 1}, {"chunk-b", fx->local, second, 2}};
  kvxfer_delivery_t *delivery = NULL;
  OK(kvxfer_sender_send(fx->sender, "request-b", sources, 2, WAIT_MS, &delivery));
  kvxfer_delivery_report_t report;
  memset(&report, 0, sizeof report);
  report.struct_size = sizeof report;
  OK(kvxfer_delivery_wait(delivery, WAIT_MS, &report));
  TRUE(report.present == 1 && report.written == 1 && report.bytes == 512);
  OK(kvxfer_delivery_poll(delivery));
  OK(kvxfer_delivery_free(delivery));
  OK(kvxfer_receiver_wait_request(fx->receiver, "request-b", WAIT_MS));
  kvxfer_chunk_t *chunk = NULL;
  OK(kvxfer_receiver_acquire(fx->receiver, "chunk-b", &chunk));
  OK(kvxfer_chunk_data(chunk, &data, &bytes));
  TRUE(bytes == 512 && memcmp(data, fx->local_base + 64, 500) == 0);
  TRUE(memcmp((const char *)data + 500, fx->local_base + 8192, 12) == 0);

  /* A finished reservation stays a handle that says so; one that is aborted gives its pages back. */
  EXPECT(KVXFER_CLOSED, kvxfer_reservation_write(fx->reservation, 0, fx->local, &first, 1));
  EXPECT(KVXFER_CLOSED, kvxfer_reservation_finish(fx->reservation, &delivery));
  kvxfer_chunk_spec_t spec = {"chunk-c", 10};
  kvxfer_reservation_t *reservation = NULL;
  OK(kvxfer_sender_reserve(fx->sender, "request-c", &spec, 1, 0, &reservation));
  OK(kvxfer_reservation_wait_admitted(reservation, WAIT_MS));
  OK(kvxfer_receiver_lookup(fx->receiver, "chunk-c", &state, &bytes));
  TRUE(state == KVXFER_LOOKUP_PENDING);
  EXPECT(KVXFER_IN_PROGRESS, kvxfer_receiver_acquire(fx->receiver, "chunk-c", &chunk));
  REFUSED(kvxfer_reservation_abort(reservation, KVXFER_OK));
  OK(kvxfer_reservation_abort(reservation, KVXFER_CANCELLED));
  OK(kvxfer_reservation_free(reservation));
  EXPECT(KVXFER_CANCELLED, kvxfer_receiver_wait_request(fx->receiver, "request-c", WAIT_MS));

  kvxfer_peer_t *peer = NULL;
  OK(kvxfer_sender_peer(fx->sender, &peer));
  OK(kvxfer_peer_free(peer));
  OK(kvxfer_chunk_free(chunk));
  OK(kvxfer_receiver_remove(fx->receiver, "chunk-b"));
  EXPECT(KVXFER_NOT_FOUND, kvxfer_receiver_remove(fx->receiver, "chunk-b"));
  kvxfer_pool_stats_t stats;
  memset(&stats, 0, sizeof stats);
  stats.struct_size = sizeof stats;
  OK(kvxfer_receiver_stats(fx->receiver, &stats));
  TRUE(stats.pages == 4 && stats.pinned == 1 && stats.published == 1 && stats.queued == 0);
  TRUE(stats.free_pages + stats.quarantined + stats.writing == 3);
}

/* What was sent is read back from the receiver. */
static void reading_back(fixture_t *fx) {
  size_t count = 99;
  uint64_t lease = 99;
  OK(kvxfer_found_count(fx->found, &count, &lease));
  TRUE(count == 1 && lease == WAIT_MS);
  kvxfer_found_chunk_t chunk;
  memset(&chunk, 0, sizeof chunk);
  chunk.struct_size = sizeof chunk;
  OK(kvxfer_found_chunk(fx->found, 0, &chunk));
  TRUE(chunk.index == 1 && chunk.length == 1000 && chunk.page < 4 && chunk.generation > 0);
  EXPECT(KVXFER_OUT_OF_RANGE, kvxfer_found_chunk(fx->found, 1, &chunk));

  kvxfer_run_t runs[] = {{20000, 900}, {30000, 100}};
  kvxfer_found_target_t target = {fx->local, runs, 2, 1, 1};
  REFUSED(kvxfer_found_read(fx->found, &target, 1, WAIT_MS, NULL)); /* `reserved` is set */
  target.reserved = 0;
  kvxfer_read_report_t report;
  memset(&report, 0, sizeof report);
  report.struct_size = sizeof report;
  OK(kvxfer_found_read(fx->found, &target, 1, WAIT_MS, &report));
  TRUE(report.chunks == 1 && report.bytes == 1000 && report.transport == KVXFER_TRANSPORT_INPROC);
  TRUE(memcmp(fx->local_base + 20000, fx->local_base + 100, 600) == 0); /* as the fixture sent it */
  TRUE(memcmp(fx->local_base + 20600, fx->local_base + 5000, 300) == 0);
  TRUE(memcmp(fx->local_base + 30000, fx->local_base + 5300, 100) == 0);
  EXPECT(KVXFER_CLOSED, kvxfer_found_read(fx->found, &target, 1, WAIT_MS, NULL));

  /* Nothing is held where nothing was found, or where it was only asked. */
  const char *keys[] = {"chunk-z", "chunk-a"};
  kvxfer_found_t *found = NULL;
  OK(kvxfer_sender_query(fx->sender, keys, 2, 0, WAIT_MS, &found));
  OK(kvxfer_found_count(found, &count, &lease));
  TRUE(count == 1 && lease == 0);
  REFUSED(kvxfer_found_read(found, &target, 1, WAIT_MS, NULL));
  OK(kvxfer_found_free(found));
  OK(kvxfer_sender_query(fx->sender, keys, 1, WAIT_MS, WAIT_MS, &found));
  OK(kvxfer_found_count(found, &count, NULL));
  TRUE(count == 0);
  OK(kvxfer_found_free(found));
  REFUSED(kvxfer_sender_query(fx->sender, keys, 0, WAIT_MS, WAIT_MS, &found));
}

int main(void) {
  basics();
  configured();
  fixture_t fx;
  fixture_new(&fx);
  texts(&fx);
  one_sided(&fx);
  channel(&fx);
  reading_back(&fx);
  OK(kvxfer_receiver_close(fx.receiver, WAIT_MS));
  OK(kvxfer_peer_disconnect(fx.peer));
  kvxfer_result_t state = KVXFER_OK;
  OK(kvxfer_peer_state(fx.peer, &state));
  TRUE(state != KVXFER_OK);
  OK(kvxfer_agent_shutdown(fx.client, WAIT_MS));
  OK(kvxfer_agent_shutdown(fx.client, WAIT_MS));
  fixture_free(&fx);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
