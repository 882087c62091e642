/* A forked child is told that its handles are of no use there; its parent goes on undisturbed. */
#include "fixture.h"

#include <sys/wait.h>
#include <unistd.h>

static void wait_for(pid_t child) {
  int status = -1;
  TRUE(waitpid(child, &status, 0) == child);
  TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
  /* Before the first handle nothing has started: a child may use the library as if it had been loaded there. */
  pid_t early = fork();
  TRUE(early >= 0);
  if (early == 0) {
    kvxfer_agent_t *agent = fixture_agent("early", 1);
    OK(kvxfer_agent_free(agent));
    _exit(0);
  }
  wait_for(early);

  fixture_t fx;
  fixture_new(&fx);
  pid_t child = fork();
  TRUE(child >= 0);
  if (child == 0) {
    uint64_t value = 0;
    kvxfer_agent_t *agent = NULL;
    kvxfer_transfer_t *transfer = NULL;
    kvxfer_piece_t piece = {0, 0, 64};
    EXPECT(KVXFER_CLOSED, kvxfer_agent_epoch(fx.server, &value));
    SAYS("forked");
    EXPECT(KVXFER_CLOSED, kvxfer_peer_write(fx.peer, fx.local, fx.remote, &piece, 1, NULL, &transfer));
    EXPECT(KVXFER_CLOSED, kvxfer_transfer_wait(fx.transfer, WAIT_MS));
    EXPECT(KVXFER_CLOSED, kvxfer_receiver_remove(fx.receiver, "chunk-a"));
    EXPECT(KVXFER_CLOSED, kvxfer_agent_new(NULL, &agent));
    EXPECT(KVXFER_CLOSED, kvxfer_agent_free(fx.server));
    EXPECT(KVXFER_CLOSED, kvxfer_agent_free(fx.client));
    TRUE(strcmp(kvxfer_version(), "") != 0); /* what needs no handle still works */
    /* Not _exit(): leak checkers would look here for what the parent's threads hold. */
    execlp("true", "true", (char *)NULL);
    _exit(127);
  }
  wait_for(child);

  /* The parent: peers are still connected, transfers run, the pool serves. */
  memset(fx.local_base, 0x77, REGION_BYTES);
  kvxfer_piece_t piece = {0, 0, REGION_BYTES};
  kvxfer_transfer_t *transfer = NULL;
  OK(kvxfer_peer_write(fx.peer, fx.local, fx.remote, &piece, 1, NULL, &transfer));
  OK(kvxfer_transfer_wait(transfer, WAIT_MS));
  TRUE(memcmp(fx.local_base, fx.target_base, REGION_BYTES) == 0);
  OK(kvxfer_transfer_free(transfer));
  kvxfer_run_t run = {0, 1000};
  kvxfer_chunk_source_t source = {"after-fork", fx.local, &run, 1};
  kvxfer_delivery_t *delivery = NULL;
  OK(kvxfer_sender_send(fx.sender, "after-fork", &source, 1, WAIT_MS, &delivery));
  OK(kvxfer_delivery_wait(delivery, WAIT_MS, NULL));
  OK(kvxfer_delivery_free(delivery));
  fixture_free(&fx);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
