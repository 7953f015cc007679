// The inner part of CPU attention, shared by prefill and decode: a block of query rows of one kv head against chunks of its pages.
//
// Every row sees its keys in the same order, page by page with a running softmax, and partial results of kChunkTokens keys are
// merged in the order of the chunks. Which rows share a block, and whether the chunks of a row ran on one thread or on many, does
// not change a bit of the result: a token decoded alone equals the same token inside a prompt.
#pragma once
#include "cpu/simd.h"
#include "cpu/transpose.h"
#include "ops/ops.h"

namespace prt::PRT_ISA {

constexpr int kRowTile = 4;
#if defined(__AVX512F__)
constexpr int kVecTile = 4;
#else
constexpr int kVecTile = 2;
#endif

// c[r][n] = (add ? c[r][n] : 0) + sum_k a[r][k] b[k][n] for kRows rows and kVecs vectors of columns, k in order
template <int kRows, int kVecs>
PRT_INLINE void product_tile(const float* a, int64_t ld_a, const float* b, int64_t ld_b, int64_t n_k, float* c, int64_t ld_c, bool add) {
  vf acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = add ? load(c + r * ld_c + v * kWidth) : vf{};
  for (int64_t k = 0; k < n_k; ++k) {
    vf bv[kVecs];
    for (int v = 0; v < kVecs; ++v) bv[v] = load(b + k * ld_b + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const vf av = splat(a[r * ld_a + k]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ld_c + v * kWidth, acc[r][v]);
}

template <int kVecs>
PRT_INLINE void product_rows(int64_t n_row, const float* a, int64_t ld_a, const float* b, int64_t ld_b, int64_t n_k, float* c, int64_t ld_c,
                             bool add) {
  int64_t r = 0;
  for (; r + kRowTile <= n_row; r += kRowTile) product_tile<kRowTile, kVecs>(a + r * ld_a, ld_a, b, ld_b, n_k, c + r * ld_c, ld_c, add);
  for (; r < n_row; ++r) product_tile<1, kVecs>(a + r * ld_a, ld_a, b, ld_b, n_k, c + r * ld_c, ld_c, add);
}

// n_col is a multiple of kWidth.
PRT_INLINE void product(int64_t n_row, int64_t n_col, const float* a, int64_t ld_a, const float* b, int64_t ld_b, int64_t n_k, float* c,
                        int64_t ld_c, bool add) {
  int64_t n = 0;
  for (; n + kVecTile * kWidth <= n_col; n += kVecTile * kWidth) product_rows<kVecTile>(n_row, a, ld_a, b + n, ld_b, n_k, c + n, ld_c, add);
  for (; n < n_col; n += kWidth) product_rows<1>(n_row, a, ld_a, b + n, ld_b, n_k, c + n, ld_c, add);
}

// A running softmax-weighted sum for n_row rows.
struct Partial {
  float* top;    // [n_row] largest score so far
  float* total;  // [n_row] sum of e^(score - top)
  float* sum;    // [n_row][d_pad] sum of e^(score - top) v
};

PRT_INLINE void clear(const Partial& p, int64_t n_row, int64_t d_pad) {
  for (int64_t r = 0; r < n_row; ++r) {
    p.top[r] = -__builtin_inff();
    p.total[r] = 0;
  }
  __builtin_memset(p.sum, 0, static_cast<size_t>(n_row * d_pad) * sizeof(float));
}

PRT_INLINE float exp1(float x) { return exp(splat(x))[0]; }

// into += from, for one row each
PRT_INLINE void merge_row(float& top, float& total, float* sum, float from_top, float from_total, const float* from_sum, int64_t d_pad) {
  if (!(from_total > 0)) return;  // no key of this chunk is visible to the row
  const float best = top > from_top ? top : from_top, a = exp1(top - best), b = exp1(from_top - best);
  top = best;
  total = total * a + from_total * b;
  for (int64_t i = 0; i < d_pad; i += kWidth) store(sum + i, fma(load(sum + i), splat(a), load(from_sum + i) * b));
}

// One thread's working memory for a block of up to n_row query rows.
struct AttendScratch {
  float *q, *scores, *k, *v;  // q [n_row][d], scores [n_row][64], k [d][64] (transposed), v [64][d_pad]
  Partial chunk, all;

  static int64_t floats(int64_t n_row, int64_t d) {
    const int64_t d_pad = round_up(d, kWidth);
    return n_row * d + n_row * kPageTokens + d * kPageTokens + kPageTokens * d_pad + 2 * n_row * (2 + d_pad) + 64;
  }
  PRT_INLINE AttendScratch at(float* base, int64_t n_row, int64_t d) {
    const int64_t d_pad = round_up(d, kWidth);
    AttendScratch s;
    s.q = base;
    s.scores = s.q + n_row * d;
    s.k = s.scores + n_row * kPageTokens;
    s.v = s.k + d * kPageTokens;
    s.chunk.sum = s.v + kPageTokens * d_pad;
    s.all.sum = s.chunk.sum + n_row * d_pad;
    s.chunk.top = s.all.sum + n_row * d_pad;
    s.chunk.total = s.chunk.top + n_row;
    s.all.top = s.chunk.total + n_row;
    s.all.total = s.all.top + n_row;
    return s;
  }
};

// Query rows of one entry and one kv head: token t0 + i / group, query head kv_head * group + i % group, for i < n_row.
struct RowBlock {
  int64_t entry, kv_head, group, n_row;
  int64_t first_row;   // of q and out
  int64_t first_position;
  PRT_INLINE int64_t position_of(const RowBlock& b, int64_t i) { return b.first_position + i / b.group; }
};

PRT_INLINE void load_queries(const Attention& a, const RowBlock& b, int64_t d, float* q) {
  for (int64_t i = 0; i < b.n_row; ++i) {
    const float* from = a.q.row<float>(b.first_row + i / b.group) + (b.kv_head * b.group + i % b.group) * d;
    for (int64_t j = 0; j < d; ++j) q[i * d + j] = from[j];
  }
}

// The keys of chunk c that row i may see: [begin, end) in absolute positions.
struct KeyRange {
  int64_t begin, end;
};
PRT_INLINE KeyRange visible(const Attention& a, int64_t position) {
  return {a.window > 0 ? max64(0, position + 1 - a.window) : 0, position + 1};
}

template <class W>
PRT_INLINE void load_page(const Attention& a, int64_t page, int64_t kv_head, int64_t n_key, int64_t d, int64_t d_pad,
                          const AttendScratch& s) {
  const int64_t at = (page * a.k_pages.shape[1] + kv_head) * kPageTokens * d;
  const typename W::T *k = static_cast<const typename W::T*>(a.k_pages.data) + at,
                      *v = static_cast<const typename W::T*>(a.v_pages.data) + at;
  transpose_to_f32<W>(k, d, n_key, d, s.k, kPageTokens);
  for (int64_t r = 0; r < n_key; ++r) {
    float* out = s.v + r * d_pad;
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) store(out + i, W::load(v + r * d + i));
    for (; i < d; ++i) out[i] = W::get(v[r * d + i]);
    for (; i < d_pad; ++i) out[i] = 0;
  }
}

// The running softmax of one page: scores [n_row][64] become weights e^(scale score - top), sums of earlier pages shrink to the new top.
// Scores of keys in [n_key, n_pad), or that a row may not see, are not looked at; their weights are 0.
PRT_INLINE void softmax_page(const Attention& a, const RowBlock& b, int64_t key, int64_t n_key, int64_t n_pad, float scale, float* scores,
                             const Partial& into, int64_t d_pad) {
  for (int64_t r = 0; r < b.n_row; ++r) {
    float* score = scores + r * kPageTokens;
    const KeyRange range = visible(a, RowBlock::position_of(b, r));
    const int64_t lo = max64(0, range.begin - key), hi = min64(n_key, range.end - key);
    for (int64_t i = 0; i < min64(lo, n_pad); ++i) score[i] = -__builtin_inff();
    for (int64_t i = max64(0, hi); i < n_pad; ++i) score[i] = -__builtin_inff();
    if (a.scores.data) {  // decode: one token, and row r is a head of the group
      float* out = a.scores.row<float>(b.entry) + (b.kv_head * b.group + r) * a.scores.shape[2] + key;
      for (int64_t i = 0; i < n_key; ++i) out[i] = score[i] * scale;
    }
    vf best = splat(-__builtin_inff());
    for (int64_t i = 0; i < n_pad; i += kWidth) best = max(best, load(score + i));
    const float before = into.top[r], here = max_of(best) * scale, top = before > here ? before : here;
    if (top == -__builtin_inff()) {  // nothing visible yet: weights must be 0, not e^(-inf + inf)
      for (int64_t i = 0; i < n_pad; ++i) score[i] = 0;
      continue;
    }
    const vf minus_top = splat(-top);
    vf total{};
    for (int64_t i = 0; i < n_pad; i += kWidth) {
      const vf p = exp(fma(load(score + i), splat(scale), minus_top));
      store(score + i, p);
      total += p;
    }
    if (top == before) {
      into.total[r] += sum(total);
      continue;
    }
    const float shrink = exp1(before - top);
    into.total[r] = into.total[r] * shrink + sum(total);
    into.top[r] = top;
    for (int64_t i = 0; i < d_pad; i += kWidth) store(into.sum + r * d_pad + i, load(into.sum + r * d_pad + i) * shrink);
  }
}

// The pages of chunk c that some row of the block sees: f(key, n_key, page), key the position of the page's first token.
template <class F>
PRT_INLINE void for_pages(const Attention& a, const RowBlock& b, int64_t c, F&& f) {
  const int64_t first = visible(a, b.first_position).begin, last = visible(a, RowBlock::position_of(b, b.n_row - 1)).end;
  const int64_t begin = max64(c * kChunkTokens, first / kPageTokens * kPageTokens), end = min64((c + 1) * kChunkTokens, last);
  for (int64_t key = begin; key < end; key += kPageTokens)
    f(key, min64(kPageTokens, end - key), a.page_table.row<int32_t>(b.entry)[key / kPageTokens]);
}

// Attends the rows of `b` to chunk c in f32; load_queries has filled s.q. The result goes to `into`.
template <class W>
PRT_INLINE void attend_chunk_f32(const Attention& a, const RowBlock& b, int64_t c, const AttendScratch& s, const Partial& into) {
  const int64_t d = a.k_pages.shape[3], d_pad = round_up(d, kWidth);
  clear(into, b.n_row, d_pad);
  for_pages(a, b, c, [&](int64_t key, int64_t n_key, int64_t page) {
    const int64_t n_pad = round_up(n_key, kWidth);
    load_page<W>(a, page, b.kv_head, n_key, d, d_pad, s);
    product(b.n_row, n_pad, s.q, d, s.k, kPageTokens, d, s.scores, kPageTokens, false);
    softmax_page(a, b, key, n_key, n_pad, a.scale, s.scores, into, d_pad);
    product(b.n_row, d_pad, s.scores, kPageTokens, s.v, d_pad, n_key, into.sum, d_pad, true);
  });
}

PRT_INLINE void write_row(const Attention& a, int64_t row, int64_t head, const float* sum, float total, int64_t d) {
  float* out = a.out.row<float>(row) + head * d;
  const float scale = total > 0 ? 1.0f / total : 0.0f;
  for (int64_t i = 0; i < d; ++i) out[i] = sum[i] * scale;
}

}  // namespace prt::PRT_ISA
