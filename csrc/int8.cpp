// The INT8 product and linear on whole tensors: who quantizes which rows, who computes which columns.
#include <algorithm>
#include <atomic>

#include "int8_linear.h"

namespace pyqkern {
namespace {

constexpr size_t kDotColumns = 64;  // columns of a piece where nothing is packed

// Room for `rows` quantized rows, kept by this thread.
QRows row_buffer(size_t rows, const RowForm& form) {
  return carve(kRows, [&](Arena& a) { return take_rows(a, rows, form); });
}

// fill(m, rows, out) quantizes rows [m, m + rows) into out, to codes of `bits`; the product and the tail follow.
template <class Fill>
void product(const Kernels& k, size_t M, size_t N, size_t K, const Packed& w, const Tail& tail, int bits,
             const Fill& fill) {
  if (M == 0 || N == 0 || K == 0) return;  // Python answers these
  const size_t all = panels(N);
  const RowForm form = row_form(k, K, splits(k, M, w, bits), bits);
  auto columns = [&](const QRows& q, const Tail& t, size_t rows_from, size_t rows, size_t begin, size_t end) {
    int8_columns(k, q, rows_from, rows, K, w, begin, end, t);
  };
  // Rows [m, m + rows), by one thread, in a buffer of its own.
  auto block = [&](size_t m, size_t rows) {
    const QRows q = row_buffer(rows, form);
    fill(m, rows, q);
    Tail t = tail;
    t.y = static_cast<char*>(tail.y) + m * N * (tail.w_scale ? dtype_size(tail.dtype) : sizeof(int32_t));
    columns(q, t, 0, rows, 0, all);
  };

  const int count = M * N * K <= kSerialInt8Ops ? 1 : threads();
  const size_t blocks = (M + form.most - 1) / form.most;
  const size_t height = form.height(M);
  if (count == 1 || blocks >= 2 * static_cast<size_t>(count)) {
    parallel_for(blocks, count, [&](size_t i) {
      if (i * height < M) block(i * height, std::min(height, M - i * height));
    });
    return;
  }
  // Too few blocks for the threads: they quantize all rows together, then share the columns (and the rows, if many).
  const QRows q = row_buffer(M, form);
  const size_t group = form.has_columns ? kSplitRows : 16;
  parallel_for((M + group - 1) / group, count, [&](size_t i) {
    const size_t m = i * group;
    fill(m, std::min(group, M - m), rows_at(q, m, form));
  });
  const size_t strips = (all + kStripPanels - 1) / kStripPanels;
  const size_t pieces = std::min(all, std::max<size_t>(strips, 4 * count / blocks));
  parallel_for(blocks * pieces, count, [&](size_t i) {
    const size_t m = i / pieces * height, p = i % pieces;
    if (m >= M) return;
    columns(q, tail, m, std::min(height, M - m), first_panel(all, M, p, pieces), first_panel(all, M, p + 1, pieces));
  });
}

// work(p, its first byte) for every panel.
template <class Work> void for_panels(size_t N, size_t K, int8_t* packed, const Work& work) {
  parallel_for(panels(N), N * K <= kSerialInt8Ops ? 1 : threads(),
               [&](size_t p) { work(p, packed + p * panel_bytes(K)); });
}

}  // namespace

const float* widened(const Kernels& k, const void* bias, int dtype, size_t n) {
  if (!bias || dtype == kFloat32) return static_cast<const float*>(bias);
  float* values = static_cast<float*>(scratch(kBias, n * sizeof(float)));
  k.widen(bias, dtype, n, values);
  return values;
}

void int8_pack(const int8_t* w, size_t N, size_t K, const Packed& packed) {
  const Kernels& k = kernels();
  std::atomic<size_t> split{0};
  for_panels(N, K, packed.panels, [&](size_t p, int8_t* panel) {
    k.int8_pack(w, N, K, p, panel);
    k.int8_mark(K, panel);
    if (packed.excess) split += split_panel(panel, K, reinterpret_cast<uint8_t*>(packed.excess + p * excess_bytes(K)));
  });
  const size_t pairs = panels(N) * ((quads(K) + 1) / 2);
  if (packed.excess) packed.excess[sizeof(uint32_t)] = 10 * split >= 9 * pairs;
}

void int8_unpack(const Packed& packed, size_t N, size_t K, int8_t* w) {
  parallel_for(N, N * K <= kSerialInt8Ops ? 1 : threads(), [&](size_t n) {
    const int8_t* column = packed.panel(K, n / kPanel) + n % kPanel * 4;
    for (size_t k = 0; k < K; ++k) w[n * K + k] = column[k / 4 * kLine + k % 4];
  });
}

void int8_matmul(const uint8_t* a, bool is_unsigned, const int8_t* w, size_t M, size_t N, size_t K, int32_t* y) {
  const Kernels& k = kernels();
  if (M <= k.dot_rows) {
    const QRows q = row_buffer(M, row_form(k, K, false, 8));
    k.int8_load_rows(a, is_unsigned, M, K, q);
    const size_t pieces = (N + kDotColumns - 1) / kDotColumns;
    return parallel_for(pieces, M * N * K <= kSerialInt8Ops ? 1 : threads(), [&](size_t i) {
      k.int8_dot(q, M, K, w, N, i * kDotColumns, std::min(N, (i + 1) * kDotColumns), y);
    });
  }
  int8_t* packed = static_cast<int8_t*>(scratch(kPacked, panels(N) * panel_bytes(K)));
  for_panels(N, K, packed, [&](size_t p, int8_t* panel) { k.int8_pack(w, N, K, p, panel); });
  product(k, M, N, K, Packed{packed, nullptr}, Tail{nullptr, nullptr, kNone, kFloat32, y, N, N}, 8,
          [&](size_t m, size_t rows, const QRows& q) { k.int8_load_rows(a + m * K, is_unsigned, rows, K, q); });
}

void int8_linear(const void* x, int dtype, const Packed& w, const float* w_scale, const void* bias, int bias_dtype,
                 size_t M, size_t N, size_t K, void* y, int activation, bool symmetric, int bits, const float* x_scale,
                 const int32_t* x_zero) {
  const Kernels& k = kernels();
  product(k, M, N, K, w, Tail{w_scale, widened(k, bias, bias_dtype, N), activation, dtype, y, N, N}, bits,
          [&](size_t m, size_t rows, const QRows& q) {
            const char* from = static_cast<const char*>(x) + m * K * dtype_size(dtype);
            if (x_scale) k.int8_quantize_rows_static(from, dtype, rows, K, *x_scale, *x_zero, q);
            else k.int8_quantize_rows(from, dtype, K, rows, K, symmetric, q);
          });
}

}  // namespace pyqkern
