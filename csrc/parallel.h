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

// Thrown out of a call that is to be given up.
struct Interrupted {};

// Around every call, on the thread that makes it. `interrupted` is asked some times a second whether the call is to be
// given up; at the end, large scratch buffers are given back.
struct CallScope {
  explicit CallScope(bool (*interrupted)());
  ~CallScope();
};

// Throws Interrupted where the call is to be given up. Where a loop may take seconds, its steps of a microsecond or
// more call this.
void poll();

// Around what a thread does of a parallel region; the caller's own thread is in its CallScope and takes no notice.
// Others see by `given_up` that the caller was interrupted, and free large scratch buffers at the end.
void begin_piece(const std::atomic<bool>* given_up);
void end_piece();

// work(i) for i in [0, n), on up to `count` threads, each taking the next i when it is done: cores are shared with
// other programs, so equal shares would wait for the slowest.
template <class Work> void parallel_for(size_t n, int count, const Work& work) {
  if (static_cast<size_t>(count) > n) count = static_cast<int>(n);
  if (count <= 1) {
    for (size_t i = 0; i < n; ++i) {
      if (i) poll();
      work(i);
    }
    return;
  }
  struct Context {
    std::atomic<size_t> next;
    std::atomic<bool> out_of_memory, interrupted;
    size_t n;
    const Work& work;
  } context{{0}, {false}, {false}, n, work};
  parallel_region(
      count,
      [](void* p) {
        Context& c = *static_cast<Context*>(p);
        begin_piece(&c.interrupted);
        try {  // none may leave the region
          for (size_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) {
            if (i) poll();
            c.work(i);
          }
        } catch (const std::bad_alloc&) { c.out_of_memory = true; } catch (const Interrupted&) {
          c.interrupted = true;
          c.next = c.n;  // the other threads end with what they are at
        }
        end_piece();
      },
      &context);
  if (context.out_of_memory) throw std::bad_alloc();
  if (context.interrupted) throw Interrupted();
}

// Multiply-adds of the INT8 product: below this a second thread costs more than it brings.
constexpr size_t kSerialInt8Ops = 1 << 21;

// A buffer of this thread that lives on between calls where it is small (kKept bytes): allocating 100 KB and more each
// time costs page faults. What is larger belongs to a call that takes much longer than those. Slots keep the buffers of
// one call apart.
constexpr size_t kKept = 4 << 20;
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
  kStageRows,
  kDecoder,
  kDecoderGroup,
  kDecoderPiece,
  kGates,
  kState,
  kSlots
};
void* scratch(Slot slot, size_t bytes);

}  // namespace pyqkern
