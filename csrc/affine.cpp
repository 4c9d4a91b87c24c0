// Quantize, dequantize and ranges of whole tensors.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 15;   // elements: below this a second thread costs more than it brings
constexpr size_t kPiece = 1 << 16;    // elements of a piece, a multiple of every vector
constexpr size_t kStream = 48 << 20;  // bytes read and written: beyond what stays in the cache, stores go past it

// f(begin, end) over the flat range [0, n) in pieces.
template <class F> void in_pieces(size_t n, const F& f) {
  if (n <= kSerial) return f(size_t{0}, n);
  parallel_for((n + kPiece - 1) / kPiece, threads(), [&](size_t i) { f(i * kPiece, std::min(n, (i + 1) * kPiece)); });
}

// Per tensor is one long run, whatever its shape was.
size_t flatten(size_t outer, Channels& c) {
  const size_t n = outer * c.channels * c.inner;
  if (c.channels == 1) c.inner = n;
  return n;
}

}  // namespace

void quantize(const void* x, int dtype, size_t outer, Channels c, uint8_t* q, int qtype) {
  const size_t n = flatten(outer, c);
  const Kernels& k = kernels();
  if (c.inner == 1) {
    float* inv_scale = static_cast<float*>(scratch(kRowScales, c.channels * sizeof(float)));
    for (size_t i = 0; i < c.channels; ++i) inv_scale[i] = 1.0f / c.scale[i];
    c.inv_scale = inv_scale;
  }
  const bool stream = n * (dtype_size(dtype) + 1) >= kStream;
  in_pieces(n, [&](size_t begin, size_t end) { k.quantize(x, dtype, c, begin, end, q, qtype, stream); });
}

void dequantize(const uint8_t* q, int qtype, size_t outer, Channels c, void* y, int dtype) {
  const size_t n = flatten(outer, c);
  const Kernels& k = kernels();
  const bool stream = n * (dtype_size(dtype) + 1) >= kStream;
  in_pieces(n, [&](size_t begin, size_t end) { k.dequantize(q, qtype, c, begin, end, y, dtype, stream); });
}

void min_max(const void* x, int dtype, size_t outer, size_t channels, size_t inner, float* lo, float* hi) {
  const Kernels& k = kernels();
  const size_t n = outer * channels * inner;
  if (n <= kSerial) return k.min_max(x, dtype, outer, channels, inner, 0, channels, lo, hi);
  if (channels == 1) {  // one range of many pieces: theirs first, then the range of those
    const size_t pieces = (n + kPiece - 1) / kPiece;
    float* part = static_cast<float*>(scratch(kRowScales, 2 * pieces * sizeof(float)));
    parallel_for(pieces, threads(), [&](size_t i) {
      const size_t size = std::min(n - i * kPiece, kPiece);
      k.min_max(static_cast<const char*>(x) + i * kPiece * dtype_size(dtype), dtype, 1, 1, size, 0, 1, part + i,
                part + pieces + i);
    });
    lo[0] = part[0], hi[0] = part[pieces];
    for (size_t i = 1; i < pieces; ++i) {
      if (std::isnan(part[i])) lo[0] = hi[0] = part[i];
      lo[0] = part[i] < lo[0] ? part[i] : lo[0];
      hi[0] = part[pieces + i] > hi[0] ? part[pieces + i] : hi[0];
    }
    return;
  }
  const size_t step = std::max<size_t>(inner == 1 ? 64 : 1, kPiece / std::max<size_t>(1, outer * inner));
  parallel_for((channels + step - 1) / step, threads(), [&](size_t i) {
    k.min_max(x, dtype, outer, channels, inner, i * step, std::min(channels, (i + 1) * step), lo, hi);
  });
}

}  // namespace pyqkern
