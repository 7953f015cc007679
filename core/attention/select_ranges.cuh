// The union of a group's choices as ranges, and what share of the exact mass they hold.
#pragma once
#include "attention/mass_cuda.cuh"
#include "attention/select_choose.cuh"

namespace prt::cuda::selecting {

// By the first block of the cluster: the bitmap becomes a list, every entry of it looks at the one before.
template <class T, int D>
__device__ void write_ranges(const Chooser<T, D>& x) {
  const SelectArgs& a = x.a;
  const Entry& e = x.e;
  ChooseShared& s = x.s;
  const int32_t* begin = x.begin;
  const int tid = threadIdx.x, words = (e.n_cluster + 31) / 32, each = (words + kThreads - 1) / kThreads;
  const int first_word = min(tid * each, words), last_word = min(first_word + each, words);
  int2 mine{0, 0}, n_chosen;
  for (int w = first_word; w < last_word; ++w) mine.x += __popc(x.chosen[w]);
  const int at = block_scan(mine, s.sums, n_chosen).x, front = e.first_page * kPage, window = e.len - e.end_page * kPage;
  int2* to = a.ranges + a.place(x.entry) * a.ranges_stride + x.kv_head * a.max_range;
  int n = front > 0, rows = front, end = front > 0 ? front : -1;  // ranges begun, rows in them, where the last one ends
  if (tid == 0 && front > 0) to[0].x = 0;
#pragma unroll 1
  for (int from = 0; from < n_chosen.x; from += kBins) {
    int put = at - from;
    for (int w = first_word; w < last_word; ++w)
      for (uint32_t bits = x.chosen[w]; bits != 0; bits &= bits - 1, ++put)
        if (put >= 0 && put < kBins) s.chosen[put] = 32 * w + __ffs(static_cast<int>(bits)) - 1;
    __syncthreads();
    const int m = min(kBins, n_chosen.x - from);
#pragma unroll 1
    for (int i0 = 0; i0 < m; i0 += kThreads) {
      const int i = i0 + tid, j = s.chosen[min(i, m - 1)], row = begin[j], n_row = begin[j + 1] - row;
      const bool there = i < m, starts = there && row != (i == 0 ? end : begin[s.chosen[i - 1] + 1]);
      int2 total;
      const int2 before = block_scan(int2{starts, there ? n_row : 0}, s.sums, total);
      if (starts) {
        if (n + before.x > 0) to[n + before.x - 1].y = rows + before.y;
        to[n + before.x].x = row;
      }
      if (there && a.tail)
        for (int head = 0; head < a.group; ++head) a.tail_of(a.place(x.entry), x.kv_head, head)[j] = kNegInf;
      n += total.x, rows += total.y;
    }
    end = begin[s.chosen[m - 1] + 1];
    __syncthreads();
  }
  if (tid != 0) return;
  if (window > 0 && end != e.end_page * kPage) {
    if (n > 0) to[n - 1].y = rows;
    to[n++].x = e.end_page * kPage;
  }
  if (n > 0) to[n - 1].y = rows + window;
  a.n_range[a.place(x.entry) * a.n_range_stride + x.kv_head] = n;
  if (a.made && x.kv_head == 0) a.made[a.place(x.entry)] = e.len;
  if (!a.counters) return;
  const int exact = e.len - (e.end_page - e.first_page) * kPage;
  x.add(&AttentionCounters::n_step, 1);
  x.add(&AttentionCounters::n_context, e.len);
  x.add(&AttentionCounters::n_selected, rows + window - exact);
  x.add(&AttentionCounters::n_exact, exact);
  x.add(&AttentionCounters::n_mass, a.group);
  if (a.made) x.add(&AttentionCounters::n_choice, 1);
}

// The share of the exact mass that the ranges hold, for benchmarks: a block per query head goes through all keys.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) measure_kernel(const __grid_constant__ SelectArgs a) {
  __shared__ float2 room[2][kWarps];
  const int head = blockIdx.x, kv_head = blockIdx.y, entry = blockIdx.z;
  pdl_wait();
  pdl_launch();
  const int32_t *pages = a.page_table + entry * a.table_stride, len = a.kv_len[entry];
  const int place = a.place(entry);
  if (place < 0) return;
  const int2* range = a.ranges + place * a.ranges_stride + kv_head * a.max_range;
  const int n_range = a.n_range[place * a.n_range_stride + kv_head];
  const RowScorer<T, D> q(a.query<T>(entry, kv_head, head), a.d);
  const HeadKeys<T> keys{static_cast<const T*>(a.k), pages, a.h_kv, kv_head, a.d};
  const float share = held_share<kWarps>(q, keys, len, range, n_range, a.scale * kLog2e, room);
  if (threadIdx.x > 0) return;
  a.true_mass[entry * a.true_stride + kv_head * a.group + head] = share;
  if (a.counters) count_true(a.counters + kv_head * kAttentionCounters, share, a.p);
}

}  // namespace prt::cuda::selecting
