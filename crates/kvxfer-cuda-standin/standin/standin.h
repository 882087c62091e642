// A CUDA driver over host memory: what its parts share. Types and numbers are those of the driver API's public documentation.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;

enum : CUresult {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  DEINITIALIZED = 4,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  CANNOT_MAP = 205,
  NO_BINARY_FOR_GPU = 209,
  INVALID_PTX = 218,
  JIT_COMPILER_NOT_FOUND = 221,
  UNSUPPORTED_PTX_VERSION = 222,
  PEER_ACCESS_UNSUPPORTED = 217,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  PEER_ACCESS_ALREADY_ENABLED = 704,
  CONTEXT_IS_DESTROYED = 709,
  HOST_MEMORY_ALREADY_REGISTERED = 712,
  HOST_MEMORY_NOT_REGISTERED = 713,
  NOT_SUPPORTED = 801,
  UNKNOWN = 999,
};

namespace standin {

constexpr int MAX_DEVICES = 16;

struct Stream;

struct Context {
  int device;
  bool primary;
  std::atomic<bool> alive{true};
  // An error of queued work: every later call in the context answers it.
  std::atomic<int> sticky{SUCCESS};
  std::unique_ptr<Stream> standard;
  std::mutex lock;
};

// A queue with a thread of its own.
struct Stream {
  explicit Stream(Context *c, int priority);
  ~Stream();
  void push(std::function<CUresult()> work);
  // Runs also after an error; is told of it.
  void push_mark(std::function<CUresult(bool broken)> work);
  bool idle();
  void drain();

  Context *context;
  int priority;

 private:
  void run();
  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<std::function<CUresult(bool)>> queue_;
  bool busy_ = false, ended_ = false;
  std::thread thread_;
};

struct Event {
  explicit Event(Context *c, unsigned f) : context(c), flags(f), state(std::make_shared<State>()) {}
  struct State {
    std::mutex lock;
    std::condition_variable changed;
    uint64_t recorded = 0;
    std::map<uint64_t, bool> reached;  // By record: two streams may come past theirs in any order.
    bool has(uint64_t mark) { return mark == 0 || reached[mark]; }
    double at = 0;
  };
  Context *context;
  unsigned flags;
  std::shared_ptr<State> state;  // Queued waits outlive the handle.
};

// Bytes behind device addresses: a memfd, so that other processes can map it.
struct Physical {
  Physical(int fd, size_t size, int device) : fd(fd), size(size), device(device) {}
  ~Physical();
  int fd;
  size_t size;
  int device;
  bool counted = false;
};

// --- knobs and accounts (account.cpp) ---
// Counts a call by name; the injected error if there is one for it now.
CUresult enter(const char *name);
void live(const char *kind, int64_t by);
int knob(const char *name, int otherwise);
int64_t knob64(const char *name, int64_t otherwise);
void pause_for_delay();

// --- devices and contexts (device.cpp) ---
int devices();
CUresult ready();                       // NOT_INITIALIZED before cuInit
CUresult current(Context **out);        // of the calling thread, alive, without an error
bool is_context(void *handle);
std::mutex &world();                    // guards all tables of handles

// --- memory (memory.cpp) ---
bool is_device(uint64_t at);
// The host's view of a range of device addresses, or null when any byte of it is not allocated.
void *translate(uint64_t at, size_t size);
// A range of registered or pinned host memory.
bool is_pinned(uint64_t at, size_t size);
void forget_context(Context *c);

// --- streams (stream.cpp) ---
CUresult stream_of(void *handle, std::shared_ptr<Stream> *out);

#define CALL(name)                                        \
  if (CUresult injected = standin::enter(#name)) return injected
#define READY(name) \
  CALL(name);       \
  if (CUresult r = standin::ready()) return r
#define CONTEXT(name, c)      \
  READY(name);                \
  standin::Context *c;        \
  if (CUresult r = standin::current(&c)) return r

}  // namespace standin
