// The gate of a feed-forward: an activation of one half of its columns times the other half.
#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 15;  // results: below this a second thread costs more than it brings

}  // namespace

void gate(const float* h, size_t M, size_t N, int function, float* y) {
  const Kernels& k = kernels();
  parallel_for(M, M * N <= kSerial ? 1 : threads(), [&](size_t m) {
    const float* up = h + (2 * m + 1) * N;
    float* row = y + m * N;
    k.elementwise(function, up - N, N, row);
    for (size_t n = 0; n < N; ++n) row[n] *= up[n];
  });
}

}  // namespace pyqkern
