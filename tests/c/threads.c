/* Several threads use one agent, one peer and one pool at the same time; then one frees what others are using. */
#include "fixture.h"

#include <pthread.h>

#define THREADS 4
#define ROUNDS 40
#define SLICE (REGION_BYTES / THREADS)

static fixture_t fx;

static void *writer(void *argument) {
  uint64_t me = (uint64_t)(uintptr_t)argument, base = me * SLICE;
  for (int round = 0; round < ROUNDS; round++) {
    memset(fx.local_base + base, (int)(me * 50 + (uint64_t)round), SLICE);
    kvxfer_piece_t pieces[] = {{base, base, SLICE / 2}, {base + SLICE / 2, base + SLICE / 2, SLICE / 2}};
    kvxfer_transfer_t *transfer = NULL;
    OK(kvxfer_peer_write(fx.peer, fx.local, fx.remote, pieces, 2, NULL, &transfer));
    OK(kvxfer_transfer_wait(transfer, WAIT_MS));
    TRUE(memcmp(fx.local_base + base, fx.target_base + base, SLICE) == 0);
    OK(kvxfer_transfer_free(transfer));

    char request[32], key[32];
    snprintf(request, sizeof request, "r-%d-%d", (int)me, round);
    snprintf(key, sizeof key, "k-%d-%d", (int)me, round);
    kvxfer_run_t run = {base, SLICE / 4};
    kvxfer_chunk_source_t source = {key, fx.local, &run, 1};
    kvxfer_delivery_t *delivery = NULL;
    OK(kvxfer_sender_send(fx.sender, request, &source, 1, WAIT_MS, &delivery));
    OK(kvxfer_delivery_wait(delivery, WAIT_MS, NULL));
    OK(kvxfer_delivery_free(delivery));
    kvxfer_chunk_t *chunk = NULL;
    const void *data = NULL;
    uint64_t bytes = 0;
    OK(kvxfer_receiver_acquire(fx.receiver, key, &chunk));
    OK(kvxfer_chunk_data(chunk, &data, &bytes));
    TRUE(bytes == SLICE / 4 && memcmp(data, fx.local_base + base, bytes) == 0);
    OK(kvxfer_receiver_remove(fx.receiver, key));
    OK(kvxfer_chunk_free(chunk));

    /* Errors are this thread's own. */
    char wrong[32];
    snprintf(wrong, sizeof wrong, "wrong-%d-%d", (int)me, round);
    kvxfer_chunk_t *none = NULL;
    EXPECT(KVXFER_NOT_FOUND, kvxfer_receiver_acquire(fx.receiver, wrong, &none));
    SAYS(wrong);
  }
  return NULL;
}

/* Uses the agent until it is closed under it. */
static void *waiter(void *argument) {
  (void)argument;
  char text[KVXFER_MAX_NOTIFICATION];
  size_t length;
  for (;;) {
    kvxfer_result_t result = kvxfer_agent_wait_notification(fx.server, WAIT_MS, NULL, 0, text, sizeof text, &length);
    if (result == KVXFER_OK) continue;
    TRUE(result == KVXFER_CLOSED || result == KVXFER_INVALID_ARGUMENT);
    return NULL;
  }
}

/* All threads free the same handle: one of them does it. */
static int freed;
static void *freer(void *handle) {
  kvxfer_result_t result = kvxfer_remote_region_free(handle);
  if (result == KVXFER_OK) {
    __atomic_fetch_add(&freed, 1, __ATOMIC_SEQ_CST);
  } else {
    EXPECT(KVXFER_INVALID_ARGUMENT, result);
  }
  return NULL;
}

static void run(void *(*body)(void *), void *argument, int numbered) {
  pthread_t threads[THREADS];
  for (uintptr_t t = 0; t < THREADS; t++) {
    TRUE(pthread_create(&threads[t], NULL, body, numbered ? (void *)t : argument) == 0);
  }
  for (int t = 0; t < THREADS; t++) TRUE(pthread_join(threads[t], NULL) == 0);
}

int main(void) {
  fixture_new(&fx);
  run(writer, NULL, 1);
  for (int i = 0; i < 20; i++) {
    kvxfer_remote_region_t *remote = NULL;
    OK(kvxfer_peer_region(fx.peer, "inbox", WAIT_MS, &remote));
    freed = 0;
    run(freer, remote, 0);
    TRUE(freed == 1);
  }
  pthread_t thread;
  TRUE(pthread_create(&thread, NULL, waiter, NULL) == 0);
  OK(kvxfer_peer_notify(fx.peer, "hello", 5));
  fixture_free(&fx);
  TRUE(pthread_join(thread, NULL) == 0);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
