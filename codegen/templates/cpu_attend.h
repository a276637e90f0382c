// Paged attention: online softmax over blocks of KEYS absolute positions.
//
// A work item is a tile of up to QUERIES neighbouring tokens of one sequence times one key/value head. Where a block
// starts depends on positions alone and a row folds in only the keys it may see, so its result is the same in any call.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "cpu_vector.h"

namespace llmopt {

constexpr int64_t KEYS = 64;
constexpr int64_t QUERIES = 16;

template <typename T>
struct AttendArgs {
  const T *q, *k_pages, *v_pages;
  T* out;                                    // [N, Hq, Dv]
  int64_t q_head, q_token;                   // strides of q in elements
  int64_t k_page, k_head, k_slot;            // strides of k_pages
  int64_t v_page, v_head, v_slot;
  const int64_t *tables, *seq_ids, *positions;
  const float* sinks;                        // [Hq] or null
  int64_t N, Hq, Hkv, D, Dv, page, table_width;
  float scale, softcap;
  int64_t window;

  int64_t first_key(int64_t token) const {
    return window > 0 ? std::max<int64_t>(0, positions[token] - window + 1) : 0;
  }
};

struct Tile {
  int64_t begin, end;       // tokens
  int64_t low, high;        // keys any of them sees: [low, high)
};

template <typename T>
std::vector<Tile> tiles_of(const AttendArgs<T>& a) {
  std::vector<Tile> tiles;
  for (int64_t n = 0; n < a.N; ++n) {
    bool joins = !tiles.empty() && n - tiles.back().begin < QUERIES && a.seq_ids[n] == a.seq_ids[n - 1];
    if (!joins) tiles.push_back({n, n, a.first_key(n), 0});
    Tile& t = tiles.back();
    t.end = n + 1;
    t.low = std::min(t.low, a.first_key(n));
    t.high = std::max(t.high, a.positions[n] + 1);
  }
  return tiles;
}

// Buffers of one thread. Rows are (token of the tile, query head of the group), `D` and `Dv` floats each.
struct Scratch {
  std::vector<float> q, acc, scores, k, v, top, total;

  Scratch(int64_t rows, int64_t D, int64_t Dv)
      : q(rows * D), acc(rows * Dv), scores(rows * KEYS), k(KEYS * D), v(KEYS * Dv), top(rows), total(rows) {}
};

// fp32 pages are read in place, others are widened into the buffer; out[j] points at key begin + j.
LLMOPT_INLINE void rows_as_float(const float* const* rows, int64_t count, int64_t, float*, const float** out) {
  for (int64_t j = 0; j < count; ++j) out[j] = rows[j];
}

template <typename T>
void rows_as_float(const T* const* rows, int64_t count, int64_t width, float* buffer, const float** out) {
  for (int64_t j = 0; j < count; ++j) {
    widen(buffer + j * width, rows[j], width);
    out[j] = buffer + j * width;
  }
}

template <int M>
void scores_of(const float* const* keys, int64_t count, const float* q, int64_t D, float* scores) {
  constexpr int R = tile_rows(M);
  float sums[R * M];
  int64_t j = 0;
  for (; j + R <= count; j += R) {
    dots<R, M>(keys + j, q, D, D, sums);
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) scores[m * KEYS + j + r] = sums[r * M + m];
  }
  for (; j < count; ++j) {
    dots<1, M>(keys + j, q, D, D, sums);
    for (int m = 0; m < M; ++m) scores[m * KEYS + j] = sums[m];
  }
}

template <int M>
void scores_some(const float* const* keys, int64_t count, const float* q, int64_t D, float* scores, int64_t rows) {
  if (rows == M) return scores_of<M>(keys, count, q, D, scores);
  if constexpr (M > 1) scores_some<M - 1>(keys, count, q, D, scores, rows);
}

// acc[0:C vectors] += sum over j of p[j] * values[j][d:]
template <int C>
LLMOPT_INLINE void mix(const float* p, const float* const* values, int64_t begin, int64_t end, int64_t d,
                       float* acc) {
  Vec sum[C];
  for (int c = 0; c < C; ++c) sum[c] = load(acc + d + c * LANES);
  for (int64_t j = begin; j < end; ++j) {
    for (int c = 0; c < C; ++c) sum[c] = fma(splat(p[j]), load(values[j] + d + c * LANES), sum[c]);
  }
  for (int c = 0; c < C; ++c) store(acc + d + c * LANES, sum[c]);
}

