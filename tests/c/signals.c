/* Signals stay the program's: its handlers run on its own threads, waits survive them, dispositions are left alone, and a
 * peer that goes away raises none. */
#include "fixture.h"

#include <signal.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

static volatile sig_atomic_t seen, elsewhere;
static pid_t main_thread;

static void handler(int number) {
  (void)number;
  seen++;
  if ((pid_t)syscall(SYS_gettid) != main_thread) elsewhere++;
}

static const int kinds[] = {SIGPIPE, SIGINT, SIGTERM, SIGSEGV, SIGBUS, SIGCHLD, SIGUSR1};
#define KINDS (sizeof kinds / sizeof kinds[0])

int main(void) {
  main_thread = (pid_t)syscall(SYS_gettid);
  struct sigaction before[KINDS], after;
  for (size_t i = 0; i < KINDS; i++) TRUE(sigaction(kinds[i], NULL, &before[i]) == 0);
  fixture_t fx;
  fixture_new(&fx);
  for (size_t i = 0; i < KINDS; i++) {
    TRUE(sigaction(kinds[i], NULL, &after) == 0 && after.sa_handler == before[i].sa_handler);
  }

  /* Blocked here, a signal for the process finds no thread of the library to run on. */
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler; /* without SA_RESTART: system calls of this thread are interrupted */
  TRUE(sigaction(SIGUSR1, &action, NULL) == 0 && sigaction(SIGALRM, &action, NULL) == 0);
  sigset_t usr1, pending;
  sigemptyset(&usr1);
  sigaddset(&usr1, SIGUSR1);
  TRUE(sigprocmask(SIG_BLOCK, &usr1, NULL) == 0);
  TRUE(kill(getpid(), SIGUSR1) == 0);
  kvxfer_piece_t piece = {0, 0, REGION_BYTES};
  for (int i = 0; i < 20; i++) {
    kvxfer_transfer_t *transfer = NULL;
    OK(kvxfer_peer_write(fx.peer, fx.local, fx.remote, &piece, 1, NULL, &transfer));
    OK(kvxfer_transfer_wait(transfer, WAIT_MS));
    OK(kvxfer_transfer_free(transfer));
  }
  TRUE(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) == 1);
  TRUE(seen == 0);
  TRUE(sigprocmask(SIG_UNBLOCK, &usr1, NULL) == 0);
  TRUE(seen == 1 && elsewhere == 0);

  /* A wait goes on through interruptions, to its own end. */
  struct itimerval often = {{0, 2000}, {0, 2000}}, never = {{0, 0}, {0, 0}};
  char text[KVXFER_MAX_NOTIFICATION];
  size_t length = 0;
  TRUE(setitimer(ITIMER_REAL, &often, NULL) == 0);
  EXPECT(KVXFER_TIMED_OUT, kvxfer_agent_wait_notification(fx.server, 100, NULL, 0, text, sizeof text, &length));
  OK(kvxfer_peer_notify(fx.peer, "through", 7));
  OK(kvxfer_agent_wait_notification(fx.server, WAIT_MS, NULL, 0, text, sizeof text, &length));
  kvxfer_peer_t *again = NULL;
  OK(kvxfer_agent_connect(fx.client, fx.address, WAIT_MS, &again));
  OK(kvxfer_peer_free(again));
  TRUE(setitimer(ITIMER_REAL, &never, NULL) == 0);
  TRUE(seen > 1 && elsewhere == 0);

  /* Writing to a peer that has gone is an error, not SIGPIPE. */
  OK(kvxfer_chunk_free(fx.chunk));
  fx.chunk = NULL;
  OK(kvxfer_agent_shutdown(fx.server, WAIT_MS));
  for (int i = 0; i < 50; i++) {
    kvxfer_result_t result = kvxfer_peer_notify(fx.peer, "anybody there?", 14);
    if (result != KVXFER_OK) break;
    usleep(1000);
  }
  kvxfer_transfer_t *transfer = NULL;
  kvxfer_result_t result = kvxfer_peer_write(fx.peer, fx.local, fx.remote, &piece, 1, NULL, &transfer);
  if (result == KVXFER_OK) {
    result = kvxfer_transfer_wait(transfer, WAIT_MS);
    OK(kvxfer_transfer_free(transfer));
  }
  TRUE(result != KVXFER_OK && result != KVXFER_IN_PROGRESS);
  fixture_free(&fx);
  TRUE(kvxfer_live_handles() == 0);
  puts("OK");
  return 0;
}
