#include "parallel.h"

#include <chrono>
#include <cstdlib>
#include <new>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pyqkern {
namespace {

// The OpenMP runtime that torch has loaded into the global scope (libgomp; LLVM's libomp and Intel's libiomp5 export
// the same entry points). Looked up by name, because linking one could bring a second pool into the process.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  const char* path = "";

  OpenMP() {
#if !defined(_WIN32)
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    max_threads = reinterpret_cast<decltype(max_threads)>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    Dl_info info;
    if (parallel && max_threads && dladdr(reinterpret_cast<void*>(parallel), &info)) path = info.dli_fname;
    pthread_atfork(nullptr, nullptr, [] { forked() = true; });
#endif
  }

  static bool& forked() {
    static bool value = false;
    return value;
  }
};

const OpenMP& openmp() {
  static const OpenMP instance;
  return instance;
}

using Clock = std::chrono::steady_clock;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
};

// What a thread has of its own.
struct OfThread {
  Buffer buffers[kSlots];
  bool (*interrupted)() = nullptr;              // set while this thread is in a CallScope
  Clock::time_point asks_at;                    // when it is asked next; zero before the first poll
  const std::atomic<bool>* given_up = nullptr;  // set while a thread of the pool is in a region

  void trim() {
    for (Buffer& b : buffers)
      if (b.size > kKept) b.release();
  }
};
thread_local OfThread own;

}  // namespace

int threads() { return *openmp().path && !OpenMP::forked() ? openmp().max_threads() : 1; }

const char* openmp_path() { return openmp().path; }

void parallel_region(int count, void (*f)(void*), void* context) {
  if (count <= 1) f(context);
  else openmp().parallel(f, context, static_cast<unsigned>(count), 0);
}

CallScope::CallScope(bool (*interrupted)()) {
  own.interrupted = interrupted;
  own.asks_at = {};
}

CallScope::~CallScope() {
  own.interrupted = nullptr;
  own.trim();
}

void poll() {
  if (!own.interrupted) {
    if (own.given_up && *own.given_up) throw Interrupted();
    return;
  }
  const auto now = Clock::now();
  const bool is_first = own.asks_at == Clock::time_point{};
  if (!is_first && now < own.asks_at) return;
  own.asks_at = now + std::chrono::milliseconds(50);
  if (!is_first && own.interrupted()) throw Interrupted();
}

void begin_piece(const std::atomic<bool>* given_up) {
  if (!own.interrupted) own.given_up = given_up;
}

void end_piece() {
  if (own.interrupted) return;
  own.given_up = nullptr;
  own.trim();
}

void* scratch(Slot slot, size_t bytes) {
  Buffer& b = own.buffers[slot];
  if (b.size < bytes) {
    b.release();
    const size_t size = (bytes + 4095) / 4096 * 4096;
    if (!(b.data = std::aligned_alloc(64, size))) throw std::bad_alloc();
    b.size = size;
  }
  return b.data;
}

}  // namespace pyqkern
