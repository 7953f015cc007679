// The union of a group's choices as ranges, and what share of the exact mass they hold.
#pragma once
#include "attention/mass_cuda.cuh"
#include "attention/select_choose.cuh"

namespace prt::cuda::selecting {

// In the tail, what is attended to is worth nothing: the blocks of a cluster share the query heads, the first block comes last.
template <class T, int D>
__device__ void clear_tail(const Chooser<T, D>& x) {
  const SelectArgs& a = x.a;
  const uint32_t* chosen = in_block(x.chosen, 0);
#pragma unroll 1
  for (int head = x.blocks - 1 - x.rank; head < a.group; head += x.blocks) {
    float* tail = a.tail_of(a.place(x.entry), x.kv_head, head);
#pragma unroll 1
    for (int w = x.tid; w < (x.e.n_cluster + 31) / 32; w += kThreads)
      for (uint32_t bits = chosen[w]; bits != 0; bits &= bits - 1) tail[32 * w + __ffs(static_cast<int>(bits)) - 1] = kNegInf;
  }
}

// By the first block of the cluster, from the bitmap: clusters are neighbours in the order of their rows, so a run of bits is a range, or
// goes on with the one before if only empty clusters are between.
template <class T, int D>
__device__ void write_ranges(const Chooser<T, D>& x) {
  const SelectArgs& a = x.a;
  const Entry& e = x.e;
  ChooseShared& s = x.s;
  const int32_t* begin = x.begin;
  const auto* chosen = reinterpret_cast<const uint16_t*>(x.chosen);  // by 16, so that 512 threads have work at 128K
  const int tid = threadIdx.x, words = (e.n_cluster + 15) / 16, each = (words + kThreads - 1) / kThreads;
  const int first_word = min(tid * each, words), last_word = min(first_word + each, words);
  const int front = e.first_page * kPage, window = e.len - e.end_page * kPage;
  int2* to = a.ranges + a.place(x.entry) * a.ranges_stride + x.kv_head * a.max_range;
  const auto joins = [&](int j) {  // a run of bits that starts with j, with what is in front of it
    int before = j - 1;
    while (before >= 0 && begin[before] == begin[j]) --before;
    return before < 0 ? front > 0 : (x.chosen[before / 32] >> before % 32 & 1) != 0;
  };
  const auto each_run = [&](auto&& f) {  // f(first row, rows, whether a range starts)
#pragma unroll 1
    for (int w = first_word; w < last_word; ++w)
#pragma unroll 1
      for (uint32_t bits = chosen[w]; bits != 0;) {
        const uint32_t first = bits & (0 - bits), rest = bits & (bits + first);  // the lowest run of ones goes over into the bit behind it
        const int j = 16 * w + __ffs(static_cast<int>(first)) - 1, end = 16 * w + __ffs(static_cast<int>(bits + first)) - 1;
        bits = rest;
        f(begin[j], begin[end] - begin[j], !joins(j));
      }
  };
  int2 mine{0, 0}, all;  // ranges, rows
  each_run([&](int, int rows, bool starts) { mine.x += starts, mine.y += rows; });
  int2 at = block_scan(mine, s.sums, all);
  at.x += front > 0, at.y += front;
  if (tid == 0 && front > 0) to[0].x = 0;
  each_run([&](int row, int rows, bool starts) {
    if (starts) {
      if (at.x > 0) to[at.x - 1].y = at.y;
      to[at.x++].x = row;
    }
    at.y += rows;
  });
  if (tid != 0) return;
  int n = all.x + (front > 0);
  const int rows = all.y + front;
  if (window > 0 && !joins(e.n_cluster)) {
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
