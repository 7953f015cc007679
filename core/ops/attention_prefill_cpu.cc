#include "cpu/attend_amx.h"
#include "ops/attention.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void attention_prefill(ThreadPool& pool, const Attention& a) {
  const int64_t d = a.k_pages.shape[3], d_pad = round_up(d, kWidth), h_kv = a.k_pages.shape[1], group = a.q.shape[1] / d / h_kv;
  const int64_t n_entry = a.kv_len.shape[0], block_rows = attention_block_rows(group), block_tokens = block_rows / group;
  const int64_t per_thread = attention_thread_floats(group, d);
  const int32_t *q_begin = static_cast<const int32_t*>(a.q_begin.data), *kv_len = static_cast<const int32_t*>(a.kv_len.data);

  int64_t n_block = 0;
  for (int64_t e = 0; e < n_entry; ++e) n_block += (q_begin[e + 1] - q_begin[e] + block_tokens - 1) / block_tokens;

  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(n_block * h_kv, [&](int64_t item, int32_t thread) {
      int64_t block = item / h_kv, e = 0;
      for (int64_t n; block >= (n = (q_begin[e + 1] - q_begin[e] + block_tokens - 1) / block_tokens); block -= n) ++e;
      const int64_t row = q_begin[e] + block * block_tokens, n_tok = min64(block_tokens, q_begin[e + 1] - row);
      const RowBlock b{e, item % h_kv, group, n_tok * group, row, kv_len[e] - (q_begin[e + 1] - row)};
      const AttendScratch s =
          AttendScratch::at(static_cast<float*>(a.scratch.data) + thread * per_thread, attention_scratch_rows(group), d);
      load_block<W>(a, b, d, s);
      clear(s.all, b.n_row, d_pad);
      const int64_t first = visible(a, b.first_position).begin, last = b.first_position + n_tok;
      for (int64_t c = first / kChunkTokens; c * kChunkTokens < last; ++c) {
        attend_chunk<W>(a, b, c, s);
        for (int64_t i = 0; i < b.n_row; ++i)
          merge_row(s.all.top[i], s.all.total[i], s.all.sum + i * d_pad, s.chunk.top[i], s.chunk.total[i], s.chunk.sum + i * d_pad, d_pad);
      }
      for (int64_t i = 0; i < b.n_row; ++i)
        write_row(a, row + i / group, b.kv_head * group + i % group, s.all.sum + i * d_pad, s.all.total[i], d);
    });
  });
}

}  // namespace prt::PRT_ISA
