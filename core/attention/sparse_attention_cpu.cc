#include "attention/sparse_attention.h"
#include "cpu/attend_amx.h"
#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// Where the entry's ranges are; -1: it is left alone.
PRT_INLINE int64_t place_of(const SparseAttention& a, int64_t entry) {
  return a.state.data ? static_cast<const int32_t*>(a.state.data)[entry] : entry;
}

// Rows [begin, begin + kChunkTokens) of the kv head's choice, copied side by side. -> how many there are
PRT_INLINE int64_t collect(const SparseAttention& a, int64_t entry, int64_t kv_head, int64_t begin, char* k, char* v) {
  const int64_t h_kv = a.k_pages.shape[1], row_bytes = a.k_pages.shape[3] * (a.k_pages.dtype == DType::f32 ? 4 : 2);
  const int64_t place = place_of(a, entry), n_range = a.n_range.row<int32_t>(place)[kv_head];
  const int32_t *range = a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2, *pages = a.page_table.row<int32_t>(entry);
  int64_t n = 0, first = 0;
  for (int64_t end = n_range; first < end;) {  // the first range that goes on past `begin`
    const int64_t middle = (first + end) / 2;
    if (range[2 * middle + 1] > begin) end = middle;
    else first = middle + 1;
  }
  int64_t passed = first > 0 ? range[2 * first - 1] : 0;
  for (int64_t i = first; i < n_range && n < kChunkTokens; passed = range[2 * i + 1], ++i) {
    int64_t row = range[2 * i] + max64(0, begin - passed);
    for (const int64_t end = range[2 * i] + range[2 * i + 1] - passed; row < end && n < kChunkTokens;) {
      const int64_t m = min64(min64(end - row, kPageTokens - row % kPageTokens), kChunkTokens - n);
      const int64_t at = ((pages[row / kPageTokens] * h_kv + kv_head) * kPageTokens + row % kPageTokens) * row_bytes;
      __builtin_memcpy(k + n * row_bytes, static_cast<const char*>(a.k_pages.data) + at, static_cast<size_t>(m * row_bytes));
      __builtin_memcpy(v + n * row_bytes, static_cast<const char*>(a.v_pages.data) + at, static_cast<size_t>(m * row_bytes));
      row += m;
      n += m;
    }
  }
  return n;
}

PRT_INLINE int64_t chunks_of(const SparseAttention& a, int64_t entry, int64_t kv_head) {
  const int64_t place = place_of(a, entry);
  if (place < 0) return 0;
  const int32_t *range = a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2, n = a.n_range.row<int32_t>(place)[kv_head];
  return n == 0 ? 0 : (range[2 * n - 1] + kChunkTokens - 1) / kChunkTokens;
}

// sum = the clusters' mean values, weighted by e^(tail - top). -> top and total
PRT_INLINE void attend_tail(const SparseAttention& a, int64_t entry, int64_t head, int64_t kv_head, float* sum, float& top, float& total) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], n_slot = a.value.shape[2];
  const int32_t *closed = a.closed.row<int32_t>(entry), *pages = a.page_table.row<int32_t>(entry) + closed[0];
  const int64_t n = (closed[1] - closed[0]) * n_slot;
  const float* score = a.tail.row<float>(place_of(a, entry)) + head * a.tail.shape[2];
  __builtin_memset(sum, 0, static_cast<size_t>(d) * sizeof(float));
  top = row_max(score, n);
  total = 0;
  if (top == -__builtin_inff()) return;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t m = min64(kWidth, n - j);
    float weight[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) weight[i] = i < m ? score[j + i] : -__builtin_inff();
    const vf w = exp(load(weight) - top);
    store(weight, w);
    total += PRT_ISA::sum(w);
    for (int64_t i = 0; i < m; ++i) {
      if (weight[i] == 0) continue;
      const uint8_t* value =
          static_cast<const uint8_t*>(a.value.data) + ((pages[(j + i) / n_slot] * h_kv + kv_head) * n_slot + (j + i) % n_slot) * d;
      int64_t c = 0;
      for (; c + kWidth <= d; c += kWidth) store(sum + c, fma(splat(weight[i]), F8::load(value + c), load(sum + c)));
      for (; c < d; ++c) sum[c] += weight[i] * F8::get(value[c]);
    }
  }
}

}  // namespace

