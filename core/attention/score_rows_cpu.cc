#include "attention/choice.h"
#include "cpu/attend.h"
#include "cpu/dot.h"
#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// scores of kRows heads of a group for the n keys of a page
template <class W, int kRows>
PRT_INLINE void score_page(const float* q, int64_t d, const typename W::T* k, int64_t n, float scale, float* out, int64_t ld) {
  float s[kRows * 4];
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    dot_tile<DotF32<W>, kRows, 4>(q, d, k + i * d, d, d, s);
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < 4; ++j) out[r * ld + i + j] = s[r * 4 + j] * scale;
  }
  for (; i < n; ++i) {
    dot_tile<DotF32<W>, kRows, 1>(q, d, k + i * d, d, d, s);
    for (int r = 0; r < kRows; ++r) out[r * ld + i] = s[r] * scale;
  }
}

}  // namespace

// One item per page of an entry and kv head, then one per query head for the sums.
void score_rows(ThreadPool& pool, const ScoreRows& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv, n_entry = a.q.shape[0];
  const int64_t room = a.scores.shape[2], max_pages = a.page_table.shape[1];
  const auto* kv_len = static_cast<const int32_t*>(a.kv_len.data);
  const auto left_alone = [&](int64_t e) { return a.state.data && static_cast<const int32_t*>(a.state.data)[e] < 0; };
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(n_entry * h_kv * max_pages, [&](int64_t item, int32_t) {
      const int64_t e = item / (h_kv * max_pages), kv_head = item / max_pages % h_kv, row = item % max_pages * kPageTokens;
      if (left_alone(e) || row >= kv_len[e]) return;
      const int64_t page = a.page_table.row<int32_t>(e)[row / kPageTokens], n = min64(kPageTokens, kv_len[e] - row);
      const auto* k = static_cast<const typename W::T*>(a.k_pages.data) + (page * h_kv + kv_head) * kPageTokens * d;
      for (int64_t g = 0; g < group;) {
        const int64_t head = kv_head * group + g;
        const float* q = a.q.row<float>(e) + head * d;
        float* out = a.scores.row<float>(e) + head * room + row;
        if (g + 3 <= group) score_page<W, 3>(q, d, k, n, a.scale, out, room), g += 3;
        else score_page<W, 1>(q, d, k, n, a.scale, out, room), ++g;
      }
    });
  });
  pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t) {
    const int64_t e = item / h_q, h = item % h_q;
    if (!left_alone(e)) a.log_total.row<float>(e)[h] = log_sum_exp(a.scores.row<float>(e) + h * room, kv_len[e]);
  });
}

}  // namespace prt::PRT_ISA
