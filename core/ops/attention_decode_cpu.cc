#include "cpu/attend_amx.h"
#include "ops/attention.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

// One item per (entry, chunk of keys, kv head), so that a single long sequence keeps every thread busy; then the chunks of a row are
// merged in order. Entries go in groups whose partial results fit the scratch.
void attention_decode(ThreadPool& pool, const Attention& a) {
  const int64_t d = a.k_pages.shape[3], d_pad = round_up(d, kWidth), h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv;
  const int64_t n_entry = a.kv_len.shape[0], per_thread = attention_thread_floats(group, d);
  const int32_t* kv_len = static_cast<const int32_t*>(a.kv_len.data);
  float* partials = static_cast<float*>(a.scratch.data) + pool.size() * per_thread;
  const int64_t per_partial = attention_partial_floats(h_q, d);
  const int64_t room = (a.scratch.size() - pool.size() * per_thread) / per_partial;

  const auto left_alone = [&](int64_t e) { return a.state.data && static_cast<const int32_t*>(a.state.data)[e] < 0; };
  const auto chunks_of = [&](int64_t e) { return left_alone(e) ? 0 : (kv_len[e] + kChunkTokens - 1) / kChunkTokens; };
  const auto partial_at = [&](int64_t slot, int64_t kv_head) {  // [sum of all heads][top][total]
    float* base = partials + slot * per_partial;
    return Partial{base + h_q * d_pad + kv_head * group, base + h_q * d_pad + h_q + kv_head * group, base + kv_head * group * d_pad};
  };

  for (int64_t e0 = 0; e0 < n_entry;) {
    int64_t e1 = e0, slots = 0;
    while (e1 < n_entry && slots + chunks_of(e1) <= room) slots += chunks_of(e1++);
    with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
      using W = decltype(format);
      pool.parallel_for(slots * h_kv, [&](int64_t item, int32_t thread) {
        const int64_t slot = item / h_kv;
        int64_t e = e0, c = slot;
        while (c >= chunks_of(e)) c -= chunks_of(e++);
        const RowBlock b{e, item % h_kv, group, group, e, kv_len[e] - 1};
        const Partial into = partial_at(slot, b.kv_head);
        const KeyRange range = visible(a, b.first_position);
        if ((c + 1) * kChunkTokens <= range.begin) return clear(into, group, d_pad);
        const AttendScratch s =
            AttendScratch::at(static_cast<float*>(a.scratch.data) + thread * per_thread, attention_scratch_rows(group), d);
        load_block<W>(a, b, d, s);
        attend_chunk<W>(a, b, c, s);
        __builtin_memcpy(into.sum, s.chunk.sum, static_cast<size_t>(group * d_pad) * sizeof(float));
        __builtin_memcpy(into.top, s.chunk.top, static_cast<size_t>(group) * sizeof(float));
        __builtin_memcpy(into.total, s.chunk.total, static_cast<size_t>(group) * sizeof(float));
      });
    });
    pool.parallel_for(e1 - e0, [&](int64_t i, int32_t thread) {
      if (left_alone(e0 + i)) return;
      const AttendScratch s =
          AttendScratch::at(static_cast<float*>(a.scratch.data) + thread * per_thread, attention_scratch_rows(group), d);
      int64_t slot = 0;
      for (int64_t e = e0; e < e0 + i; ++e) slot += chunks_of(e);
      for (int64_t h = 0; h < h_q; ++h) {
        float top = -__builtin_inff(), total = 0, *sum = s.all.sum;
        __builtin_memset(sum, 0, static_cast<size_t>(d_pad) * sizeof(float));
        for (int64_t c = 0; c < chunks_of(e0 + i); ++c) {
          const Partial p = partial_at(slot + c, h / group);
          merge_row(top, total, sum, p.top[h % group], p.total[h % group], p.sum + h % group * d_pad, d_pad);
        }
        write_row(a, e0 + i, h, sum, total, d);
        if (a.scores.data) a.log_total.row<float>(e0 + i)[h] = top + static_cast<float>(__builtin_log(static_cast<double>(total)));
      }
    });
    e0 = e1;
  }
}

}  // namespace prt::PRT_ISA
