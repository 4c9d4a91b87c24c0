// The C++ without Python, for test_aarch64.py: reads the inputs of every operation from stdin and writes what comes out
// to stdout, tensors in the order of the test. Sizes are those of the test, too.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "api.h"

using namespace pyqkern;

namespace {

constexpr size_t M = 5, N = 40, K = 96, kBlocksize = 32;
constexpr size_t kBatch = 2, kLength = 5, kHidden = 48, kHeads = 3, kHeadSize = 16, kWide = 80;
constexpr size_t kGates = 4 * kHidden;  // of an LSTM whose input is [M, K]

// `count` elements of stdin. They stay in memory to the end, aligned for every type.
template <class T> T* take(size_t count) {
  T* data = static_cast<T*>(std::malloc(count * sizeof(T)));
  if (!data || std::fread(data, sizeof(T), count, stdin) != count) std::exit(2);
  return data;
}

std::deque<std::vector<uint8_t>> results;  // what main writes at the end

// Room for `count` elements of a result, zeros.
template <class T = uint8_t> T* result(size_t count) {
  return reinterpret_cast<T*>(results.emplace_back(count * sizeof(T)).data());
}

// The panels of w [n, k]; they stay in memory.
Packed packed(const int8_t* w, size_t n, size_t k) {
  const Packed result{static_cast<int8_t*>(std::aligned_alloc(64, panels(n) * panel_bytes(k))), nullptr};
  int8_pack(w, n, k, result);
  return result;
}

// Codes, scales and bias of a linear [n, k].
EncoderLinear take_linear(size_t n, size_t k) {
  const Packed w = packed(take<int8_t>(n * k), n, k);
  const float* scale = take<float>(n);
  return {w, scale, take<float>(n), kFloat32, n, k, {}};
}

// Everything that takes x [M, K] of a dtype.
void rows(int dtype, const EncoderLinear& linear, const Weight4Bit& four, const float* scale, const int32_t* zero) {
  const size_t size = dtype_size(dtype);
  const void *x = take<uint8_t>(M * K * size), *g = take<uint8_t>(M * N * size);
  const float* bias = static_cast<const float*>(linear.bias);
  const float reciprocal = 1 / scale[0];
  for (const int qtype : {kInt8, kUInt8}) {
    const Channels c{1, M * K, scale, &reciprocal, zero, true};
    uint8_t* q = result(M * K);
    quantize(x, dtype, 1, c, q, qtype);
    dequantize(q, qtype, 1, c, result(M * K * size), dtype);
  }
  float *lo = result<float>(M), *hi = result<float>(M);
  min_max(x, dtype, 1, M, K, lo, hi);
  const FakeRows fake{x, dtype, M, K, scale, zero, true, -127, 127};
  fake_quantize(fake, result(M * K * size));
  uint8_t* by_x = result(M * K * size);
  float *by_scale = result<float>(M), *by_offset = result<float>(M);
  fake_quantize_backward(fake, x, by_x, by_scale, by_offset);

  auto int8 = [&](int activation, bool symmetric, int bits) {
    int8_linear(x, dtype, linear.packed, linear.scale, bias, kFloat32, M, N, K, result(M * N * size), activation,
                symmetric, bits, nullptr, nullptr);
  };
  for (const int activation : {kNone, kRelu, kGelu, kGeluTanh})
    for (const bool symmetric : {false, true}) int8(activation, symmetric, 8);
  int8(kNone, false, 7);
  int8_linear_weight_only(x, dtype, linear.packed, linear.scale, bias, kFloat32, M, N, K, result(M * N * size));
  int8_grad_input(g, dtype, linear.packed, linear.scale, M, N, K, result(M * K * size));
  for (const bool as_int8 : {false, true})
    four_bit_linear(x, dtype, four, bias, kFloat32, M, result(M * N * size), as_int8);
  four_bit_grad_input(g, dtype, four, M, result(M * K * size));
  uint8_t* codes = result(M * K / 2);
  four_bit_quantize(x, dtype, M * K, kBlocksize, *four.book, codes, result<float>(M * K / kBlocksize));
}

void encoder() {
  EncoderLayer layer{};
  EncoderLinear* const linears[] = {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down};
  const size_t sizes[6][2] = {{kHidden, kHidden}, {kHidden, kHidden}, {kHidden, kHidden},
                              {kHidden, kHidden}, {kWide, kHidden},   {kHidden, kWide}};
  for (size_t i = 0; i < 6; ++i) *linears[i] = take_linear(sizes[i][0], sizes[i][1]);
  for (const void*& norm : layer.norm) norm = take<float>(kHidden);
  layer.eps[0] = 1e-12f, layer.eps[1] = 1e-5f;
  layer.heads = kHeads, layer.head_size = kHeadSize, layer.scaling = 0.25f;
  layer.activation = kGelu, layer.bits = 8;
  const float* x = take<float>(kBatch * kLength * kHidden);
  encoder_layer(x, kFloat32, kBatch, kLength, {}, {}, layer, result<float>(kBatch * kLength * kHidden));
}

void lstm() {
  RecurrentLayer layer{};
  layer.input = take_linear(kGates, K), layer.hidden = take_linear(kGates, kHidden);
  layer.cell = kLstm, layer.bits = 8;
  const float* x = take<float>(M * K);
  const int64_t sizes[] = {3, 2};  // M rows
  float *h = result<float>(3 * kHidden), *c = result<float>(3 * kHidden);
  recurrent(x, sizes, 2, layer, h, c, result<float>(M * kHidden));
}

}  // namespace

int main() {
  const EncoderLinear linear = take_linear(N, K);
  const Codebook* book = take<Codebook>(1);
  const uint8_t* flat = take<uint8_t>(N * K / 2);
  const size_t padded = panels(N) * kPanel;
  const float* absmax = take<float>(padded * K / kBlocksize);  // in the order of panels
  int8_unpack(linear.packed, N, K, result<int8_t>(N * K));
  uint8_t* lines = result(padded * K / 2);
  four_bit_pack(flat, N, K, lines);
  const float* scale = take<float>(M);
  const int32_t* zero = take<int32_t>(M);
  const Weight4Bit four{lines, {absmax, nullptr, nullptr, 0}, N, K, kBlocksize, book};
  for (const int dtype : {kFloat32, kBFloat16, kFloat16}) rows(dtype, linear, four, scale, zero);
  const size_t count = 4096;
  const float *sweep = take<float>(count), *below_zero = take<float>(count);  // where probabilities are
  for (int function = kExp; function <= kReluValue; ++function)
    kernels().elementwise(function, function == kProbabilityCode ? below_zero : sweep, count, result<float>(count));
  encoder();
  lstm();
  for (const std::vector<uint8_t>& one : results)
    if (std::fwrite(one.data(), 1, one.size(), stdout) != one.size()) return 3;
}
