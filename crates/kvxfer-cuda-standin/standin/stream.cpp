// Streams with threads of their own, and events.
#include "memory.h"

#include <chrono>
#include <set>

using namespace standin;

namespace standin {
namespace {

// The handle a caller holds.
struct Kept {
  std::shared_ptr<Stream> stream;
};
std::set<Kept *> streams;
std::set<Event *> events;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Stream::Stream(Context *c, int p) : context(c), priority(p), thread_([this] { run(); }) {}

Stream::~Stream() {
  {
    std::lock_guard<std::mutex> hold(lock_);
    ended_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Stream::push(std::function<CUresult()> work) {
  push_mark([work = std::move(work)](bool broken) { return broken ? SUCCESS : work(); });
}

void Stream::push_mark(std::function<CUresult(bool)> work) {
  std::lock_guard<std::mutex> hold(lock_);
  queue_.push_back(std::move(work));
  changed_.notify_all();
}

bool Stream::idle() {
  std::lock_guard<std::mutex> hold(lock_);
  return queue_.empty() && !busy_;
}

void Stream::drain() {
  std::unique_lock<std::mutex> hold(lock_);
  changed_.wait(hold, [this] { return queue_.empty() && !busy_; });
}

void Stream::run() {
  std::unique_lock<std::mutex> hold(lock_);
  for (;;) {
    changed_.wait(hold, [this] { return ended_ || !queue_.empty(); });
    if (queue_.empty()) return;  // What was queued is done first.
    auto work = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    hold.unlock();
    pause_for_delay();
    // After an error only marks are passed (they are what somebody may wait for); nothing else of the context runs.
    if (CUresult r = work(context->sticky != SUCCESS)) {
      int none = SUCCESS;
      context->sticky.compare_exchange_strong(none, r);
    }
    hold.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

CUresult stream_of(void *handle, std::shared_ptr<Stream> *out) {
  if (uintptr_t(handle) <= 2) {
    Context *c;
    if (CUresult r = current(&c)) return r;
    std::lock_guard<std::mutex> hold(c->lock);
    if (!c->standard) c->standard = std::make_unique<Stream>(c, 0);
    *out = std::shared_ptr<Stream>(std::shared_ptr<Stream>(), c->standard.get());
    return SUCCESS;
  }
  std::lock_guard<std::mutex> hold(world());
  auto it = streams.find(static_cast<Kept *>(handle));
  if (it == streams.end()) return INVALID_HANDLE;
  *out = (*it)->stream;
  if (!(*out)->context->alive) return CONTEXT_IS_DESTROYED;
  return (*out)->context->sticky;
}

}  // namespace standin

static CUresult make(void **out, int priority) {
  Context *c;
  if (CUresult r = current(&c)) return r;
  if (!out) return INVALID_VALUE;
  Kept *kept = new Kept{std::make_shared<Stream>(c, priority)};
  std::lock_guard<std::mutex> hold(world());
  streams.insert(kept);
  live("streams", 1);
  *out = kept;
  return SUCCESS;
}
API CUresult cuStreamCreate(void **out, unsigned) {
  READY(cuStreamCreate);
  return make(out, 0);
}
API CUresult cuStreamCreateWithPriority(void **out, unsigned, int priority) {
  READY(cuStreamCreateWithPriority);
  return make(out, priority);
}
API CUresult cuStreamDestroy_v2(void *handle) {
  READY(cuStreamDestroy_v2);
  Kept *kept = static_cast<Kept *>(handle);
  {
    std::lock_guard<std::mutex> hold(world());
    if (!streams.erase(kept)) return INVALID_HANDLE;
    live("streams", -1);
  }
  // Returns at once; what was queued is done by and by.
  std::thread([kept] { delete kept; }).detach();
  return SUCCESS;
}
#define STREAM(handle, s)        \
  std::shared_ptr<Stream> s;     \
  if (CUresult r = stream_of(handle, &s)) return r
API CUresult cuStreamQuery(void *handle) {
  READY(cuStreamQuery);
  STREAM(handle, s);
  return s->idle() ? SUCCESS : NOT_READY;
}
API CUresult cuStreamSynchronize(void *handle) {
  READY(cuStreamSynchronize);
  STREAM(handle, s);
  s->drain();
  return s->context->sticky;
}
API CUresult cuStreamGetCtx(void *handle, Context **out) {
  READY(cuStreamGetCtx);
  STREAM(handle, s);
  if (!out) return INVALID_VALUE;
  *out = s->context;
  return SUCCESS;
}
API CUresult cuStreamGetPriority(void *handle, int *out) {
  READY(cuStreamGetPriority);
  STREAM(handle, s);
  if (!out) return INVALID_VALUE;
  *out = s->priority;
  return SUCCESS;
}
API CUresult cuLaunchHostFunc(void *handle, void (*f)(void *), void *data) {
  READY(cuLaunchHostFunc);
  STREAM(handle, s);
  if (!f) return INVALID_VALUE;
  s->push([f, data] { return f(data), SUCCESS; });
  return SUCCESS;
}

API CUresult cuEventCreate(Event **out, unsigned flags) {
  CONTEXT(cuEventCreate, c);
  if (!out) return INVALID_VALUE;
  *out = new Event(c, flags);
  std::lock_guard<std::mutex> hold(world());
  events.insert(*out);
  live("events", 1);
  return SUCCESS;
}
static CUresult find_event(Event *e, std::shared_ptr<Event::State> *out) {
  std::lock_guard<std::mutex> hold(world());
  if (!events.count(e)) return INVALID_HANDLE;
  if (!e->context->alive) return CONTEXT_IS_DESTROYED;
  *out = e->state;
  return SUCCESS;
}
#define EVENT(e, s)                    \
  std::shared_ptr<Event::State> s;     \
  if (CUresult r = find_event(e, &s)) return r
API CUresult cuEventDestroy_v2(Event *e) {
  READY(cuEventDestroy_v2);
  std::lock_guard<std::mutex> hold(world());
  if (!events.erase(e)) return INVALID_HANDLE;
  live("events", -1);
  delete e;
  return SUCCESS;
}
API CUresult cuEventRecord(Event *e, void *handle) {
  READY(cuEventRecord);
  EVENT(e, state);
  STREAM(handle, s);
  uint64_t mark;
  {
    std::lock_guard<std::mutex> hold(state->lock);
    mark = ++state->recorded;
  }
  s->push_mark([state, mark](bool) -> CUresult {
    std::lock_guard<std::mutex> hold(state->lock);
    state->reached[mark] = true;
    state->at = now();
    state->changed.notify_all();
    return SUCCESS;
  });
  return SUCCESS;
}
API CUresult cuEventQuery(Event *e) {
  READY(cuEventQuery);
  EVENT(e, state);
  if (CUresult r = e->context->sticky) return r;
  std::lock_guard<std::mutex> hold(state->lock);
  return state->has(state->recorded) ? SUCCESS : NOT_READY;
}
API CUresult cuEventSynchronize(Event *e) {
  READY(cuEventSynchronize);
  EVENT(e, state);
  {
    std::unique_lock<std::mutex> hold(state->lock);
    uint64_t mark = state->recorded;
    state->changed.wait(hold, [&] { return state->has(mark); });
  }
  return e->context->sticky;
}
API CUresult cuEventElapsedTime(float *out, Event *a, Event *b) {
  READY(cuEventElapsedTime);
  EVENT(a, x);
  EVENT(b, y);
  if (!out) return INVALID_VALUE;
  if ((a->flags | b->flags) & 2) return INVALID_HANDLE;
  *out = float((y->at - x->at) * 1e3);
  return SUCCESS;
}
API CUresult cuStreamWaitEvent(void *handle, Event *e, unsigned) {
  READY(cuStreamWaitEvent);
  EVENT(e, state);
  STREAM(handle, s);
  uint64_t mark;
  {
    std::lock_guard<std::mutex> hold(state->lock);
    mark = state->recorded;
  }
  s->push_mark([state, mark](bool) -> CUresult {
    std::unique_lock<std::mutex> hold(state->lock);
    state->changed.wait(hold, [&] { return state->has(mark); });
    return SUCCESS;
  });
  return SUCCESS;
}
