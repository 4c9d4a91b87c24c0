// The compiler's vectors of LANES elements, the same text for every ISA. An ISA's header sets LANES and includes this.
//
// + - * and << >> on f32 and i32 are the lane-wise operations on every ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace pyqkern {
namespace PYQKERN_ISA {

// f(0), ..., f(N - 1), each with a constant: arrays that are indexed by it become registers. g++ unrolls a loop too
// late for that, and leaves accumulators on the stack.
template <int I> struct Index {
  constexpr operator int() const { return I; }
};
template <int N, class F> INLINE void unroll(F f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(Index<N - 1>{});
  }
}
// Zero in every element. `= {}` would be a `rep stos`, which takes as long as some rows of a tile, and of which only a
// part is seen to be dead where the array becomes registers.
template <class T> INLINE void clear(T& element) { element = T{}; }
template <class T, size_t N> INLINE void clear(T (&array)[N]) {
  unroll<N>([&](auto i) INLINE_LAMBDA { clear(array[i]); });
}

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes_t __attribute__((vector_size(4 * LANES)));  // four i32 in [-32768, 32767], saturated

INLINE f32 set1(float x) { return x - f32{}; }
INLINE i32 set1(int32_t x) { return x - i32{}; }
INLINE f32 load(const float* p) {
  f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE i32 load(const int32_t* p) {
  i32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, f32 v) { memcpy(p, &v, sizeof v); }
INLINE void store(int32_t* p, i32 v) { memcpy(p, &v, sizeof v); }

// Round to nearest even by hand: the CPU's own bf16 conversion flushes denormals. NaN becomes 0x7fc0, as in torch.
INLINE i32 bf16_bits(f32 v) {
  u32 u = (u32)v;
  u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v == v ? (i32)rounded : set1(0x7fc0);
}

}  // namespace PYQKERN_ISA
}  // namespace pyqkern
