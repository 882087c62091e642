/* Log messages reach the callback, once it is installed. */
#include "fixture.h"

static int messages, texts_seen;
static int context;

static void receive(uint32_t level, const char *target, const char *message, void *given) {
  if (level < KVXFER_LOG_ERROR || level > KVXFER_LOG_TRACE || given != &context) exit(3);
  __atomic_fetch_add(&messages, 1, __ATOMIC_SEQ_CST);
  if (strncmp(target, "kvxfer", 6) == 0 && message[0] != 0) __atomic_fetch_add(&texts_seen, 1, __ATOMIC_SEQ_CST);
  (void)kvxfer_version(); /* calls from inside are fine */
}

int main(void) {
  REFUSED(kvxfer_log_set_callback(KVXFER_LOG_TRACE, NULL, NULL));
  REFUSED(kvxfer_log_set_callback(0, receive, &context));
  REFUSED(kvxfer_log_set_callback(6, receive, &context));
  OK(kvxfer_log_set_callback(KVXFER_LOG_TRACE, receive, &context));
  EXPECT(KVXFER_BUSY, kvxfer_log_set_callback(KVXFER_LOG_TRACE, receive, &context));
  fixture_t fx;
  fixture_new(&fx);
  fixture_free(&fx);
  TRUE(messages > 0 && texts_seen == messages);
  puts("OK");
  return 0;
}
