#include "attention/choice.h"
#include "attention/mass_cpu.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void count_rows(ThreadPool& pool, const CountRows& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv, n_entry = a.q.shape[0];
  const auto* kv_len = static_cast<const int32_t*>(a.kv_len.data);
  const auto place_of = [&](int64_t e) { return a.state.data ? static_cast<const int32_t*>(a.state.data)[e] : static_cast<int32_t>(e); };
  if (a.true_mass.data)
    with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
      using W = decltype(format);
      pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t) {
        const int64_t e = item / h_q, h = item % h_q, kv_head = h / group, place = place_of(e);
        if (place < 0) return;
        const HeadKeys keys{a.k_pages, a.page_table.row<int32_t>(e), kv_head, d, a.q.row<float>(e) + h * d, a.scale};
        a.true_mass.row<float>(e)[h] = held_share<W>(keys, kv_len[e], a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2,
                                                     a.n_range.row<int32_t>(place)[kv_head]);
      });
    });
  for (int64_t e = 0; e < n_entry; ++e) {
    const int64_t place = place_of(e), len = kv_len[e];
    if (place < 0 && a.closed.data) continue;
    const int64_t made = place >= 0 && a.made.data ? static_cast<const int32_t*>(a.made.data)[place] : len;
    const int64_t end = window_begin(made, a.sinks, a.window, a.unit);
    const int64_t exact =
        a.closed.data ? len - (a.closed.row<int32_t>(e)[1] - a.closed.row<int32_t>(e)[0]) * kPageTokens : min64(a.sinks, end) + len - end;
    for (int64_t h = 0; h < h_kv; ++h) {
      AttentionCounters& c = static_cast<AttentionCounters*>(a.counters.data)[h];
      if (place < 0) {
        count_step(c, len, exact, len);
        ++c.n_full;
        continue;
      }
      const int64_t n = a.n_range.row<int32_t>(place)[h];
      count_step(c, len, exact, n > 0 ? (a.ranges.row<int32_t>(place) + h * a.ranges.shape[2] * 2)[2 * n - 1] : 0);
      for (int64_t g = 0; a.true_mass.data && g < group; ++g) count_true(c, a.true_mass.row<float>(e)[h * group + g], a.p);
    }
  }
}

}  // namespace prt::PRT_ISA
