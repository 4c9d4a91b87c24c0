// One direction of a recurrent layer over whole sequences.
//
// The steps are taken in chunks. The input products of a chunk's steps are one large product, shared by the threads;
// then the chunk's sequences are shared out, and each thread takes its own through all steps of the chunk: nobody waits
// in between. A single sequence has no shares: where its step is large enough, the columns of the product are shared.
// No result depends on the chunks, on the threads, or on other sequences.
#include <algorithm>
#include <cstring>
#include <vector>

#include "api.h"
#include "arena.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kChunkRows = 256;  // rows of the input product of one chunk: few enough to find its gates in the cache
constexpr size_t kColumnPanels = 16;  // columns of a piece of one step's product

struct Call {
  const Kernels& kernels;
  const RecurrentLayer& layer;
  const int64_t* batch_sizes;
  std::vector<size_t> first;  // row of x and y at which each step begins
  float *h, *c, *y;
  size_t hidden, state;  // sizes of the cell state, and of the hidden state, which a projection makes smaller
};

// The steps of a chunk in time [begin, end), and the input products of their rows.
struct Chunk {
  size_t begin, end;
  const float* gates;
};

// out [rows, N] = the linear of x [rows, K], by all threads.
void linear(const RecurrentLayer& layer, const EncoderLinear& w, const float* x, size_t rows, float* out) {
  if (!w.packed.panels) return four_bit_linear(x, kFloat32, w.four, w.bias, w.bias_dtype, rows, out, layer.as_int8);
  int8_linear(x, kFloat32, w.packed, w.scale, w.bias, w.bias_dtype, rows, w.N, w.K, out, kNone, layer.symmetric,
              layer.bits, nullptr, nullptr);
}

// What a thread needs for `rows` rows of one step.
struct Buffers {
  float *product, *state;
  QRows q;
};

// The same of a step's rows: by the calling thread, or in columns by `threads` of them.
void step_linear(const Call& call, const EncoderLinear& w, const float* x, size_t rows, const Buffers& b, int threads,
                 float* out) {
  const Kernels& k = call.kernels;
  const RecurrentLayer& layer = call.layer;
  if (!w.packed.panels && !(layer.as_int8 && in_panels(w.N, w.K, w.four.blocksize)))
    return linear(layer, w, x, rows, out);
  k.int8_quantize_rows(x, kFloat32, w.K, rows, w.K, layer.symmetric, b.q);
  const float* bias = static_cast<const float*>(w.bias);
  if (!w.packed.panels) return four_bit_rows(k, b.q, rows, w.four, bias, kNone, out);
  const Tail tail{w.scale, bias, kNone, kFloat32, out, w.N, w.N};
  const size_t all = panels(w.N), pieces = threads > 1 ? (all + kColumnPanels - 1) / kColumnPanels : 1;
  parallel_for(pieces, threads, [&](size_t i) {
    const size_t from = all * i / pieces, to = all * (i + 1) / pieces;
    (rows <= k.gemv_rows ? k.int8_gemv : k.int8_gemm)(b.q, 0, rows, w.K, w.packed, from, to, tail);
  });
}

// Sequences [begin, end) through the steps of a chunk.
void run_rows(const Call& call, const Chunk& chunk, size_t begin, size_t end, int threads) {
  const RecurrentLayer& layer = call.layer;
  const size_t most = end - begin, H = call.hidden, P = call.state, width = gates_of(layer.cell) * H;
  const bool projects = layer.projection.N != 0;
  const Buffers b = carve(kState, [&](Arena& a) {
    return Buffers{a.take<float>(most * width), a.take<float>(projects ? most * H : 0),
                   a.rows(most, row_bytes(call.kernels, std::max(H, P), layer.bits), layer.bits)};
  });
  float *h = call.h + begin * P, *c = call.c ? call.c + begin * H : nullptr;
  for (size_t i = chunk.begin; i < chunk.end; ++i) {
    const size_t t = layer.reverse ? chunk.begin + chunk.end - 1 - i : i;
    const size_t stop = std::min(end, static_cast<size_t>(call.batch_sizes[t]));
    if (stop <= begin) continue;
    const size_t rows = stop - begin;
    const float* x = chunk.gates + (call.first[t] - call.first[chunk.begin] + begin) * width;
    float* y = call.y + (call.first[t] + begin) * P;
    step_linear(call, layer.hidden, h, rows, b, threads, b.product);
    if (!projects) {
      call.kernels.recurrent_gates(layer.cell, x, b.product, rows, H, h, c, y);
      continue;
    }
    call.kernels.recurrent_gates(layer.cell, x, b.product, rows, H, b.state, c, nullptr);
    step_linear(call, layer.projection, b.state, rows, b, threads, h);
    memcpy(y, h, rows * P * sizeof(float));
  }
}

}  // namespace

void recurrent(const float* x, const int64_t* batch_sizes, size_t steps, const RecurrentLayer& layer, float* h,
               float* c, float* y) {
  Call call{kernels(), layer, batch_sizes, {0}, h, c, y, layer.input.N / gates_of(layer.cell), layer.hidden.K};
  for (size_t t = 0; t < steps; ++t) call.first.push_back(call.first[t] + static_cast<size_t>(batch_sizes[t]));
  const size_t width = layer.input.N, row_ops = width * layer.hidden.K;
  for (size_t done = 0, count; done < steps; done += count) {
    if (done) poll();
    size_t rows = 0;
    for (count = 0; done + count < steps; ++count) {
      const size_t more = static_cast<size_t>(batch_sizes[layer.reverse ? steps - 1 - done - count : done + count]);
      if (count && rows + more > kChunkRows) break;
      rows += more;
    }
    const size_t begin = layer.reverse ? steps - done - count : done;
    float* gates = static_cast<float*>(scratch(kGates, rows * width * sizeof(float)));
    linear(layer, layer.input, x + call.first[begin] * layer.input.K, rows, gates);
    const Chunk chunk{begin, begin + count, gates};
    const size_t batch = static_cast<size_t>(batch_sizes[begin]);  // the most of the chunk: they descend
    if (batch == 1) {
      run_rows(call, chunk, 0, 1, row_ops <= kSerialInt8Ops ? 1 : threads());
      continue;
    }
    const size_t shares = std::min<size_t>(batch, rows * row_ops <= kSerialInt8Ops ? 1 : threads());
    parallel_for(shares, static_cast<int>(shares),
                 [&](size_t i) { run_rows(call, chunk, batch * i / shares, batch * (i + 1) / shares, 1); });
  }
}

}  // namespace pyqkern
