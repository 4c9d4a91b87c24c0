// Several pieces of one scratch buffer.
#pragma once

#include "kernels/kernels.h"
#include "parallel.h"

namespace pyqkern {

// Hands out pieces of one buffer; without a buffer it only adds up what they take.
struct Arena {
  char* base;
  size_t used;
  template <class T> T* take(size_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  QRows rows(size_t n, size_t row_bytes, int bits = 8) {
    return {take<char>(n * row_bytes + 64 * 2), take<float>(n), take<int32_t>(n),
            bits};  // softmax writes up to 64 codes more
  }
  QRows rows_with_columns(size_t n, size_t row_bytes) {
    QRows q = rows(n, row_bytes);
    q.columns = take<uint8_t>(column_bytes(n, row_bytes));
    return q;
  }
};
template <class Layout> auto carve(Slot slot, const Layout& layout) {
  Arena measure{nullptr, 0};
  layout(measure);
  Arena arena{static_cast<char*>(scratch(slot, measure.used)), 0};
  return layout(arena);
}

}  // namespace pyqkern
