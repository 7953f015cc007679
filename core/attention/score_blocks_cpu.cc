#include "attention/choice.h"
#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void page_bounds(ThreadPool& pool, const PageBounds& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    using T = typename W::T;
    pool.parallel_for(a.pages.shape[0] * h_kv, [&](int64_t item, int32_t) {
      const int64_t tile = static_cast<const int32_t*>(a.pages.data)[item / h_kv] * h_kv + item % h_kv;
      for (int64_t b = 0; b < kPageTokens / kBlockRows; ++b) {
        const T* k = static_cast<const T*>(a.k_pages.data) + (tile * kPageTokens + b * kBlockRows) * d;
        T *low = static_cast<T*>(a.low.data) + (tile * kPageTokens / kBlockRows + b) * d,
          *high = static_cast<T*>(a.high.data) + (tile * kPageTokens / kBlockRows + b) * d;
        for (int64_t i = 0; i < d; ++i) {
          low[i] = high[i] = k[i];
          for (int64_t r = 1; r < kBlockRows; ++r) {
            const T x = k[r * d + i];
            if (W::get(x) < W::get(low[i])) low[i] = x;
            if (W::get(x) > W::get(high[i])) high[i] = x;
          }
        }
      }
    });
  });
}

// max(q low, q high) is q high where q > 0 and q low elsewhere, so the bound is two dot products.
void score_blocks(ThreadPool& pool, const ScoreBlocks& a) {
  const int64_t d = a.low.shape[3], h_kv = a.low.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv, n_entry = a.q.shape[0];
  constexpr int64_t kBlocks = kPageTokens / kBlockRows;
  with_weight(static_cast<int32_t>(a.low.dtype), [&](auto format) {
    using W = decltype(format);
    using T = typename W::T;
    pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t) {
      const int64_t e = item / h_q, h = item % h_q, n = (static_cast<const int32_t*>(a.kv_len.data)[e] - 1) / kPageTokens;
      const float* q = a.q.row<float>(e) + h * d;
      float positive[kMaxHead], negative[kMaxHead];
      for (int64_t i = 0; i < d; ++i) {
        positive[i] = q[i] > 0 ? q[i] : 0;
        negative[i] = q[i] > 0 ? 0 : q[i];
      }
      float* out = a.scores.row<float>(e) + h * a.scores.shape[2];
      for (int64_t p = 0; p < n; ++p) {
        const int64_t at = (a.page_table.row<int32_t>(e)[p] * h_kv + h / group) * kBlocks * d;
        const T *low = static_cast<const T*>(a.low.data) + at, *high = static_cast<const T*>(a.high.data) + at;
        for (int64_t b = 0; b < kBlocks; ++b, low += d, high += d) {
          vf sum_of{};
          int64_t i = 0;
          for (; i + kWidth <= d; i += kWidth) {
            sum_of = fma(load(positive + i), W::load(high + i), sum_of);
            sum_of = fma(load(negative + i), W::load(low + i), sum_of);
          }
          float total = sum(sum_of);
          for (; i < d; ++i) total += positive[i] * W::get(high[i]) + negative[i] * W::get(low[i]);
          out[p * kBlocks + b] = total * a.scale;
        }
      }
      a.log_total.row<float>(e)[h] = n > 0 ? log_sum_exp(out, n * kBlocks) : 0;
    });
  });
}

}  // namespace prt::PRT_ISA
