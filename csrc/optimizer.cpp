// Steps of optimizers, and sums of squares, over many tensors: all pieces of all of them are shared out at once.
#include <algorithm>
#include <vector>

#include "api.h"
#include "parallel.h"

namespace pyqkern {
namespace {

constexpr size_t kSerial = 1 << 14;          // elements: below this a second thread costs more than it brings
constexpr size_t kPiece = 64 * kStateBlock;  // elements of a piece of a step

// work(tensor, piece of it, number of the piece) for every piece of every tensor; returns how many there are.
template <class Sized, class Work>
void for_all_pieces(const Sized* tensors, size_t count, size_t piece, const std::vector<size_t>& first,
                    const Work& work) {
  size_t elements = 0;
  for (size_t i = 0; i < count; ++i) elements += tensors[i].n;
  parallel_for(first[count], elements <= kSerial ? 1 : threads(), [&](size_t at) {
    const size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), at) - first.begin()) - 1;
    const size_t begin = (at - first[i]) * piece;
    work(i, begin, std::min(tensors[i].n, begin + piece), at);
  });
}

// The number of each tensor's first piece, and behind the last one that of all pieces.
template <class Sized> std::vector<size_t> first_pieces(const Sized* tensors, size_t count, size_t piece) {
  std::vector<size_t> first(count + 1);
  for (size_t i = 0; i < count; ++i) first[i + 1] = first[i] + (tensors[i].n + piece - 1) / piece;
  return first;
}

}  // namespace

void optimizer_step(const Step& step, const Trained* trained, size_t count) {
  const Kernels& k = kernels();
  for_all_pieces(trained, count, kPiece, first_pieces(trained, count, kPiece),
                 [&](size_t i, size_t begin, size_t end, size_t) { k.optimizer_step(step, trained[i], begin, end); });
}

double square_sum(const Squared* tensors, size_t count, float scale) {
  const Kernels& k = kernels();
  const std::vector<size_t> first = first_pieces(tensors, count, kSquares);
  std::vector<double> sums(first[count]);
  for_all_pieces(tensors, count, kSquares, first, [&](size_t i, size_t begin, size_t end, size_t at) {
    const Squared& t = tensors[i];
    const char* x = static_cast<const char*>(t.x) + begin * dtype_size(t.dtype);
    sums[at] = k.square_sum(x, t.dtype, scale, end - begin);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace pyqkern
