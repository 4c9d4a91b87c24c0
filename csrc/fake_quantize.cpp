// Fake quantization and its backward pass over whole tensors: pieces of rows for the threads.
#include <algorithm>

#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 15;  // elements: below this a second thread costs more than it brings
constexpr size_t kPiece = 1 << 14;   // elements of a piece, at least

// work(begin, end) for pieces of the rows.
template <class Work> void for_rows(const FakeRows& f, const Work& work) {
  const size_t step = std::max<size_t>(1, kPiece / f.size);
  parallel_for((f.rows + step - 1) / step, f.rows * f.size <= kSerial ? 1 : threads(),
               [&](size_t i) { work(i * step, std::min(f.rows, (i + 1) * step)); });
}

}  // namespace

void fake_quantize(const FakeRows& f, void* y) {
  const Kernels& k = kernels();
  for_rows(f, [&](size_t begin, size_t end) { k.fake_quantize(f, begin, end, y); });
}

void fake_quantize_backward(const FakeRows& f, const void* g, void* by_x, float* by_scale, float* by_offset) {
  const Kernels& k = kernels();
  for_rows(f, [&](size_t begin, size_t end) { k.fake_quantize_backward(f, g, begin, end, by_x, by_scale, by_offset); });
}

}  // namespace pyqkern
