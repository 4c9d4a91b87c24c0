// Splits a packed INT8 weight, W = main + excess, for int8_split.inl.
//
// Of each four weights whose products are added in int16, the positive ones may sum to 128 in main, and so may the
// negative ones (255 * 128 < 2^15). What is above is taken off the greatest of them, as an entry of the excess. No entry
// passes 64, so that two of them do not pass 128 together. Four weights have six entries at most, so those of a segment
// and column are 96 fours at most.
#include <algorithm>
#include <cstring>

#include "api.h"

namespace pyqkern {
namespace {

constexpr int kMostSum = 128, kMostEntry = 64;
constexpr size_t kMostEntries = 12;  // of the eight weights of a column in a pair of lines

// entry(n, k, value) for the excess of a pair of lines, column by column: of weights [8 * pair, 8 * pair + 8).
template <class F> void find_excess(const int8_t* first, const int8_t* second, size_t pair, const F& entry) {
  int positive[kLine], sum[kLine];  // in loops of their own the compiler makes vectors of them
  for (size_t i = 0; i < kLine; ++i) {
    positive[i] = std::max<int>(first[i], 0) + std::max<int>(second[i], 0);
    sum[i] = first[i] + second[i];
  }
  for (size_t i = 0; i < kLine; i += 2) {
    const int above = positive[i] + positive[i + 1], below = above - (sum[i] + sum[i + 1]);
    if (std::max(above, below) <= kMostSum) continue;
    int w[4] = {first[i], first[i + 1], second[i], second[i + 1]};
    for (int sign = 1; sign >= -1; sign -= 2) {
      int over = (sign > 0 ? above : below) - kMostSum;
      while (over > 0) {
        size_t at = 0;
        for (size_t j = 1; j < 4; ++j)
          if (sign * w[j] > sign * w[at]) at = j;
        const int value = std::min({over, sign * w[at], kMostEntry});
        entry(i / 4, 8 * pair + 4 * (at / 2) + i % 4 + at % 2, sign * value);
        w[at] -= sign * value;
        over -= value;
      }
    }
  }
}

struct Entry {
  uint16_t k, n;
  int value;
};

}  // namespace

size_t split_panel(const int8_t* panel, size_t K, uint8_t* excess) {
  const size_t Q = quads(K), S = segments(K), capacity = excess_capacity(K), all = (Q + 1) / 2;
  memset(excess, 0, excess_bytes(K));
  Entry entries[excess_capacity(kSplitMost) + kMostEntries * kPanel];  // in the order of k
  const int8_t none[kLine] = {};
  size_t count[kPanel][kSplitMost / kSegment] = {}, total = 0, fours = 0, pairs = 0;
  for (; pairs < all; ++pairs) {
    const size_t s = 8 * pairs / kSegment, before = total;
    const int8_t* first = panel + 2 * pairs * kLine;
    size_t more = 0;
    find_excess(first, 2 * pairs + 1 < Q ? first + kLine : none, pairs, [&](size_t n, size_t k, int value) {
      entries[total++] = {static_cast<uint16_t>(k), static_cast<uint16_t>(n), value};
      more += count[n][s]++ % 4 == 0;
    });
    if (4 * (fours + more) > capacity) {
      while (total > before) --count[entries[--total].n][s];
      break;
    }
    fours += more;
  }
  const uint32_t split = static_cast<uint32_t>(pairs);
  memcpy(excess, &split, sizeof split);
  uint8_t *number = excess + kLine, *low = number + kPanel * S, *value = low + capacity;
  size_t next[kPanel][kSplitMost / kSegment], at = 0;
  for (size_t n = 0; n < kPanel; ++n)
    for (size_t s = 0; s < S; ++s) {
      next[n][s] = at;
      *number++ = static_cast<uint8_t>((count[n][s] + 3) / 4);
      at += (count[n][s] + 3) / 4 * 4;
    }
  for (size_t i = 0; i < total; ++i) {
    const size_t to = next[entries[i].n][entries[i].k / kSegment]++;
    low[to] = static_cast<uint8_t>(entries[i].k % kSegment);
    value[to] = static_cast<uint8_t>(entries[i].value);
  }
  return pairs;
}

}  // namespace pyqkern
