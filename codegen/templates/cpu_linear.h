// y = x W^T + b for few rows of x: the weight is streamed once, whatever the rows (up to 16).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu_vector.h"

namespace llmopt {

template <typename T>
struct LinearArgs {
  const float* x;  // [M, K] fp32, rows `stride` apart
  int64_t stride;
  const T* weight;  // [N, K]
  const T* bias;    // [N] or null
  T* y;             // [M, N]
  int64_t M, N, K;
};

// R weight rows from n on, M x rows from m0 on.
template <int R, int M, typename T>
LLMOPT_INLINE void linear_tile(const LinearArgs<T>& a, int64_t n, int64_t m0) {
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a.weight + (n + r) * a.K;
  float sums[R * M];
  dots<R, M>(rows, a.x + m0 * a.stride, a.stride, a.K, sums);
  for (int m = 0; m < M; ++m) {
    T* out = a.y + (m0 + m) * a.N + n;
    for (int r = 0; r < R; ++r) {
      float sum = sums[r * M + m];
      out[r] = static_cast<T>(a.bias ? sum + static_cast<float>(a.bias[n + r]) : sum);
    }
  }
}

// Weight rows [n, end) against M x rows from m0 on.
template <int M, typename T>
void linear_rows(const LinearArgs<T>& a, int64_t n, int64_t end, int64_t m0) {
  constexpr int R = tile_rows(M);
  for (; n + R <= end; n += R) linear_tile<R, M>(a, n, m0);
  for (; n < end; ++n) linear_tile<1, M>(a, n, m0);
}

template <int M, typename T>
void linear_some(const LinearArgs<T>& a, int64_t n, int64_t end, int64_t m0, int64_t count) {
  if (count == M) return linear_rows<M>(a, n, end, m0);
  if constexpr (M > 1) linear_some<M - 1>(a, n, end, m0, count);
}

template <typename T>
void linear_few(const LinearArgs<T>& a) {
  // a tile of x rows that does not stay in L1 is slower than two halves of it
  int64_t tile = MAX_TILE * a.K * 4 <= 24576 ? MAX_TILE : 4;
  // with several tiles of x rows the second finds its strip of weight rows in L2; 12 = 3 * 4 leaves no odd rows
  int64_t strip = a.M <= tile ? a.N : std::max<int64_t>(12, 65536 / (a.K * sizeof(T)) / 12 * 12);
  // a thread's share is at least 64 KiB of weight: below that, waking it costs more than it saves
  int64_t grain = std::max<int64_t>(8, 65536 / (a.K * static_cast<int64_t>(sizeof(T)) + 1));
  at::parallel_for(0, a.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += strip) {
      int64_t stop = std::min(end, n + strip);
      for (int64_t m = 0; m < a.M; m += tile) {
        linear_some<MAX_TILE>(a, n, stop, m, std::min(tile, a.M - m));
      }
    }
  });
}

}  // namespace llmopt
