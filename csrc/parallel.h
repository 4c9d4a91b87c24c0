// torch's own OpenMP pool, found at run time: never a second one, and no OpenMP needed to build.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>

namespace pyqkern {

// The threads a parallel region may use: torch.set_num_threads is obeyed. 1 where there is no pool, and in a forked
// child: a libgomp pool does not survive fork, and a region in it would hang.
int threads();

// The library that holds the pool, or "".
const char* openmp_path();

// Runs f(context) once on each of `count` threads, the caller being one of them.
void parallel_region(int count, void (*f)(void*), void* context);

// work(i) for i in [0, n), on up to `count` threads, each taking the next i when it is done: cores are shared with
// other programs, so equal shares would wait for the slowest.
template <class Work> void parallel_for(size_t n, int count, const Work& work) {
  if (static_cast<size_t>(count) > n) count = static_cast<int>(n);
  if (count <= 1) {
    for (size_t i = 0; i < n; ++i) work(i);
    return;
  }
  struct Context {
    std::atomic<size_t> next;
    std::atomic<bool> out_of_memory;
    size_t n;
    const Work& work;
  } context{{0}, {false}, n, work};
  parallel_region(
      count,
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        try {
          for (size_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) c.work(i);
        } catch (const std::bad_alloc&) {  // the only exception there is; none may leave the region
          c.out_of_memory = true;
        }
      },
      &context);
  if (context.out_of_memory) throw std::bad_alloc();
}

// Multiply-adds of the INT8 product: below this a second thread costs more than it brings.
constexpr size_t kSerialInt8Ops = 1 << 21;

// A buffer of this thread that lives on between calls: allocating 100 KB and more each time costs page faults.
// Slots keep the buffers of one call apart.
enum Slot {
  kRows,
  kRowScales,
  kBias,
  kPacked,
  kScales,
  kStep,
  kTotals,
  kEncoderGroup,
  kEncoderBlock,
  kGates,
  kState,
  kSlots
};
void* scratch(Slot slot, size_t bytes);

}  // namespace pyqkern
