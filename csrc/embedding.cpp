// Rows of a packed weight by number, as an embedding needs them: gathered here, dequantized by the kernels of the ISA.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 16;  // bytes gathered: below this a second thread costs more than it brings

int count_for(size_t bytes) { return bytes <= kSerial ? 1 : threads(); }

}  // namespace

void int8_gather(const Packed& w, size_t K, const int64_t* rows, size_t M, int8_t* out) {
  parallel_for(M, count_for(M * K), [&](size_t m) {
    const size_t n = static_cast<size_t>(rows[m]);
    const int8_t* at = w.panel(K, n / kPanel) + n % kPanel * 4;
    int8_t* y = out + m * K;
    for (size_t k = 0; k < K; k += 4) memcpy(y + k, at + k / 4 * kLine, std::min<size_t>(4, K - k));
  });
}

void four_bit_gather(const uint8_t* packed, const uint8_t* scales, size_t scale_bytes, size_t N, size_t K,
                     size_t blocksize, const int64_t* rows, size_t M, uint8_t* codes, uint8_t* row_scales) {
  const size_t blocks = K / blocksize;
  parallel_for(M, count_for(M * K), [&](size_t m) {
    const size_t n = static_cast<size_t>(rows[m]), strip = n / kStrip, within = n % kStrip;
    const size_t count = std::min(kStrip / kPanel, panels(N) - strip * (kStrip / kPanel));  // panels of this strip
    const uint8_t* line =
        packed + strip * (kStrip / kPanel) * (K / 8) * kLine + within / kPanel * kLine + within % kPanel * 4;
    uint8_t* y = codes + m * K / 2;
    for (size_t k = 0; k < K; k += 8, line += count * kLine, y += 4) {
      for (size_t j = 0; j < 2; ++j) {  // columns 2j, 2j+1 are in the low four bits, 4 + 2j and 5 + 2j in the high ones
        y[j] = static_cast<uint8_t>(line[2 * j] << 4 | (line[2 * j + 1] & 15));
        y[2 + j] = static_cast<uint8_t>((line[2 * j] & 0xf0) | line[2 * j + 1] >> 4);
      }
    }
    const uint8_t* scale = scales + (strip * blocks * kStrip + within) * scale_bytes;
    for (size_t b = 0; b < blocks; ++b)
      memcpy(row_scales + (m * blocks + b) * scale_bytes, scale + b * count * kPanel * scale_bytes, scale_bytes);
  });
}

void four_bit_dequantize_rows(const uint8_t* packed, const float* absmax, size_t K, size_t blocksize,
                              const Codebook& book, const int64_t* rows, size_t M, void* y, int dtype) {
  const Kernels& k = kernels();
  parallel_for(M, count_for(M * K), [&](size_t m) {
    const size_t begin = static_cast<size_t>(rows[m]) * K;
    k.four_bit_dequantize(packed, absmax, blocksize, book, begin, begin + K,
                          static_cast<char*>(y) + m * K * dtype_size(dtype), dtype, false);
  });
}

}  // namespace pyqkern