// One item per chunk of chosen rows, so that heads with many share the threads with those that have few; then the chunks of a head are
// merged in order, and the clusters of the tail last. The rows of a chunk are collected into a cache of one head and at most 8 pages, which
// the code of dense attention then reads.
void sparse_attention(ThreadPool& pool, const SparseAttention& a) {
  const int64_t d = a.k_pages.shape[3], d_pad = round_up(d, kWidth), h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv;
  const int64_t n_entry = a.q.shape[0], per_thread = sparse_thread_floats(group, d), dense = attention_thread_floats(group, d);
  const int64_t max_chunk = (a.page_table.shape[1] * kPageTokens + kChunkTokens - 1) / kChunkTokens;
  float *base = static_cast<float*>(a.scratch.data), *partials = base + pool.size() * per_thread;
  const int64_t per_partial = sparse_partial_floats(h_q, d) / h_q * group;
  const auto partial_at = [&](int64_t entry, int64_t kv_head, int64_t chunk) {  // [sum of the group][top][total]
    float* at = partials + ((entry * h_kv + kv_head) * max_chunk + chunk) * per_partial;
    return Partial{at + group * d_pad, at + group * d_pad + group, at};
  };
  int64_t most = 0;
  for (int64_t i = 0; i < n_entry * h_kv; ++i) most = max64(most, chunks_of(a, i / h_kv, i % h_kv));

  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(n_entry * h_kv * most, [&](int64_t item, int32_t thread) {
      const int64_t chunk = item / (n_entry * h_kv), entry = item % (n_entry * h_kv) / h_kv, kv_head = item % h_kv;
      if (chunk >= chunks_of(a, entry, kv_head)) return;
      float* mine = base + thread * per_thread;
      float *k = mine + dense, *v = k + kChunkTokens * d;
      const int64_t n = collect(a, entry, kv_head, chunk * kChunkTokens, reinterpret_cast<char*>(k), reinterpret_cast<char*>(v));
      int32_t pages[kChunkTokens / kPageTokens];
      for (int32_t i = 0; i < kChunkTokens / kPageTokens; ++i) pages[i] = i;
      Attention b{};
      b.q = a.q;
      b.q.data = a.q.row<float>(entry) + kv_head * group * d;
      b.k_pages = a.k_pages;
      b.k_pages.data = k;
      b.k_pages.shape[0] = kChunkTokens / kPageTokens;
      b.k_pages.shape[1] = 1;
      b.v_pages = b.k_pages;
      b.v_pages.data = v;
      b.page_table.data = pages;
      b.page_table.row_stride = kChunkTokens / kPageTokens;
      b.scale = a.scale;
      const RowBlock block{0, 0, group, group, 0, n - 1};
      const AttendScratch s = AttendScratch::at(mine, attention_scratch_rows(group), d);
      load_block<W>(b, block, d, s);
      attend_chunk<W>(b, block, 0, s);
      const Partial into = partial_at(entry, kv_head, chunk);
      __builtin_memcpy(into.sum, s.chunk.sum, static_cast<size_t>(group * d_pad) * sizeof(float));
      __builtin_memcpy(into.top, s.chunk.top, static_cast<size_t>(group) * sizeof(float));
      __builtin_memcpy(into.total, s.chunk.total, static_cast<size_t>(group) * sizeof(float));
    });
  });
  pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t thread) {
    const int64_t entry = item / h_q, head = item % h_q, kv_head = head / group;
    if (place_of(a, entry) < 0) return;
    const int64_t chunks = chunks_of(a, entry, kv_head);
    float *sum = base + thread * per_thread, *rest = sum + d_pad, top = -__builtin_inff(), total = 0;
    __builtin_memset(sum, 0, static_cast<size_t>(2 * d_pad) * sizeof(float));
    for (int64_t c = 0; c < chunks; ++c) {
      const Partial p = partial_at(entry, kv_head, c);
      merge_row(top, total, sum, p.top[head % group], p.total[head % group], p.sum + head % group * d_pad, d_pad);
    }
    if (a.tail.data) {
      float rest_top, rest_total;
      attend_tail(a, entry, head, kv_head, rest, rest_top, rest_total);
      merge_row(top, total, sum, rest_top, rest_total, rest, d_pad);
    }
    float* out = a.out.row<float>(entry) + head * d;
    const float scale = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t i = 0; i < d; ++i) out[i] = sum[i] * scale;
  });
}

}  // namespace prt::PRT_ISA
