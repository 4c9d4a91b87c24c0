// Splits a packed INT8 weight, W = main + excess, for int8_split.inl.
//
// Of each four weights whose products are added in int16, the positive ones may sum to 128 in main, and so may the
// negative ones (255 * 128 < 2^15). What is above is taken off the greatest of them, as an entry of the excess. No entry
// passes 64, so that two of them do not pass 128 together. Four weights have six entries at
// most, so those of a segment and column are 96 fours at most.
#include <algorithm>
#include <cstring>

#include "api.h"

namespace pyqkern {
namespace {

constexpr int kMostSum = 128, kMostEntry = 64;

// entry(k, value) for the excess of a column's weights [8i, 8i + 8); `column` points at its first quad.
template <class F> void find_excess(const int8_t* column, size_t i, size_t Q, const F& entry) {
  const int8_t *first = column + 2 * i * kLine, *second = 2 * i + 1 < Q ? first + kLine : nullptr;
  for (size_t half = 0; half < 4; half += 2) {
    int w[4] = {first[half], first[half + 1], second ? second[half] : 0, second ? second[half + 1] : 0};
    for (int sign = 1; sign >= -1; sign -= 2) {
      int over = -kMostSum;
      for (int v : w) over += std::max(0, sign * v);
      while (over > 0) {
        int at = 0;
        for (int j = 1; j < 4; ++j)
          if (sign * w[j] > sign * w[at]) at = j;
        const int value = std::min({over, sign * w[at], kMostEntry});
        entry(8 * i + 4 * static_cast<size_t>(at / 2) + half + static_cast<size_t>(at % 2), sign * value);
        w[at] -= sign * value;
        over -= value;
      }
    }
  }
}

}  // namespace

size_t split_panel(const int8_t* panel, size_t K, uint8_t* excess) {
  const size_t Q = quads(K), S = segments(K), capacity = excess_capacity(K), all = (Q + 1) / 2;
  memset(excess, 0, excess_bytes(K));
  size_t count[kPanel][kSplitMost / kSegment] = {}, fours = 0, pairs = 0;
  for (; pairs < all; ++pairs) {
    const size_t s = 8 * pairs / kSegment;
    size_t more[kPanel] = {}, added = 0;
    for (size_t n = 0; n < kPanel; ++n) {
      find_excess(panel + 4 * n, pairs, Q, [&](size_t, int) { ++more[n]; });
      added += (count[n][s] + more[n] + 3) / 4 - (count[n][s] + 3) / 4;
    }
    if (4 * (fours + added) > capacity) break;
    for (size_t n = 0; n < kPanel; ++n) count[n][s] += more[n];
    fours += added;
  }
  const uint32_t split = static_cast<uint32_t>(pairs);
  memcpy(excess, &split, sizeof split);
  uint8_t *number = excess + kLine, *k_low = number + kPanel * S, *value = k_low + capacity;
  for (size_t n = 0; n < kPanel; ++n)
    for (size_t s = 0; s < S; ++s) {
      const size_t first = s * kSegment / 8, stop = std::min(pairs, (s + 1) * kSegment / 8);
      size_t entries = 0;
      for (size_t i = first; i < stop; ++i)
        find_excess(panel + 4 * n, i, Q, [&](size_t k, int v) {
          k_low[entries] = static_cast<uint8_t>(k % kSegment);
          value[entries++] = static_cast<uint8_t>(v);
        });
      entries = (entries + 3) / 4 * 4;
      *number++ = static_cast<uint8_t>(entries / 4);
      k_low += entries;
      value += entries;
    }
  return pairs;
}

}  // namespace pyqkern
