#include "parallel.h"

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

}  // namespace

int threads() { return *openmp().path && !OpenMP::forked() ? openmp().max_threads() : 1; }

const char* openmp_path() { return openmp().path; }

void parallel_region(int count, void (*f)(void*), void* context) {
  if (count <= 1) f(context);
  else openmp().parallel(f, context, static_cast<unsigned>(count), 0);
}

void* scratch(Slot slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[kSlots];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = 0;
    const size_t size = (bytes + 4095) / 4096 * 4096;
    if (!(b.data = std::aligned_alloc(64, size))) throw std::bad_alloc();
    b.size = size;
  }
  return b.data;
}

}  // namespace pyqkern
