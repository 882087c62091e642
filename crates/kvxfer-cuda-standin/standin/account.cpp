// Knobs, injected errors, and the account of calls and of what was not freed.
#include "standin.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

namespace standin {
namespace {

struct Fault {
  std::string call;
  int64_t at;
  int code;
};

struct Account {
  std::mutex lock;
  std::map<std::string, int64_t> calls, live;
  std::vector<Fault> faults;
  std::atomic<unsigned> delay{0};

  Account() {
    delay = unsigned(knob64("KVXSTANDIN_DELAY_US", 0));
    if (const char *text = getenv("KVXSTANDIN_FAIL")) plan(text);
  }
  void plan(const char *text) {
    std::string all = text;
    for (size_t from = 0; from < all.size();) {
      size_t to = all.find(',', from);
      if (to == std::string::npos) to = all.size();
      char name[128];
      long at;
      int code;
      if (sscanf(all.substr(from, to - from).c_str(), "%127[^:]:%ld:%d", name, &at, &code) == 3)
        faults.push_back({name, at, code});
      from = to + 1;
    }
  }
  std::string text() {
    std::lock_guard<std::mutex> hold(lock);
    std::string out = "{\"pid\":" + std::to_string(getpid()) + ",\"live\":{";
    bool first = true;
    for (auto &[k, n] : live) {
      if (n == 0) continue;
      out += (first ? "\"" : ",\"") + k + "\":" + std::to_string(n);
      first = false;
    }
    out += "},\"calls\":{";
    first = true;
    for (auto &[k, n] : calls) {
      out += (first ? "\"" : ",\"") + k + "\":" + std::to_string(n);
      first = false;
    }
    return out + "}}\n";
  }
};

// Never destroyed: threads of the process may still call while it ends.
Account &account() {
  static Account *a = new Account;
  return *a;
}

// At the end of the process, after everything that was loaded later.
__attribute__((destructor)) void report() {
  const char *path = getenv("KVXSTANDIN_REPORT");
  if (!path) return;
  std::string line = account().text();
  if (FILE *f = fopen(path, "a")) {
    fwrite(line.data(), 1, line.size(), f);
    fclose(f);
  }
}

}  // namespace

int64_t knob64(const char *name, int64_t otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtoll(text, nullptr, 0) : otherwise;
}
int knob(const char *name, int otherwise) { return int(knob64(name, otherwise)); }

CUresult enter(const char *name) {
  Account &a = account();
  std::lock_guard<std::mutex> hold(a.lock);
  int64_t n = ++a.calls[name];
  for (Fault &f : a.faults)
    if (f.call == name && (f.at == n || f.at == 0)) return f.code;
  return SUCCESS;
}

void live(const char *kind, int64_t by) {
  Account &a = account();
  std::lock_guard<std::mutex> hold(a.lock);
  a.live[kind] += by;
}

void pause_for_delay() {
  if (unsigned us = account().delay) usleep(us);
}

}  // namespace standin

// For tests that load the library by themselves.
API int64_t kvxstandin_live(const char *kind) {
  auto &a = standin::account();
  std::lock_guard<std::mutex> hold(a.lock);
  return a.live[kind];
}
API int64_t kvxstandin_calls(const char *name) {
  auto &a = standin::account();
  std::lock_guard<std::mutex> hold(a.lock);
  return a.calls[name];
}
API void kvxstandin_set_delay_us(unsigned us) { standin::account().delay = us; }
// Adds errors to come: "call:n:code", n counted from the beginning of the process.
API void kvxstandin_fail(const char *plan) {
  auto &a = standin::account();
  std::lock_guard<std::mutex> hold(a.lock);
  a.plan(plan);
}