// One row meets keys [begin, end) of a block: s holds their raw dot products and ends as their probabilities.
template <typename T>
void row_block(const AttendArgs<T>& a, float* s, int64_t begin, int64_t end, const float* const* values,
               float* acc, float& top, float& total) {
  // lanes outside [begin, end) are computed too, on whatever is there, and then discarded
  float peak = top;
  for (int64_t j = begin / LANES * LANES; j < end; j += LANES) {
    Vec x = load(s + j) * a.scale;
    if (a.softcap > 0) x = a.softcap * tanh_of(x / a.softcap);
    store(s + j, x);
  }
  for (int64_t j = begin; j < end; ++j) peak = std::max(peak, s[j]);
  float shrink = std::exp(top - peak);  // 0 at the first block, where top is -inf
  Vec sum = {};
  for (int64_t j = begin / LANES * LANES; j < end; j += LANES) {
    Vec p = exp_of(load(s + j) - peak);
    for (int i = 0; i < LANES; ++i) p[i] = (j + i >= begin && j + i < end) ? p[i] : 0.0f;
    store(s + j, p);
    sum += p;
  }
  float block_total;
  lane_sums<1>(&sum, &block_total);
  total = total * shrink + block_total;
  top = peak;
  if (shrink != 1.0f)
    for (int64_t d = 0; d < a.Dv; ++d) acc[d] *= shrink;
  int64_t d = 0;
  for (; d + 4 * LANES <= a.Dv; d += 4 * LANES) mix<4>(s, values, begin, end, d, acc);
  for (; d + LANES <= a.Dv; d += LANES) mix<1>(s, values, begin, end, d, acc);
  for (; d < a.Dv; ++d)
    for (int64_t j = begin; j < end; ++j) acc[d] = std::fma(s[j], values[j][d], acc[d]);
}

template <typename T>
void finish_row(const AttendArgs<T>& a, int64_t token, int64_t head, const float* acc, float top, float total) {
  float factor = 1.0f;
  if (a.sinks) {
    float peak = std::max(top, a.sinks[head]);
    factor = std::exp(top - peak);
    total = total * factor + std::exp(a.sinks[head] - peak);
  }
  T* out = a.out + (token * a.Hq + head) * a.Dv;
  for (int64_t d = 0; d < a.Dv; ++d) out[d] = static_cast<T>(acc[d] * factor / total);
}

template <typename T>
void attend_block(const AttendArgs<T>& a, const Tile& t, int64_t kv_head, int64_t base, Scratch& s) {
  int64_t group = a.Hq / a.Hkv, rows = (t.end - t.begin) * group;
  int64_t begin = std::max(t.low, base) - base, end = std::min(t.high, base + KEYS) - base;
  const int64_t* table = a.tables + a.seq_ids[t.begin] * a.table_width;
  const T *k_rows[KEYS], *v_rows[KEYS];
  for (int64_t j = begin; j < end; ++j) {
    int64_t page = table[(base + j) / a.page], slot = (base + j) % a.page;
    k_rows[j] = a.k_pages + page * a.k_page + kv_head * a.k_head + slot * a.k_slot;
    v_rows[j] = a.v_pages + page * a.v_page + kv_head * a.v_head + slot * a.v_slot;
  }
  const float *keys[KEYS], *values[KEYS];
  rows_as_float(k_rows + begin, end - begin, a.D, s.k.data(), keys + begin);
  rows_as_float(v_rows + begin, end - begin, a.Dv, s.v.data(), values + begin);
  for (int64_t m = 0; m < rows; m += MAX_TILE) {
    scores_some<MAX_TILE>(keys + begin, end - begin, s.q.data() + m * a.D, a.D,
                          s.scores.data() + m * KEYS + begin, std::min<int64_t>(MAX_TILE, rows - m));
  }
  for (int64_t m = 0; m < rows; ++m) {
    int64_t token = t.begin + m / group;
    int64_t from = std::max<int64_t>(a.first_key(token) - base, 0);
    int64_t to = std::min(a.positions[token] + 1 - base, KEYS);
    if (from < to) {
      row_block(a, s.scores.data() + m * KEYS, from, to, values, s.acc.data() + m * a.Dv, s.top[m], s.total[m]);
    }
  }
}

template <typename T>
void attend_item(const AttendArgs<T>& a, const Tile& t, int64_t kv_head, Scratch& s) {
  int64_t group = a.Hq / a.Hkv, rows = (t.end - t.begin) * group;
  std::fill_n(s.acc.begin(), rows * a.Dv, 0.0f);
  std::fill_n(s.top.begin(), rows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.total.begin(), rows, 0.0f);
  for (int64_t m = 0; m < rows; ++m) {
    const T* from = a.q + (kv_head * group + m % group) * a.q_head + (t.begin + m / group) * a.q_token;
    widen(s.q.data() + m * a.D, from, a.D);
  }
  for (int64_t base = t.low / KEYS * KEYS; base < t.high; base += KEYS) attend_block(a, t, kv_head, base, s);
  for (int64_t m = 0; m < rows; ++m) {
    finish_row(a, t.begin + m / group, kv_head * group + m % group, s.acc.data() + m * a.Dv, s.top[m], s.total[m]);
  }
}

template <typename T>
void attend_all(const AttendArgs<T>& a) {
  std::vector<Tile> tiles = tiles_of(a);
  int64_t items = static_cast<int64_t>(tiles.size()) * a.Hkv, work = 0, longest = 0;
  for (const Tile& t : tiles) {
    work += (t.high - t.low) * (t.end - t.begin) * a.Hq * (a.D + a.Dv);
    longest = std::max(longest, t.end - t.begin);
  }
  // under about 10 us of work a second thread costs more than it saves
  int64_t threads = work < (1 << 17) ? 1 : std::min<int64_t>(at::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Scratch scratch(longest * (a.Hq / a.Hkv), a.D, a.Dv);
    // later tiles of a prefill see more keys: hand them out first
    for (int64_t i = next++; i < items; i = next++) {
      int64_t at = items - 1 - i;
      attend_item(a, tiles[at / a.Hkv], at % a.Hkv, scratch);
    }
  });
}

}  // namespace llmopt
